"""PoTConfig: every choice that quantization leaves open, and the only home of their defaults."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

GRIDS = ("pot4", "e2m1", "int4", "int8")
SCALES = ("absmax", "mse", "output", "learned", "paper")
ROUNDINGS = ("nearest", "log", "paper", "gptq", "reconstruct")
ACTIVATIONS = ("int8", "int16", None)
STES = ("clipped", "identity")
PACKED_GROUP_MULTIPLE = 32

_POT = re.compile(r"pot\((\d+)\)")


@dataclass(frozen=True)
class PoTConfig:
    """How weights are quantized. Frozen and hashable by value of its fields; unknown keys are errors.

    Args:
        grid: levels of linear weights: ``"pot4"``, ``"e2m1"``, ``"int4"``, ``"int8"``, or ``"pot(k)"`` with
            k = 0..30 (the papers' ranges [-2^k, 2^k], fake-quantization only).
        granularity: weights that share one scale: ``"tensor"``, ``"channel"`` (one output feature), or a group
            size along the inputs, a multiple of 32 (the last group may be short).
        scale: ``"absmax"`` (top level = largest magnitude), ``"mse"`` (search for the least squared weight
            error), ``"output"`` (the same, weighted by activation statistics from calibration), ``"learned"``
            (trained with the LSQ gradient, started from ``scale_init``), ``"paper"`` (moving-average absmax floored
            at ``eps``; for granularity ``"tensor"``).
        rounding: ``"nearest"`` (ties to the larger magnitude), ``"log"`` (nearest in the log domain),
            ``"paper"`` (to an integer first, then ``log``), ``"gptq"`` (nearest, with error compensation along the
            inputs; needs calibration data. Training starts from such weights and rounds to nearest from there),
            ``"reconstruct"`` (gptq, and then the weights and scales of each block trained together towards what the
            float block returns).
        activations: what linear layers compute with: ``"int8"`` (per token, symmetric, dynamic), ``"int16"`` (two
            int8 numbers a value: that of the value, and that of what it leaves) or None (float).
        embedding_grid: grid of embeddings and of heads tied to them; None leaves them float.
        skip: module names or globs left float, matched on the whole path or on any segment of it.
        overrides: name or glob -> fields of this class that differ there; the last match wins.
        ste: gradient of fake-quantization: ``"clipped"`` passes where the weight is within the top level,
            ``"identity"`` passes everywhere (the papers).
        scale_init: what a learned scale starts from: ``"absmax"``, ``"mse"`` or ``"output"`` (needs calibration data).
        eps: smallest scale under ``scale="paper"`` (the observer's floor in the papers' code).

    Raises:
        ValueError: a value outside the ones named above.
    """

    grid: str = "pot4"
    granularity: str | int = "channel"
    scale: str = "absmax"
    rounding: str = "nearest"
    activations: str | None = "int8"
    embedding_grid: str | None = "int8"
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    ste: str = "clipped"
    scale_init: str = "absmax"
    eps: float = 2.0**-5

    def __post_init__(self) -> None:
        _check_grid("grid", self.grid)
        if self.embedding_grid is not None:
            _check_grid("embedding_grid", self.embedding_grid)
        _check_granularity(self.granularity)
        _check_choice("scale", self.scale, SCALES)
        if self.scale == "paper" and self.granularity != "tensor":
            raise ValueError(
                "PoTConfig: scale='paper' is one moving average a tensor: it needs granularity='tensor', "
                f"got {self.granularity!r}"
            )
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("activations", self.activations, ACTIVATIONS)
        _check_choice("ste", self.ste, STES)
        _check_choice("scale_init", self.scale_init, ("absmax", "mse", "output"))
        if not self.eps > 0:
            raise ValueError(f"PoTConfig: eps must be positive, got {self.eps!r}")
        if isinstance(self.skip, str):
            raise ValueError(f"PoTConfig: skip must be a tuple of patterns, got the string {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        frozen = {pattern: MappingProxyType(dict(fields)) for pattern, fields in self.overrides.items()}
        object.__setattr__(self, "overrides", MappingProxyType(frozen))
        for pattern, fields in self.overrides.items():
            _check_keys(f"PoTConfig: overrides[{pattern!r}]", fields)
            if {"skip", "overrides"} & set(fields):
                raise ValueError(f"PoTConfig: overrides[{pattern!r}] cannot hold skip or overrides")
            dataclasses.replace(self, overrides={}, **fields)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 means all of them (channel and tensor granularity)."""
        return 0 if isinstance(self.granularity, str) else self.granularity

    @property
    def weighs_outputs(self) -> bool:
        """Whether scales are found by the error of the outputs."""
        return "output" in (self.scale, self.scale_init if self.scale == "learned" else None)

    @property
    def compensates(self) -> bool:
        """Whether weights are changed to make up for the errors of rounding others."""
        return self.rounding in ("gptq", "reconstruct")

    @property
    def needs_calibration(self) -> bool:
        return self.weighs_outputs or self.compensates

    @property
    def without_calibration(self) -> PoTConfig:
        """The same for a weight without statistics of its inputs: least squared error, rounding to nearest."""
        scale, init = ("mse" if method == "output" else method for method in (self.scale, self.scale_init))
        return dataclasses.replace(self, scale=scale, scale_init=init, rounding=self.level_rounding)

    @property
    def level_rounding(self) -> str:
        """How a single value becomes a level: where values are changed, by the nearest level to each."""
        return "nearest" if self.compensates else self.rounding

    def groups(self, in_features: int) -> int:
        """Number of scales along the inputs of one output feature, at least 1."""
        return max(1, -(-in_features // self.group_size)) if self.group_size else 1

    def skips(self, name: str) -> str | None:
        """The first ``skip`` pattern that matches module path ``name``, or None."""
        return next((pattern for pattern in self.skip if matches(pattern, name)), None)

    def at(self, name: str, *, embedding: bool = False) -> PoTConfig | None:
        """The configuration of module ``name``: overrides applied, and ``grid`` set to ``embedding_grid`` for
        an embedding or a head tied to one (None if that leaves it float)."""
        fields: dict[str, Any] = {}
        for pattern, override in self.overrides.items():
            if matches(pattern, name):
                fields.update(override)
        cfg = dataclasses.replace(self, overrides={}, skip=(), **fields)
        if embedding and "grid" not in fields:
            if cfg.embedding_grid is None:
                return None
            cfg = dataclasses.replace(cfg, grid=cfg.embedding_grid)
        return cfg

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["skip"] = list(self.skip)
        out["overrides"] = {pattern: dict(fields) for pattern, fields in self.overrides.items()}
        return out

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PoTConfig:
        """Inverse of to_dict.

        Raises:
            ValueError: an unknown key or a bad value.
        """
        _check_keys("PoTConfig", fields)
        return cls(**{**fields, "skip": tuple(fields.get("skip", ()))})

    # MappingProxyType does not pickle or deepcopy; the dict form does.
    def __reduce__(self):
        return (PoTConfig.from_dict, (self.to_dict(),))


def matches(pattern: str, name: str) -> bool:
    """Whether a name or glob matches a module path as a whole or any dotted segment of it."""
    return fnmatch.fnmatchcase(name, pattern) or any(
        fnmatch.fnmatchcase(segment, pattern) for segment in name.split(".")
    )


def _check_grid(where: str, grid: str) -> None:
    found = _POT.fullmatch(grid) if isinstance(grid, str) else None
    if grid not in GRIDS and not (found and int(found[1]) <= 30):
        raise ValueError(f"PoTConfig: {where} must be one of {', '.join(GRIDS)} or pot(k), k = 0..30; got {grid!r}")


def _check_granularity(value: str | int) -> None:
    if value in ("tensor", "channel"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % PACKED_GROUP_MULTIPLE:
        raise ValueError(
            "PoTConfig: granularity must be 'tensor', 'channel' or a group size that is a positive multiple of "
            f"{PACKED_GROUP_MULTIPLE} (32, 64, 128, ...); got {value!r}"
        )


def _check_choice(where: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"PoTConfig: {where} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _check_keys(where: str, fields: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(PoTConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
