"""Outlier channels of a layer's inputs, moved into its weights by way of the module that makes these inputs.

int8 activations are rounded with one step a token, that of its largest value. SmoothQuant (arXiv 2211.10438) divides
the channels of the inputs and multiplies the weights that read them. Here all factors are powers of two: then a float
block returns the same bits as before, in every dtype, which is checked each time, not assumed. Weights that grow are
harder to round, the more so on grids of even levels, so factors are chosen by what both errors do to the outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from potqat import ops
from potqat.calibrate import Rows
from potqat.config import PoTConfig
from potqat.modules import kind_of

SAMPLE, SAMPLE_RUNS = 1024, 16  # tokens that the factors are chosen on, and rows that they are taken from, at most
# A channel of largest value a has the factor a^strength, rounded to a power of two with one of these phases.
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
PHASES = (0.0, 0.5)
LESS = 0.99  # an error must be so much smaller to be better: sums in another order do not decide


@dataclass(frozen=True)
class Smoothing:
    """Channels of one tensor [..., K], divided by ``factors``, float32 [K], powers of two.

    Attributes:
        maker: name of what makes the tensor: a norm, or a linear layer each of whose outputs scales a channel.
        readers: names of the linear layers that read it.
    """

    maker: str
    readers: tuple[str, ...]
    factors: torch.Tensor

    @torch.no_grad()
    def apply(self, floats: Mapping[str, nn.Module], *, undo: bool = False) -> None:
        """Divide the maker's outputs and multiply the readers' weights, in place. ``undo``: the reverse, exactly."""
        factors = self.factors.reciprocal() if undo else self.factors
        for parameter, by in _parameters(self, floats, factors):
            parameter.mul_(by)


def _parameters(smoothing: Smoothing, floats: Mapping[str, nn.Module], factors: torch.Tensor):
    """(Parameter, what it is multiplied with)."""
    for name in smoothing.readers:
        weight = floats[name].weight
        yield weight, (factors[:, None] if kind_of(floats[name]) == "conv1d" else factors).to(weight.dtype)
    for own in floats[smoothing.maker].parameters(recurse=False):
        by = factors.reciprocal().to(own.dtype)
        yield own, by[:, None] if own.dim() == 2 else by


def float_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What smoothing may change, by name: ``layers``, and every norm of ``model`` whose weights no other module has."""
    holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    norms = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and all(p.dim() == 1 and holders[id(p)] == 1 for p in own) and not list(module.children()):
            norms[name] = module
    return norms | dict(layers)


@torch.no_grad()
def smooth(block: str, floats: Mapping[str, nn.Module], readers: Mapping[str, PoTConfig], run: Rows) -> list[Smoothing]:
    """Choose and apply what lowers the error of int8 activations and rounded weights in a block, which then returns the
    same bits as before in float.

    Found are layers that are called on the very tensor that a norm returned, and the ``down_proj`` of a gated MLP,
    whose inputs ``up_proj`` scales (Llama). Others, as behind GPT-2's GELU, have no exact form and are left.

    Args:
        block: its name.
        floats: of float_modules.
        readers: the float linear layers in the block that will have int8 activations, and how they are quantized.
        run: runs the block on rows of the calibration data.
    """
    found = _pairs({n: m for n, m in floats.items() if n.startswith(f"{block}.")}, readers, run)
    if not found:
        return []
    done = []
    for (maker, names), x in zip(found, _sample(found, floats, run), strict=True):
        factors = _choose(x, [(_rows(floats[name]).float(), readers[name]) for name in names])
        smoothing = Smoothing(maker, names, factors)
        if bool((factors != 1).any()) and _is_exact(smoothing, floats, run):
            smoothing.apply(floats)
            done.append(smoothing)
    return done


def _pairs(
    floats: Mapping[str, nn.Module], readers: Mapping[str, PoTConfig], run: Rows
) -> list[tuple[str, tuple[str, ...]]]:
    """(maker, readers) by name, in the order of calls."""
    made: dict[int, tuple[str, torch.Tensor]] = {}
    read: dict[int, tuple[torch.Tensor, list[str]]] = {}

    def before(name, x):
        read.setdefault(id(x), (x, []))[1].append(name)

    def after(name, output):
        if torch.is_tensor(output):
            made[id(output)] = name, output  # the tensors are kept, and so their ids

    norms = {name: module for name, module in floats.items() if kind_of(module) is None}
    with _hooked({name: floats[name] for name in readers}, before), _hooked(norms, after, output=True):
        run([0])
    found = []
    for key, (x, names) in read.items():
        parent, _, leaf = names[0].rpartition(".")
        up = f"{parent}.up_proj"
        if key in made and len(set(names)) == len(names):
            maker = made[key][0]
            if all(p.shape == x.shape[-1:] for p in floats[maker].parameters(recurse=False)):
                found.append((maker, tuple(names)))
        elif leaf == "down_proj" and len(names) == 1 and kind_of(floats.get(up)) == "linear":
            found.append((up, tuple(names)))
    return found


def _sample(found: list, floats: Mapping[str, nn.Module], run: Rows) -> list[torch.Tensor]:
    """The tensor of each pair on SAMPLE tokens from all over the rows, float32 [S, K]."""
    chosen = range(0, len(run), -(-len(run) // SAMPLE_RUNS))
    share = -(-SAMPLE // len(chosen))
    rows: dict[str, list[torch.Tensor]] = {names[0]: [] for _, names in found}

    def before(name, x):
        x = x.detach().flatten(0, -2)
        rows[name].append(x[:: max(1, len(x) // share)][:share].float())

    with _hooked({name: floats[name] for name in rows}, before):
        for row in chosen:
            run([row])
    return [torch.cat(parts) for parts in rows.values()]


def _choose(x: torch.Tensor, layers: list[tuple[torch.Tensor, PoTConfig]]) -> torch.Tensor:
    """The factors [K] of least squared error of the outputs of ``layers``, weights [N, K] and how they are quantized,
    on x [S, K]; at worst ones."""
    largest = x.abs().amax(0)
    exponent = largest.log2()
    alive = largest > 0
    exponent = torch.where(alive, exponent - exponent[alive].median() if alive.any() else 0.0, 0.0)
    best = torch.ones_like(largest)
    outputs = [x @ weight.t() for weight, _ in layers]
    least = _error(x, layers, outputs, best)
    for strength in STRENGTHS:
        for phase in PHASES:
            factors = torch.exp2((strength * exponent + phase).floor().clamp(-14, 14))
            if (error := _error(x, layers, outputs, factors)) < LESS * least:
                best, least = factors, error
    return best


def _error(
    x: torch.Tensor, layers: list[tuple[torch.Tensor, PoTConfig]], outputs: list[torch.Tensor], factors: torch.Tensor
) -> float:
    """With weights rounded to nearest, on scales that suit the outputs: error compensation comes later."""
    divided, error = x / factors, 0.0
    importance, inputs = divided.square().mean(0), rounded(divided)
    for (weight, cfg), exact in zip(layers, outputs, strict=True):
        cfg = PoTConfig(grid=cfg.grid, granularity=cfg.granularity, scale="output")
        grown = weight * factors
        w_hat = ops.fake_quantize(grown, ops.compute_scale(grown, cfg, importance), cfg)
        error += (inputs @ w_hat.t() - exact).square_().sum(dtype=torch.float64).item()
    return error


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [S, K] through int8 and back, as the kernel sees it: a step a token, half to even."""
    step = x.abs().amax(-1, keepdim=True).div_(127)
    step[step == 0] = 1
    return (x / step).round_().mul_(step)


def _is_exact(smoothing: Smoothing, floats: Mapping[str, nn.Module], run: Rows) -> bool:
    """Whether the block returns the same bits with it, and every Parameter comes back from it; nothing is changed."""
    before = [p.clone() for p, _ in _parameters(smoothing, floats, smoothing.factors)]
    expected = run([0])
    smoothing.apply(floats)
    same = torch.equal(run([0]), expected)
    smoothing.apply(floats, undo=True)
    after = [p for p, _ in _parameters(smoothing, floats, smoothing.factors)]
    back = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for parameter, old in zip(after, before, strict=True):
        parameter.copy_(old)
    return same and back


def _rows(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, [N, K]."""
    return layer.weight.t() if kind_of(layer) == "conv1d" else layer.weight


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], see: Callable[[str, object], None], *, output: bool = False):
    """While it lasts, ``see(name, x)`` for what each module is called with, or returns."""
    hooks = []
    for name, module in modules.items():
        if output:
            hooks.append(module.register_forward_hook(lambda _, args, out, name=name: see(name, out)))
        else:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: see(name, args[0] if args else next(iter(kwargs.values()))),
                    with_kwargs=True,
                )
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
