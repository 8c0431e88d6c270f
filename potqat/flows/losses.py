"""What ``potqat train`` minimizes: distance to a float teacher, or cross-entropy with the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from potqat.flows.recipe import Recipe
from potqat.flows.sources import logits_of
from potqat.flows.trainer import cross_entropy

ROWS = 64  # positions whose distributions are in memory at once


def make(recipe: Recipe, teacher: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """(model, windows int64 [B, T + 1]) -> the mean loss that ``recipe.loss`` names, in nats."""

    def loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
        with autocast(recipe):
            if recipe.loss == "kl":
                return kl_divergence(model, teacher, windows[:, :-1])
            if recipe.loss == "ce":
                return cross_entropy(logits_of(model), windows)
            return F.cross_entropy(logits_of(model)(windows[:, :-1])[:, -1].float(), windows[:, -1])

    return loss


def held_out(recipe: Recipe, model: nn.Module, teacher: nn.Module, windows: torch.Tensor) -> tuple[float, float]:
    """(cross-entropy, KL to the teacher) on windows int64 [B, T + 1]."""
    with autocast(recipe):
        logits, expected = (logits_of(m)(windows[:, :-1]).flatten(0, 1) for m in (model, teacher))
    return F.cross_entropy(logits.float(), windows[:, 1:].flatten()).item(), _KL.apply(logits, expected).item()


def kl_divergence(model: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) of the next token, the mean over every position of ids int64 [B, T]."""
    with torch.no_grad():
        expected = logits_of(teacher)(ids).flatten(0, 1)  # (B T, V)
    return _KL.apply(logits_of(model)(ids).flatten(0, 1), expected)


class _KL(torch.autograd.Function):
    """(logits [R, V], the teacher's [R, V]) -> the mean KL of their distributions, float32.

    Both distributions of every position would be many times the logits in memory: they are made for a few positions at
    a time, with the gradient at once, which is softmax(logits) - softmax(teacher's) over R.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for part, mine, theirs in zip(*(t.split(ROWS) for t in (gradient, logits, expected)), strict=True):
            mine, theirs = (t.float().log_softmax(-1) for t in (mine, theirs))
            chances = theirs.exp()
            total += (theirs - mine).mul_(chances).sum()
            part.copy_(mine.exp_().sub_(chances).div_(len(logits)))
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx, gradient_of_mean: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * gradient_of_mean, None


def autocast(recipe: Recipe) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16")
