"""Hugging Face models: GPT-2 (Conv1D, tied head) and the Llama family (rotary, RMSNorm, grouped heads, tied or not)."""

import copy
import json

import pytest
import torch
from safetensors import SafetensorError
from torch.export import Dim

import potqat
from potqat import PoTConfig, PoTFormatError
from potqat.modules import PackedEmbedding, PackedLinear, QATConv1D, TiedLinear

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
hf = pytest.importorskip("potqat.hf")

VOCABULARY, CONTEXT = 257, 32
KINDS = ("gpt2", "llama", "llama-untied")


def make(kind, dropout=0.0):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=kind == "llama",
            bos_token_id=0, eos_token_id=0, attention_dropout=dropout,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero, which would hide a bias that is lost
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def ids(b=2, t=16):
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, x):
    return model(input_ids=x).logits


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ---- Quantize -----------------------------------------------------------------------------------------------


def test_every_weight_is_quantized_and_reported(kind):
    model = make(kind)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    report = potqat.quantize_(model, PoTConfig())
    assert not report.skipped
    assert report.bytes_before == 4 * total
    kinds = {entry.kind for entry in report.quantized}
    assert kinds == ({"conv1d", "embedding", "linear"} if kind == "gpt2" else {"embedding", "linear"})
    head = next(entry for entry in report.quantized if entry.name == "lm_head")
    assert head.grid == ("pot4" if kind == "llama-untied" else "int8")
    assert isinstance(model.lm_head, TiedLinear) == (kind != "llama-untied")
    assert not [name for name, p in model.named_parameters() if p.dim() > 1]


def test_packed_models_compute_what_fake_quantized_ones_do(kind):
    """With float activations only the order of summation differs; here its effect on logits of size 1."""
    cfg = PoTConfig(activations=None)
    packed, fake = make(kind), make(kind)
    potqat.prepare_qat_(fake, cfg)
    potqat.quantize_(packed, cfg)
    torch.testing.assert_close(logits(packed, ids()), logits(fake, ids()), atol=2e-6, rtol=2e-5)


def test_what_has_no_packed_form_is_reported(kind):
    model = make(kind)
    model.extra = torch.nn.Conv1d(4, 4, 3)
    model.table = torch.nn.Parameter(torch.ones(3, 3))
    report = potqat.quantize_(model, PoTConfig(skip=("lm_head",)))
    assert {entry.name: entry.reason for entry in report.skipped} == {
        "lm_head": "matches skip pattern 'lm_head'",
        "extra.weight": "Conv1d has no packed form",
        "table": f"{type(model).__name__} has no packed form",
    }
    assert logits(model, ids()).isfinite().all()


def test_names_for_skip_and_overrides():
    model = make("gpt2")
    cfg = PoTConfig(skip=("transformer.h.0.*", "wpe"), overrides={"*.mlp.c_proj": {"grid": "e2m1", "granularity": 32}})
    report = potqat.quantize_(model, cfg)
    block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {e.name for e in report.skipped} == {"transformer.wpe", *(f"transformer.h.0.{name}" for name in block)}
    assert model.transformer.h[1].mlp.c_proj.cfg.grid == "e2m1"
    with pytest.raises(
        ValueError, match=r"pattern 'mlp\.up_proj' matches no quantizable module; they are: transformer"
    ):
        potqat.quantize_(make("gpt2"), PoTConfig(skip=("mlp.up_proj",)))


def test_generate_is_the_same_with_and_without_cache(kind):
    """int8 activations are quantized per token, so the cache changes nothing but float attention's rounding."""
    model = make(kind)
    potqat.quantize_(model, PoTConfig())
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, recomputed = (model.generate(ids(1, 4), use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (1, 12)
    assert torch.equal(cached, recomputed)


# ---- Save and load ------------------------------------------------------------------------------------------


def packed(kind, dtype=torch.float32):
    model = make(kind)
    for parameter in model.parameters():  # not model.to(dtype), which rounds Llama's rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    potqat.quantize_(model, PoTConfig(granularity=32))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("writer", ["save", "save_pretrained"])
def test_from_pretrained_reads_what_was_saved(kind, writer, dtype, tmp_path):
    model = packed(kind, dtype)
    potqat.save(model, tmp_path) if writer == "save" else model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model)
    assert torch.equal(logits(again, ids()), logits(model, ids()))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            other = again.get_submodule(name)
            assert type(other) is type(module)
            assert other.scale.dtype == torch.float32
            assert torch.equal(other.scale, module.scale)
            assert torch.equal(other.packed, module.packed)
    again.save_pretrained(tmp_path / "again")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(third, ids()), logits(model, ids()))


def test_potqat_load_reads_save_pretrained_and_shards(kind, tmp_path):
    model = packed(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = potqat.load(tmp_path, make(kind))
    assert torch.equal(logits(again, ids()), logits(model, ids()))
    sharded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(sharded, ids()), logits(model, ids()))


def test_potqat_load_refuses_a_model_without_its_rotary_frequencies(tmp_path):
    potqat.save(packed("llama"), tmp_path)
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(ValueError, match=r"buffer model\.rotary_emb\.inv_freq is on the meta device"):
        potqat.load(tmp_path, model)


def test_the_folder_holds_each_tied_weight_once(tmp_path):
    packed("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "potqat"
    assert config["quantization_config"]["modules"]["lm_head"]["tied_to"] == "transformer.wte"
    with potqat.container.safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("lm_head")]  # noqa: SIM118


def test_a_float_model_is_quantized_as_it_loads(kind, tmp_path):
    float_model = make(kind)
    float_model.save_pretrained(tmp_path)
    cfg = PoTConfig(granularity=32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=hf.PoTQuantizationConfig(cfg), dtype=torch.float32
    )
    assert loaded.hf_quantizer.report.quantized
    assert torch.equal(logits(loaded, ids()), logits(packed(kind), ids()))
    loaded.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, ids()), logits(loaded, ids()))


def test_from_pretrained_refuses_what_load_refuses(tmp_path):
    packed("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(change):
        changed = copy.deepcopy(config)
        change(changed["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(PoTFormatError, match="format version '7'"):
        load(lambda q: q.update(format_version="7"))
    with pytest.raises(PoTFormatError, match="unknown key 'extra'"):
        load(lambda q: q.update(extra=1))
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    # transformers 4.57 looks into the header before it asks any quantizer.
    with pytest.raises((PoTFormatError, SafetensorError), match=r"truncated|not fully covered"):
        load(lambda q: None)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert load(lambda q: None)


# ---- Train --------------------------------------------------------------------------------------------------

SHAPES = ({0: Dim("batch", min=1), 1: Dim("time", min=1, max=CONTEXT)},)


def loss_of(model, x):
    out = model(x)
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def train(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        x = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(step % 2))
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=["absmax", "learned"])
def trained(kind, request):
    """(float model trained in place, the eager QAT model, the PT2E one, their losses): the same steps both ways."""
    cfg = PoTConfig(scale=request.param, granularity=32)
    eager_model, exported_model = make(kind).train(), make(kind).train()
    eager = hf.CausalLogits(eager_model)
    exported = potqat.pt2e.prepare(hf.CausalLogits(exported_model), (ids(),), cfg, dynamic_shapes=SHAPES)
    potqat.prepare_qat_(eager, cfg)
    return eager_model, eager, exported, train(eager, 12), train(exported, 12)


def test_eager_and_exported_training_agree_and_convert_exactly(trained):
    eager_model, eager, exported, eager_losses, exported_losses = trained
    assert eager_losses[-1] < eager_losses[0]
    # A learned scale of a tied table sums its gradient in another order; all else is equal bit for bit.
    torch.testing.assert_close(torch.tensor(eager_losses), torch.tensor(exported_losses), rtol=0, atol=1e-5)
    eager.eval(), exported.eval()
    with torch.no_grad():
        fake = {
            name: module.weight_fake_quant(module.weight.t() if isinstance(module, QATConv1D) else module.weight)
            for name, module in eager.named_modules()
            if hasattr(module, "weight_fake_quant")
        }
        for name, module in potqat.pt2e.convert(exported).named_modules():
            if hasattr(module, "packed"):
                qat = exported.get_submodule(name)
                weight = qat.weight.t() if qat.weight_fake_quant.transposed else qat.weight
                w_hat = potqat.unpack(module.packed, module.scale, qat.weight_fake_quant.cfg, tuple(weight.shape))
                assert torch.equal(w_hat, qat.weight_fake_quant(qat.weight).t() if qat.weight_fake_quant.transposed
                                   else qat.weight_fake_quant(qat.weight)), name  # fmt: skip
    report = potqat.convert_(eager_model)
    assert len(report.quantized) == len(fake)
    for name, w_hat in fake.items():
        assert torch.equal(eager_model.get_submodule(name).dequantize(), w_hat), name


def test_an_exported_model_goes_on_as_a_hugging_face_model(kind, tmp_path):
    """PT2E training, then eager modules with the trained scales: generate and save_pretrained work again."""
    cfg = PoTConfig(scale="learned")
    model = make(kind).train()
    qat = potqat.pt2e.prepare(hf.CausalLogits(model), (ids(),), cfg, dynamic_shapes=SHAPES)
    train(qat, 3)
    graph = potqat.pt2e.convert(qat)
    potqat.prepare_qat_(model, cfg)
    model.load_state_dict(qat.state_dict())
    potqat.convert_(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids()), graph(ids()), atol=0.02, rtol=0.02)  # int8 steps of x
    assert model.generate(ids(1, 4), max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 8)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids()), logits(model, ids()))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, CONTEXT)])
def test_shapes_and_dropout_of_the_exported_model(kind, shape):
    model = make(kind, dropout=0.25).train()
    wrapped = hf.CausalLogits(model)
    qat = potqat.pt2e.prepare(wrapped, (ids(),), PoTConfig(activations=None), dynamic_shapes=SHAPES)
    x = ids(*shape)
    with torch.no_grad():
        qat.eval()
        assert torch.equal(qat(x), qat(x))
        qat.train()
        if kind == "gpt2":  # Llama's only dropout is inside attention, which one token does not show
            assert not torch.equal(qat(x), qat(x))
        qat.eval()
        packed = potqat.pt2e.convert(qat)
        torch.testing.assert_close(packed(x), qat(x), atol=2e-6, rtol=2e-5)
    rates = {
        node.args[1]
        for node in qat.graphs[True].graph.nodes
        if node.target is torch.ops.aten.dropout.default and node.args[2]
    }
    assert rates == ({0.25} if kind == "gpt2" else set())
    attention = [node for node in qat.graphs[True].graph.nodes if "scaled_dot_product" in str(node.target)]
    assert {0.25} == {node.args[4] if len(node.args) > 4 else node.kwargs["dropout_p"] for node in attention}


def test_the_export_wrapper_is_the_model(kind):
    model = make(kind)
    wrapped = hf.CausalLogits(model)
    assert wrapped.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(wrapped(ids()), logits(model, ids()), atol=1e-5, rtol=1e-5)
    wrapped.train()
    assert model.training
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert not torch.equal(next(copied.parameters()), next(model.parameters()))
    assert not torch.equal(copied.eval()(ids()), wrapped.eval()(ids()))


def test_conv1d_twins_compute_what_conv1d_does():
    model, twin = make("gpt2"), make("gpt2")
    potqat.prepare_qat_(twin, PoTConfig())
    for module in twin.modules():
        if hasattr(module, "weight_fake_quant"):
            module.weight_fake_quant.enabled = False
    assert isinstance(twin.transformer.h[0].mlp.c_fc, QATConv1D)
    torch.testing.assert_close(logits(twin, ids()), logits(model, ids()), atol=1e-6, rtol=1e-6)
