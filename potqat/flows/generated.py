"""Calibration text that the float model writes itself: of as many kinds as it has read, and there without a file.

Each window starts from a random token and goes on by the model's own distribution, as in LLM-QAT (arXiv 2305.17888).
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from tqdm import tqdm

from potqat.models.generate import stream
from potqat.models.gpt import GPT

AT_ONCE = 32  # windows whose keys and values are in memory at once


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
            first, attention_mask=torch.ones_like(first), max_new_tokens=count, do_sample=False,
            logits_processor=[_drawn], streamer=_Progress(bar),
        )  # fmt: skip
    finally:
        model.generation_config = own


def _drawn(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] to scores of which the largest is at a token drawn by them: by one random number, where
    transformers draws one for each word of the vocabulary, which takes a third of the time."""
    below = logits.double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(below, torch.rand(len(below), 1, dtype=torch.float64) * below[:, -1:], right=True)
    return torch.zeros_like(logits).scatter_(-1, drawn, 1.0)


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
