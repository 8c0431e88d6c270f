"""``potqat generate``: continue a text, token by token, and say how fast."""

from __future__ import annotations

import argparse
import json
import sys

from potqat.cli import threads
from potqat.cli.errors import Usage

LARGEST_SEED = 2**63 - 1


def add(verbs) -> None:
    parser = verbs.add_parser(
        "generate",
        help="continue a text with a packed or float model",
        description="Continue a text and print the tokens as they come, then the rate of reading the prompt (prefill) "
        "and of making tokens (decode). MODEL is a folder that potqat quantize wrote, or a float model.",
        epilog="example: potqat generate gpt2-e2m1 --prompt 'The water cycle' --max-new-tokens 50",
    )
    parser.add_argument("model", metavar="MODEL", help="packed folder, or hub name, folder, GGUF file, nanoGPT ckpt.pt")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="stop after so many tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0 takes the most likely token, 1 samples from the model's distribution (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample among the K most likely tokens; needs --temperature (default: all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same sampled text (default: %(default)s)"
    )
    threads.add(parser)
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="hub name, folder or .txt, as for potqat quantize (default: the model's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, and no text before")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    threads.use(arguments.threads)
    import torch

    from potqat.flows import sources
    from potqat.flows.continuation import continue_text, read_prompt

    source = sources.find(arguments.model)
    tokenizer = sources.tokenizer_for(source, arguments.tokenizer)
    ids = read_prompt(tokenizer, arguments.prompt, source)
    model = sources.load(source)
    torch.manual_seed(arguments.seed)
    result = continue_text(
        model, tokenizer, ids, arguments.max_new_tokens, max_context=source.max_context,
        temperature=arguments.temperature, top_k=arguments.top_k, out=None if arguments.json else sys.stdout,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return 0
    why = f" (the model takes {source.max_context})" if result["stopped_by"] == "context" else ""
    decode = result["decode_tokens_per_second"]
    print(
        f"{result['new_tokens']} tokens{why}; prefill {result['prefill_tokens_per_second']:,.0f}"
        f"{'' if decode is None else f', decode {decode:,.1f}'} tokens/s, threads: {torch.get_num_threads()}",
        file=sys.stderr,
    )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.prompt:
        raise Usage("--prompt is empty; give the model something to continue")
    if arguments.max_new_tokens < 1:
        raise Usage(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if arguments.temperature != 0 and not 0.01 <= arguments.temperature <= 100:  # beyond, float32 logits overflow
        raise Usage(f"--temperature must be 0, or from 0.01 to 100, got {arguments.temperature}")
    if arguments.top_k is not None and (arguments.top_k < 1 or arguments.temperature == 0):
        raise Usage(
            f"--top-k must be at least 1 and goes with a --temperature above 0, got {arguments.top_k} with temperature "
            f"{arguments.temperature}"
        )
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise Usage(f"--seed must be in 0..{LARGEST_SEED}, got {arguments.seed}")
