"""potqat train as a test calls it, and the small models that it is given."""

import json

import pytest
import torch

import potqat
from potqat import PoTConfig

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")

WORDS = "".join(f"The number {i} times {i} is {i * i}, and so it goes on from {i % 7}.\n" for i in range(160))
VOCABULARY = 300
TINY = ["--context=16", "--batch=2", "--accumulate=2", "--steps=6", "--evaluate-every=2"]
TINY += ["--calibration-tokens=256", "--threads=1", "--learning-rate=1e-3"]


def llama_config(**changes):
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, "initializer_range": 0.2}
    return transformers.LlamaConfig(**fields | ends | changes)


def gpt2_config():
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip


def command(at, kind, out, *more):
    tokenizer = ["--tokenizer", at.text] if kind == "nanogpt" else []
    return [str(a) for a in ("train", getattr(at, kind), "--data", at.text, "--out", out, *TINY, *tokenizer, *more)]


def outcome(out):
    metrics = json.loads((out / "metrics.json").read_text())
    return {key: metrics[key] for key in ("curves", "losses", "results", "file_bytes", "start")}


def prepared(config=None):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config or llama_config())
    potqat.prepare_qat_(model, PoTConfig(scale="learned"))
    return model
