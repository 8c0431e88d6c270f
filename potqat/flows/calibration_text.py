"""What a model is calibrated on: windows of a text file, of text that the float model writes by itself, or of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from potqat import checkpoint
from potqat._C import cpu_info
from potqat.flows import sources
from potqat.flows.generated import generate_windows
from potqat.flows.text import read_text, sha256, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT, BATCH = 512, 4  # tokens of a window, and windows that are run at a time


@dataclass(frozen=True)
class CalibrationText:
    """Chosen and checked, but what the model will write is not written yet.

    Attributes:
        file: batches of a file's windows, int64 [B, T] each; may be none.
        to_write: (windows, tokens of each) that the model writes; may be 0 windows.
        seed: of what it writes.
        note: for the report: how many tokens of what.
    """

    source: sources.Source
    tokenizer: PreTrainedTokenizerBase | None
    file: list[torch.Tensor]
    to_write: tuple[int, int]
    seed: int
    note: str

    def blank(self) -> list[torch.Tensor]:
        """Batches of the same shapes as ``batches``, to plan with."""
        if not self.to_write[0]:
            return self.file
        return [*self.file, *torch.zeros(self.to_write, dtype=torch.int64).split(BATCH)]

    def batches(self, dtype: torch.dtype, kept: Path) -> list[torch.Tensor]:
        """Token ids, int64 [B, T] each. What is to be written, the float model writes in ``writing_dtype``.

        Args:
            kept: file for what is written, where the same call finds it; the caller deletes it.

        Raises:
            ValueError: ``kept`` is damaged or of another call; or the model's weights cannot be read.
            OSError: reading or writing failed.
        """
        if not self.to_write[0]:
            return self.file
        dtype = writing_dtype(dtype)
        call = json.dumps([self.source.identity(), str(dtype), *self.to_write, self.seed])
        starts = starting_tokens(self.source, self.tokenizer)
        windows = written_once(
            kept, call, lambda: generate_windows(sources.load(self.source, dtype), *self.to_write, starts, self.seed)
        )
        return [*self.file, *windows.split(BATCH)]


def writing_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model of ``dtype`` writes in: bfloat16 where that is faster, by 1.3 to 2 times; it is good enough
    for text."""
    return torch.bfloat16 if cpu_info()["bfloat16"] else dtype


def starting_tokens(source: sources.Source, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Tokens that stand for text, int64 [S]: all that are not special to the tokenizer."""
    special, known = set(), source.vocabulary
    if tokenizer is not None:
        special, known = set(tokenizer.all_special_ids), min(known, len(tokenizer))
    return torch.tensor([token for token in range(known) if token not in special])


def written_once(kept: Path, call: str, write: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``write`` returns, int64 [windows, tokens], kept in a file for the same ``call``.

    Raises:
        ValueError: ``kept`` is damaged or of another call. OSError: reading or writing failed.
    """
    if not kept.exists():
        windows = write()
        checkpoint.write(kept, lambda part: save_file({"windows": windows}, part, {"call": call}))
        return windows
    try:
        with safe_open(kept, "pt") as opened:
            made_by, windows = (opened.metadata() or {}).get("call"), opened.get_tensor("windows")
    except Exception as error:  # safetensors has a type of its own, which is not public
        raise ValueError(f"{kept}: cannot be read ({error}); delete it to start anew") from error
    if made_by != call:
        raise ValueError(f"{kept}: holds text of another model or settings; delete it to start anew")
    return windows


def choose(
    source: sources.Source,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path | None,
    tokens: int,
    generated_tokens: int,
    *,
    at_most: bool = False,
    seed: int | None = None,
) -> CalibrationText:
    """``tokens`` of the text file ``path``, if there is one, and ``generated_tokens`` that the model writes.

    Args:
        at_most, seed: as windows_of_file has them; what the model writes has its own by the seed, too.

    Raises:
        ValueError: a file and no tokenizer; or as windows_of_file. OSError: the file cannot be read.
    """
    file, notes = [], []
    if path is not None:
        if tokenizer is None:
            raise ValueError(
                f"{source.name}: no tokenizer beside the model to read the calibration text; name one: --tokenizer"
            )
        file = windows_of_file(path, tokenizer, source, tokens, at_most=at_most, seed=seed)
        count = sum(ids.numel() for ids in file)
        notes.append(f"{count:,} tokens of {path.name}, SHA-256 {sha256(read_text(path))}")
    to_write = window_count(generated_tokens, source)
    if generated_tokens:
        notes.append(f"{math.prod(to_write):,} tokens that the model wrote by itself, seed {seed or 0}")
    return CalibrationText(source, tokenizer, file, to_write, seed or 0, f"calibrated on {' and '.join(notes)}")


def window_count(tokens: int, source: sources.Source) -> tuple[int, int]:
    """(windows, tokens of each) that hold ``tokens`` calibration tokens or a few more."""
    context = min(CONTEXT, source.max_context)
    return -(-tokens // context), context


def windows_of_file(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    source: sources.Source,
    tokens: int,
    *,
    at_most: bool = False,
    seed: int | None = None,
) -> list[torch.Tensor]:
    """Evenly spaced windows of a text, int64 [B, T] each, with ``tokens`` tokens in all (a multiple of T, rounded up).

    Args:
        at_most: take what there is of a shorter text.
        seed: another sample, to see what the choice of tokens does to a result: the text is cut into as many equal
            parts, and a window is drawn from each. In a text hardly longer than the windows, samples are alike.

    Raises:
        OSError: the text cannot be read.
        ValueError: a text that is empty, not UTF-8, too short, or not for this tokenizer or model.
    """
    _, ids = tokenize(path, tokenizer, source.vocabulary)
    count, context = window_count(tokens, source)
    if at_most:
        count = max(1, min(count, len(ids) // context))
    if len(ids) < count * context:
        raise ValueError(
            f"{path.name}: the text has {len(ids)} tokens, and {count} calibration windows of {context} need "
            f"{count * context}; give a longer text"
        )
    if seed is None:
        return list(spread(torch.tensor(ids), count, context).split(BATCH))
    part = len(ids) // count
    if part == context:
        raise ValueError(
            f"{path.name}: has {len(ids)} tokens, and {count} calibration windows of {context} leave nothing to "
            "draw from; give a longer text, or ask for fewer tokens"
        )
    shifts = torch.randint(part - context + 1, (count,), generator=torch.Generator().manual_seed(seed))
    starts = torch.arange(count) * part + shifts
    return list(torch.tensor(ids)[starts[:, None] + torch.arange(context)].split(BATCH))


def spread(tokens: torch.Tensor, count: int, context: int) -> torch.Tensor:
    """``count`` evenly spaced windows of int64 [L]: int64 [count, context]."""
    starts = torch.linspace(0, len(tokens) - context, count, dtype=torch.float64).long()
    return tokens[starts[:, None] + torch.arange(context)]
