"""Rewrite README's results from benchmarks/results/: `python benchmarks/readme.py`. A test checks that they agree."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: written by benchmarks/readme.py -->", "<!-- /results -->"

# Validation losses at iteration 22,500 in PoT-QAT (arXiv 2601.02298, Table 2; float: arXiv 2506.00315), last position.
PAPERS = {"control": "1.58", "int4-paper-qat": "1.593", "pot9-paper-qat": "1.682"}


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
        f"(`potqat train --data {char['text']['name']}`, seed {e['seed']}): {e['float_iterations']:,} iterations in "
        f"float, then every row to {e['total_iterations']:,} on the same batches. Loss in nats on "
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
    return "\n".join(lines + _footprint())


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


def _megabytes(*counts: int) -> str:
    return " + ".join(f"{count / 1e6:.1f}" for count in counts)


def with_results(readme: str) -> str:
    """``readme`` with its results section replaced by the current one."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{results()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
