"""Speed of a whole model: GPT-2 124M's shape with random weights, one text, prefill of 512 tokens and decoding.

    python benchmarks/decode.py [--threads 1] [--arms NAME ...] [--rounds 9] [--out NAME]

Arms take turns at equal threads. Prefill reads 512 tokens and gives the logits of each; decoding reads token after
token from position 128 on, 16 a sample: medians of the samples, with least and most. All arms but llama.cpp run
``potqat.models.gpt.GPT`` and decode with its ``Decoder``; "compiled" is torch.compile for both, "program" is its
program by AOTInductor (prefill is eager there). Each arm says how many bytes of weights a token reads, and the cosine
between its logits of the first decoded token and those of float32: arms are one model, rounded. An arm whose logits are
others' is an error, not a time.

Writes benchmarks/results/NAME.json; an earlier run's arms at other numbers of threads stay if the machine is the same.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import report
import torch
from torch import nn
from tqdm import tqdm

import potqat
from potqat import PoTConfig
from potqat.flows import bench, measure, results
from potqat.models.generate import Decoder
from potqat.models.gpt import GPT, GPTConfig

SHAPE = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
PREFILL, CONTEXT, TOKENS = 512, 128, 16  # tokens read at once; read before decoding; decoded in a sample
LEAST_COSINE = 0.8  # pot4 by rounding alone, of random weights, has 0.85


@dataclass(frozen=True)
class Running:
    """An arm that is ready: its two samples (one call is a prefill; a token), the logits of the token after CONTEXT
    others, decoded, and the bytes of weights that a token reads."""

    prefill: measure.Sample
    decode: measure.Sample
    logits: torch.Tensor
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="NAME", default=list(ARMS), help="; ".join(ARMS))
    parser.add_argument("--rounds", type=int, default=bench.ROUNDS)
    parser.add_argument("--isa", help="potqat's instruction set (default: the best)")
    parser.add_argument("--out", metavar="NAME", help="of the file in benchmarks/results (default: decode_ISA)")
    arguments = parser.parse_args()
    path = report.start(arguments.isa, arguments.out, "decode")
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64  # each arm is a specialization of the same function
    found = run(SHAPE, arguments.arms, arguments.threads, arguments.rounds)
    print(table(found))
    results.write_json(path, report.merge(path, found, ("threads",)))
    print(f"wrote {path}")


@torch.no_grad()
def run(shape: GPTConfig, arms: list[str], threads: int, rounds: int) -> dict:
    """Measure; JSON-ready."""
    torch.manual_seed(0)
    model = GPT(shape).eval()
    ids = torch.randint(shape.vocab_size, (1, PREFILL))
    truth, running, errors = model(ids[:, : CONTEXT + 1])[0, -1], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in tqdm(arms, desc="set-up"):
            try:
                running[arm] = ARMS[arm](model, ids, threads, Path(folder))
                running[arm].prefill(1), running[arm].decode(1)
                if (cosine := torch.cosine_similarity(running[arm].logits, truth, dim=0)) < LEAST_COSINE:
                    raise ValueError(f"the cosine between its logits and those of float32 is {cosine:.2f}")
            except Exception as error:  # other people's libraries: a row of the table
                errors[arm] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                running.pop(arm, None)
        times = {}
        for phase, calls in (("prefill", 1), ("decode", TOKENS)):
            samples = {arm: getattr(ready, phase) for arm, ready in running.items()}
            with tqdm(total=rounds * len(samples), desc=phase) as progress:
                times[phase] = measure.interleave(samples, rounds, calls=calls, turn=progress.update)
    isa = potqat.cpu_info()["isa"]
    size = min((ready.bytes for ready in running.values()), default=64)
    rows = []
    for arm in arms:
        row = {"arm": arm, "threads": threads, "error": errors.get(arm)}
        if arm in running:
            ready = running[arm]
            row["bytes_per_token"] = ready.bytes
            row["cosine"] = torch.cosine_similarity(ready.logits, truth, dim=0).item()
            for phase, tokens in (("prefill", PREFILL), ("decode", 1)):
                t = times[phase][arm]
                row[phase] = {"ms": {"median": 1e3 * t.median, "min": 1e3 * t.least, "max": 1e3 * t.most},
                              "tokens_per_second": tokens / t.median}  # fmt: skip
        rows.append(row)
    calibration = {
        "threads": threads,
        "isa": isa,
        "read_bytes": size,
        "read_gb_per_second": measure.read_rate(size, threads, rounds) / 1e9,
        "peak_gops": measure.peak_rate(isa, threads, rounds) / 1e9,
    }
    shape = {name: getattr(shape, name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
    return {"machine": results.machine(), "shape": shape, "prefill_tokens": PREFILL, "context": CONTEXT,
            "rounds": rounds, "versions": report.versions(), "calibration": [calibration], "rows": rows}  # fmt: skip


# ---- Arms: (float model, ids, threads, folder) -> Running ---------------------------------------------------


def torch_arm(
    prepare: Callable[[GPT], GPT], how: str, model: GPT, ids: torch.Tensor, threads: int, folder: Path
) -> Running:
    """``prepare`` makes the arm's model of a copy of the float one; ``how``: "eager", "compiled" or "program"."""
    model = prepare(copy.deepcopy(model))
    decoder = Decoder(model, 1, compile=_new_file(folder) if how == "program" else how == "compiled")
    decoder(ids[:, :CONTEXT])
    logits = decoder(ids[:, CONTEXT : CONTEXT + 1])[0, -1]
    tokens = [ids[:, i : i + 1].clone() for i in range(TOKENS)]
    whole = torch.compile(model, fullgraph=True, dynamic=False) if how == "compiled" else model

    def decode(count: int) -> tuple[int, float]:
        decoder.length = CONTEXT
        begin = time.perf_counter()
        for i in range(count):
            decoder(tokens[i])
        return count, time.perf_counter() - begin

    return Running(measure.of_calls(lambda: whole(ids)), decode, logits, weight_bytes(model))


def _new_file(folder: Path) -> Path:
    return folder / f"{len(list(folder.iterdir()))}.pt2"


def packed(cfg: PoTConfig) -> Callable[[GPT], GPT]:
    """Quantize and pack in place."""

    def prepare(model: GPT) -> GPT:
        potqat.quantize_(model, cfg)
        return model

    return prepare


def dynamic_int8(model: GPT) -> GPT:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)


def torchao_int8(model: GPT) -> GPT:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def llama_arm(extra_buffers: bool, model: GPT, ids: torch.Tensor, threads: int, folder: Path) -> Running:
    import ggml
    import llama

    if extra_buffers and "AMX" in ggml.Process().buffer_types:
        ggml.check("AMX")
    path = folder / "model.gguf"
    if not path.exists():
        llama.write_gguf(model, path)
    reader, tokens = llama.Process(path, model.config.block_size, threads, extra_buffers), ids[0].tolist()
    reader.read(tokens[:CONTEXT], 0)
    reader.read_each(tokens[CONTEXT : CONTEXT + 1], CONTEXT)
    logits = reader.last_logits()

    def prefill(count: int) -> tuple[int, float]:
        return count, sum(reader.read(tokens, 0) for _ in range(count))

    def decode(count: int) -> tuple[int, float]:
        reader.read(tokens[:CONTEXT], 0)
        return count, reader.read_each(tokens[:count], CONTEXT)

    return Running(prefill, decode, logits, llama.read_bytes(path))


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights but the table of positions and a token table that is not the head's."""
    hidden = sum(  # quantize_dynamic's modules hold their weights where parameters() does not look: int8, scales
        module.out_features * (module.in_features + 4)
        for module in model.modules()
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
    )
    tables = bench.tensor_bytes(model.transformer.wpe)
    head, table = model.lm_head, model.transformer.wte
    if not isinstance(head, potqat.modules.Packed) and getattr(head, "weight", None) is not table.weight:
        tables += bench.tensor_bytes(table)
    return bench.tensor_bytes(model) + hidden - tables


POT4 = PoTConfig(scale="absmax", embedding_grid="pot4")
ARMS = {
    "float32": partial(torch_arm, lambda model: model, "eager"),
    "float32 compiled": partial(torch_arm, lambda model: model, "compiled"),
    "float32 program": partial(torch_arm, lambda model: model, "program"),
    "pot4": partial(torch_arm, packed(POT4), "eager"),
    "pot4 compiled": partial(torch_arm, packed(POT4), "compiled"),
    "pot4 program": partial(torch_arm, packed(POT4), "program"),
    "pot4, int8 head, program": partial(torch_arm, packed(PoTConfig(scale="absmax")), "program"),
    "pot4, groups of 128, program": partial(
        torch_arm, packed(PoTConfig(scale="absmax", embedding_grid="pot4", granularity=128)), "program"
    ),
    "torch dynamic int8": partial(torch_arm, dynamic_int8, "eager"),
    "torchao int8": partial(torch_arm, torchao_int8, "eager"),
    "torchao int8 compiled": partial(torch_arm, torchao_int8, "compiled"),
    "llama.cpp Q4_0": partial(llama_arm, True),
    "llama.cpp Q4_0, plain buffers": partial(llama_arm, False),
}


# ---- Results ------------------------------------------------------------------------------------------------


def table(found: dict) -> str:
    line = found["calibration"][0]
    lines = [
        f"threads: {line['threads']}, {line['isa']}; calibration: read {line['read_gb_per_second']:.1f} GB/s "
        f"({line['read_bytes'] / 1e6:.0f} MB), peak {line['peak_gops']:,.0f} GOPS",
        f"{'':<32} {'prefill':>9} {'tokens/s':>9} {'a token':>9} {'tokens/s':>9} {'MB read':>8} {'cosine':>7}",
    ]
    for row in found["rows"]:
        if row["error"]:
            lines.append(f"{row['arm']:<32} did not run: {row['error']}")
            continue
        cells = [f"{row[p]['ms']['median']:6.1f} ms {row[p]['tokens_per_second']:9.1f}" for p in ("prefill", "decode")]
        lines.append(f"{row['arm']:<32} {' '.join(cells)} {row['bytes_per_token'] / 1e6:8.1f} {row['cosine']:7.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
