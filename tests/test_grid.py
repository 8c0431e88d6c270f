"""Grids, roundings, scales and packing, against reference.py and by exhaustion."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import potqat
from potqat import _C, PoTConfig, reference

GRIDS = ["pot4", "e2m1", "int4", "int8"]
ROUNDINGS = ["nearest", "log", "paper"]
GRANULARITIES = ["tensor", "channel", 32, 64, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def all_bfloat16() -> torch.Tensor:
    """Every finite bfloat16, [255, 256]."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()].reshape(-1, 256)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_unpacked_equals_fake_quantized_on_every_bfloat16(grid, rounding, granularity):
    w = all_bfloat16()
    cfg = PoTConfig(grid=grid, rounding=rounding, granularity=granularity)
    absmax = potqat.compute_scale(w, cfg)
    for scale in (absmax, torch.ones_like(absmax)):
        fake = potqat.fake_quantize(w, scale, cfg)
        packed = potqat.pack(w, scale, cfg)
        assert same_bits(potqat.unpack(packed, scale, cfg, tuple(w.shape)).to(w.dtype), fake)
        assert same_bits(fake, reference.fake_quantize(w, scale, grid, rounding, cfg.group_size))
        level = reference.quantize(w, scale, grid, rounding, cfg.group_size)
        assert torch.equal(packed, reference.pack(level, grid))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(50257, 768), (65, 100), (1, 1), (7, 1), (16, 64), (17, 65), (0, 8), (33, 31), (3, 0)]
)
@pytest.mark.parametrize(("grid", "granularity"), [("pot4", "channel"), ("pot4", 64), ("int8", "channel")])
def test_shapes_and_dtypes(shape, dtype, grid, granularity):
    w = torch.randn(shape).to(dtype)
    cfg = PoTConfig(grid=grid, granularity=granularity)
    scale = potqat.compute_scale(w, cfg)
    packed = potqat.pack(w, scale, cfg)
    assert packed.shape == (-(-shape[0] // 16), -(-shape[1] // 64), 1024 if grid == "int8" else 512)
    assert scale.shape == (cfg.groups(shape[1]), shape[0])
    fake = potqat.fake_quantize(w, scale, cfg)
    assert fake.shape == w.shape
    assert same_bits(potqat.unpack(packed, scale, cfg, shape).to(dtype), fake)


@pytest.mark.parametrize("grid", [*GRIDS, *(f"pot({k})" for k in range(31))])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_boundary_is_rounded_as_defined(grid, rounding):
    """At, just below and just above each boundary and each level, and far outside, scale 1."""
    level = torch.tensor(reference.levels(grid), dtype=torch.float64)
    middle = torch.cat([(level[1:] + level[:-1]) / 2, (level[1:] * level[:-1]).sqrt(), level, level - 0.5, level + 0.5])
    v = torch.cat([middle[middle > 0].float(), torch.tensor([0.0, 1e-45, 3e38])])
    v = torch.cat([v, v.nextafter(torch.tensor(0.0)), v.nextafter(torch.tensor(3.4e38))])
    w = torch.cat([v, -v])[None]
    cfg = PoTConfig(grid=grid, rounding=rounding)
    ours = potqat.fake_quantize(w, torch.ones(1, 1), cfg)
    assert same_bits(ours, reference.fake_quantize(w, torch.ones(1, 1), grid, rounding))
    assert not torch.signbit(ours[ours == 0]).any()


def test_nearest_is_nearest_and_ties_go_up():
    """Independent of both implementations: no other level is nearer."""
    v = torch.linspace(0, 80, 16001)[None]
    level = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64.0])
    ours = potqat.fake_quantize(v, torch.ones(1, 1), PoTConfig())
    assert torch.equal((ours - v).abs(), (level[:, None] - v).abs().amin(0)[None])
    ties = torch.tensor([[0.5, 1.5, 3, 6, 12, 24, 48]])
    assert potqat.fake_quantize(ties, torch.ones(1, 1), PoTConfig()).tolist() == [[1, 2, 4, 8, 16, 32, 64]]


def test_paper_rounding_is_the_papers_code():
    """The author's arithmetic (arXiv 2601.02298, code): round(|w| / s), then 2^round(log2), clamped to 2^k."""
    w = torch.randn(64, 200) * 3
    scale = torch.full((1, 64), 2.0**-5)
    a = (w.abs() / 2.0**-5).round()
    q = torch.where(a == 0, 0.0, 2.0 ** a.clamp_min(1).log2().round()) * w.sign()
    expected = q.clamp(-128, 128) * 2.0**-5
    cfg = PoTConfig(grid="pot(7)", granularity="tensor", rounding="paper")
    assert torch.equal(potqat.fake_quantize(w, scale, cfg), expected)


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    grid=st.sampled_from(GRIDS),
    rounding=st.sampled_from(ROUNDINGS),
    granularity=st.sampled_from(GRANULARITIES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_any_stride_equals_the_contiguous_copy(n, k, grid, rounding, granularity, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).mul(10).to(dtype)  # noqa: E731
    w = {
        "plain": lambda: make(n, k),
        "transposed": lambda: make(k, n).t(),
        "sliced": lambda: make(2 * n, 3 * k)[::2, 1::3],
        "expanded": lambda: make(1, k).expand(n, k),
    }[layout]()
    cfg = PoTConfig(grid=grid, rounding=rounding, granularity=granularity)
    scale = potqat.compute_scale(w, cfg)
    assert torch.equal(scale, reference.absmax_scale(w, grid, cfg.group_size, granularity == "tensor"))
    fake = potqat.fake_quantize(w, scale, cfg)
    assert same_bits(fake, reference.fake_quantize(w, scale, grid, rounding, cfg.group_size))
    packed = potqat.pack(w, scale, cfg)
    assert torch.equal(packed, potqat.pack(w.contiguous(), scale, cfg))
    assert same_bits(potqat.unpack(packed, scale, cfg, (n, k)).to(dtype), fake)


@pytest.mark.parametrize("grid", GRIDS)
def test_absmax_scale_never_leaves_the_range(grid):
    """absmax / scale is at most the top level after rounding, or the clipped STE would freeze the largest weight."""
    w = torch.rand(20000, 1) + 1e-3
    w = torch.cat([w, torch.tensor([[1e-45], [1e-39], [3.4e38], [0.0]])])
    scale = potqat.compute_scale(w, PoTConfig(grid=grid))
    assert (scale > 0).all()
    assert (w[:, 0] / scale[0] <= reference.levels(grid)[-1]).all()
    assert scale[0, -1] == 1


@pytest.mark.parametrize("granularity", ["tensor", "channel", 64])
@pytest.mark.parametrize("grid", GRIDS)
def test_searched_scales_beat_absmax(grid, granularity):
    w = torch.distributions.StudentT(5.0).sample((24, 256))
    importance = torch.rand(256)
    error = {}
    for method in ("absmax", "mse", "output"):
        cfg = PoTConfig(grid=grid, granularity=granularity, scale=method)
        scale = potqat.compute_scale(w, cfg, importance if method == "output" else None)
        square = (potqat.fake_quantize(w, scale, cfg) - w).square()
        error[method] = square.sum().item(), (square * importance).sum().item()
    assert error["mse"][0] < error["absmax"][0]
    assert error["output"][1] <= error["mse"][1]


def test_search_covers_the_whole_neighbourhood():
    """No scale of a fine sweep over four octaves beats the searched one by more than the 1/16-octave step allows."""
    w = torch.randn(1, 4096)
    cfg = PoTConfig(scale="mse")
    found = potqat.compute_scale(w, cfg)
    error = lambda s: (potqat.fake_quantize(w, s, cfg) - w).square().sum().item()  # noqa: E731
    sweep = min(error(found * 2.0 ** (i / 100)) for i in range(-200, 201))
    assert error(found) <= 1.02 * sweep


def test_threads_give_the_same_scales(one_thread):
    w = torch.randn(300, 500)
    for granularity in GRANULARITIES:
        cfg = PoTConfig(granularity=granularity, scale="mse")
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scale = potqat.compute_scale(w, cfg)
            results.append((scale, potqat.fake_quantize(w, scale, cfg), potqat.pack(w, scale, cfg)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_numpy_module_gives_the_same_bits():
    w, cfg = torch.randn(65, 100), PoTConfig(granularity=32)
    scale = potqat.compute_scale(w, cfg)
    args = (scale.numpy(), "pot4", "nearest", 32)
    packed = _C.pack(w.numpy(), *args)
    assert torch.equal(torch.from_numpy(packed), potqat.pack(w, scale, cfg))
    assert same_bits(torch.from_numpy(_C.fake_quantize(w.numpy(), *args)), potqat.fake_quantize(w, scale, cfg))
    back = _C.unpack(packed, scale.numpy(), "pot4", 65, 100, 32)
    assert same_bits(torch.from_numpy(back), potqat.unpack(torch.from_numpy(packed), scale, cfg, (65, 100)))


def test_minus_zero_is_refused_on_read():
    cfg, w = PoTConfig(), torch.ones(16, 64)
    scale = potqat.compute_scale(w, cfg)
    packed = potqat.pack(w, scale, cfg)
    packed[0, 0, 2 * 64 + 4 * 3 + 1] = 0x18  # low nibble of output 3, input 17
    with pytest.raises(ValueError, match=r"packed weight \[3, 17\] is minus zero"):
        potqat.unpack(packed, scale, cfg, (16, 64))
