"""quantize_, prepare_qat_ and convert_: find the modules, check the whole plan, then replace in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from potqat import ops
from potqat.config import PoTConfig, matches
from potqat.fake_quant import PoTFakeQuantize
from potqat.modules import PackedEmbedding, PackedLinear, QATEmbedding, QATLinear
from potqat.report import Entry, Report

KINDS = {nn.Linear: "linear", nn.Embedding: "embedding"}


@dataclass(frozen=True)
class Site:
    """One module that holds a quantizable weight. ``cfg`` None: left float, ``reason`` says why."""

    name: str
    module: nn.Module
    kind: str
    cfg: PoTConfig | None
    reason: str = ""


def quantize_(model: nn.Module, cfg: PoTConfig) -> Report:
    """Post-training quantization: replace every Linear and Embedding by its packed form, in place.

    Args:
        model: any float module on the CPU; tied weights (one Parameter in an embedding and a head) are packed once
            and take ``cfg.embedding_grid``.
        cfg: what to do, and what to skip.

    Returns:
        a Report: what was replaced, what was skipped and why, bytes, error of each layer.

    Raises:
        ValueError: nothing to quantize, a pattern that matches no module, a grid without a packed form, or a
            weight with NaN or infinity. The model is untouched then.
    """
    sites = plan(model, cfg)
    _check_packable(sites)
    return _replace(model, sites, lambda site, weight: PoTFakeQuantize(weight, site.cfg, site.name), packed=True)


def prepare_qat_(model: nn.Module, cfg: PoTConfig) -> Report:
    """Eager QAT: replace every Linear and Embedding by a twin that fake-quantizes its weight, in place.

    Parameters keep their identity (an optimizer made before stays valid, except for learned scales, which are new
    parameters named ``*.weight_fake_quant.log2_scale``). Train as before, then ``convert_``.

    Raises:
        ValueError: as ``quantize_``; any grid is allowed.
    """
    sites = plan(model, cfg)
    return _replace(model, sites, lambda site, weight: PoTFakeQuantize(weight, site.cfg, site.name), packed=False)


def convert_(model: nn.Module) -> Report:
    """Replace the QAT modules of ``prepare_qat_`` by packed ones, in place, and set the model to eval mode.

    The packed weights equal the fake-quantized ones of eval mode bit for bit.

    Raises:
        ValueError: the model holds no QAT module, or one on a grid without a packed form. The model is untouched.
    """
    sites = [
        Site(name, module, "linear" if isinstance(module, QATLinear) else "embedding", module.weight_fake_quant.cfg)
        for name, module in model.named_modules()
        if isinstance(module, QATLinear | QATEmbedding)
    ]
    if not sites:
        raise ValueError("potqat.convert_: the model holds no QAT module; call prepare_qat_ first")
    _check_packable(sites)
    report = _replace(model, sites, lambda site, weight: site.module.weight_fake_quant, packed=True)
    model.eval()
    return report


def plan(model: nn.Module, cfg: PoTConfig) -> list[Site]:
    """Every module that could be quantized, in model order, with its resolved configuration or why not.

    Raises:
        ValueError: nothing to quantize, or a ``skip`` or ``overrides`` pattern that matches none of them.
    """
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, tuple(KINDS))]
    check_patterns(cfg, [name for name, _ in modules])
    tables = {id(m.weight): name for name, m in modules if isinstance(m, nn.Embedding)}
    sites = [_site(name, module, cfg, tables.get(id(module.weight))) for name, module in modules]
    if not any(site.cfg for site in sites):
        why = "; ".join(f"{s.name}: {s.reason}" for s in sites[:4]) or "it has no Linear or Embedding"
        raise ValueError(f"potqat: nothing to quantize in {type(model).__name__} ({why})")
    return sites


def _site(name: str, module: nn.Module, cfg: PoTConfig, table: str | None) -> Site:
    kind = next(kind for cls, kind in KINDS.items() if isinstance(module, cls))
    if type(module) not in KINDS:
        return Site(name, module, kind, None, f"{type(module).__name__} is a subclass with its own use of the weight")
    if kind == "embedding" and module.max_norm is not None:
        return Site(name, module, kind, None, "max_norm rewrites the table at each lookup")
    return Site(name, module, kind, *resolve(name, cfg, table))


def check_patterns(cfg: PoTConfig, names: list[str]) -> None:
    """Raise for a ``skip`` or ``overrides`` pattern that matches none of the quantizable modules ``names``."""
    for pattern in (*cfg.skip, *cfg.overrides):
        if not any(matches(pattern, name) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"PoTConfig: pattern {pattern!r} matches no quantizable module; they are: {shown}")


def resolve(name: str, cfg: PoTConfig, table: str | None) -> tuple[PoTConfig | None, str]:
    """The configuration of module ``name``, or None and the reason why it stays float.

    A head tied to an embedding is the embedding's table: ``table`` names it and gives the configuration.
    """
    if pattern := cfg.skips(name):
        return None, f"matches skip pattern {pattern!r}"
    resolved = cfg.at(table or name, embedding=table is not None)
    return resolved, "" if resolved else "embedding_grid is None"


def _check_packable(sites: list[Site]) -> None:
    for site in sites:
        if site.cfg is not None:
            try:
                ops.check_packable("pack", site.cfg.grid)
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from None


def _replace(
    model: nn.Module, sites: list[Site], fake_quant_of: Callable[[Site, torch.Tensor], PoTFakeQuantize], packed: bool
) -> Report:
    """Build every replacement first (all errors come here), then put them in."""
    report, made, replacements, counted = Report(), {}, {}, set()
    for site in sites:
        weight = site.module.weight
        before = 0 if id(weight) in counted else weight.numel() * weight.element_size()
        counted.add(id(weight))
        entry = {"name": site.name, "kind": site.kind, "shape": tuple(weight.shape), "bytes_before": before}
        if site.cfg is None:
            report.entries.append(Entry(**entry, action="skipped", reason=site.reason, bytes_after=before))
            continue
        first = id(weight) not in made
        try:
            if first:
                fake_quant = fake_quant_of(site, weight)
                made[id(weight)] = fake_quant, fake_quant.pack(weight) if packed else (None, None)
            fake_quant, (codes, scale) = made[id(weight)]
            with torch.no_grad():
                w_hat = ops.fake_quantize(weight, fake_quant.scale(weight), fake_quant.cfg)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        replacements[site.name] = _replacement(site, fake_quant, first, codes, scale)
        after = codes.numel() + 4 * scale.numel() if packed and first else 0 if packed else before
        report.entries.append(
            Entry(**entry, action="quantized", reason="" if first else "tied: packed once", grid=fake_quant.cfg.grid,
                  granularity=fake_quant.cfg.granularity, bytes_after=after, sqnr_db=sqnr_db(weight, w_hat))
        )  # fmt: skip
    for site in sites:
        if site.cfg is None and id(site.module.weight) in made:
            report.notes.append(f"{site.name} is tied to a quantized weight but was skipped: its float copy stays")
    for name, module in replacements.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return report


def _replacement(site, fake_quant, first, codes, scale) -> nn.Module:
    module = site.module
    if codes is None:
        twin = QATLinear if site.kind == "linear" else QATEmbedding
        return twin(module, fake_quant, observe=first)
    shape = tuple(module.weight.shape)
    if site.kind == "linear":
        new = PackedLinear(codes, scale, module.bias, fake_quant.cfg, shape)
    else:
        new = PackedEmbedding(codes, scale, fake_quant.cfg, shape, module.weight.dtype)
    return new.train(module.training)


def sqnr_db(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - w_hat)^2), in dB; inf if exact."""
    w, w_hat = w.detach().double(), w_hat.detach().double()
    noise = (w - w_hat).square().sum().item()
    return 10 * math.log10(w.square().sum().item() / noise) if noise else math.inf
