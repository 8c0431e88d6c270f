"""Quantize a pretrained model after training: plan it on a model without weights, then load, quantize and save."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import potqat
from potqat import calibrated, ops
from potqat.flows import sources
from potqat.plan import Site, check_calibration, check_packable, plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    """What would be done, known before a weight is read. Bytes of all tensors, ties counted once.

    Attributes:
        skeleton: the float model on the meta device.
        float_bytes: of the float model in memory, in ``dtype``.
        packed_bytes: of the packed model, in memory and (but for names and settings, some 100 KB) on disk.
        code_bytes: of the codes and scales in it.
        calibration: batches of token ids, int64 [B, T] each; none: not calibrated.
        calibration_bytes: what these take beside the model, its codes and scales.
    """

    source: sources.Source
    cfg: potqat.PoTConfig
    dtype: torch.dtype
    skeleton: nn.Module
    float_bytes: int
    packed_bytes: int
    code_bytes: int
    calibration: list[torch.Tensor]
    calibration_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Memory that the work takes at most, besides PyTorch and transformers; measured, it is within 5%.

        Loading takes the model and what it is made from: nothing more if that is memory-mapped and of the same dtype.
        Quantizing takes the model, and the codes and scales; calibration also the hidden states of all its tokens, and
        what the layers of one block get in float; and for one layer at a time some float64 matrices of its inputs and
        float32 ones of its weight.
        """
        numbers, source = self.float_bytes // self.dtype.itemsize, self.source
        largest = max(parameter.numel() for parameter in self.skeleton.parameters())
        if source.kind == "gguf":  # a weight is decoded in two steps, in float32
            loading = self.float_bytes + source.path.stat().st_size + 2 * 4 * largest
        elif source.kind == "nanogpt":  # read whole, with the optimizer's moments, into a GPT whose head was its own
            loading = 4 * (numbers + largest) + source.path.stat().st_size
        else:
            stored = source.config.dtype or torch.float32
            loading = self.float_bytes + (0 if stored == self.dtype else numbers * stored.itemsize)
        return max(loading, self.float_bytes + self.code_bytes + self.calibration_bytes)


def make_plan(
    source: sources.Source,
    cfg: potqat.PoTConfig,
    dtype: torch.dtype = torch.float32,
    calibration: Sequence[torch.Tensor] = (),
) -> Plan:
    """Check everything that can be checked without the weights.

    Raises:
        ValueError: nothing to quantize, a pattern that matches nothing, a grid without a packed form, calibration that
            is needed and missing or the reverse, or a source that cannot be read.
        OSError: the hub or the folder does not give it.
    """
    skeleton = sources.skeleton(source)
    sites = plan(skeleton, cfg)
    check_packable(sites)
    check_calibration(sites, bool(calibration))
    packed = {id(site.module.weight): _packed_bytes(site) for site in sites if site.cfg is not None}
    tensors = {id(t): t for t in skeleton.state_dict(keep_vars=True).values()}  # keep_vars: a tied one is one object
    bytes_of = {
        key: t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for key, t in tensors.items()
    }
    kept = {id(site.module.weight) for site in sites if site.cfg is None}  # float beside its codes, where tied
    left = sum(size for key, size in bytes_of.items() if key in kept or key not in packed)
    codes = sum(packed.values())
    taken = _calibration_bytes(source, dtype, sites, calibration) if calibration else 0
    return Plan(source, cfg, dtype, skeleton, sum(bytes_of.values()), left + codes, codes, list(calibration), taken)


def _calibration_bytes(
    source: sources.Source, dtype: torch.dtype, sites: list[Site], batches: Sequence[torch.Tensor]
) -> int:
    tokens = sum(ids.numel() for ids in batches)
    hidden = 2 * tokens * source.width * dtype.itemsize
    logits = 2 * 4 * batches[0].shape[1] * source.vocabulary  # of the row that shows the blocks
    chosen = calibrated.split(sites).layers.values()
    layer = max(8 * 8 * k**2 + 6 * 4 * n * k for n, k in (site.weight.shape for site in chosen))
    inputs: Counter[str] = Counter()  # by block, float32; layers that share them (q, k, v) are counted each
    learned: Counter[str] = Counter()  # by block: weights, gradients, AdamW's state, what is rounded, in two dtypes
    for site in chosen:
        block = re.match(r"(.*?\.\d+\.)?", site.name)[0]
        inputs[block] += 4 * tokens * site.weight.shape[1]
        if site.cfg.rounding == "reconstruct":
            learned[block] += 24 * site.weight.numel()
    targets = hidden // 2 if learned else 0
    return hidden + targets + max(logits, layer + max(inputs.values()), *learned.values())


def _packed_bytes(site: Site) -> int:
    n, k = site.weight.shape
    return math.prod(ops.packed_shape(site.cfg.grid, n, k)) + 4 * site.cfg.groups(k) * n


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write in, which becomes ``out`` at the end, or vanishes if the work fails: what is at
    ``out`` is whole.

    Raises:
        OSError: no folder can be made there.
    """
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise type(error)(f"{out}: cannot make this folder: {error.strerror}; name another one") from None
    try:
        yield part
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run(
    planned: Plan, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, unfinished: Path | None = None
) -> tuple[potqat.Report, int]:
    """Load, quantize and write the model, and its tokenizer, to a folder.

    Args:
        unfinished: folder that keeps the layers of a calibration that is stopped, to go on from.

    Returns:
        the Report, and the bytes of the model's files.

    Raises:
        ValueError: weights that cannot be read, or hold NaN or infinity, or a model whose own code needs a float one.
        OSError: reading or writing failed.
    """
    model = sources.load(planned.source, planned.dtype)
    if planned.calibration:
        report = potqat.quantize_(model, planned.cfg, planned.calibration, unfinished=unfinished)
    else:
        report = potqat.quantize_(model, planned.cfg)
    try:
        with torch.no_grad():
            sources.logits_of(model)(torch.zeros(1, 1, dtype=torch.int64))
    except Exception as error:  # as in Mamba's blocks, which multiply with a Linear's weight themselves
        raise ValueError(
            f"{planned.source.name}: packed it does not run ({error}); name with --skip what its code reads by itself"
        ) from error
    return report, write_model(model, tokenizer, folder, potqat.save)


def write_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    save: Callable[[nn.Module, Path], Any],
) -> Any:
    """Write a model by ``save``, whose result is returned, and its tokenizer.

    Raises:
        OSError: writing failed.
    """
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return save(model, folder)
    except Exception as error:  # of a full disk tokenizers and safetensors say it with types of their own
        raise OSError(f"{folder.parent}: cannot write a folder there: {error}; make room or name another") from error
