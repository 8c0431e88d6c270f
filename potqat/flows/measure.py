"""Timing that stands comparison: what is compared takes turns in one run, at equal threads, and beside it stands what
the machine can do at most.

A sample is a function of a number of calls that makes at least so many and returns (calls made, seconds they took).
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from potqat import _C

Sample: TypeAlias = Callable[[int], tuple[int, float]]

LEAST_SECONDS = 2e-3  # of a sample: the clock and the loop around short calls are then less than a percent
CALIBRATION_SECONDS = 10e-3  # of a sample that starts Python threads
# Before each sample, not timed: the threads of another library's pool stop spinning (libgomp's do after some 15 ms; at
# two threads on two cores a sample taken before that is twice as long), and the weights come back into the caches. The
# core is kept busy meanwhile: one that has slept takes up to a third longer at first.
SETTLE_SECONDS, WARM_SECONDS = 50e-3, 3e-3
LONG_SECONDS = 50e-3  # calls that take longer need no warming


@dataclass(frozen=True)
class Times:
    """Seconds a call over the rounds, each round's sample being the mean of ``calls`` calls."""

    median: float
    least: float
    most: float
    calls: int


def interleave(
    samples: Mapping[str, Sample], rounds: int, *, calls: int | None = None, turn: Callable[[], object] = lambda: None
) -> dict[str, Times]:
    """Time each sample once a round, in turn.

    Args:
        calls: of every sample; None: for each so many that a sample lasts ``LEAST_SECONDS``, after a warm-up.
        turn: called after each sample, for a progress bar: ``rounds * len(samples)`` times.
    """
    counts = {name: _calls_for(sample, LEAST_SECONDS) if calls is None else calls for name, sample in samples.items()}
    taken: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(rounds):
        for name, sample in samples.items():
            _settle()
            if calls is None and taken[name][-1:] < [LONG_SECONDS]:
                _warm(sample, counts[name])
            made, seconds = sample(counts[name])
            taken[name].append(seconds / made)
            turn()
    return {name: Times(statistics.median(t), min(t), max(t), counts[name]) for name, t in taken.items()}


def of_calls(function: Callable[[], object]) -> Sample:
    """The sample of a function that is one call."""

    def sample(count: int) -> tuple[int, float]:
        begin = time.perf_counter()
        for _ in range(count):
            function()
        return count, time.perf_counter() - begin

    return sample


def _calls_for(sample: Sample, least: float) -> int:
    sample(1)  # what happens once: compilation, allocation
    count = 1
    while True:
        made, seconds = sample(count)
        if seconds >= least:
            return count
        count = max(count + 1, min(8 * count, math.ceil(1.3 * least * made / max(seconds, 1e-9))))


def _settle() -> None:
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        pass


def _warm(sample: Sample, count: int) -> None:
    seconds = 0.0
    while seconds < WARM_SECONDS:
        seconds += sample(count)[1]


# ---- What the machine can do --------------------------------------------------------------------------------


def read_rate(size: int, threads: int, rounds: int) -> float:
    """Bytes a second at which ``threads`` threads together stream a buffer of ``size`` bytes, again and again: the
    median of ``rounds`` samples. The memory comes from PyTorch, as weights do (no huge pages, unless it is told to).
    """
    buffer = torch.zeros(max(size // 64, threads), 64, dtype=torch.uint8).numpy()
    parts = np.array_split(buffer, threads)
    return buffer.nbytes * _per_second([(_C.read, part) for part in parts], rounds)


def peak_rate(isa: str, threads: int, rounds: int) -> float:
    """Operations a second (two a multiply-add) of an instruction set's int8 dot product on registers, ``threads``
    cores together: the median of ``rounds`` samples."""
    steps = 1000
    return (
        2
        * threads
        * _C.peak(isa, steps)
        * _per_second([(lambda isa, count: _C.peak(isa, count * steps), isa)] * threads, rounds)
    )


def _per_second(works: list[tuple[Callable, object]], rounds: int) -> float:
    """Works are functions of (argument, repeats) that release the GIL; each has a thread. Repeats a second of all."""
    with ThreadPoolExecutor(len(works)) as pool:

        def one(work, argument, count):
            begin = time.perf_counter()
            work(argument, count)
            return begin, time.perf_counter()

        def sample(count: int) -> tuple[int, float]:
            spans = list(pool.map(one, *zip(*works, strict=True), [count] * len(works)))
            return count, max(end for _, end in spans) - min(begin for begin, _ in spans)

        count = _calls_for(sample, CALIBRATION_SECONDS)
        return count / statistics.median(sample(count)[1] for _ in range(rounds))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Size of the last-level cache as the system tells it, or None. It may be shared with cores that are not ours."""
    sizes = []
    for path in root.glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=None)


def available_memory(info: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that programs can still have, or None where the system does not tell."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", info.read_text(), re.M) if info.exists() else None
    return 1024 * int(found[1]) if found else None
