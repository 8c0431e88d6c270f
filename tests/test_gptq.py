"""Error compensation against plain loops, and what it promises: levels that pack, outputs that change less."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import potqat
from potqat import PoTConfig, gptq, reference
from potqat.config import GRIDS

GRANULARITIES = ["tensor", "channel", 32]


def problem(n, k, tokens=400, seed=0):
    """A weight [n, k] and the second moment of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / math.sqrt(k) + torch.eye(k)
    sizes = torch.randn(k, generator=generator).exp()
    x = torch.randn(tokens, k, generator=generator) @ mixing * sizes
    w = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    return w, (x.double().t() @ x.double()) / tokens


def plain_loops(w, scale, moment, cfg, sweeps):
    """Section 3 of arXiv 2210.17323 without its speed-ups: round an input, solve for the inputs that are left, go on;
    float64, and the inverse of what is left anew at each step. Then sweeps that try every level for every weight."""
    w, n, k = w.double().clone(), *w.shape
    target = w.clone()
    eye = torch.eye(k, dtype=torch.float64)
    correlations = torch.where(eye == 1, 1.0, 1 - gptq.SHRINKAGE)
    h = moment.double() * correlations + gptq.DAMPING * moment.diagonal().mean() * eye
    level = torch.tensor(reference.levels(cfg.grid), dtype=torch.float64)
    signed = torch.cat([level, -level[1:]])
    order = left = sorted(range(k), key=lambda j: -moment[j, j])
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        step = scale[j // cfg.group_size if cfg.group_size else 0]
        for r in range(n):
            ratio = abs(w[r, j].item()) / step[r].item()
            nearest = level[min(range(len(level)), key=lambda i: (abs(level[i] - ratio), -i))]  # ties: the larger
            rounded = math.copysign(nearest * step[r].item(), w[r, j].item())
            error = (w[r, j] - rounded) / inverse[0, 0]
            for i, other in enumerate(left[1:], start=1):
                w[r, other] -= error * inverse[i, 0]
            w[r, j] = rounded
        left = left[1:]
    for _ in range(sweeps):
        for j in order:
            step = scale[j // cfg.group_size if cfg.group_size else 0]
            for r in range(n):
                tries = w[r].repeat(len(signed), 1)
                tries[:, j] = signed * step[r].double()
                change = tries - target[r]
                w[r] = tries[((change @ h) * change).sum(1).argmin()]
    return w.float()


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_plain_loops(grid, granularity, sweeps, monkeypatch):
    monkeypatch.setattr(gptq, "SWEEPS", sweeps)
    cfg = PoTConfig(grid=grid, granularity=granularity, rounding="gptq")
    w, moment = problem(5, 45)
    moment[:, 7] = moment[7] = 0  # never active
    scale = potqat.compute_scale(w, cfg)
    ours, theirs = gptq.compensate(w, scale, moment, cfg), plain_loops(w, scale, moment, cfg, sweeps)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert not torch.equal(ours, potqat.fake_quantize(w, scale, cfg))


def test_more_inputs_than_a_block_equal_one_block(monkeypatch):
    w, moment = problem(8, 300)
    cfg = PoTConfig(grid="e2m1", granularity=64)
    scale = potqat.compute_scale(w, cfg)
    blocked = gptq.compensate(w, scale, moment, cfg)
    monkeypatch.setattr(gptq, "BLOCK", 300)
    whole = gptq.compensate(w, scale, moment, cfg)
    # float32 sums in another order: a weight on a boundary may go either way, and few follow it
    assert (blocked != whole).float().mean() < 0.02
    assert gptq.output_error(w, blocked, moment) == pytest.approx(gptq.output_error(w, whole, moment), rel=0.02)


@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 9), k=st.integers(1, 150), grid=st.sampled_from(GRIDS),
    granularity=st.sampled_from(GRANULARITIES), scale=st.sampled_from(["absmax", "mse", "output"]),
)  # fmt: skip
def test_outputs_change_less_and_the_weight_packs_as_it_is(seed, n, k, grid, granularity, scale):
    cfg = PoTConfig(grid=grid, granularity=granularity, scale=scale, rounding="gptq")
    w, moment = problem(n, k, seed=seed)
    scale = potqat.compute_scale(w, cfg, moment.diagonal().float() if scale == "output" else None)
    w_hat = gptq.compensate(w, scale, moment, cfg)
    packed = potqat.pack(w_hat, scale, cfg)
    assert torch.equal(potqat.unpack(packed, scale, cfg, (n, k)), w_hat)
    nearest = gptq.output_error(w, potqat.fake_quantize(w, scale, cfg), moment)
    # Rounding greedily is no optimum: on few inputs it may lose to chance.
    assert gptq.output_error(w, w_hat, moment) <= (1.05 if k > 40 else 2) * nearest + 1e-9


@pytest.mark.parametrize("grid", GRIDS)
def test_a_column_is_rounded_as_the_op_rounds_it(grid):
    cfg = PoTConfig(grid=grid)
    w = torch.randn(4096, 1) * torch.randn(4096, 1).mul(4).exp()
    w[:2] = torch.tensor([[0.0], [-0.0]])
    scale = torch.rand(1, 4096) + 1e-3
    assert torch.equal(gptq.round_to_grid(w[:, 0], scale[0], cfg), potqat.fake_quantize(w, scale, cfg)[:, 0])


def test_inputs_that_are_never_active_are_rounded_to_nearest():
    w, moment = problem(6, 50)
    dead = torch.arange(50) % 3 == 0
    moment[dead] = 0
    moment[:, dead] = 0
    cfg = PoTConfig()
    scale = potqat.compute_scale(w, cfg)
    nearest = potqat.fake_quantize(w, scale, cfg)
    w_hat = gptq.compensate(w, scale, moment, cfg)
    assert torch.equal(w_hat[:, dead], nearest[:, dead])
    alive = gptq.compensate(w[:, ~dead], scale, moment[~dead][:, ~dead] + 0, cfg)
    assert gptq.output_error(w[:, ~dead], alive, moment[~dead][:, ~dead]) < gptq.output_error(w, nearest, moment)
    assert torch.equal(gptq.compensate(w, scale, torch.zeros(50, 50), cfg), nearest)


def test_independent_inputs_have_nothing_to_compensate_with():
    w, _ = problem(6, 40)
    cfg = PoTConfig(grid="int4")
    scale = potqat.compute_scale(w, cfg)
    diagonal = torch.diag(torch.rand(40) + 0.1)
    assert torch.equal(gptq.compensate(w, scale, diagonal, cfg), potqat.fake_quantize(w, scale, cfg))


def test_fewer_tokens_than_inputs_and_tiny_or_huge_ones():
    """A singular moment: damping alone makes it invertible; its size changes nothing."""
    w, _ = problem(6, 80)
    x = torch.randn(3, 80, dtype=torch.float64)
    cfg = PoTConfig()
    scale = potqat.compute_scale(w, cfg)
    results = [gptq.compensate(w, scale, x.t() @ x * size, cfg) for size in (2.0**-60, 1.0, 2.0**60)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    assert gptq.output_error(w, results[1], x.t() @ x) < 0.1 * gptq.output_error(
        w, potqat.fake_quantize(w, scale, cfg), x.t() @ x
    )


def test_sweeps_never_change_the_outputs_more(monkeypatch):
    w, moment = problem(8, 200)
    moment += gptq.DAMPING * moment.diagonal().mean() * torch.eye(200)  # the sweeps minimize the damped change
    cfg = PoTConfig()
    scale = potqat.compute_scale(w, cfg)
    errors = []
    for sweeps in range(5):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        errors.append(gptq.output_error(w, gptq.compensate(w, scale, moment, cfg), moment))
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]


def test_the_corrected_weight_brings_the_outputs_nearer_to_the_float_ones(monkeypatch):
    w, _ = problem(6, 40)
    x = torch.randn(500, 40, dtype=torch.float64)
    float_x = x + 0.1 * x @ torch.randn(40, 40, dtype=torch.float64) + 0.1 * torch.randn_like(x)
    moment, drift = x.t() @ x / 500, (float_x - x).t() @ x / 500
    expected = float_x @ w.double().t()
    before = (x @ w.double().t() - expected).square().sum()
    halfway = (x @ gptq.corrected(w, moment, drift).double().t() - expected).square().sum()
    assert halfway < 0.5 * before
    monkeypatch.setattr(gptq, "CORRECTION", 1.0)
    monkeypatch.setattr(gptq, "DAMPING", 1e-12)
    best = torch.linalg.lstsq(x, expected).solution.t()
    torch.testing.assert_close(gptq.corrected(w, moment, drift), best.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(gptq.corrected(w, moment, torch.zeros(40, 40)), w)


def test_output_error_is_the_change_of_the_outputs():
    w, _ = problem(4, 30)
    x = torch.randn(100, 30)
    w_hat = w + 0.1 * torch.randn_like(w)
    change = (x @ (w_hat - w).t()).square().sum() / (x @ w.t()).square().sum()
    assert gptq.output_error(w, w_hat, x.t() @ x / 100) == pytest.approx(change.item(), rel=1e-4)
    assert gptq.output_error(w, w_hat, torch.zeros(30, 30)) == 0
