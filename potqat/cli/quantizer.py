"""Options for which weights are quantized and how, of the verbs that quantize."""

from __future__ import annotations

import argparse
from typing import Any

from potqat.config import GRIDS, PoTConfig

FLOAT = "float"  # the word for None on the command line


def add(parser: argparse.ArgumentParser, default: PoTConfig) -> None:
    parser.add_argument(
        "--grid", choices=GRIDS, default=default.grid,
        help="levels of a weight: powers of two (pot4), sums of two of them (e2m1), or evenly spaced "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", default=default.granularity, metavar="G",
        help="weights that share a scale: tensor, channel, or a group size such as 32 or 128 (default: %(default)s); "
        "without calibration, groups of 32 lose least",
    )  # fmt: skip
    parser.add_argument(
        "--embedding-grid", choices=(*GRIDS, FLOAT), default=default.embedding_grid,
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


def fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """These options as fields of PoTConfig.

    Raises:
        ValueError: an override that cannot be read.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for override in arguments.override:
        name, colon, settings = override.partition(":")
        pairs = [setting.split("=") for setting in settings.split(",")]
        if not (name and colon) or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"--override must be NAME:FIELD=VALUE,...; got {override!r}")
        if name in overrides:
            raise ValueError(f"--override {name}: given twice; put its fields in one, with commas")
        overrides[name] = {key: value(text) for key, text in pairs}
    return {
        "grid": arguments.grid,
        "granularity": value(arguments.granularity),
        "embedding_grid": value(arguments.embedding_grid),
        "skip": tuple(arguments.skip),
        "overrides": overrides,
    }


def value(text: str) -> str | int | None:
    """A field's value from the command line: a number, None for FLOAT, or a name."""
    return int(text) if text.isdecimal() else None if text == FLOAT else text
