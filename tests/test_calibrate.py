"""Calibration: which inputs a layer is shown, in which order, in how much memory; and quantize_ with it."""

import copy
import dataclasses
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

import potqat
from potqat import PoTConfig, calibrate, calibrated, gptq
from potqat.fake_quant import PoTFakeQuantize
from potqat.models.gpt import GPT, GPTConfig
from potqat.modules import PackedEmbedding, PackedLinear, TiedLinear

VOCABULARY, CONTEXT = 65, 24
CFG = PoTConfig(scale="output", rounding="gptq")
KINDS = ("own", "gpt2", "llama")


def make(kind, layers=2):
    torch.manual_seed(0)
    if kind == "own":
        shape = {"vocab_size": VOCABULARY, "block_size": CONTEXT, "n_layer": layers, "n_head": 2, "n_embd": 32}
        model = GPT(GPTConfig(**shape, dropout=0.3, bias=True))
    else:
        transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=layers, n_head=2, **ends
            )
        else:
            config = transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                tie_word_embeddings=False, **ends,
            )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batches(count=3, b=2, t=CONTEXT):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (b, t), generator=generator) for _ in range(count)]


def linears(model):
    """name -> module of the layers that calibration is for: all but tables and what is tied to one."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = (nn.Linear, *([type(model.transformer.h[0].attn.c_attn)] if hasattr(model, "transformer") else []))
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and id(m.weight) not in tables}


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.no_grad()
def moments(model, names, data):
    """Second moments of the inputs of modules, from whole forward passes."""
    found = {name: 0.0 for name in names}
    count = sum(ids.numel() for ids in data)
    for name in names:

        def add(_, args, name=name):
            x = args[0].flatten(0, -2).double()
            found[name] = found[name] + x.t() @ x / count

        model.get_submodule(name).register_forward_pre_hook(add)
    for ids in data:
        logits(model, ids)
    return found


# ---- The walk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_is_shown_the_inputs_of_a_model_that_holds_the_new_ones_before_it(kind):
    model = make(kind)
    data = [*batches(2), *batches(1, b=1, t=9)]
    original = copy.deepcopy(model)
    order = []
    for inputs in calibrate.walk(model, data, linears(model)):
        group = inputs.names
        assert inputs.count == sum(ids.numel() for ids in data)
        for name, expected in moments(copied(model), group, data).items():
            torch.testing.assert_close(inputs.moment, expected, rtol=1e-4, atol=1e-6)
            drift = cross_moment(original, copied(model), name, data) - expected
            torch.testing.assert_close(inputs.drift, drift, rtol=1e-4, atol=1e-5)
            changed = copy.deepcopy(model.get_submodule(name))
            changed.weight.data *= 1.5  # what the caller makes of it
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, changed)
        order.append(group)
    ends = [[name.rpartition(".")[2] for name in group] for group in order]
    if kind == "llama":
        block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
        assert ends == 2 * block + [["lm_head"]]
    else:
        assert ends == 2 * [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]


@torch.no_grad()
def cross_moment(other, model, name, data):
    """Mean of x' x^T, x and x' the inputs of a layer in ``model`` and in ``other``."""
    found = []
    for each in (other, model):
        inputs = []
        hook = each.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).double())
        )
        for ids in data:
            logits(each, ids)
        hook.remove()
        found.append(torch.cat(inputs))
    return found[0].t() @ found[1] / len(found[0])


def copied(model):
    """A copy as it was before the walk patched it: deepcopy keeps a patched forward, bound to the original."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.__dict__.pop("forward", None)
        module._forward_pre_hooks.clear()
    return copied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["exhausted", "closed", "thrown"])
def test_the_walk_leaves_the_model_as_it_was(kind, end):
    model, data = make(kind), batches()
    before, keys = logits(model, data[0]), {m: set(m.__dict__) for m in model.modules()}
    walk = calibrate.walk(model, data, linears(model))
    next(walk)
    if end == "exhausted":
        list(walk)
    elif end == "closed":
        walk.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            walk.throw(KeyboardInterrupt())
    assert {m: set(m.__dict__) for m in model.modules()} == keys
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(logits(model, data[0]), before)


def test_memory_does_not_grow_with_depth():
    def most_bytes(layers):
        model, data = make("own", layers), batches(4, b=4)
        own = {t.data_ptr() for t in [*model.parameters(), *data]}
        most = 0
        for inputs in calibrate.walk(model, data, linears(model)):
            if not inputs.names[0].endswith("mlp.c_proj"):  # the largest of a block, and the last
                continue
            tensors = {
                t.data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if type(t) is torch.Tensor and t.data_ptr() not in own
            }
            most = max(most, sum(tensors.values()))
        return most

    gc.collect()
    shallow, deep = most_bytes(2), most_bytes(8)
    hidden = 4 * 4 * CONTEXT * 32 * 4
    assert hidden < shallow
    assert deep <= shallow


def test_of_long_data_moments_are_those_of_a_part_and_blocks_still_run_on_all(monkeypatch):
    data, ran = batches(6, b=2), []

    def found(batches):
        model = make("own")
        walk = calibrate.walk(
            model, batches, linears(model), after=lambda name, run, targets: ran.append((len(run), len(targets)))
        )
        return [(inputs.count, inputs.moment) for inputs in walk]

    expected = found(data[::3])
    monkeypatch.setattr(calibrate, "MOMENT_TOKENS", sum(ids.numel() for ids in data) // 3)
    got = found(data)
    assert [count for count, _ in got] == [2 * 2 * CONTEXT] * len(expected)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))
    assert ran == [(2 * 2, 2 * 2)] * 2 + [(6 * 2, 6 * 2)] * 2


def test_layers_outside_the_blocks_and_layers_that_nothing_reaches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.first = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 32)
            self.blocks = nn.ModuleList(Twice() for _ in range(2))
            self.unused, self.last = nn.Linear(32, 32), nn.Linear(32, VOCABULARY)

        def forward(self, ids):
            x = self.first(self.table(ids))
            for block in self.blocks:
                x, _ = block(hidden=x)
            return self.last(x)

    class Twice(nn.Module):
        """Calls one layer two times and returns a tuple, as transformers 4.57 does."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, hidden):
            return self.layer(torch.relu(self.layer(hidden))), None

    model, data = Model(), batches()
    count = sum(ids.numel() for ids in data)
    found = {inputs.names[0]: inputs for inputs in calibrate.walk(model, data, linears(model))}
    assert list(found) == ["first", "blocks.0.layer", "blocks.1.layer", "last", "unused"]
    counts = [count, 2 * count, 2 * count, count, 0]
    assert [inputs.count for inputs in found.values()] == counts
    assert not found["unused"].moment.any()
    for name, expected in moments(model, list(found)[:-1], data).items():
        times = found[name].count / count
        torch.testing.assert_close(found[name].moment * times, expected, rtol=1e-4, atol=1e-6)
    report = potqat.quantize_(model, CFG, calibration=data)
    (unused,) = [e for e in report.quantized if e.reason]
    assert (unused.name, unused.reason) == ("unused", "no calibration token reached it: rounded to nearest")
    assert logits(model, data[0]).isfinite().all()


# ---- quantize_ ----------------------------------------------------------------------------------------------


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


# ---- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "cfg", "message"),
    [
        (None, PoTConfig(rounding="gptq"), r"wte: rounding='gptq' needs calibration data; pass calibration=\["),
        (None, PoTConfig(scale="output"), "scale='output' needs calibration data; pass .* or use scale='mse'"),
        (batches(), PoTConfig(), "calibration is given, and nothing uses it; set rounding='gptq'"),
        ([], CFG, "calibration is empty; give at least one"),
        (batches()[0], CFG, r"must be an iterable of token tensors, got one tensor; pass \[tokens\]"),
        ([torch.zeros(2, 8)], CFG, r"calibration\[0\] must be int64 token ids \[B, T\], got torch.float32 \[2, 8\]"),
        ([*batches(), [1, 2]], CFG, r"calibration\[3\] must be int64 token ids \[B, T\], got list"),
        ([torch.zeros(8, dtype=torch.int64)], CFG, r"got torch.int64 \[8\]"),
        (
            [*batches(), torch.tensor([[1, 65]])],
            CFG,
            r"tokens \[2\] up to id 65: IndexError",
        ),
        (batches(t=25), CFG, r"tokens \[25\] up to id 64: ValueError: GPT: at most block_size=24"),
    ],
)
def test_bad_calibration_is_refused_and_the_model_untouched(calibration, cfg, message):
    model = make("own")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        potqat.quantize_(model, cfg, calibration=calibration)
    assert_untouched(model, before)


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


# ---- Training from calibrated weights -----------------------------------------------------------------------

START = PoTConfig(scale="learned", scale_init="output", rounding="gptq")


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


def test_a_calibrated_preparation_that_was_stopped_goes_on(tmp_path, monkeypatch):
    model, once, folder = make("llama").train(), make("llama").train(), tmp_path / "unfinished"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    potqat.prepare_qat_(once, START, calibration=batches())
    count, compensate = 0, gptq.compensate

    def stopping(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return compensate(*arguments)

    monkeypatch.setattr(gptq, "compensate", stopping)
    with pytest.raises(KeyboardInterrupt):
        potqat.prepare_qat_(model, START, calibration=batches(), unfinished=folder)
    assert_untouched(model, before)
    assert model.training
    potqat.prepare_qat_(model, START, calibration=batches(), unfinished=folder)
    assert count == 6 + 10  # of 15, the first 5 were kept
    assert not folder.exists()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in once.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.h.1.mlp.c_fc.weight", torch.nan, "transformer.h.1.mlp.c_fc: .* NaN or infinity"),
        ("transformer.h.1.ln_2.weight", torch.inf, "transformer.h.1.mlp.c_fc: its inputs hold NaN or infinity"),
    ],
)
def test_after_an_error_half_way_the_float_model_is_back(name, value, message):
    model = make("own").train()
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = value
    before = {key: tensor.nan_to_num(7).clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        potqat.quantize_(model, CFG, calibration=batches())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.nan_to_num_(7)
    assert_untouched(model, before)
    assert all(m.training for m in model.modules())


def test_a_model_without_a_chain_of_blocks_is_refused():
    class Skips(nn.Module):
        """Each block sees the first hidden state, too."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 16)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, ids):
            first = x = self.table(ids)
            for block in self.blocks:
                x = block(x + first)
            return x

    with pytest.raises(ValueError, match=r"Skips holds no nn.ModuleList of blocks that are called one after another"):
        potqat.quantize_(Skips(), CFG, calibration=batches())


# ---- Stopped and gone on -------------------------------------------------------------------------------------


def test_finished_layers_are_kept_until_all_are(tmp_path, monkeypatch):
    """Stopped twice; the command line's test compares with a run that was not."""
    kept, once, model = tmp_path / "kept", make("llama"), make("llama")
    expected = potqat.quantize_(once, CFG, calibration=batches())
    compensate, calls = gptq.compensate, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) in (3, 9):
            raise KeyboardInterrupt
        return compensate(*arguments)

    monkeypatch.setattr(gptq, "compensate", stopping)
    for done in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            potqat.quantize_(model, CFG, calibration=batches(), unfinished=kept)
        assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
        assert len(list(kept.glob("*.safetensors"))) == done
    with pytest.raises(ValueError, match="another model, text or settings; delete it to start anew"):
        potqat.quantize_(model, CFG, calibration=batches(2), unfinished=kept)
    report = potqat.quantize_(model, CFG, calibration=batches(), unfinished=kept)
    assert len(calls) == 15 + 2
    assert report.to_dict() == expected.to_dict()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not kept.exists()


def test_only_its_own_folder_is_taken_for_unfinished_work(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a folder of an unfinished calibration; name another one"):
        potqat.quantize_(make("own"), CFG, calibration=batches(), unfinished=tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="unfinished keeps calibrated layers; give calibration, too"):
        potqat.quantize_(make("own"), PoTConfig(), unfinished=tmp_path / "new")
