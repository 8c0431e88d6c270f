"""The ``potqat`` command: finds the verb, runs it, and turns what goes wrong into one line and an exit status.

Results go to stdout, progress and errors to stderr. Exit: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.

A verb lives in one module of this package, which has ``add(verbs)``: it adds a parser (with help, description and an
example as epilog) and calls ``parser.set_defaults(run=...)`` with a function that takes the parsed arguments and
returns the exit status. ``run`` imports what it needs when it runs, so that ``--help`` stays quick, and raises
``ValueError`` or ``OSError`` (exit 1), ``errors.Usage`` (exit 2) or ``errors.Stopped`` (exit 130). To add a verb, write
its module and name it in ``VERBS``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import potqat
from potqat.cli import bench, doctor, errors, evaluate, experiment, generate, inspect, quantize, train

VERBS = (experiment, quantize, train, generate, evaluate, inspect, bench, doctor)  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` by default); returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="potqat", description="Language-model weights as signed powers of two in 4 bits.",
        epilog="example: potqat demo", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"potqat {potqat.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in VERBS:
        module.add(verbs)
    # torchao and torch log at import what of their own they could not load or renamed; nobody here can act on it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        arguments = parser.parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return stop.code
    except errors.Usage as error:
        return _fail(error, 2)
    except errors.Stopped as stop:
        return _fail(stop, 130)
    except BrokenPipeError:  # who read our output has read enough: potqat inspect DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 1
    except (ValueError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _fail(error: object, status: int) -> int:
    print(f"potqat: {' '.join(str(error).split()).removeprefix('potqat: ')}", file=sys.stderr)
    return status
