"""save and load: one safetensors file that holds the packed weights, the rest of the model, and how to read them.

File format, version 1. The header's metadata holds ``format`` = "potqat", ``format_version`` = "1" and ``modules``,
a JSON object: module path -> {"kind": "linear" | "embedding", "shape": [N, K], "dtype": of the float table,
"config": PoTConfig.to_dict()}. Tensors: ``<path>.packed`` (uint8, layout of cpp/core/potqat.h), ``<path>.scale``
(float32 [G, N]), ``<path>.bias``, and every other parameter and buffer under its own name. A tensor that two names
share is stored once, and ``ties`` (JSON: name -> stored name) says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from potqat import ops
from potqat.config import PoTConfig
from potqat.modules import PackedEmbedding, PackedLinear

FORMAT, FORMAT_VERSION = "potqat", "1"


class PoTFormatError(ValueError):
    """A file that is not a potqat checkpoint, or one that cannot be trusted; names the file and the reason."""


def save(model: nn.Module, path: str | os.PathLike) -> int:
    """Write a model with packed modules to one file, atomically; returns its size in bytes.

    Raises:
        ValueError: the model holds no packed module.
    """
    path = Path(path)
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            linear = isinstance(module, PackedLinear)
            modules[name] = {
                "kind": "linear" if linear else "embedding",
                "shape": list(module.shape),
                "dtype": None if linear else str(module.dtype).removeprefix("torch."),
                "config": module.cfg.to_dict(),
            }
    if not modules:
        raise ValueError(f"potqat.save: {type(model).__name__} holds no packed module; quantize_ or convert_ it first")
    tensors, ties, stored = {}, {}, {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in stored:
            ties[name] = stored[key]
        else:
            stored[key] = name
            tensors[name] = tensor.detach().contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "modules": json.dumps(modules),
        "ties": json.dumps(ties),
    }
    # A reader never sees half a file: write beside it, then rename.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.touch()
    mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files that only the owner can read
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def load(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Turn a float model of the same architecture into the saved packed one, in place; returns it.

    Packed weights are memory-mapped: nothing is repacked or held twice.

    Raises:
        FileNotFoundError: no such file.
        PoTFormatError: not a potqat file, an unknown version, or tensors that do not fit the model. The model is
            untouched then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"potqat.load: no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PoTFormatError(f"{path}: not a potqat checkpoint (its metadata has no format={FORMAT!r})")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise PoTFormatError(
                    f"{path}: format version {metadata.get('format_version')!r}; this potqat reads {FORMAT_VERSION!r}"
                )
            modules, ties = json.loads(metadata["modules"]), json.loads(metadata["ties"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        tensors |= {name: tensors[stored] for name, stored in ties.items()}
        replacements = {name: _packed_module(name, fields, tensors) for name, fields in modules.items()}
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, ValueError) as error:
        if isinstance(error, PoTFormatError):
            raise
        raise PoTFormatError(f"{path}: {type(error).__name__}: {error}") from None
    _check_fit(path, model, replacements, tensors)
    for name, module in replacements.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.train(model.training))
    model.load_state_dict(tensors, assign=True)
    return model


def _packed_module(name: str, fields: dict, tensors: dict[str, torch.Tensor]) -> nn.Module:
    cfg, shape = PoTConfig.from_dict(fields["config"]), tuple(fields["shape"])
    packed, scale = tensors[f"{name}.packed"], tensors[f"{name}.scale"]
    ops.unpack(packed, scale, cfg, shape)  # refuses wrong shapes and dtypes, bad scales and codes
    if fields["kind"] == "linear":
        return PackedLinear(packed, scale, tensors.get(f"{name}.bias"), cfg, shape)
    return PackedEmbedding(packed, scale, cfg, shape, getattr(torch, fields["dtype"]))


def _check_fit(path: Path, model: nn.Module, replacements: dict[str, nn.Module], tensors: dict) -> None:
    """The model with its modules replaced must want exactly the file's tensors, shape by shape."""
    inside = tuple(f"{name}." for name in replacements)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith(inside)}
    for name, module in replacements.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise PoTFormatError(f"{path}: module {name} is not in this {type(model).__name__}") from None
        shape = tuple(getattr(old, "weight", torch.empty(0)).shape)
        if shape != module.shape:
            raise PoTFormatError(f"{path}: {name} is {list(module.shape)} in the file, {list(shape)} in the model")
        wanted |= {f"{name}.{key}": tuple(t.shape) for key, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise PoTFormatError(
                f"{path}: tensor {name}: the file has {_shown(found.get(name))}, the model wants "
                f"{_shown(wanted.get(name))}"
            )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
