"""Training from calibrated weights: it starts from what is packed, or says why it cannot."""

import dataclasses

import pytest
import torch
from calibration_models import CFG, KINDS, START, batches, linears, logits, make
from torch import nn

import potqat
from potqat import PoTConfig, calibrated
from potqat.fake_quant import PoTFakeQuantize


def test_training_refuses_what_it_cannot_start_from():
    for cfg, data, message in (
        (START, None, "needs calibration data"),
        (PoTConfig(scale="learned", scale_init="output"), None, "needs calibration data"),
        (PoTConfig(scale="learned"), batches(), "calibration is given, and nothing uses it"),
        (CFG, batches(), "scale='output' goes by calibration statistics, which change in training"),
        (PoTConfig(rounding="gptq"), batches(), "scale='absmax' moves with the weight in training"),
    ):
        model = make("own")
        with pytest.raises(ValueError, match=message):
            potqat.prepare_qat_(model, cfg, calibration=data)
        assert isinstance(model.lm_head, nn.Linear)
    with pytest.raises(ValueError, match=r"start training from calibrated weights; call prepare_qat_\(model, cfg, "):
        PoTFakeQuantize(torch.ones(4, 32), START)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", ["pot4", "e2m1", "int4"])
def test_training_starts_from_what_is_packed(kind, grid, monkeypatch):
    """Before a step the QAT model has the weights that quantize_ would pack; all of them get a gradient; it converts to
    the same."""
    cfg, data, found = dataclasses.replace(START, grid=grid, granularity=32), batches(), {}
    calibrate_one = calibrated._calibrated

    def noted(site, *arguments):
        found[site.name] = calibrate_one(site, *arguments)
        return found[site.name]

    monkeypatch.setattr(calibrated, "_calibrated", noted)
    model = make(kind).train()
    parameters = dict(model.named_parameters())
    report = potqat.prepare_qat_(model, cfg, calibration=data)
    assert found.keys() == linears(make(kind)).keys() | {"lm_head"}
    errors = {entry.name: entry.output_error for entry in report.entries}
    assert {name: errors[name] for name in found} == {name: entry.output_error for name, (_, entry) in found.items()}
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters() if name in parameters)
    assert all(module.training for module in model.modules())
    masters = {}
    for name, (packed, _) in found.items():
        twin = model.get_submodule(name)
        of_table = name == "lm_head" and kind != "llama"  # which is not tied there
        assert twin.weight_fake_quant.cfg == dataclasses.replace(
            cfg, grid=cfg.embedding_grid if of_table else grid, rounding="nearest", scale_init="mse"
        )
        master = twin.weight.t() if kind == "gpt2" and not of_table else twin.weight
        torch.testing.assert_close(master.detach(), packed.dequantize(), rtol=1e-6, atol=0)
        fake = twin.weight_fake_quant(master)
        torch.testing.assert_close(fake, master, rtol=2e-7, atol=0)
        (gradient,) = torch.autograd.grad(fake.sum(), twin.weight)
        assert (gradient == 1).all()
        masters[name] = master.detach()
    potqat.convert_(model)
    for name, master in masters.items():
        torch.testing.assert_close(model.get_submodule(name).dequantize(), master, rtol=2e-7, atol=0)


def test_a_calibrated_state_loads_into_a_model_prepared_without_calibration():
    model, again = make("gpt2"), make("gpt2")
    potqat.prepare_qat_(model, START, calibration=batches())
    potqat.prepare_qat_(again, START.without_calibration)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, batches()[0]), logits(again, batches()[0]))
