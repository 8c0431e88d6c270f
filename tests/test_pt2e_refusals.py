"""What PT2E refuses: graphs, patterns, values and targets, with advice."""

import pytest
import torch
from pt2e_models import PAPER, WARNINGS, gpt, prepare, prepared, train
from torch import nn

from potqat import PoTConfig, pt2e

pytestmark = WARNINGS


class VmapMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        mask = torch.vmap(lambda row: row >= torch.arange(4))(torch.arange(3))
        return self.linear(x) * mask


def test_vmap_in_the_graph_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"functorch nodes.*ready boolean mask"):
        pt2e.prepare(VmapMask(), (torch.randn(3, 4),), PoTConfig())


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match=r"nothing to quantize.*no linear layer"):
        pt2e.prepare(nn.LayerNorm(4), (torch.randn(2, 4),), PoTConfig())
    with pytest.raises(ValueError, match=r"nothing to quantize.*transformer.wte: matches skip pattern '\*'"):
        prepare(gpt(), PoTConfig(skip=("*",)))


def test_patterns_must_match():
    with pytest.raises(ValueError, match=r"pattern 'c_fx' matches no quantizable module; they are: transformer\.wte"):
        prepare(gpt(), PoTConfig(skip=("c_fx",)))
    with pytest.raises(ValueError, match="pattern 'c_fx' matches no"):
        prepare(gpt(), PoTConfig(overrides={"c_fx": {"grid": "int4"}}))


@pytest.mark.parametrize("scale", ["absmax", "learned"])
def test_nan_names_the_weight(scale):
    model = gpt()
    model.transformer.h[0].mlp.c_fc.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp.c_fc: .*NaN or infinity"):
        prepare(model, PoTConfig(scale=scale))


def test_convert_refuses_what_prepare_did_not_make():
    with pytest.raises(TypeError, match=r"needs the module that potqat.pt2e.prepare returned, got GPT"):
        pt2e.convert(gpt())
    with pytest.raises(ValueError, match="target must be one of packed, int8; got 'int4'"):
        pt2e.convert(prepared(), target="int4")


@pytest.mark.parametrize("target", ["packed", "int8"])
def test_grids_without_a_packed_form_train_but_do_not_convert(target):
    qat = prepared(PAPER)
    with pytest.raises(ValueError, match=r"transformer\.wpe: .*pot\(7\) is for fake-quantization only"):
        pt2e.convert(qat, target=target)
    assert train(qat, 1)[0] > 0
