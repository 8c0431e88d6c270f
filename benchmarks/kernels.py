"""Speed of one linear layer beside every way to compute it on a CPU that was at hand.

    python benchmarks/kernels.py [--quick] [--shapes 768x768 ...] [--threads 1 2] [--isa avx512vbmi] [--out NAME]

Peers take turns, round by round, at equal threads: medians of nine samples of at least 2 ms, with least and most.
Weights are hot (the same each time) and, for one token, rotated through copies that together exceed the caches. Beside
each group stands what the machine can do: read bandwidth of memory where those weights are, and the peak of the
instruction set. All times are of float32 activations in, float32 out, quantization included, but for the bfloat16
peers, whose activations are bfloat16 already; all but llama.cpp's include a call from Python.

Writes benchmarks/results/NAME.json after each group, and at the end NAME.md and the roofline NAME.png. Groups that an
earlier run on the same machine wrote there stay until they are measured again, so a long run can be cut into shapes.
`pip install 'potqat[bench]'` brings llama.cpp; what is not installed or does not run is a row that says so.
On a machine with AMX, ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI beside --isa avx512vbmi holds PyTorch to the same.
"""

import argparse
import json
from functools import cache, partial

import ggml
import report
import roofline
import torch
from torch import nn
from tqdm import tqdm

from potqat.config import PoTConfig
from potqat.flows import bench, results
from potqat.flows.bench import Layer, Peer

SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096), (50257, 768))  # n, k
ROWS = (1, 2, 4, 8, 32, 128, 512)
COMPILED_ROWS = (1, 32, 512)  # each is compiled anew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="768x768 and 4096x4096, m = 1, 8 and 512")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="NxK", help="instead of all")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="instead of all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=bench.ROUNDS)
    parser.add_argument("--isa", help="potqat's instruction set (default: the best)")
    parser.add_argument("--out", metavar="NAME", help="of the files in benchmarks/results (default: kernels_ISA)")
    arguments = parser.parse_args()
    path = report.start(arguments.isa, arguments.out, "kernels")
    plan = bench.Plan(
        shapes=arguments.shapes or (bench.SHORT.shapes if arguments.quick else SHAPES),
        rows=arguments.rows or (bench.SHORT.rows if arguments.quick else ROWS),
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    groups = []
    with tqdm(total=plan.turns(peers()), desc="kernels", unit="sample") as progress:
        for calibration, rows in bench.run(plan, peers(), progress.update):
            groups.append((calibration, rows))
            progress.write(bench.table(calibration, rows) + "\n")
            results.write_json(
                path, report.merge(path, bench.report(groups) | {"versions": report.versions()}, bench.KEY)
            )
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(markdown(whole), encoding="utf-8")
    roofline.plot(path.with_suffix(".png"), whole)
    print(f"wrote {path}, .md and .png")


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


# ---- Peers --------------------------------------------------------------------------------------------------


@cache
def peers() -> tuple[Peer, ...]:
    """potqat's own, PyTorch's, torchao's and ggml's."""
    places = ("AMX", "CPU_REPACK", "CPU")
    return (
        *bench.OURS,
        Peer("potqat pot4, PackedLinear", lambda w: Layer(bench.packed_linear(w, PoTConfig(scale="absmax"))), (1,)),
        *bench.TORCH,
        Peer("torch int8, Inductor", lambda w: Compiled(bench.Int8Linear(w)), COMPILED_ROWS),
        Peer("torch dynamic int8", dynamic_int8),
        Peer("torchao int8", lambda w: Layer(torchao(w, "int8"))),
        Peer("torchao int8, Inductor", lambda w: Compiled(torchao(w, "int8")), COMPILED_ROWS),
        Peer("torchao int4, bfloat16 activations", lambda w: Layer(torchao(w, "int4"), torch.bfloat16)),
        Peer("torchao int4, int8 activations", lambda w: Layer(torchao(w, "int8-int4"))),
        *(Peer(f"llama.cpp Q4_0, {place}", partial(Ggml, place)) for place in places),
    )


class Compiled(Layer):
    """A module through torch.compile, for the shape of x alone."""

    def start(self, x: torch.Tensor, copies: int, threads: int) -> bench.Running:
        torch._dynamo.reset()
        layer = Layer(self.module, self.dtype, self.bytes)
        layer.module = torch.compile(self.module, dynamic=False, fullgraph=True)
        return layer.start(x, copies, threads)


def dynamic_int8(w: torch.Tensor) -> Layer:
    """What torch.ao.quantization.quantize_dynamic makes of a Linear."""
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w, requires_grad=False)
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)
    return Layer(quantized, weight_bytes=w.numel() + 4 * w.shape[0])  # packed inside: int8 and a scale a channel


def torchao(w: torch.Tensor, kind: str) -> nn.Module:
    """A Linear that torchao has quantized. Its 4-bit weights for CPUs come in groups, and are a prototype in 0.18."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    dtype = torch.bfloat16 if kind == "int4" else torch.float32
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=dtype))
    model[0].weight = nn.Parameter(w.to(dtype), requires_grad=False)
    if kind == "int8":
        config = Int8DynamicActivationInt8WeightConfig()
    else:
        from torchao.prototype.quantization import int4

        name = "PrototypeInt4WeightOnlyConfig" if kind == "int4" else "Int8DynamicActivationInt4WeightConfig"
        config = getattr(int4, name)(group_size=128, set_inductor_config=False)
    quantize_(model, config)
    if type(model[0].weight.data) is torch.Tensor:  # torchao only logs what it leaves alone
        raise ValueError(f"torchao left a weight {list(w.shape)} as it was")
    return model


class Ggml:
    """A weight for ggml in one buffer type."""

    def __init__(self, place: str, w: torch.Tensor):
        if place not in _ggml().buffer_types:
            raise ValueError(f"this build of ggml has no {place} buffers on this machine")
        _checked(place)
        self.place, self.w, self.bytes = place, w.numpy(), w.numel() // ggml.BLOCK * ggml.BLOCK_BYTES

    def start(self, x: torch.Tensor, copies: int, threads: int) -> bench.Running:
        return _ggml().start(self.place, self.w, x.numpy(), copies, threads)


@cache
def _ggml() -> ggml.Process:
    return ggml.Process()


@cache
def _checked(place: str) -> None:
    ggml.check(place)


# ---- Results ------------------------------------------------------------------------------------------------


def markdown(whole: dict) -> str:
    """All groups as one table: microseconds, the median, of each peer."""
    names = [peer.name for peer in peers()]
    about = whole["machine"]
    lines = [
        f"{about['cpu']}, {about['isa']}, torch {about['torch']}, potqat {about['potqat']}. Microseconds, medians.",
        "",
        f"| m, n, k | threads | weights | read GB/s | peak GOPS | {' | '.join(names)} |",
        "|" + "---|" * (5 + len(names)),
    ]
    for group in whole["calibration"]:
        rows = {r["peer"]: r for r in whole["rows"] if all(r[name] == group[name] for name in bench.KEY)}
        cells = [f"{group['m']}, {group['n']}, {group['k']}", str(group["threads"]), group["residency"]]
        cells += [f"{group['read_gb_per_second']:.1f}", f"{group['peak_gops']:,.0f}"]
        for name in names:
            row = rows.get(name)
            cells.append("" if row is None else "-" if row["error"] else f"{row['microseconds']['median']:,.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    errors = {(row["peer"], row["error"]) for row in whole["rows"] if row["error"]}
    return "\n".join([*lines, "", *(f"* {peer} did not run: {error}" for peer, error in sorted(errors)), ""])


if __name__ == "__main__":
    main()
