"""``potqat quantize``: a pretrained float model to a folder with the packed one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potqat.cli import quantizer
from potqat.cli.errors import Stopped, Usage
from potqat.cli.quantizer import FLOAT
from potqat.config import ACTIVATIONS, ROUNDINGS, PoTConfig

DEFAULT = PoTConfig()
SCALES = ("absmax", "mse", "output")  # those that need no training
CALIBRATED = {"scale": "output", "rounding": "gptq"}  # the defaults with --calibration
CALIBRATION_TOKENS = 32768
OWN_TEXT = object()  # --calibration without a file


def add(verbs) -> None:
    parser = verbs.add_parser(
        "quantize",
        help="a pretrained model to packed 4-bit weights",
        description="Quantize the weights of a pretrained language model and write it, packed, to a folder that "
        "potqat generate, eval and inspect read, and transformers' from_pretrained after import potqat.hf.",
        epilog="example: potqat quantize gpt2 --out gpt2-e2m1 --grid e2m1 --granularity 32",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, Hugging Face folder, GGUF file, or nanoGPT checkpoint (ckpt.pt)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the packed model")
    quantizer.add(parser, DEFAULT)
    parser.add_argument(
        "--calibration", type=Path, nargs="?", const=OWN_TEXT, metavar="FILE",
        help="quantize each layer for the inputs that it has on this UTF-8 text, best one like what the model will "
        "read; without FILE on text that the float model writes by itself (default: no calibration)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"read so many tokens, in windows spread over the text (default: {CALIBRATION_TOKENS}, or what there is)",
    )
    parser.add_argument(
        "--generated-tokens", type=int, metavar="N",
        help="beside FILE, read so many tokens of text that the float model writes by itself, of many kinds, for what "
        "is unlike FILE (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-seed", type=int, metavar="N",
        help="draw the windows at random, and what the model writes anew, to see what another sample gives (default: "
        "evenly spread)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", choices=SCALES,
        help="by the largest weight (absmax), searched for the least squared error (mse), or for that of the outputs "
        f"(output; needs --calibration) (default: {DEFAULT.scale}; with --calibration {CALIBRATED['scale']})",
    )  # fmt: skip
    parser.add_argument(
        "--rounding", choices=ROUNDINGS,
        help="to the nearest level, to the nearest logarithm, as the papers' code, with error compensation (gptq), or "
        "that and each block trained from there (reconstruct; takes longer); the last two need --calibration "
        f"(default: {DEFAULT.rounding}; with --calibration {CALIBRATED['rounding']})",
    )  # fmt: skip
    parser.add_argument(
        "--target-loss", type=float, metavar="X",
        help="choose grid and granularity of each layer: the fewest bytes, from what --grid and --granularity say on, "
        "whose predicted loss is at most X nats a token more; needs --calibration (default: the same for all layers)",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=[name or FLOAT for name in ACTIVATIONS], default=DEFAULT.activations,
        help="what the linear layers compute with; int16 is two int8 numbers a value (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of what stays float, and of the float model in memory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="NAME",
        help="tokenizer to store: hub name, folder, or a .txt file whose characters are the vocabulary (nanoGPT's "
        "character-level data) (default: the model's)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    cfg = _config(arguments)
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Usage(f"--out {out}: exists and is not an empty folder; name a new one")
    import torch

    from potqat.flows import calibration_text, mixed, mixed_plot, quantize, results, sources
    from potqat.flows.text import read_text

    target = arguments.target_loss
    if target is not None:
        mixed.candidates(cfg)
        results.require_matplotlib(f"{out.name}.mixed.png")
    path = None if arguments.calibration is OWN_TEXT else arguments.calibration
    if path is not None:
        read_text(path)  # what is wrong with it is said before anything else is read
    source = sources.find(arguments.model)
    given = arguments.tokenizer
    tokenizer = sources.tokenizer_of(source) if given is None else sources.tokenizer(given)
    if given is not None and len(tokenizer) > source.vocabulary:
        raise ValueError(
            f"--tokenizer {given}: has {len(tokenizer)} tokens, and {source.name} knows {source.vocabulary}; give the "
            "one that it was trained with"
        )
    text, dtype = None, getattr(torch, arguments.dtype)
    if arguments.calibration is not None:
        tokens = CALIBRATION_TOKENS if arguments.calibration_tokens is None else arguments.calibration_tokens
        text = calibration_text.choose(
            source, tokenizer, path, tokens, tokens if path is None else arguments.generated_tokens or 0,
            at_most=arguments.calibration_tokens is None, seed=arguments.calibration_seed,
        )  # fmt: skip
    planned = quantize.make_plan(source, cfg, dtype, [] if text is None else text.blank())
    if target is not None:
        mixed.split_windows(planned.calibration)
    unfinished, sensed, written = (
        out.with_name(f"{out.name}.{name}") for name in ("unfinished", "sensitivity", "generated")
    )
    with _resumable(unfinished, sensed, written), quantize.new_folder(out) as folder:
        print(
            f"{source.name}: {planned.float_bytes:,} bytes in {arguments.dtype}, {planned.packed_bytes:,} packed; "
            f"quantizing takes about {_size(planned.peak_bytes)} of memory",
            file=sys.stderr,
        )
        if text is not None:
            planned = dataclasses.replace(planned, calibration=text.batches(dtype, written))
        if target is not None:
            windows, sensing, checking = mixed.split_windows(planned.calibration)
            planned = dataclasses.replace(planned, calibration=windows)
            planned, layers, chosen = mixed.decide(planned, sensing, target, sensed)
        report, size = quantize.run(planned, folder, tokenizer, unfinished)
        if target is not None:
            models = sources.load(sources.find(str(folder))), sources.load(source, planned.dtype)
            outcome = mixed.outcome(layers, chosen, target, *models, checking)
            results.write_json(out.with_name(f"{out.name}.mixed.json"), outcome)
            mixed_plot.plot(out.with_name(f"{out.name}.mixed.png"), outcome)
            shutil.rmtree(sensed)
        written.unlink(missing_ok=True)
    if text is not None:
        report.notes.append(text.note)
    if arguments.json:
        made = report.to_dict() | {"file_bytes": size, "float_bytes": planned.float_bytes}
        print(json.dumps(made if target is None else made | {"mixed": outcome}))
        return 0
    for entry in report.skipped:
        print(f"left float: {entry.name} ({entry.reason})")
    for note in report.notes:
        print(f"note: {note}")
    if target is not None:
        print(_mixed(outcome))
    if tokenizer is None:
        print("note: no tokenizer beside this model; generate and eval will need --tokenizer")
    elements = planned.float_bytes / planned.dtype.itemsize
    name = shlex.quote(str(out))
    print(
        f"{len(report.quantized)} layers quantized, {len(report.skipped)} left float. {out}: {size:,} bytes, "
        f"{size / (4 * elements):.1%} of float32, {size / (2 * elements):.1%} of bfloat16.\n"
        f"next: potqat inspect {name}; potqat generate {name} --prompt 'Once upon a time'"
    )
    return 0


@contextmanager
def _resumable(*folders: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = " and ".join(str(folder) for folder in folders if folder.exists())
        if not kept:
            raise
        raise Stopped(f"stopped; what is finished is kept in {kept}; run the same command again to go on") from None


def _mixed(outcome: dict) -> str:
    counts = Counter(f"{c['chosen']['grid']} {c['chosen']['granularity']}" for c in outcome["layers"].values())
    measured = outcome["measured"]
    low, high = measured["kl_interval"]
    lines = [
        "chosen: " + ", ".join(f"{count} layers {name}" for name, count in counts.most_common()),
        f"loss a token (KL from the float model): target {outcome['target']:.4f}, predicted "
        f"{outcome['predicted']['loss']:.4f}, measured {measured['kl']:.4f} (95%: {low:.4f} to {high:.4f}) on "
        f"{measured['windows']} windows that calibration did not see; cross-entropy {measured['loss_increase']:+.4f}",
    ]
    if low > outcome["target"]:
        lines.append("note: measured above the target, for what layers add does not quite sum; ask for less, or accept")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def _config(arguments: argparse.Namespace) -> PoTConfig:
    try:
        fields = quantizer.fields(arguments)
        for name, settings in fields["overrides"].items():
            if (scale := settings.get("scale", DEFAULT.scale)) not in SCALES:
                raise ValueError(f"--override {name}: scale must be one of {', '.join(SCALES)} here, got {scale!r}")
        calibrated = arguments.calibration is not None
        if arguments.calibration_tokens is not None and (not calibrated or arguments.calibration_tokens < 1):
            raise ValueError(
                "--calibration-tokens goes with --calibration and must be at least 1, "
                f"got {arguments.calibration_tokens}"
            )
        file = calibrated and arguments.calibration is not OWN_TEXT
        if arguments.generated_tokens is not None and (not file or arguments.generated_tokens < 1):
            raise ValueError(
                "--generated-tokens goes with --calibration FILE and must be at least 1, got "
                f"{arguments.generated_tokens}; without FILE, --calibration-tokens says how many the model writes"
            )
        if arguments.calibration_seed is not None and (not calibrated or arguments.calibration_seed < 0):
            raise ValueError(
                f"--calibration-seed goes with --calibration and must be at least 0, got {arguments.calibration_seed}"
            )
        if arguments.target_loss is not None and (not calibrated or not 0 < arguments.target_loss < math.inf):
            raise ValueError(f"--target-loss goes with --calibration and must be above 0, got {arguments.target_loss}")
        for name, option in (("scale", arguments.scale), ("rounding", arguments.rounding)):
            if option == CALIBRATED[name] and not calibrated:
                raise ValueError(f"--{name} {option} needs --calibration")
        default = CALIBRATED if calibrated else {"scale": DEFAULT.scale, "rounding": DEFAULT.rounding}
        return PoTConfig(
            scale=arguments.scale or default["scale"],
            rounding=arguments.rounding or default["rounding"],
            activations=quantizer.value(arguments.activations),
            **fields,
        )
    except ValueError as error:
        raise Usage(error) from None
