"""``--threads``, of the verbs that compute."""

from __future__ import annotations

import argparse
import os

from potqat.cli.errors import Usage


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def use(threads: int | None) -> None:
    """Set torch's threads; None leaves them. Far more threads than CPUs would end the process.

    Raises:
        Usage: a number outside 1..CPUs of this machine.
    """
    if threads is None:
        return
    if threads < 1:
        raise Usage(f"--threads must be at least 1, got {threads}")
    if threads > (cpus := os.cpu_count()):
        raise Usage(f"--threads must be at most {cpus}, the CPUs of this machine, got {threads}")
    import torch

    torch.set_num_threads(threads)
