"""What perplexity in windows means, its intervals, and the distance to a reference."""

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from potqat import perplexity
from potqat.flows.evaluate import measure
from potqat.perplexity import Windows, score

V = 37


@pytest.fixture(scope="module")
def model(small_gpt):
    return small_gpt(1, V)


@pytest.fixture(scope="module")
def reference(small_gpt):
    return small_gpt(2, V)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(V, (101,), generator=torch.Generator().manual_seed(3))


def window_of(target, length, context, stride):
    """The start of the first whole window that predicts ``target`` from something, or None: the definition, target
    by target."""
    starts = range(0, length - context + 1, stride)
    return next((begin for begin in starts if begin < target < begin + context), None)


@torch.no_grad()
def target_by_target(model, tokens, context, stride):
    """{target: log-probabilities float64 [V]}, one forward a target that sees nothing but what comes before."""
    found = {}
    for target in range(len(tokens)):
        begin = window_of(target, len(tokens), context, stride)
        if begin is not None:
            found[target] = model(tokens[None, begin:target])[0, -1].double().log_softmax(-1)
    return found


@given(st.integers(2, 20), st.data())
def test_every_target_is_scored_by_the_first_window_that_can(context, data):
    stride = data.draw(st.integers(1, context))
    length = data.draw(st.integers(context, 90))
    windows = Windows(length, context, stride)
    by_window = {
        i * stride + j: i * stride for i in range(len(windows)) for j in range(windows.first(i), windows.context)
    }
    expected = {target: window_of(target, length, context, stride) for target in range(length)}
    assert by_window == {target: begin for target, begin in expected.items() if begin is not None}
    assert sum(map(windows.scored, range(len(windows)))) == len(by_window)
    assert 0 not in by_window


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 16), (16, 15), (16, 5), (7, 1), (101, None), (2, 2)])
def test_perplexity_is_that_of_one_forward_a_target(monkeypatch, model, tokens, context, stride):
    monkeypatch.setattr(perplexity, "POSITIONS", 4)
    log_p = target_by_target(model, tokens, context, stride or context)
    losses = [-row[tokens[target]].item() for target, row in log_p.items()]
    measured = measure(model, tokens, context, stride)
    assert measured.scored == len(losses)
    assert measured.loss == pytest.approx(statistics.fmean(losses), rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)
    assert (measured.context, measured.stride) == (context, stride or context)
    assert measured.reference is None


@torch.no_grad()
def test_with_stride_equal_to_context_it_is_gptqs_evaluation(model, tokens):
    nlls, n = [], len(tokens) // 16
    for i in range(n):
        part = tokens[None, i * 16 : (i + 1) * 16]
        nlls.append(F.cross_entropy(model(part)[0, :-1], part[0, 1:]) * 16)
    measured = measure(model, tokens, 16)
    assert measured.perplexity == pytest.approx(torch.exp(torch.stack(nlls).sum() / (n * 16)).item(), rel=1e-6)
    assert (measured.windows, measured.scored) == (n, n * 15)


def test_distance_to_a_reference_in_the_same_pass(monkeypatch, model, reference, tokens):
    monkeypatch.setattr(perplexity, "POSITIONS", 4)
    context, stride = 16, 6
    log_q, log_p = (target_by_target(m, tokens, context, stride) for m in (model, reference))
    kl = statistics.fmean((log_p[t].exp() * (log_p[t] - log_q[t])).sum().item() for t in log_p)
    agreement = statistics.fmean(float(log_p[t].argmax() == log_q[t].argmax()) for t in log_p)
    loss = statistics.fmean(-log_p[t][tokens[t]].item() for t in log_p)
    measured = measure(model, tokens, context, stride, reference)
    against = measured.reference
    assert against.kl == pytest.approx(kl, rel=1e-5)
    assert 0 < agreement < 1
    assert against.top1_agreement == agreement
    assert against.loss == pytest.approx(loss, rel=1e-6)
    content = json.loads(json.dumps(measured.to_dict()))
    assert content["reference"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert content["reference"]["perplexity_ratio"] == content["perplexity"] / content["reference"]["perplexity"]
    assert measured.loss == measure(model, tokens, context, stride).loss


def test_a_model_is_at_no_distance_from_itself(model, tokens):
    measured = measure(model, tokens, 16, reference=model)
    assert (measured.reference.kl, measured.reference.kl_standard_error) == (0.0, 0.0)
    assert measured.reference.top1_agreement == 1.0
    assert measured.to_dict()["reference"]["perplexity_ratio"] == 1.0


def test_a_reference_may_rule_tokens_out():
    """0 log 0 = 0: a reference that is sure and right has perplexity 1, and ln V from the uniform model."""
    counting = torch.arange(40) % V

    def sure(ids):
        return torch.full((*ids.shape, V), -math.inf).scatter(2, ((ids + 1) % V)[..., None], 0.0)

    measured = measure(lambda ids: torch.zeros(*ids.shape, V), counting, 8, reference=sure)
    assert measured.perplexity == pytest.approx(V)
    assert measured.reference.perplexity == 1.0
    assert measured.reference.kl == pytest.approx(math.log(V))
    with pytest.raises(ValueError, match=r"window 0 \(tokens 0 to 7\): the KL is inf nats a token"):
        measure(sure, counting, 8, reference=lambda ids: torch.zeros(*ids.shape, V))


def test_standard_errors_are_over_windows(model, reference, tokens):
    measured = measure(model, tokens, 16, reference=reference)
    alone = [measure(model, tokens[i : i + 16], 16, reference=reference) for i in range(0, 96, 16)]
    for error, values in (
        (measured.standard_error, [window.loss for window in alone]),
        (measured.reference.kl_standard_error, [window.reference.kl for window in alone]),
    ):
        assert error == pytest.approx(statistics.stdev(values) / math.sqrt(6))
    assert alone[0].standard_error is None
    assert alone[0].reference.kl_standard_error is None


def test_the_interval_of_the_ratio_is_that_of_paired_differences(model, reference, tokens):
    measured = measure(model, tokens, 16, reference=reference)
    alone = [measure(model, tokens[i : i + 16], 16, reference=reference) for i in range(0, 96, 16)]
    differences = [window.loss - window.reference.loss for window in alone]
    reach = 2.570582 * statistics.stdev(differences) / math.sqrt(6)  # Student's t, 5 degrees of freedom: tables
    ends = [math.exp(statistics.fmean(differences) + side * reach) for side in (-1, 1)]
    content = measured.to_dict()
    assert content["reference"]["perplexity_ratio_interval"] == pytest.approx(ends, rel=1e-3)
    low, high = content["perplexity_interval"]
    assert low * high == pytest.approx(measured.perplexity**2)
    assert content["confidence"] == 0.95
    intervals = {key for part in (content, content["reference"]) for key in part if key.endswith("interval")}
    single = alone[0].to_dict()
    assert all((single | single["reference"])[key] is None for key in intervals)
    assert len(intervals) == 4


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 63, 1000])
def test_students_t_is_that_of_its_density(freedom):
    reach = perplexity.student_t(freedom)
    x = torch.linspace(0, reach, 100_001, dtype=torch.float64)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    inside = 2 * constant * torch.trapezoid((1 + x**2 / freedom) ** (-(freedom + 1) / 2), x).item()
    assert inside == pytest.approx(0.95, abs=2e-4)


@pytest.mark.parametrize("stride", [64, 24])  # with 24 the first window scores more targets than the others
def test_intervals_hold_the_truth_as_often_as_they_say(stride):
    """Synthetic texts of few windows, whose tokens share what their window has: easy or hard, and hard for both models.
    An interval from the spread of single tokens, as if they were independent, would hold the truth half as often."""
    repeats, windows = 1000, Windows(64 + 11 * stride, 64, stride)
    counts = torch.tensor([windows.scored(i) for i in range(len(windows))], dtype=torch.float64)
    draw = torch.Generator().manual_seed(4)

    def noise(deviation):  # of each window's sum: shared by its targets, and of each target
        shape = (repeats, len(windows))
        shared, own = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
        return deviation * (0.5 * shared * counts + own * counts.sqrt())

    hard = noise(1.0)
    reference = 3.0 * counts + hard
    loss = 3.2 * counts + hard + noise(0.1)
    kl = 0.3 * counts + noise(0.1)
    rate = 0.8 + 0.05 * torch.randn(repeats, len(windows), generator=draw, dtype=torch.float64)
    agreed = torch.binomial(counts.expand_as(rate), rate.clamp(0, 1), generator=draw)
    truths = {"perplexity": math.exp(3.2), "perplexity_ratio": math.exp(0.2), "kl": 0.3, "top1_agreement": 0.8}
    held, ratio_width, alone_width = dict.fromkeys(truths, 0), 0.0, 0.0
    for rows in zip(loss.tolist(), reference.tolist(), kl.tolist(), agreed.int().tolist(), strict=True):
        content = perplexity.summarize(windows, [perplexity.Sums(*row) for row in zip(*rows, strict=True)]).to_dict()
        content |= content["reference"] | {"perplexity": content["perplexity"]}
        ratio_width += math.log(content["perplexity_ratio_interval"][1] / content["perplexity_ratio_interval"][0])
        alone_width += math.log(content["perplexity_interval"][1] / content["perplexity_interval"][0])
        for name, truth in truths.items():
            low, high = content[f"{name}_interval"]
            held[name] += low <= truth <= high
    # 95% of 1000, give or take three standard errors (0.7% each); a ratio estimator of 12 windows is a little short
    assert all(0.92 * repeats <= count <= 0.971 * repeats for count in held.values()), held
    assert ratio_width < 0.15 * alone_width  # pairing takes out what is hard for both


def test_low_precision_logits_are_scored_in_float32(model, tokens):
    low = measure(lambda ids: model(ids).bfloat16(), tokens, 16)
    assert low.loss == measure(lambda ids: model(ids).bfloat16().double(), tokens, 16).loss
    assert low.loss != measure(model, tokens, 16).loss


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= result.nbytes:
            self.elements = max(self.elements, result.numel())
        return result


def test_scoring_holds_a_few_positions_at_a_time(tokens):
    """Beyond the models' own logits, no tensor is larger than POSITIONS x V."""
    windows, logits = Windows(96, 96), torch.randn(1, 1, V).expand(1, 96, V)
    with Largest() as largest:
        score(lambda ids: logits, tokens, windows, 0, lambda ids: logits)
    assert largest.elements == perplexity.POSITIONS * V


@pytest.mark.parametrize(
    ("length", "context", "stride", "message"),
    [
        (50, 1, None, "context must be at least 2 tokens, .* got 1"),
        (50, 16, 0, r"stride must be in 1..context, .* got 0 with context 16"),
        (50, 16, 17, "got 17 with context 16"),
        (15, 16, None, "one window of context 16 needs as many tokens, got 15; give more text or a smaller context"),
        (0, 16, None, "got 0"),
    ],
)
def test_windows_without_a_meaning_are_refused(model, tokens, length, context, stride, message):
    with pytest.raises(ValueError, match=message):
        measure(model, tokens[:length], context, stride)


def test_models_that_cannot_be_scored_are_named(small_gpt, model, reference, tokens):
    with pytest.raises(ValueError, match=r"the model must return logits \[1, 16, vocabulary\] .* got tuple"):
        measure(lambda ids: (model(ids),), tokens, 16)
    with pytest.raises(ValueError, match=r"the reference model must return logits .* got \[16, 37\]"):
        measure(model, tokens, 16, reference=lambda ids: reference(ids)[0])
    with pytest.raises(ValueError, match=r"the reference model has a vocabulary of 50 tokens and the model one of 37"):
        measure(model, tokens, 16, reference=small_gpt(1, 50))

    def breaks(ids):
        return model(ids) * (math.nan if torch.equal(ids[0], tokens[32:48]) else 1)

    with pytest.raises(ValueError, match=r"window 2 \(tokens 32 to 47\): the loss is nan nats a token; the logits"):
        measure(breaks, tokens, 16)
    with pytest.raises(ValueError, match="the loss of the reference model is nan"):
        measure(model, tokens, 16, reference=breaks)
    with pytest.raises(ValueError, match=r"the loss is [\d.e+]+ nats a token"):  # a perplexity beyond any float
        measure(lambda ids: model(ids) * 1e6, tokens, 16)
