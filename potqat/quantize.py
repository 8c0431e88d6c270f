"""quantize_, prepare_qat_ and convert_: find the modules, check the whole plan, then replace in place."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from potqat import calibrate, gptq, modules, ops
from potqat.config import PoTConfig, matches
from potqat.fake_quant import PoTFakeQuantize
from potqat.modules import (
    KINDS,
    Packed,
    PackedEmbedding,
    PackedLinear,
    QATConv1D,
    QATEmbedding,
    QATLinear,
    TiedEmbedding,
    TiedLinear,
    kind_of,
)
from potqat.report import Entry, Report

CHUNK = 1 << 16  # weights whose error is computed at a time: they stay in the cache, and leave no holes in the heap
TWINS = {"linear": QATLinear, "conv1d": QATConv1D, "embedding": QATEmbedding}


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


def quantize_(model: nn.Module, cfg: PoTConfig, calibration: Iterable[torch.Tensor] | None = None) -> Report:
    """Post-training quantization: replace every Linear, Conv1D (GPT-2) and Embedding by its packed form, in place.

    A Hugging Face model stays one: ``generate`` and ``save_pretrained`` work as before.

    Args:
        model: any float module on the CPU; tied weights (one Parameter in an embedding and a head) are packed once
            and take ``cfg.embedding_grid``.
        cfg: what to do, and what to skip.
        calibration: batches of token ids, int64 [B, T], of text like that which the model will read; 16,000 tokens are
            plenty. ``scale="output"`` and ``rounding="gptq"`` need it. The model must be one that is called with
            token ids and holds its blocks in an nn.ModuleList, as GPT, GPT-2 and Llama do. Blocks are quantized in
            order, each on what the packed ones before it return; one block's statistics and the hidden states of all
            tokens are held.

    Returns:
        a Report: what was replaced, what was skipped and why, bytes, error of each layer.

    Raises:
        ValueError: nothing to quantize, a pattern that matches no module, a grid without a packed form, a weight with
            NaN or infinity, or calibration that is missing, not asked for, or fails. The model is untouched then.
    """
    sites = plan(model, cfg)
    check_packable(sites)
    check_calibration(sites, calibration is not None)
    if calibration is None:
        report = _replace(model, sites, _fake_quant, packed=True)
        report.notes += _poor_without_calibration(sites)
    else:
        batches = calibrate.check_batches(calibration)
        with _restored_on_error(model, sites):
            report = _replace_calibrated(model, sites, batches)
    _tell_transformers(model)
    return report


def prepare_qat_(model: nn.Module, cfg: PoTConfig) -> Report:
    """Eager QAT: replace every Linear, Conv1D and Embedding by a twin that fake-quantizes its weight, in place.

    Parameters keep their identity (an optimizer made before stays valid, except for learned scales, which are new
    parameters named ``*.weight_fake_quant.log2_scale``). Train as before, then ``convert_``.

    Raises:
        ValueError: as ``quantize_``; any grid is allowed.
    """
    sites = plan(model, cfg)
    return _replace(model, sites, _fake_quant, packed=False)


def convert_(model: nn.Module) -> Report:
    """Replace the QAT modules of ``prepare_qat_`` by packed ones, in place, and set the model to eval mode.

    The packed weights equal the fake-quantized ones of eval mode bit for bit.

    Raises:
        ValueError: the model holds no QAT module, or one on a grid without a packed form. The model is untouched.
    """
    kinds = {twin: kind for kind, twin in TWINS.items()}
    sites = [
        Site(name, module, kinds[type(module)], module.weight_fake_quant.cfg)
        for name, module in model.named_modules()
        if type(module) in kinds
    ]
    if not sites:
        raise ValueError("potqat.convert_: the model holds no QAT module; call prepare_qat_ first")
    check_packable(sites)
    report = _replace(model, sites, lambda site: site.module.weight_fake_quant, packed=True)
    _tell_transformers(model)
    model.eval()
    return report


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
        what = "rounding='gptq'" if cfg.rounding == "gptq" else "scale='output'"
        raise ValueError(
            f"potqat.quantize_: {needing[0].name}: {what} needs calibration data; pass calibration=[int64 [B, T] token "
            "ids, ...], or use scale='mse' and rounding='nearest'"
        )
    if given and not needing:
        raise ValueError(
            "potqat.quantize_: calibration is given, and nothing uses it; set rounding='gptq', scale='output' or both"
        )


def _poor_without_calibration(sites: list[Site]) -> list[str]:
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


def _replace_calibrated(model: nn.Module, sites: list[Site], batches: list[torch.Tensor]) -> Report:
    """Pack what has no inputs to go by, then the linear layers with theirs, block by block."""
    uses = Counter(id(site.module.weight) for site in sites)
    chosen, first, plain = {}, [], []
    for site in sites:
        if site.cfg is not None and site.cfg.needs_calibration:
            if site.kind != "embedding" and uses[id(site.module.weight)] == 1:
                chosen[site.module] = site
            else:
                plain.append(site.name)
                site = replace(site, cfg=site.cfg.without_calibration)
        first.append(site)
    for site in chosen.values():
        _refuse(site, ops.compute_scale, site.weight, replace(site.cfg, scale="absmax"))  # NaN, before any work
    report = _replace(model, first, _fake_quant, packed=True, later=chosen)
    if plain:
        report.notes.append(
            f"{', '.join(plain)}: scale by least squared error and rounding to nearest: a table, or a weight that "
            "several modules use, is not compensated"
        )
    entries = {entry.name: entry for entry in report.entries}
    for inputs in calibrate.walk(model, batches, chosen):
        for layer in inputs.layers:
            site = chosen[layer]
            if not inputs.moment.isfinite().all():
                raise ValueError(
                    f"{site.name}: its inputs hold NaN or infinity on the calibration data; check the model"
                )
            new, entries[site.name] = _calibrated(site, inputs)
            modules.replace(model, {layer: new})
    order = {site.name: i for i, site in enumerate(sites)}
    report.entries = sorted(entries.values(), key=lambda entry: order.get(entry.name, len(order)))
    return report


def _calibrated(site: Site, inputs: calibrate.Inputs) -> tuple[PackedLinear, Entry]:
    cfg, weight = site.cfg, site.weight.detach()
    importance = inputs.moment.diagonal().float() if cfg.scale == "output" else None
    scale = ops.compute_scale(weight, cfg, importance)
    source = gptq.compensate(weight, scale, inputs.moment, cfg) if cfg.rounding == "gptq" else weight
    new = PackedLinear(ops.pack(source, scale, cfg), scale, getattr(site.module, "bias", None), cfg, weight.shape)
    new.sqnr_db = sqnr_db(weight, source, scale, cfg)
    default = replace(cfg, scale="absmax", rounding="nearest")
    plain = ops.fake_quantize(weight.float(), ops.compute_scale(weight, default), default)
    entry = Entry(
        site.name, site.kind, tuple(weight.shape), "quantized", grid=cfg.grid, granularity=cfg.granularity,
        reason="" if inputs.count else "no calibration token reached it: rounded to nearest",
        bytes_before=weight.numel() * weight.element_size(), bytes_after=_packed_bytes(new), sqnr_db=new.sqnr_db,
        method=f"scale={cfg.scale}, rounding={cfg.rounding}",
        output_error=gptq.output_error(weight, new.dequantize(), inputs.moment),
        output_error_nearest=gptq.output_error(weight, plain, inputs.moment),
    )  # fmt: skip
    return new, entry


@contextmanager
def _restored_on_error(model: nn.Module, sites: list[Site]) -> Iterator[None]:
    """Eval mode while it lasts; afterwards every module is in the mode that it or its float form had, and after an
    error the float modules are back."""
    training = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    floats = {site.module for site in sites}
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m in floats]
    model.eval()
    try:
        yield
    except BaseException:
        for name, module in places:
            modules.put(model, name, module)
        raise
    finally:
        for name, module in model.named_modules(remove_duplicate=False):
            module.training = training[name]


def _replace(
    model: nn.Module,
    sites: list[Site],
    fake_quant_of: Callable[[Site], PoTFakeQuantize],
    packed: bool,
    later: Collection[nn.Module] = (),
) -> Report:
    """Build every replacement first (all errors come here), then put them in; ``later``: modules to pass over."""
    report, replacements, owners = Report(), {}, {}
    counted: set[int] = set()
    for site in tqdm(sites, "pack" if packed else "prepare", delay=2, leave=False, unit="layer"):
        parameter, weight = site.module.weight, site.weight.detach()
        size = 0 if id(parameter) in counted else weight.numel() * weight.element_size()
        counted.add(id(parameter))
        if site.module in later:
            continue
        entry = {"name": site.name, "kind": site.kind, "shape": tuple(weight.shape), "bytes_before": size}
        if site.cfg is None:
            report.entries.append(Entry(**entry, action="skipped", reason=site.reason, bytes_after=size))
            continue
        owner = owners.get(id(parameter))
        new = _refuse(site, _packed if packed else _twin, site, owner, fake_quant_of)
        replacements[site.module] = new.train(site.module.training)
        owners.setdefault(id(parameter), new)
        after = size
        if packed:
            after = 0 if owner else _packed_bytes(new)
        cfg, error = (new.cfg, new.sqnr_db) if packed else (new.weight_fake_quant.cfg, _error(site, new))
        report.entries.append(
            Entry(**entry, action="quantized", reason="tied: packed once" if owner else "", grid=cfg.grid,
                  granularity=cfg.granularity, bytes_after=after, sqnr_db=error)
        )  # fmt: skip
    for site in sites:
        if site.cfg is None and id(site.module.weight) in owners:
            report.notes.append(f"{site.name} is tied to a quantized weight but was skipped: its float copy stays")
    report.entries += _left_float(model, counted)
    modules.replace(model, replacements)
    return report


def _refuse(site: Site, do: Callable, *args):
    """``do(*args)``, whose errors then name the site."""
    try:
        return do(*args)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


def _packed_bytes(new: Packed) -> int:
    return new.packed.numel() + new.scale.numel() * new.scale.element_size()


def _fake_quant(site: Site) -> PoTFakeQuantize:
    return PoTFakeQuantize(site.weight, site.cfg, site.name)


def _tell_transformers(model: nn.Module) -> None:
    """Give a Hugging Face model its quantizer, which save_pretrained asks how to write it."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from potqat import hf

        hf.attach(model)


def _packed(site: Site, owner: Packed | None, fake_quant_of: Callable[[Site], PoTFakeQuantize]) -> Packed:
    embedding, bias = site.kind == "embedding", getattr(site.module, "bias", None)
    if owner is not None:
        return TiedEmbedding(owner, owner.cfg, site.weight.dtype) if embedding else TiedLinear(owner, bias, owner.cfg)
    fake_quant, weight = fake_quant_of(site), site.weight.detach()
    codes, scale = fake_quant.pack(weight)
    if embedding:
        new = PackedEmbedding(codes, scale, fake_quant.cfg, weight.shape, weight.dtype)
    else:
        new = PackedLinear(codes, scale, bias, fake_quant.cfg, weight.shape)
    new.sqnr_db = sqnr_db(weight, weight, scale, fake_quant.cfg)
    return new


def _twin(site: Site, owner: nn.Module | None, fake_quant_of: Callable[[Site], PoTFakeQuantize]) -> nn.Module:
    fake_quant = owner.weight_fake_quant if owner is not None else fake_quant_of(site)
    return TWINS[site.kind](site.module, fake_quant, observe=owner is None)


def _error(site: Site, twin: nn.Module) -> float:
    fake_quant, weight = twin.weight_fake_quant, site.weight.detach()
    return sqnr_db(weight, weight, fake_quant.scale(weight), fake_quant.cfg)


def _left_float(model: nn.Module, counted: set[int]) -> list[Entry]:
    """Entries of the float Parameters with two or more dimensions that no site holds."""
    entries = []
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.is_floating_point() and id(parameter) not in counted:
                counted.add(id(parameter))
                size = parameter.numel() * parameter.element_size()
                name = f"{path}.{leaf}".removeprefix(".")
                entries.append(
                    Entry(name, "parameter", tuple(parameter.shape), "skipped",
                          f"{type(module).__name__} has no packed form", bytes_before=size, bytes_after=size)
                )  # fmt: skip
    return entries


@torch.no_grad()
def sqnr_db(w: torch.Tensor, source: torch.Tensor, scale: torch.Tensor, cfg: PoTConfig) -> float:
    """Signal to quantization noise of w [N, K], 10 log10(sum w^2 / sum (w - w_hat)^2), in dB; inf if exact.

    ``w_hat`` is the fake-quantized ``source`` [N, K]: w itself, or w with errors compensated."""
    signal = noise = 0.0
    rows = max(1, CHUNK // max(1, w.shape[1]))
    for part, of, part_scale in zip(w.split(rows), source.split(rows), scale.split(rows, dim=1), strict=True):
        part = part.float()
        signal += part.square().sum(dtype=torch.float64).item()
        noise += (part - ops.fake_quantize(of.float(), part_scale, cfg)).square_().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf
