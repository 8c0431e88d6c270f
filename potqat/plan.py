"""Which modules of a model are quantized and how, or why not: known, and checked, before anything is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from potqat import ops
from potqat.config import PoTConfig, matches
from potqat.modules import KINDS, kind_of


@dataclass(frozen=True)
class Site:
    """One module that holds a quantizable weight. ``cfg`` None: left float, ``reason`` says why.

    ``kind`` is "linear", "conv1d" (Hugging Face's Conv1D: a Linear with its weight stored [K, N]) or "embedding".
    """

    name: str
    module: nn.Module
    kind: str
    cfg: PoTConfig | None
    reason: str = ""

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], as the packer sees it."""
        return self.module.weight.t() if self.kind == "conv1d" else self.module.weight


def plan(model: nn.Module, cfg: PoTConfig) -> list[Site]:
    """Every module that could be quantized, in model order, with its resolved configuration or why not.

    Raises:
        ValueError: nothing to quantize, or a ``skip`` or ``overrides`` pattern that matches none of them.
    """
    if kind_of(model):
        raise ValueError(f"potqat: a bare {type(model).__name__} cannot be replaced in place; put it in a module")
    holders = [(name, m, kind) for name, m in model.named_modules() if (kind := kind_of(m))]
    check_patterns(cfg, [name for name, *_ in holders])
    tables = {id(m.weight): name for name, m, kind in holders if kind == "embedding"}
    # A weight that is stored [K, N] here and [N, K] there cannot be packed for both.
    transposed = {id(m.weight): name for name, m, kind in holders if kind == "conv1d"}
    sites = []
    for name, module, kind in holders:
        other = transposed.get(id(module.weight)) if kind != "conv1d" else None
        sites.append(_site(name, module, kind, cfg, tables.get(id(module.weight)), other))
    if not any(site.cfg for site in sites):
        why = "; ".join(f"{s.name}: {s.reason}" for s in sites[:4]) or "it has no Linear, Conv1D or Embedding"
        raise ValueError(f"potqat: nothing to quantize in {type(model).__name__} ({why})")
    return sites


def _site(name: str, module: nn.Module, kind: str, cfg: PoTConfig, table: str | None, transposed: str | None) -> Site:
    if kind != "conv1d" and type(module) not in KINDS:
        return Site(name, module, kind, None, f"{type(module).__name__} is a subclass with its own use of the weight")
    if kind == "embedding" and module.max_norm is not None:
        return Site(name, module, kind, None, "max_norm rewrites the table at each lookup")
    if transposed:
        return Site(name, module, kind, None, f"tied to {transposed}, which uses the weight transposed")
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


def check_packable(sites: list[Site]) -> None:
    """Raise for a module on a grid without a packed form."""
    for site in sites:
        if site.cfg is not None:
            try:
                ops.check_packable("pack", site.cfg.grid)
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from None


def check_calibration(sites: list[Site], given: bool) -> None:
    """Raise where calibration data is needed and not given, or given and of no use."""
    needing = [site for site in sites if site.cfg is not None and site.cfg.needs_calibration]
    if needing and not given:
        cfg = needing[0].cfg
        what = f"rounding={cfg.rounding!r}" if cfg.compensates else "scale='output'"
        raise ValueError(
            f"potqat: {needing[0].name}: {what} needs calibration data; pass calibration=[int64 [B, T] token "
            "ids, ...], or use scale='mse' and rounding='nearest'"
        )
    if given and not needing:
        raise ValueError(
            "potqat: calibration is given, and nothing uses it; set rounding='gptq', scale='output' or both"
        )


def poor_without_calibration(sites: list[Site]) -> list[str]:
    """A note if linear weights are on a grid and granularity that lose much by rounding alone."""
    coarse = [
        site
        for site in sites
        if site.cfg is not None and site.kind != "embedding" and site.cfg.grid == "pot4" and not site.cfg.group_size
    ]
    if not coarse:
        return []
    more = f" and {len(coarse) - 1} more" if coarse[1:] else ""
    return [
        f"{coarse[0].name}{more}: pot4 with one scale a {coarse[0].cfg.granularity} loses much without calibration "
        "(SmolLM2-135M: perplexity x 3); pass calibration= with rounding='gptq', take granularity=32 or grid='e2m1', "
        "or train"
    ]
