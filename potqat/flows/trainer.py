"""A training loop that can be stopped anywhere and goes on exactly: the same losses, bit for bit."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class Phase:
    """One stretch of training. ``start`` is how many iterations the model has behind it, for the curve; the learning
    rate rises over ``warmup`` iterations to ``learning_rate`` and falls along a cosine to ``final_learning_rate``.

    Learned scales have a rate of their own, ``scale_learning_rate``: they are kept as log2, so it is a relative step
    and suits scales of any size. It stays as it is, or (``scale_decays``) rises and falls with the other.
    ``weight_decay`` is of matrices alone; ``grad_clip`` bounds the norm of all gradients; ``betas`` are AdamW's.
    """

    name: str
    start: int
    iterations: int
    learning_rate: float
    final_learning_rate: float
    warmup: int
    evaluate_every: int
    seed: int
    scale_learning_rate: float = 2e-3
    scale_decays: bool = False
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0

    def learning_rate_at(self, i: int) -> float:
        if i < self.warmup:
            return self.learning_rate * (i + 1) / self.warmup
        progress = (i - self.warmup) / max(1, self.iterations - self.warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_learning_rate + cosine * (self.learning_rate - self.final_learning_rate)

    def scale_learning_rate_at(self, i: int) -> float:
        return self.scale_learning_rate * (self.learning_rate_at(i) / self.learning_rate if self.scale_decays else 1)


class Trained(NamedTuple):
    """``curve``: one dict an evaluation, ``iteration`` (counted from the phase's start) and what ``evaluate`` gave;
    ``losses``: of every iteration, the mean over its batches, before its step."""

    curve: list[dict[str, float]]
    losses: list[float]


class Interrupted(Exception):
    """Training was stopped by the user; its state is saved."""


def train(
    model: nn.Module,
    phase: Phase,
    batches_at: Callable[[int], Sequence[torch.Tensor]],
    loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    evaluate: Callable[[nn.Module], dict[str, float]],
    path: Path,
    bar: tqdm,
    stop: threading.Event,
) -> Trained:
    """Train ``model`` in place, from the state in ``path`` where there is one, and leave the last state there.

    Args:
        model: on any device; parameters that need no gradient stay as they are.
        batches_at: iteration -> batches of equal size on the model's device, whose gradients are averaged for one
            step; a function of the iteration alone.
        loss_of: (model, a batch) -> its mean loss.
        evaluate: called before the first iteration, every ``phase.evaluate_every`` and after the last.
        path: file of the resumable state, replaced at each evaluation and when stopped.
        bar: advanced by one an iteration; its total shrinks by the iterations that ``path`` has behind it.
        stop: when set, the state is saved and Interrupted is raised before the next iteration.

    Raises:
        Interrupted: ``stop`` was set.
        ValueError: the state cannot be read, or the loss is not finite any more.
    """
    device = next(model.parameters()).device
    optimizer = _optimizer(model, phase)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    i = 0
    bar.set_description(phase.name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(phase.seed)  # dropout draws from the global generators
        if path.exists():
            i, curve, losses = _restore(path, model, optimizer, device)
            bar.total -= i  # it counts the work left, so that its rate and ETA are true
        model.train()
        while True:
            if (i % phase.evaluate_every == 0 or i == phase.iterations) and not _has(curve, phase.start + i):
                curve.append({"iteration": phase.start + i, **evaluate(model)})
                _save(path, model, optimizer, device, i, curve, losses)
            if i == phase.iterations:
                return Trained(curve, losses)
            if stop.is_set():
                _save(path, model, optimizer, device, i, curve, losses)
                raise Interrupted(f"stopped at iteration {i} of {phase.iterations} of '{phase.name}'")
            loss = _step(model, optimizer, batches_at(i), loss_of, phase, i)
            if not math.isfinite(loss):
                raise ValueError(
                    f"{phase.name}: the loss is {loss} at iteration {phase.start + i + 1}; "
                    "lower the learning rate and start again in another folder"
                )
            i += 1
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of breaking off in the middle of a step; a second Ctrl-C breaks off at once."""
    stop = threading.Event()

    def request(signum, frame):
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def cross_entropy(model: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
    """Mean loss over every position of windows int64 [B, T + 1], for a model int64 [B, T] -> logits [B, T, V]."""
    return F.cross_entropy(model(windows[:, :-1]).float().flatten(0, 1), windows[:, 1:].flatten())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batches, loss_of, phase: Phase, i: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = phase.scale_learning_rate_at(i) if group["scales"] else phase.learning_rate_at(i)
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), phase.grad_clip)
    optimizer.step()
    return total


def _optimizer(model: nn.Module, phase: Phase) -> torch.optim.AdamW:
    """AdamW with nanoGPT's groups (decay on matrices only) and one more for learned scales, which must not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if name.endswith("log2_scale")]
    weights = [p for name, p in named if not name.endswith("log2_scale")]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": phase.weight_decay, "scales": False},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0, "scales": False},
        {"params": scales, "weight_decay": 0.0, "scales": True},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=phase.betas, fused=True)


def _has(curve: list[dict[str, float]], iteration: int) -> bool:
    return bool(curve) and curve[-1]["iteration"] == iteration


def _save(path: Path, model, optimizer, device: torch.device, i: int, curve, losses) -> None:
    state = {
        "iteration": i,
        "curve": curve,
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    # A name that appears only when the file is whole: a crash leaves the last good state.
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _restore(path: Path, model, optimizer, device: torch.device) -> tuple[int, list[dict[str, float]], list[float]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load lets anything out of a damaged file
        raise ValueError(
            f"{path}: cannot read the training state ({type(error).__name__}); delete it to train anew"
        ) from error
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    return state["iteration"], state["curve"], state["losses"]
