"""PoTQuantizer in torchao's own calls, and torchao imported only when PT2E is used."""

import subprocess
import sys

import pytest
import torch
from pt2e_models import SHAPES, WARNINGS, WEIGHT_ONLY, gpt, loss_of, tokens
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

from potqat import PoTConfig, pt2e

pytestmark = WARNINGS


@pytest.mark.parametrize("strict", [False, True])
def test_quantizer_drives_torchao(strict):
    model = gpt()
    exported = torch.export.export(model, (tokens(),), dynamic_shapes=SHAPES, strict=strict)
    quantizer = pt2e.PoTQuantizer(WEIGHT_ONLY)
    prepared = prepare_qat_pt2e(exported.module(check_guards=False), quantizer)
    assert len(quantizer.report.quantized) == 7
    optimizer, ids = torch.optim.AdamW(prepared.parameters(), lr=1e-2), tokens(3, 7)
    losses = []
    for _ in range(10):
        losses.append(loss_of(prepared, ids))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        expected = prepared(ids)
        converted = convert_pt2e(prepared)
        assert (converted(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    operators = [str(node.target) for node in converted.graph.nodes]
    assert operators.count("potqat.linear.default") == 5
    assert "transformer.wte.packed" in converted.state_dict()


def test_quantizer_without_its_callback_is_loud():
    exported = torch.export.export(gpt(), (tokens(),)).module(check_guards=False)
    prepared = prepare_qat_pt2e(exported, ComposableQuantizer([pt2e.PoTQuantizer(PoTConfig())]))
    with pytest.raises(RuntimeError, match="prepare_obs_or_fq_callback was not called"):
        prepared(tokens())


def test_torchao_is_imported_only_for_pt2e():
    code = "import sys, potqat; assert 'torchao' not in sys.modules; potqat.pt2e; assert 'torchao' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
