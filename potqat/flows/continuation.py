"""Continue a text with a loaded model, token by token, and time it."""

from __future__ import annotations

import time
from typing import Any, TextIO

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from potqat.flows.sources import Source
from potqat.models.generate import stream
from potqat.models.gpt import GPT


def read_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, source: Source) -> torch.Tensor:
    """Token ids int64 [1, T] of a prompt, checked before the model is loaded.

    Raises:
        ValueError: a prompt without a token, with tokens that the model does not know, or one that leaves no room.
    """
    try:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.long()
    except Exception as error:  # what a tokenizer raises for a character that it does not know is of no type of its own
        raise ValueError(f"the tokenizer cannot read the prompt ({error}); leave out what it does not know") from error
    count, known, most = ids.shape[1], source.vocabulary, source.max_context
    if count == 0:
        raise ValueError("the prompt gives no token; give the model something to continue")
    if int(ids.max()) >= known:
        raise ValueError(f"the prompt has token {int(ids.max())}, the model knows {known}; give its own tokenizer")
    if count >= most:
        raise ValueError(f"the prompt has {count} tokens and the model takes {most}; shorten it")
    return ids


class _Stream(BaseStreamer):
    """Prints text as tokens come, and notes when each came. The first put is the prompt, ids of shape [1, T].

    What a token says depends on the one before (a space, half a character): each is decoded behind the last ones that
    were printed, and waits while it ends in half a character. (transformers' TextStreamer starts anew at line ends,
    where a tokenizer like Llama's then loses a space.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO | None):
        self.tokenizer, self.out, self.times = tokenizer, out, []
        self.ids: list[int] = []
        self.begin = self.printed = 0  # decode from begin; up to printed it has been printed

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.ids += value.flatten().tolist()
        self._print(end=False)

    def end(self) -> None:
        self._print(end=True)

    def _print(self, end: bool) -> None:
        if self.out is None:
            return
        before = decode(self.tokenizer, self.ids[self.begin : self.printed])
        text = decode(self.tokenizer, self.ids[self.begin :])
        if end or not text.endswith("\ufffd"):
            print(text[len(before) :], end="\n" if end else "", flush=True, file=self.out)
            self.begin, self.printed = self.printed, len(self.ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, without special tokens such as <s>."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def continue_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    max_context: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    out: TextIO | None = None,
) -> dict[str, Any]:
    """Prompt and continuation, and the rates of both.

    Args:
        model: from ``sources.load``: a GPT or a Hugging Face causal model, in eval mode.
        ids: int64 [1, T], from ``read_prompt``.
        max_context: tokens that the model takes. A GPT goes on with the last ones; the others stop there.
        temperature: 0 takes the most likely token.
        top_k: sample among so many; all by default.
        out: where the text goes as it is made; None: nowhere.

    Returns:
        JSON-ready: text, prompt_tokens, new_tokens, stopped_by ("max_new_tokens", "end" if the model ended the text, or
        "context"), prefill_tokens_per_second (until the first new token is there), decode_tokens_per_second (the tokens
        after it; None if there is none).
    """
    count, printer = ids.shape[1], _Stream(tokenizer, out)
    begin = time.perf_counter()
    try:
        if isinstance(model, GPT):
            printer.put(ids)
            made = []
            for token in stream(model, ids, max_new_tokens, context=max_context, temperature=temperature, top_k=top_k):
                printer.put(token[0])
                made.append(token)
            printer.end()
            ids = torch.cat([ids, *made], dim=1)
        else:
            # The arguments say how to sample; top_p or penalties that came with the model would change that unseen.
            own = model.generation_config
            model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
            options = {"do_sample": False}
            if temperature:
                options = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
            room = min(max_new_tokens, max_context - count)
            mask = torch.ones_like(ids)
            ids = model.generate(ids, attention_mask=mask, max_new_tokens=room, streamer=printer, **options)
    except KeyboardInterrupt:
        if out is not None:
            print(file=out)  # what comes next starts a line of its own
        raise
    first, *later = printer.times[1:]
    new = ids.shape[1] - count
    whole = new == max_new_tokens
    return {
        "text": decode(tokenizer, ids[0].tolist()),
        "prompt_tokens": count,
        "new_tokens": new,
        "stopped_by": "max_new_tokens" if whole else "context" if ids.shape[1] == max_context else "end",
        "prefill_tokens_per_second": count / (first - begin),
        "decode_tokens_per_second": len(later) / (later[-1] - first) if later else None,
    }
