"""What ``potqat doctor`` looks at: versions, CPUs and threads, the kernels, and whether their results are exact."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import potqat
from potqat import reference
from potqat.config import GRIDS, PoTConfig
from potqat.flows.results import machine

GRANULARITIES = ("channel", 32)
# Neither a multiple of a tile nor of a group, and work enough for several threads in each op.
TOKENS, OUTPUTS, INPUTS = 70, 150, 200


@dataclass(frozen=True)
class Failure:
    """Results that should be equal and are not: where it happened, and the first difference."""

    isa: str
    threads: int
    grid: str
    granularity: str | int
    what: str


@dataclass(frozen=True)
class SelfTest:
    """``checks`` comparisons made in ``seconds``, and those that failed."""

    checks: int
    seconds: float
    failures: tuple[Failure, ...]


def examine() -> dict[str, Any]:
    """Everything above as a JSON-ready dict; ``ok`` is False if the self-test failed, ``warnings`` are sentences."""
    threads, cpus, quota = torch.get_num_threads(), len(os.sched_getaffinity(0)), cpu_quota()
    test = self_test()
    return {
        "versions": versions(),
        "extras": extras(),
        "kernels": kernels(),
        "cpu": {"model": machine()["cpu"], "cpus": cpus, "quota": quota, "threads": threads},
        "self_test": {
            "checks": test.checks,
            "seconds": test.seconds,
            "failures": [vars(failure) for failure in test.failures],
        },
        "warnings": thread_warnings(threads, cpus, quota),
        "ok": not test.failures,
    }


def versions() -> dict[str, str]:
    """potqat, Python and what potqat always needs -> version."""
    names = [name for name, extra in _requirements() if extra is None]
    return {
        "potqat": potqat.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which build it is: +cpu, +cu130
        **{name: importlib.metadata.version(name) for name in names if name != "torch"},
    }


def extras() -> dict[str, dict[str, str | None]]:
    """What some work needs -> its ``version`` (None: not installed) and the ``extra`` that brings it."""
    return {
        name: {"version": installed(name), "extra": extra}
        for name, extra in _requirements()
        if extra not in (None, "dev", "notebooks")
    }


def _requirements() -> Iterator[tuple[str, str | None]]:
    """(distribution, extra or None) of each requirement that the installed potqat declares."""
    for requirement in importlib.metadata.requires("potqat") or ():
        name = re.match(r"[\w.-]+", requirement)[0]
        extra = re.search(r"extra == [\"']([\w-]+)", requirement)
        if name != "potqat":  # an extra that includes another
            yield name, extra and extra[1]


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels() -> dict[str, Any]:
    """Instruction sets, what POTQAT_ISA asks for, and the file that the torch ops were loaded from."""
    info = potqat.cpu_info()
    return {
        "active": info["isa"],
        "available": info["available"],
        "built": info["built"],
        "POTQAT_ISA": os.environ.get("POTQAT_ISA"),
        "library": next(path for path in torch.ops.loaded_libraries if Path(path).name == "libpotqat_ops.so"),
    }


# ---- CPUs ---------------------------------------------------------------------------------------------------


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that this process's control groups allow (the least of them), or None without a limit.

    Reads cgroup v2 (``cpu.max``: "quota period" or "max period") and v1 (``cpu.cfs_quota_us``, -1 for none), in
    microseconds. A container may see its own group as the root of the tree; every folder from the group up is read,
    and one that does not exist holds no limit.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    groups = root / "proc/self/cgroup"
    quotas = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):  # v2 names none
            continue
        tree = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            quotas.append(_quota(folder))
            if folder == tree:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").exists():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def thread_warnings(threads: int, cpus: int, quota: float | None) -> list[str]:
    """A sentence if torch's ``threads`` are more than the CPUs they may use: waiting threads slow every op down."""
    if quota is not None and quota < cpus:
        limit, why = quota, f"this container may use {quota:g} CPUs"
    else:
        limit, why = cpus, f"this process may run on {cpus} CPUs"
    if threads <= max(1, limit):
        return []
    return [f"torch uses {threads} threads and {why}: set OMP_NUM_THREADS={max(1, int(limit))}"]


# ---- Exactness ----------------------------------------------------------------------------------------------


def self_test() -> SelfTest:
    """Compare bits: every available instruction set, packable grid and granularity, with 1 thread and with all.

    * ``unpack(pack(w))`` with ``fake_quantize(w)``;
    * ``linear`` with int8 activations, of one token and of many, with ``potqat.reference.linear``, whose integer sums
      are exact: so every kernel, and every number of threads, is held to the same bits.

    The instruction set and the number of threads are put back.
    """
    begin, checks, failures = time.perf_counter(), 0, []
    many = max(2, torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    w, x, bias = (torch.randn(size, generator=generator) for size in ((OUTPUTS, INPUTS), (TOKENS, INPUTS), (OUTPUTS,)))
    with _settings_restored():
        for grid, granularity in itertools.product(GRIDS, GRANULARITIES):
            cfg = PoTConfig(grid=grid, granularity=granularity)
            torch.set_num_threads(1)
            scale = reference.absmax_scale(w, grid, cfg.group_size)
            codes = reference.pack(reference.quantize(w, scale, grid, cfg.rounding, cfg.group_size), grid)
            truth = reference.linear(x, codes, scale, bias, grid, OUTPUTS, cfg.group_size)
            for isa, threads in itertools.product(potqat.cpu_info()["available"], (1, many)):
                potqat.set_isa(isa)
                torch.set_num_threads(threads)
                packed, w_hat = potqat.pack(w, scale, cfg), potqat.fake_quantize(w, scale, cfg)
                pairs = {"unpack(pack(w)) and fake_quantize(w)": (potqat.unpack(packed, scale, cfg, w.shape), w_hat)}
                for m in (1, TOKENS):
                    y = potqat.linear(x[:m], packed, scale, bias, cfg, out_features=OUTPUTS)
                    pairs[f"linear on x [{m}, {INPUTS}] and the reference"] = (y, truth[:m])
                for what, (ours, theirs) in pairs.items():
                    checks += 1
                    if difference := first_difference(ours, theirs):
                        failures.append(Failure(isa, threads, grid, granularity, f"{what} {difference}"))
    return SelfTest(checks, time.perf_counter() - begin, tuple(failures))


def first_difference(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """None if the float32 tensors are equal bit for bit (zeros by sign, NaNs by payload), else how they differ."""
    if a.shape != b.shape:
        return f"differ in shape: {list(a.shape)} and {list(b.shape)}"
    differs = a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)
    if not differs.any():
        return None
    at = tuple(differs.nonzero()[0].tolist())
    return (
        f"differ in {int(differs.sum()):,} of {a.numel():,} values, first at {list(at)}: "
        f"{a[at].item()!r} and {b[at].item()!r}"
    )


@contextmanager
def _settings_restored() -> Iterator[None]:
    isa, threads = potqat.cpu_info()["isa"], torch.get_num_threads()
    try:
        yield
    finally:
        potqat.set_isa(isa)
        torch.set_num_threads(threads)
