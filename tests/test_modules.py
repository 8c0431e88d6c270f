"""quantize_, prepare_qat_ and convert_ on real modules: ties, reports, bit-equality, and plain-module behaviour."""

import copy
import pickle

import pytest
import torch
from torch import nn

import potqat
from potqat import PoTConfig
from potqat.modules import PackedEmbedding, PackedLinear, QATEmbedding, QATLinear


class Tiny(nn.Module):
    """Token table tied to the head, a position table, one block."""

    def __init__(self, vocabulary=65, width=96):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(16, width)
        self.fc, self.proj = nn.Linear(width, 160), nn.Linear(160, width, bias=False)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        return self.lm_head(x + self.proj(torch.relu(self.fc(x))))


IDS = torch.arange(32).reshape(2, 16) % 65


def loss_of(model, ids=IDS):
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())


def test_quantize_replaces_and_reports_everything():
    model = Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = potqat.quantize_(model, PoTConfig())
    assert [e.name for e in report.quantized] == ["wte", "wpe", "fc", "proj", "lm_head"]
    assert not report.skipped
    assert isinstance(model.wte, PackedEmbedding)
    assert isinstance(model.fc, PackedLinear)
    assert model.wte.packed.data_ptr() == model.lm_head.packed.data_ptr()
    grids = {e.name: e.grid for e in report.quantized}
    assert grids == {"wte": "int8", "wpe": "int8", "fc": "pot4", "proj": "pot4", "lm_head": "int8"}
    cfg = PoTConfig()
    w = before["fc.weight"]
    assert torch.equal(model.fc.dequantize(), potqat.fake_quantize(w, potqat.compute_scale(w, cfg), cfg))
    assert report.bytes_before == sum(4 * w.numel() for n, w in before.items() if "bias" not in n)
    held = {t.data_ptr(): t.numel() * t.element_size() for n, t in model.state_dict().items() if "bias" not in n}
    assert report.bytes_after == sum(held.values())
    assert all(12 < e.sqnr_db < 60 for e in report.quantized)
    text = str(report)
    assert "5 quantized, 0 skipped" in text
    assert "tied" in next(e.reason for e in report.entries if e.name == "lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["absmax", "mse", "learned", "paper"])
def test_converted_weights_equal_fake_quantized_ones(scale, dtype):
    granularity = "tensor" if scale == "paper" else "channel"
    cfg = PoTConfig(scale=scale, granularity=granularity, ste="identity" if scale == "paper" else "clipped", eps=1e-4)
    model = Tiny().to(dtype)
    potqat.prepare_qat_(model, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = loss_of(model).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    model.eval()
    with torch.no_grad():
        fake = {n: m.weight_fake_quant(m.weight) for n, m in model.named_modules() if hasattr(m, "weight_fake_quant")}
    potqat.convert_(model)
    for name, w_hat in fake.items():
        assert torch.equal(model.get_submodule(name).dequantize().to(dtype), w_hat), name
    assert model.wte.packed.data_ptr() == model.lm_head.packed.data_ptr()


def test_prepare_keeps_parameters_and_adds_only_learned_scales():
    model = Tiny()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    potqat.prepare_qat_(model, PoTConfig(scale="learned"))
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    assert {n.rpartition(".")[2] for n in after.keys() - parameters.keys()} == {"log2_scale"}
    assert isinstance(model.fc, QATLinear)
    assert isinstance(model.wte, QATEmbedding)
    assert model.wte.weight_fake_quant is model.lm_head.weight_fake_quant
    loss_of(model).backward()
    before = model.fc.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in after.items() if "log2_scale" in n)


def test_paper_average_moves_once_a_step_and_never_in_eval():
    model = Tiny()
    potqat.prepare_qat_(model, PoTConfig(scale="paper", granularity="tensor", embedding_grid="pot4"))
    fake_quant = model.wte.weight_fake_quant
    start = fake_quant.running_max.clone()
    with torch.no_grad():
        model.wte.weight.mul_(3)
    model.eval()
    model(IDS)
    assert torch.equal(fake_quant.running_max, start)
    model.train()
    model(IDS)  # the tied table is used twice in this forward
    torch.testing.assert_close(fake_quant.running_max, start + 0.01 * (3 * start - start))


def test_skip_overrides_and_none():
    model = Tiny()
    cfg = PoTConfig(embedding_grid=None, skip=("proj",), overrides={"fc": {"grid": "e2m1", "granularity": 32}})
    report = potqat.quantize_(model, cfg)
    assert [e.name for e in report.quantized] == ["fc"]
    assert (model.fc.cfg.grid, model.fc.scale.shape) == ("e2m1", (3, 160))
    assert {e.name: e.reason for e in report.skipped} == {
        "wte": "embedding_grid is None",
        "wpe": "embedding_grid is None",
        "lm_head": "embedding_grid is None",
        "proj": "matches skip pattern 'proj'",
    }


def test_a_skipped_tie_is_reported():
    model = Tiny()
    report = potqat.quantize_(model, PoTConfig(grid="e2m1", skip=("wte",)))
    assert report.notes == ["wte is tied to a quantized weight but was skipped: its float copy stays"]
    assert isinstance(model.wte, nn.Embedding)


@pytest.mark.parametrize(
    ("make", "cfg", "message"),
    [
        (Tiny, PoTConfig(skip=("nope",)), "pattern 'nope' matches no quantizable module; they are: wte, wpe, fc"),
        (Tiny, PoTConfig(overrides={"nope": {}}), "pattern 'nope' matches no"),
        (Tiny, PoTConfig(skip=("*",)), "nothing to quantize in Tiny .*wte: matches skip pattern"),
        (nn.ReLU, PoTConfig(), "nothing to quantize in ReLU .*no Linear, Conv1D or Embedding"),
        (Tiny, PoTConfig(grid="pot(7)"), r"fc: potqat.pack: pot\(7\) is for fake-quantization only"),
    ],
)
def test_bad_plans_are_refused(make, cfg, message):
    with pytest.raises(ValueError, match=message):
        potqat.quantize_(make(), cfg)


def test_a_bad_weight_names_its_module_and_leaves_the_model_alone():
    model = Tiny()
    with torch.no_grad():
        model.proj.weight[2, 3] = float("inf")
    for quantize in (potqat.quantize_, potqat.prepare_qat_):
        for cfg in (PoTConfig(), PoTConfig(scale="learned"), PoTConfig(scale="paper", granularity="tensor")):
            with pytest.raises(ValueError, match=r"^proj: .*the weight holds NaN or infinity at \[2, 3\]"):
                quantize(model, cfg)
            assert type(model.fc) is nn.Linear


def test_divergence_in_training_names_the_module():
    model = Tiny()
    potqat.prepare_qat_(model, PoTConfig())
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^fc: .*NaN or infinity"):
        model(IDS)


def test_convert_without_prepare_is_an_error():
    with pytest.raises(ValueError, match="call prepare_qat_ first"):
        potqat.convert_(Tiny())


def test_packed_modules_are_plain_modules():
    model = Tiny()
    potqat.quantize_(model, PoTConfig())
    expected = model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), expected)
    fresh = Tiny()
    potqat.quantize_(fresh, PoTConfig())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), expected)
    assert not list(model.fc.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_casts_leave_codes_and_scales_exact(dtype):
    model = Tiny()
    potqat.quantize_(model, PoTConfig())
    weight = model.fc.dequantize()
    model.to(dtype)
    assert (model.fc.packed.dtype, model.fc.scale.dtype, model.fc.bias.dtype) == (torch.uint8, torch.float32, dtype)
    assert torch.equal(model.fc.dequantize(), weight)
    assert model(IDS).dtype == dtype


def test_weight_only_close_to_the_float_model_with_those_weights():
    model = Tiny()
    reference = copy.deepcopy(model)
    potqat.quantize_(model, PoTConfig(activations=None))
    with torch.no_grad():
        for name in ("wte", "wpe", "fc", "proj"):
            reference.get_submodule(name).weight.copy_(model.get_submodule(name).dequantize())
    # Both sum at most 160 products in float32, in different orders: well inside 160 * 2^-24 * sum |x w| ~ 1e-4.
    torch.testing.assert_close(model(IDS), reference(IDS), rtol=0, atol=1e-4)


def test_packed_model_compiles_in_one_graph():
    model = Tiny().eval()
    potqat.quantize_(model, PoTConfig())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(IDS), model(IDS))


def test_qat_model_compiles_in_one_graph():
    model = Tiny()
    potqat.prepare_qat_(model, PoTConfig(scale="learned"))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))


@pytest.mark.parametrize(
    "x",
    [torch.ones(3, 32), torch.ones(3, 64, dtype=torch.int64), torch.tensor(1.0)],
    ids=["width", "integers", "scalar"],
)
def test_a_packed_linear_says_what_it_takes(x):
    model = nn.Sequential(nn.Linear(64, 16))
    potqat.quantize_(model, potqat.PoTConfig())
    with pytest.raises(ValueError, match=r"x must be float \[\.\.\., 64\], got torch"):
        model(x)
