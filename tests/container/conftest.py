"""A folder with one good file."""

import pytest
import safetensors.torch
from container_files import TENSORS

from potqat.container import WEIGHTS


@pytest.fixture
def folder(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / WEIGHTS, {"format": "pt"})
    return tmp_path
