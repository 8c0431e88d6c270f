"""Speed of one linear layer: potqat's beside PyTorch's own, on weights that are hot and on weights that are not.

m, n, k are tokens, outputs, inputs. ``potqat bench`` is ``run`` on ``SHORT``; ``benchmarks/kernels.py`` has more peers,
shapes and pictures.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

import potqat
from potqat.config import PoTConfig
from potqat.flows import measure
from potqat.flows.results import machine
from potqat.modules import PackedLinear
from potqat.ops import activation_mode

HOT, ROTATED = "hot", "rotated"
ROUNDS = 9
ROTATED_ROWS = (1,)  # beyond that the weights are used more than once and caches matter little
CALIBRATION_ROUNDS = 5
UNKNOWN_CACHE = 64 << 20  # rotated through, where the system does not tell the size of its caches


class Running(Protocol):
    """A peer with its weights and x in place: the sample that is timed."""

    def __call__(self, count: int) -> tuple[int, float]: ...


class Built(Protocol):
    """A peer with one weight. ``bytes``: of the weight as it is stored, with its scales."""

    bytes: int

    def start(self, x: torch.Tensor, copies: int, threads: int) -> Running:
        """Products of float32 x [M, K] with ``copies`` copies of the weight in turn.

        Raises:
            Exception: whatever keeps it from running; it is reported.
        """
        ...


@dataclass(frozen=True)
class Peer:
    """A way to compute a linear layer. ``build`` takes the float32 weight [N, K]; ``rows``: the m it is timed at, None
    for all."""

    name: str
    build: Callable[[torch.Tensor], Built]
    rows: tuple[int, ...] | None = None


class Layer:
    """A module as a peer. ``dtype``: of its activations, which the caller is assumed to have in it already."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32, weight_bytes: int | None = None):
        self.module, self.dtype = module, dtype
        self.bytes = tensor_bytes(module) if weight_bytes is None else weight_bytes

    def start(self, x: torch.Tensor, copies: int, threads: int) -> Running:
        x = x.to(self.dtype)
        modules = itertools.cycle([self.module, *(copy.deepcopy(self.module) for _ in range(copies - 1))])
        return measure.of_calls(lambda: next(modules)(x))


class Int8Linear(nn.Module):
    """int8 the way it is written in PyTorch: activations quantized per token, ``torch._int_mm``, two scales."""

    def __init__(self, w: torch.Tensor):
        super().__init__()
        scale = w.abs().amax(1) / 127
        self.register_buffer("q", (w / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        q = (x / s).round().to(torch.int8)
        return (torch._int_mm(q, self.q.t()) * s).mul_(self.scale)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; those of tensor subclasses by what they are made of."""
    return sum(_bytes(tensor) for tensor in itertools.chain(module.parameters(), module.buffers()))


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _float_linear(w: torch.Tensor, dtype: torch.dtype) -> Layer:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=dtype)
    linear.weight = nn.Parameter(w.to(dtype), requires_grad=False)
    return Layer(linear, dtype)


def packed_linear(w: torch.Tensor, cfg: PoTConfig) -> PackedLinear:
    """potqat's layer of a weight; scales by the quickest method, as speed does not depend on them."""
    scale = potqat.compute_scale(w, cfg)
    return PackedLinear(potqat.pack(w, scale, cfg), scale, None, cfg, tuple(w.shape))


_linear = torch.ops.potqat.linear.default


class Op:
    """``torch.ops.potqat.linear`` itself as a peer, as compiled models call it: no module around it."""

    def __init__(self, w: torch.Tensor, cfg: PoTConfig):
        layer = packed_linear(w, cfg)
        self.bytes, self.packed = layer.packed_bytes, layer.packed
        self.rest = (layer.scale, None, cfg.grid, w.shape[0], cfg.group_size, activation_mode(cfg), 1.0, 0)

    def __call__(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return _linear(x, packed, *self.rest)

    def start(self, x: torch.Tensor, copies: int, threads: int) -> Running:
        packed = itertools.cycle([self.packed, *(self.packed.clone() for _ in range(copies - 1))])
        return measure.of_calls(lambda: self(x, next(packed)))


OURS = (
    Peer("potqat pot4", lambda w: Op(w, PoTConfig(scale="absmax"))),
    Peer("potqat pot4, groups of 128", lambda w: Op(w, PoTConfig(scale="absmax", granularity=128))),
)
TORCH = (
    Peer("torch float32", lambda w: _float_linear(w, torch.float32)),
    Peer("torch bfloat16", lambda w: _float_linear(w, torch.bfloat16)),
    Peer("torch int8", lambda w: Layer(Int8Linear(w))),
)


@dataclass(frozen=True)
class Plan:
    """What is measured: each shape (n, k) with each m, threads and residency (rotated for ``ROTATED_ROWS`` only)."""

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    threads: Sequence[int]
    residencies: Sequence[str] = (HOT, ROTATED)
    rounds: int = ROUNDS

    def groups(self) -> Iterator[tuple[int, str, int]]:
        """(threads, residency, m) of one shape, in the order of measuring."""
        for threads, residency, m in itertools.product(self.threads, self.residencies, self.rows):
            if residency == HOT or m in ROTATED_ROWS:
                yield threads, residency, m

    def turns(self, peers: Iterable[Peer]) -> int:
        """Samples in all, if every peer runs."""
        rows = [m for _ in self.shapes for _, _, m in self.groups()]
        return self.rounds * sum(peer.rows is None or m in peer.rows for peer in peers for m in rows)


KEY = ("n", "k", "m", "threads", "residency")  # of a group
SHORT = Plan(shapes=((768, 768), (4096, 4096)), rows=(1, 8, 512), threads=())


@dataclass(frozen=True)
class Row:
    """One peer in one group. Where ``error`` says why it could not run, the figures are None.

    ``microseconds`` a call: median, min and max over the rounds. ``weight_bytes`` of one copy of the weight,
    ``rotated_bytes`` of all copies. GB/s are of weight bytes, GOPS count a multiply-add as two.
    """

    n: int
    k: int
    m: int
    threads: int
    residency: str
    peer: str
    error: str | None = None
    microseconds: dict[str, float] | None = None
    calls: int | None = None
    weight_bytes: int | None = None
    rotated_bytes: int | None = None
    gb_per_second: float | None = None
    gops: float | None = None


def run(
    plan: Plan, peers: Sequence[Peer], turn: Callable[[], object] = lambda: None
) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Measure; after each group of rows that took turns: (its calibration, its rows). Threads are put back at the end.

    The calibration of a group is ``read_gb_per_second`` of ``read_bytes`` (what the first peer's weights occupy) and
    ``peak_gops`` of the instruction set in use, by as many threads.
    """
    threads_before = torch.get_num_threads()
    try:
        for n, k in plan.shapes:
            w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
            built = {peer: _attempt(partial(peer.build, w)) for peer in peers}
            for threads, residency, m in plan.groups():
                torch.set_num_threads(threads)
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
                chosen = {peer: made for peer, made in built.items() if peer.rows is None or m in peer.rows}
                yield _group(plan, Row(n, k, m, threads, residency, ""), x, chosen, turn)
    finally:
        torch.set_num_threads(threads_before)


@torch.inference_mode()
def _group(plan: Plan, like: Row, x: torch.Tensor, built: dict[Peer, Built | str], turn) -> tuple[dict, list[Row]]:
    room = rotation_bytes(len(built)) if like.residency == ROTATED else 0
    errors = {peer: made for peer, made in built.items() if isinstance(made, str)}
    copies, samples = {}, {}
    for peer in built.keys() - errors.keys():
        copies[peer] = max(1, math.ceil(room / built[peer].bytes))
        samples[peer] = _attempt(partial(_started, built[peer], x, copies[peer], like.threads))
    errors |= {peer: made for peer, made in samples.items() if isinstance(made, str)}
    running = {peer: samples.pop(peer) for peer in built if peer not in errors}
    times = measure.interleave(running, plan.rounds, turn=turn)
    running.clear()  # the copies go before more memory is asked for
    rows = []
    for peer, made in built.items():
        if peer in errors:
            rows.append(replace(like, peer=peer.name, error=errors[peer]))
            continue
        taken = times[peer]
        figures = {
            "microseconds": {"median": 1e6 * taken.median, "min": 1e6 * taken.least, "max": 1e6 * taken.most},
            "calls": taken.calls,
            "weight_bytes": made.bytes,
            "rotated_bytes": made.bytes * copies[peer],
            "gb_per_second": made.bytes / taken.median / 1e9,
            "gops": 2 * like.m * like.n * like.k / taken.median / 1e9,
        }
        rows.append(replace(like, peer=peer.name, **figures))
    size, isa = room or next((row.weight_bytes for row in rows if not row.error), 64), potqat.cpu_info()["isa"]
    calibration = {
        **{name: getattr(like, name) for name in KEY},
        "isa": isa,
        "read_bytes": size,
        "read_gb_per_second": measure.read_rate(size, like.threads, CALIBRATION_ROUNDS) / 1e9,
        "peak_gops": measure.peak_rate(isa, like.threads, CALIBRATION_ROUNDS) / 1e9,
    }
    return calibration, rows


def _started(made: Built, x: torch.Tensor, copies: int, threads: int) -> Running:
    running = made.start(x, copies, threads)
    running(1)  # who cannot run says so here
    return running


def _attempt(work: Callable[[], Any]) -> Any:
    """Its result, or what went wrong as text: a peer that does not run is a row of the table."""
    try:
        return work()
    except Exception as error:  # of other people's libraries: anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def rotation_bytes(peers: int) -> int:
    """Bytes of weights that each of ``peers`` peers goes through, so that caches do not help: four times the last-level
    cache (at twice its size it still answers some: 31 instead of 23 GB/s on an EPYC), but no more than half of the free
    memory for all together."""
    wanted = 4 * (measure.cache_bytes() or UNKNOWN_CACHE)
    free = measure.available_memory()
    return wanted if free is None else min(wanted, free // 2 // max(1, peers))


# ---- Results ------------------------------------------------------------------------------------------------


def report(groups: Sequence[tuple[dict[str, Any], list[Row]]]) -> dict[str, Any]:
    """JSON-ready: ``machine``, the ``calibration`` of each group, all ``rows``."""
    return {
        "machine": machine() | {"cache_bytes": measure.cache_bytes()},
        "calibration": [calibration for calibration, _ in groups],
        "rows": [asdict(row) for _, rows in groups for row in rows],
    }


def table(calibration: dict[str, Any], rows: Sequence[Row]) -> str:
    """One group as aligned text. The last column is the time of a peer over that of the first one."""
    head = rows[0]
    where = "hot" if head.residency == HOT else f"weights rotated through {calibration['read_bytes'] / 1e6:,.0f} MB"
    lines = [
        f"{head.m} x {head.n} x {head.k} (m, n, k), threads: {head.threads}, {where}",
        f"  calibration: read {calibration['read_gb_per_second']:.1f} GB/s, "
        f"{calibration['isa']} peak {calibration['peak_gops']:,.0f} GOPS",
        f"  {'':<34} {'us':>10} {'min':>10} {'max':>10} {'GB/s':>7} {'GOPS':>8} {'x ours':>7}",
    ]
    for row in rows:
        if row.error:
            lines.append(f"  {row.peer:<34} did not run: {row.error}")
            continue
        times = [f"{row.microseconds[name]:10.1f}" for name in ("median", "min", "max")]
        ratio = f"{row.microseconds['median'] / head.microseconds['median']:7.2f}" if head.microseconds else ""
        lines.append(f"  {row.peer:<34} {' '.join(times)} {row.gb_per_second:7.1f} {row.gops:8.1f} {ratio}")
    return "\n".join(lines)
