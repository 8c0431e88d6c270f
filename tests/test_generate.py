"""Decoding and sampling: the cache changes nothing but the time, compiles to one graph, and is left when it must be."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import potqat
from potqat.models.generate import SLOTS, Decoder, generate, stream
from potqat.models.gpt import GPT, GPTConfig
from potqat.modules import Packed

CONFIG = GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.3, bias=True)
PIECES = [(16,), (1,) * 16, (5, 1, 7, 3)]


def gpt(kind="float"):
    """float; bfloat16; packed with float activations; packed with int8 activations, in float32 or in bfloat16."""
    model = GPT(CONFIG).eval()
    if "packed" in kind or "int8" in kind:
        potqat.quantize_(model, potqat.PoTConfig(activations="int8" if "int8" in kind else None))
    return model.bfloat16() if "bfloat16" in kind else model


def exact(model):
    """The same weights in float64, activations too."""
    twin = GPT(model.config).eval()
    state = twin.state_dict() | {k: v for k, v in model.state_dict().items() if k in twin.state_dict()}
    packed = {f"{name}.weight": m.dequantize() for name, m in model.named_modules() if isinstance(m, Packed)}
    twin.load_state_dict(state | packed)
    return twin.double()


def ids(batch=3, time=16):
    return torch.randint(CONFIG.vocab_size, (batch, time))


def read(decoder, idx, pieces=(5, 1, 7, 3)):
    return torch.cat([decoder(piece) for piece in idx.split(pieces, dim=1)], dim=1)


@pytest.fixture
def aot_eager(monkeypatch):
    """``compile=True`` compiles to ATen calls, not with Inductor; gives the count of graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


# ---- The cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@torch.no_grad()
def test_attention_with_a_cache_stays_within_the_summation_bound(pieces):
    """Not bit for bit: one row is multiplied by another kernel than sixteen, and the masked slots are summed too.
    Two sums of k products differ by at most 2 k u sum|x w|, u = 2^-24 (Higham, Accuracy and Stability, 3.1); what that
    makes of the next sum is added to first order, and doubled."""
    layer, x, u = gpt().transformer.h[0].attn, torch.randn(3, 16, 32), 2.0**-24
    layer.c_attn.weight *= 5  # attention that looks at some tokens more than at others
    keys, values = torch.zeros(2, 3, 2, 16, 16)
    ours = []
    for positions in torch.arange(16).split(pieces):
        mask = torch.arange(16) <= positions[:, None]
        ours.append(layer(x[:, positions], (keys, values, positions, mask)))

    def heads(qkv):
        return (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in qkv.chunk(3, -1))

    w = layer.c_attn.weight.abs().t()
    q, k, v = heads(layer.c_attn(x))
    dq, dk, dv = heads(2 * 33 * u * (x.abs() @ w + layer.c_attn.bias.abs()))
    ds = (dq @ k.abs().mT + q.abs() @ dk.mT + 2 * 18 * u * (q.abs() @ k.abs().mT)) / 4
    p = (q @ k.mT / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
    dp = p * (ds + (p * ds).sum(-1, keepdim=True) + 2 * 24 * u)  # 16 terms in the sum; exp and division round, too
    y, dy = p @ v, dp @ v.abs() + p @ dv + 2 * 16 * u * (p @ v.abs())
    y, dy = (z.transpose(1, 2).flatten(2) for z in (y, dy))
    w = layer.c_proj.weight.abs().t()
    bound = 2 * (dy @ w + 2 * 33 * u * (y.abs() @ w + layer.c_proj.bias.abs()))
    expected = layer(x)
    assert bound.max() < 1e-3 * expected.abs().max()
    assert ((torch.cat(ours, dim=1) - expected).abs() <= bound).all()


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("kind", ["float", "bfloat16", "packed", "int8", "int8 bfloat16"])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(kind, pieces):
    """If the cache adds no error of its own, then with and without it the logits are as far from the exact ones, and
    by the triangle inequality at most twice that from each other: a few 1e-7 in float32, where a key that is missing
    or too many costs 1e-3."""
    model, idx = gpt(kind), ids()
    expected, decoder = model(idx), Decoder(model, 3)
    assert {t.dtype for pair in decoder.cache for t in pair} == {expected.dtype}
    difference = read(decoder, idx, pieces) - expected
    assert difference.square().mean() <= 4 * (expected - exact(model)(idx)).square().mean()
    assert decoder.length == CONFIG.block_size


@torch.no_grad()
def test_slots_behind_the_used_ones_are_not_read():
    model = GPT(dataclasses.replace(CONFIG, block_size=2 * SLOTS + 22)).eval()
    idx = torch.randint(CONFIG.vocab_size, (2, model.config.block_size))
    decoder, logits = Decoder(model, 2), []
    for end in (SLOTS, 2 * SLOTS, model.config.block_size):
        for pair in decoder.cache:
            for slots in pair:
                slots[:, :, decoder.length : end], slots[:, :, end:] = 0, math.nan  # masked, NaN would still be seen
        logits += [decoder(idx[:, i : i + 1]) for i in range(decoder.length, end)]
    expected = model(idx)
    difference = torch.cat(logits, dim=1) - expected
    assert difference.square().mean() <= 4 * (expected - exact(model)(idx)).square().mean()


def test_logits_of_a_token_can_be_written_to():
    decoder = Decoder(gpt(), 3)
    logits = decoder(ids()[:, :1])
    logits[..., 0] = -math.inf
    assert not logits.requires_grad


@torch.no_grad()
def test_autocast_reaches_the_cache():
    model, idx = gpt(), ids()
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = model(idx), read(Decoder(model, 3), idx)
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).square().mean() <= 4 * (expected - exact(model)(idx)).square().mean()


def test_slots_not_yet_written_count_for_nothing_and_written_ones_stay():
    model, idx = gpt("int8"), ids()
    clean, filled = Decoder(model, 3), Decoder(model, 3)
    for pair in filled.cache:
        for slots in pair:
            slots.fill_(1e3)
    assert torch.equal(filled(idx[:, :5]), clean(idx[:, :5]))
    before = [slots.clone() for pair in filled.cache for slots in pair]
    assert torch.equal(filled(idx[:, 5:6]), clean(idx[:, 5:6]))
    for slots, old in zip((slots for pair in filled.cache for slots in pair), before, strict=True):
        assert torch.equal(slots[:, :, :5], old[:, :, :5])
        assert (slots[:, :, 5] != 1e3).all()
        assert (slots[:, :, 6:] == 1e3).all()


def test_dropout_acts_in_training_only():
    model, idx = gpt(), ids()
    assert torch.equal(read(Decoder(model, 3), idx), read(Decoder(model, 3), idx))
    model.train()
    assert not torch.equal(read(Decoder(model, 3), idx), read(Decoder(model, 3), idx))


@pytest.mark.parametrize("compile", [False, True])
def test_what_does_not_fit_is_refused_and_leaves_the_cache_alone(compile, aot_eager):
    model, idx = gpt(), ids()
    decoder = Decoder(model, 3, compile)
    with pytest.raises(ValueError, match="at most block_size=16 tokens fit, got 17 after 0; start a new Decoder"):
        decoder(ids(3, 17))
    decoder(idx[:, :15])
    for wrong in (idx[:2, 15:], idx.repeat(2, 1)[:, 15:]):
        with pytest.raises(ValueError, match=rf"made for a batch of 3, got {len(wrong)}; make another"):
            decoder(wrong)
    with pytest.raises(ValueError, match="got 2 after 15"):
        decoder(idx[:, 14:])
    last = decoder(idx[:, 15:])
    assert torch.equal(last, read(Decoder(model, 3), idx, (15, 1))[:, 15:])
    with pytest.raises(ValueError, match="got 1 after 16"):
        decoder(idx[:, :1])


def test_a_cache_without_meaning_is_refused():
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        Decoder(gpt(), 0)
    model = gpt()
    with pytest.raises(ValueError, match="cache and positions go together"):
        model(ids(), model.empty_cache(3))


# ---- Compiled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_one_graph_decodes_every_position_of_every_text(kind, aot_eager):
    model = gpt(kind)
    for idx in (ids(), ids()):
        assert torch.equal(read(Decoder(model, 3, compile=True), idx, 1), read(Decoder(model, 3), idx, 1))
    assert aot_eager.frame_count == 1


@pytest.mark.parametrize(("kind", "batch"), [("packed", 1), ("int8", 2)])
def test_compiled_tokens_are_the_eager_ones(kind, batch, aot_eager):
    model, start = gpt(kind), ids(batch, 3)
    compiled = generate(model, start, 20, context=16, temperature=0, compile=True)
    assert aot_eager.frame_count == 1
    assert torch.equal(compiled, generate(model, start, 20, context=16, temperature=0))


def test_inductor_decodes_a_packed_model():
    """Inductor's layer norm rounds differently in the last bit, which can turn an int8 activation by one step. f such
    steps in a row of K move it by sqrt(f) steps, rounding all of its entries moved it by sqrt(K / 12): while f < K / 12
    (f is about 0 here) Inductor costs less than int8 activations do."""
    torch._dynamo.reset()
    model, start = gpt("int8"), ids(2, 3)
    tokens = generate(model, start, 13, context=16, temperature=0)
    assert torch.equal(generate(model, start, 13, context=16, temperature=0, compile=True), tokens)
    eager = read(Decoder(model, 2), tokens, 1)
    difference = read(Decoder(model, 2, compile=True), tokens, 1) - eager
    assert difference.square().mean() <= (eager - exact(model)(tokens)).square().mean()


# ---- Sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 7, 16])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "top_k": 5}, {}], ids=str)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_tokens_are_those_of_a_model_without_a_cache(kind, options, context):
    """Any module but a GPT is read anew for each token."""
    model, start = gpt(kind), ids(2, 5)
    results = [
        generate(module, start, 30, context=context, generator=torch.Generator().manual_seed(1), **options)
        for module in (model, nn.Sequential(model))
    ]
    assert torch.equal(*results)
    assert results[0].shape == (2, 35)
    assert torch.equal(results[0][:, :5], start)


def test_greedy_tokens_are_the_most_likely_ones_past_the_context():
    model, start = gpt(), ids(2, 5)
    greedy = generate(model, start, 30, context=16, temperature=0)
    for end in range(5, 35):
        expected = model(greedy[:, max(0, end - 16) : end])[:, -1].argmax(-1)
        assert torch.equal(greedy[:, end], expected)
    for options in ({"top_k": 1}, {"temperature": 1e-6}, {"temperature": 0, "top_k": 3}):
        assert torch.equal(generate(model, start, 30, context=16, **options), greedy)


def test_the_generator_decides():
    model, start = gpt(), ids(2, 5)

    def sample(seed):
        return generate(model, start, 30, context=16, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_a_gpt_reads_each_token_once_until_the_text_outgrows_it():
    model, seen = gpt(), []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    generate(model, ids(2, 5), 14, context=16)
    assert seen == [5] + [1] * 11 + [16] * 2
    seen.clear()
    generate(model, ids(2, 5), 6, context=8)
    assert seen == [5] + [1] * 3 + [8] * 2
    seen.clear()
    generate(model, ids(2, 20), 2, context=16)
    assert seen == [16] * 2


def test_an_exported_model_generates():
    model, start = gpt(), ids(2, 3)
    shapes = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=1, max=16)},)
    exported = torch.export.export(model, (ids(),), dynamic_shapes=shapes).module(check_guards=False)
    tokens = generate(exported, start, 20, context=16, temperature=0)
    assert torch.equal(tokens, generate(model, start, 20, context=16, temperature=0))


def test_stream_gives_each_token_when_it_is_asked_for():
    model, start, calls = gpt(), ids(2, 5), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    tokens = []
    for token in stream(model, start, 4, context=16, temperature=0):
        tokens.append(token)
        assert len(calls) == len(tokens)
        assert torch.is_grad_enabled()
        assert token.shape == (2, 1)
    assert calls == [False] * 4
    assert torch.equal(torch.cat([start, *tokens], dim=1), generate(model, start, 4, context=16, temperature=0))
    assert torch.equal(generate(model, start, 0, context=16), start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be positive, or 0 for the most likely token.*got -0.1 and None"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be positive, got 1.0 and 0"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"idx": torch.zeros(2, 0, dtype=torch.int64)}, r"T at least 1, got \[2, 0\]"),
        ({"idx": torch.zeros(2, dtype=torch.int64)}, r"must be \[B, T\].*got \[2\]"),
        ({"model": nn.Sequential(), "compile": True}, "compile needs a GPT, got Sequential"),
    ],
)
def test_values_without_a_meaning_are_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        stream(**{"model": gpt(), "idx": ids(1, 1), "n": 1, "context": 16} | options)
