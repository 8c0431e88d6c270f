"""The torch ops of namespace ``potqat``: schemas live in C++ (cpp/bindings/torch_ops.cpp); here are their fake
kernels, their autograd, what runs where the tensor is not on the CPU, and the public tensor functions.

Shapes: w [N, K]; scale float32 [G, N]; packed uint8 [ceil(N/16), ceil(K/64), 512 or 1024]; x [..., K].
"""

from __future__ import annotations

from pathlib import Path

import torch

from potqat import _C, reference
from potqat.config import GRIDS, PoTConfig

torch.ops.load_library(Path(_C.__file__).with_name("libpotqat_ops.so"))
_ops = torch.ops.potqat

MAX_IN_FEATURES = _C.MAX_IN_FEATURES


# ---- Public functions --------------------------------------------------------------------------------------


def compute_scale(w: torch.Tensor, cfg: PoTConfig, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scale of each group of ``w`` by the method ``cfg.scale``.

    Args:
        w: float [N, K], any strides.
        cfg: ``learned`` gives its starting point ``cfg.scale_init``; ``paper`` is max(absmax / top, eps).
        importance: float32 [K], weight of each input's squared error (for instance its second moment); needed by,
            and only by, ``scale="output"``.

    Returns:
        float32 [G, N] with G = cfg.groups(K); under ``granularity="tensor"`` all entries are equal.

    Raises:
        ValueError: w is not a 2-D float tensor or holds NaN or infinity, or importance does not fit.
    """
    _check_weight("compute_scale", w)
    method = cfg.scale_init if cfg.scale == "learned" else "absmax" if cfg.scale == "paper" else cfg.scale
    if (method == "output") != (importance is not None):
        raise ValueError(
            f"potqat.compute_scale: scale={cfg.scale!r} "
            + ("needs importance, a float32 [K] tensor" if importance is None else "takes no importance")
        )
    if importance is not None and tuple(importance.shape) != (w.shape[1],):
        raise ValueError(
            f"potqat.compute_scale: importance must be [{w.shape[1]}] (inputs of w), got {list(importance.shape)}"
        )
    per_tensor = cfg.granularity == "tensor"
    scale = _call(
        _ops.compute_scale.default,
        w.detach(),
        importance,
        cfg.grid,
        cfg.level_rounding,
        method,
        cfg.group_size,
        per_tensor,
    )
    return scale.clamp_min(cfg.eps) if cfg.scale == "paper" else scale


def fake_quantize(w: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig) -> torch.Tensor:
    """``level * scale`` for the level nearest to w / scale; differentiable in w and scale (straight-through).

    Args:
        w: float [N, K], any strides.
        scale: float32 [G, N], positive.
        cfg: grid, rounding, granularity and ste are used.

    Returns:
        same shape and dtype as w.

    Raises:
        ValueError: shapes that do not fit, or (on the CPU) NaN or infinity in w.
    """
    _check_weight("fake_quantize", w)
    _check_scale("fake_quantize", scale, w.shape[0], w.shape[1], cfg)
    return _call_past_autograd(
        _ops.fake_quant.default, (w, scale), cfg.grid, cfg.level_rounding, cfg.group_size, cfg.ste == "clipped"
    )


def pack(w: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig) -> torch.Tensor:
    """Quantize ``w`` and store its codes in the tiled layout that the kernels read (cpp/core/potqat.h).

    Args:
        w: float [N, K], any strides.
        scale: float32 [G, N], positive.

    Returns:
        uint8 [ceil(N/16), ceil(K/64), 512], 1024 for ``int8``.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity in w, or a grid that has no packed form (``pot(k)``).
    """
    _check_weight("pack", w)
    check_packable("pack", cfg.grid)
    _check_scale("pack", scale, w.shape[0], w.shape[1], cfg)
    return _call(_ops.pack.default, w.detach(), scale, cfg.grid, cfg.level_rounding, cfg.group_size)


def unpack(packed: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig, shape: tuple[int, int]) -> torch.Tensor:
    """float32 ``[N, K] = level * scale``: equal to ``fake_quantize`` bit for bit.

    Raises:
        ValueError: shapes that do not fit, or a code that no packer writes (minus zero).
    """
    n, k = shape
    check_packable("unpack", cfg.grid)
    _check_packed("unpack", packed, cfg.grid, n, k)
    _check_scale("unpack", scale, n, k, cfg)
    return _call(_ops.unpack.default, packed, scale, cfg.grid, n, k, cfg.group_size)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    cfg: PoTConfig,
    *,
    out_features: int,
    input_scale: float | None = None,
    input_zero_point: int = 0,
) -> torch.Tensor:
    """``x @ unpack(packed).T + bias`` by the shift kernels.

    With ``cfg.activations="int8"`` x is quantized per token (symmetric, dynamic), or with ``input_scale`` per
    tensor (static affine: q = clamp(round(x / input_scale) + input_zero_point, -128, 127)); the products are
    summed exactly in int32 and scaled in float32, the same bits on every machine and thread count. ``"int16"`` does
    this twice, for x and for what its int8 form leaves of it. With ``activations=None`` x stays float and products
    are summed in float32, k ascending.

    Args:
        x: float [..., K]; its gradient is that of a float linear with the unpacked weight (activation rounding
            passes straight through). packed, scale and bias get none.
        packed, scale: from ``pack``.
        bias: float32 [N] or None.

    Returns:
        [..., N] in x's dtype. A row of x with NaN or infinity gives NaN in that row only (integer activations).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_packable("linear", cfg.grid)
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"potqat.linear: x must be float [..., K], got {x.dtype} {list(x.shape)}")
    _check_packed("linear", packed, cfg.grid, out_features, x.shape[-1])
    _check_scale("linear", scale, out_features, x.shape[-1], cfg)
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"potqat.linear: bias must be [{out_features}], got {list(bias.shape)}")
    mode = activation_mode(cfg)
    if input_scale is not None:
        if mode != "int8" or not input_scale > 0 or not -128 <= input_zero_point <= 127:
            raise ValueError(
                "potqat.linear: input_scale needs activations='int8', a positive scale and a zero point in "
                f"-128..127; got {cfg.activations!r}, {input_scale}, {input_zero_point}"
            )
        mode = "static"
    return run_linear(
        x, packed, scale, bias, cfg.grid, out_features, cfg.group_size, mode,
        1.0 if input_scale is None else input_scale, input_zero_point,
    )  # fmt: skip


def run_linear(x: torch.Tensor, *args) -> torch.Tensor:
    """``torch.ops.potqat.linear`` without the checks of ``linear``; those of the op itself remain."""
    return _call_past_autograd(_ops.linear.default, (x,), *args)


def embedding(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig, *, shape: tuple[int, int]
) -> torch.Tensor:
    """Rows ``ids`` of a packed table of ``shape`` (num_embeddings, embedding_dim).

    Returns:
        float32 [*ids.shape, embedding_dim].

    Raises:
        ValueError: shapes that do not fit, or (on the CPU) an id outside the table.
    """
    check_packable("embedding", cfg.grid)
    _check_packed("embedding", packed, cfg.grid, *shape)
    _check_scale("embedding", scale, *shape, cfg)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"potqat.embedding: ids must be int32 or int64, got {ids.dtype}")
    return _call(_ops.embedding.default, ids, packed, scale, cfg.grid, *shape, cfg.group_size)


def activation_mode(cfg: PoTConfig) -> str:
    """The ``activations`` argument of ``torch.ops.potqat.linear`` for a config."""
    return cfg.activations or "float"


# ---- Checks: before any work, with the values ---------------------------------------------------------------


def _call(op, *args):
    try:
        return op(*args)
    except RuntimeError as error:  # the C++ op found bad values in the data (NaN, a bad code, an id out of range)
        message = str(error).splitlines()[0] if str(error) else ""
        if message.startswith("potqat."):
            raise ValueError(message) from None
        raise


def _call_past_autograd(op, differentiable: tuple[torch.Tensor, ...], *args):
    """Call an op whose formula of the gradient, torch.library's, is Python and takes as long as a small layer: where no
    gradient is wanted the call goes past the autograd key. In inference mode tensors do not have that key."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if wanted or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return _call(op, *differentiable, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return _call(op, *differentiable, *args)


def _check_weight(where: str, w: torch.Tensor) -> None:
    if w.dim() != 2 or w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"potqat.{where}: w must be float32, bfloat16 or float16 [out_features, in_features], "
            f"got {w.dtype} {list(w.shape)}"
        )
    if w.shape[1] > MAX_IN_FEATURES:
        raise ValueError(f"potqat.{where}: at most {MAX_IN_FEATURES} inputs keep int32 sums exact, got {w.shape[1]}")


def _check_scale(where: str, scale: torch.Tensor, n: int, k: int, cfg: PoTConfig) -> None:
    expected = (cfg.groups(k), n)
    if tuple(scale.shape) != expected or scale.dtype != torch.float32:
        raise ValueError(
            f"potqat.{where}: scale must be float32 {list(expected)} for weight [{n}, {k}] with "
            f"granularity={cfg.granularity!r}, got {scale.dtype} {list(scale.shape)}"
        )


def check_packable(where: str, grid: str) -> None:
    if grid not in GRIDS:
        raise ValueError(
            f"potqat.{where}: {grid} is for fake-quantization only: it has {2 * len(reference.levels(grid)) - 1} "
            f"levels and no packed form; pack with one of {', '.join(GRIDS)}"
        )


def packed_shape(grid: str, n: int, k: int) -> tuple[int, int, int]:
    """Shape of the packed tensor of an [n, k] weight."""
    rows, cols = -(-n // reference.TILE_OUTPUTS), -(-k // reference.TILE_INPUTS)
    return rows, cols, reference.TILE_OUTPUTS * reference.TILE_INPUTS // (1 if grid == "int8" else 2)


def _check_packed(where: str, packed: torch.Tensor, grid: str, n: int, k: int) -> None:
    expected = packed_shape(grid, n, k)
    if tuple(packed.shape) != expected or packed.dtype != torch.uint8:
        raise ValueError(
            f"potqat.{where}: packed must be uint8 {list(expected)} for a {grid} weight [{n}, {k}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )


# ---- Fake kernels: shapes and dtypes only -------------------------------------------------------------------


@torch.library.register_fake("potqat::compute_scale")
def _(w, importance, grid, rounding, method, group_size, per_tensor):
    groups = torch.sym_max(1, (w.shape[1] + group_size - 1) // group_size) if group_size else 1
    return w.new_empty(groups, w.shape[0], dtype=torch.float32)


@torch.library.register_fake("potqat::fake_quant")
def _(w, scale, grid, rounding, group_size, clip):
    return torch.empty_like(w, memory_format=torch.contiguous_format)


@torch.library.register_fake("potqat::fake_quant_backward")
def _(grad, w, scale, grid, rounding, group_size, clip, scale_grad):
    dscale = scale.new_empty(scale.shape[0] if scale_grad else 0, scale.shape[1])
    return torch.empty_like(w, memory_format=torch.contiguous_format), dscale


@torch.library.register_fake("potqat::pack")
def _(w, scale, grid, rounding, group_size):
    return w.new_empty(packed_shape(grid, *w.shape), dtype=torch.uint8)


@torch.library.register_fake("potqat::unpack")
def _(packed, scale, grid, out_features, in_features, group_size):
    return scale.new_empty(out_features, in_features)


@torch.library.register_fake("potqat::linear")
def _(x, packed, scale, bias, grid, out_features, group_size, activations, input_scale, input_zero_point):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("potqat::embedding")
def _(ids, packed, scale, grid, num_embeddings, embedding_dim, group_size):
    return scale.new_empty(*ids.shape, embedding_dim)


# ---- Autograd: straight-through -----------------------------------------------------------------------------


def _save_fake_quant(ctx, inputs, output):
    w, scale, *ctx.settings = inputs
    ctx.save_for_backward(w, scale)


def _fake_quant_backward(ctx, grad):
    w, scale = ctx.saved_tensors
    scale_grad = ctx.needs_input_grad[1]
    dw, dscale = _ops.fake_quant_backward(grad, w, scale, *ctx.settings, scale_grad)
    return dw, dscale if scale_grad else None, None, None, None, None


torch.library.register_autograd("potqat::fake_quant", _fake_quant_backward, setup_context=_save_fake_quant)


def _save_linear(ctx, inputs, output):
    x, packed, scale, _, ctx.grid, ctx.out_features, ctx.group_size, *_ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.in_features = x.shape[-1]


def _linear_backward(ctx, grad):
    packed, scale = ctx.saved_tensors
    w = _ops.unpack(packed, scale, ctx.grid, ctx.out_features, ctx.in_features, ctx.group_size)
    return (grad.float() @ w).to(grad.dtype), *[None] * 9


torch.library.register_autograd("potqat::linear", _linear_backward, setup_context=_save_linear)


# ---- Other devices: the same maths from PyTorch ops, so that training on a GPU works ------------------------

_other = torch.library.Library("potqat", "IMPL")


def _decompose(name):
    return lambda fn: _other.impl(name, fn, "CompositeExplicitAutograd")


@_decompose("compute_scale")
def _(w, importance, grid, rounding, method, group_size, per_tensor):
    if method == "absmax":
        return reference.absmax_scale(w, grid, group_size, per_tensor)
    cpu = None if importance is None else importance.cpu()
    return _ops.compute_scale(w.cpu(), cpu, grid, rounding, method, group_size, per_tensor).to(w.device)


@_decompose("fake_quant")
def _(w, scale, grid, rounding, group_size, clip):
    return reference.fake_quantize(w, scale, grid, rounding, group_size).contiguous()


@_decompose("fake_quant_backward")
def _(grad, w, scale, grid, rounding, group_size, clip, scale_grad):
    dw, dscale = reference.fake_quantize_backward(grad, w, scale, grid, rounding, group_size, clip)
    return dw.contiguous(), dscale if scale_grad else dscale[:0]


@_decompose("pack")
def _(w, scale, grid, rounding, group_size):
    if not w.isfinite().all():
        raise RuntimeError("potqat.pack: w holds NaN or infinity; find where the weight diverged and repair it")
    return reference.pack(reference.quantize(w, scale, grid, rounding, group_size), grid)


@_decompose("unpack")
def _(packed, scale, grid, out_features, in_features, group_size):
    level = reference.unpack(packed, grid, out_features, in_features)
    return level * reference.expand_scale(scale, in_features, group_size)


_decompose("linear")(reference.linear)
_decompose("embedding")(reference.embedding)
