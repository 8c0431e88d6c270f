"""The walk: which inputs a layer is shown, in which order, in how much memory."""

import copy
import gc

import pytest
import torch
from calibration_models import CFG, CONTEXT, KINDS, VOCABULARY, batches, cross_moment, linears, logits, make, moments
from torch import nn

import potqat
from potqat import calibrate


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
