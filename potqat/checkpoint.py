"""save and load: a folder in Hugging Face's layout that holds a packed model.

``config.json`` holds the architecture (of a Hugging Face model, or of one whose ``config`` is a dataclass) and
``quantization_config`` (manifest.py specifies it). ``model.safetensors``, or the shards that
``model.safetensors.index.json`` names, hold the tensors: ``<path>.packed`` (uint8, layout of cpp/core/potqat.h),
``<path>.scale`` (float32 [G, N]) and ``<path>.bias`` of each packed module, and every other parameter and buffer under
its own name. What two names share is stored once. docs/format.md is the whole specification.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from potqat import _C, container, manifest, modules, reference
from potqat.container import PoTFormatError, Stored
from potqat.modules import Packed, Tied

CONFIG = "config.json"


def save(model: nn.Module, folder: str | os.PathLike) -> int:
    """Write a model with packed modules to a folder, made if needed; returns the bytes of config.json and the weights.

    Each file is written beside its place and renamed. Other files in the folder (a tokenizer's) stay.

    Raises:
        ValueError: the model holds no packed module.
        FileExistsError: ``folder`` is a file, or holds the shards of another checkpoint.
    """
    folder = Path(folder)
    config = _architecture(model) | {"quantization_config": manifest.describe(model)}
    if not config["quantization_config"]["modules"]:
        raise ValueError(f"potqat.save: {type(model).__name__} holds no packed module; quantize_ or convert_ it first")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"potqat.save: {folder} is a file; name a folder")
    if (folder / container.INDEX).exists():
        raise FileExistsError(f"potqat.save: {folder} holds the shards of another checkpoint; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = distinct_tensors(model)
    write(folder / container.WEIGHTS, lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))
    write(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n"))
    if getattr(model, "generation_config", None) is not None:  # how a Hugging Face model samples
        model.generation_config.save_pretrained(folder)
    return sum((folder / name).stat().st_size for name in (CONFIG, container.WEIGHTS))


def write(path: Path, make) -> None:
    """Let ``make`` write a file beside ``path``, then rename it: a reader never sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.touch()
    mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files that only the owner can read
    try:
        make(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def distinct_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict, contiguous, without the second names of tensors that are shared."""
    tensors, stored = {}, set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if not tensor.numel() or key not in stored:
            stored.add(key)
            tensors[name] = tensor.detach().contiguous()
    return tensors


def _architecture(model: nn.Module) -> dict[str, Any]:
    """What config.json says of the model itself; empty if the model has no ``config`` that can be written."""
    config = getattr(model, "config", None)
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]}
    if dataclasses.is_dataclass(config):
        return {"model_type": type(model).__name__.lower(), **dataclasses.asdict(config)}
    return {}


def load(folder: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Turn a float model of the same architecture into the saved packed one, in place; returns it.

    Tensors are memory-mapped, not copied: the file must stay as long as the model is used. The model's own weights are
    dropped, so it may be built on the meta device, where they take no memory.

    Raises:
        ValueError: a buffer that no file holds, as rotary frequencies, is on the meta device, where it has no values.
        FileNotFoundError: no such folder, or no checkpoint in it.
        PoTFormatError: files that are not potqat's, damaged, or do not fit the model. The model is untouched then, and
            nothing large was allocated.
    """
    folder = Path(folder)
    specs = manifest.parse(read_config(folder).get("quantization_config"), str(folder / CONFIG))
    stored = container.open_folder(folder)
    packed = manifest.build(model, specs, str(folder / CONFIG))
    names = _check_fit(folder, model, packed, stored)
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in names:
            raise ValueError(
                f"potqat.load: buffer {name} is on the meta device and in no file, {type(model).__name__} computes it "
                "when it is built: build the model on the CPU, or load a Hugging Face model with from_pretrained"
            )
    tensors = container.map_tensors(stored)
    check_values(packed, stored, tensors)
    modules.replace(model, {model.get_submodule(name): module for name, module in packed.items()})
    model.load_state_dict({name: tensors[source] for name, source in names.items()}, assign=True)
    for name, source in names.items():
        if name != source:  # assign makes two Parameters of one: the names that shared it share it again
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, attrgetter(source)(model))
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        PoTFormatError: it is not a JSON object, over 100 MB, or has a key twice.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"potqat: no file {path}; a saved model is a folder with {CONFIG} and {container.WEIGHTS}"
        )
    config = container.read_json(path)
    if not isinstance(config, dict):
        raise PoTFormatError(f"{path}: must be a JSON object, got {type(config).__name__}")
    return config


def _check_fit(folder: Path, model: nn.Module, packed: dict[str, Packed], stored: dict[str, Stored]) -> dict[str, str]:
    """The model with its modules replaced must want exactly the stored tensors.

    Returns:
        the names of its state_dict -> the stored name, another one where two names share a tensor.
    """
    inside = tuple(f"{name}." for name in packed)
    wanted = {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith(inside)}
    sources = {id(t): name for name, t in wanted.items() if name in stored}
    names = {name: sources.get(id(t), name) for name, t in wanted.items()}
    wanted = {names[name]: t for name, t in wanted.items()} | packed_tensors(packed)
    check_tensors(folder, wanted, stored)
    for name in stored.keys() - wanted.keys():
        raise PoTFormatError(f"{stored[name].file}: {name}: this {type(model).__name__} has no such tensor")
    return names | {name: name for name in packed_tensors(packed)}


def packed_tensors(packed: dict[str, Packed]) -> dict[str, torch.Tensor]:
    """The tensors of packed modules under their full names."""
    return {f"{name}.{key}": t for name, module in packed.items() for key, t in module.state_dict().items()}


def check_tensors(folder: Path, wanted: dict[str, torch.Tensor], stored: dict[str, Stored]) -> None:
    """Each wanted tensor must be stored in its shape and dtype; only floats that are no scales may have another width.

    Raises:
        PoTFormatError: names the file, the tensor and both values.
    """
    for name, tensor in wanted.items():
        found = stored.get(name)
        if found is None:
            raise PoTFormatError(f"{folder}: {name}: missing; the model wants {list(tensor.shape)}")
        if found.shape != tuple(tensor.shape):
            shapes = f"{list(found.shape)} in the file, {list(tensor.shape)} in the model"
            raise PoTFormatError(f"{found.file}: {name} is {shapes}")
        dtype, free = container.DTYPES[found.dtype], tensor.is_floating_point() and not name.endswith(".scale")
        if dtype != tensor.dtype and not (free and dtype.is_floating_point):
            raise PoTFormatError(f"{found.file}: {name}: dtype is {found.dtype}, the model wants {tensor.dtype}")


def check_values(packed: dict[str, Packed], stored: dict[str, Stored], tensors: dict[str, torch.Tensor]) -> None:
    """Refuse codes that no packer writes, and scales that are not positive and finite; allocates nothing large.

    Raises:
        PoTFormatError: names the file, the tensor and the place in it.
    """
    for name, module in packed.items():
        if isinstance(module, Tied):
            continue
        codes, scales = f"{name}.packed", f"{name}.scale"
        try:
            _C.check_packed(tensors[codes].numpy(), module.cfg.grid, *module.shape)
        except ValueError as error:
            raise PoTFormatError(f"{stored[codes].file}: {codes}: {error}") from None
        scale, limit = tensors[scales], torch.finfo(torch.float32).max / reference.levels(module.cfg.grid)[-1]
        bad = ~((scale > 0) & (scale <= limit))
        if bad.any():
            group, output = bad.nonzero()[0].tolist()
            raise PoTFormatError(
                f"{stored[scales].file}: {scales}: the scale of output {output}, group {group} is "
                f"{scale[group, output].item()}; it must be positive and at most {limit:.3g}"
            )
