"""Tensors to save, files made by hand, and what must hold when a folder is opened or refused."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from potqat.container import DTYPES, PoTFormatError, map_tensors, open_folder

TENSORS = {
    "a.scale": torch.tensor([[0.5, 0.25]]),
    "a.packed": torch.arange(256, dtype=torch.uint8).repeat(2).reshape(1, 1, 512),
    "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(7),
    "empty": torch.empty(0, 4),
}


def assemble(header: bytes | dict, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def take_apart(content: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def agrees_with_safetensors(stored):
    """The library reads the same names, dtypes and shapes, and its tensors are the bytes where we found them."""
    tensors = map_tensors(stored)
    assert list(tensors) == list(stored)
    for file in {item.file for item in stored.values()}:
        content = file.read_bytes()
        with safe_open(file, "pt") as handle:
            assert set(handle.keys()) == {item.name for item in stored.values() if item.file == file}
            for item in (item for item in stored.values() if item.file == file):
                found = handle.get_slice(item.name)
                assert (found.get_dtype(), tuple(found.get_shape())) == (item.dtype, item.shape)
                tensor = tensors[item.name]
                assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[item.dtype], item.shape)
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content[item.begin : item.end]


def refused(folder: Path, memory: int | None = None) -> str:
    """The reason, found quickly and in at most ``memory`` bytes: by default what JSON of that size takes in Python."""
    if memory is None:
        memory = 2**20 + 24 * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(PoTFormatError) as error:
            open_folder(folder)
        assert time.process_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message
