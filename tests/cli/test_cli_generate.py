"""potqat generate: text as it is made, and where it ends."""

import io
import json
import shutil
import signal

import pytest
import torch
from command import CONTEXT, KINDS, good, named_tokenizer, run, transformers

from potqat.flows import continuation


class Pieces(io.StringIO):
    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_streams_what_json_returns(at, kind, packed):
    model, named = (at.packed[kind], []) if packed else (getattr(at, kind), named_tokenizer(kind, at))
    command = ["generate", model, "--prompt", "The number", "--max-new-tokens", 20, *named]
    sampled = [*command, "--temperature", 1, "--seed", 5]
    stream = Pieces()
    status, out, err = run(*sampled, stdout=stream)
    result = json.loads(good(*sampled, "--json")[0])
    assert status == 0
    assert out == result["text"] + "\n"
    assert out.startswith("The number")
    assert len([piece for piece in stream.pieces if piece]) > 10  # token by token
    assert err.startswith(f"{result['new_tokens']} tokens; prefill ")
    assert err.endswith("tokens/s, threads: 1\n")
    assert result["stopped_by"] == "max_new_tokens" if result["new_tokens"] == 20 else "end"
    assert result.keys() == {
        "text", "prompt_tokens", "new_tokens", "stopped_by", "prefill_tokens_per_second", "decode_tokens_per_second"
    }  # fmt: skip
    texts = [json.loads(good(*command, "--json", *more)[0])["text"] for more in ([], ["--temperature", 1, "--seed", 6],
             ["--temperature", 1, "--seed", 6], ["--temperature", 1, "--top-k", 1])]  # fmt: skip
    assert texts[1] == texts[2] != result["text"]
    assert texts[3] == texts[0]  # of one candidate nothing is left to chance


def test_spaces_after_a_line_end_are_streamed(tokenizer):
    """Llama's kind of tokenizer has tokens that carry the space before them, a byte-level one has half characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "for x in y:\n    if größer:\n  😀 é\n"
    spaced = Tokenizer(models.BPE())
    spaced.pre_tokenizer, spaced.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spaced.train_from_iterator([text], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    for made in (transformers.PreTrainedTokenizerFast(tokenizer_object=spaced), tokenizer):
        ids = made(text).input_ids
        assert continuation.decode(made, ids) == text
        for cut in range(1, len(ids)):
            out = Pieces()
            printer = continuation._Stream(made, out)
            printer.put(torch.tensor([ids[:cut]]))
            for token in ids[cut:]:
                printer.put(torch.tensor([token]))
            printer.end()
            assert out.getvalue() == text + "\n"
            assert "\ufffd" not in "".join(out.pieces)


def test_a_hugging_face_model_stops_where_its_context_ends(at):
    out, err = good("generate", at.packed["llama"], "--prompt", "The number", "--max-new-tokens", 500,
                    "--temperature", 1, "--seed", 1, "--json")  # fmt: skip
    result = json.loads(out)
    assert result["stopped_by"] in ("context", "end")
    assert result["prompt_tokens"] + result["new_tokens"] <= CONTEXT
    out, err = good("generate", at.packed["gpt2"], "--prompt", "The number", "--max-new-tokens", 500)
    assert "(the model takes 64); prefill" in err
    result = json.loads(good("generate", at.packed["nanogpt"], "--prompt", "The", "--max-new-tokens", 99, "--json")[0])
    assert (result["new_tokens"], result["stopped_by"]) == (99, "max_new_tokens")  # it forgets the first ones


def test_sampling_settings_that_came_with_a_model_do_not_count(at, tmp_path):
    """The command line says how to sample; a top_p of nearly nothing would make it greedy."""
    shutil.copytree(at.packed["llama"], tmp_path / "model")
    config = tmp_path / "model" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_sample": True, "top_p": 1e-6}))
    command = ["--prompt", "The number", "--temperature", 1, "--json"]
    texts = [json.loads(good("generate", model, *command)[0])["text"] for model in (config.parent, at.packed["llama"])]
    assert texts[0] == texts[1]


def test_a_stopped_generation_ends_its_line(at, monkeypatch):
    decode, calls = transformers.PreTrainedTokenizerFast.decode, []

    def interrupted(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return decode(self, *arguments, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "decode", interrupted)
    status, out, err = run("generate", at.packed["nanogpt"], "--prompt", "The number")
    assert (status, err) == (130, "potqat: stopped\n")
    assert out.startswith("The")
    assert out.endswith("\n")
