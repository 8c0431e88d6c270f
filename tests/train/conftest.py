"""A text and float models of three kinds, and one run on them; without transformers all tests here are skipped."""

import json
from types import SimpleNamespace

import pytest
import torch

from potqat.cli import main
from potqat.models.gpt import GPT, GPTConfig


@pytest.fixture(scope="module", autouse=True)
def _settings(command_settings):
    pass


@pytest.fixture(scope="module")
def at(tmp_path_factory, bpe_tokenizer):
    """A text, and float models of three kinds."""
    from train_command import VOCABULARY, WORDS, gpt2_config, llama_config, transformers

    tokenizer = bpe_tokenizer(WORDS, VOCABULARY)
    root = tmp_path_factory.mktemp("train")
    at = SimpleNamespace(root=root, text=root / "words.txt", nanogpt=root / "ckpt.pt", tokenizer=tokenizer)
    at.text.write_text(WORDS)
    for name, config in (("llama", llama_config()), ("gpt2", gpt2_config())):
        torch.manual_seed(0)
        setattr(at, name, root / name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": False}
    shape |= {"vocab_size": len(set(WORDS)), "dropout": 0.1}
    torch.manual_seed(0)
    torch.save({"model": GPT(GPTConfig(**shape)).state_dict(), "model_args": shape}, at.nanogpt)
    return at


@pytest.fixture(scope="module")
def run(at):
    """(folder, its metrics) of one run with a control."""
    from train_command import command

    out = at.root / "run"
    threads = torch.get_num_threads()
    assert main(command(at, "llama", out, "--loss=ce", "--control")) == 0
    torch.set_num_threads(threads)
    return out, json.loads((out / "metrics.json").read_text())
