"""What ``potqat train`` minimizes: distance to a float teacher, or cross-entropy with the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from potqat.flows.recipe import Recipe
from potqat.flows.sources import logits_of
from potqat.flows.trainer import cross_entropy


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
        logits, expected = (logits_of(m)(windows[:, :-1]).float().flatten(0, 1) for m in (model, teacher))
    kl = _kl(logits, expected)
    return F.cross_entropy(logits, windows[:, 1:].flatten()).item(), kl.item()


def kl_divergence(model: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) of the next token, the mean over every position of ids int64 [B, T]."""
    with torch.no_grad():
        expected = logits_of(teacher)(ids).float().flatten(0, 1)  # (B T, V)
    return _kl(logits_of(model)(ids).float().flatten(0, 1), expected)


def _kl(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True)


def autocast(recipe: Recipe) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16")
