"""What a packed model holds: for each layer its settings, its error, how its levels are used, and its bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from potqat import ops, reference
from potqat.config import PoTConfig
from potqat.modules import Packed, PackedLinear, Tied

CHUNK = 1 << 20  # weights decoded at a time


@dataclass(frozen=True)
class Layer:
    """One packed module.

    ``counts``: level -> weights on it, every level of the grid in ascending order; of a tied layer, which holds no
    codes of its own, those of the layer it is ``tied_to``. ``sqnr_db``: error of quantization against the float weight,
    None if unknown. Bytes are those of the codes (padding to whole tiles included) and the scales, 0 if tied.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    grid: str
    scale: str
    granularity: str | int
    sqnr_db: float | None
    counts: dict[int, int]
    code_bytes: int
    scale_bytes: int
    tied_to: str | None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def shares(self) -> dict[int, float]:
        """Level -> share of the weights on it."""
        return shares(self.counts)

    @property
    def zero(self) -> float:
        """Share of the weights that are zero."""
        return self.shares[0]

    @property
    def top(self) -> float:
        """Share of the weights on the largest level, of either sign."""
        return self.shares[max(self.counts)] + self.shares[min(self.counts)]

    @property
    def entropy(self) -> float:
        """-sum p log2 p over the levels, in bits: what a weight's code is worth, of the 4 or 8 bits that it takes."""
        return -sum(p * math.log2(p) for p in self.shares.values() if p)

    @property
    def block(self) -> int | None:
        """The first number in the name: which of the model's repeated blocks the layer is in."""
        number = re.search(r"(?<![^.])\d+(?![^.])", self.name)
        return int(number[0]) if number else None

    @property
    def type(self) -> str:
        """The name without the block's number: layers of one type differ in that only."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", self.name, count=1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "grid": self.grid,
            "scale": self.scale,
            "granularity": self.granularity,
            "sqnr_db": self.sqnr_db if self.sqnr_db is None or math.isfinite(self.sqnr_db) else None,
            "levels": self.shares,
            "zero": self.zero,
            "top": self.top,
            "entropy": self.entropy,
            "code_bytes": self.code_bytes,
            "scale_bytes": self.scale_bytes,
            "tied_to": self.tied_to,
        }


@dataclass(frozen=True)
class Inspection:
    """The packed ``layers`` in model order, and the tensors beside their weights (biases, norms, what was left float):
    ``rest`` numbers in ``rest_bytes``."""

    layers: tuple[Layer, ...]
    rest: int
    rest_bytes: int

    @property
    def weights(self) -> int:
        """Packed weights, tied ones once."""
        return sum(layer.weights for layer in self.layers if layer.tied_to is None)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.code_bytes + layer.scale_bytes for layer in self.layers)

    def totals(self) -> dict[str, dict[str, int]]:
        """Bytes of the packed weights and of the whole model, as they are and as float32 and bfloat16 would be."""
        parts = {"weights": (self.weights, self.weight_bytes)}
        parts["model"] = (self.weights + self.rest, self.weight_bytes + self.rest_bytes)
        return {
            name: {"numbers": numbers, "bytes": size, "float32_bytes": 4 * numbers, "bfloat16_bytes": 2 * numbers}
            for name, (numbers, size) in parts.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; an infinite SQNR (no error at all) is null."""
        return {"layers": [layer.to_dict() for layer in self.layers], "totals": self.totals()}


def inspect(model: nn.Module) -> Inspection:
    """Look at every packed module of ``model``; it is only read, and memory stays that of a part of one layer.

    Raises:
        ValueError: the model holds no packed module, or a code that no packer writes.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, Packed)}
    if not names:
        raise ValueError(f"{type(model).__name__} holds no packed module: potqat.quantize_ it first")
    layers: dict[Packed, Layer] = {}
    # Owners first: a head may come before the table that holds its codes.
    for module in tqdm(sorted(names, key=lambda m: isinstance(m, Tied)), "inspect", delay=2, leave=False, unit="layer"):
        owner = module.owner if isinstance(module, Tied) else None
        try:
            counts = count_levels(module) if owner is None else layers[owner].counts
        except ValueError as error:
            raise ValueError(f"{names[module]}: {error}") from None
        layers[module] = Layer(
            name=names[module],
            kind="linear" if isinstance(module, PackedLinear) else "embedding",
            shape=module.shape,
            grid=module.cfg.grid,
            scale=module.cfg.scale,
            granularity=module.cfg.granularity,
            sqnr_db=module.sqnr_db,
            counts=counts,
            code_bytes=0 if owner else module.packed.nbytes,
            scale_bytes=0 if owner else module.scale.nbytes,
            tied_to=names[owner] if owner else None,
        )
    held = {id(tensor) for module in names for tensor in (module.packed, module.scale)}
    stored = model.state_dict(keep_vars=True).values()  # keep_vars: a tied parameter is one object
    rest = {id(tensor): tensor for tensor in stored if id(tensor) not in held}.values()
    return Inspection(
        tuple(layers[module] for module in names), sum(t.numel() for t in rest), sum(t.nbytes for t in rest)
    )


def count_levels(module: Packed) -> dict[int, int]:
    """Weights on each level of the module's grid, ascending, by decoding its codes with scales of 1."""
    grid, (n, k) = module.cfg.grid, module.shape
    magnitudes = reference.levels(grid)
    top, ones = magnitudes[-1], PoTConfig(grid=grid)
    counts = torch.zeros(2 * top + 1, dtype=torch.int64, device=module.packed.device)
    tile_rows = max(1, CHUNK // (reference.TILE_OUTPUTS * max(1, k)))
    for i, tiles in enumerate(module.packed.split(tile_rows)):
        rows = min(tiles.shape[0] * reference.TILE_OUTPUTS, n - i * tile_rows * reference.TILE_OUTPUTS)
        levels = ops.unpack(tiles, torch.ones(1, rows, device=tiles.device), ones, (rows, k))
        counts += torch.bincount(levels.flatten().add_(top).long(), minlength=len(counts))
    signed = [-level for level in magnitudes[:0:-1]] + magnitudes
    return {level: int(counts[level + top]) for level in signed}


def shares(counts: dict[int, int]) -> dict[int, float]:
    total = max(1, sum(counts.values()))
    return {level: count / total for level, count in counts.items()}
