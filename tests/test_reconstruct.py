"""Block reconstruction: what it gains, what it leaves alone, and that it goes on where it was stopped."""

import copy
from dataclasses import replace

import pytest
import torch
from calibration_models import CONTEXT, KINDS, batches, linears, make

import potqat
from potqat import PoTConfig, reconstruct

CFG = PoTConfig(scale="output", rounding="reconstruct", activations=None)
GPTQ = replace(CFG, rounding="gptq")


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """These texts are short: steps for as many as there are in a real one."""
    monkeypatch.setattr(reconstruct, "STEP", CONTEXT)


def blocks_of(model):
    return next(m for name, m in model.named_modules() if name in ("transformer.h", "model.layers"))


@torch.no_grad()
def block_outputs(model, data):
    """[blocks][batches] of hidden states."""
    found = [[] for _ in blocks_of(model)]
    hooks = [
        block.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for block, seen in zip(blocks_of(model), found, strict=True)
    ]
    for ids in data:
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def errors(model, expected, data):
    """Of each block: squared difference over squares, the mean over tokens."""
    return [
        torch.cat([((a - b).square().sum(-1) / b.square().sum(-1)).flatten() for a, b in zip(now, then, strict=True)])
        .mean()
        .item()
        for now, then in zip(block_outputs(model, data), expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "grid", "granularity"),
    [("own", "pot4", "channel"), ("gpt2", "pot4", "tensor"), ("llama", "pot4", "channel"), ("llama", "e2m1", 32)],
)
def test_blocks_return_what_the_float_ones_do_more_nearly_than_after_error_compensation(kind, grid, granularity):
    model, data = make(kind), batches(6, b=4)
    cfg = replace(CFG, grid=grid, granularity=granularity, embedding_grid=None)
    expected = block_outputs(model, data)
    compensated = copy.deepcopy(model)
    potqat.quantize_(compensated, replace(cfg, rounding="gptq"), calibration=data)
    report = potqat.quantize_(model, cfg, calibration=data)
    found = errors(model, expected, data)
    assert all(now < before for now, before in zip(found, errors(compensated, expected, data), strict=True))
    told = list(dict.fromkeys(e.block_error for e in report.entries if e.block_error is not None))
    torch.testing.assert_close(told, found, rtol=1e-3, atol=0)
    assert "2 blocks reconstructed" in str(report)
    assert all(e.block_error < e.block_error_before for e in report.entries if e.block_error is not None)


@pytest.mark.parametrize(("tokens_in_all", "times"), [(100, 4), (4, 4), (1.9, 2), (0.1, 1)])
def test_long_data_is_seen_fewer_times(tokens_in_all, times, monkeypatch):
    model, data, trained = make("own"), batches(2, b=2), []
    monkeypatch.setattr(reconstruct, "SEEN", tokens_in_all * sum(ids.numel() for ids in data))
    blocks_of(model)[0].register_forward_hook(lambda *_: trained.append(torch.is_grad_enabled()))
    potqat.quantize_(model, CFG, calibration=data)
    assert sum(trained) == times * sum(len(ids) for ids in data)


@pytest.mark.parametrize("kind", KINDS)
def test_only_codes_and_scales_change(kind):
    model = make(kind)
    names = set(linears(model))
    before = {n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in names}
    weights = {n: m.weight for n, m in linears(model).items()}
    kept = {n: w.clone() for n, w in weights.items()}
    frozen = next(n for n, p in model.named_parameters() if p.dim() == 1)
    model.get_parameter(frozen).requires_grad_(False)
    potqat.quantize_(model, replace(CFG, embedding_grid=None), calibration=batches())
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
    assert all(p.grad is None for p in after.values())
    assert {n for n, p in after.items() if not p.requires_grad} == {frozen}
    assert all(torch.equal(weights[name], kept[name]) and weights[name].grad is None for name in names)


def test_layers_of_other_roundings_stay_as_they_are():
    model, other = make("llama"), make("llama")
    report = potqat.quantize_(model, replace(CFG, overrides={"*.mlp.*": {"rounding": "gptq"}}), calibration=batches())
    potqat.quantize_(other, GPTQ, calibration=batches())
    learned = {e.name for e in report.entries if e.block_error is not None}
    assert learned == {n for n in linears(make("llama")) if "self_attn" in n}
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(model.get_submodule(name).packed, other.get_submodule(name).packed)
    head = next(e for e in report.entries if e.name == "lm_head")  # in no block
    assert head.block_error is None
    assert head.output_error is not None


def test_the_same_call_gives_the_same_codes_and_a_stopped_one_goes_on_to_them(tmp_path, monkeypatch):
    kept, once, model = tmp_path / "kept", make("llama", layers=3), make("llama", layers=3)
    expected = potqat.quantize_(once, CFG, calibration=batches())
    run, calls = reconstruct._train, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(*arguments)

    monkeypatch.setattr(reconstruct, "_train", stopping)
    with pytest.raises(KeyboardInterrupt):
        potqat.quantize_(model, CFG, calibration=batches(), unfinished=kept)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make("llama", layers=3).parameters(), strict=True))
    (kept / "model.layers.0.mlp.up_proj.safetensors").unlink()  # killed while the block's layers were written
    report = potqat.quantize_(model, CFG, calibration=batches(), unfinished=kept)
    assert len(calls) == 2 + 3
    assert report.to_dict() == expected.to_dict()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not kept.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model = make("llama").to(dtype)
    report = potqat.quantize_(model, CFG, calibration=batches())
    assert all(e.block_error < e.block_error_before for e in report.entries if e.block_error is not None)
    assert model(batches(1)[0]).logits.dtype == dtype


def test_training_starts_from_reconstructed_weights():
    trained, packed = make("llama"), make("llama")
    cfg = replace(CFG, scale="learned", scale_init="output")
    potqat.prepare_qat_(trained, cfg, calibration=batches())
    potqat.quantize_(packed, cfg, calibration=batches())
    potqat.convert_(trained)
    for name in linears(make("llama")):
        assert torch.equal(trained.get_submodule(name).packed, packed.get_submodule(name).packed)
