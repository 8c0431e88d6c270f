"""Quantize a pretrained model after training: plan it on a model without weights, then load, quantize and save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import potqat
from potqat import ops
from potqat.flows import sources
from potqat.quantize import Site, plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    """What would be done, known before a weight is read. Bytes of all tensors, ties counted once.

    Attributes:
        skeleton: the float model on the meta device.
        float_bytes: of the float model in memory, in ``dtype``.
        packed_bytes: of the packed model, in memory and (but for a few KB of header) on disk.
    """

    source: sources.Source
    cfg: potqat.PoTConfig
    dtype: torch.dtype
    skeleton: nn.Module
    float_bytes: int
    packed_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Memory that quantizing takes, besides PyTorch itself: both models, and the largest weight three times in
        float32 (its copy, what it became, their difference)."""
        largest = max(parameter.numel() for parameter in self.skeleton.parameters())
        return self.float_bytes + self.packed_bytes + 3 * 4 * largest


def make_plan(source: sources.Source, cfg: potqat.PoTConfig, dtype: torch.dtype = torch.float32) -> Plan:
    """Check everything that can be checked without the weights.

    Raises:
        ValueError: nothing to quantize, a pattern that matches nothing, a grid without a packed form, or a source that
            cannot be read.
        OSError: the hub or the folder does not give it.
    """
    skeleton = sources.skeleton(source)
    sites = plan(skeleton, cfg)
    packed = {id(site.module.weight): _packed_bytes(site) for site in sites if site.cfg is not None}
    tensors = {id(t): t for t in (*skeleton.parameters(), *skeleton.buffers())}
    bytes_of = {
        key: t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for key, t in tensors.items()
    }
    return Plan(source, cfg, dtype, skeleton, sum(bytes_of.values()), sum((bytes_of | packed).values()))


def _packed_bytes(site: Site) -> int:
    ops.check_packable(f"pack {site.name}", site.cfg.grid)
    n, k = site.weight.shape
    return math.prod(ops.packed_shape(site.cfg.grid, n, k)) + 4 * site.cfg.groups(k) * n


def run(
    planned: Plan, out: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[potqat.Report, int, PreTrainedTokenizerBase | None]:
    """Load, quantize and write the model, and its tokenizer, to the folder ``out``.

    Args:
        tokenizer: instead of the source's own.

    Returns:
        the Report, the bytes of the model's files, and the tokenizer that was written (None: the source has none).

    Raises:
        ValueError: a weight with NaN or infinity.
        OSError: reading or writing failed.
    """
    model, own = sources.load_float(planned.source, planned.skeleton, planned.dtype)
    report = potqat.quantize_(model, planned.cfg)
    tokenizer = tokenizer or own
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return report, potqat.save(model, out), tokenizer
