"""What a training step costs with fake quantization, against the float step of the same model.

    python benchmarks/qat_step.py [--threads 2] [--rounds 40]

The models take turns, step by step, on the same batch; the table gives the median time of each and the median of the
step-by-step ratios to the float model. Model: the character-level GPT of ``potqat reproduce``.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import potqat
from potqat.flows.experiment import ARMS, PRESETS
from potqat.flows.results import machine
from potqat.models.gpt import GPT, GPTConfig

VOCABULARY = 65


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    e = PRESETS["reproduce"]
    base = GPT(GPTConfig(vocab_size=VOCABULARY, block_size=e.context, n_layer=e.layers, n_head=e.heads, n_embd=e.width,
                         dropout=e.dropout, bias=False))  # fmt: skip
    ids = torch.randint(VOCABULARY, (e.batch, e.context + 1))
    steps = {"float": _step(copy.deepcopy(base), ids)}
    for name in ("pot4-paper", "pot4"):
        eager = copy.deepcopy(base)
        potqat.prepare_qat_(eager, ARMS[name].config)
        steps[f"{name}, eager"] = _step(eager, ids)
        steps[f"{name}, PT2E"] = _step(
            potqat.pt2e.prepare(copy.deepcopy(base), (ids[:, :-1],), ARMS[name].config, dynamic_shapes=None), ids
        )
    times = {name: [] for name in steps}
    for i in range(arguments.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:  # warm-up
                times[name].append(time.perf_counter() - start)
    figures = {
        name: {
            "milliseconds": 1e3 * statistics.median(taken),
            "ratio": statistics.median(t / f for t, f in zip(taken, times["float"], strict=True)),
        }
        for name, taken in times.items()
    }
    print(f"{'step':<20} {'ms':>8} {'x float':>8}   ({arguments.threads} threads, medians of {arguments.rounds})")
    for name, figure in figures.items():
        print(f"{name:<20} {figure['milliseconds']:8.2f} {figure['ratio']:8.3f}")
    if arguments.json:
        report = {"machine": machine(), "rounds": arguments.rounds, "figures": figures}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _step(model: torch.nn.Module, ids: torch.Tensor):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
