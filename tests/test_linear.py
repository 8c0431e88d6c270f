"""The packed linear layer: exact integers on every instruction set and thread count, and derived float bounds."""

import pytest
import torch

import potqat
from potqat import PoTConfig, reference

GRIDS = ["pot4", "e2m1", "int4", "int8"]


def make(n, k, cfg, dtype=torch.float32):
    w = torch.randn(n, k).to(dtype)
    scale = potqat.compute_scale(w, cfg)
    return potqat.pack(w, scale, cfg), scale


def oracle(x, packed, scale, bias, cfg, n, *, s_x=None, zero_point=0):
    """Integer sums in int64, written from design section 4 without reference.linear; float32 tail in its order."""
    k, size = x.shape[-1], cfg.group_size or max(x.shape[-1], 1)
    level = reference.unpack(packed, cfg.grid, n, k).long()
    rest, parts = x.float(), []
    for _ in range(2 if cfg.activations == "int16" else 1):
        if s_x is None:
            absmax = rest.abs().amax(-1, keepdim=True)
            scale_x = torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127)
            q = (rest / scale_x).round().clamp(-127, 127).long()
        else:
            scale_x = torch.full_like(rest[..., :1], s_x)
            q = ((rest / scale_x).round() + zero_point).clamp(-128, 127).long() - zero_point
        parts.append((q, scale_x))
        rest = rest - q * scale_x
    out = torch.zeros(*x.shape[:-1], n)
    for g in range(scale.shape[0]):
        part = slice(g * size, (g + 1) * size)
        for q, scale_x in parts:
            acc = q[..., part] @ level[:, part].t()
            assert acc.abs().max() < 2**31
            out += acc.float() * (scale_x * scale[g])
    return out if bias is None else out + bias


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", ["channel", 32, 64, 128])
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_integer_linear_is_exact(isa, grid, granularity, activations):
    cfg = PoTConfig(grid=grid, granularity=granularity, activations=activations)
    for m, n, k in [(1, 16, 64), (1, 50, 100), (2, 17, 65), (3, 7, 1), (4, 70, 160), (5, 33, 129), (6, 18, 96),
                    (9, 16, 192), (13, 1, 257), (64, 20, 96), (65, 31, 70), (131, 48, 128)]:  # fmt: skip
        packed, scale = make(n, k, cfg)
        x, bias = torch.randn(m, k) * 3, torch.randn(n)
        for b in (None, bias):
            ours = potqat.linear(x, packed, scale, b, cfg, out_features=n)
            assert torch.equal(ours, oracle(x, packed, scale, b, cfg, n)), (m, n, k)
            assert torch.equal(ours, reference.linear(x, packed, scale, b, grid, n, cfg.group_size, activations))


@pytest.mark.parametrize("granularity", ["channel", 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_large_outputs_are_exact(isa, granularity, dtype, activations):
    """More than 1 MB, which is written around the cache, and more than one block of rows."""
    cfg = PoTConfig(granularity=granularity, activations=activations)
    packed, scale = make(400, 66, cfg)
    x, bias = torch.randn(700, 66).to(dtype), torch.randn(400)
    ours = potqat.linear(x, packed, scale, bias, cfg, out_features=400)
    assert torch.equal(ours, oracle(x, packed, scale, bias, cfg, 400).to(dtype))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", ["channel", 32])
@pytest.mark.parametrize("zero_point", [-128, -7, 0, 127])
def test_static_affine_activations_are_exact(isa, grid, granularity, zero_point):
    cfg = PoTConfig(grid=grid, granularity=granularity)
    for m, n, k in [(1, 16, 64), (4, 33, 100), (70, 18, 130)]:
        packed, scale = make(n, k, cfg)
        x, bias, s_x = torch.randn(m, k) * 4, torch.randn(n), 0.03125
        ours = potqat.linear(x, packed, scale, bias, cfg, out_features=n, input_scale=s_x, input_zero_point=zero_point)
        assert torch.equal(ours, oracle(x, packed, scale, bias, cfg, n, s_x=s_x, zero_point=zero_point))


def quotients_near_halves(largest, scale):
    """[rows, inputs]: largest, then what divides to a half, or to the float below or above it."""
    half = torch.arange(-127, 127) + 0.5
    at = half * scale
    beside = [torch.nextafter(at, torch.full_like(at, side)) for side in (-torch.inf, torch.inf)]
    return torch.cat([largest.expand(-1, 1), at, *beside], dim=1)


def test_activations_at_and_beside_halves_round_as_the_quotient(isa):
    cfg = PoTConfig(grid="int8")
    tiny, huge = 1.5e-38, 3.4e38  # the scale is at its floor; the reciprocal of the scale is not a normal number
    largest = torch.cat([torch.rand(60, 1) * 10, torch.tensor([[127.0], [1e-30], [tiny], [1e30], [huge]])])
    x = quotients_near_halves(largest, (largest / 127).clamp(min=torch.finfo(torch.float32).tiny))
    k = x.shape[1]
    packed, scale = potqat.pack(torch.eye(k), torch.full((1, k), 1 / 127), cfg), torch.ones(1, k)
    assert torch.equal(potqat.linear(x, packed, scale, None, cfg, out_features=k),
                       reference.linear(x, packed, scale, None, "int8", k, 0))  # fmt: skip
    for s_x, zero_point in [(0.0371, 0), (0.0371, -128), (1e-39, 3), (3e38, 5)]:
        x = quotients_near_halves(torch.tensor([[1e38]]), torch.tensor([[s_x]])).clamp(-huge, huge)
        ours = potqat.linear(x, packed, scale, None, cfg, out_features=k, input_scale=s_x, input_zero_point=zero_point)
        assert torch.equal(ours, oracle(x, packed, scale, None, cfg, k, s_x=s_x, zero_point=zero_point))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_largest_sums_stay_exact(isa, grid, static):
    """All weights and activations at their extremes, at the largest K, few rows and many: no saturation, no wrap."""
    k = 65535 if static and grid == "int8" else 131071
    cfg = PoTConfig(grid=grid)
    w = torch.full((3, k), 1.0)
    w[1] = -1
    w[2, ::2] = -1
    scale = potqat.compute_scale(w, cfg)
    packed = potqat.pack(w, scale, cfg)
    s_x = 1 / 128 if static else None  # -1 is then -128
    for m in (2, 9):
        x = torch.full((m, k), 1.0)
        x[1::2] = -1
        ours = potqat.linear(x, packed, scale, None, cfg, out_features=3, input_scale=s_x)
        assert torch.equal(ours, oracle(x, packed, scale, None, cfg, 3, s_x=s_x))


@pytest.mark.parametrize("activations", ["int8", "int16", None])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_isa_and_thread_count_gives_the_scalar_bits(one_thread, grid, activations):
    available = potqat.cpu_info()["available"]
    before = potqat.cpu_info()["isa"]
    for granularity, m, n, k in [("channel", 1, 2000, 770), ("channel", 7, 300, 64), (64, 33, 500, 200)]:
        cfg = PoTConfig(grid=grid, granularity=granularity, activations=activations)
        packed, scale = make(n, k, cfg)
        x, bias = torch.randn(m, k), torch.randn(n)
        results = {}
        for name in available:
            for threads in (1, 2):
                potqat.set_isa(name)
                torch.set_num_threads(threads)
                results[name, threads] = potqat.linear(x, packed, scale, bias, cfg, out_features=n)
        potqat.set_isa(before)
        scalar = results["scalar", 1]
        assert all(torch.equal(scalar, y) for y in results.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_follows_the_input_dtype(dtype):
    cfg = PoTConfig()
    packed, scale = make(24, 80, cfg, dtype)
    x = torch.randn(2, 3, 80).to(dtype)
    ours = potqat.linear(x, packed, scale, None, cfg, out_features=24)
    assert ours.shape == (2, 3, 24)
    assert torch.equal(ours, oracle(x, packed, scale, None, cfg, 24).to(dtype))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", ["channel", 32])
def test_float_activations_within_the_summation_bound(isa, grid, granularity):
    """k products and sums in float32, one more product and (groups - 1) more sums:
    |error| <= (k + groups + 2) eps sum |x w| (Higham, Accuracy and Stability, 3.1), doubled for the second order."""
    cfg = PoTConfig(grid=grid, granularity=granularity, activations=None)
    n, k = 37, 300
    packed, scale = make(n, k, cfg)
    x = torch.randn(5, k)
    w = potqat.unpack(packed, scale, cfg, (n, k)).double()
    exact = x.double() @ w.t()
    bound = 2 * (k + cfg.groups(k) + 2) * 2.0**-24 * (x.abs().double() @ w.abs().t())
    assert ((potqat.linear(x, packed, scale, None, cfg, out_features=n) - exact).abs() <= bound).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_int16_activations_are_within_half_a_step_of_the_second_number(isa, grid):
    """The rest of x is at most s_x / 2, s_x = absmax / 127, and its step 1/127 of that at most: a value is off by
    s_x / 508 (and a few eps, of x's quotient and of the rest). Per output 2 products and a sum in float32: 4 eps
    sum |x w|."""
    cfg = PoTConfig(grid=grid, activations="int16")
    n, k = 37, 300
    packed, scale = make(n, k, cfg)
    x = torch.randn(9, k) * torch.tensor([1.0, 30.0, 0.0]).repeat(k // 3)
    w = potqat.unpack(packed, scale, cfg, (n, k)).double().abs()
    exact = x.double() @ potqat.unpack(packed, scale, cfg, (n, k)).double().t()
    largest, eps = x.double().abs().amax(-1, keepdim=True), 2.0**-24
    bound = (largest / 127 / 508 * (1 + 4 * eps) + 2 * eps * largest) * w.sum(-1) + 4 * eps * (x.double().abs() @ w.t())
    error = (potqat.linear(x, packed, scale, None, cfg, out_features=n) - exact).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_a_row_that_is_not_finite_spoils_only_itself(isa, value, activations):
    cfg = PoTConfig(activations=activations)
    packed, scale = make(20, 70, cfg)
    x = torch.randn(3, 70)
    clean = potqat.linear(x, packed, scale, None, cfg, out_features=20)
    x[1, 5] = value
    ours = potqat.linear(x, packed, scale, None, cfg, out_features=20)
    assert ours[1].isnan().all()
    assert torch.equal(ours[::2], clean[::2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_only_itself_with_a_given_scale(isa, value):
    cfg = PoTConfig()
    packed, scale = make(20, 70, cfg)
    x = torch.randn(3, 70)
    x[1, 5] = value
    static = potqat.linear(x, packed, scale, None, cfg, out_features=20, input_scale=0.1, input_zero_point=3)
    assert static[1].isnan().all()
    assert static[::2].isfinite().all()


@pytest.mark.parametrize("granularity", ["channel", 32])
def test_no_inputs_leave_the_bias(isa, granularity):
    cfg = PoTConfig(granularity=granularity)
    packed, scale = make(5, 0, cfg)
    bias = torch.randn(5)
    assert torch.equal(potqat.linear(torch.empty(2, 0), packed, scale, bias, cfg, out_features=5), bias.expand(2, 5))


def test_empty_batches_zero_rows_and_views(isa):
    cfg = PoTConfig()
    packed, scale = make(20, 70, cfg)
    assert potqat.linear(torch.empty(0, 70), packed, scale, None, cfg, out_features=20).shape == (0, 20)
    assert potqat.linear(torch.empty(2, 0, 70), packed, scale, None, cfg, out_features=20).shape == (2, 0, 20)
    zero = potqat.linear(torch.zeros(2, 70), packed, scale, torch.ones(20), cfg, out_features=20)
    assert torch.equal(zero, torch.ones(2, 20))
    x = torch.randn(70, 6).t()[::2]
    assert torch.equal(potqat.linear(x, packed, scale, None, cfg, out_features=20),
                       potqat.linear(x.contiguous(), packed, scale, None, cfg, out_features=20))  # fmt: skip
    assert potqat.linear(torch.randn(70), packed, scale, None, cfg, out_features=20).shape == (20,)


@pytest.mark.parametrize("grid", GRIDS)
def test_embedding_rows_are_the_table_rows(grid):
    cfg = PoTConfig(grid=grid, granularity=32)
    packed, scale = make(65, 100, cfg)
    table = potqat.unpack(packed, scale, cfg, (65, 100))
    ids = torch.randint(65, (4, 7))
    assert torch.equal(potqat.embedding(ids, packed, scale, cfg, shape=(65, 100)), table[ids])
    assert potqat.embedding(ids[:0], packed, scale, cfg, shape=(65, 100)).shape == (0, 7, 100)
    assert torch.equal(potqat.embedding(ids.int().t(), packed, scale, cfg, shape=(65, 100)), table[ids.t()])
    with pytest.raises(ValueError, match="id 65 at position 1 is outside the table"):
        potqat.embedding(torch.tensor([3, 65]), packed, scale, cfg, shape=(65, 100))
