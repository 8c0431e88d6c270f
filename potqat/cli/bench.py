"""``potqat bench``: how fast a 4-bit linear layer is on this machine, beside PyTorch's own."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from potqat.cli import threads


def add(verbs) -> None:
    parser = verbs.add_parser(
        "bench",
        help="speed of the 4-bit linear layer on this machine, beside PyTorch's float32, bfloat16 and int8",
        description="Time the 4-bit linear layer, quantization of its activations included, beside torch's float32, "
        "bfloat16 and int8, at equal threads and in turn: medians of 9, for one token with the weights in the caches "
        "and out of them, and for more tokens. Beside each the memory's read bandwidth and the peak of the instruction "
        "set. Less than a minute; leave the machine alone meanwhile.",
        epilog="example: potqat bench --threads 1",
    )
    threads.add(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, not as tables")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    threads.use(arguments.threads)
    import torch
    from tqdm import tqdm

    from potqat.flows import bench

    plan, peers = replace(bench.SHORT, threads=(torch.get_num_threads(),)), (*bench.OURS, *bench.TORCH)
    groups = []
    with tqdm(total=plan.turns(peers), desc="bench", unit="sample", leave=False) as progress:
        for calibration, rows in bench.run(plan, peers, progress.update):
            groups.append((calibration, rows))
            if not arguments.json:
                progress.write(bench.table(calibration, rows) + "\n")
    report = bench.report(groups)
    if arguments.json:
        print(json.dumps(report))
    else:
        about = report["machine"]
        print(f"{about['cpu']}, {about['isa']} kernels, torch {about['torch']}, potqat {about['potqat']}")
    return 0
