"""quantize_ with calibration: what it gains, what it packs, what it leaves to nearest rounding."""

import copy
from dataclasses import replace

import pytest
import torch
from calibration_models import CFG, KINDS, VOCABULARY, batches, cross_moment, linears, logits, make, moments
from torch import nn

import potqat
from potqat import PoTConfig, gptq
from potqat.modules import PackedEmbedding, PackedLinear, TiedLinear


@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_model_is_nearer_to_the_float_one(kind, granularity):
    data, held_out = batches(8, b=4), batches(9, b=4)[-1]
    expected = logits(make(kind), held_out)
    plain, model = make(kind), make(kind)
    potqat.quantize_(plain, PoTConfig(granularity=granularity))
    cfg = PoTConfig(scale="output", rounding="gptq", granularity=granularity)
    report = potqat.quantize_(model, cfg, calibration=iter(data))
    errors = [(logits(m, held_out) - expected).square().mean().item() for m in (model, plain)]
    assert errors[0] < 0.75 * errors[1]
    calibrated = [e for e in report.quantized if e.method]
    tied = {"own": ["transformer.wte"], "gpt2": ["transformer.wte"], "llama": []}[kind]  # with its head
    assert [e.name for e in calibrated if not e.reason] == [*tied, *linears(make(kind))]
    assert {e.method.removesuffix(", smoothed inputs") for e in calibrated} == {"scale=output, rounding=gptq"}
    assert all(0 < e.output_error < e.output_error_nearest < 1 for e in calibrated)
    assert "nearest" in str(report)
    assert all(5 < e.sqnr_db < 60 for e in report.quantized)
    order = [name for name, m in model.named_modules() if isinstance(m, (PackedLinear, PackedEmbedding))]
    assert [e.name for e in report.quantized] == order


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_weights_are_those_of_gptq_on_the_inputs_of_the_packed_model(kind):
    """The last layer of the last block: everything before it is packed, and packs to what it unpacks to."""
    data, floats, model = batches(), make(kind), make(kind)
    cfg = replace(CFG, activations=None, embedding_grid=None)  # nothing is smoothed, and a table is packed last
    potqat.quantize_(model, cfg, calibration=data)
    name = [name for name in linears(floats) if name != "lm_head"][-1]
    (moment,) = moments(copy.deepcopy(model), [name], data).values()
    drift = cross_moment(floats, model, name, data) - moment
    weight = floats.get_submodule(name).weight.detach()
    weight = weight if kind != "gpt2" else weight.t()
    scale = potqat.compute_scale(weight, CFG, moment.diagonal().float())
    module = model.get_submodule(name)
    torch.testing.assert_close(module.scale, scale, rtol=1e-6, atol=0)
    w_hat = gptq.compensate(gptq.corrected(weight, moment, drift), scale, moment, CFG)
    assert (module.dequantize() != w_hat).float().mean() < 0.01  # sums in another order may move a tie
    for packed in model.modules():
        if isinstance(packed, PackedLinear):
            w_hat = packed.dequantize()
            assert torch.equal(potqat.pack(w_hat, packed.scale, packed.cfg), packed.packed)


def test_it_is_deterministic_and_dropout_is_off():
    models = [make("own") for _ in range(2)]
    models[0].train()
    models[0].transformer.h[1].eval()
    for model in models:
        potqat.quantize_(model, CFG, calibration=batches())
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    first, second = models[0].transformer.h
    assert first.attn.c_attn.training
    assert models[0].training
    assert not any(m.training for m in second.modules())
    assert not any(m.training for m in models[1].modules())


def test_a_table_without_a_head_is_rounded_to_nearest():
    model = make("gpt2")
    table = model.transformer.wpe.weight.detach().clone()
    report = potqat.quantize_(model, replace(CFG, activations=None), calibration=batches())
    plain = PoTConfig(grid="int8", scale="mse")
    assert torch.equal(
        model.transformer.wpe.dequantize(), potqat.fake_quantize(table, potqat.compute_scale(table, plain), plain)
    )
    assert (model.transformer.wpe.cfg.scale, model.transformer.wpe.cfg.rounding) == ("mse", "nearest")
    assert report.notes == [
        "transformer.wpe: scale by least squared error and rounding to nearest: a table without a head, or a weight "
        "that several layers use, is not compensated"
    ]


@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_a_table_is_compensated_for_the_inputs_of_the_head_that_is_tied_to_it(kind):
    model, data = make(kind), batches()
    report = potqat.quantize_(model, replace(CFG, embedding_grid="e2m1"), calibration=data)
    entries = {e.name: e for e in report.entries}
    name = "transformer.wte"
    table, head = model.get_submodule(name), model.lm_head
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, TiedLinear)
    assert head.owner is table
    assert (entries[name].bytes_after, entries["lm_head"].bytes_after) == (table.packed_bytes, 0)
    assert (entries[name].bytes_before, entries["lm_head"].bytes_before) == (4 * VOCABULARY * 32, 0)
    assert entries["lm_head"].reason == "tied: packed once"

    weight = make(kind).lm_head.weight.detach()
    moment = moments(model, ["lm_head"], data)["lm_head"]
    cfg = PoTConfig(grid="e2m1")
    nearest = potqat.fake_quantize(weight, potqat.compute_scale(weight, cfg), cfg)

    def error(rounded):
        change = (rounded - weight).double()
        return (change @ moment * change).sum() / (weight.double() @ moment * weight.double()).sum()

    # The inputs that it was made for are those behind a float embedding.
    assert entries[name].output_error == pytest.approx(error(table.dequantize()).item(), rel=0.05)
    assert entries[name].output_error < 0.8 * error(nearest).item()


def test_rows_are_compensated_each_on_its_own(monkeypatch):
    torch.manual_seed(0)
    weight, inputs = torch.randn(13, 48), torch.randn(48, 60)
    cfg = replace(CFG, granularity=32)
    scale = potqat.compute_scale(weight, replace(cfg, scale="absmax"))
    whole = gptq.compensate(weight, scale, inputs @ inputs.t() / 60, cfg)
    monkeypatch.setattr(gptq, "ROWS", 5)
    torch.testing.assert_close(gptq.compensate(weight, scale, inputs @ inputs.t() / 60, cfg), whole, rtol=0, atol=1e-6)


def test_overrides_choose_what_is_calibrated_and_skipped_layers_stay_float():
    model = make("llama")
    cfg = PoTConfig(
        skip=("lm_head",), overrides={"o_proj": {"rounding": "gptq"}, "down_proj": {"scale": "output", "grid": "e2m1"}}
    )
    report = potqat.quantize_(model, cfg, calibration=batches())
    methods = {e.name.rpartition(".")[2]: e.method for e in report.quantized}
    assert {name for name, method in methods.items() if not method} == {
        "embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"
    }  # fmt: skip
    assert methods["o_proj"] == "scale=absmax, rounding=gptq"  # no smoothing: up_proj, before it, is packed already
    assert methods["down_proj"] == "scale=output, rounding=nearest"
    assert [e.name for e in report.skipped] == ["lm_head"]
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    model = make(kind)
    potqat.quantize_(model, CFG, calibration=batches())
    potqat.save(model, tmp_path)
    loaded = potqat.load(tmp_path, make(kind))
    ids = batches()[0]
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert next(m.cfg for m in loaded.modules() if isinstance(m, PackedLinear)).rounding == "gptq"
