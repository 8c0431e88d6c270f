"""What no command can do: one line that says why, and nothing left behind."""

import argparse
import json
import shutil

import pytest
import safetensors
import safetensors.torch
from command import WORDS, failure, save_hf, transformers

from potqat.cli import VERBS
from potqat.flows import sources

USAGE = [  # arguments, part of the message; exit 2
    ("generate {gpt2} --prompt=", "--prompt is empty"),
    ("generate {gpt2} --prompt=x --max-new-tokens=0", "--max-new-tokens must be at least 1, got 0"),
    ("generate {gpt2} --prompt=x --temperature=-1", "--temperature must be 0, or from 0.01 to 100, got -1.0"),
    ("generate {gpt2} --prompt=x --temperature=nan", "--temperature must be 0, or from 0.01 to 100, got nan"),
    ("generate {gpt2} --prompt=x --temperature=1e-300", "--temperature must be 0, or from 0.01 to 100, got 1e-300"),
    ("generate {gpt2} --prompt=x --temperature=1 --top-k=0", "--top-k must be at least 1"),
    ("generate {gpt2} --prompt=x --top-k=5", "goes with a --temperature above 0, got 5 with temperature 0.0"),
    ("generate {gpt2} --prompt=x --seed=-1", "--seed must be in 0..9223372036854775807, got -1"),
    ("generate {gpt2} --prompt=x --threads=0", "--threads must be at least 1, got 0"),
    ("generate {gpt2} --prompt=x --threads=99999", "the CPUs of this machine, got 99999"),
    ("eval {gpt2}", "nothing to measure: give --text FILE, --lm-eval TASKS, or both"),
    ("eval {gpt2} --lm-eval=wikitext --tokens=5", "--context, --stride and --out go with --text FILE"),
    ("eval {gpt2} --lm-eval=wikitext --context=0", "--context, --stride and --out go with --text FILE"),
    ("eval {gpt2} --text={text} --limit=3", "--lm-eval-path and --limit go with --lm-eval TASKS"),
    ("quantize {gpt2} --out={bad}", "exists and is not an empty folder; name a new one"),
    ("quantize {gpt2} --out={bad}/file.bin", "exists and is not an empty folder; name a new one"),
    ("quantize {gpt2} --out={new} --granularity=33", "granularity must be 'tensor', 'channel' or a group size"),
    ("quantize {gpt2} --out={new} --override=*.mlp.*", "--override must be NAME:FIELD=VALUE,...; got '*.mlp.*'"),
    ("quantize {gpt2} --out={new} --override=a:grid=x", "grid must be one of pot4, e2m1, int4, int8"),
    ("quantize {gpt2} --out={new} --override=a:depth=3", "overrides['a']: unknown key 'depth'"),
    ("quantize {gpt2} --out={new} --override=a:scale=learned", "scale must be one of absmax, mse, output here, got"),
    ("quantize {gpt2} --out={new} --override=a:grid=e2m1 --override=a:grid=int4", "--override a: given twice"),
    ("quantize {gpt2} --out={new} --rounding=gptq", "--rounding gptq needs --calibration"),
    ("quantize {gpt2} --out={new} --scale=output", "--scale output needs --calibration"),
    (
        "quantize {gpt2} --out={new} --calibration-tokens=9",
        "--calibration-tokens goes with --calibration and must",
    ),
    ("quantize {gpt2} --out={new} --calibration={text} --calibration-tokens=0", "must be at least 1, got 0"),
    (
        "quantize {gpt2} --out={new} --calibration --generated-tokens=64",
        "--generated-tokens goes with --calibration FILE",
    ),
    (
        "quantize {gpt2} --out={new} --calibration={text} --generated-tokens=0",
        "must be at least 1, got 0; without FILE",
    ),
    ("quantize {gpt2} --out={new} --calibration-seed=1", "--calibration-seed goes with --calibration and must be"),
    ("quantize {gpt2} --out={new} --calibration={text} --calibration-seed=-1", "must be at least 0, got -1"),
    ("inspect {packed} --plot=a.jpg", "--plot writes PNG: name a file that ends in .png, got a.jpg"),
]

BEFORE = [  # exit 1, and no weight was read
    ("quantize  --out={new}", "MODEL is empty: no such file or folder"),
    ("quantize {bad}/absent --out={new}", "bad/absent: no such file or folder"),
    ("quantize absent.gguf --out={new}", "absent.gguf: no such file or folder"),
    ("quantize absent/ --out={new}", "absent/: no such file or folder"),
    ("quantize {bad}/nothing --out={new}", "bad/nothing: a folder without config.json; name a GGUF file or"),
    ("quantize {bad}/file.bin --out={new}", "file.bin: neither a .gguf file nor a nanoGPT checkpoint (.pt)"),
    ("quantize {bad}/no.pt --out={new}", "no.pt: not a PyTorch checkpoint of plain tensors"),
    ("quantize {bad}/bert --out={new}", "bad/bert: no causal language model (bert: BertForMaskedLM)"),
    ("generate {bad}/t5 --prompt=x", "bad/t5: no causal language model (t5: T5ForConditionalGeneration)"),
    ("eval {bad}/unknown --text={text}", "bad/unknown: transformers does not take it: "),
    ("quantize {bad}/gptq --out={new}", "bad/gptq: already quantized, by 'gptq', which potqat does not read; name the"),
    ("generate {bad}/gptq --prompt=x", "bad/gptq: already quantized, by 'gptq'"),
    ("eval {gpt2} --text={text} --reference={bad}/gptq", "bad/gptq: already quantized, by 'gptq'"),
    ("inspect {bad}/gptq", "bad/gptq: already quantized, by 'gptq'"),
    ("quantize {packed} --out={new}", "already quantized; name the float model that it came from"),
    ("quantize {gpt2} --out={new} --skip=lm_tail", "pattern 'lm_tail' matches no quantizable module; they are: "),
    ("quantize {gpt2} --out={new} --skip=*", "nothing to quantize in GPT2LMHeadModel"),
    ("quantize {gpt2} --out={new} --override=*.mlp.*:grid=pot(7)", "pot(7) is for fake-quantization only"),
    ("quantize {gpt2} --out={bad}/file.bin/new", "file.bin/new: cannot make this folder: Not a directory; name"),
    ("quantize {gpt2} --out={new} --tokenizer={bad}/absent.txt", "absent.txt: cannot read the text: No such file"),
    ("quantize {nanogpt} --out={new} --tokenizer={gpt2}", "has 300 tokens, and "),
    ("quantize {bad}/tokens --out={new}", "bad/tokens: "),
    (
        "quantize {gpt2} --out={new} --calibration={bad}/latin.txt",
        "latin.txt: not UTF-8 text (byte 3 is 0xe9); convert",
    ),
    (
        "quantize {gpt2} --out={new} --calibration={bad}/short.txt",
        "short.txt: the text has 2 tokens, and 1 calibration",
    ),
    ("quantize {gpt2} --out={new} --calibration={text} --calibration-tokens=99999", " 1563 calibration windows of 64"),
    ("quantize {mute} --out={new} --calibration={text}", "mute: no tokenizer beside the model to read the"),
    ("quantize {nanogpt} --out={new} --calibration={bad}/other.txt --tokenizer={text}", "the tokenizer cannot read it"),
    (
        "quantize {gpt2} --out={new} --calibration={text} --scale=mse --rounding=log",
        "calibration is given, and nothing",
    ),
    ("quantize {gpt2} --out={new} --override=c_fc:rounding=gptq", "c_fc: rounding='gptq' needs calibration data; pass"),
    ("generate {mute} --prompt=x", "mute: no tokenizer beside the model; name one with --tokenizer"),
    ("eval {mute} --text={text}", "mute: no tokenizer beside the model; name one with --tokenizer"),
    ("generate {mute} --prompt=x --tokenizer={mute}", "mute: holds no tokenizer; name another"),
    ("generate {mute} --prompt=x --tokenizer={bad}/absent", "absent': no such folder; name a folder, a hub model or a"),
    ("generate {mute} --prompt=x --tokenizer=", "the tokenizer '': no such folder"),
    ("generate {packed} --prompt={text_itself}", " tokens and the model takes 64; shorten it"),
    ("generate {packed_nanogpt} --prompt=größer", "the tokenizer cannot read the prompt ("),
    ("generate {packed_nanogpt} --prompt=number --tokenizer={gpt2}", ", the model knows "),
    ("eval {packed} --text={bad}/empty.txt", "empty.txt: the file is empty; give a text file in UTF-8"),
    ("eval {packed} --text={bad}/latin.txt", "latin.txt: not UTF-8 text (byte 3 is 0xe9); convert it to UTF-8 first"),
    ("eval {packed} --text={bad}/absent.txt", "absent.txt: cannot read the text: No such file or directory"),
    ("eval {packed} --text={bad}/short.txt", "short.txt: one window of context 64 needs as many tokens, got "),
    ("eval {packed} --text={text} --context=65", "context 65 is more than the 64 tokens this model takes"),
    ("eval {packed} --text={text} --context=0", "words.txt: context must be at least 2 tokens"),
    ("eval {packed} --text={text} --stride=0", "words.txt: stride must be in 1..context"),
    ("eval {packed} --text={text} --tokens=0", "tokens must be at least 1, got 0"),
    ("eval {packed} --text={text} --tokens=99999", " tokens and 99999 are asked for; ask for fewer or for all"),
    ("eval {packed} --text={text} --out={bad}", "cannot write the result there; give a file in a folder"),
    ("eval {packed} --text={text} --out={bad}/file.bin/a.json", "a.json: cannot write the result there"),
    ("eval {packed} --text={text} --reference={nanogpt}", "the reference model has a vocabulary of "),
    ("eval {packed} --text={text} --reference={bad}/absent", "bad/absent: no such file or folder"),
    ("eval {packed_nanogpt} --text={bad}/other.txt", "other.txt: the tokenizer cannot read it: "),
    ("eval {packed_nanogpt} --text={text} --tokenizer={gpt2}", "words.txt: has token "),
    ("eval {packed_nanogpt} --lm-eval=wikitext", "lm-eval takes Hugging Face models, and this is a nanoGPT"),
    ("eval {packed} --lm-eval=", "no lm-eval task given"),
    ("eval {packed} --lm-eval=wikitext --limit=0", "limit must be at least 1 document a task, got 0"),
    ("eval {packed} --lm-eval=wikitext --lm-eval-path={bad}/absent", "absent: no folder with lm-eval task files"),
    ("inspect {bad}/absent", "bad/absent: no such folder; name one that potqat quantize wrote"),
    ("inspect {nanogpt}", "ckpt.pt: a file; name the folder that potqat quantize wrote"),
    ("inspect {gpt2}", "gpt2: a float model; quantize it first: potqat quantize "),
]

DURING = [  # exit 1, found in the weights themselves
    ("quantize {bad}/more --out={new}", "12 of the weights that config.json asks for are missing, as transformer.h.2."),
    ("generate {bad}/more --prompt=x", "12 of the weights that config.json asks for are missing"),
    ("quantize {bad}/wide --out={new}", "28 of the weights that config.json asks for are of another shape, as "),
    ("quantize {bad}/cut --out={new}", "bad/cut: cannot be read, it may be damaged (SafetensorError: "),
    ("eval {gpt2} --text={text} --reference={bad}/cut", "bad/cut: cannot be read, it may be damaged"),
    ("quantize {bad}/gone --out={new}", "bad/gone: "),
    ("quantize {bad}/nan --out={new}", "transformer.h.1.mlp.c_fc: "),
    ("generate {bad}/packed cut --prompt=x", "packed cut/model.safetensors: "),
    ("inspect {bad}/packed cut", "packed cut/model.safetensors: "),
]


@pytest.fixture(scope="module")
def bad(at, tokenizer):
    """What nobody should give to a command, by name."""
    root = at.root / "bad"
    root.mkdir()
    for name, content in (("empty.txt", b""), ("latin.txt", b"caf\xe9 " * 200), ("short.txt", b"hi"),
                          ("other.txt", "größer".encode() * 200), ("file.bin", b"x"), ("no.gguf", b"GGUF nothing"),
                          ("no.pt", b"nothing")):  # fmt: skip
        (root / name).write_bytes(content)
    configs = {
        "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "unknown": {"model_type": "frobnicate"},
        "gptq": {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "nothing": None,
    }
    for name, config in configs.items():
        (root / name).mkdir()
        if config is not None:
            (root / name / "config.json").write_text(json.dumps(config))
    for name, change in (("more", {"n_layer": 3}), ("wide", {"n_embd": 128}), ("cut", {}), ("gone", {}), ("nan", {})):
        shutil.copytree(at.gpt2, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | change))
    (root / "gone" / "model.safetensors").unlink()
    (root / "cut" / "model.safetensors").write_bytes((at.gpt2 / "model.safetensors").read_bytes()[:100_000])
    weights = safetensors.torch.load_file(at.gpt2 / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    safetensors.torch.save_file(weights, root / "nan" / "model.safetensors", {"format": "pt"})
    shutil.copytree(at.gpt2, root / "tokens")
    (root / "tokens" / "tokenizer.json").write_text("{")
    shutil.copytree(at.packed["gpt2"], root / "packed cut")
    (root / "packed cut" / "model.safetensors").write_bytes(b"x" * 10)
    return root


@pytest.fixture
def words(at, bad, tmp_path):
    """A row's arguments as a list; spaces in a path are not separators."""
    places = {"bad": bad, "new": tmp_path / "new", "packed": at.packed["gpt2"], "packed_nanogpt": at.packed["nanogpt"]}
    places |= {name: getattr(at, name) for name in ("gpt2", "nanogpt", "mute", "text")} | {"text_itself": WORDS}

    def split(line):
        return [word.format(**places) for word in line.replace("packed cut", "packed\0cut").split(" ")]

    return lambda line: [word.replace("\0", " ") for word in split(line)]


@pytest.mark.parametrize(("line", "message"), USAGE)
def test_arguments_without_a_meaning_exit_2(words, line, message, tmp_path):
    (said,) = failure(2, *words(line))
    assert message in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "message"), BEFORE)
def test_what_cannot_work_is_refused_before_a_weight_is_read(words, line, message, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sources, "load", never)
    (said,) = failure(1, *words(line))
    assert message in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "message"), DURING)
def test_damaged_weights_are_one_line_and_leave_nothing(words, line, message, tmp_path):
    lines = failure(1, *words(line))
    assert message in lines[-1]
    assert len(lines) == 1 + line.startswith("quantize")  # the estimate comes first
    assert not list(tmp_path.iterdir())


def test_gguf_files_that_are_none(bad, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (line,) = failure(1, "quantize", bad / "no.gguf", "--out", tmp_path / "new")
    assert f"{bad}/no.gguf: " in line


def test_code_that_came_with_a_model_is_never_run_or_asked_about(at, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["Custom"]})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    (line,) = failure(1, "generate", tmp_path, "--prompt", "x")
    assert f"{tmp_path}: transformers does not take it: " in line


def test_a_packed_model_that_does_not_run_is_not_written(tmp_path):
    """Mamba's blocks multiply with a Linear's weight by themselves."""
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, bos_token_id=0)
    save_hf(config, tmp_path / "mamba")
    line = failure(1, "quantize", tmp_path / "mamba", "--out", tmp_path / "new")[-1]
    assert "mamba: packed it does not run (" in line
    assert "has no attribute 'weight'); name with --skip what its code reads by itself" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mamba"]


@pytest.mark.parametrize("module", VERBS)
def test_help_says_every_default(module):
    """Of an option with a value: what happens without it."""
    verbs = argparse.ArgumentParser().add_subparsers()
    module.add(verbs)
    for verb, parser in verbs.choices.items():
        assert f"example: potqat {verb}" in parser.format_help()
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and not action.required:
                assert "(default: " in action.help, (verb, action.option_strings)
