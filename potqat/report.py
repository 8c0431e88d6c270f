"""Report: what a call did to each module, and what it changed in bytes and error."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import torch

from potqat import ops
from potqat.config import PoTConfig

CHUNK = 1 << 16  # weights whose error is computed at a time: they stay in the cache, and leave no holes in the heap


@dataclass(frozen=True)
class Entry:
    """One module: ``action`` is "quantized" or "skipped", ``reason`` says why it was skipped or what to know.

    Bytes count the weight (and its scales) once: a tied weight counts where it was first met, 0 elsewhere.
    ``sqnr_db`` is 10 log10(sum w^2 / sum (w - w_hat)^2), None where nothing was quantized.

    Only of a calibrated layer: ``method`` says how, and ``output_error`` is the squared change of its outputs on the
    calibration data relative to their squares; ``output_error_nearest`` the same with absmax scales and rounding to
    nearest, which is what it would be without calibration. Of a layer in a reconstructed block: ``block_error`` is the
    squared change of the block's outputs, relative to the float model's, the mean over calibration tokens;
    ``block_error_before`` that before it was trained.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    action: str
    reason: str = ""
    grid: str = ""
    granularity: str | int = ""
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr_db: float | None = None
    method: str = ""
    output_error: float | None = None
    output_error_nearest: float | None = None
    block_error: float | None = None
    block_error_before: float | None = None


@dataclass
class Report:
    """What was replaced, skipped and why; ``str(report)`` is a table, ``to_dict`` is JSON-ready."""

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> list[Entry]:
        return [e for e in self.entries if e.action == "quantized"]

    @property
    def skipped(self) -> list[Entry]:
        return [e for e in self.entries if e.action == "skipped"]

    @property
    def bytes_before(self) -> int:
        return sum(e.bytes_before for e in self.entries)

    @property
    def bytes_after(self) -> int:
        return sum(e.bytes_after for e in self.entries)

    def to_dict(self) -> dict:
        return {
            "entries": [asdict(e) for e in self.entries],
            "notes": list(self.notes),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        calibrated = any(e.output_error is not None for e in self.entries)
        rows = [("module", "kind", "shape", "grid", "scales", "SQNR dB", *["output error"] * calibrated, "bytes")]
        for e in self.entries:
            shape = "x".join(map(str, e.shape))
            sqnr = "" if e.sqnr_db is None else f"{e.sqnr_db:.1f}"
            bytes_ = f"{e.bytes_before:,} -> {e.bytes_after:,}"
            grid = e.grid if e.action == "quantized" else f"skipped: {e.reason}"
            error = ""
            if e.output_error is not None:
                error = f"{e.output_error:.2%} (nearest {e.output_error_nearest:.2%})"
            rows.append((e.name, e.kind, shape, grid, str(e.granularity), sqnr, *[error] * calibrated, bytes_))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"{len(self.quantized)} quantized, {len(self.skipped)} skipped; "
            f"weights {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@torch.no_grad()
def sqnr_db(w: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig, source: torch.Tensor | None = None) -> float:
    """Signal to quantization noise of w [N, K], 10 log10(sum w^2 / sum (w - w_hat)^2), in dB; inf if exact.

    ``w_hat`` is the fake-quantized ``source`` [N, K]: w itself (None), or w with errors compensated."""
    source = w if source is None else source
    signal = noise = 0.0
    rows = max(1, CHUNK // max(1, w.shape[1]))
    for part, of, part_scale in zip(w.split(rows), source.split(rows), scale.split(rows, dim=1), strict=True):
        part = part.float()
        signal += part.square().sum(dtype=torch.float64).item()
        noise += (part - ops.fake_quantize(of.float(), part_scale, cfg)).square_().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf
