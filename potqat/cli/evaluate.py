"""``potqat eval``: perplexity of a model on a text, its distance to a float one, lm-eval tasks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potqat.cli import threads
from potqat.cli.errors import Stopped, Usage


def add(verbs) -> None:
    parser = verbs.add_parser(
        "eval",
        help="perplexity, distance to a float model, lm-eval tasks",
        description="Measure a model on texts: perplexity a token over windows of --context tokens, and with "
        "--reference its ratio to that of a float model, the KL divergence from it, and how often both rank the same "
        "token first; each with the interval that holds it, with 95% confidence, over all text of the kind.",
        epilog="example: potqat eval gpt2-e2m1 --text wikitext2-test.txt --text mails.txt --reference gpt2",
    )
    parser.add_argument("model", metavar="MODEL", help="packed folder, or hub name, folder, GGUF file, nanoGPT ckpt.pt")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="UTF-8 text to measure on; repeatable (default: none)",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="use the first N tokens of each text (default: all)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a window (default: 2048, or what the model takes if less)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: the context)")
    parser.add_argument(
        "--reference", metavar="MODEL", help="model to compare with, of the same tokenizer (default: none)"
    )
    parser.add_argument(
        "--lm-eval", metavar="TASK,TASK", type=lambda names: names.split(","),
        help="tasks of EleutherAI's lm-eval, with or without --text (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--lm-eval-path", type=Path, metavar="DIR", help="folder with lm-eval task files of your own (default: none)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each lm-eval task (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json",
        help="write the results on --text there, too, so that an interrupted run can go on (default: none)",
    )  # fmt: skip
    threads.add(parser)
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="hub name, folder or .txt, as for potqat quantize (default: the model's)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    threads.use(arguments.threads)
    from potqat.flows import evaluate, harness, sources
    from potqat.flows.text import read_text
    from potqat.models.gpt import GPTConfig

    for text in arguments.text or ():
        read_text(text)  # what is wrong with it is said before anything else is read
    source = sources.find(arguments.model)
    other = sources.find(arguments.reference) if arguments.reference is not None else None
    if other and other.vocabulary != source.vocabulary:
        raise ValueError(
            f"the reference model has a vocabulary of {other.vocabulary} tokens and the model one of "
            f"{source.vocabulary}; compare models that share a tokenizer"
        )
    tokenizer = sources.tokenizer_for(source, arguments.tokenizer)
    plans, tasks = [], None
    if arguments.text is not None:
        plans = evaluate.plan_texts(
            arguments.text, tokenizer, model=source.identity(), vocabulary=source.vocabulary,
            max_context=min(model.max_context for model in (source, other) if model), context=arguments.context,
            stride=arguments.stride, tokens=arguments.tokens, reference=other and other.identity(), out=arguments.out,
        )  # fmt: skip
    if arguments.lm_eval is not None:
        if isinstance(source.config, GPTConfig):
            raise ValueError(f"{source.name}: lm-eval takes Hugging Face models, and this is a nanoGPT; use --text")
        tasks = harness.plan_lm_eval(arguments.lm_eval, arguments.lm_eval_path, arguments.limit)
    model = sources.load(source)
    result = {}
    if plans:
        reference = sources.logits_of(sources.load(other)) if other else None
        try:
            result = evaluate.evaluate_texts(plans, sources.logits_of(model), reference)
        except KeyboardInterrupt as stop:
            raise Stopped(str(stop) or "stopped") from None
    if tasks is not None:
        result["lm_eval"] = harness.run_lm_eval(tasks, model, tokenizer)
    print(json.dumps(result) if arguments.json else _shown(result))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    def given(*names: str) -> bool:
        return any(getattr(arguments, name) is not None for name in names)

    if not given("text", "lm_eval"):
        raise Usage("nothing to measure: give --text FILE, --lm-eval TASKS, or both")
    if not given("text") and given("reference", "tokens", "context", "stride", "out"):
        raise Usage("--reference, --tokens, --context, --stride and --out go with --text FILE")
    if not given("lm_eval") and given("lm_eval_path", "limit"):
        raise Usage("--lm-eval-path and --limit go with --lm-eval TASKS")


def _shown(result: dict) -> str:
    lines = []
    for text in result.get("texts", [result] if "perplexity" in result else []):
        lines.append(
            f"perplexity {text['perplexity']:.4f}{_within(text['perplexity_interval'], '.4f')} on "
            f"{text['text']['file']}: first {text['tokens']:,} of {text['text']['tokens']:,} tokens, context "
            f"{text['context']}, stride {text['stride']}, {text['scored']:,} scored"
        )
        if against := text["reference"]:
            lines.append(
                f"against the reference (perplexity {against['perplexity']:.4f}): "
                f"ratio {against['perplexity_ratio']:.4f}{_within(against['perplexity_ratio_interval'], '.4f')}, "
                f"KL {against['kl']:.4f}{_within(against['kl_interval'], '.4f')} nats a token, "
                f"top-1 agreement {against['top1_agreement']:.1%}{_within(against['top1_agreement_interval'], '.1%')}"
            )
    for task, metrics in result.get("lm_eval", {}).get("results", {}).items():
        values = ", ".join(
            f"{name.partition(',')[0]} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)
        )
        lines.append(f"{task}: {values}")
    return "\n".join(lines)


def _within(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f" (95%: {interval[0]:{form}} to {interval[1]:{form}})"
