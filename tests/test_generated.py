"""Calibration text that a model writes itself: which distribution it follows, and what it leaves alone."""

import pytest
import torch

from potqat.flows.generated import AT_ONCE, generate_windows
from potqat.flows.sources import logits_of
from potqat.models.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")

VOCABULARY, CONTEXT = 12, 16


def make(kind):
    """A model whose next token depends on the one before, by some nats."""
    torch.manual_seed(0)
    if kind == "own":
        config = GPTConfig(block_size=CONTEXT, vocab_size=VOCABULARY, n_layer=1, n_head=2, n_embd=32, dropout=0.0)
        model = GPT(config)
        torch.nn.init.normal_(model.transformer.wte.weight, std=0.12)
        return model.eval()
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 48}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=0,
        eos_token_id=1, **sizes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.top_k = 1  # what came with the model does not count
    return model


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_windows_follow_the_models_distribution_from_one_of_the_starts(kind):
    model, starts = make(kind), torch.tensor([3, 7])
    windows = generate_windows(model, 3000, 3, starts)
    assert windows.shape == (3000, 3)
    assert windows.dtype == torch.int64
    for start in (3, 7):
        rows = windows[windows[:, 0] == start]
        assert 1300 < len(rows) < 1700  # 1,500 expected; standard deviation 27
        with torch.no_grad():
            chances = logits_of(model)(torch.tensor([[start]]))[0, 0].softmax(-1)
        found = torch.bincount(rows[:, 1], minlength=VOCABULARY) / len(rows)
        deviation = (chances * (1 - chances) / len(rows)).sqrt()
        assert ((found - chances).abs() < 5 * deviation + 1e-3).all()
        assert 0.05 < chances.max() < 0.95


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_the_same_call_gives_the_same_windows_and_leaves_no_trace(kind):
    model, starts = make(kind), torch.arange(2, VOCABULARY)
    state = torch.get_rng_state()
    config = getattr(model, "generation_config", None)
    first = generate_windows(model, AT_ONCE + 3, CONTEXT, starts)  # not a whole number of parts, up to the context
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(model, "generation_config", None) is config
    assert first.shape == (AT_ONCE + 3, CONTEXT)
    assert torch.equal(generate_windows(model, AT_ONCE + 3, CONTEXT, starts), first)
    assert not torch.equal(generate_windows(model, AT_ONCE + 3, CONTEXT, starts, seed=1), first)
    assert (first[:, 0] >= 2).all()
    assert (first[:, 1:] == 1).any()  # the token that ends a text is one like others
