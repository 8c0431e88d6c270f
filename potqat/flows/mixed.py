"""Choose grid and granularity layer by layer: the fewest bytes whose predicted loss stays within a target.

The loss is KL(float || quantized) in nats a token: to second order what quantization adds to the cross-entropy on text
that the float model predicts as well as it believes, and far less noisy. Two facts make it cheap to predict
("linearity theorem", arXiv 2411.17525): what layers add, sums; and what one layer adds is linear in the squared error
of its outputs. So for each layer every candidate's output error is computed from calibration (as calibrated packing
does it), and the loss is measured with only this layer packed, through its kernel, for two candidates: the one that
was asked for, and the best. A line through the two gives the others; that the activations are int8 is in both.

The choice is greedy, as in HAWQ-V2 (arXiv 1911.03852) and llama.cpp's bits-per-weight target: start with what was
asked for everywhere, and change the layer that wins most loss a byte until the sum is within the target.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from potqat import calibrate, calibrated, modules, smooth
from potqat.config import PoTConfig
from potqat.flows import quantize, sources
from potqat.flows.evaluate import measure
from potqat.flows.results import write_json
from potqat.perplexity import Mean, Windows, score
from potqat.plan import Site, plan
from potqat.unfinished import Unfinished, work_hash

CANDIDATES = (("pot4", "channel"), ("e2m1", "channel"), ("pot4", 32), ("e2m1", 32), ("int8", "channel"))
BEST = CANDIDATES[-1]
HELD_BACK = 8  # of so many calibration windows one is held back
SENSITIVITY_TOKENS = 512  # of these, to measure layers on; the others check the result


@dataclass(frozen=True)
class Choice:
    """One way to pack a layer. ``error``: squared change of the outputs relative to their squares; ``loss``: nats a
    token that it adds to the model, measured or predicted from ``error``."""

    grid: str
    granularity: str | int
    bytes: int
    error: float
    loss: float


def candidates(cfg: PoTConfig) -> list[PoTConfig]:
    """``cfg`` itself, the others of CANDIDATES, and at the end the best.

    Raises:
        ValueError: ``cfg`` is the best already.
    """
    if cfg.grid == BEST[0]:
        raise ValueError(f"--target-loss chooses layers that need more than --grid says, and {cfg.grid} is the most")
    asked = (cfg.grid, cfg.granularity)
    pairs = [asked, *(pair for pair in CANDIDATES if pair != asked)]
    return [replace(cfg, grid=grid, granularity=granularity) for grid, granularity in pairs]


def split_windows(batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(batches to calibrate on, windows int64 [S, T] to measure layers on, windows [C, T] to check the result on),
    from batches int64 [B, T] of windows in the order of the text.

    Raises:
        ValueError: too few windows.
    """
    windows = torch.cat(list(batches))
    held = torch.arange(HELD_BACK // 2, len(windows), HELD_BACK)
    if len(held) < 3:
        raise ValueError(
            f"--target-loss holds back one calibration window of {HELD_BACK} and needs {3 * HELD_BACK}, got "
            f"{len(windows)}; give a longer text or more --calibration-tokens"
        )
    keep = torch.ones(len(windows), dtype=torch.bool)
    keep[held] = False
    count = max(1, min(SENSITIVITY_TOKENS // windows.shape[1], len(held) // 2))
    first = held[torch.linspace(0, len(held) - 1, count).long()]
    second = held[~torch.isin(held, first)]
    return list(windows[keep].split(len(batches[0]))), windows[first], windows[second]


@torch.no_grad()
def sensitivities(
    model: nn.Module, cfg: PoTConfig, batches: list[torch.Tensor], windows: torch.Tensor, folder: Path
) -> dict[str, list[Choice]]:
    """The choices of every layer that is calibrated and that no override of ``cfg`` settles, in the order of
    ``candidates``. The model is left as it was.

    Args:
        model: from ``sources.load``, float, in eval mode.
        batches: to calibrate on, int64 [B, T] each.
        windows: to measure on, int64 [S, T].
        folder: keeps what is done, for the same call to go on from; the caller deletes it.

    Raises:
        ValueError: no layer to choose for, a model without blocks, or a folder of other work.
    """
    parts = calibrated.split(plan(model, cfg))
    sites = {name: site for name, site in parts.layers.items() if name not in parts.tables}
    tried = {name: candidates(site.cfg) for name, site in sites.items() if _free(cfg, site)}
    if not tried:
        raise ValueError("--target-loss: overrides settle every layer; there is none to choose for")
    kept = Unfinished(folder, work_hash(model, cfg, [*batches, windows]))
    path = folder / "losses.json"
    with _smoothed(model, sites, kept) as (before, smoothed):
        missing = [name for name, cfgs in tried.items() if any(kept.load(_key(name, c)) is None for c in cfgs)]
        if missing:
            floats = {name: sites[name].module for name in tried}
            for inputs in calibrate.walk(model, batches, floats, before):
                for name in inputs.names:
                    for candidate in tried[name] if name in missing else ():
                        site = replace(sites[name], cfg=candidate)
                        new, entry = calibrated._calibrated(site, inputs, name in smoothed)
                        kept.save(_key(name, candidate), new, entry)
        losses = _measure_layers(model, sites, tried, windows, kept, path)
    found = {}
    for name, cfgs in tried.items():
        entries = [kept.load(_key(name, c))[1] for c in cfgs]
        (asked, best), (high, low) = losses[name], (entries[0].output_error, entries[-1].output_error)
        slope = max(0.0, (asked - best) / (high - low)) if high > low else 0.0
        found[name] = [
            Choice(
                c.grid, c.granularity, e.bytes_after, e.output_error, max(0.0, best + slope * (e.output_error - low))
            )
            for c, e in zip(cfgs, entries, strict=True)
        ]
    return found


@contextmanager
def _smoothed(model: nn.Module, sites: dict[str, Site], kept: Unfinished) -> Iterator[Any]:
    """As calibrated._smoothing, which does what calibrated packing does to the float model, and undone at the end."""
    floats = smooth.float_modules(model, {name: site.module for name, site in sites.items()})
    with calibrated._smoothing(model, sites, kept) as given:
        yield given
    for smoothings in kept.load_smoothings().values():
        for smoothing in smoothings:
            smoothing.apply(floats, undo=True)


def _free(cfg: PoTConfig, site: Site) -> bool:
    """Whether no override sets the layer's grid or granularity."""
    return (site.cfg.grid, site.cfg.granularity) == (cfg.grid, cfg.granularity)


def _key(name: str, cfg: PoTConfig) -> str:
    return f"{name}@{cfg.grid}-{cfg.granularity}"


def _measure_layers(
    model: nn.Module, sites: Mapping[str, Site], tried: Mapping[str, list[PoTConfig]], windows: torch.Tensor,
    kept: Unfinished, path: Path,
) -> dict[str, list[float]]:  # fmt: skip
    """{layer: KL with only it packed, as the first and as the last candidate}."""
    losses = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tail = _Tail(model, windows)
    bar = tqdm(
        tried, "sensitivity", initial=len(losses), unit="layer", delay=2, leave=False, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 5.0,
    )  # fmt: skip
    for name in bar:
        if name in losses:
            continue
        pair = []
        for cfg in (tried[name][0], tried[name][-1]):
            tensors, entry = kept.load(_key(name, cfg))
            site = replace(sites[name], cfg=cfg)
            modules.put(model, name, calibrated._packed(site, tensors["packed"], tensors["scale"], entry.sqnr_db))
            try:
                pair.append(tail.kl(site.module))
            finally:
                modules.put(model, name, site.module)
        losses[name] = pair
        write_json(path, losses)
    return losses


class _Tail:
    """A model on fixed windows, run from a block on: what the blocks before return is kept, as they are float."""

    def __init__(self, model: nn.Module, windows: torch.Tensor):
        self.logits_of, self.windows = sources.logits_of(model), windows
        self.blocks = list(calibrate._Chain(model, [windows[:1]], {}).blocks)
        self.block_of = {module: i for i, block in enumerate(self.blocks) for module in block.modules()}
        self.outputs: list[dict[int, Any]] = []
        self.logits = []
        for window in windows:
            seen: dict[int, Any] = {}
            hooks = [
                block.register_forward_hook(lambda module, args, output, i=i, seen=seen: seen.__setitem__(i, output))
                for i, block in enumerate(self.blocks)
            ]
            self.logits.append(self.logits_of(window[None]))
            for hook in hooks:
                hook.remove()
            self.outputs.append(seen)

    def kl(self, changed: nn.Module) -> float:
        """Mean KL(float || now) in nats a token; ``changed`` was the float layer that is now another."""
        at, total = self.block_of.get(changed, 0), 0.0
        whole = Windows(self.windows.shape[1], self.windows.shape[1])
        for i, window in enumerate(self.windows):
            with self._skipping(at, i):
                total += score(self.logits_of, window, whole, 0, lambda ids, i=i: self.logits[i]).kl
        return total / (len(self.windows) * whole.scored(0))

    @contextmanager
    def _skipping(self, at: int, i: int) -> Iterator[None]:
        for j, block in enumerate(self.blocks[:at]):
            block.forward = lambda *args, j=j, **kwargs: self.outputs[i][j]
        try:
            yield
        finally:
            for block in self.blocks[:at]:
                del block.forward


@dataclass(frozen=True)
class Step:
    """What the choices so far add up to: bytes of the layers, and predicted nats a token."""

    bytes: int
    loss: float


def choose(layers: Mapping[str, Sequence[Choice]], target: float) -> tuple[dict[str, Choice], list[Step]]:
    """(a choice for each layer, the steps to it from the first choice everywhere, that one included).

    Raises:
        ValueError: the target is below what the best choices add up to.
    """
    now = {name: choices[0] for name, choices in layers.items()}
    steps = [_sum(now)]
    while steps[-1].loss > target:
        changes = [
            (math.inf if c.bytes <= now[name].bytes else gain / (c.bytes - now[name].bytes), gain, name, c)
            for name, choices in layers.items()
            for c in choices
            if (gain := now[name].loss - c.loss) > 0
        ]
        if not changes:
            raise ValueError(
                f"--target-loss {target}: with the best choice for every layer {steps[-1].loss:.4f} nats a token are "
                "predicted; give at least that"
            )
        *_, name, choice = max(changes, key=lambda change: change[:2])
        now[name] = choice
        steps.append(_sum(now))
    return now, steps


def _sum(now: Mapping[str, Choice]) -> Step:
    return Step(sum(c.bytes for c in now.values()), math.fsum(c.loss for c in now.values()))


def all_steps(layers: Mapping[str, Sequence[Choice]]) -> list[Step]:
    """The steps down to the least loss that ``choose`` can reach."""
    return choose(layers, math.fsum(min(c.loss for c in choices) for choices in layers.values()) + 1e-12)[1]


def with_choices(cfg: PoTConfig, chosen: Mapping[str, Choice]) -> PoTConfig:
    """``cfg`` with an override for each layer whose choice differs from it."""
    more = {
        name: {**next((dict(f) for p, f in cfg.overrides.items() if p == name), {}), "grid": c.grid,
               "granularity": c.granularity}
        for name, c in chosen.items()
        if (c.grid, c.granularity) != (cfg.grid, cfg.granularity)
    }  # fmt: skip
    return replace(cfg, overrides={**cfg.overrides, **more})


def decide(
    planned: quantize.Plan, windows: torch.Tensor, target: float, folder: Path
) -> tuple[quantize.Plan, dict[str, list[Choice]], dict[str, Choice]]:
    """(the plan with a choice for each layer, what there was to choose from, what was chosen); errors as above."""
    model = sources.load(planned.source, planned.dtype)
    layers = sensitivities(model, planned.cfg, planned.calibration, windows, folder)
    chosen, _ = choose(layers, target)
    cfg = with_choices(planned.cfg, chosen)
    return quantize.make_plan(planned.source, cfg, planned.dtype, planned.calibration), layers, chosen


def outcome(
    layers: Mapping[str, Sequence[Choice]], chosen: Mapping[str, Choice], target: float, packed: nn.Module,
    reference: nn.Module, windows: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    """JSON-ready: predicted beside measured on ``windows`` int64 [C, T], the curve of choices, and every layer."""
    result = measure(
        sources.logits_of(packed), windows.flatten(), windows.shape[1], reference=sources.logits_of(reference)
    )
    against = result.reference
    difference: Mean = against.loss_difference
    uniform = zip(*layers.values(), strict=True)
    return {
        "target": target,
        "predicted": asdict(_sum(chosen)),
        "measured": {
            "kl": against.kl, "kl_interval": against.kl_interval, "loss_increase": difference.value,
            "loss_increase_interval": difference.interval, "windows": result.windows, "context": result.context,
        },
        "curve": [asdict(step) for step in all_steps(layers)],
        "uniform": [
            {"grid": row[0].grid, "granularity": row[0].granularity} | asdict(_sum(dict(enumerate(row))))
            for row in uniform
        ],
        "layers": {
            name: {"chosen": asdict(chosen[name]), "choices": [asdict(c) for c in choices]}
            for name, choices in layers.items()
        },
    }  # fmt: skip
