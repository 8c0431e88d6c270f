"""Where training through the quantizer starts: a copy of the float model with QAT modules, calibrated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import potqat
from potqat.flows import calibration_text, sources
from potqat.flows.generated import generate_windows
from potqat.flows.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def start(
    teacher: nn.Module,
    cfg: potqat.PoTConfig,
    recipe: Recipe,
    tokens: torch.Tensor,
    source: sources.Source,
    tokenizer: PreTrainedTokenizerBase | None,
    state: Path,
) -> tuple[nn.Module, dict[str, Any]]:
    """(a copy of the model with QAT modules, its Report as a dict), calibrated once for each folder.

    Args:
        teacher: float, in eval mode; it writes the calibration text of its own, where the recipe asks for some.
        tokens: to calibrate on, int64 [L].
        source, tokenizer: of the model.
        state: folder that keeps the text, the layers done and the result, to go on from; of the same run.

    Raises:
        ValueError: a model or configuration that cannot be calibrated, or kept text or layers that cannot be read.
        OSError: reading or writing failed.
    """
    student, path = copy.deepcopy(teacher), state / "start.pt"
    if path.exists():
        held = torch.load(path, map_location="cpu", weights_only=True)
        potqat.prepare_qat_(student, cfg.without_calibration)
        student.load_state_dict(held["model"])
        return student, held["report"]
    if cfg.needs_calibration:
        context = min(calibration_text.CONTEXT, recipe.context)
        count = min(-(-recipe.calibration_tokens // context), len(tokens) // context)
        windows = calibration_text.spread(tokens, count, context)
        if recipe.generated_tokens:
            starts = calibration_text.starting_tokens(source, tokenizer)
            written = _written(teacher, recipe, context, starts, state / "generated.safetensors")
            windows = torch.cat([windows, written])
        batches = windows.split(calibration_text.BATCH)
        report = potqat.prepare_qat_(student, cfg, batches, unfinished=state / "calibration")
    else:
        report = potqat.prepare_qat_(student, cfg)
    held = {"model": student.state_dict(), "report": report.to_dict()}
    potqat.checkpoint.write(path, lambda part: torch.save(held, part))
    return student, held["report"]


def _written(teacher: nn.Module, recipe: Recipe, context: int, starts: torch.Tensor, kept: Path) -> torch.Tensor:
    """Text of the model as it is now, int64 [windows, context], written once."""
    count, dtype = -(-recipe.generated_tokens // context), calibration_text.writing_dtype(torch.float32)
    call = json.dumps([str(dtype), count, context, recipe.seed])
    return calibration_text.written_once(
        kept, call, lambda: generate_windows(copy.deepcopy(teacher).to(dtype), count, context, starts, recipe.seed)
    )
