"""Sampling: the next token, again and again, from any model of token ids; a GPT remembers what it has read.

B = batch, T = time (tokens), V = vocabulary.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from potqat.models import aot
from potqat.models.gpt import GPT, KVCache

SLOTS = 16  # a decoder reads whole multiples of so many slots of its cache: those behind are read for nothing


class Decoder:
    """A GPT and a cache: reads a text in pieces of any length, without computing earlier tokens anew.

    Args:
        model: float or packed, in eval mode.
        batch_size: texts read side by side.
        compile: True: a single token goes through ``torch.compile(model, fullgraph=True)``, one graph for every
            position; longer pieces stay eager, because each length would be another graph. A path that ends in .pt2:
            a single token goes through the program in that file (``potqat.models.aot``), which is compiled first if
            there is none; it has no Python in it, and serves later processes.

    Attributes:
        length: tokens read so far.

    Raises:
        ValueError: a batch size below 1, or a file that was compiled for something else.
    """

    def __init__(self, model: GPT, batch_size: int, compile: bool | str | os.PathLike = False):
        self.model, self.batch_size, self.length = model, batch_size, 0
        self.cache = model.empty_cache(batch_size)
        self._slots: KVCache = []
        if isinstance(compile, bool):
            self._step = torch.compile(model, fullgraph=True) if compile else model
        else:
            path, slots = Path(compile), self._slots_for(1)
            if not path.exists():
                aot.compile_step(model, slots, path)
            self._step = aot.load_step(model, slots, path)

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """Reads the next tokens, int64 [B, T]; returns their logits [B, T, V].

        Raises:
            ValueError: another batch size, or more tokens than are left of ``block_size``; nothing is read then.
        """
        batch, t = idx.shape
        if batch != self.batch_size:
            raise ValueError(
                f"Decoder: made for a batch of {self.batch_size}, got {batch}; make another for this batch"
            )
        end, room = self.length + t, self.model.config.block_size
        if end > room:
            raise ValueError(
                f"Decoder: at most block_size={room} tokens fit, got {t} after {self.length}; "
                "start a new Decoder with the last ones"
            )
        one = t == 1
        # no_grad would call the ops' autograd formulas, in Python, for nothing: much, for the work of one token.
        with torch.inference_mode() if one else torch.no_grad():
            positions = torch.arange(self.length, end, device=idx.device)  # (T)
            idx = idx.clone(memory_format=torch.contiguous_format)  # the strides of a slice would be another graph
            logits = (self._step if one else self.model)(idx, self._slots_for(end), positions)
        self.length = end
        return logits.clone() if one else logits  # an inference tensor could not be written to

    def _slots_for(self, length: int) -> KVCache:
        """Views of the cache's first slots, a multiple of ``SLOTS``: what lies behind them need not be read."""
        wanted = min(-(-length // SLOTS) * SLOTS, self.model.config.block_size)
        if not self._slots or self._slots[0][0].shape[2] != wanted:
            self._slots = [(keys[:, :, :wanted], values[:, :, :wanted]) for keys, values in self.cache]
            for view in itertools.chain.from_iterable(self._slots):
                torch._dynamo.maybe_mark_dynamic(view, 2)  # one graph for every number of slots
        return self._slots


def generate(model: nn.Module, idx: torch.Tensor, n: int, **options) -> torch.Tensor:
    """``idx`` and the ``n`` tokens that ``stream`` gives after it, int64 [B, T + n]; its options and errors."""
    return torch.cat([idx, *stream(model, idx, n, **options)], dim=1)


def stream(
    model: nn.Module,
    idx: torch.Tensor,
    n: int,
    *,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    compile: bool | str | os.PathLike = False,
) -> Iterator[torch.Tensor]:
    """Sample ``n`` tokens after ``idx``, each from the last ``context`` ones. Call ``model.eval()`` before.

    A GPT reads each token once, as long as the text fits in ``context`` and its ``block_size``. After that every token
    moves to another position at each step, so that nothing can be remembered, and the whole context is read each time,
    as for any other model.

    Args:
        model: token ids [B, T] -> logits [B, T, V]: a GPT, float or quantized, or any other module.
        idx: int64 [B, T], T at least 1.
        temperature: 0 takes the most likely token; below 1 sharpens the distribution.
        top_k: sample among the k most likely tokens only.
        compile: see ``Decoder``; GPTs only.

    Returns:
        an iterator of the new tokens, each int64 [B, 1], made as they are asked for.

    Raises:
        ValueError: no token to start from, or an option without a meaning.
    """
    if idx.dim() != 2 or not idx.shape[1]:
        raise ValueError(f"generate: idx must be [B, T] with T at least 1, got {list(idx.shape)}; start with a token")
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"generate: temperature must be positive, or 0 for the most likely token, and top_k must be positive, "
            f"got {temperature} and {top_k}"
        )
    if context < 1:
        raise ValueError(f"generate: context must be at least 1, got {context}")
    if compile and not isinstance(model, GPT):
        raise ValueError(f"generate: compile needs a GPT, got {type(model).__name__}; compile that module itself")
    return _stream(model, idx, n, context, temperature, top_k, generator, compile)


@torch.no_grad()
def _stream(model, idx, n, context, temperature, top_k, generator, compile) -> Iterator[torch.Tensor]:
    room, decoder = 0, None
    if isinstance(model, GPT):
        room, decoder = min(context, model.config.block_size), Decoder(model, idx.shape[0], compile)
    for _ in range(n):
        fits = idx.shape[1] <= room
        logits = (decoder(idx[:, decoder.length :]) if fits else model(idx[:, -context:]))[:, -1]  # (B, V)
        token = _sample(logits, temperature, top_k, generator)  # (B, 1)
        idx = torch.cat([idx, token], dim=1)
        yield token


def _sample(logits, temperature, top_k, generator) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kept, tokens = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, kept)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
