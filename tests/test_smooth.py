"""Smoothing for int8 activations: what is found, that float models keep their bits, and what it is good for."""

import copy

import pytest
import torch
from torch import nn

import potqat
from potqat import calibrate, gptq, smooth
from potqat.models.gpt import GPT, GPTConfig

VOCABULARY, CONTEXT, WIDTH = 65, 24, 32
CFG = potqat.PoTConfig(scale="output", rounding="gptq")
OUTLIERS = (3, 17)


def make(kind, dtype=torch.float32):
    """A model whose norms make two large channels, as trained ones do."""
    torch.manual_seed(0)
    if kind == "own":
        model = GPT(GPTConfig(vocab_size=VOCABULARY, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=WIDTH, bias=True))
    else:
        transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=2, **ends
            )
        else:
            config = transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, **ends,
            )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if parameter.dim() == 1 and "weight" in name:
            parameter.data.add_(1)[list(OUTLIERS)] *= 40
    return model.to(dtype).eval()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (2, CONTEXT), generator=generator) for _ in range(count)]


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def layers_of(model):
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = [(n, m) for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return {n: m for n, m in named if id(m.weight) not in tables}


def smoothed(model, data, leave=()):
    """Smooth a float model in place; returns what was done. ``leave``: layers that may not change."""
    layers = {name: m for name, m in layers_of(model).items() if name.rpartition(".")[2] not in leave}
    floats, done = smooth.float_modules(model, layers), []

    def before(block, runs):
        inside = {name: potqat.PoTConfig(grid="int8") for name in layers if name.startswith(f"{block}.")}
        done.extend(smooth.smooth(block, floats, inside, runs))

    for _ in calibrate.walk(model, data, layers, before):
        pass
    return done


LLAMA = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "up_proj": ("down_proj",),
}
FOUND = {"own": {"ln_1": ("c_attn",), "ln_2": ("c_fc",)}, "gpt2": {"ln_1": ("c_attn",), "ln_2": ("c_fc",)}}
FOUND["llama"] = LLAMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOUND)
def test_large_channels_are_smoothed_and_the_float_model_keeps_its_bits(kind, dtype):
    model, data = make(kind, dtype), batches()
    before = copy.deepcopy(model)
    done = smoothed(model, data)
    leaf = lambda name: name.rpartition(".")[2]  # noqa: E731
    pairs = [(leaf(each.maker), tuple(map(leaf, each.readers))) for each in done]
    assert pairs == 2 * list(FOUND[kind].items())
    for each in done:
        assert torch.equal(each.factors.log2(), each.factors.log2().round())
        assert not torch.equal(model.get_submodule(each.maker).weight, before.get_submodule(each.maker).weight)
        if leaf(each.maker) != "up_proj":
            rest = each.factors[[i for i in range(WIDTH) if i not in OUTLIERS]]
            assert each.factors[list(OUTLIERS)].min() > rest.median()
    assert torch.equal(logits(model, data[0]), logits(before, data[0]))
    for each in reversed(done):
        each.apply(dict(model.named_modules()), undo=True)
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_rounding_to_int8_is_that_of_the_kernel():
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 8)[:, None]
    x[2] = 0
    eye = torch.eye(WIDTH)
    cfg = potqat.PoTConfig(grid="int4")
    scale = potqat.compute_scale(eye, cfg)  # 1/7: the level 7 times it is 1 up to a rounding
    y = potqat.linear(x, potqat.pack(eye, scale, cfg), scale, None, cfg, out_features=WIDTH)
    torch.testing.assert_close(smooth.rounded(x), y, rtol=4 * torch.finfo().eps, atol=0)


def test_int8_activations_cost_less_with_it():
    data, cfg = batches(), potqat.PoTConfig(grid="int8", scale="output")
    expected = logits(make("llama"), data[2])
    errors = []
    for smoothing in (True, False):
        model = make("llama")
        with pytest.MonkeyPatch.context() as patch:
            if not smoothing:
                patch.setattr(smooth, "smooth", lambda *_: [])
            report = potqat.quantize_(model, cfg, calibration=data[:2])
        assert any("have smoothed inputs" in note for note in report.notes) == smoothing
        errors.append((logits(model, data[2]) - expected).square().mean().item())
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("outlier", [1, 4, 30])
@pytest.mark.parametrize(
    ("grid", "granularity"), [("int8", "channel"), ("pot4", "channel"), ("e2m1", 32), ("int4", 64)]
)
def test_factors_help_the_packed_layer(grid, granularity, outlier):
    """... on the kernels: no grid loses by rounding larger weights more than int8 activations gain."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)
    x[:, list(OUTLIERS)] *= outlier
    cfg = potqat.PoTConfig(grid=grid, granularity=granularity, scale="output")
    factors = smooth._choose(x, [(w, cfg)])

    def error(factors):
        divided, grown = x / factors, w * factors
        scale = potqat.compute_scale(grown, cfg, divided.square().mean(0))
        y = potqat.linear(divided, potqat.pack(grown, scale, cfg), scale, None, cfg, out_features=48)
        return (y - x @ w.t()).square().sum().item()

    before = error(torch.ones(64))
    assert error(factors) <= before
    if outlier == 30:
        assert error(factors) < (0.5 if grid == "int8" else 0.96) * before


def test_training_starts_from_smoothed_weights():
    data, floats = batches(), make("llama")
    model, packed = make("llama"), make("llama")
    learned = potqat.PoTConfig(scale="learned", scale_init="output", rounding="gptq")
    report = potqat.prepare_qat_(model, learned, calibration=data)
    assert any("have smoothed inputs" in note for note in report.notes)
    potqat.convert_(model)
    potqat.quantize_(packed, CFG, calibration=data)
    expected = logits(floats, data[0])
    errors = [(logits(m, data[0]) - expected).square().mean().item() for m in (model, packed)]
    assert errors[0] == pytest.approx(errors[1], rel=0.3)


def test_float_activations_are_not_smoothed():
    model, before = make("llama"), make("llama").state_dict()
    report = potqat.quantize_(model, potqat.PoTConfig(rounding="gptq", activations=None), calibration=batches())
    assert not any("smoothed" in each for each in [*report.notes, *(e.method for e in report.entries)])
    norms = [name for name in before if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in norms)


# ---- What has no exact form is left ---------------------------------------------------------------------------


def test_a_tensor_that_something_else_reads_is_left():
    model, data = make("llama"), batches()
    done = smoothed(model, data, leave=("k_proj", "up_proj"))
    assert done == []  # k_proj and up_proj read the norms' tensors, too, and down_proj's maker may not change


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.inner, self.outer = norm, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.read(self.norm(x)) + x

    def read(self, x):
        return self.outer(torch.tanh(self.inner(x)))


class Residual(Block):
    """As in models that normalize last: the norm's output goes on by itself."""

    def read(self, x):
        return super().read(x) + x


class PlusOne(nn.Module):
    """Gemma's norm: its outputs are not proportional to its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


def stack(block, norms):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(block(norm) for norm in norms)

        def forward(self, ids):
            x = self.table(ids)
            for each in self.blocks:
                x = each(x)
            return x

    torch.manual_seed(0)
    model = Stack()
    for norm in norms:
        norm.weight.data[list(OUTLIERS)] = 40.0
    return model


@pytest.mark.parametrize(
    ("block", "norms", "count"),
    [
        (Block, [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)], 2),
        (Residual, [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)], 0),
        (Block, [PlusOne(), PlusOne()], 0),
        (Block, [nn.LayerNorm(WIDTH)] * 2, 0),  # one norm in two blocks
    ],
)
def test_only_what_leaves_the_bits_is_done(block, norms, count):
    model = stack(block, norms)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(smoothed(model, batches())) == count
    if not count:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- Errors and stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(2,), (5,), (3, 9)])
def test_stopped_the_float_model_is_back_and_gone_on_it_is_as_if_never_stopped(stops, tmp_path, monkeypatch):
    once, model, before = make("llama"), make("llama"), make("llama").state_dict()
    expected = potqat.quantize_(once, CFG, calibration=batches())
    compensate, calls = gptq.compensate, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return compensate(*arguments)

    monkeypatch.setattr(gptq, "compensate", stopping)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            potqat.quantize_(model, CFG, calibration=batches(), unfinished=tmp_path / "kept")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = potqat.quantize_(model, CFG, calibration=batches(), unfinished=tmp_path / "kept")
    assert report.to_dict() == expected.to_dict()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in model.state_dict().items())
