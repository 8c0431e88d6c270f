"""potqat eval: a packed model beside its float one, on one text and several, stopped and gone on."""

import json
import signal

import pytest
from command import CONTEXT, KINDS, WORDS, failure, good, named_tokenizer

import potqat
from potqat import PoTConfig
from potqat.flows import evaluate, sources


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_measured_as_the_one_in_memory_to_the_last_digit(at, kind):
    source = sources.find(str(getattr(at, kind)))
    model = sources.load(source)
    potqat.quantize_(model, PoTConfig())
    tokenizer = sources.tokenizer_for(sources.find(str(at.packed[kind])), None)
    plan = evaluate.plan_text(at.text, tokenizer, model="in memory", max_context=CONTEXT, tokens=400)
    expected = evaluate.evaluate_text(plan, sources.logits_of(model))
    out, err = good("eval", at.packed[kind], "--text", at.text, "--tokens", 400, "--reference", getattr(at, kind),
                    "--json", "--threads", 1)  # fmt: skip
    result = json.loads(out)
    assert err == ""
    assert (result["loss"], result["scored"]) == (expected["loss"], 6 * 63)
    floats = json.loads(good("eval", getattr(at, kind), "--text", at.text, "--tokens", 400, "--json",
                             *named_tokenizer(kind, at))[0])  # fmt: skip
    assert result["reference"]["loss"] == floats["loss"] != result["loss"]
    assert result["reference"]["kl"] > 0
    shown = good("eval", at.packed[kind], "--text", at.text, "--tokens", 400)[0]
    low, high = result["perplexity_interval"]
    assert low < result["perplexity"] < high
    assert shown.startswith(f"perplexity {result['perplexity']:.4f} (95%: {low:.4f} to {high:.4f}) ")
    assert "on words.txt: first 400 of " in shown
    assert "context 64, stride 64, 378 scored" in shown


def test_a_stopped_evaluation_goes_on(at, tmp_path, monkeypatch):
    command = ["eval", at.packed["llama"], "--text", at.text, "--reference", at.llama]
    once = json.loads(good(*command, "--json")[0])
    logits_of, calls = sources.logits_of, []

    def interrupted(model):
        def logits(ids):
            calls.append(ids)
            if len(calls) == 8:
                signal.raise_signal(signal.SIGINT)
            return logits_of(model)(ids)

        return logits

    monkeypatch.setattr(sources, "logits_of", interrupted)
    (line,) = failure(130, *command, "--out", tmp_path / "result.json")
    assert f"stopped after 3 of {once['windows']} windows, kept in {tmp_path}/result.json.partial; run the same" in line
    again = json.loads(good(*command, "--out", tmp_path / "result.json", "--json")[0])
    assert again == once
    assert len(calls) == 8 + 2 * (once["windows"] - 3)
    assert json.loads((tmp_path / "result.json").read_text()) == once
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_several_texts_are_each_measured_and_a_stop_in_the_second_keeps_the_first(at, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(WORDS[900:2400])
    options = ["--reference", at.llama, "--json"]
    alone = [json.loads(good("eval", at.packed["llama"], "--text", t, *options)[0]) for t in (at.text, other)]
    command = ["eval", at.packed["llama"], "--text", at.text, "--text", other, *options, "--out", tmp_path / "a.json"]
    score, calls = evaluate.score, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == alone[0]["windows"] + 3:
            signal.raise_signal(signal.SIGINT)
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", interrupted)
    (line,) = failure(130, *command)
    assert (
        f"stopped after 2 of {alone[1]['windows']} windows, kept in {tmp_path}/a.json.2.partial; run the same" in line
    )
    assert json.loads(good(*command)[0]) == {"texts": alone}
    assert len(calls) == sum(result["windows"] for result in alone) + 1
    assert json.loads((tmp_path / "a.json").read_text()) == {"texts": alone}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "other.txt"]
    shown = good(*command[: -len(options) - 2], *options[:2])[0].splitlines()
    assert [line.partition(" ")[0] for line in shown] == ["perplexity", "against"] * 2
    low, high = alone[1]["reference"]["perplexity_ratio_interval"]
    assert f"ratio {alone[1]['reference']['perplexity_ratio']:.4f} (95%: {low:.4f} to {high:.4f}), KL " in shown[3]
