"""Which weights PT2E quantizes, and what its report says of them and of those that stay float."""

import copy

import torch
import torch.nn.functional as F
from pt2e_models import WARNINGS, gpt, prepare, tokens
from torch import nn

import potqat
from potqat import PoTConfig, pt2e

pytestmark = WARNINGS


def test_report_is_that_of_eager_qat():
    for cfg in (PoTConfig(), PoTConfig(skip=("lm_head", "*.c_fc")), PoTConfig(embedding_grid=None)):
        model = gpt()
        eager = copy.deepcopy(model)
        expected = potqat.prepare_qat_(eager, cfg)
        qat = prepare(model, cfg)
        assert qat.report.to_dict() == expected.to_dict()
        ids = tokens()
        assert torch.equal(qat(ids), eager(ids))
        assert list(qat.state_dict()) == list(eager.state_dict())


def test_skipped_head_of_a_quantized_table_stays_float():
    qat = prepare(gpt(), PoTConfig(skip=("lm_head",), activations=None)).eval()
    assert "lm_head is tied to a quantized weight but was skipped: its float copy stays" in qat.report.notes
    packed, ids = pt2e.convert(qat), tokens()
    with torch.no_grad():
        assert (packed(ids) - qat(ids)).abs().max() <= 1e-4
    assert {"transformer.wte.packed", "transformer.wte.weight"} <= set(packed.state_dict())


def test_overrides_reach_the_named_modules():
    qat = prepare(gpt(), PoTConfig(overrides={"*.c_proj": {"grid": "int4"}, "wte": {"grid": "e2m1"}}))
    grids = {entry.name: entry.grid for entry in qat.report.quantized}
    assert grids["transformer.h.0.attn.c_proj"] == grids["transformer.h.0.mlp.c_proj"] == "int4"
    assert grids["transformer.wte"] == grids["lm_head"] == "e2m1"
    assert grids["transformer.wpe"] == "int8"
    assert grids["transformer.h.0.attn.c_attn"] == "pot4"


class Everything(nn.Module):
    """Weights in all the places where a quantizer may or may not take them."""

    def __init__(self):
        super().__init__()
        self.renormed = nn.Embedding(10, 8, max_norm=1.0)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.square = nn.Parameter(torch.randn(8, 8))
        self.unused = nn.Linear(3, 3)
        self.constant = torch.randn(8)  # neither parameter nor buffer

    def forward(self, ids):
        x = self.renormed(ids) + self.position[: ids.shape[1]]
        x, _ = self.attention(x, x, x, need_weights=False)
        with torch.no_grad():
            y = torch.mm(x.flatten(0, 1), self.square) + (self.constant if self.training else 2 * self.constant)
        x = F.linear(self.normed(x), self.square)
        return torch.addmm(self.constant, x.flatten(0, 1), self.square) + y


def test_report_names_every_weight_that_stays_float():
    model, ids = Everything(), torch.randint(10, (2, 3))
    names = list(model.state_dict())
    qat = pt2e.prepare(model, (ids,), PoTConfig(activations=None))
    assert list(qat.state_dict()) == names
    assert [e.name for e in qat.report.quantized] == ["attention.in_proj_weight", "attention.out_proj", "square"]
    reasons = {(e.name, e.kind): e.reason for e in qat.report.skipped}
    assert reasons["renormed", "embedding"] == "max_norm rewrites the table at each lookup"
    assert reasons["square", "linear"] == "tied to square, which uses the weight transposed"
    assert reasons["square", "parameter"] == "read by wrap_with_set_grad_enabled"
    assert reasons["position", "parameter"] == "read by aten.slice.Tensor"
    assert reasons["unused", "parameter"] == "the forward does not use it"
    assert reasons["normed.parametrizations.weight.original1", "parameter"] == "read by aten._weight_norm.default"
    packed, packed8 = pt2e.convert(qat.eval()), pt2e.convert(qat, target="int8")
    with torch.no_grad():
        expected = qat(ids)
        assert torch.equal(packed8(ids), expected)
        assert (packed(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
        # no_grad blocks and constants of the two exports carry the same names in both; each graph keeps its own.
        assert not torch.equal(qat.train()(ids), expected)
        assert torch.equal(qat.eval()(ids), expected)
