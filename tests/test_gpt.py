"""The GPT: nanoGPT's names, function and checkpoints, export and compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import potqat
from potqat.models.gpt import GPT, GPTConfig, load_nanogpt

CONFIG = GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.3, bias=True)


def ids(batch=3, time=16):
    return torch.randint(CONFIG.vocab_size, (batch, time))


def nanogpt_checkpoint(model, **changes):
    """What nanoGPT's train.py saves, from a compiled model on an old PyTorch (masks are buffers there)."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(CONFIG.n_layer):
        state[f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(16, 16).tril()[None, None]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    checkpoint = {
        "model": state,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {name: getattr(CONFIG, name) for name in names},
        "iter_num": 5000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "device": "cuda"},
    }
    return checkpoint | changes


def saved(tmp_path, checkpoint):
    path = tmp_path / "ckpt.pt"
    torch.save(checkpoint, path)
    return path


def test_parameters_have_nanogpt_names_and_the_head_is_the_table():
    block = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
    block += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias"]
    block += ["mlp.c_proj.weight", "mlp.c_proj.bias"]
    expected = ["transformer.wte.weight", "transformer.wpe.weight"]
    expected += [f"transformer.h.{layer}.{name}" for layer in range(2) for name in block]
    expected += ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    model = GPT(CONFIG)
    assert list(model.state_dict()) == expected
    assert model.transformer.wte.weight is model.lm_head.weight


def test_initial_weights_follow_nanogpt():
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert torch.equal(p, torch.ones_like(p) if "ln_" in name and "weight" in name else torch.zeros_like(p))
    loss = F.cross_entropy(model(torch.randint(500, (8, 64))).flatten(0, 1), torch.randint(500, (512,)))
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


def test_forward_is_nanogpts_formula():
    model = GPT(CONFIG).eval()
    idx = ids()
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    x = wte[idx] + wpe[:16]
    for block in model.transformer.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(32, dim=2)
        q, k, v = (part.view(3, 16, 2, 16).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(16)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 16, 32))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    torch.testing.assert_close(model(idx), model.transformer.ln_f(x) @ wte.t())


def test_later_tokens_do_not_change_earlier_logits():
    model = GPT(CONFIG).eval()
    idx = ids()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % CONFIG.vocab_size
    torch.testing.assert_close(model(idx)[:, :9], model(changed)[:, :9])
    assert not torch.allclose(model(idx)[:, 9:], model(changed)[:, 9:])


def test_dropout_is_at_its_p_in_training_and_off_in_eval():
    model = GPT(CONFIG)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    idx = ids()
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="at most block_size=16 tokens fit, got 17"):
        GPT(CONFIG)(ids(time=17))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_head": 3}, "n_head must divide n_embd"), ({"n_layer": 0}, "n_layer"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_shapes_are_refused(change, message):
    fields = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(fields | change))


@pytest.mark.parametrize("training", [True, False])
def test_exports_with_dynamic_batch_and_time(training):
    model = GPT(CONFIG).train(training)
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1, max=CONFIG.block_size)
    program = torch.export.export(model, (ids(2, 16),), dynamic_shapes=({0: batch, 1: time},))
    attention = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert [node.args[4] for node in attention] == [0.3 if training else 0.0] * 2
    exported = program.module(check_guards=False)
    for shape in [(1, 1), (5, 7), (2, 16)]:
        idx = ids(*shape)
        if training:
            assert exported(idx).shape == (*shape, CONFIG.vocab_size)
        else:
            torch.testing.assert_close(exported(idx), model(idx))


def test_compiles_to_one_graph():
    model = GPT(CONFIG).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    idx = ids()
    torch.testing.assert_close(compiled(idx), model(idx))


@pytest.mark.parametrize("activations", ["int8", "int16", None])
def test_packed_gpt_compiles_to_one_graph(activations):
    """The same graph gives the same bits; Inductor's fused layer norms round differently in the last bits, which int8
    activations can turn into one step of 1/127 of a row's largest entry (int16: 1/32,258)."""
    model = GPT(CONFIG).eval()
    potqat.quantize_(model, potqat.PoTConfig(activations=activations))
    idx = ids()
    with torch.no_grad():
        expected = model(idx)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(idx), expected)
        difference = (torch.compile(model, fullgraph=True)(idx) - expected).abs().max()
    assert difference <= {"int8": 0.01, "int16": 1e-4, None: 1e-5}[activations] * expected.abs().max()


def test_quantizes_with_the_tied_table_packed_once():
    model = GPT(CONFIG).eval()
    report = potqat.quantize_(model, potqat.PoTConfig())
    assert len(report.quantized) == 2 + 4 * CONFIG.n_layer + 1
    assert model.lm_head.packed.data_ptr() == model.transformer.wte.packed.data_ptr()
    assert model(ids()).isfinite().all()


def test_loads_a_nanogpt_checkpoint(tmp_path):
    source = GPT(CONFIG).eval()
    loaded = load_nanogpt(saved(tmp_path, nanogpt_checkpoint(source)))
    assert loaded.config == CONFIG
    assert not loaded.training
    assert loaded.transformer.wte.weight is loaded.lm_head.weight
    idx = ids()
    assert torch.equal(loaded(idx), source(idx))


def _without(state, name):
    return {key: tensor for key, tensor in state.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"weights": c["model"]}, "no 'model' and 'model_args'"),
        (lambda c: [1, 2], "no 'model' and 'model_args'"),
        (lambda c: c | {"model_args": {"n_layer": 2}}, "model_args do not describe a GPT"),
        (lambda c: c | {"model_args": c["model_args"] | {"n_head": 5}}, "n_head must divide"),
        (lambda c: c | {"model_args": c["model_args"] | {"vocab_size": 50}}, r"is \[31, 32\].* need \[50, 32\]"),
        (lambda c: c | {"model": _without(c["model"], "h.1.mlp.c_fc.weight")}, "lacks 'transformer.h.1.mlp.c_fc"),
        (lambda c: c | {"model": c["model"] | {"extra": torch.ones(1)}}, "has the unknown tensor 'extra'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path, change, message):
    path = saved(tmp_path, change(nanogpt_checkpoint(GPT(CONFIG))))
    with pytest.raises(ValueError, match=message) as caught:
        load_nanogpt(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_checkpoints_are_refused_and_never_executed(tmp_path, capfd):
    path = tmp_path / "ckpt.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a PyTorch checkpoint of plain tensors"):
            load_nanogpt(path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="not a PyTorch checkpoint of plain tensors"):
        load_nanogpt(path)
    assert "executed" not in capfd.readouterr().out
    with pytest.raises(FileNotFoundError):
        load_nanogpt(tmp_path / "absent.pt")
