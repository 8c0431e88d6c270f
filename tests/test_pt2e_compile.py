"""What PT2E prepares and converts goes through torch.compile and torch.export."""

import copy
import io

import pytest
import torch
from pt2e_models import CONTEXT, PAPER, SHAPES, WARNINGS, prepared, tokens

from potqat import PoTConfig, pt2e

pytestmark = WARNINGS


@pytest.mark.parametrize("cfg", [PoTConfig(), PoTConfig(scale="learned"), PAPER], ids=["absmax", "learned", "paper"])
def test_prepared_model_compiles_to_one_graph(cfg):
    qat = prepared(cfg)
    compiled, ids = torch.compile(copy.deepcopy(qat), fullgraph=True, backend="aot_eager"), tokens()
    for mode in (True, False):
        expected, ours = qat.train(mode)(ids), compiled.train(mode)(ids)
        assert torch.equal(ours, expected)
    ours.sum().backward()
    expected.sum().backward()
    assert torch.equal(compiled.lm_head.weight.grad, qat.lm_head.weight.grad)


@pytest.mark.parametrize("target", ["packed", "int8"])
def test_converted_model_compiles_to_one_graph(target):
    converted, ids = pt2e.convert(prepared(PoTConfig()), target=target), tokens()
    with torch.no_grad():
        expected = converted(ids)
        assert torch.equal(torch.compile(converted, fullgraph=True, backend="aot_eager")(ids), expected)


def test_converted_model_compiles_with_inductor():
    converted, ids = pt2e.convert(prepared()), tokens()
    with torch.no_grad():
        expected = converted(ids)
        # Inductor's own layer norm and GELU round differently from ATen's; potqat's ops are the same calls.
        difference = (torch.compile(converted, fullgraph=True)(ids) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("target", ["packed", "int8"])
def test_converted_model_is_saved_by_export(target):
    converted, file = pt2e.convert(prepared(PoTConfig()), target=target), io.BytesIO()
    torch.export.save(torch.export.export(converted, (tokens(),), dynamic_shapes=SHAPES), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((1, 1), (3, 7), (2, CONTEXT)):
        ids = tokens(*shape)
        assert torch.equal(loaded(ids), converted(ids))
        assert torch.equal(copy.deepcopy(converted)(ids), converted(ids))
