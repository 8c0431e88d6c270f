"""Continue a text with a loaded model, token by token, and time it."""

from __future__ import annotations

import time
from typing import Any, TextIO

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from potqat.flows.sources import max_context
from potqat.models.generate import stream
from potqat.models.gpt import GPT


class _Clock(TextStreamer):
    """Prints whole words as tokens come, and notes when each came. The first put is the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO | None):
        super().__init__(tokenizer)
        self.out, self.times = out, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.out is not None:
            print(text, end="\n" if stream_end else "", flush=True, file=self.out)


def continue_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    out: TextIO | None = None,
) -> dict[str, Any]:
    """Prompt and continuation, and the rates of both.

    Args:
        model: from ``sources``: a GPT or a Hugging Face causal model, in eval mode.
        temperature: 0 takes the most likely token.
        top_k: sample among so many; all by default.
        out: where the text goes as it is made; None: nowhere.

    Returns:
        JSON-ready: text, prompt_tokens, new_tokens, prefill_tokens_per_second (until the first new token is there),
        decode_tokens_per_second (the tokens after it; None if there is none).

    Raises:
        ValueError: a prompt without a token, with tokens that the model does not know, or one that leaves no room.
    """
    try:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.long()  # (1, T)
    except Exception as error:  # what a tokenizer raises for a character that it does not know is of no type of its own
        raise ValueError(f"the tokenizer cannot read the prompt: {error}") from error
    count, most = ids.shape[1], max_context(model)
    vocabulary = model.config.vocab_size
    if count == 0:
        raise ValueError("the prompt gives no token; give the model something to continue")
    if int(ids.max()) >= vocabulary:
        raise ValueError(f"the prompt has token {int(ids.max())}, the model knows {vocabulary}; give its own tokenizer")
    if count >= most:
        raise ValueError(f"the prompt has {count} tokens and the model takes {most}; shorten it")
    clock = _Clock(tokenizer, out)
    begin = time.perf_counter()
    if isinstance(model, GPT):
        clock.put(ids)
        made = []
        for token in stream(model, ids, max_new_tokens, context=most, temperature=temperature, top_k=top_k):
            clock.put(token[0])
            made.append(token)
        clock.end()
        ids = torch.cat([ids, *made], dim=1)
    else:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
            if temperature
            else {"do_sample": False}
        )
        room = min(max_new_tokens, most - count)
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, max_new_tokens=room, streamer=clock, **sampling)
    first, *later = clock.times[1:]
    return {
        "text": tokenizer.decode(ids[0]),
        "prompt_tokens": count,
        "new_tokens": ids.shape[1] - count,
        "prefill_tokens_per_second": count / (first - begin),
        "decode_tokens_per_second": len(later) / (later[-1] - first) if later else None,
    }
