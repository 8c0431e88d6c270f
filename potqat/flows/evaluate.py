"""Evaluate a language model on text files: perplexity, and the distance to a float reference; resumable.

``plan_text`` reads, tokenizes and checks, so that nothing can be wrong with the request once models are loaded;
``evaluate_text`` runs the plan. ``plan_texts`` and ``evaluate_texts`` do so for several texts and one result.
``measure`` is the same for tokens at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from potqat.flows.results import machine, write_json
from potqat.flows.text import tokenize
from potqat.perplexity import Model, Perplexity, Sums, Windows, score, summarize

CONTEXT = 2048  # tokens; GPTQ's, where the model takes as many
SAVE_EVERY_SECONDS = 30.0


@dataclass(frozen=True)
class Partial:
    """A file with the sums of an unfinished evaluation, good for the same ``settings`` (JSON-ready) and no others."""

    path: Path
    settings: dict[str, Any]

    def load(self) -> list[Sums]:
        """The sums of the windows behind us; none without a file.

        Raises:
            ValueError: the file is damaged, or belongs to other settings; the message names those that differ.
        """
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            theirs, sums = dict(content["settings"]), [Sums(*row) for row in content["sums"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: cannot read this unfinished evaluation ({type(error).__name__}); delete it to start anew"
            ) from error
        differ = [
            f"{key} is {theirs.get(key)!r} there and {self.settings.get(key)!r} here"
            for key in sorted(theirs.keys() | self.settings.keys())
            if theirs.get(key) != self.settings.get(key)
        ]
        if differ:
            raise ValueError(
                f"{self.path}: holds an unfinished evaluation with other settings: {'; '.join(differ)}; write to "
                "another file, or delete this one to start anew"
            )
        return sums

    def save(self, sums: Sequence[Sums]) -> None:
        write_json(self.path, {"settings": self.settings, "sums": sums})


def measure(
    model: Model,
    tokens: torch.Tensor,
    context: int,
    stride: int | None = None,
    reference: Model | None = None,
    partial: Partial | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on ``tokens``, and its distance to ``reference``, as potqat.perplexity defines them.

    One window at a time, first through ``model``, then through ``reference``. Equal input, threads and machine give
    equal bits, however often the call was stopped: ``partial`` keeps the sums, about every 30 seconds and when anything
    stops it; the same call goes on from there.

    Args:
        model, reference: token ids int64 [1, context] -> logits [1, context, V]; modules are to be in eval mode.
        tokens: int64 [L] on the models' device.
        stride: tokens from window to window; the context by default.

    Raises:
        ValueError: not one window fits, a stride outside 1..context, logits that cannot be scored, or a partial file of
            other settings.
        KeyboardInterrupt: Ctrl-C; with ``partial``, its message says how to go on.
    """
    windows = Windows(len(tokens), context, stride)
    sums = partial.load() if partial else []
    scored = [windows.scored(i) for i in range(len(windows))]
    saved = time.monotonic()
    interval = 0.5 if sys.stderr.isatty() else 5.0
    with tqdm(
        desc="evaluate", total=sum(scored), initial=sum(scored[: len(sums)]), unit="token", unit_scale=True,
        delay=2, leave=False, dynamic_ncols=True, mininterval=interval,
    ) as bar:  # fmt: skip
        try:
            for i in range(len(sums), len(windows)):
                sums.append(score(model, tokens, windows, i, reference))
                bar.update(scored[i])
                if partial and time.monotonic() - saved >= SAVE_EVERY_SECONDS:
                    partial.save(sums)
                    saved = time.monotonic()
        except BaseException as stop:
            if partial and sums:
                partial.save(sums)
                if isinstance(stop, KeyboardInterrupt):
                    raise KeyboardInterrupt(
                        f"stopped after {len(sums)} of {len(windows)} windows, kept in {partial.path}; run the same "
                        "command again to go on"
                    ) from None
            raise
    if partial:
        partial.save(sums)  # of several texts, this one is done; whoever writes the result deletes it
    return summarize(windows, sums)


@dataclass(frozen=True)
class TextPlan:
    """A checked evaluation on a text: ``tokens`` int64 [L] of it in windows, and where the result goes. ``number``: of
    the text among several in one result, from 1; 0 for the only one."""

    text: dict[str, Any]
    tokens: torch.Tensor
    windows: Windows
    model: str
    reference: str | None
    out: Path | None
    number: int = 0

    def partial(self) -> Partial | None:
        if self.out is None:
            return None
        settings = {
            "text_sha256": self.text["sha256"],
            "token_ids_sha256": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
            "tokens": self.windows.tokens,
            "context": self.windows.context,
            "stride": self.windows.stride,
            "model": self.model,
            "reference": self.reference,
            **machine(),
        }
        number = f".{self.number}" if self.number else ""
        return Partial(self.out.with_name(f"{self.out.name}{number}.partial"), settings)


def plan_text(
    path: str | os.PathLike,
    tokenizer: Any,
    *,
    model: str,
    max_context: int,
    vocabulary: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    reference: str | None = None,
    out: str | os.PathLike | None = None,
    number: int = 0,
) -> TextPlan:
    """Read and tokenize a text and check everything that can be checked without the models.

    Args:
        path: UTF-8 text, tokenized whole and without special tokens.
        tokenizer: a Hugging Face tokenizer.
        model, reference: what identifies the models, down to the weights: an evaluation is resumed only under equal
            names. ``reference`` is None for none.
        max_context: tokens that the model takes at most (of both models, the fewer).
        vocabulary: tokens that the model knows; None: not checked.
        context: tokens a window; by default 2048, or ``max_context`` where that is less.
        stride: tokens from window to window; the context by default.
        tokens: evaluate the first so many of the text; all by default.
        out: JSON file for the result. Until it is there, ``OUT.partial`` holds what an interrupted run has done.
        number: see TextPlan.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the text cannot be read, or ``out`` cannot be written.
        ValueError: a text that is empty, not UTF-8 or shorter than ``tokens`` or one window, or that the tokenizer
            cannot read; tokens that the model does not know; a context over ``max_context``; a stride outside
            1..context; ``OUT.partial`` of other settings.
    """
    name = Path(path).name
    context = min(CONTEXT, max_context) if context is None else context
    if context > max_context:
        raise ValueError(f"context {context} is more than the {max_context} tokens this model takes; give at most that")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if out is not None:
        out = Path(out)
        if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
            raise PermissionError(f"{out}: cannot write the result there; give a file in a folder that can be written")
    text, ids = tokenize(path, tokenizer, vocabulary)
    if tokens is not None and tokens > len(ids):
        raise ValueError(f"{name}: the text has {len(ids)} tokens and {tokens} are asked for; ask for fewer or for all")
    used = torch.tensor(ids[:tokens], dtype=torch.int64)
    try:
        windows = Windows(len(used), context, stride)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    described = {"file": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(ids)}
    plan = TextPlan(described, used, windows, model, reference, out, number)
    if partial := plan.partial():
        partial.load()
    return plan


def plan_texts(paths: Sequence[str | os.PathLike], tokenizer: Any, **options: Any) -> list[TextPlan]:
    """``plan_text`` for each of ``paths``, at least one, with equal ``options``. Of several, ``OUT.1.partial``,
    ``OUT.2.partial`` ... hold what an interrupted run has done."""
    several = len(paths) > 1
    return [plan_text(path, tokenizer, **options, number=several * i) for i, path in enumerate(paths, start=1)]


def evaluate_text(plan: TextPlan, model: Model, reference: Model | None = None) -> dict[str, Any]:
    """Run a plan: one JSON-ready dict with the protocol, the result and the machine, also written to ``plan.out``.

    Models and errors as in ``measure``; ``reference`` is given where the plan names one.
    """
    return evaluate_texts([plan], model, reference)


def evaluate_texts(plans: Sequence[TextPlan], model: Model, reference: Model | None = None) -> dict[str, Any]:
    """Run plans of equal models and ``out``, at least one: ``{"texts": [...]}`` with the results of ``evaluate_text``,
    or the one result of a single plan; also written to ``out``."""
    for plan in plans:
        if (reference is None) != (plan.reference is None):
            raise ValueError(
                f"the plan names the reference {plan.reference!r}; give evaluate_text the same one or none"
            )
    results = [_evaluate(plan, model, reference) for plan in plans]
    result = {"texts": results} if plans[0].number else results[0]
    if plans[0].out is not None:
        write_json(plans[0].out, result)
        for plan in plans:
            plan.partial().path.unlink(missing_ok=True)
    return result


def _evaluate(plan: TextPlan, model: Model, reference: Model | None) -> dict[str, Any]:
    windows = plan.windows
    measured = measure(model, plan.tokens, windows.context, windows.stride, reference, plan.partial())
    return {
        "text": plan.text,
        "tokens": windows.tokens,
        "model": plan.model,
        "reference_model": plan.reference,
        **measured.to_dict(),
        "machine": machine(),
    }
