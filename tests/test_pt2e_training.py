"""PT2E trains as eager QAT does, keeps dropout, and its checkpoints are those of eager QAT."""

import copy
import pickle

import pytest
import torch
from pt2e_models import CONTEXT, PAPER, WARNINGS, both, gpt, loss_of, prepare, prepared, same_state, tokens, train
from torch import nn
from torchao.quantization.pt2e import disable_observer

from potqat import PoTConfig, pt2e

pytestmark = WARNINGS

TABLE_SCALE = "transformer.wte.weight_fake_quant.log2_scale"


# ---- Training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg", [PoTConfig(), PoTConfig(granularity=32, grid="e2m1"), PAPER], ids=["pot4", "g32", "paper"]
)
def test_losses_equal_those_of_eager_qat(cfg):
    # Bit for bit: the same ops in the same order. A tie adds two gradients, and masking by 0 or 1 commutes with that.
    qat, eager = both(cfg)
    assert train(qat, 50) == train(eager, 50)
    assert same_state(qat, eager)


def test_learned_scales_follow_eager_qat_to_rounding():
    # PT2E quantizes a tied table once and sums its two gradients before the scale gradient's product; eager QAT takes
    # the product for each and sums after. Sums of 32 float32 terms differ by some 2^-24 of their size for it, and 60
    # steps of training carry that on. The loss is about 4: 1e-4 is 400 units in its last place.
    qat, eager = both(PoTConfig(scale="learned", embedding_grid="pot4"))
    start = qat.get_parameter(TABLE_SCALE).detach().clone()
    assert any(parameter is qat.get_parameter(TABLE_SCALE) for parameter in qat.parameters())
    ids = tokens(4, CONTEXT + 1)
    for model in (qat, eager):
        loss_of(model, ids).backward()
    ours, theirs = qat.get_parameter(TABLE_SCALE).grad, eager.get_parameter(TABLE_SCALE).grad
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    losses, expected = train(qat, 60, lr=1e-2), train(eager, 60, lr=1e-2)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-4
    assert (qat.get_parameter(TABLE_SCALE) - start).abs().max() > 0.01


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_dropout_keeps_its_p_through_mode_changes(p):
    qat, eager = both(PoTConfig(), dropout=p)
    ids = tokens()
    for _ in range(2):
        assert torch.equal(qat.eval()(ids), eager.eval()(ids))
        torch.manual_seed(3)
        ours = qat.train()(ids)
        torch.manual_seed(3)
        # Equal only if each dropout, SDPA's too, draws with the same p in the same order.
        assert torch.equal(ours, eager.train()(ids))
        assert not torch.equal(ours, qat(ids))


def test_modes_return_self_nest_and_leave_the_model_alone():
    model = gpt(dropout=0.2).train()
    model.transformer.drop.eval()
    qat = prepare(model)
    assert qat.training
    assert model.training
    assert not model.transformer.drop.training
    assert qat.eval() is qat
    assert qat.train() is qat
    outer = nn.Sequential(qat).eval()
    ids = tokens()
    assert torch.equal(outer(ids), qat.eval()(ids))
    assert not torch.equal(outer.train()(ids), outer(ids))
    assert not prepare(gpt().eval()).training


def test_evaluation_moves_no_scale_and_training_moves_the_average_once():
    qat, eager = both(PAPER)
    for _ in range(3):
        with torch.no_grad():
            qat.transformer.wte.weight.mul_(1.5)
            eager.transformer.wte.weight.mul_(1.5)
        before = copy.deepcopy(qat.state_dict())
        qat.eval()(tokens())
        assert all(torch.equal(before[key], value) for key, value in qat.state_dict().items())
        qat.train()(tokens())
        absmax = qat.transformer.wte.weight.max()
        average = before["transformer.wte.weight_fake_quant.running_max"].lerp(absmax, 0.01)
        assert torch.equal(qat.state_dict()["transformer.wte.weight_fake_quant.running_max"], average)
        eager(tokens())
        assert same_state(qat, eager)


def test_observers_and_fake_quantization_can_be_switched():
    qat = prepared(PAPER)
    ids = tokens()
    quantized = qat(ids)
    qat.apply(disable_observer)
    with torch.no_grad():
        qat.lm_head.weight.mul_(2)
    before = copy.deepcopy(qat.state_dict())
    qat(ids)
    assert all(torch.equal(before[key], value) for key, value in qat.state_dict().items())
    qat = prepare(model := gpt())
    for module in qat.modules():
        if isinstance(module, pt2e.PoTPerChannelFakeQuantize):
            module.disable_fake_quant()
    assert torch.equal(qat(ids), model(ids))
    assert not torch.equal(qat(ids), quantized)


def test_gradients_reach_every_parameter_of_the_model():
    model = gpt()
    qat = prepare(model, PoTConfig(scale="learned"))
    qat(tokens()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in qat.parameters())
    assert qat.transformer.wte.weight is model.transformer.wte.weight


# ---- Checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [PoTConfig(), PoTConfig(scale="learned"), PAPER], ids=["absmax", "learned", "paper"])
def test_checkpoints_move_between_eager_and_pt2e(cfg):
    qat, eager = both(cfg)
    assert list(qat.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in qat.named_parameters()] == [name for name, _ in eager.named_parameters()]
    train(qat, 3, lr=1e-2)
    ids = tokens()
    assert not torch.equal(qat.eval()(ids), eager.eval()(ids))
    eager.load_state_dict(qat.state_dict())
    assert torch.equal(qat(ids), eager(ids))
    other = prepare(gpt(), cfg).eval()
    other.load_state_dict(eager.state_dict())
    assert torch.equal(qat(ids), other(ids))


def test_resumed_training_goes_on_as_if_uninterrupted():
    cfg = PoTConfig(scale="learned")
    qat = prepared(cfg)
    train(qat, 3)
    resumed = prepare(gpt(), cfg)
    resumed.load_state_dict(qat.state_dict())
    assert train(qat, 3) == train(resumed, 3)


def test_deepcopy_is_whole_and_pickle_says_what_to_do():
    qat = prepare(gpt())
    twin = copy.deepcopy(qat)
    ids = tokens()
    assert torch.equal(twin(ids), qat(ids))
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)  # tied, and read by both graphs
    assert not torch.equal(twin(ids), qat(ids))
    assert torch.equal(twin(ids), twin.eval()(ids))
    assert twin.transformer.wte.weight_fake_quant is twin.lm_head.weight_fake_quant
    with pytest.raises(TypeError, match="save state_dict"):
        pickle.dumps(qat)
