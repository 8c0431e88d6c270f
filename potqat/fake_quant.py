"""PoTFakeQuantize: the fake quantizer of one weight in training, shared by eager QAT and PT2E."""

from __future__ import annotations

import torch
from torch import nn

from potqat import ops, reference
from potqat.config import PoTConfig

# torch's MovingAverageMinMaxObserver, which the papers use, weighs a new extreme by this much.
PAPER_AVERAGING = 0.01


def check_trainable(cfg: PoTConfig) -> None:
    """Raise ValueError for a scale that training cannot follow."""
    if cfg.scale == "output":
        raise ValueError(
            "scale='output' goes by calibration statistics, which change in training; train with scale='learned', and "
            "scale_init='output' to start from it"
        )
    if cfg.compensates and cfg.scale != "learned":
        raise ValueError(
            f"rounding={cfg.rounding!r} compensates for one scale, and scale={cfg.scale!r} moves with the weight in "
            "training; train with scale='learned'"
        )


class PoTFakeQuantize(nn.Module):
    """Quantizes a weight [N, K] to the grid and back, with a straight-through gradient.

    The scale is derived from the weight at each forward (absmax, mse), is a trained parameter (``learned``, kept
    as log2 so that it stays positive), or follows the papers' moving average (``paper``; moves in training only).

    Args:
        weight: the weight that will be quantized; a learned or averaged scale starts from it.
        cfg: the resolved configuration of this weight.
        name: module path, for errors.
        scale: float32 [G, N], what a learned scale starts from; None: found as ``cfg.scale_init`` says.

    Raises:
        ValueError: the weight holds NaN or infinity, its shape cannot be quantized, or ``cfg`` needs calibration.
    """

    def __init__(self, weight: torch.Tensor, cfg: PoTConfig, name: str = "weight", scale: torch.Tensor | None = None):
        super().__init__()
        self.cfg, self.name = cfg, name
        check_trainable(cfg)
        if cfg.needs_calibration:
            raise ValueError(
                "rounding='gptq' and scale_init='output' start training from calibrated weights; call "
                "prepare_qat_(model, cfg, calibration=[int64 [B, T] token ids, ...]), or train with rounding='nearest'"
            )
        self.enabled = True
        if scale is None:
            scale = ops.compute_scale(weight, cfg)  # for all: refuses what cannot be quantized before training starts
        if cfg.scale == "learned":
            if cfg.granularity == "tensor":
                scale = scale[:1, :1]
            self.log2_scale = nn.Parameter(scale.log2())
        elif cfg.scale == "paper":
            w = weight.detach().float()
            self.register_buffer("running_min", w.min())
            self.register_buffer("running_max", w.max())

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """The scale now, float32 [G, N], positive."""
        cfg, (n, k) = self.cfg, weight.shape
        if cfg.scale == "learned":
            return self.log2_scale.exp2().expand(cfg.groups(k), n)
        if cfg.scale == "paper":
            absmax = torch.maximum(-self.running_min, self.running_max)
            return (absmax / reference.levels(cfg.grid)[-1]).clamp_min(cfg.eps).expand(1, n)
        return ops.compute_scale(weight, cfg)

    def observe(self, weight: torch.Tensor) -> None:
        """One step of the papers' moving average; nothing for the other scales."""
        if self.cfg.scale == "paper" and self.training:
            with torch.no_grad():
                self.running_min.lerp_(weight.detach().min().float(), PAPER_AVERAGING)
                self.running_max.lerp_(weight.detach().max().float(), PAPER_AVERAGING)

    def forward(self, weight: torch.Tensor, observe: bool = True) -> torch.Tensor:
        """The fake-quantized weight. ``observe=False``: a second use of a tied weight in the same step."""
        if not self.enabled:
            return weight
        if observe:
            self.observe(weight)
        try:
            return ops.fake_quantize(weight, self.scale(weight), self.cfg)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    @torch.no_grad()
    def start(self, weight: torch.Tensor) -> torch.Tensor:
        """Float32 [N, K] to train from: ``weight``, which is on the grid of this scale, with a gradient everywhere.

        The scale, kept as log2, may differ in the last bit, and level * scale / scale is not always level: the next
        number towards 0 is within the top level."""
        return torch.nextafter(self(weight), torch.zeros(()))

    def pack(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(packed, scale [G, N]) of what ``forward`` gives in eval mode, bit for bit."""
        scale = self.scale(weight).detach().contiguous()
        return ops.pack(weight, scale, self.cfg), scale

    def extra_repr(self) -> str:
        cfg = self.cfg
        return f"grid={cfg.grid}, granularity={cfg.granularity}, scale={cfg.scale}, rounding={cfg.rounding}"
