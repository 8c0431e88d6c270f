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
    worst = max(figure["ratio"] for figure in step["figures"].values())
    lines += [
        "",
        "The papers report the last position of random windows, so their column is for orientation; a row without a "
        "control of equal length would flatter itself by the training alone. This model is 128 channels wide: too "
        "small for packed inference to pay in speed "
        f"({rows['pot4-qat']['tokens_per_second']:,.0f} against {control['tokens_per_second']:,.0f} tokens/s in float "
        f"in the same run, {char['machine']['threads']} thread, {char['machine']['isa']}).",
        "",
        f"A training step with fake quantization costs at most {worst:.2f} times the float step of the same model "
        f"(`benchmarks/qat_step.py`, threads: {step['machine']['threads']}, interleaved, medians of {step['rounds']}):",
        "",
        "| step | ms | of float |",
        "|---|---|---|",
        *(f"| {name} | {f['milliseconds']:.1f} | {f['ratio']:.2f} |" for name, f in step["figures"].items()),
    ]
    return "\n".join(lines)


def with_results(readme: str) -> str:
    """``readme`` with its results section replaced by the current one."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{results()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
