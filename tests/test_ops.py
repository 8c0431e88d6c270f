"""The torch ops: opcheck, straight-through gradients, compile, other devices' decomposition, and refused input."""

import resource
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import potqat
from potqat import PoTConfig, reference


def weight(n=33, k=100, dtype=torch.float32):
    w = torch.randn(n, k).to(dtype)
    cfg = PoTConfig(granularity=64)
    return w, potqat.compute_scale(w, cfg), cfg


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    w, scale, cfg = weight(dtype=dtype)
    packed = potqat.pack(w, scale, cfg)
    o = torch.ops.potqat
    opcheck(o.compute_scale, (w, None, "pot4", "nearest", "mse", 64, False))
    opcheck(o.compute_scale, (w, torch.rand(100), "pot4", "nearest", "output", 0, True))
    opcheck(o.fake_quant, (w.requires_grad_(), scale.clone().requires_grad_(), "pot4", "nearest", 64, True))
    w = w.detach()
    opcheck(o.fake_quant_backward, (torch.randn_like(w), w, scale, "pot4", "nearest", 64, True, True))
    opcheck(o.fake_quant_backward, (torch.randn_like(w), w, scale, "pot4", "nearest", 64, True, False))
    opcheck(o.pack, (w, scale, "pot4", "nearest", 64))
    opcheck(o.unpack, (packed, scale, "pot4", 33, 100, 64))
    x = torch.randn(2, 3, 100).to(dtype)
    for mode, s_x, zero_point in [("int8", 1.0, 0), ("int16", 1.0, 0), ("float", 1.0, 0), ("static", 0.1, 4)]:
        x = x.detach().requires_grad_(mode.startswith("int"))
        opcheck(o.linear, (x, packed, scale, torch.randn(33), "pot4", 33, 64, mode, s_x, zero_point))
    opcheck(o.embedding, (torch.randint(33, (2, 5)), packed, scale, "pot4", 33, 100, 64))


@pytest.mark.parametrize("ste", ["clipped", "identity"])
@pytest.mark.parametrize("granularity", ["channel", 32])
@pytest.mark.parametrize("grid", ["pot4", "e2m1", "int4", "int8", "pot(3)"])
def test_straight_through_gradients(grid, granularity, ste):
    cfg = PoTConfig(grid=grid, granularity=granularity, ste=ste)
    w = torch.randn(20, 70, requires_grad=True)
    scale = (potqat.compute_scale(w, cfg) / 3).requires_grad_()  # a third: many weights lie outside the range
    grad = torch.randn(20, 70)
    potqat.fake_quantize(w, scale, cfg).backward(grad)
    group = cfg.group_size or 70
    v = w.detach() / scale.detach().t().repeat_interleave(group, 1)[:, :70]
    top = reference.levels(grid)[-1]
    inside = v.abs() <= top
    assert 0.05 < (~inside).float().mean() < 0.95
    assert torch.equal(w.grad, grad * inside if ste == "clipped" else grad)
    # LSQ: level - v inside the range, +-top outside. float32 sums of `group` terms.
    q = reference.quantize(w.detach(), scale.detach(), grid, "nearest", cfg.group_size)
    terms = (grad * torch.where(inside, q - v, v.sign() * top)).double()
    for g in range(cfg.groups(70)):
        part = terms[:, g * group : (g + 1) * group]
        bound = 2 * group * 2.0**-24 * (part.abs() + grad[:, g * group : (g + 1) * group].abs() * top).sum(1)
        assert ((scale.grad[g] - part.sum(1)).abs() <= bound).all()


def test_scale_gradient_is_the_slope_where_levels_do_not_change():
    """Saturated weights: w_hat = +-top * scale, so dloss/dscale is the true derivative."""
    cfg = PoTConfig()
    w = torch.tensor([[100.0, -200.0, 300.0]])
    scale = torch.tensor([[1.0]], requires_grad=True)
    potqat.fake_quantize(w, scale, cfg).sum().backward()
    assert scale.grad.item() == 64


def test_gradient_of_a_strided_weight_and_a_strided_gradient():
    w = torch.randn(70, 20).t().requires_grad_()
    cfg = PoTConfig()
    out = potqat.fake_quantize(w, potqat.compute_scale(w, cfg), cfg)
    (grad,) = torch.autograd.grad(out.t().sum(), w)
    assert torch.equal(grad, torch.ones(20, 70))


def test_backward_matches_the_reference_bit_for_bit_in_dw():
    for grid in ("pot4", "int8"):
        w, grad = torch.randn(9, 50), torch.randn(9, 50)
        scale = torch.rand(2, 9) * 0.05 + 1e-3
        ours = torch.ops.potqat.fake_quant_backward(grad, w, scale, grid, "nearest", 32, True, True)
        theirs = reference.fake_quantize_backward(grad, w, scale, grid, "nearest", 32, True)
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])


def test_other_devices_decompose_to_the_same_results():
    """The kernels registered for every other device, run here on CPU tensors, equal the C++ ones."""
    w, scale, cfg = weight()
    packed = potqat.pack(w, scale, cfg)
    x, bias = torch.randn(4, 100), torch.randn(33)
    ids = torch.randint(33, (5,))
    cases = {
        "compute_scale": (w, None, "pot4", "nearest", "absmax", 64, False),
        "fake_quant": (w, scale, "pot4", "nearest", 64, True),
        "pack": (w, scale, "pot4", "nearest", 64),
        "unpack": (packed, scale, "pot4", 33, 100, 64),
        "linear": (x, packed, scale, bias, "pot4", 33, 64, "int8", 1.0, 0),
        "embedding": (ids, packed, scale, "pot4", 33, 100, 64),
    }
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, args in cases.items():
        op = getattr(torch.ops.potqat, name).default
        assert torch.equal(op.redispatch(keys, *args), op(*args)), name


def test_ops_compile_in_one_graph():
    w, scale, cfg = weight()
    packed = potqat.pack(w, scale, cfg)
    bias = torch.randn(33)

    def forward(x, w):
        w_hat = potqat.fake_quantize(w, potqat.compute_scale(w, cfg), cfg)
        return potqat.linear(x, packed, scale, bias, cfg, out_features=33) + (x @ w_hat.t())

    x = torch.randn(4, 100)
    compiled = torch.compile(forward, fullgraph=True)
    torch.testing.assert_close(compiled(x, w), forward(x, w))


def test_what_is_refused_before_any_work():
    w, scale, cfg = weight()
    packed = potqat.pack(w, scale, cfg)
    x = torch.randn(2, 100)
    bad = w.clone()
    bad[3, 7] = float("nan")
    refused = [
        (r"NaN or infinity at \[3, 7\]", lambda: potqat.compute_scale(bad, cfg)),
        (r"NaN or infinity at \[3, 7\]", lambda: potqat.fake_quantize(bad, scale, cfg)),
        (r"NaN or infinity at \[3, 7\]", lambda: potqat.pack(bad, scale, cfg)),
        (r"w must be float32.*int64 \[2, 2\]", lambda: potqat.compute_scale(torch.ones(2, 2).long(), cfg)),
        (r"w must be .*\[2, 3, 4\]", lambda: potqat.pack(torch.ones(2, 3, 4), scale, cfg)),
        (r"scale must be float32 \[2, 33\].*got .*\[1, 33\]", lambda: potqat.pack(w, scale[:1], cfg)),
        (r"scale of output 4, group 1 is not a positive", lambda: potqat.pack(w, _with(scale, (1, 4), 0.0), cfg)),
        (r"pot\(7\) is for fake-quantization only: it has 17 levels",
         lambda: potqat.pack(w, scale, PoTConfig(grid="pot(7)", granularity=64))),
        (r"packed must be uint8 \[3, 2, 512\].*got", lambda: potqat.unpack(packed[:1], scale, cfg, (33, 100))),
        (r"packed must be uint8 \[3, 3, 512\]",
         lambda: potqat.linear(torch.randn(2, 129), packed, scale, None, cfg, out_features=33)),
        (r"bias must be \[33\], got \[5\]",
         lambda: potqat.linear(x, packed, scale, torch.ones(5), cfg, out_features=33)),
        (r"input_scale needs", lambda: potqat.linear(x, packed, scale, None, cfg, out_features=33, input_scale=-1.0)),
        (r"needs importance", lambda: potqat.compute_scale(w, PoTConfig(scale="output", granularity=64))),
        (r"importance must be \[100\]",
         lambda: potqat.compute_scale(w, PoTConfig(scale="output", granularity=64), torch.ones(3))),
        (r"at most 131071 inputs", lambda: potqat.compute_scale(torch.ones(1, 131072), PoTConfig())),
    ]  # fmt: skip
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_direct_op_calls_are_checked_too():
    w, scale, cfg = weight()
    packed = potqat.pack(w, scale, cfg)
    o = torch.ops.potqat
    refused = [
        ("unknown grid 'pot9'", lambda: o.pack(w, scale, "pot9", "nearest", 64)),
        ("unknown rounding", lambda: o.fake_quant(w, scale, "pot4", "up", 64, True)),
        ("group_size must be", lambda: o.pack(w, scale, "pot4", "nearest", 48)),
        ("scale must be", lambda: o.fake_quant(w, scale[:1], "pot4", "nearest", 64, True)),
        ("packed must be", lambda: o.linear(w, packed[:1], scale, None, "pot4", 33, 64, "int8", 1.0, 0)),
        ("unknown activations", lambda: o.linear(w, packed, scale, None, "pot4", 33, 64, "int4", 1.0, 0)),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=rf"^potqat\.\w+: .*{message}"):
            call()


def test_linear_passes_the_gradient_of_its_input():
    w, scale, cfg = weight()
    packed = potqat.pack(w, scale, cfg)
    x, grad = torch.randn(2, 3, 100, requires_grad=True), torch.randn(2, 3, 33)
    potqat.linear(x, packed, scale, None, cfg, out_features=33).backward(grad)
    torch.testing.assert_close(x.grad, grad @ potqat.fake_quantize(w, scale, cfg))


def _with(t, index, value):
    t = t.clone()
    t[index] = value
    return t


def test_calls_leave_no_memory_behind():
    """torch's conversion of str arguments loses 48 bytes a string (see torch_ops.cpp); ours must lose nothing."""
    w, scale = torch.ones(1, 1), torch.ones(1, 1)

    def calls(count):
        for _ in range(count):
            torch.ops.potqat.fake_quant(w, scale, "pot4", "nearest", 0, True)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    calls(2000)
    before = resident()
    calls(40_000)
    assert resident() - before < 40_000 * 24  # half of one leaked string a call
