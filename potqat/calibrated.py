"""Linear layers packed with what calibration knows of their inputs: scales that suit them, errors compensated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from potqat import calibrate, gptq, modules, ops, smooth
from potqat.modules import PackedEmbedding, PackedLinear, TiedLinear
from potqat.plan import Site
from potqat.reconstruct import reconstruct
from potqat.report import Entry, sqnr_db
from potqat.unfinished import Unfinished


@dataclass(frozen=True)
class Split:
    """What calibration packs, and what it does not.

    Attributes:
        layers: linear layers to calibrate, by their names; among them heads tied to a table.
        tables: of these heads, by their names, the embedding.
        sites: all, where those that need calibration and have no inputs of their own to go by take the closest
            configuration without.
        plain: the names of these.
    """

    layers: dict[str, Site]
    tables: dict[str, Site]
    sites: list[Site]
    plain: list[str]


def split(sites: list[Site]) -> Split:
    """Say for each site how it is packed."""
    users: dict[int, list[Site]] = {}
    for site in sites:
        users.setdefault(id(site.module.weight), []).append(site)
    found = Split({}, {}, [], [])
    for site in sites:
        if site.cfg is not None and site.cfg.needs_calibration:
            alike = {user.kind: user for user in users[id(site.module.weight)] if user.cfg is not None}
            count = len(users[id(site.module.weight)])
            tied = count == 2 and alike.keys() == {"embedding", "linear"}
            if tied and site.kind == "linear":
                found.tables[site.name] = alike["embedding"]
            if site.kind != "embedding" and (tied or count == 1):
                found.layers[site.name] = site
            elif not tied:
                found.plain.append(site.name)
                site = replace(site, cfg=site.cfg.without_calibration)
        found.sites.append(site)
    return found


def pack_layers(model: nn.Module, parts: Split, batches: list[torch.Tensor], kept: Unfinished | None) -> list[Entry]:
    """Replace the layers of ``parts`` by packed ones, block by block, each calibrated on a model that holds those
    before it; tables with the heads that are tied to them, at the end.

    Args:
        kept: where finished layers are kept and taken from.

    Raises:
        ValueError: the model does not run on the batches, or a layer's inputs hold NaN or infinity.
    """
    sites, tables = parts.layers, parts.tables
    floats = {name: site.module for name, site in sites.items()}
    to_learn = [name for name, site in sites.items() if site.cfg.rounding == "reconstruct"]
    learning: dict[str, Site] = {}  # layers of the block that is at work, if it is to be learned
    entries: dict[str, Entry] = {}

    def put(name: str, new: PackedLinear) -> None:
        replacements: dict[nn.Module, nn.Module] = {model.get_submodule(name): new}
        if name in tables:
            table = tables[name].module
            owner = PackedEmbedding(new.packed, new.scale, new.cfg, new.shape, table.weight.dtype)
            owner.sqnr_db = new.sqnr_db
            replacements = {table: owner, model.get_submodule(name): TiedLinear(owner, new.bias, new.cfg)}
        modules.replace(model, replacements)

    def finish(name: str, new: PackedLinear, entry: Entry) -> None:
        put(name, new)
        entries[name] = entry
        if kept is not None and (name not in learning or entry.block_error is not None):
            kept.save(name, new, entry)

    def before(block: str, run: calibrate.Rows) -> None:
        inside = {name: sites[name] for name in to_learn if name.startswith(f"{block}.")}
        if any(name not in entries for name in inside):  # of a block that is learned as a whole nothing is finished
            learning.update(inside)
            for name in inside:
                modules.replace(model, {model.get_submodule(name): floats[name]})
        smooth_block(block, run)

    def after(block: str, run: calibrate.Rows, targets: list[torch.Tensor]) -> None:
        if learning:
            for name, (new, entry) in _reconstructed(model, learning, entries, run, targets).items():
                finish(name, new, entry)
            learning.clear()

    with _smoothing(model, sites, kept) as (smooth_block, smoothed):
        for name, site in sites.items():
            if kept is not None and (found := kept.load(name)):
                tensors, entries[name] = found
                put(name, _packed(site, tensors["packed"], tensors["scale"], entries[name].sqnr_db))
        for inputs in calibrate.walk(model, batches, floats, before, after if to_learn else None):
            for name in inputs.names:
                if not inputs.moment.isfinite().all():
                    raise ValueError(f"{name}: its inputs hold NaN or infinity in calibration; check the model")
                if name in tables:  # what maps the inputs of the head to others must not change the embedding
                    inputs = replace(inputs, drift=torch.zeros_like(inputs.drift))
                finish(name, *_calibrated(sites[name], inputs, name in smoothed))
    for name, table in tables.items():
        entries[table.name] = replace(entries[name], name=table.name, kind=table.kind)
        entries[name] = replace(entries[name], reason="tied: packed once", bytes_before=0, bytes_after=0)
    return list(entries.values())


@contextmanager
def _smoothing(
    model: nn.Module, sites: dict[str, Site], kept: Unfinished | None
) -> Iterator[tuple[Callable[[str, calibrate.Rows], None], set[str]]]:
    """(what smooths a block before it is calibrated, names of the layers that read something smoothed so far). The
    blocks that ``kept`` knows of are smoothed at once; after an error all are as they were."""
    floats = smooth.float_modules(model, {name: site.module for name, site in sites.items()})
    int8 = {name: site.cfg for name, site in sites.items() if site.cfg.activations == "int8"}
    known = {} if kept is None else kept.load_smoothings()
    applied: list[smooth.Smoothing] = []
    readers: set[str] = set()

    def note(smoothings: list[smooth.Smoothing]) -> None:
        applied.extend(smoothings)
        readers.update(name for smoothing in smoothings for name in smoothing.readers)

    def before(block: str, run: calibrate.Rows) -> None:
        inside = {name: cfg for name, cfg in int8.items() if name.startswith(f"{block}.")}
        if block in known or not inside:
            return
        note(smooth.smooth(block, floats, inside, run))
        if kept is not None:
            kept.save_smoothings(block, [smoothing for smoothing in applied if smoothing.readers[0] in inside])

    try:
        for smoothings in known.values():
            for smoothing in smoothings:
                smoothing.apply(floats)
            note(smoothings)
        yield before, readers
    except BaseException:
        for smoothing in applied:
            smoothing.apply(floats, undo=True)
        raise


def _calibrated(site: Site, inputs: calibrate.Inputs, smoothed: bool = False) -> tuple[PackedLinear, Entry]:
    cfg, weight = site.cfg, site.weight.detach()
    importance = inputs.moment.diagonal().float() if cfg.weighs_outputs else None
    scale = ops.compute_scale(weight, cfg, importance)
    source = weight
    if cfg.compensates:
        source = gptq.compensate(gptq.corrected(weight, inputs.moment, inputs.drift), scale, inputs.moment, cfg)
    new = _packed(site, ops.pack(source, scale, cfg), scale, sqnr_db(weight, scale, cfg, source))
    default = replace(cfg, scale="absmax", rounding="nearest")
    plain = ops.fake_quantize(weight.float(), ops.compute_scale(weight, default), default)
    entry = Entry(
        site.name, site.kind, tuple(weight.shape), "quantized", grid=cfg.grid, granularity=cfg.granularity,
        reason="" if inputs.count else "no calibration token reached it: rounded to nearest",
        bytes_before=weight.numel() * weight.element_size(), bytes_after=new.packed_bytes, sqnr_db=new.sqnr_db,
        method=f"scale={cfg.scale}, rounding={cfg.rounding}" + ", smoothed inputs" * smoothed,
        output_error=gptq.output_error(weight, new.dequantize(), inputs.moment),
        output_error_nearest=gptq.output_error(weight, plain, inputs.moment),
    )  # fmt: skip
    return new, entry


def _reconstructed(
    model: nn.Module,
    sites: dict[str, Site],
    entries: dict[str, Entry],
    run: calibrate.Rows,
    targets: list[torch.Tensor],
) -> dict[str, tuple[PackedLinear, Entry]]:
    """The layers ``sites`` of a block, with the scales and the weights that they have learned together."""
    learned, before, after = reconstruct(model, sites, run, targets)
    found = {}
    for name, (weight, scale) in learned.items():
        site = sites[name]
        sqnr = sqnr_db(site.weight.detach(), scale, site.cfg, weight)
        entry = replace(
            entries[name], sqnr_db=sqnr, output_error=None, output_error_nearest=None, block_error=after,
            block_error_before=before,
        )  # fmt: skip
        found[name] = _packed(site, ops.pack(weight, scale, site.cfg), scale, sqnr), entry
    return found


def _packed(site: Site, codes: torch.Tensor, scale: torch.Tensor, sqnr: float | None) -> PackedLinear:
    new = PackedLinear(codes, scale, getattr(site.module, "bias", None), site.cfg, site.weight.shape)
    new.sqnr_db = sqnr
    return new


@contextmanager
def restored_on_error(model: nn.Module, sites: list[Site]) -> Iterator[Callable[[], None]]:
    """Eval mode while it lasts; afterwards every module is in the mode that it or its float form had, and after an
    error the float modules are back. What it gives puts them back, too."""
    training = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    floats = {site.module for site in sites}
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m in floats]

    def put_back() -> None:
        for name, module in places:
            modules.put(model, name, module)

    model.eval()
    try:
        yield put_back
    except BaseException:
        put_back()
        raise
    finally:
        for name, module in model.named_modules(remove_duplicate=False):
            module.training = training[name]
