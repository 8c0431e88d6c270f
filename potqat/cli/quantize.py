"""``potqat quantize``: a pretrained float model to a folder with the packed one."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potqat.cli.errors import Stopped, Usage
from potqat.config import GRIDS, ROUNDINGS, PoTConfig

DEFAULT = PoTConfig()
FLOAT = "float"  # the word for None on the command line
SCALES = ("absmax", "mse", "output")  # those that need no training
CALIBRATED = {"scale": "output", "rounding": "gptq"}  # the defaults with --calibration
CALIBRATION_TOKENS = 32768


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
    parser.add_argument(
        "--grid", choices=GRIDS, default=DEFAULT.grid,
        help="levels of a weight: powers of two (pot4), sums of two of them (e2m1), or evenly spaced "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", default=DEFAULT.granularity, metavar="G",
        help="weights that share a scale: tensor, channel, or a group size such as 32 or 128 (default: %(default)s); "
        "without calibration, groups of 32 lose least",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="UTF-8 text like what the model will read: quantize each layer for the inputs that it has on it "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"read so many tokens, in windows spread over the text (default: {CALIBRATION_TOKENS}, or what there is)",
    )
    parser.add_argument(
        "--calibration-seed", type=int, metavar="N",
        help="draw the windows at random, to see what another sample of the text gives (default: evenly spread)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", choices=SCALES,
        help="by the largest weight (absmax), searched for the least squared error (mse), or for that of the outputs "
        f"(output; needs --calibration) (default: {DEFAULT.scale}; with --calibration {CALIBRATED['scale']})",
    )  # fmt: skip
    parser.add_argument(
        "--rounding", choices=ROUNDINGS,
        help="to the nearest level, to the nearest logarithm, as the papers' code, or with error compensation (gptq; "
        f"needs --calibration) (default: {DEFAULT.rounding}; with --calibration {CALIBRATED['rounding']})",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=(DEFAULT.activations, FLOAT), default=DEFAULT.activations,
        help="what the linear layers compute with (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--embedding-grid", choices=(*GRIDS, FLOAT), default=DEFAULT.embedding_grid,
        help="levels of embeddings and of a head tied to one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME",
        help="leave modules of this name or glob float, as lm_head; repeatable (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--override", action="append", default=[], metavar="NAME:FIELD=VALUE,...",
        help="other settings for modules of this name or glob, as '*.mlp.*:grid=e2m1,granularity=32'; repeatable "
        "(default: none)",
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

    from potqat.flows import quantize, sources
    from potqat.flows.text import read_text

    text, tokens = arguments.calibration, arguments.calibration_tokens
    if text is not None:
        read_text(text)  # what is wrong with it is said before anything else is read
    source = sources.find(arguments.model)
    given = arguments.tokenizer
    tokenizer = sources.tokenizer_of(source) if given is None else sources.tokenizer(given)
    if given is not None and len(tokenizer) > source.vocabulary:
        raise ValueError(
            f"--tokenizer {given}: has {len(tokenizer)} tokens, and {source.name} knows {source.vocabulary}; give the "
            "one that it was trained with"
        )
    windows = []
    if text is not None:
        if tokenizer is None:
            raise ValueError(f"{source.name}: no tokenizer beside the model to read {text.name}; name one: --tokenizer")
        count = CALIBRATION_TOKENS if tokens is None else tokens
        windows = quantize.calibration_windows(
            text, tokenizer, source, count, at_most=tokens is None, seed=arguments.calibration_seed
        )
    planned = quantize.make_plan(source, cfg, getattr(torch, arguments.dtype), windows)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with _resumable(unfinished), quantize.new_folder(out) as folder:
        print(
            f"{source.name}: {planned.float_bytes:,} bytes in {arguments.dtype}, {planned.packed_bytes:,} packed; "
            f"quantizing takes about {_size(planned.peak_bytes)} of memory",
            file=sys.stderr,
        )
        report, size = quantize.run(planned, folder, tokenizer, unfinished)
    if arguments.json:
        print(json.dumps(report.to_dict() | {"file_bytes": size, "float_bytes": planned.float_bytes}))
        return 0
    for entry in report.skipped:
        print(f"left float: {entry.name} ({entry.reason})")
    for note in report.notes:
        print(f"note: {note}")
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
def _resumable(unfinished: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if not unfinished.exists():
            raise
        raise Stopped(
            f"stopped; the layers that are finished are kept in {unfinished}; run the same command again to go on"
        ) from None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def _config(arguments: argparse.Namespace) -> PoTConfig:
    def value(text: str):
        return int(text) if text.isdecimal() else None if text == FLOAT else text

    try:
        overrides = {}
        for override in arguments.override:
            name, colon, fields = override.partition(":")
            pairs = [field.split("=") for field in fields.split(",")]
            if not (name and colon) or any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"--override must be NAME:FIELD=VALUE,...; got {override!r}")
            if name in overrides:
                raise ValueError(f"--override {name}: given twice; put its fields in one, with commas")
            overrides[name] = {key: value(text) for key, text in pairs}
            if (scale := overrides[name].get("scale", DEFAULT.scale)) not in SCALES:
                raise ValueError(f"--override {name}: scale must be one of {', '.join(SCALES)} here, got {scale!r}")
        calibrated = arguments.calibration is not None
        if arguments.calibration_tokens is not None and (not calibrated or arguments.calibration_tokens < 1):
            raise ValueError(
                "--calibration-tokens goes with --calibration FILE and must be at least 1, "
                f"got {arguments.calibration_tokens}"
            )
        if arguments.calibration_seed is not None and (not calibrated or arguments.calibration_seed < 0):
            raise ValueError(
                "--calibration-seed goes with --calibration FILE and must be at least 0, "
                f"got {arguments.calibration_seed}"
            )
        for name, option in (("scale", arguments.scale), ("rounding", arguments.rounding)):
            if option == CALIBRATED[name] and not calibrated:
                raise ValueError(f"--{name} {option} needs a text: --calibration FILE")
        default = CALIBRATED if calibrated else {"scale": DEFAULT.scale, "rounding": DEFAULT.rounding}
        return PoTConfig(
            grid=arguments.grid,
            granularity=value(arguments.granularity),
            scale=arguments.scale or default["scale"],
            rounding=arguments.rounding or default["rounding"],
            activations=value(arguments.activations),
            embedding_grid=value(arguments.embedding_grid),
            skip=tuple(arguments.skip),
            overrides=overrides,
        )
    except ValueError as error:
        raise Usage(error) from None
