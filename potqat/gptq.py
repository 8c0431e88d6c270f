"""Error compensation: round a weight input by input, and let the inputs not yet rounded make up for the error.

GPTQ (arXiv 2210.17323) on any grid. With X [K, T] the inputs of a linear layer and M = X X^T / T their second moment,
the mean squared change of its outputs is tr(D M D^T), D = w_hat - w: each row of w [N, K] on its own, all with one M.
"""

from __future__ import annotations

import functools

import torch

from potqat import ops
from potqat.config import PoTConfig
from potqat.reference import expand_scale

DAMPING = 0.01  # of the mean diagonal, added to the diagonal: GPTQ's
# How far correlations of inputs are taken towards 0 (Ledoit and Wolf, 2004): those of one text are not those of
# another, nor quite those of more of it.
SHRINKAGE = 0.2
BLOCK = 128  # inputs whose errors are passed on at once
ROWS = 4096  # of a weight at a time: those of a block of inputs stay in the cache, and a table takes little memory
# Over all inputs after the first pass. Of SmolLM2's change of outputs the first takes 7-13% off, the third 1%.
SWEEPS = 3
CORRECTION = 0.5  # 0, 0.5 and 1 were tried on held-out text: CHANGELOG
_ONE = torch.ones(1, 1)


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
    order = moment.diagonal().argsort(descending=True, stable=True)
    damped = _damped(_shrunk(moment[order][:, order]))
    factor, damped = _inverse_factor(damped), damped.float()
    result = torch.empty(w.shape, dtype=torch.float32)
    for rows, part, part_scale in zip(result.split(ROWS), w.split(ROWS), scale.split(ROWS, dim=1), strict=True):
        # An input a row: what is rounded in one step lies together.
        target = part.detach().float().t()[order]
        steps = expand_scale(part_scale, w.shape[1], cfg.group_size).t()[order]
        rounded = _pass_on_errors(target.clone(), steps, factor, cfg)
        for _ in range(SWEEPS):
            _improve(rounded, target, steps, damped, cfg)
        rows.t().index_copy_(0, order, rounded)
    return result


def _pass_on_errors(rest: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, cfg: PoTConfig) -> torch.Tensor:
    """GPTQ, in place: round an input, [N] weights, and let those after it make up for the error."""
    k = len(rest)
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        errors = torch.empty_like(rest[begin:end])
        for i in range(begin, end):
            rounded = round_to_grid(rest[i], steps[i], cfg)
            torch.div(rest[i] - rounded, factor[i, i], out=errors[i - begin])
            rest[i] = rounded
            rest[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1)
        rest[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return rest


def _improve(
    rounded: torch.Tensor, target: torch.Tensor, steps: torch.Tensor, moment: torch.Tensor, cfg: PoTConfig
) -> None:
    """One sweep of coordinate descent, in place (arXiv 2309.01885): round each input's weights anew, to what is best
    with all others as they are, so that the outputs never change more."""
    k = len(rounded)
    gradient = moment @ (rounded - target)
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        changes = torch.empty_like(rounded[begin:end])
        for i in range(begin, end):
            best = round_to_grid(rounded[i] - gradient[i] / moment[i, i], steps[i], cfg)
            change = torch.sub(best, rounded[i], out=changes[i - begin])
            gradient[i + 1 : end].addr_(moment[i + 1 : end, i], change)
            rounded[i] = best
        gradient[end:].addmm_(moment[end:, begin:end], changes)


def round_to_grid(w: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig) -> torch.Tensor:
    """``level * scale`` for weights and scales float32 [N], as fake_quantize gives: w / scale is rounded with scale 1,
    so that one call of it serves N scales."""
    return ops.fake_quantize((w / scale)[None], _ONE, _by_channel(cfg.grid))[0] * scale


@functools.cache
def _by_channel(grid: str) -> PoTConfig:
    return PoTConfig(grid=grid)


def _inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse, float32 [K, K] of float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _shrunk(moment: torch.Tensor) -> torch.Tensor:
    shrunk = (1 - SHRINKAGE) * moment
    shrunk.diagonal().copy_(moment.diagonal())
    return shrunk


def _damped(moment: torch.Tensor) -> torch.Tensor:
    damped = moment.to(torch.float64, copy=True)
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return damped


@torch.no_grad()
def corrected(w: torch.Tensor, moment: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """The weight that gives on the inputs x of the quantized model what w [N, K] gives on x', those of the float one,
    as nearly as a linear map can, by the share CORRECTION: float32 [N, K].

    The least squares solution is w + w D M^-1, with M the mean of x x^T and D, the drift, that of (x' - x) x^T; GPTAQ
    (arXiv 2504.02692) has the same aim. The whole of it fits the calibration text and loses on another one.
    """
    if not drift.any():  # as before the first rounding: the model is the float one
        return w.detach().float()
    change = torch.cholesky_solve((w.detach().double() @ drift.double()).t(), torch.linalg.cholesky(_damped(moment)))
    return w.detach().float() + CORRECTION * change.t().float()


@torch.no_grad()
def output_error(w: torch.Tensor, w_hat: torch.Tensor, moment: torch.Tensor) -> float:
    """Squared change of the layer's outputs relative to their squares, tr(D M D^T) / tr(w M w^T) with D = w_hat - w;
    0 if the outputs are 0."""
    w, moment = w.detach().float(), moment.float()
    change = w_hat - w
    signal = (w @ moment).mul_(w).sum(dtype=torch.float64).item()
    return max(0.0, (change @ moment).mul_(change).sum(dtype=torch.float64).item() / signal) if signal > 0 else 0.0
