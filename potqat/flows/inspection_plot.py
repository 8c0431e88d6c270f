"""An inspection as a picture: the error of each layer over the blocks, and how each type of layer uses its levels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potqat.flows.inspection import Layer, shares
from potqat.flows.results import save_figure

ERRORS_HEIGHT, LEVELS_HEIGHT = 4.2, 2.5  # inches, a row
LEAST_RANGE = 2.0  # dB: less difference than that shall not fill the picture
MARKERS = "os^vDPX<>*"


@dataclass(frozen=True)
class Type:
    """Layers on one grid that differ only in their block's number: one line above, one histogram below."""

    members: list[Layer]
    color: Any
    marker: str

    @property
    def label(self) -> str:
        return self.members[0].type if len(self.members) > 1 else self.members[0].name


def plot(path: Path, layers: Sequence[Layer]) -> None:
    """Draw a PNG at ``path``.

    4-bit and 8-bit layers have their errors on axes of their own, some 30 dB apart. Tied layers are left out: their
    codes are those of another.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        if layer.tied_to is None:
            groups.setdefault((layer.type, layer.grid), []).append(layer)
    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
    types = [
        Type(members, palette[i % len(palette)], MARKERS[i % len(MARKERS)]) for i, members in enumerate(groups.values())
    ]
    columns = len(types) if len(types) <= 4 else min(4, 3, key=lambda count: -len(types) % count)  # fewest empty places
    rows = -(-len(types) // columns)
    figure = Figure(figsize=(14, ERRORS_HEIGHT + LEVELS_HEIGHT * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(ERRORS_HEIGHT, LEVELS_HEIGHT * rows))
    _errors(above, types)
    below.suptitle("Use of the levels", fontsize=11)
    axes = below.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(types) :]:
        axis.set_axis_off()
    for axis, type_ in zip(axes, types, strict=False):
        _levels(axis, type_)
    save_figure(figure, path)


def _errors(figure, types: list[Type]) -> None:
    widths: dict[int, list[Type]] = {}
    for type_ in types:
        widths.setdefault(8 if type_.members[0].grid == "int8" else 4, []).append(type_)
    places = {
        bits: sorted({_place(layer) for type_ in some for layer in type_.members}) for bits, some in widths.items()
    }
    ratios = [3 + len(places[bits]) for bits in sorted(widths)]
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=ratios)[0]
    for axis, bits in zip(axes, sorted(widths), strict=True):
        for type_ in widths[bits]:
            errors = [(_place(m), m.sqnr_db) for m in type_.members if m.sqnr_db is not None]
            points = [(x, y) for x, y in errors if math.isfinite(y)]
            axis.plot(
                [x for x, _ in points], [y for _, y in points], color=type_.color, marker=type_.marker, ms=5, lw=1.2,
                label=type_.label + ("" if points else ": no error" if errors else ": error not known"),
            )  # fmt: skip
        ticks = places[bits][:: max(1, len(places[bits]) // 24)]
        axis.set_xticks(ticks, ["-" if x < 0 else x for x in ticks])
        axis.set_xlim(places[bits][0] - 0.6, places[bits][-1] + 0.6)
        axis.set_xlabel("block" + (" (-: in none)" if places[bits][0] < 0 else ""))
        low, high = axis.get_ylim()
        margin = max(0.0, (LEAST_RANGE - (high - low)) / 2)
        axis.set_ylim(low - margin, high + margin)
        axis.set_ylabel("SQNR (dB): higher is better")
        if not any(len(line.get_xdata()) for line in axis.lines):
            axis.set_yticks([])  # a scale would be of nothing
        axis.set_title(f"Error of {bits}-bit layers", fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)


def _place(layer: Layer) -> int:
    return -1 if layer.block is None else layer.block


def _levels(axis, type_: Type) -> None:
    total: Counter[int] = Counter()
    for layer in type_.members:
        total.update(layer.counts)
    use = {level: 100 * share for level, share in sorted(shares(total).items())}
    if len(use) > 16:  # int8: levels too many for a tick each
        axis.stairs(list(use.values()), [min(use) - 0.5, *(level + 0.5 for level in use)], fill=True, color=type_.color)
    else:
        axis.bar(range(len(use)), list(use.values()), color=type_.color, width=0.85)
        axis.set_xticks(range(len(use)), list(use))
    count = f", {len(type_.members)} layers" if len(type_.members) > 1 else ""
    axis.set_title(f"{type_.label}\n{type_.members[0].grid}{count}", fontsize=9)
    axis.set_ylabel("% of weights", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
