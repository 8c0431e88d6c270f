"""Evaluation on a text: what perplexity means, the distance to a reference, exact resuming, and lm-eval's tasks."""

import functools
import hashlib
import importlib.util
import json
import math
import statistics
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import potqat
from potqat import perplexity
from potqat.flows import evaluate
from potqat.flows.evaluate import evaluate_text, measure, plan_text
from potqat.flows.harness import plan_lm_eval, run_lm_eval
from potqat.models.gpt import GPT, GPTConfig
from potqat.perplexity import Windows, score

V = 37
CONTENT = "".join(f"The number {i} times {i} is {i * i}, and naïve Ελλάδα says {i % 7}.\n" for i in range(60))


def small_model(seed, vocab=V):
    """A GPT in float64 whose float32 rounding is far below what is compared, with logits of a few units."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab, block_size=128, n_layer=1, n_head=2, n_embd=16)).double().eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab, 16, dtype=torch.float64))  # not tied: no mere echo
    return model


@pytest.fixture(scope="module")
def model():
    return small_model(1)


@pytest.fixture(scope="module")
def reference():
    return small_model(2)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(V, (101,), generator=torch.Generator().manual_seed(3))


# ---- The definition -----------------------------------------------------------------------------------------


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


def test_models_that_cannot_be_scored_are_named(model, reference, tokens):
    with pytest.raises(ValueError, match=r"the model must return logits \[1, 16, vocabulary\] .* got tuple"):
        measure(lambda ids: (model(ids),), tokens, 16)
    with pytest.raises(ValueError, match=r"the reference model must return logits .* got \[16, 37\]"):
        measure(model, tokens, 16, reference=lambda ids: reference(ids)[0])
    with pytest.raises(ValueError, match=r"the reference model has a vocabulary of 50 tokens and the model one of 37"):
        measure(model, tokens, 16, reference=small_model(1, vocab=50))

    def breaks(ids):
        return model(ids) * (math.nan if torch.equal(ids[0], tokens[32:48]) else 1)

    with pytest.raises(ValueError, match=r"window 2 \(tokens 32 to 47\): the loss is nan nats a token; the logits"):
        measure(breaks, tokens, 16)
    with pytest.raises(ValueError, match="the loss of the reference model is nan"):
        measure(model, tokens, 16, reference=breaks)
    with pytest.raises(ValueError, match=r"the loss is [\d.e+]+ nats a token"):  # a perplexity beyond any float
        measure(lambda ids: model(ids) * 1e6, tokens, 16)


# ---- A text -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer that would add a start token and warn about texts longer than 16 tokens."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([CONTENT], vocab_size=300, special_tokens=["<s>"], show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>", model_max_length=16
    )
    return made


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(CONTENT.replace("\n", "\r\n").encode())
    return path


@pytest.fixture(scope="module")
def text_model():
    return small_model(5, vocab=300)


@pytest.fixture(scope="module")
def text_reference():
    return small_model(6, vocab=300)


def test_a_text_is_tokenized_whole_and_the_protocol_is_named(tokenizer, text, text_model, capfd, caplog):
    importlib.import_module("transformers").logging.set_verbosity_warning()  # the command line sets another
    plan = plan_text(text, tokenizer, model="small", max_context=32)
    raw = text.read_bytes().decode()
    assert "".join(tokenizer.decode([token]) for token in plan.tokens.tolist()) == raw
    assert plan.tokens.tolist() == tokenizer.backend_tokenizer.encode(raw, add_special_tokens=False).ids
    result = evaluate_text(plan, text_model)
    assert not any(capfd.readouterr())
    assert not caplog.text
    tokenizer(raw)
    assert "longer than the specified maximum" in caplog.text  # what must not reach the user above
    assert json.loads(json.dumps(result)) == result
    assert result["text"] == {
        "file": "words.txt",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens": len(plan.tokens),
    }
    measured = measure(text_model, plan.tokens, 32)
    assert result.items() >= measured.to_dict().items()
    assert (result["tokens"], result["context"], result["stride"]) == (len(plan.tokens), 32, 32)
    assert (result["model"], result["reference_model"]) == ("small", None)


def test_the_first_tokens_of_a_text(tokenizer, text, text_model):
    whole = plan_text(text, tokenizer, model="small", max_context=32)
    plan = plan_text(text, tokenizer, model="small", max_context=32, context=20, stride=8, tokens=90)
    assert torch.equal(plan.tokens, whole.tokens[:90])
    result = evaluate_text(plan, text_model)
    assert result["loss"] == measure(text_model, whole.tokens[:90], 20, 8).loss
    assert (result["tokens"], result["context"], result["stride"]) == (90, 20, 8)
    assert result["text"]["tokens"] == len(whole.tokens)


def test_the_default_context_is_2048_or_what_the_model_takes(tokenizer, text):
    text.write_text(CONTENT * 3)
    contexts = [plan_text(text, tokenizer, model="m", max_context=n).windows.context for n in (32, 2048, 8192)]
    assert contexts == [32, 2048, 2048]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context": 33}, ValueError, "context 33 is more than the 32 tokens this model takes"),
        ({"context": 1}, ValueError, "words.txt: context must be at least 2"),
        ({"stride": 0}, ValueError, "words.txt: stride must be in 1..context"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"tokens": 31}, ValueError, "words.txt: one window of context 32 needs as many tokens, got 31"),
        ({"tokens": 10**6}, ValueError, r"words.txt: the text has \d+ tokens and 1000000 are asked for"),
        ({"out": "no/such/result.json"}, PermissionError, "no/such/result.json: cannot write the result there"),
        ({"out": "/"}, PermissionError, "/: cannot write the result there; give a file"),
        ({"path": "absent.txt"}, FileNotFoundError, "absent.txt: cannot read the text"),
    ],
)
def test_requests_that_cannot_work_are_refused_before_a_model_is_needed(tokenizer, text, change, error, message):
    with pytest.raises(error, match=message):
        plan_text(**({"path": text, "tokenizer": tokenizer, "model": "m", "max_context": 32} | change))


def test_a_plan_is_run_with_the_models_it_names(tokenizer, text, text_model):
    plan = plan_text(text, tokenizer, model="small", max_context=32)
    with pytest.raises(ValueError, match="the plan names the reference None"):
        evaluate_text(plan, text_model, text_model)


# ---- Stopping and resuming ----------------------------------------------------------------------------------


class Stops:
    """A model during whose call number ``at`` the user presses Ctrl-C."""

    def __init__(self, model, at):
        self.model, self.at, self.calls = model, at, 0

    def __call__(self, ids):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.model(ids)


@pytest.mark.parametrize("stride", [32, 7])
def test_stopped_and_resumed_is_one_go_to_the_last_bit(tokenizer, text, text_model, text_reference, tmp_path, stride):
    out, partial = tmp_path / "result.json", tmp_path / "result.json.partial"

    def plan(out):
        return plan_text(
            text, tokenizer, model="a", reference="b", max_context=32, stride=stride, tokens=900, out=out
        )  # fmt: skip

    once = evaluate_text(plan(tmp_path / "once.json"), text_model, text_reference)
    done = 0
    for at in (4, 1, 3):  # the second stop comes before any progress
        with pytest.raises(KeyboardInterrupt, match=rf"stopped after {done + at - 1} of \d+ windows, .*go on"):
            evaluate_text(plan(out), Stops(text_model, at), text_reference)
        done += at - 1
        assert len(json.loads(partial.read_text())["sums"]) == done
        assert not out.exists()
    with pytest.raises(KeyboardInterrupt):  # between the two models of a window
        evaluate_text(plan(out), text_model, Stops(text_reference, 2))
    last = Stops(text_model, None)
    again = evaluate_text(plan(out), last, text_reference)
    assert last.calls == once["windows"] - done - 1
    assert again == once
    assert json.loads(out.read_text()) == once == json.loads((tmp_path / "once.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once.json", "result.json", "words.txt"]


def test_progress_is_kept_from_time_to_time(monkeypatch, tokenizer, text, text_model, tmp_path):
    """After a hard kill the last saved sums count."""
    monkeypatch.setattr(evaluate, "SAVE_EVERY_SECONDS", 0.0)
    plan = plan_text(text, tokenizer, model="a", max_context=32, tokens=200, out=tmp_path / "result.json")
    seen = []

    def watches(ids):
        partial = plan.partial()
        seen.append(len(partial.load()) if partial.path.exists() else None)
        return text_model(ids)

    evaluate_text(plan, watches)
    assert seen == [None, 1, 2, 3, 4, 5]


def test_an_error_in_a_model_keeps_what_was_done(tokenizer, text, text_model, tmp_path):
    plan = plan_text(text, tokenizer, model="a", max_context=32, out=tmp_path / "result.json")
    calls = iter([text_model, text_model, lambda ids: text_model(ids) * math.nan])
    with pytest.raises(ValueError, match=r"window 2 .* nan"):
        evaluate_text(plan, lambda ids: next(calls)(ids))
    assert len(plan.partial().load()) == 2


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"context": 16}, ["context is 32 there and 16 here", "stride is 32 there and 16 here"]),
        ({"stride": 8}, ["stride is 32 there and 8 here"]),
        ({"tokens": 320}, ["tokens is 400 there and 320 here", "token_ids_sha256 is"]),
        ({"model": "other"}, ["model is 'small' there and 'other' here"]),
        ({"reference": "float"}, ["reference is None there and 'float' here"]),
        ("text", ["text_sha256 is '"]),
        ("threads", ["threads is 1 there and 2 here"]),
    ],
)
def test_another_evaluation_does_not_go_on_from_there(
    tokenizer, text, text_model, tmp_path, one_thread, change, differs
):
    torch.set_num_threads(1)
    settings = {"model": "small", "max_context": 32, "tokens": 400, "out": tmp_path / "result.json"}
    plan = plan_text(text, tokenizer, **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluate_text(plan, Stops(text_model, 3))
    before = plan.partial().path.read_bytes()
    if change == "text":
        text.write_text(CONTENT + "more")
    elif change == "threads":
        torch.set_num_threads(2)
    else:
        settings |= change
    with pytest.raises(ValueError, match=r"result.json.partial: holds an unfinished evaluation with other") as caught:
        plan_text(text, tokenizer, **settings)
    for part in differs:
        assert part in str(caught.value)
    assert ("token_ids_sha256" in str(caught.value)) == (change == "text" or "tokens" in change)
    assert plan.partial().path.read_bytes() == before


def test_a_damaged_partial_file_is_named(tokenizer, text, tmp_path):
    path = tmp_path / "result.json.partial"
    for content in ("", "{", "[]", "{}", '{"settings": {}}', '{"settings": {}, "sums": [[]]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"result.json.partial: cannot read this unfinished .*delete it"):
            plan_text(text, tokenizer, model="a", max_context=32, out=tmp_path / "result.json")


# ---- Packed models and lm-eval ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tokenizer):
    """(packed, float) Llama of Hugging Face, tiny."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    original = transformers.LlamaForCausalLM(config).eval()
    quantized = transformers.LlamaForCausalLM(config).eval()
    quantized.load_state_dict(original.state_dict())
    potqat.quantize_(quantized, potqat.PoTConfig())
    return quantized, original


def test_a_packed_hugging_face_model_against_its_float_weights(packed, tokenizer, text):
    quantized, original = (lambda ids, m=m: m(ids, use_cache=False).logits for m in packed)
    plan = plan_text(text, tokenizer, model="packed", reference="float", max_context=64, tokens=640)
    result = evaluate_text(plan, quantized, original)
    assert result == evaluate_text(plan, quantized, original)
    assert result["reference"]["perplexity"] == measure(original, plan.tokens, 64).perplexity
    assert 0 < result["reference"]["kl"] < 10 * result["loss"]
    assert 0 < result["reference"]["top1_agreement"] < 1


def test_lm_eval_missing_is_said_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed, .*; run: pip install 'potqat\[eval\]'"):
        plan_lm_eval(["wikitext"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: potqat[eval]")
def test_lm_eval_tasks_on_a_packed_model(monkeypatch, packed, tokenizer, tmp_path):
    """lm-eval's accuracy is that of log-likelihoods of our own."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))  # reads its files for 10 s each time
    questions = [(f"The number {i} times", (" is", f" {i}", "two and"), i % 3) for i in range(12)]
    rows = [{"question": q, "choices": [c.strip() for c in cs], "answer": a} for q, cs, a in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "numbers.yaml").write_text(
        "task: potqat_numbers\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        "doc_to_target: answer\n"
        "doc_to_choice: choices\n"
        "metric_list: [{metric: acc}]\n"
    )
    quantized, _ = packed

    def likelihood(question, choice):
        context = tokenizer(question, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = quantized(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return sum(log_p[t - 1, ids[t]].item() for t in range(len(context), len(ids)))

    right = 0
    for row in rows:
        scores = [likelihood(row["question"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    with pytest.raises(ValueError, match="lm-eval knows no task 'potqat_nothing'; list them with: lm-eval ls tasks"):
        plan_lm_eval(["potqat_numbers", "potqat_nothing"], tmp_path)
    result = run_lm_eval(plan_lm_eval(["potqat_numbers"], tmp_path), quantized, tokenizer)
    assert result["results"]["potqat_numbers"]["acc,none"] == right / len(rows)
    assert 0 < right < len(rows)
    assert json.loads(json.dumps(result)) == result
    assert result["n-samples"]["potqat_numbers"]["effective"] == 12
