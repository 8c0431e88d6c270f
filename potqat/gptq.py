"""Error compensation: round a weight input by input, and let the inputs not yet rounded make up for the error.

GPTQ (arXiv 2210.17323) on any grid. With X [K, T] the inputs of a linear layer and M = X X^T / T their second moment,
the mean squared change of its outputs is tr(D M D^T), D = w_hat - w: each row of w [N, K] on its own, all with one M.
"""

from __future__ import annotations

import torch

from potqat import ops
from potqat.config import PoTConfig
from potqat.reference import expand_scale

DAMPING = 0.01  # of the mean diagonal, added to the diagonal: GPTQ's
BLOCK = 128  # inputs whose errors are passed on at once


@torch.no_grad()
def compensate(w: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor, cfg: PoTConfig) -> torch.Tensor:
    """The weight rounded to ``level * scale`` with error compensation, inputs of the largest second moment first.

    An input that was never active (a row of zeros in ``moment``) is rounded to nearest.

    Args:
        w: float [N, K].
        scale: float32 [G, N], positive; fixed beforehand, since the order of inputs is not that of their groups.
        moment: float [K, K], symmetric, positive semidefinite, finite.
        cfg: grid and granularity are used.

    Returns:
        float32 [N, K] that ``pack`` packs without a further change.
    """
    k = w.shape[1]
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moment[order][:, order]).float()
    # An input a row: what is rounded in one step lies together.
    rest = w.detach().float().t()[order]
    steps = expand_scale(scale, k, cfg.group_size).t()[order]
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        errors = torch.empty_like(rest[begin:end])
        for i in range(begin, end):
            rounded = round_to_grid(rest[i], steps[i], cfg)
            torch.div(rest[i] - rounded, factor[i, i], out=errors[i - begin])
            rest[i] = rounded
            rest[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1)
        rest[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return torch.empty_like(rest).index_copy_(0, order, rest).t().contiguous()


def round_to_grid(w: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig) -> torch.Tensor:
    """``level * scale`` for weights and scales float32 [N], as fake_quantize gives: w / scale is rounded with scale 1,
    so that one call of it serves N scales."""
    ratio = (w / scale)[None]
    return ops.fake_quantize(ratio, ratio.new_ones(1, 1), PoTConfig(grid=cfg.grid))[0] * scale


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped moment, float64 [K, K]."""
    damped = moment.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


@torch.no_grad()
def output_error(w: torch.Tensor, w_hat: torch.Tensor, moment: torch.Tensor) -> float:
    """Squared change of the layer's outputs relative to their squares, tr(D M D^T) / tr(w M w^T) with D = w_hat - w;
    0 if the outputs are 0."""
    w, moment = w.detach().float(), moment.float()
    change = w_hat - w
    signal = (w @ moment).mul_(w).sum(dtype=torch.float64).item()
    return max(0.0, (change @ moment).mul_(change).sum(dtype=torch.float64).item() / signal) if signal > 0 else 0.0
