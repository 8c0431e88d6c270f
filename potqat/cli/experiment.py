"""``potqat demo`` and ``potqat reproduce``: the papers' character-level experiment, short and at full length."""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

from potqat.cli import threads
from potqat.cli.errors import Stopped, Usage
from potqat.flows.experiment import ARMS, PRESETS, Experiment


def add(verbs) -> None:
    _add_demo(verbs)
    _add_reproduce(verbs)


def _add_demo(verbs) -> None:
    preset = PRESETS["demo"]
    parser = verbs.add_parser(
        "demo",
        help="train, quantize, pack and compare a small GPT in a few minutes",
        description="Train a small character-level GPT, quantize it to powers of two, pack it to 4 bits and compare it "
        f"with float and int4: {preset.total_iterations:,} iterations an arm, at most 5 minutes on 2 cores.",
        epilog="example: potqat demo --data my.txt --out my-demo",
    )
    _add_common(parser, "demo")


def _add_reproduce(verbs) -> None:
    preset = PRESETS["reproduce"]
    parser = verbs.add_parser(
        "reproduce",
        help="the papers' experiment at full length",
        description="The papers' character-level experiment at full length: "
        f"{preset.float_iterations:,} iterations in float, then every arm to {preset.total_iterations:,}.",
        epilog="example: potqat reproduce --data shakespeare.txt --out shakespeare --arms int4,pot4",
    )
    _add_common(parser, "reproduce")
    for name, what in (
        ("layers", "transformer blocks"),
        ("heads", "attention heads"),
        ("width", "channels"),
        ("context", "characters the model sees"),
        ("batch", "windows a step"),
        ("float_iterations", "steps in float before the checkpoint"),
        ("total_iterations", "steps of every arm, the float ones included"),
        ("evaluate_every", "steps between two points of the curves"),
    ):
        default = getattr(preset, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} (default: {default:,})")
    parser.add_argument(
        "--arms", type=lambda names: tuple(dict.fromkeys(names.split(","))), default=preset.arms, metavar="A,B",
        help=f"what to compare with the float control, of: {', '.join(ARMS)} (default: all)",
    )  # fmt: skip


def _add_common(parser: argparse.ArgumentParser, verb: str) -> None:
    preset = PRESETS[verb]
    parser.set_defaults(run=lambda arguments: _run(preset, arguments))
    parser.add_argument("--data", metavar="FILE", help="text to train on, UTF-8 (default: Python's own language help)")
    parser.add_argument(
        "--out", metavar="DIR", default=f"potqat-{verb}",
        help="folder for results; the same command goes on where it stopped (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=preset.seed, help="same seed and threads, same result (default: %(default)s)"
    )
    threads.add(parser)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=preset.device,
        help="where to train; packed models are always measured on the CPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--qat", choices=("eager", "pt2e"), default=preset.qat,
        help="train through replaced modules or through an exported graph (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print metrics as JSON instead of the table")


def _run(preset: Experiment, arguments: argparse.Namespace) -> int:
    from potqat.flows import nanogpt
    from potqat.flows.trainer import Interrupted

    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(preset) if hasattr(arguments, f.name)}
    try:
        experiment = dataclasses.replace(preset, **given)
    except ValueError as error:
        raise Usage(error) from None
    threads.use(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    try:
        metrics = nanogpt.run(experiment, arguments.out, arguments.data)
    except Interrupted as stop:
        raise Stopped(f"{stop}; the state is in {arguments.out}: run the same command again to go on") from None
    if arguments.json:
        print(json.dumps(metrics))
    else:
        print(f"{metrics['samples']}\n\n{metrics['table']}\n\nEverything is in {arguments.out}/")
    return 0
