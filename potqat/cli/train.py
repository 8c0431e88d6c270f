"""``potqat train``: a pretrained model, trained through the quantizer on a text, to a folder with the packed one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from potqat.cli import quantizer, threads
from potqat.cli.errors import Stopped, Usage
from potqat.config import STES
from potqat.flows.recipe import DTYPES, LOSSES, PARTS, PRESETS, QUANTIZER, Recipe, preset_for

NUMBERS = {
    "context": (int, "tokens of a window"),
    "batch": (int, "windows of a pass"),
    "accumulate": (int, "passes of a step"),
    "steps": (int, "steps to train"),
    "float_steps": (int, "of these, so many at first in float: fine-tune, then quantize, then train on"),
    "learning_rate": (float, "AdamW's for weights and norms, at its highest"),
    "final_learning_rate": (float, "the same at the end of the cosine"),
    "scale_learning_rate": (float, "the same for scales, relative to the scale"),
    "float_learning_rate": (float, "AdamW's, at its highest, for float steps and the control"),
    "warmup": (float, "share of the steps until the highest"),
    "calibration_tokens": (int, "tokens of the training text that the start is calibrated on"),
    "generated_tokens": (int, "tokens more that it is calibrated on, which the float model, after float steps, writes"),
    "evaluate_every": (int, "steps from one saved state, and point of the curves, to the next"),
    "seed": (int, "same seed and threads, same result"),
}


def add(verbs) -> None:
    parser = verbs.add_parser(
        "train",
        help="train a pretrained model through the quantizer, and pack it",
        description="Calibrate a pretrained model, train it through the quantizer on a text, pack it, and measure it "
        "beside the float model on the end of the text, which is kept out of training. The same command goes on where "
        "one was stopped, with the same losses.",
        epilog="example: potqat train gpt2 --data text.txt --out gpt2-trained --dtype bfloat16",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, Hugging Face folder, GGUF file, or nanoGPT checkpoint (ckpt.pt)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="text to train on, UTF-8")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for results; the packed model is in DIR/packed"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="settings that the others change (default: by the size of the model)"
    )
    quantizer.add(parser, QUANTIZER)
    parser.add_argument(
        "--ste", choices=STES, default=QUANTIZER.ste,
        help="gradient of a weight beyond the top level: none, or as if it were not rounded (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--loss", choices=LOSSES,
        help="KL divergence from the float model, cross-entropy, or the papers' cross-entropy at the last position "
        "(default: the preset's)",
    )  # fmt: skip
    parser.add_argument(
        "--parts", choices=PARTS,
        help="train scales; norms and biases, too; all of the blocks; or embeddings, too (default: the preset's)",
    )  # fmt: skip
    for name, (kind, what) in NUMBERS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{what} (default: the preset's)"
        )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what the models compute in; weights stay float32 (default: the preset's)"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", default=None, help="less memory for more time (default: off)"
    )
    parser.add_argument(
        "--control", action="store_true", help="train the float model, too, on the same windows (default: off)"
    )
    threads.add(parser)
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="hub name, folder or .txt, as for potqat quantize (default: the model's)"
    )
    parser.add_argument("--json", action="store_true", help="print metrics as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    threads.use(arguments.threads)
    from potqat.flows import sources, training
    from potqat.flows.text import read_text
    from potqat.flows.trainer import Interrupted

    try:
        cfg = dataclasses.replace(QUANTIZER, ste=arguments.ste, **quantizer.fields(arguments))
    except ValueError as error:
        raise Usage(error) from None
    read_text(arguments.data)  # what is wrong with it is said before anything else is read
    source = sources.find(arguments.model)
    preset = arguments.preset or preset_for(sources.skeleton(source))
    given = {
        name: value
        for name in (field.name for field in dataclasses.fields(Recipe))
        if (value := getattr(arguments, name, None)) is not None
    }
    try:
        chosen = dataclasses.replace(PRESETS[preset], **given)
    except ValueError as error:
        raise Usage(error) from None
    tokenizer = sources.tokenizer_for(source, arguments.tokenizer)
    data = training.load_data(arguments.data, tokenizer, source, chosen)
    print(
        f"{source.name}: preset {preset}, {len(data.train):,} tokens to train on, {len(data.held_out):,} held out",
        file=sys.stderr,
    )
    try:
        metrics = training.run(source, cfg, chosen, data, arguments.out, tokenizer, control=arguments.control)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Stopped(
            f"{str(stop) or 'stopped'}; the state is in {arguments.out}: run the same command again to go on"
        ) from None
    print(json.dumps(metrics) if arguments.json else _shown(metrics, arguments.out))
    return 0


def _shown(metrics: dict, out: Path) -> str:
    found, recipe = metrics["results"], metrics["recipe"]
    qat = found["qat"]
    reference = qat["reference"]
    lines = [
        f"on the held-out end of {metrics['text']['name']}, {qat['scored']:,} tokens, context {qat['context']}:",
        f"float, before: perplexity {reference['perplexity']:.4f}",
        f"packed, after {recipe['steps']} steps: perplexity {qat['perplexity']:.4f}, "
        f"ratio {reference['perplexity_ratio']:.4f}, KL {reference['kl']:.4f} nats a token, "
        f"top-1 agreement {reference['top1_agreement']:.1%}",
    ]
    if "control" in found:
        control = found["control"]
        lines.append(
            f"float control after as many ({out / metrics['control']}): perplexity {control['perplexity']:.4f}; "
            f"packed / control {found['ratio_to_control']:.4f}"
        )
    elif recipe["loss"] != "kl":
        lines.append("note: part of any gain is from training on such text at all; --control says how much")
    lines.append(
        f"{out}/packed: {metrics['file_bytes']:,} bytes. next: potqat eval {shlex.quote(str(out / 'packed'))} --text "
        f"OTHER.txt --reference {shlex.quote(metrics['model'])}"
    )
    return "\n".join(lines)
