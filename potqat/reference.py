"""The maths in plain PyTorch, an op in a few lines each. Start here.

Tests hold the C++ core against this file, and tensors that are not on the CPU run it. Shapes everywhere:
w [N, K] with N = out_features and K = in_features; scale float32 [G, N], G groups of inputs share one scale
(``group_size`` inputs a group, 0 for all); x [..., K].
"""

from __future__ import annotations

import torch

# Magnitudes; a weight is +-level * scale. Index = the low three bits of a 4-bit code.
LEVELS = {
    "pot4": [0, 1, 2, 4, 8, 16, 32, 64],
    "e2m1": [0, 1, 2, 3, 4, 6, 8, 12],
    "int4": list(range(8)),
    "int8": list(range(128)),
}
TILE_OUTPUTS, TILE_INPUTS = 16, 64


def levels(grid: str) -> list[int]:
    """Magnitudes of a grid, ascending from 0; ``pot(k)`` is 0, 2^0 ... 2^k (papers' range [-2^k, 2^k])."""
    return LEVELS[grid] if grid in LEVELS else [0] + [2**e for e in range(int(grid[4:-1]) + 1)]


def boundaries(grid: str, rounding: str, device=None) -> torch.Tensor:
    """float64 [levels - 1]: v rounds up to level i + 1 from boundary i on (an upper neighbour for ``paper``)."""
    level = torch.tensor(levels(grid), dtype=torch.float64, device=device)
    low, high = level[:-1], level[1:]
    if rounding == "nearest":
        return (low + high) / 2
    middle = (low * high).sqrt()  # nearest in the log domain; between 0 and 1 the boundary stays 0.5
    middle[0] = 0.5
    return middle


def assign(v: torch.Tensor, grid: str, rounding: str) -> torch.Tensor:
    """Level of each non-negative v = |w| / scale, float32; values past the top level clamp; NaN stays NaN."""
    v64 = v.double().contiguous()
    if rounding == "paper":  # the papers: to an integer (half to even) first, then nearest in the log domain
        v64 = v64.round()
    index = torch.bucketize(v64, boundaries(grid, rounding, v.device), right=True)
    level = torch.tensor(levels(grid), dtype=torch.float32, device=v.device)
    return torch.where(v.isnan(), v, level[index])


def expand_scale(scale: torch.Tensor, k: int, group_size: int) -> torch.Tensor:
    """scale [G, N] -> [N, K]: the scale of each weight."""
    return scale.t().repeat_interleave(group_size or k, dim=1)[:, :k]


def quantize(w, scale, grid: str, rounding: str, group_size: int = 0) -> torch.Tensor:
    """Signed integer levels, float32 [N, K]: the nearest level to w / scale."""
    w = w.float()
    level = assign(w.abs() / expand_scale(scale, w.shape[1], group_size), grid, rounding)
    return level.copysign(w) + 0.0  # -0 + 0 = +0: there is one zero


def fake_quantize(w, scale, grid: str, rounding: str, group_size: int = 0) -> torch.Tensor:
    """level * scale, in w's shape and dtype."""
    level = quantize(w, scale, grid, rounding, group_size)
    return (level * expand_scale(scale, w.shape[1], group_size)).to(w.dtype)


def fake_quantize_backward(grad, w, scale, grid: str, rounding: str, group_size: int = 0, clip: bool = True):
    """Straight-through gradients (dw like w, dscale [G, N]).

    dw passes where |w / scale| <= top (everywhere if not clip); dscale sums grad * (level - w / scale) inside the
    range and grad * (+-top) outside it (LSQ, arXiv 1902.08153, with the PoT levels as the quantizer).
    """
    k = w.shape[1]
    top = float(levels(grid)[-1])
    v = w.float() / expand_scale(scale, k, group_size)
    inside = v.abs() <= top
    level = quantize(w, scale, grid, rounding, group_size)
    g = grad.float()
    per_weight = g * torch.where(inside, level - v, level)  # outside the range the level is +-top
    pad = scale.shape[0] * (group_size or k) - k
    grouped = torch.nn.functional.pad(per_weight, (0, pad)).reshape(w.shape[0], scale.shape[0], -1)
    dw = torch.where(inside, grad, 0) if clip else grad.clone()
    return dw, grouped.sum(-1).t().contiguous()


def absmax_scale(w, grid: str, group_size: int = 0, per_tensor: bool = False) -> torch.Tensor:
    """Scale that puts the largest magnitude of a group on the top level; 1 for a group of zeros. [G, N]."""
    n, k = w.shape
    size = group_size or k
    pad = -k % size
    grouped = torch.nn.functional.pad(w.float().abs(), (0, pad)).reshape(n, -1, size).amax(-1).t()
    if per_tensor:
        grouped = grouped.max().expand_as(grouped)
    top = levels(grid)[-1]
    scale = (grouped / top).clamp_min(torch.finfo(torch.float32).tiny)
    # Division rounds: where absmax / scale would land a hair past the top level, take the next float up.
    above = grouped / scale > top
    scale = torch.where(above, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    return torch.where(grouped == 0, 1.0, scale).contiguous()


def pack(level: torch.Tensor, grid: str) -> torch.Tensor:
    """Signed levels [N, K] -> uint8 [ceil(N/16), ceil(K/64), 512] (4 bits) or [.., 1024] (int8).

    4 bits: line j of a tile, byte 4c + i: low nibble = output c, input 8j + i; high nibble = input 8j + 4 + i.
    A nibble is sign << 3 | level index. int8: line j, byte 4c + i = output c, input 4j + i.
    """
    n, k = level.shape
    level = torch.nn.functional.pad(level, (0, -k % TILE_INPUTS, 0, -n % TILE_OUTPUTS))
    rows, cols = level.shape[0] // TILE_OUTPUTS, level.shape[1] // TILE_INPUTS
    if grid == "int8":
        tile = level.reshape(rows, TILE_OUTPUTS, cols, 16, 4).permute(0, 2, 3, 1, 4)  # r, b, line, c, i
        return tile.to(torch.int8).reshape(rows, cols, 1024).view(torch.uint8)
    magnitudes = torch.tensor(levels(grid), device=level.device)
    code = torch.bucketize(level.abs().long(), magnitudes) + 8 * (level < 0)
    tile = code.reshape(rows, TILE_OUTPUTS, cols, 8, 2, 4).permute(0, 2, 3, 1, 5, 4)  # r, b, line, c, i, half
    return (tile[..., 0] + 16 * tile[..., 1]).to(torch.uint8).reshape(rows, cols, 512)


def unpack(packed: torch.Tensor, grid: str, n: int, k: int) -> torch.Tensor:
    """Inverse of pack: signed levels, float32 [N, K]."""
    rows, cols = packed.shape[:2]
    if grid == "int8":
        tile = packed.view(torch.int8).float().reshape(rows, cols, 16, TILE_OUTPUTS, 4)
        return tile.permute(0, 3, 1, 2, 4).reshape(rows * TILE_OUTPUTS, cols * TILE_INPUTS)[:n, :k]
    code = torch.stack([packed & 15, packed >> 4], -1).reshape(rows, cols, 8, TILE_OUTPUTS, 4, 2).long()
    magnitude = torch.tensor(levels(grid), dtype=torch.float32, device=packed.device)[code & 7]
    level = torch.where(code >= 8, -magnitude, magnitude)
    return level.permute(0, 3, 1, 2, 5, 4).reshape(rows * TILE_OUTPUTS, cols * TILE_INPUTS)[:n, :k]


def quantize_activations(x: torch.Tensor):
    """Per-token symmetric int8: (q, scale [..., 1]) with scale = absmax / 127 (1 for a row of zeros).

    A row with NaN or infinity gets scale NaN, so that its outputs, and only they, are NaN.
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(absmax == 0, 1.0, (absmax / 127).clamp_min(torch.finfo(torch.float32).tiny))
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    return (x / scale).round().clamp(-127, 127).nan_to_num(0), scale


def linear(x, packed, scale, bias, grid: str, out_features: int, group_size: int = 0, activations: str = "int8",
           input_scale: float = 1.0, input_zero_point: int = 0) -> torch.Tensor:  # fmt: skip
    """x @ (level * scale).T + bias with integer products: acc = sum level * q, exact (float64 holds it);
    out = sum over groups, ascending, of float32(acc) * (s_x * s_w), then + bias, then x's dtype. int16: each group's
    sum is followed by that of what x leaves, (q, s_x) of x - q * s_x."""
    n, k = out_features, x.shape[-1]
    level = unpack(packed, grid, n, k).double()
    if activations == "float":
        out = x.float() @ (level.float() * expand_scale(scale, k, group_size)).t()
        return (out if bias is None else out + bias.float()).to(x.dtype)
    if activations == "static":  # per-tensor affine, the papers' scheme: q = clamp(round(x / s) + zp)
        s_x = torch.tensor(input_scale, dtype=torch.float32, device=x.device)
        q = ((x.float() / s_x).round() + input_zero_point).clamp(-128, 127).nan_to_num(0) - input_zero_point
        s_x = torch.where(x.isfinite().all(-1, keepdim=True), s_x, torch.nan)
    else:
        q, s_x = quantize_activations(x)
    parts = [(q, s_x)]
    if activations == "int16":
        parts.append(quantize_activations(x.float() - q * s_x))
    size = group_size or max(k, 1)
    out = torch.zeros(*x.shape[:-1], n, dtype=torch.float32, device=x.device)
    for g in range(scale.shape[0]):
        part = slice(g * size, (g + 1) * size)
        for q, s_x in parts:
            out = out + (q[..., part].double() @ level[:, part].t()).float() * (s_x * scale[g])
    return (out if bias is None else out + bias.float()).to(x.dtype)


def embedding(ids, packed, scale, grid: str, num_embeddings: int, embedding_dim: int, group_size: int = 0):
    """Rows of the dequantized table, float32 [..., embedding_dim]."""
    level = unpack(packed, grid, num_embeddings, embedding_dim)
    return (level * expand_scale(scale, embedding_dim, group_size))[ids]
