"""What a run leaves: rows of a table, the loss curves as a picture, and sampled text side by side."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

import potqat
from potqat import checkpoint
from potqat.metrics import Loss
from potqat.report import Report

COLUMN = 58  # characters of one sample's column; two fit a wide terminal


@dataclass
class Row:
    """One model of the table. ``packed`` rows run with int8 activations through the kernels; ``bytes`` is the size of
    ``file`` (None: nothing is stored). ``fake_quantized_val`` is the loss of the same weights before
    packing, with float activations. ``curve_val`` is the loss on the windows that the curves are drawn from."""

    name: str
    label: str
    iterations: int
    model: nn.Module
    val: Loss
    test: Loss
    curve_val: Loss
    packed: bool = False
    file: str | None = None
    bytes: int | None = None
    fake_quantized_val: Loss | None = None
    report: Report | None = None
    tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        fake = self.fake_quantized_val
        return {
            "name": self.name,
            "label": self.label,
            "iterations": self.iterations,
            "val_loss": self.val.loss,
            "test_loss": self.test.loss,
            "test_perplexity": self.test.perplexity,
            "val_loss_last_position": self.val.last,
            "test_loss_last_position": self.test.last,
            "val_loss_fake_quantized": None if fake is None else fake.loss,
            "packed": self.packed,
            "file": self.file,
            "bytes": self.bytes,
            "tokens_per_second": self.tokens_per_second,
        }


def require_matplotlib(picture: str = "loss_curves.png") -> None:
    """Raises ValueError where matplotlib is missing; called before hours of training, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"matplotlib draws {picture} and is not installed; run: pip install 'potqat[plot]'")


def machine() -> dict[str, Any]:
    """What the numbers of a run depend on besides its settings."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "isa": potqat.cpu_info()["isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "potqat": potqat.__version__,
        "python": platform.python_version(),
    }


def table(rows: list[Row], control: Row, float32_bytes: int, bfloat16_bytes: int) -> str:
    """The rows as aligned text. ``vs control`` is the validation loss less the control's."""
    head = ("model", "val", "vs control", "test", "test ppl", "last val", "fake val", "bytes", "of fp32",
            "of bf16", "tokens/s")  # fmt: skip
    cells = [head]
    for row in rows:
        fake, size, speed = row.fake_quantized_val, row.bytes, row.tokens_per_second
        cells.append(
            (
                row.label, f"{row.val.loss:.4f}", f"{row.val.loss - control.val.loss:+.4f}",
                f"{row.test.loss:.4f}", f"{row.test.perplexity:.3f}", f"{row.val.last:.3f}",
                "" if fake is None else f"{fake.loss:.4f}", "not packed" if size is None else f"{size:,}",
                "" if size is None else f"{size / float32_bytes:.1%}",
                "" if size is None else f"{size / bfloat16_bytes:.1%}", "" if speed is None else f"{speed:,.0f}",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0]), *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(path: Path, curves: dict[str, list[dict[str, float]]], labels: dict[str, str], rows: list[Row]) -> None:
    """Loss curves, left the whole run and right the part after the checkpoint, with the packed models' losses.

    Args:
        curves: "float" and each key of ``labels``: dicts with iteration, train and val (nats a token, eval mode).
        labels: the phases after the checkpoint -> legend text.
        rows: the packed row "ARM-qat" is marked at the end of that arm's curve.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    whole, zoom = figure.subplots(1, 2, width_ratios=(1, 1.15))
    colors = dict(zip(labels, ("black", *colormaps["tab10"].colors), strict=False))
    packed = {row.name.removesuffix("-qat"): row for row in rows if row.packed and row.name.endswith("-qat")}

    def draw(axis, curve, color, label):
        x = [point["iteration"] for point in curve]
        axis.plot(x, [point["val"] for point in curve], color=color, lw=1.6, label=label)
        axis.plot(x, [point["train"] for point in curve], color=color, lw=0.9, ls=":")

    draw(whole, curves["float"], "0.45", "float, up to the checkpoint")
    for name, label in labels.items():
        draw(whole, curves[name], colors[name], None)
        draw(zoom, curves[name], colors[name], label)
        if name in packed:
            zoom.plot(
                curves[name][-1]["iteration"], packed[name].curve_val.loss, marker="D", ms=6, color=colors[name],
                mec="white", clip_on=False, zorder=5, ls="none",
            )  # fmt: skip
    # A weight just quantized starts far above; the picture is about where training takes it.
    losses = [point[split] for name in labels for point in curves[name][1:] for split in ("train", "val")]
    margin = 0.08 * (max(losses) - min(losses))
    zoom.set_ylim(min(losses) - margin, max(losses) + margin)
    whole.set_title("Whole run")
    zoom.set_title("From one checkpoint: control and quantization-aware training")
    zoom.plot([], [], color="0.3", lw=1.6, label="validation (solid)")
    zoom.plot([], [], color="0.3", lw=0.9, ls=":", label="training text (dotted)")
    zoom.plot([], [], color="0.3", marker="D", mec="white", ls="none", label="packed, int8 activations: validation")
    for axis in (whole, zoom):
        axis.set_xlabel("iteration")
        axis.set_ylabel("loss (nats per token)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    whole.legend(loc="upper right", frameon=False)
    figure.legend(*zoom.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    checkpoint.write(path, lambda part: figure.savefig(part, format="png", dpi=130))


def side_by_side(samples: list[tuple[str, str]]) -> str:
    """(title, text) pairs as columns."""
    columns = []
    for title, text in samples:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMN) or [""]]
        columns.append([title, "-" * COLUMN, *lines])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{cell:<{COLUMN}}" for cell in row).rstrip() for row in rows)


def open_run(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run that can be resumed, and refuse one that holds a run with other settings (JSON-ready).

    Raises:
        ValueError: names the first setting that differs.
        OSError: the folder cannot be written.
    """
    path, settings = out / "state" / "settings.json", json.loads(json.dumps(settings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, settings)
    except OSError as error:
        raise type(error)(f"{out}: cannot write results there: {error.strerror}; choose another folder") from None
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in sorted(before.keys() | settings.keys()):
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{out}: holds a run with {key}={before.get(key)!r}, and this one has {settings.get(key)!r}; "
                "choose another folder or delete this one"
            )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
