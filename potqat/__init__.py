"""potqat: language-model weights as signed powers of two in 4 bits. Quantize, train through it, pack, run."""

from __future__ import annotations

import importlib

import torch  # noqa: F401  the op library resolves its symbols from the torch that is loaded

from potqat._C import __version__, cpu_info, set_isa
from potqat.checkpoint import PoTFormatError, load, save
from potqat.config import PoTConfig
from potqat.ops import compute_scale, embedding, fake_quantize, linear, pack, unpack
from potqat.quantize import convert_, prepare_qat_, quantize_
from potqat.report import Report

__all__ = [
    "PoTConfig",
    "PoTFormatError",
    "Report",
    "__version__",
    "compute_scale",
    "convert_",
    "cpu_info",
    "embedding",
    "fake_quantize",
    "linear",
    "load",
    "pack",
    "prepare_qat_",
    "pt2e",
    "quantize_",
    "save",
    "set_isa",
    "unpack",
]


def __getattr__(name: str):
    # torchao takes a second to import; only those who use PT2E pay for it.
    if name == "pt2e":
        return importlib.import_module("potqat.pt2e")
    raise AttributeError(f"module 'potqat' has no attribute {name!r}")
