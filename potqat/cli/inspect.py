"""``potqat inspect``: what a saved packed model holds, layer by layer."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from potqat.cli.errors import Usage

if TYPE_CHECKING:
    from potqat.flows.inspection import Inspection


def add(verbs) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="layers of a packed model: grid, error, level use, bytes",
        description="Show each layer of a packed model: its shape, grid and scales, its error against the float weight "
        "(SQNR), the share of its weights on zero and on the top level, the entropy of its levels in bits, its bytes.",
        epilog="example: potqat inspect gpt2-pot4 --plot gpt2-pot4.png",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="folder that potqat quantize, potqat.save or save_pretrained wrote"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png",
        help="draw the error of each layer and the level use of each type (default: no picture)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, with the share of every level, not the table")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from potqat.flows import inspection, results, sources

    picture = arguments.plot
    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise Usage(f"--plot writes PNG: name a file that ends in .png, got {picture}")
        if not picture.parent.is_dir():
            raise Usage(f"--plot {picture}: no folder {picture.parent}")
        if not os.access(picture.parent, os.W_OK):
            raise Usage(f"--plot {picture}: no permission to write in {picture.parent}")
        results.require_matplotlib(picture.name)
    folder = Path(arguments.folder)
    if folder.is_file():
        raise ValueError(f"{folder}: a file; name the folder that potqat quantize wrote")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name one that potqat quantize wrote")
    source = sources.find(arguments.folder)
    if not source.packed:
        raise ValueError(f"{folder}: a float model; quantize it first: potqat quantize {folder} --out DIR")
    found = inspection.inspect(sources.load(source))
    if picture is not None:
        from potqat.flows.inspection_plot import plot

        plot(picture, found.layers)
    print(json.dumps(found.to_dict()) if arguments.json else table(found))
    return 0


def table(found: Inspection) -> str:
    """A row a layer, then the totals."""
    rows = [("layer", "kind", "shape", "grid", "scale", "granularity", "SQNR dB", "zero", "top", "entropy", "codes",
             "scales")]  # fmt: skip
    for layer in found.layers:
        sqnr = "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
        row = (
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            layer.grid,
            layer.scale,
            layer.granularity,
            sqnr,
        )
        if layer.tied_to is None:
            use = (f"{layer.zero:.1%}", f"{layer.top:.1%}", f"{layer.entropy:.2f}")
            rows.append((*row, *use, f"{layer.code_bytes:,}", f"{layer.scale_bytes:,}"))
        else:
            rows.append((*row, f"tied to {layer.tied_to}"))
    lines = _aligned(rows, right=range(6, 12))
    totals = [("", "bytes", "of float32", "of bfloat16")]
    for name, total in found.totals().items():
        size = total["bytes"]
        shares = (
            f"{size / total[f'{dtype}_bytes']:.1%} of {total[f'{dtype}_bytes']:,}" for dtype in ("float32", "bfloat16")
        )
        totals.append((name, f"{size:,}", *shares))
    return "\n".join([*lines, "", *_aligned(totals, right=range(1, 4))])


def _aligned(rows: list[tuple], right: range) -> list[str]:
    """Columns two spaces apart; a row shorter than the first ends in text that no column is widened for."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(str(row[i])) for row in full) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (f"{cell:>{widths[i]}}" if i in right else f"{cell:<{widths[i]}}" for i, cell in enumerate(row))
        lines.append("  ".join(cells).rstrip())
    return lines
