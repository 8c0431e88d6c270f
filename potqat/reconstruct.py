"""Block reconstruction: the weights and scales of a block, trained until it returns nearly what the float block does.

Error compensation sees one layer and its inputs; here the layers of a block make up for one another, through attention
and the activation function. Gradients pass straight through the quantizer into float weights, as when a whole model is
trained: EfficientQAT's Block-AP (arXiv 2407.11062). That blocks are the unit to fit is BRECQ's (arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from potqat import modules
from potqat._C import cpu_info
from potqat.fake_quant import PoTFakeQuantize
from potqat.modules import PackedLinear
from potqat.plan import Site
from potqat.smooth import Run

EPOCHS = 4  # times that each row of the calibration data is seen
STEP = 1024  # tokens of a step, as near as whole rows come
RATE = 1e-2  # AdamW's step, of the root mean square of a layer's weights
SCALE_RATE = 1e-3  # that of log2 of the scales
WARMUP = 0.05  # share of the steps


def reconstruct(
    model: nn.Module, layers: Mapping[str, Site], runs: Sequence[Run], targets: Sequence[torch.Tensor]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float, float]:
    """Train the packed linear ``layers`` of one block; the model is left as it was.

    Args:
        layers: of the block, by name; in ``model`` they are packed.
        runs: a run of the block on each row of the calibration data, which returns its hidden states, [B, T, C].
        targets: what they should be.

    Returns:
        ({name: (weight to be rounded, float32 [N, K]; its scale, float32 [G, N])}, error before, error after): the
        squared difference from the targets relative to their squares, the mean over tokens, which are of very
        different sizes before the next norm.
    """
    packed = [model.get_submodule(name) for name in layers]
    twins = [_twin(site, module) for site, module in zip(layers.values(), packed, strict=True)]
    try:
        modules.replace(model, dict(zip(packed, twins, strict=True)))
        before = _mean_error(runs, targets)
        _train(twins, runs, targets)
        after = _mean_error(runs, targets)
    finally:
        modules.replace(model, dict(zip(twins, packed, strict=True)))
    return {name: _result(twin) for name, twin in zip(layers, twins, strict=True)}, before, after


def _twin(site: Site, packed: PackedLinear) -> nn.Module:
    """A QAT module of its own weight, which starts from what is packed."""
    cfg = replace(packed.cfg, scale="learned", scale_init="absmax", rounding="nearest")
    weight = packed.dequantize()
    fake_quant = PoTFakeQuantize(weight, cfg, site.name, packed.scale)
    weight = fake_quant.start(weight)
    twin = modules.TWINS[site.kind](site.module, fake_quant).eval()
    twin.weight = nn.Parameter(weight.t().contiguous() if site.kind == "conv1d" else weight)  # the float one stays
    return twin


def _train(twins: list[nn.Module], runs: Sequence[Run], targets: Sequence[torch.Tensor]) -> None:
    at_once = max(1, STEP // targets[0].shape[1])
    groups = [{"params": [twin.weight]} for twin in twins]
    rates = [RATE * twin.weight.detach().square().mean().sqrt().item() for twin in twins]
    groups.append({"params": [twin.weight_fake_quant.log2_scale for twin in twins]})
    rates.append(SCALE_RATE)
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=EPOCHS * -(-len(runs) // at_once), pct_start=WARMUP, cycle_momentum=False
    )
    # bfloat16 is enough for a straight-through gradient, and where there are tiles for it takes half of the time.
    halves = "amx" in cpu_info()["available"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(runs), generator=generator).split(at_once):
            optimizer.zero_grad()
            for row in rows.tolist():
                with torch.enable_grad():
                    error = _error(runs[row], targets[row], halves) / len(rows)
                error.backward(inputs=trained)  # and not norms, which stay as they are
            optimizer.step()
            schedule.step()


def _error(run: Run, target: torch.Tensor, halves: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=halves or target.dtype != torch.float32):
        hidden = run()
    target = target.float()
    size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((hidden.float() - target).square().sum(-1) / size).mean()


@torch.no_grad()
def _mean_error(runs: Sequence[Run], targets: Sequence[torch.Tensor]) -> float:
    return sum(_error(run, target).item() for run, target in zip(runs, targets, strict=True)) / len(runs)


@torch.no_grad()
def _result(twin: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    weight = twin.weight.t() if isinstance(twin, modules.QATConv1D) else twin.weight
    weight = weight.detach().contiguous()
    return weight, twin.weight_fake_quant.scale(weight).contiguous()
