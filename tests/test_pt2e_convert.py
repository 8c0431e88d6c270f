"""PT2E converts to packed and int8 graphs: their weights, their outputs, what they hold."""

import copy

import pytest
import torch
from pt2e_models import (
    CONTEXT,
    SHAPES,
    VOCABULARY,
    WARNINGS,
    WEIGHT_ONLY,
    both,
    loss_of,
    prepared,
    same_state,
    tokens,
    train,
)
from torch import nn
from torch.export import Dim

import potqat
from potqat import PoTConfig, pt2e

pytestmark = WARNINGS


class Conv1D(nn.Module):
    """Linear with the weight stored [inputs, outputs], as Hugging Face's GPT-2 does."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        out = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], out.shape[-1])


class Mixed(nn.Module):
    """An embedding, a Conv1D, a Linear; sizes that are no multiple of a tile or a group."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.out = nn.Embedding(VOCABULARY, 40), Conv1D(40, 24), nn.Linear(24, 70, bias=False)

    def forward(self, ids):
        return self.out(self.conv(self.table(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"grid": "e2m1", "granularity": 32, "scale": "mse"},
        {"grid": "int4", "granularity": "tensor", "scale": "learned", "embedding_grid": "pot4"},
        {"grid": "int8", "granularity": 64, "rounding": "log"},
        {"granularity": "tensor", "scale": "paper", "rounding": "paper", "eps": 2.0**-12},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "default",
)
def test_converted_weights_equal_the_fake_quantized(fields, dtype):
    cfg = PoTConfig(activations=None, **fields)
    qat = pt2e.prepare(Mixed().to(dtype), (tokens(),), cfg, dynamic_shapes=SHAPES)
    loss_of(qat, tokens()).backward()
    torch.optim.SGD(qat.parameters(), lr=0.1).step()
    qat.eval()
    packed, packed8 = pt2e.convert(qat), pt2e.convert(qat, target="int8")
    with torch.no_grad():
        for name in ("table", "conv", "out"):
            parameter = qat.get_parameter(f"{name}.weight")
            fake_quant = qat.get_submodule(f"{name}.weight_fake_quant")
            w_hat = fake_quant(parameter)
            w_hat = w_hat.t() if name == "conv" else w_hat
            codes, scale = packed.get_buffer(f"{name}.packed"), packed.get_buffer(f"{name}.scale")
            unpacked = potqat.unpack(codes, scale, fake_quant.cfg, tuple(w_hat.shape))
            assert torch.equal(unpacked.to(dtype), w_hat)
        for shape in ((1, 1), (3, 7), (4, CONTEXT)):
            ids = tokens(*shape)
            expected = qat(ids)
            assert torch.equal(packed8(ids), expected)  # the same float32 products, then the same matmul
            # Two linears of 40 and 24 inputs. potqat.linear keeps scales in float32 where a bfloat16 or float16
            # model rounds the whole weight, so that here the dtype's eps counts, not the order of summation.
            eps = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            assert (packed(ids) - expected).abs().max() <= eps * expected.abs().max()
            assert packed(ids).dtype == expected.dtype == dtype


def test_packed_linear_is_within_the_rounding_of_a_float32_sum():
    k = 300
    qat = pt2e.prepare(nn.Linear(k, 50), (torch.randn(2, k),), WEIGHT_ONLY, dynamic_shapes=({0: Dim("batch", min=1)},))
    packed = pt2e.convert(qat)
    x = torch.randn(9, k)
    w_hat, bias = qat.weight_fake_quant(qat.weight).detach().double(), qat.bias.detach().double()
    magnitude = x.double().abs() @ w_hat.abs().t() + bias.abs()
    # k products and k + 1 sums in any order (Higham 2002, 3.5), for each of the two sides, by u = 2^-24.
    gamma = (k + 2) * 2.0**-24 / (1 - (k + 2) * 2.0**-24)
    assert ((packed(x).double() - qat.eval()(x).double()).abs() <= 2 * gamma * magnitude).all()


def test_converted_gpt_gives_the_logits_of_the_prepared_at_every_shape():
    qat = prepared(dropout=0.2)
    train(qat, 5)
    qat.eval()
    packed, packed8 = pt2e.convert(qat), pt2e.convert(qat, target="int8")
    with torch.no_grad():
        for shape in ((1, 1), (3, 7), (5, CONTEXT)):
            ids = tokens(*shape)
            logits = qat(ids)
            assert logits.shape == (*shape, VOCABULARY)
            assert torch.equal(packed8(ids), logits)
            # Only the order of float32 sums differs: at most 2 gamma_128 = 2e-5 of |x||w| a linear, and a few of them
            # between normalizations. Observed: 1e-6.
            assert (packed(ids) - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_pt2e_and_eager_convert_to_the_same_model():
    qat, eager = both(PoTConfig())
    train(qat, 3)
    eager.load_state_dict(qat.state_dict())
    packed = pt2e.convert(qat)
    potqat.convert_(eager)
    ids = tokens(3, 11)
    assert torch.equal(packed(ids), eager(ids))  # int8 activations, integer sums
    expected = eager.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in packed.state_dict().items())


def test_convert_leaves_the_prepared_model_as_it_was():
    qat = prepared(dropout=0.2)
    untouched = copy.deepcopy(qat)
    packed, ids = pt2e.convert(qat), tokens()
    assert same_state(qat, untouched)
    assert qat.training
    before = packed(ids)
    assert train(qat, 2)[1] > 0
    assert torch.equal(packed(ids), before)
    assert torch.equal(packed.train()(ids), packed.eval()(ids))  # no dropout, and both modes work
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_each_weight_is_packed_once():
    packed = pt2e.convert(prepared(PoTConfig()))
    operators = [str(node.target) for node in packed.graph.nodes if node.op == "call_function"]
    assert operators.count("potqat.linear.default") == 5
    assert operators.count("potqat.embedding.default") == 2
    assert not {"aten.linear.default", "aten.embedding.default"} & set(operators)
    codes = [name for name, _ in packed.named_buffers() if name.endswith(".packed")]
    assert len(codes) == 6
    assert "transformer.wte.packed" in codes
    assert not any(name.startswith("lm_head") or name.endswith("wte.weight") for name in packed.state_dict())


def test_int8_target_holds_levels_and_standard_ops():
    packed8 = pt2e.convert(prepared(), target="int8")
    levels = packed8.get_buffer("transformer.h.0.mlp.c_fc.int8")
    assert levels.dtype == torch.int8
    assert set(levels.abs().unique().tolist()) == {0, 1, 2, 4, 8, 16, 32, 64}
    targets = {node.target for node in packed8.graph.nodes}
    assert torch.ops.quantized_decomposed.dequantize_per_channel.default in targets
    assert not any("potqat" in str(target) for target in targets)
