"""``potqat quantize``: a pretrained float model to a folder with the packed one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from potqat.cli.errors import Usage
from potqat.config import GRIDS, ROUNDINGS, PoTConfig

DEFAULT = PoTConfig()
FLOAT = "float"  # the word for None on the command line


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
    parser.add_argument("--grid", choices=GRIDS, default=DEFAULT.grid, help="levels (default: %(default)s)")
    parser.add_argument(
        "--granularity", default=DEFAULT.granularity, metavar="G",
        help="weights that share a scale: tensor, channel, or a group size such as 32 or 128 (default: %(default)s); "
        "without calibration, groups of 32 lose least",
    )  # fmt: skip
    parser.add_argument(
        "--scale", choices=("absmax", "mse"), default=DEFAULT.scale, help="how a scale is found (default: %(default)s)"
    )
    parser.add_argument("--rounding", choices=ROUNDINGS, default=DEFAULT.rounding, help="(default: %(default)s)")
    parser.add_argument(
        "--activations", choices=(DEFAULT.activations, FLOAT), default=DEFAULT.activations,
        help="what the linear layers compute with (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--embedding-grid", choices=(*GRIDS, FLOAT), default=DEFAULT.embedding_grid,
        help="levels of embeddings and of a head tied to one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="leave modules of this name or glob float; repeatable",
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="NAME:FIELD=VALUE,...",
        help="other settings for modules of this name or glob, as '*.mlp.*:grid=e2m1,granularity=32'; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of what stays float, and of the float model in memory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="NAME",
        help="tokenizer to store, where the model has none: hub name, folder, or a .txt file whose characters are the "
        "vocabulary (nanoGPT's character-level data)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from potqat.flows import quantize, sources

    cfg = _config(arguments)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise Usage(f"--out {arguments.out}: exists and is not an empty folder; name a new one")
    tokenizer = sources.tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    planned = quantize.make_plan(sources.find(arguments.model), cfg, getattr(torch, arguments.dtype))
    print(
        f"{arguments.model}: {planned.float_bytes:,} bytes in {arguments.dtype}, {planned.packed_bytes:,} packed; "
        f"quantizing takes about {planned.peak_bytes / 1e9:.2g} GB of memory",
        file=sys.stderr,
    )
    report, size, tokenizer = quantize.run(planned, arguments.out, tokenizer)
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
    print(
        f"{len(report.quantized)} layers quantized, {len(report.skipped)} left float. {arguments.out}: {size:,} bytes, "
        f"{size / (4 * elements):.1%} of float32, {size / (2 * elements):.1%} of bfloat16.\n"
        f"next: potqat inspect {arguments.out}; potqat generate {arguments.out} --prompt 'Once upon a time'"
    )
    return 0


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
            overrides[name] = {key: value(text) for key, text in pairs}
        return PoTConfig(
            grid=arguments.grid,
            granularity=value(arguments.granularity),
            scale=arguments.scale,
            rounding=arguments.rounding,
            activations=value(arguments.activations),
            embedding_grid=value(arguments.embedding_grid),
            skip=tuple(arguments.skip),
            overrides=overrides,
        )
    except ValueError as error:
        raise Usage(error) from None
