"""Evaluation on a text: windows of it, exact resuming, packed models, and lm-eval's tasks."""

import functools
import hashlib
import importlib.util
import json
import math
import sys

import pytest
import torch

import potqat
from potqat.flows import evaluate
from potqat.flows.evaluate import evaluate_text, measure, plan_text
from potqat.flows.harness import plan_lm_eval, run_lm_eval

CONTENT = "".join(f"The number {i} times {i} is {i * i}, and naïve Ελλάδα says {i % 7}.\n" for i in range(60))


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
def text_model(small_gpt):
    return small_gpt(5, 300)


@pytest.fixture(scope="module")
def text_reference(small_gpt):
    return small_gpt(6, 300)


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
