"""The roofline of a report of kernels.py: operations a second over operations a byte of weights.

Below the slope nobody gets further than memory delivers weights, below the flat roof than the arithmetic goes. Peers
with fewer bits a weight stand further right at the same number of tokens.
"""

from pathlib import Path

from potqat.flows.results import save_figure


def plot(path: Path, report: dict) -> None:
    """A panel for each shape and number of threads, hot weights; m grows along each line."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = [group for group in report["calibration"] if group["residency"] == "hot"]
    shapes = list(dict.fromkeys((group["n"], group["k"]) for group in groups))
    threads = list(dict.fromkeys(group["threads"] for group in groups))
    lines = {(row["peer"], row["m"]) for row in report["rows"] if not row["error"] and row["residency"] == "hot"}
    peers = list(dict.fromkeys(row["peer"] for row in report["rows"]))
    peers = [peer for peer in peers if sum(name == peer for name, _ in lines) > 1]  # one m is no line
    colors = dict(zip(peers, (*colormaps["tab10"].colors, *colormaps["Dark2"].colors), strict=False))
    figure = Figure(figsize=(0.6 + 4.4 * len(shapes), 1 + 4 * len(threads)), layout="constrained")
    panels = figure.subplots(len(threads), len(shapes), squeeze=False, sharex=True, sharey=True)
    for i, count in enumerate(threads):
        for j, (n, k) in enumerate(shapes):
            axis = panels[i][j]
            where = {"n": n, "k": k, "threads": count, "residency": "hot"}
            measured = [row for row in report["rows"] if _is(row, where) and not row["error"]]
            if not measured:  # a run may be of some shapes only
                axis.set_axis_off()
                continue
            for peer in peers:
                rows = sorted((row for row in measured if row["peer"] == peer), key=lambda row: row["m"])
                ours = peer.startswith("potqat")
                axis.plot(
                    [_intensity(row) for row in rows], [row["gops"] for row in rows], color=colors[peer],
                    marker="o" if ours else ".", ms=5, lw=2.2 if ours else 1, label=peer,
                )  # fmt: skip
            _roofs(axis, [group for group in groups if _is(group, where)], [_intensity(row) for row in measured])
            axis.set_title(f"{n} x {k}, threads: {count}", fontsize=10)
            axis.grid(alpha=0.25, which="both", lw=0.5)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[-1]:
        axis.set_xlabel("operations a byte of weights")
    for axis in panels[:, 0]:
        axis.set_ylabel("GOPS")
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(2, 3 * len(shapes) // 2),
        frameon=False,
        fontsize=9,
    )
    about = report["machine"]
    figure.suptitle(f"{about['cpu']}, {about['isa']}: one linear layer, hot weights", fontsize=11)
    save_figure(figure, path)


def _is(entry: dict, where: dict) -> bool:
    return all(entry[name] == value for name, value in where.items())


def _intensity(row: dict) -> float:
    return 2 * row["m"] * row["n"] * row["k"] / row["weight_bytes"]


def _roofs(axis, groups: list[dict], intensities: list[float]) -> None:
    """The slope of the read bandwidth, up to the peak: the best that the panel's groups saw."""
    bandwidth = max(group["read_gb_per_second"] for group in groups)
    peak = max(group["peak_gops"] for group in groups)
    low, high = min(intensities), max(intensities)
    x = [low, max(low, peak / bandwidth), max(high, 2 * peak / bandwidth)]
    axis.plot(x, [min(peak, bandwidth * value) for value in x], color="black", lw=1.2, ls="--")
    middle = (x[0] * x[1]) ** 0.5  # of the slope, on the logarithmic axis
    axis.annotate(
        f"{bandwidth:.0f} GB/s", (middle, bandwidth * middle), textcoords="offset points", xytext=(-8, 2), size=8,
        ha="right",
    )  # fmt: skip
    axis.annotate(f"{peak:,.0f} GOPS", (x[-1], peak), textcoords="offset points", xytext=(0, 4), size=8, ha="right")
    axis.set_xscale("log")
    axis.set_yscale("log")
