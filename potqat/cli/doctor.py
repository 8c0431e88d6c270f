"""``potqat doctor``: is this installation sound, and what will run here."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(verbs) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="versions, kernels, threads, and a self-test of exactness",
        description="Show what potqat runs on, and check that every kernel gives the same bits (about a second). "
        "Exit status 1 if one does not.",
        epilog="example: potqat doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from potqat.flows.doctor import examine

    return show(examine(), arguments.json)


def show(found: dict[str, Any], as_json: bool) -> int:
    """Print the result of ``potqat.flows.doctor.examine``; returns the exit status."""
    print(json.dumps(found) if as_json else _text(found))
    return 0 if found["ok"] else 1


def _text(found: dict[str, Any]) -> str:
    kernels, cpu, test = found["kernels"], found["cpu"], found["self_test"]
    rows = list(found["versions"].items())
    for name, optional in found["extras"].items():
        rows.append((name, optional["version"] or f"not installed: pip install 'potqat[{optional['extra']}]'"))
    rows.append(("", ""))
    rows.append(("kernels", f"{kernels['active']} runs; available: {', '.join(kernels['available'])}"))
    if absent := [isa for isa in kernels["built"] if isa not in kernels["available"]]:
        rows.append(("", f"built in, not on this machine: {', '.join(absent)}"))
    rows.append(("POTQAT_ISA", kernels["POTQAT_ISA"] or "not set: the best available runs"))
    rows.append(("op library", kernels["library"]))
    rows.append(("CPU", f"{cpu['model']}: {cpu['cpus']} for this process"))
    rows.append(("CPU quota", "none" if cpu["quota"] is None else f"{cpu['quota']:g} CPUs (control group)"))
    rows.append(("torch threads", cpu["threads"]))
    rows.append(("", ""))
    result = f"{len(test['failures'])} failed" if test["failures"] else "equal bit for bit"
    checks = f"{test['checks']} checks over kernels, grids and threads in {test['seconds']:.1f} s"
    rows.append(("exactness", f"{checks}: {result}"))
    for failure in test["failures"]:
        cfg = f"{failure['grid']}, granularity={failure['granularity']}"
        rows.append(("FAILED", f"{failure['isa']}, {cfg}, threads={failure['threads']}: {failure['what']}"))
    rows += [("warning", warning) for warning in found["warnings"]]
    return "\n".join(f"{name:<13}  {value}".rstrip() for name, value in rows)
