"""Measures of a language model: loss over fixed windows of a text, and speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy in nats a token. ``last`` counts only the last position of each window (the papers'
    protocol: the position with the most context), ``loss`` all ``tokens`` of them."""

    loss: float
    last: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(model: nn.Module, windows: torch.Tensor, batch: int = 64) -> Loss:
    """Loss of ``model`` in eval mode on every position of every window; the model's mode is put back after.

    Args:
        model: token ids int64 [B, T] -> logits [B, T, V].
        windows: int64 [W, T + 1] on any device; a window's first T tokens are the input, its last T the targets.
        batch: windows a forward pass; it changes speed and memory, and the result by float rounding only.

    Raises:
        ValueError: no windows, or windows of a single token.
    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise ValueError(f"evaluate: windows must be [W, T + 1] with W and T at least 1, got {list(windows.shape)}")
    training = model.training
    model.eval()
    total = last = 0.0
    for part in windows.split(batch):
        logits = model(part[:, :-1])  # (B, T, V)
        losses = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none").double()
        losses = losses.view(len(part), length - 1)  # (B, T)
        total += losses.sum().item()
        last += losses[:, -1].sum().item()
    model.train(training)
    return Loss(total / (count * (length - 1)), last / count, count * (length - 1), count)


@torch.no_grad()
def tokens_per_second(models: Mapping[str, nn.Module], idx: torch.Tensor, rounds: int = 9) -> dict[str, float]:
    """Speed of one forward pass over ``idx`` [B, T] in eval mode: the median over ``rounds``.

    The models take turns in each round, so that a busy moment of the machine falls on all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model.eval()(idx)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    return {name: idx.numel() / statistics.median(times) for name, times in seconds.items()}
