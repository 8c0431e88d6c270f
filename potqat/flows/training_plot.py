"""A training run as a picture: held-out loss, and distance to the float model, over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potqat.flows.results import save_figure

STYLES = {
    "float": ("tab:orange", "first in float"),
    "qat": ("tab:blue", "quantized"),
    "control": ("black", "float control"),
}


def plot(path: Path, metrics: dict[str, Any]) -> None:
    """Draw the PNG ``path`` from the content of metrics.json (flows/training.py)."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    found = metrics["results"]
    for axis, key, title in zip(
        axes, ("val", "kl"), ("Loss on held-out text", "KL from the float model, held-out text"), strict=True
    ):
        for name, curve in metrics["curves"].items():
            color, label = STYLES[name]
            x = [point["iteration"] for point in curve]
            axis.plot(x, [point[key] for point in curve], color=color, lw=1.6, label=f"{label}, in training")
        end = found["qat"]["loss"] if key == "val" else found["qat"]["reference"]["kl"]
        axis.plot(
            metrics["recipe"]["steps"], end, color=STYLES["qat"][0], marker="D", ms=6, mec="white", ls="none",
            zorder=5, clip_on=False, label=f"packed, {found['qat']['scored']:,} tokens",
        )  # fmt: skip
        if key == "val":
            axis.axhline(found["qat"]["reference"]["loss"], color="0.5", lw=1, ls="--", label="float, before")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    save_figure(figure, path)
