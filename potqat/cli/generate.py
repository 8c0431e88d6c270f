"""``potqat generate``: continue a text, token by token, and say how fast."""

from __future__ import annotations

import argparse
import json
import sys

from potqat.cli.errors import Usage


def add(verbs) -> None:
    parser = verbs.add_parser(
        "generate",
        help="continue a text with a packed or float model",
        description="Continue a text and print the tokens as they come, then the rate of reading the prompt (prefill) "
        "and of making tokens (decode). MODEL is a folder that potqat quantize wrote, or a float one.",
        epilog="example: potqat generate gpt2-e2m1 --prompt 'The water cycle' --max-new-tokens 50",
    )
    parser.add_argument("model", metavar="MODEL", help="packed folder, or hub name, folder, GGUF file, nanoGPT ckpt.pt")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0 takes the most likely token, 1 samples from the model's distribution (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--tokenizer", metavar="NAME", help="as for potqat quantize, where the model has none")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from potqat.flows import sources
    from potqat.flows.continuation import continue_text

    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 1), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise Usage(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not arguments.prompt:
        raise Usage("--prompt is empty; give the model something to continue")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    source = sources.find(arguments.model)
    given = sources.tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    model, tokenizer = sources.load(source)
    tokenizer = given or tokenizer
    if tokenizer is None:
        raise ValueError(f"{arguments.model}: no tokenizer beside the model; name one with --tokenizer")
    torch.manual_seed(arguments.seed)
    result = continue_text(
        model, tokenizer, arguments.prompt, arguments.max_new_tokens, temperature=arguments.temperature,
        top_k=arguments.top_k, out=None if arguments.json else sys.stdout,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['new_tokens']} tokens; prefill {result['prefill_tokens_per_second']:,.0f}, decode "
            f"{result['decode_tokens_per_second'] or float('nan'):,.1f} tokens/s, {torch.get_num_threads()} threads",
            file=sys.stderr,
        )
    return 0
