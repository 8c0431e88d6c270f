"""Calibration text that the float model writes itself: of as many kinds as it has read, and there without a file.

Each window starts from a random token and goes on by the model's own distribution, as in LLM-QAT (arXiv 2305.17888).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from potqat import checkpoint
from potqat.flows import sources
from potqat.models.generate import stream
from potqat.models.gpt import GPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 32  # windows whose keys and values are in memory at once


def text_of(
    source: sources.Source,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    count: int,
    context: int,
    seed: int,
    path: Path,
) -> torch.Tensor:
    """generate_windows on the float model ``source`` in ``dtype``, starting from tokens that stand for text, which are
    all that are not special to ``tokenizer``. Kept in the file ``path``, for the same call to take from there; the
    caller deletes it.

    Raises:
        ValueError: the file is damaged, or was made by another call; or the weights cannot be read.
        OSError: reading or writing failed.
    """
    call = json.dumps([source.identity(), str(dtype), count, context, seed])
    if path.exists():
        try:
            with safe_open(path, "pt") as opened:
                made_by, windows = (opened.metadata() or {}).get("call"), opened.get_tensor("windows")
        except Exception as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it to start anew") from error
        if made_by != call:
            raise ValueError(f"{path}: holds text of another model or settings; delete it to start anew")
        return windows
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    known = source.vocabulary if tokenizer is None else min(source.vocabulary, len(tokenizer))
    starts = torch.tensor([token for token in range(known) if token not in special])
    windows = generate_windows(sources.load(source, dtype), count, context, starts, seed)
    checkpoint.write(path, lambda part: save_file({"windows": windows}, part, {"call": call}))
    return windows


@torch.no_grad()
def generate_windows(model: nn.Module, count: int, context: int, starts: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Windows of text that ``model`` writes, int64 [count, context].

    Equal arguments give equal windows where the same machine computes in the same number of threads: one probability
    with another last bit can choose another token.

    Args:
        model: from ``sources.load``: a GPT or a Hugging Face causal model, in eval mode.
        context: tokens of a window, at most what the model takes.
        starts: int64 [S], tokens that a window may start with; each window draws one.
    """
    bar = tqdm(
        total=count * (context - 1), desc="write", unit="token", delay=2, leave=False, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 5.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), bar:
        torch.manual_seed(seed)
        first = starts[torch.randint(len(starts), (count, 1))]
        return torch.cat([_continue(model, part, context - 1, bar) for part in first.split(AT_ONCE)])


def _continue(model: nn.Module, first: torch.Tensor, count: int, bar: tqdm) -> torch.Tensor:
    if isinstance(model, GPT):
        tokens = [first]
        for token in stream(model, first, count, context=model.config.block_size):
            tokens.append(token)
            bar.update(len(token))
        return torch.cat(tokens, dim=1)
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()  # what came with the model may end texts, or leave out rare tokens
    try:
        return model.generate(
            first, attention_mask=torch.ones_like(first), max_new_tokens=count, do_sample=True, top_k=0,
            streamer=_Progress(bar),
        )  # fmt: skip
    finally:
        model.generation_config = own


class _Progress:
    """What transformers tells of the tokens that it makes, the first ones too, on a bar."""

    def __init__(self, bar: tqdm):
        self._bar, self._begun = bar, False

    def put(self, tokens: torch.Tensor) -> None:
        if self._begun:
            self._bar.update(len(tokens))
        self._begun = True

    def end(self) -> None:
        """Asked for by transformers."""
