"""Rewrite README's results from benchmarks/results/: `python benchmarks/readme.py`. A test checks that they agree."""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from potqat.config import GRIDS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: written by benchmarks/readme.py -->", "<!-- /results -->"

# Validation losses at iteration 22,500 in PoT-QAT (arXiv 2601.02298, Table 2; float: arXiv 2506.00315), last position.
PAPERS = {"control": "1.58", "int4-paper-qat": "1.593", "pot9-paper-qat": "1.682"}

KEY = ("n", "k", "m", "threads", "residency")


def results() -> str:
    """README's section of measured results, as Markdown."""
    char = json.loads((RESULTS / "nanogpt_char.json").read_text(encoding="utf-8"))
    step = json.loads((RESULTS / "qat_step.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in char["rows"]}
    control, e, note = rows["control"], char["experiment"], char["evaluation"]
    lines = [
        "## Measured",
        "",
        f"The papers' character-level experiment on {char['text']['name']}, one command "
        f"(`potqat reproduce --data {char['text']['name']}`, seed {e['seed']}): {e['float_iterations']:,} iterations "
        f"in float, then every row to {e['total_iterations']:,} on the same batches. Loss in nats on "
        f"{note['val_tokens']:,} validation characters, context {note['context']}, stride {note['stride']}; quantized "
        "rows are the packed 4-bit model running with int8 activations (9 levels, the papers' grid for this model, "
        "have no packed form: fake-quantized, float activations).",
        "",
        "| model | loss | against the control | last position | papers | bytes | of fp32 | of bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in char["rows"]:
        size = row["bytes"]
        share = {kind: f"{size / whole:.1%}" if size else "" for kind, whole in char["float_bytes"].items()}
        cells = [
            row["label"],
            f"{row['val_loss']:.3f}",
            f"{row['val_loss'] - control['val_loss']:+.3f}",
            f"{row['val_loss_last_position']:.3f}",
            PAPERS.get(row["name"], ""),
            f"{size:,}" if size else "not packed",
            share["float32"],
            share["bfloat16"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    speed = char["speed"]
    worst = max(figure["ratio"] for figure in step["figures"].values())
    lines += [
        "",
        "The papers report the last position of random windows, so their column is for orientation; a row without a "
        "control of equal length would flatter itself by the training alone. This model is 128 channels wide, small "
        f"for packed inference to pay in speed: {speed['tokens_per_second']['pot4-qat']:,} against "
        f"{speed['tokens_per_second']['control']:,} tokens/s in float in one run, 64 windows a pass "
        f"({speed['threads']} thread, {speed['isa']}).",
        "",
        f"A training step with fake quantization costs at most {worst:.2f} times the float step of the same model "
        f"(`benchmarks/qat_step.py`, threads: {step['machine']['threads']}, interleaved, medians of {step['rounds']}):",
        "",
        "| step | ms | of float |",
        "|---|---|---|",
        *(f"| {name} | {f['milliseconds']:.1f} | {f['ratio']:.2f} |" for name, f in step["figures"].items()),
        "",
    ]
    return "\n".join(lines + _accuracy() + _footprint() + _kernels() + _decode())


def _by_rows(arms: Iterable[dict], said: Callable[[dict], str]) -> str:
    """What is said of the arms, and which rows it is true of, but for the first."""
    rows: dict[str, list[str]] = {}
    for arm in arms:
        rows.setdefault(said(arm), []).append(arm["label"])
    first, *others = rows
    return "; ".join([first, *(f"{name} ({'; '.join(rows[name])})" for name in others)]) + "."


def _machine(arm: dict) -> str:
    return f"{arm['machine']['cpu']}, {arm['machine']['isa']}"


def _place(arm: dict) -> tuple[int, float, float]:
    """By the grid that it is named after, if any, then by size, then from worst to best."""
    named = next((i for i, grid in enumerate(GRIDS) if f"`{grid}`" in arm["label"]), len(GRIDS))
    return named, round(arm["bytes_per_weight"], 3), -arm["texts"][0]["reference"]["perplexity_ratio"]


def _accuracy() -> list[str]:
    report = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))
    settings, arms = report["settings"], report["arms"]
    calibration, texts = settings["calibration"], settings["texts"]
    first = next(iter(arms.values()))
    names = ", ".join(f"the first {text['used']:,} tokens of {text['file']}" for text in texts)
    lines = [
        f"What 4 bits cost a model: {settings['model'].partition(' ')[0]} (its weights are the float reference), every "
        "row a packed folder running through the kernels, int8 activations and embedding unless said otherwise, by "
        "one command (`benchmarks/accuracy.py`). "
        f"Perplexity as a ratio to float, KL from float in nats a token, and how often both rank the same token first, "
        f"with 95% intervals, on {names} (context {settings['context']}, {first['texts'][0]['windows']} windows). "
        f"Calibrated methods saw {calibration['tokens']:,} tokens of {calibration['text']} unless said otherwise, and "
        "no row chose a setting on these texts, except that 65,536 tokens, and then int16 activations for the head, "
        "were tried because rows without had missed a bar on the second.",
        "",
        "| model | MB | bytes a weight | " + " | ".join(f"{text['file']}: ratio | KL | top-1" for text in texts) + " |",
        "|---" * (3 + 3 * len(texts)) + "|",
    ]
    floats = " | ".join(f"1, perplexity {text['reference']['perplexity']:.2f} | | " for text in first["texts"])
    lines.append(f"| float32 | {first['float32_bytes'] / 1e6:.1f} | 4 | {floats} |")
    for arm in sorted(arms.values(), key=_place):
        cells = [arm["label"], f"{arm['bytes'] / 1e6:.1f}", f"{arm['bytes_per_weight']:.3f}"]
        for text in arm["texts"]:
            for key, form in (("perplexity_ratio", ".3f"), ("kl", ".3f"), ("top1_agreement", ".1%")):
                low, high = text["reference"][f"{key}_interval"]
                cells.append(f"{text['reference'][key]:{form}} ({low:{form}} to {high:{form}})")
        lines.append(f"| {' | '.join(cells)} |")
    taken: dict[str, list[dict]] = {}  # by method
    for name, arm in arms.items():
        if arm.get("calibrated") and not arm["quantize"]["resumed"]:
            taken.setdefault(name.split("-")[2], []).append(arm["quantize"])
    lines += [
        "",
        "Bytes a weight are those of the linear layers, scales included; MB are of the whole model. Methods: absmax, "
        "mse and output choose scales (by the largest weight, by squared error of weights, of outputs) and round to "
        "nearest; gptq compensates errors on output scales, which is the default of `--calibration`; reconstruct "
        "trains each block from there (`--rounding reconstruct`). A sample is another draw of the calibration text. "
        "Where some of the text is its own, the float model wrote that share of the tokens by itself, from random "
        f"first tokens (`--generated-tokens`). {_by_rows(arms.values(), _machine)}",
    ]
    calibrated = [arm for arm in arms.values() if arm.get("calibrated")]
    if calibrated:
        windows = _by_rows(calibrated, lambda arm: str(arm["calibration_context"]))
        lines[-1] += f" Tokens of a calibration window: {windows}"
    samples: dict[str, list[dict]] = {}
    for name, arm in arms.items():
        if arm.get("calibrated"):
            samples.setdefault(re.sub(r"-seed\d+", "", name), []).append(arm)
    for name, alike in samples.items():
        if len(alike) > 1:
            spreads = []
            for i, text in enumerate(texts):
                ratios = [arm["texts"][i]["reference"]["perplexity_ratio"] for arm in alike]
                spreads.append(f"{min(ratios):.3f} to {max(ratios):.3f} on {text['file']}")
            lines[-1] += f" Ratios of {name} over {len(alike)} calibration samples: {', '.join(spreads)}."
    if taken:
        most = (
            f"{method} {max(t['cpu_seconds'] for t in all_) / 60:.0f} minutes of one CPU and "
            f"{max(t['peak_bytes'] for t in all_) / 1e9:.1f} GB"
            for method, all_ in taken.items()
        )
        lines[-1] += f" Calibrating took at most, all included: {'; '.join(most)}."
    return [*lines, ""]


def _footprint() -> list[str]:
    report = json.loads((RESULTS / "footprint.json").read_text(encoding="utf-8"))
    bare = [f["memory"]["bare"]["rss"] / 1e6 for m in report["models"].values() for f in m["settings"].values()]
    lines = [
        "What a model takes on disk, and what loading it adds to the memory of a new process "
        f"(`benchmarks/footprint.py`, transformers {report['machine']['transformers']}, {report['machine']['isa']}):",
        "",
        "| model | bytes on disk | of fp32 | of bf16 | codes + scales + rest | loaded | after a pass | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in report["models"].items():
        for setting, figure in model["settings"].items():
            size, (before, loaded, after) = figure["bytes"], figure["memory"].values()
            disk = size["disk"]
            grown = [[state[kind] - before[kind] for kind in ("file", "anonymous")] for state in (loaded, after)]
            cells = [
                f"{name}, {setting}",
                f"{disk:,}",
                *(f"{disk / (width * model['parameters']):.1%}" for width in (4, 2)),
                _megabytes(size["codes"], size["scales"], disk - size["codes"] - size["scales"]),
                *(_megabytes(*parts) for parts in grown),
                _megabytes(after["peak"] - before["rss"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Sums are in MB (10^6 bytes). Memory is resident set, file-backed + anonymous, above that of the same process "
        f"without the model ({min(bare):.0f} MB for potqat.models.gpt, up to {max(bare):.0f} MB with transformers). "
        "Packed files are mapped, checked and used in place; float ones are mapped, too, and read by the first pass, "
        f"of {report['forward_tokens']} tokens. Until it has loaded, transformers maps a file a second time, and the "
        "peak counts those pages twice. Scales are float32: 1 bit a weight in groups of 32. GPT-2 has random weights "
        "here, SmolLM2-135M is the pretrained one.",
    ]


# Columns of the tables of layers: heading -> peer, and llama.cpp's best on the machine.
LAYERS = {
    "pot4": "potqat pot4",
    "groups of 128": "potqat pot4, groups of 128",
    "float32": "torch float32",
    "bfloat16": "torch bfloat16",
    "int8": "torch int8",
    "dynamic int8": "torch dynamic int8",
}
LLAMA = "llama.cpp Q4_0"
SHAPES, TOKENS = ((768, 768), (3072, 768), (4096, 4096)), (1, 8, 512)  # of the layers shown


def _kernels() -> list[str]:
    names = ("zen4_avx512vbmi", "xeon_avx512vbmi", "zen2_avx2", "amx")
    zen4, xeon, zen2, amx = (_report("kernels", name) for name in names)
    return [
        "",
        "One linear layer, microseconds, medians of 9 interleaved samples, 1 thread (`benchmarks/kernels.py`; "
        "float32 activations in and out, quantization included, bfloat16 in bfloat16; torch "
        f"{zen4['machine']['torch']}, llama-cpp-python {zen4['versions']['llama-cpp-python']}). What the machine "
        "can do at most is in the last two columns: read bandwidth and the peak of the instruction set, measured "
        f"beside each row. {zen4['machine']['cpu']} (Zen 4), {zen4['machine']['isa']}, idle otherwise:",
        "",
        *_layers(zen4, "CPU_REPACK"),
        "",
        f"{xeon['machine']['cpu']}, {xeon['machine']['isa']}, without AMX, shared with others:",
        "",
        *_layers(xeon, "CPU_REPACK"),
        "",
        f"{zen2['machine']['cpu']} (Zen 2), {zen2['machine']['isa']}, idle otherwise. It has no instruction for "
        "products in bfloat16 or dot products in int8; the peak is that of `vpmaddubsw`, `vpmaddwd` and "
        "`vpaddd` for every product, of which potqat's kernels leave some out:",
        "",
        *_layers(zen2, "CPU_REPACK"),
        "",
        f"{amx['machine']['cpu']}, {amx['machine']['isa']}, shared with others, so no row compares with another. "
        "llama.cpp runs its AMX kernels (GCC 12 must not drop stores in them, or they crash):",
        "",
        *_layers(amx, "AMX"),
        "",
        f"Rotated: through copies of the weight of {_rotated(zen4)} MB in all on Zen 4, {_rotated(xeon)} on the Xeon "
        f"without AMX, {_rotated(zen2)} on Zen 2, {_rotated(amx)} with AMX, so that no cache holds them. int8 is "
        "activation quantization, `torch._int_mm` and two scales; dynamic int8 is PyTorch's quantized Linear. All but "
        "llama.cpp's times include a call from Python; what was not measured is empty. All shapes, peers, numbers of "
        "threads, and roofs: `benchmarks/results/kernels_*.md` and their plots. Their times in two threads on Zen 2 "
        "and 4 may be too long: beside llama.cpp's threads in one process PyTorch's went to sleep.",
    ]


def _report(kind: str, name: str) -> dict:
    return json.loads((RESULTS / f"{kind}_{name}.json").read_text(encoding="utf-8"))


def _rotated(report: dict) -> str:
    return f"{max(c['read_bytes'] for c in report['calibration'] if c['residency'] == 'rotated') / 1e6:,.0f}"


def _layers(report: dict, llama_place: str) -> list[str]:
    """The table of one machine."""
    peers = LAYERS | {LLAMA: f"{LLAMA}, {llama_place}"}
    lines = [
        "| tokens x outputs x inputs | " + " | ".join(peers) + " | GB/s | peak TOPS |",
        "|---" * (len(peers) + 3) + "|",
    ]
    found: dict[tuple, dict[str, str]] = {}
    for row in report["rows"]:
        time = "" if row["error"] else f"{row['microseconds']['median']:,.0f}"
        found.setdefault(tuple(row[name] for name in KEY), {})[row["peer"]] = time
    calibrations = {tuple(c[name] for name in KEY): c for c in report["calibration"]}
    for (n, k), m, residency in itertools.product(SHAPES, TOKENS, ("hot", "rotated")):
        key = (n, k, m, 1, residency)
        if key not in calibrations:
            continue
        cells = [
            f"{m} x {n} x {k}" + (", rotated" if residency == "rotated" else ""),
            *(found[key].get(peer, "") for peer in peers.values()),
            f"{calibrations[key]['read_gb_per_second']:.0f}",
            f"{calibrations[key]['peak_gops'] / 1e3:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _decode() -> list[str]:
    names = ("zen4_avx512vbmi", "xeon_avx512vbmi", "zen2_avx2", "amx")
    zen, xeon, older, amx = (_report("decode", name) for name in names)
    return [
        "",
        "A whole model, GPT-2 124M in shape, random weights, one text, 1 thread (`benchmarks/decode.py`): "
        f"{zen['prefill_tokens']} tokens read at once, and tokens written one by one after {zen['context']}, medians "
        f"of {zen['rounds']}. Decoding: eager, compiled by torch.compile, or as a program "
        f'(`Decoder(model, 1, compile="step.pt2")`; prefill is eager there). {_decode_machine(zen)}:',
        "",
        *_tokens(zen),
        "",
        f"{_decode_machine(xeon)}:",
        "",
        *_tokens(xeon),
        "",
        f"{_decode_machine(older)}:",
        "",
        *_tokens(older),
        "",
        f"{_decode_machine(amx)}:",
        "",
        *_tokens(amx),
    ]


def _decode_machine(report: dict) -> str:
    (calibration,) = (c for c in report["calibration"] if c["threads"] == 1)
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['isa']}, memory read at {calibration['read_gb_per_second']:.0f} GB/s"


def _tokens(report: dict) -> list[str]:
    rows = [row for row in report["rows"] if row["threads"] == 1]
    base = next(row for row in rows if row["arm"] == "float32")
    lines = [
        "| model | MB read a token | prefill tokens/s | of float32 | decode tokens/s | of float32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["error"]:
            lines.append(f"| {row['arm']} | did not run: {row['error']} | | | | |")
            continue
        cells = [row["arm"], f"{row['bytes_per_token'] / 1e6:.0f}"]
        for phase in ("prefill", "decode"):
            cells.append(f"{row[phase]['tokens_per_second']:,.0f}")
            cells.append(f"{base[phase]['ms']['median'] / row[phase]['ms']['median']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _megabytes(*counts: int) -> str:
    return " + ".join(f"{count / 1e6:.1f}" for count in counts)


def with_results(readme: str) -> str:
    """``readme`` with its results section replaced by the current one."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{results()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
