"""The picture of a mixed choice: bytes against loss, the curve of all greedy choices and where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potqat.flows.results import save_figure


def plot(path: Path, outcome: dict[str, Any]) -> None:
    """Draw what ``mixed.outcome`` returned, as PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axis = figure.subplots()
    curve, predicted, measured = outcome["curve"], outcome["predicted"], outcome["measured"]
    axis.plot(
        [step["bytes"] / 1e6 for step in curve], [step["loss"] for step in curve], color="#0072B2", lw=1.8,
        label="mixed: predicted",
    )  # fmt: skip
    for row in outcome["uniform"]:
        axis.plot(row["bytes"] / 1e6, row["loss"], "s", color="0.4", ms=5)
        axis.annotate(
            f" {row['grid']} {row['granularity']}", (row["bytes"] / 1e6, row["loss"]), fontsize=8, va="bottom"
        )
    axis.plot([], [], "s", color="0.4", ms=5, label="one for all layers: predicted")
    axis.axhline(outcome["target"], color="0.6", lw=1, ls="--", label="target")
    axis.plot(predicted["bytes"] / 1e6, predicted["loss"], "o", color="#0072B2", ms=8, label="chosen: predicted")
    kl, (low, high) = measured["kl"], measured["kl_interval"]
    axis.errorbar(
        predicted["bytes"] / 1e6, kl, [[kl - low], [high - kl]], fmt="D", color="#D55E00", ms=6, capsize=3,
        label="chosen: measured KL, 95%",
    )  # fmt: skip
    axis.set(xlabel="MB of the chosen layers, scales included", ylabel="KL from the float model, nats a token")
    axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both", lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(figure, path)
