"""quantize_, prepare_qat_ and convert_: plan and check everything, then replace modules in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from potqat import calibrate, calibrated, modules, ops
from potqat.config import PoTConfig
from potqat.fake_quant import PoTFakeQuantize, check_trainable
from potqat.modules import (
    Packed,
    PackedEmbedding,
    PackedLinear,
    TiedEmbedding,
    TiedLinear,
)
from potqat.plan import Site, check_calibration, check_packable, plan, poor_without_calibration
from potqat.report import Entry, Report, sqnr_db
from potqat.unfinished import Unfinished, work_hash


def quantize_(
    model: nn.Module,
    cfg: PoTConfig,
    calibration: Iterable[torch.Tensor] | None = None,
    *,
    unfinished: str | os.PathLike | None = None,
) -> Report:
    """Post-training quantization: replace every Linear, Conv1D (GPT-2) and Embedding by its packed form, in place.

    A Hugging Face model stays one: ``generate`` and ``save_pretrained`` work as before.

    Args:
        model: any float module on the CPU; tied weights (one Parameter in an embedding and a head) are packed once
            and take ``cfg.embedding_grid``.
        cfg: what to do, and what to skip.
        calibration: batches of token ids, int64 [B, T], of text like that which the model will read; 16,000 tokens or
            more, from all over it. ``scale="output"`` and ``rounding="gptq"`` or ``"reconstruct"`` need it. The model
            must be one that is called with token ids and holds its blocks in an nn.ModuleList, as GPT, GPT-2 and Llama
            do. Blocks are quantized in order, each on what the packed ones before it return; what is held is one
            layer's statistics and two hidden states of every token, and of a block that is reconstructed AdamW's state.
            Beyond 65,536 tokens the statistics are of whole batches from all over the data, and reconstruction sees
            each token less than four times beyond about 150,000.
        unfinished: folder that keeps each calibrated layer until all are done, so that the same call, on the same
            model, goes on where one was stopped; it is deleted at the end. None: keep nothing.

    Returns:
        a Report: what was replaced, what was skipped and why, bytes, error of each layer.

    Raises:
        ValueError: nothing to quantize, a pattern that matches no module, a grid without a packed form, a weight with
            NaN or infinity, calibration that is missing, not asked for, or fails, or an ``unfinished`` folder of
            other work. The model is untouched then.
        OSError: the ``unfinished`` folder cannot be read or written; the model is untouched.
    """
    sites = plan(model, cfg)
    check_packable(sites)
    check_calibration(sites, calibration is not None)
    if calibration is None:
        _check_unfinished(unfinished)
        report = _replace(model, sites, _fake_quant, packed=True)
        report.notes += poor_without_calibration(sites)
    else:
        batches = calibrate.check_batches(calibration)
        kept = None if unfinished is None else Unfinished(Path(unfinished), work_hash(model, cfg, batches))
        with calibrated.restored_on_error(model, sites):
            report = _replace_calibrated(model, sites, batches, kept)
        if kept is not None:
            kept.remove()
    _tell_transformers(model)
    return report


def prepare_qat_(
    model: nn.Module,
    cfg: PoTConfig,
    calibration: Iterable[torch.Tensor] | None = None,
    *,
    unfinished: str | os.PathLike | None = None,
) -> Report:
    """Eager QAT: replace every Linear, Conv1D and Embedding by a twin that fake-quantizes its weight, in place.

    Parameters keep their identity (an optimizer made before stays valid, except for learned scales, which are new
    parameters named ``*.weight_fake_quant.log2_scale``). Train as before, then ``convert_``.

    Args:
        calibration, unfinished: as ``quantize_``, for ``scale="learned"`` with ``scale_init="output"``,
            ``rounding="gptq"`` or ``"reconstruct"``, or both: the weights of linear layers become those that
            ``quantize_`` would pack, in place, and their scales start from its. From there on rounding is to nearest,
            and the modules are those of ``prepare_qat_(model, cfg.without_calibration)``, into which a state_dict of
            them loads.

    Raises:
        ValueError, OSError: as ``quantize_``; any grid is allowed without calibration.
    """
    sites = plan(model, cfg)
    for site in sites:
        if site.cfg is not None:
            _naming(site, check_trainable, site.cfg)
    check_calibration(sites, calibration is not None)
    if calibration is None:
        _check_unfinished(unfinished)
        return _replace(model, sites, _fake_quant, packed=False)
    check_packable(sites)
    batches = calibrate.check_batches(calibration)
    kept = None if unfinished is None else Unfinished(Path(unfinished), work_hash(model, cfg, batches))
    with calibrated.restored_on_error(model, sites) as put_back:
        found = _replace_calibrated(model, sites, batches, kept)
        layers = calibrated.split(sites).layers.values()
        starts = {id(site.module.weight): model.get_submodule(site.name) for site in layers}
        put_back()
    sites = [site if site.cfg is None else replace(site, cfg=site.cfg.without_calibration) for site in sites]

    def fake_quant(site: Site) -> PoTFakeQuantize:
        start = starts.get(id(site.module.weight))
        if start is None:
            return _fake_quant(site)
        new = PoTFakeQuantize(site.weight, site.cfg, site.name, start.scale)
        with torch.no_grad():
            site.weight.copy_(new.start(start.dequantize()))
        return new

    report = _replace(model, sites, fake_quant, packed=False)
    report.entries = [_with_calibration(*pair) for pair in zip(report.entries, found.entries, strict=True)]
    report.notes += found.notes
    if kept is not None:
        kept.remove()
    return report


def convert_(model: nn.Module) -> Report:
    """Replace the QAT modules of ``prepare_qat_`` by packed ones, in place, and set the model to eval mode.

    The packed weights equal the fake-quantized ones of eval mode bit for bit.

    Raises:
        ValueError: the model holds no QAT module, or one on a grid without a packed form. The model is untouched.
    """
    kinds = {twin: kind for kind, twin in modules.TWINS.items()}
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


def _check_unfinished(unfinished: str | os.PathLike | None) -> None:
    if unfinished is not None:
        raise ValueError("potqat: unfinished keeps calibrated layers; give calibration, too")


def _with_calibration(entry: Entry, found: Entry) -> Entry:
    """The entry of a QAT module with the errors that its start has against the float weight."""
    return replace(
        entry, sqnr_db=found.sqnr_db, method=found.method, output_error=found.output_error,
        output_error_nearest=found.output_error_nearest, block_error=found.block_error,
        block_error_before=found.block_error_before,
    )  # fmt: skip


def _replace_calibrated(
    model: nn.Module, sites: list[Site], batches: list[torch.Tensor], kept: Unfinished | None
) -> Report:
    """Pack what has no inputs to go by, then the linear layers with theirs."""
    parts = calibrated.split(sites)
    for site in parts.layers.values():
        _naming(site, ops.compute_scale, site.weight, replace(site.cfg, scale="absmax"))  # NaN, before any work
    later = {site.module for site in (*parts.layers.values(), *parts.tables.values())}
    report = _replace(model, parts.sites, _fake_quant, packed=True, later=later)
    report.entries += calibrated.pack_layers(model, parts, batches, kept)
    order = {site.name: i for i, site in enumerate(sites)}
    report.entries.sort(key=lambda entry: order.get(entry.name, len(order)))
    if smoothed := [entry.name for entry in report.entries if entry.method.endswith("smoothed inputs")]:
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in smoothed))
        report.notes.append(
            f"{len(smoothed)} layers ({leaves}) have smoothed inputs: channels that are large are divided by powers of "
            "two where they are made, and their weights multiplied; the float model's outputs do not change"
        )
    if blocks := {(e.block_error_before, e.block_error) for e in report.entries if e.block_error is not None}:
        first, last = (sum(errors) / len(blocks) for errors in zip(*blocks, strict=True))
        report.notes.append(
            f"{len(blocks)} blocks reconstructed: the squared change of their outputs, relative to the float model's, "
            f"is {last:.3%} on average, {first:.3%} before"
        )
    if parts.plain:
        report.notes.append(
            f"{', '.join(parts.plain)}: scale by least squared error and rounding to nearest: a table without a head, "
            "or a weight that several layers use, is not compensated"
        )
    return report


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
        new = _naming(site, _packed if packed else _twin, site, owner, fake_quant_of)
        replacements[site.module] = new.train(site.module.training)
        owners.setdefault(id(parameter), new)
        after = size
        if packed:
            after = 0 if owner else new.packed_bytes
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


def _naming(site: Site, do: Callable, *args):
    """``do(*args)``, whose errors then name the site."""
    try:
        return do(*args)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


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
    new.sqnr_db = sqnr_db(weight, scale, fake_quant.cfg)
    return new


def _twin(site: Site, owner: nn.Module | None, fake_quant_of: Callable[[Site], PoTFakeQuantize]) -> nn.Module:
    fake_quant = owner.weight_fake_quant if owner is not None else fake_quant_of(site)
    return modules.TWINS[site.kind](site.module, fake_quant, observe=owner is None)


def _error(site: Site, twin: nn.Module) -> float:
    fake_quant, weight = twin.weight_fake_quant, site.weight.detach()
    return sqnr_db(weight, fake_quant.scale(weight), fake_quant.cfg)


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
