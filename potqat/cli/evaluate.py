"""``potqat eval``: perplexity of a model on a text, its distance to a float one, lm-eval tasks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potqat.cli.errors import Stopped, Usage


def add(verbs) -> None:
    parser = verbs.add_parser(
        "eval",
        help="perplexity, distance to a float model, lm-eval tasks",
        description="Measure a model on a text: perplexity a token over windows of --context tokens, and with "
        "--reference the KL divergence from a float model and how often both rank the same token first.",
        epilog="example: potqat eval gpt2-e2m1 --text wikitext2-test.txt --reference gpt2 --tokens 32768 --context 512",
    )
    parser.add_argument("model", metavar="MODEL", help="packed folder, or hub name, folder, GGUF file, nanoGPT ckpt.pt")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on")
    parser.add_argument("--tokens", type=int, metavar="N", help="use the first N tokens of the text (default: all)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a window (default: 2048 or the model's maximum)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: the context)")
    parser.add_argument("--reference", metavar="MODEL", help="float model to compare with, of the same tokenizer")
    parser.add_argument(
        "--lm-eval", metavar="TASK,TASK", type=lambda names: names.split(","), help="tasks of EleutherAI's lm-eval"
    )
    parser.add_argument("--lm-eval-path", type=Path, metavar="DIR", help="folder with lm-eval task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each lm-eval task (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the result there; an interrupted run goes on where it stopped",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--tokenizer", metavar="NAME", help="as for potqat quantize, where the model has none")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from potqat.flows import evaluate, harness, sources

    if arguments.text is None and arguments.lm_eval is None:
        raise Usage("nothing to measure: give --text FILE, --lm-eval TASKS, or both")
    if arguments.text is None and (arguments.reference or arguments.out or arguments.context or arguments.stride):
        raise Usage("--reference, --context, --stride and --out go with --text FILE")
    if arguments.lm_eval is None and (arguments.lm_eval_path or arguments.limit):
        raise Usage("--lm-eval-path and --limit go with --lm-eval TASKS")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise Usage(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    source = sources.find(arguments.model)
    other = sources.find(arguments.reference) if arguments.reference else None
    tasks = (
        harness.plan_lm_eval(arguments.lm_eval, arguments.lm_eval_path, arguments.limit) if arguments.lm_eval else None
    )
    given = sources.tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    model, tokenizer = sources.load(source)
    tokenizer = given or tokenizer
    if tokenizer is None:
        raise ValueError(f"{arguments.model}: no tokenizer beside the model; name one with --tokenizer")
    result = {}
    if arguments.text is not None:
        plan = evaluate.plan_text(
            arguments.text, tokenizer, model=source.identity(), max_context=sources.max_context(model),
            context=arguments.context, stride=arguments.stride, tokens=arguments.tokens,
            reference=other and other.identity(), out=arguments.out,
        )  # fmt: skip
        reference = sources.logits_of(sources.load(other)[0]) if other else None
        try:
            result = evaluate.evaluate_text(plan, sources.logits_of(model), reference)
        except KeyboardInterrupt as stop:
            raise Stopped(str(stop) or "stopped") from None
    if tasks is not None:
        result["lm_eval"] = harness.run_lm_eval(tasks, model, tokenizer)
    print(json.dumps(result) if arguments.json else _shown(result))
    return 0


def _shown(result: dict) -> str:
    lines = []
    if "perplexity" in result:
        error = result["standard_error"]
        spread = "" if error is None else f" (loss {result['loss']:.4f} +- {error:.4f})"
        lines.append(
            f"perplexity {result['perplexity']:.4f}{spread} on {result['text']['file']}: first {result['tokens']:,} of "
            f"{result['text']['tokens']:,} tokens, context {result['context']}, stride {result['stride']}, "
            f"{result['scored']:,} scored"
        )
        if against := result["reference"]:
            lines.append(
                f"against the reference (perplexity {against['perplexity']:.4f}): "
                f"ratio {against['perplexity_ratio']:.4f}, KL {against['kl']:.4f} nats a token, "
                f"top-1 agreement {against['top1_agreement']:.1%}"
            )
    for task, metrics in result.get("lm_eval", {}).get("results", {}).items():
        values = ", ".join(
            f"{name.partition(',')[0]} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)
        )
        lines.append(f"{task}: {values}")
    return "\n".join(lines)
