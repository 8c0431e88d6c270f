"""One decoding step as AOTInductor's program in a file: its tokens, what it shares with the model, what it refuses."""

import copy
import shutil

import pytest
import torch

import potqat
from potqat.models import aot
from potqat.models.generate import SLOTS, Decoder, generate
from potqat.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=50, block_size=SLOTS + 10, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


def packed_gpt(seed=0):
    torch.manual_seed(seed)
    model = GPT(CONFIG).eval()
    potqat.quantize_(model, potqat.PoTConfig(embedding_grid="pot4"))
    return model


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Compiled once, for packed_gpt and a batch of 2."""
    path = tmp_path_factory.mktemp("aot") / "step.pt2"
    Decoder(packed_gpt(), 2, compile=path)
    assert [p.name for p in path.parent.iterdir()] == ["step.pt2"]
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    def compile_step(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(aot, "compile_step", compile_step)


def test_tokens_are_the_eager_ones_in_every_number_of_slots(program, no_compiler):
    model, start = packed_gpt(), torch.randint(CONFIG.vocab_size, (2, SLOTS - 3))
    tokens = generate(model, start, 12, context=CONFIG.block_size, temperature=0, compile=program)
    assert torch.equal(tokens, generate(model, start, 12, context=CONFIG.block_size, temperature=0))
    ours, eager = Decoder(model, 2, program), Decoder(model, 2)
    for i in range(3):
        assert torch.allclose(ours(tokens[:, i : i + 1]), eager(tokens[:, i : i + 1]), atol=1e-3 * logit_scale(model))
    for a, b in zip(ours.cache, eager.cache, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x[:, :, :3].abs().max() > 0
            assert torch.equal(x == 0, y == 0)


def logit_scale(model):
    """Size of the logits. Inductor's layer norm rounds differently in its last bit, which can turn an int8 activation
    by a step; a missing key or another position changes logits by a tenth of them."""
    return model(torch.zeros(1, 1, dtype=torch.int64)).std().item()


def test_the_program_reads_the_weights_of_the_model(program, no_compiler):
    """They are not copied: what changes in place is seen, and the file holds none."""
    model = packed_gpt(1)  # of the same shapes, other weights
    token = torch.tensor([[3], [4]])
    decoder = Decoder(model, 2, program)
    expected = Decoder(model, 2)(token)
    scale = logit_scale(model)
    assert torch.allclose(decoder(token), expected, atol=1e-3 * scale)
    model.lm_head.scale.mul_(2)
    decoder.length = 0
    assert torch.allclose(decoder(token), Decoder(model, 2)(token), atol=2e-3 * scale)
    assert not torch.allclose(decoder(token), expected, atol=0.1 * scale)


def test_ids_of_another_integer_type_are_read_as_numbers(program, no_compiler):
    token = torch.tensor([[3], [4]])
    model = packed_gpt()
    assert torch.equal(Decoder(model, 2, program)(token.int()), Decoder(model, 2, program)(token))


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    [
        (lambda model: model, 1, r"compiled for another batch size \(2 there, 1 here\); delete it or name another"),
        (lambda model: GPT(CONFIG).eval(), 2, "compiled for another model"),
        (lambda model: model.bfloat16(), 2, "compiled for another model"),
    ],
)
def test_a_program_for_something_else_is_refused(change, batch, message, program):
    with pytest.raises(ValueError, match=message):
        Decoder(change(packed_gpt()), batch, program)


def test_other_activations_are_another_model(program):
    model = GPT(CONFIG).eval()
    potqat.quantize_(model, potqat.PoTConfig(embedding_grid="pot4", activations=None))
    with pytest.raises(ValueError, match="compiled for another model"):
        Decoder(model, 2, program)


def test_what_is_not_a_program_is_refused(program, tmp_path):
    junk, part = tmp_path / "junk.pt2", tmp_path / "part.pt2"
    junk.write_bytes(b"not a zip file")
    shutil.copy(program, part)
    with part.open("r+b") as file:
        file.truncate(1000)
    for path in (junk, part):
        with pytest.raises(ValueError, match=rf"{path}: not a compiled step \(.*\); delete it or name another"):
            Decoder(packed_gpt(), 2, path)


def test_nothing_is_compiled_that_could_not_be_used(tmp_path):
    model = packed_gpt()
    with pytest.raises(ValueError, match=r"step\.bin: the name of a compiled step must end in \.pt2"):
        Decoder(model, 2, tmp_path / "step.bin")
    with pytest.raises(OSError, match="step"):
        Decoder(model, 2, tmp_path / "no" / "step.pt2")
    with pytest.raises(ValueError, match=r"dropout is on in training mode; call model\.eval\(\) before compiling"):
        Decoder(copy.deepcopy(model).train(), 2, tmp_path / "step.pt2")
    assert not list(tmp_path.iterdir())
