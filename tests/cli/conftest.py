"""Models of three kinds and their packed folders; without transformers the tests that want them are skipped."""

from types import SimpleNamespace

import pytest
import torch

from potqat.models.gpt import GPT, GPTConfig


@pytest.fixture(scope="module", autouse=True)
def _settings(command_settings):
    pass


@pytest.fixture(scope="module")
def tokenizer(bpe_tokenizer):
    from command import VOCABULARY, WORDS

    return bpe_tokenizer(WORDS, VOCABULARY)


@pytest.fixture(scope="module")
def at(tmp_path_factory, tokenizer, small_llama):
    """Files and folders by name: the float models, and their packed ones, made by the command."""
    from command import CONTEXT, KINDS, WORDS, good, gpt2_config, named_tokenizer, save_hf

    root = tmp_path_factory.mktemp("a place")  # with a space in it
    at = SimpleNamespace(root=root, text=root / "words.txt")
    at.text.write_text(WORDS)
    at.gpt2 = save_hf(gpt2_config(), root / "gpt2", tokenizer)
    at.llama = small_llama(root / "llama", WORDS)
    at.mute = save_hf(gpt2_config(), root / "mute")
    at.half = save_hf(gpt2_config(), root / "half", tokenizer, torch.bfloat16)
    at.nanogpt = root / "ckpt.pt"
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": CONTEXT, "bias": False}
    arguments |= {"vocab_size": len(set(WORDS)), "dropout": 0.1}
    torch.manual_seed(0)
    torch.save({"model": GPT(GPTConfig(**arguments)).state_dict(), "model_args": arguments}, at.nanogpt)
    at.packed = {kind: root / f"packed {kind}" for kind in KINDS}
    at.said = {}
    for kind, folder in at.packed.items():
        at.said[kind] = good("quantize", getattr(at, kind), "--out", folder, *named_tokenizer(kind, at))
    return at
