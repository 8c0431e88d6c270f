"""The ``quantization_config`` of a saved model: what it says of each packed module, and the modules built from it.

Format version 1, in ``config.json`` (docs/format.md has an example):

    quant_method    "potqat"
    format_version  "1"
    modules         module path -> {
        kind         "linear" or "embedding"
        shape        [N, K] = [out_features, in_features] or [num_embeddings, embedding_dim]
        grid         "pot4", "e2m1", "int4" or "int8": the levels, and so the bits, of the codes
        granularity  "tensor", "channel" or the group size: which weights share a scale
        activations  "int8", "int16" or null (float): how the linear layer treats its input
        scale, rounding   how the weight was quantized
        sqnr_db      its error against the float weight, in dB (null: not measured, or no error)
        dtype        embeddings only: "float32", "bfloat16" or "float16", what a lookup gives
        tied_to      only if the codes are those of another module of this table: its path
    }
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from potqat import ops
from potqat.config import GRIDS, PoTConfig
from potqat.container import PoTFormatError
from potqat.modules import Packed, PackedEmbedding, PackedLinear, Tied, TiedEmbedding, TiedLinear, kind_of

QUANT_METHOD, FORMAT_VERSION = "potqat", "1"
CONFIG_FIELDS = ("grid", "granularity", "scale", "rounding", "activations")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Spec:
    """One packed module. ``dtype`` is None but for embeddings, ``tied_to`` None but for a module without codes."""

    kind: str
    shape: tuple[int, int]
    cfg: PoTConfig
    sqnr_db: float | None
    dtype: torch.dtype | None
    tied_to: str | None


def describe(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of a model with packed modules, of plain JSON types; no modules if it has none."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, Packed)}
    modules = {}
    for module, name in names.items():
        fields: dict[str, Any] = {
            "kind": "linear" if isinstance(module, PackedLinear) else "embedding",
            "shape": list(module.shape),
            **{field: getattr(module.cfg, field) for field in CONFIG_FIELDS},
            "sqnr_db": module.sqnr_db if module.sqnr_db is None or math.isfinite(module.sqnr_db) else None,
        }
        if isinstance(module, PackedEmbedding):
            fields["dtype"] = str(module.dtype).removeprefix("torch.")
        if isinstance(module, Tied):
            fields["tied_to"] = names[module.owner]
        modules[name] = fields
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "modules": modules}


def parse(config: object, where: str) -> dict[str, Spec]:
    """Read a ``quantization_config``; inverse of ``describe``.

    Args:
        where: what the error names, the path of the config.json.

    Raises:
        PoTFormatError: not potqat's, another format version, an unknown or missing key, a value outside its list.
    """
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        found = config.get("quant_method") if isinstance(config, Mapping) else config
        raise PoTFormatError(f"{where}: quantization_config is not potqat's (quant_method is {found!r})")
    if config.get("format_version") != FORMAT_VERSION:
        raise PoTFormatError(
            f"{where}: format version {config.get('format_version')!r}; this potqat reads {FORMAT_VERSION!r}; "
            "install a newer potqat, or write the file again with this one"
        )
    _check_keys(where, "quantization_config", config, {"quant_method", "format_version", "modules"})
    modules = config["modules"]
    if not isinstance(modules, Mapping) or not modules:
        raise PoTFormatError(f"{where}: quantization_config.modules must be an object with at least one module")
    specs = {name: _spec(f"{where}: {name}", fields) for name, fields in modules.items()}
    for name, spec in specs.items():
        owner = specs.get(spec.tied_to) if spec.tied_to is not None else spec
        if owner is None:
            raise PoTFormatError(f"{where}: {name}: tied to {spec.tied_to!r}, which the file does not have")
        if spec.tied_to is not None and owner.tied_to is not None:
            raise PoTFormatError(f"{where}: {name}: tied to {spec.tied_to!r}, which is tied itself")
        if spec.shape != owner.shape or spec.cfg != owner.cfg:
            raise PoTFormatError(
                f"{where}: {name}: tied to {spec.tied_to!r}, which has another shape or other settings"
            )
    return specs


def _spec(where: str, fields: object) -> Spec:
    if not isinstance(fields, Mapping):
        raise PoTFormatError(f"{where}: must be an object, got {fields!r}")
    kind = fields.get("kind")
    if kind not in ("linear", "embedding"):
        raise PoTFormatError(f"{where}: kind must be 'linear' or 'embedding', got {kind!r}")
    needed = {"kind", "shape", "sqnr_db", *CONFIG_FIELDS} | ({"dtype"} if kind == "embedding" else set())
    _check_keys(where, "it", fields, needed, {"tied_to"})
    shape = fields["shape"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise PoTFormatError(f"{where}: shape must be two positive integers, got {shape!r}")
    if shape[1] > ops.MAX_IN_FEATURES:
        raise PoTFormatError(f"{where}: {shape[1]} inputs, at most {ops.MAX_IN_FEATURES} keep int32 sums exact")
    if fields["grid"] not in GRIDS:
        raise PoTFormatError(f"{where}: grid must be one of {', '.join(GRIDS)}, got {fields['grid']!r}")
    try:
        cfg = PoTConfig(**{field: fields[field] for field in CONFIG_FIELDS})
    except (ValueError, TypeError) as error:
        raise PoTFormatError(f"{where}: {error}") from None
    sqnr_db = fields["sqnr_db"]
    if sqnr_db is not None and type(sqnr_db) not in (int, float):
        raise PoTFormatError(f"{where}: sqnr_db must be a number or null, got {sqnr_db!r}")
    dtype = fields.get("dtype")
    if kind == "embedding" and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise PoTFormatError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tied_to = fields.get("tied_to")
    if "tied_to" in fields and not isinstance(tied_to, str):
        raise PoTFormatError(f"{where}: tied_to must be a module path, got {tied_to!r}")
    return Spec(kind, (shape[0], shape[1]), cfg, sqnr_db, DTYPES.get(dtype), tied_to)


def _check_keys(
    where: str, what: str, found: Mapping, needed: set[str], optional: frozenset | set = frozenset()
) -> None:
    if missing := sorted(needed - set(found)):
        raise PoTFormatError(f"{where}: {what} lacks the key {missing[0]!r}")
    if unknown := sorted(set(found) - needed - optional, key=str):
        raise PoTFormatError(f"{where}: {what} has the unknown key {unknown[0]!r}")


def build(model: nn.Module, specs: Mapping[str, Spec], where: str) -> dict[str, Packed]:
    """Packed modules for the float modules that ``specs`` names, their codes and scales on the meta device (no memory).

    The model is not changed: put them in with ``modules.replace``.

    Raises:
        PoTFormatError: the model has no such module, or one of another kind or shape.
    """
    made: dict[str, Packed] = {}
    for name, spec in sorted(specs.items(), key=lambda item: item[1].tied_to is not None):  # owners first
        old = _float_module(model, name, spec, where)
        bias = getattr(old, "bias", None) if spec.kind == "linear" else None
        if spec.tied_to is not None:
            owner = made[spec.tied_to]
            new = (
                TiedLinear(owner, bias, spec.cfg)
                if spec.kind == "linear"
                else TiedEmbedding(owner, spec.cfg, spec.dtype)
            )
        else:
            n, k = spec.shape
            codes = torch.empty(ops.packed_shape(spec.cfg.grid, n, k), dtype=torch.uint8, device="meta")
            scale = torch.empty(spec.cfg.groups(k), n, dtype=torch.float32, device="meta")
            new = (
                PackedLinear(codes, scale, bias, spec.cfg, spec.shape)
                if spec.kind == "linear"
                else PackedEmbedding(codes, scale, spec.cfg, spec.shape, spec.dtype)
            )
        new.sqnr_db = spec.sqnr_db
        made[name] = new.train(old.training)
    return made


def _float_module(model: nn.Module, name: str, spec: Spec, where: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise PoTFormatError(f"{where}: module {name} is not in this {type(model).__name__}") from None
    kind = kind_of(module)
    if kind is None or (kind == "embedding") != (spec.kind == "embedding"):
        raise PoTFormatError(f"{where}: {name}: {spec.kind} in the file, {type(module).__name__} in the model")
    shape = tuple(reversed(module.weight.shape)) if kind == "conv1d" else tuple(module.weight.shape)
    if shape != spec.shape:
        raise PoTFormatError(f"{where}: {name} is {list(spec.shape)} in the file, {list(shape)} in the model")
    return module
