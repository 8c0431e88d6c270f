"""Block reconstruction: the weights and scales of a block, trained until it returns nearly what the float block does.

Error compensation sees one layer and its inputs; here the layers of a block make up for one another, through attention
and the activation function. Gradients pass straight through the quantizer into float weights, as when a whole model is
trained: EfficientQAT's Block-AP (arXiv 2407.11062). That blocks are the unit to fit is BRECQ's (arXiv 2102.05426).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from potqat import modules
from potqat._C import cpu_info
from potqat.calibrate import Rows
from potqat.fake_quant import PoTFakeQuantize
from potqat.modules import PackedLinear
from potqat.plan import Site

EPOCHS = 4  # times that each row of the calibration data is seen, but of long data
SEEN = 524_288  # only so many tokens in all, as near as whole epochs come
STEP = 1024  # tokens of a step, as near as whole rows come
RATE = 1e-2  # AdamW's step, of the root mean square of a layer's weights
SCALE_RATE = 1e-3  # that of log2 of the scales
WARMUP = 0.05  # share of the steps
MEASURED = 4096  # tokens that the error is measured on before and after, as near as whole rows come


def reconstruct(
    model: nn.Module, layers: Mapping[str, Site], run: Rows, targets: Sequence[torch.Tensor]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float, float]:
    """Train the packed linear ``layers`` of one block; the model is left as it was.

    Args:
        layers: of the block, by name; in ``model`` they are packed.
        run: runs the block on rows of the calibration data.
        targets: what it should return, [1, T, C] for each row.

    Returns:
        ({name: (weight to be rounded, float32 [N, K]; its scale, float32 [G, N])}, error before, error after): the
        squared difference from the targets relative to their squares, the mean over tokens, which are of very
        different sizes before the next norm; on rows from all over the data.
    """
    packed = [model.get_submodule(name) for name in layers]
    twins = [_twin(site, module) for site, module in zip(layers.values(), packed, strict=True)]
    try:
        modules.replace(model, dict(zip(packed, twins, strict=True)))
        before = _mean_error(run, targets)
        _train(twins, run, targets)
        after = _mean_error(run, targets)
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


def _train(twins: list[nn.Module], run: Rows, targets: Sequence[torch.Tensor]) -> None:
    at_once, epochs = _at_once(targets), _epochs(targets)
    groups = [{"params": [twin.weight]} for twin in twins]
    rates = [RATE * twin.weight.detach().square().mean().sqrt().item() for twin in twins]
    groups.append({"params": [twin.weight_fake_quant.log2_scale for twin in twins]})
    rates.append(SCALE_RATE)
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=epochs * -(-len(run) // at_once), pct_start=WARMUP, cycle_momentum=False
    )
    # bfloat16 is enough for a straight-through gradient; where it is faster it takes half of the time or a little more.
    halves = cpu_info()["bfloat16"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(run), generator=generator).split(at_once):
            optimizer.zero_grad()
            for part in _of_one_length(rows.tolist(), targets):
                with torch.enable_grad():
                    error = _errors(run, part, targets, halves).sum() / len(rows)
                error.backward(inputs=trained)  # and not norms, which stay as they are
            optimizer.step()
            schedule.step()


def _at_once(targets: Sequence[torch.Tensor]) -> int:
    """Rows of a step."""
    return max(1, STEP // targets[0].shape[1])


def _epochs(targets: Sequence[torch.Tensor]) -> int:
    return min(EPOCHS, max(1, round(SEEN / sum(target.shape[1] for target in targets))))


def _of_one_length(rows: list[int], targets: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """The rows in parts that run together."""

    def length(row: int) -> int:
        return targets[row].shape[1]

    for _, part in itertools.groupby(sorted(rows, key=length), key=length):
        yield list(part)


def _errors(run: Rows, rows: list[int], targets: Sequence[torch.Tensor], halves: bool = False) -> torch.Tensor:
    """Of each of the rows, [R]."""
    target = torch.cat([targets[row] for row in rows])
    with torch.autocast("cpu", torch.bfloat16, enabled=halves or target.dtype != torch.float32):
        hidden = run(rows)
    target = target.float()
    size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((hidden.float() - target).square().sum(-1) / size).mean(-1)


@torch.no_grad()
def _mean_error(run: Rows, targets: Sequence[torch.Tensor]) -> float:
    every = max(1, len(run) * targets[0].shape[1] // MEASURED)
    chosen = torch.arange(0, len(run), every)
    parts = [part for rows in chosen.split(_at_once(targets)) for part in _of_one_length(rows.tolist(), targets)]
    return sum(_errors(run, part, targets).sum().item() for part in parts) / len(chosen)


@torch.no_grad()
def _result(twin: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    weight = twin.weight.t() if isinstance(twin, modules.QATConv1D) else twin.weight
    weight = weight.detach().contiguous()
    return weight, twin.weight_fake_quant.scale(weight).contiguous()
