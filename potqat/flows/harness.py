"""The tasks of EleutherAI's lm-eval (lm-evaluation-harness) on a packed Hugging Face model.

``plan_lm_eval`` finds the tasks before a model is loaded; ``run_lm_eval`` runs them. Here lm-eval's own protocol counts
(its ``wikitext`` is a perplexity per word); perplexity per token is potqat.flows.evaluate.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LmEvalPlan:
    """Tasks that lm-eval knows, by name, and lm-eval's TaskManager that found them; ``limit`` documents of each."""

    tasks: tuple[str, ...]
    manager: Any
    limit: int | None


def plan_lm_eval(
    tasks: Sequence[str], include_path: str | os.PathLike | None = None, limit: int | None = None
) -> LmEvalPlan:
    """Look the tasks up, which takes seconds: lm-eval reads all its task files.

    Args:
        tasks: names of tasks, groups or tags, or patterns of them with ``*``.
        include_path: folder with task files (YAML) of your own.
        limit: evaluate only the first so many documents of each task; all by default.

    Raises:
        ValueError: lm-eval is not installed, no task is given, one is unknown, ``include_path`` is no folder, or
            ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 document a task, got {limit}")
    if not any(tasks):
        raise ValueError("no lm-eval task given; list them with: lm-eval ls tasks")
    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"{include_path}: no folder with lm-eval task files; check the path")
    for package in ("lm_eval", "accelerate"):  # lm-eval needs accelerate for Hugging Face models, and leaves it out
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed, and lm-eval tasks need it; run: pip install 'potqat[eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"lm-eval knows no task {', '.join(map(repr, unknown))}; list them with: lm-eval ls tasks")
    return LmEvalPlan(tuple(manager.match_tasks(list(tasks))), manager, limit)


def run_lm_eval(plan: LmEvalPlan, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Run a plan on a Hugging Face causal model, one request at a time; needs the data sets of its tasks (a hub, or a
    cache of it). lm-eval shows its own progress, and seeds Python's, NumPy's and torch's generators.

    Returns:
        JSON-ready: lm-eval's ``results`` (task -> metric -> value), ``groups`` where there are, ``versions`` of the
        tasks, ``n-shot``, ``n-samples``, ``limit`` and ``lm_eval_version``.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a model given as an object may be a mistake
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    finally:
        logger.setLevel(level)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(plan.tasks), task_manager=plan.manager, limit=plan.limit, log_samples=False
    )
    keys = ("results", "groups", "versions", "n-shot", "n-samples", "lm_eval_version")
    kept = {key: found[key] for key in keys if key in found} | {"limit": plan.limit}
    return json.loads(json.dumps(kept, default=handle_non_serializable))
