"""The picture of accuracy.py: each arm's perplexity ratio and KL against its bytes a weight, a column a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potqat.flows.results import save_figure

GRID_COLORS = {"pot4": "#0072B2", "e2m1": "#009E73", "int4": "#D55E00", "int8": "0.4"}
METHOD_MARKERS = {"absmax": "x", "mse": "+", "output": "^", "absmax+gptq": "s", "gptq": "o", "reconstruct": "D"}
OTHER = "#CC79A7", "*"  # a folder made elsewhere


def plot(report: dict[str, Any], path: Path) -> None:
    """Points with 95% intervals; hollow ones have float activations, black edges text that the model wrote. PNG."""
    from matplotlib.figure import Figure

    arms, texts = report["arms"], report["settings"]["texts"]
    figure = Figure(figsize=(1 + 5.5 * len(texts), 9), layout="constrained")
    panels = figure.subplots(2, len(texts), squeeze=False, sharex=True, sharey="row")
    measures = (
        ("perplexity_ratio", "perplexity, of the float model's"),
        ("kl", "KL from the float model, nats a token"),
    )
    for (key, title), row in zip(measures, panels, strict=True):
        for i, axis in enumerate(row):
            for name, entry in arms.items():
                color, marker, hollow = style(name, entry)
                against = entry["texts"][i]["reference"]
                value, interval = against[key], against[f"{key}_interval"] or [against[key]] * 2
                axis.errorbar(
                    entry["bytes_per_weight"], value, [[value - interval[0]], [interval[1] - value]], color=color,
                    marker=marker, mfc="white" if hollow else color,
                    mec="black" if "-own" in name else color, ms=6, lw=1, capsize=2, ls="none",
                )  # fmt: skip
            sizes = [entry["bytes_per_weight"] for entry in arms.values()]
            axis.set_xscale("log")
            axis.set_xlim(0.95 * min(sizes), 1.05 * max(sizes))  # log axes have no margin around a single size
            axis.set_yscale("log")
            axis.grid(alpha=0.25, which="both", lw=0.5)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter("{x:.2f}")
            axis.xaxis.set_minor_formatter("{x:.2f}")
            axis.yaxis.set_major_formatter("{x:.4g}")
            axis.yaxis.set_minor_formatter("{x:.3g}")
            axis.tick_params(which="both", labelsize=8)
        row[0].set_ylabel(title)
    for axis, text in zip(panels[0], texts, strict=True):
        axis.set_title(f"{text['file']}, {text['used']:,} tokens", fontsize=10)
    for axis in panels[1]:
        axis.set_xlabel("bytes a weight of the linear layers, scales included")
    styles = [style(name, entry)[:2] for name, entry in arms.items()]
    handles = panels[0][0]
    for grid, color in GRID_COLORS.items():
        if any(color == used for used, _ in styles):
            handles.plot([], [], "o", color=color, label=grid)
    for method, marker in (*METHOD_MARKERS.items(), ("another folder", OTHER[1])):
        if any(marker == used for _, used in styles):
            handles.plot([], [], marker, color="0.3", label=method)
    handles.plot([], [], "o", color="0.3", mfc="white", label="float activations")
    if any("-own" in name for name in arms):
        handles.plot([], [], "o", color="0.7", mec="black", label="some of the text its own")
    figure.legend(*handles.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save_figure(figure, path)


def style(name: str, entry: dict[str, Any]) -> tuple[str, str, bool]:
    """(color, marker, hollow) of an arm."""
    if "settings" not in entry:
        return *OTHER, False
    grid, _, method, *options = name.split("-")
    return GRID_COLORS[grid], METHOD_MARKERS[method], "float" in options
