"""Models of three kinds and their packed folders; without transformers the tests that want them are skipped."""

from types import SimpleNamespace

import pytest
import torch

from potqat.models.gpt import GPT, GPTConfig


@pytest.fixture(scope="module", autouse=True)
def _settings():
    """One thread, and transformers as it was: the command line silences it."""
    from command import transformers

    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer():
    from command import VOCABULARY, WORDS, transformers
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([WORDS], vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def at(tmp_path_factory, tokenizer):
    """Files and folders by name: the float models, and their packed ones, made by the command."""
    from command import CONTEXT, KINDS, VOCABULARY, WORDS, good, gpt2_config, named_tokenizer, save_hf, transformers

    root = tmp_path_factory.mktemp("a place")  # with a space in it
    at = SimpleNamespace(root=root, text=root / "words.txt")
    at.text.write_text(WORDS)
    at.gpt2 = save_hf(gpt2_config(), root / "gpt2", tokenizer)
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    at.llama = save_hf(llama, root / "llama", tokenizer)
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
