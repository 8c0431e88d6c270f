"""What potqat train trains: parts of a model, losses, and the papers' preset."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from train_command import VOCABULARY, gpt2_config, llama_config, prepared, transformers

from potqat.flows import losses, training
from potqat.flows.recipe import LOSSES, PARTS, PRESETS, Recipe


@pytest.mark.parametrize("config", [llama_config(), gpt2_config()])
def test_parts_are_what_takes_gradients(config):
    model = prepared(config)
    tables = ("embed_tokens", "lm_head", "wte", "wpe")
    expected = {
        "scales": lambda name, p: name.endswith("log2_scale"),
        "norms": lambda name, p: name.endswith(("log2_scale", "bias")) or "norm" in name or "ln_" in name,
        "blocks": lambda name, p: not any(table in name for table in tables),
        "all": lambda name, p: True,
    }
    assert set(expected) == set(PARTS)
    for parts, is_part in expected.items():
        training.choose_parts(model, parts)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == is_part(name, parameter), (parts, name)
    float_model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match="Sequential has no parameters of the parts 'norms'"):
        training.choose_parts(float_model, "norms")


def test_losses_are_what_they_are_called():
    torch.manual_seed(1)
    model, teacher = prepared(), transformers.AutoModelForCausalLM.from_config(llama_config())
    windows = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        log_q, log_p = (m(windows[:, :-1]).logits.double().log_softmax(-1) for m in (model, teacher))
    targets = -log_q.gather(-1, windows[:, 1:, None])[..., 0]
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(), "ce": targets.mean(), "last": targets[:, -1].mean(),
    }  # fmt: skip
    assert set(expected) == set(LOSSES)
    for name, value in expected.items():
        loss = losses.make(Recipe(loss=name), teacher)(model, windows)
        assert loss.item() == pytest.approx(value.item(), rel=1e-5)
        loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    ce, kl = losses.held_out(Recipe(), model, teacher, windows)
    assert (ce, kl) == pytest.approx((expected["ce"].item(), expected["kl"].item()), rel=1e-5)
    assert losses.kl_divergence(teacher, teacher, windows).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_divergence_and_its_gradient_in_parts_are_those_of_the_whole(dtype):
    torch.manual_seed(2)
    count, vocabulary = 2 * losses.ROWS + 7, 19
    logits = (4 * torch.randn(1, count, vocabulary)).to(dtype).requires_grad_()
    theirs = (4 * torch.randn(1, count, vocabulary)).to(dtype)
    exact = logits.detach().double().requires_grad_()
    log_q, log_p = exact.log_softmax(-1), theirs.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()

    ids = torch.zeros(1, count, dtype=torch.int64)
    student, teacher = (lambda t=t, **_: SimpleNamespace(logits=t) for t in (logits, theirs))
    loss = losses.kl_divergence(student, teacher, ids)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    # A few roundings of values up to 1 / count, and one to the logits' own dtype.
    bound = 1e-6 / count + torch.finfo(dtype).eps * 3 * exact.grad.abs()
    assert ((logits.grad.double() - 3 * exact.grad).abs() <= bound).all()


def test_the_papers_preset_is_their_protocol():
    papers = PRESETS["papers"]
    assert (papers.loss, papers.context, papers.batch, papers.accumulate) == ("last", 64, 12, 32)
    phase = papers.quantized_phase("qat")
    assert {phase.learning_rate_at(i) for i in range(papers.steps + 1)} == {0.5e-5}
