"""potqat quantize, generate, eval and inspect on GPT-2, Llama and nanoGPT models, as a new user meets them: what works,
and one line for what cannot."""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import potqat
from potqat import PoTConfig, calibrate
from potqat.cli import VERBS, main
from potqat.flows import calibration_text, continuation, evaluate, sources
from potqat.models.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")

VOCABULARY, CONTEXT = 300, 64
WORDS = "".join(f"The number {i} times {i} is {i * i}, and so it goes on from {i % 7}.\n" for i in range(60))
KINDS = ("gpt2", "llama", "nanogpt")
LAYERS = {"gpt2": 11, "llama": 16, "nanogpt": 11}


@pytest.fixture(scope="module", autouse=True)
def _settings():
    """One thread, and transformers as it was: the command line silences it."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def run(*arguments, stdout=None):
    """(status, stdout, stderr) of a command."""
    out, err = stdout or io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def good(*arguments):
    """(stdout, stderr) of a command that works."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return out, err


def save_hf(config, folder, tokenizer=None, dtype=torch.float32):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([WORDS], vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>")


def gpt2_config(**changes):
    fields = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return transformers.GPT2Config(**fields | changes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)


@pytest.fixture(scope="module")
def at(tmp_path_factory, tokenizer):
    """Files and folders by name: the float models, and their packed ones, made by the command."""
    root = tmp_path_factory.mktemp("a place")  # with a space in it
    at = SimpleNamespace(root=root, text=root / "words.txt")
    at.text.write_text(WORDS)
    at.gpt2 = save_hf(gpt2_config(), root / "gpt2", tokenizer)
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    at.llama = save_hf(llama, root / "llama", tokenizer)
    at.mute = save_hf(gpt2_config(), root / "mute")
    at.half = save_hf(gpt2_config(), root / "half", tokenizer, torch.bfloat16)
    at.nanogpt = root / "ckpt.pt"
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": CONTEXT, "bias": False}
    arguments |= {"vocab_size": len(set(WORDS)), "dropout": 0.1}
    torch.manual_seed(0)
    torch.save({"model": GPT(GPTConfig(**arguments)).state_dict(), "model_args": arguments}, at.nanogpt)
    at.packed = {kind: root / f"packed {kind}" for kind in KINDS}
    at.said = {}
    for kind, folder in at.packed.items():
        at.said[kind] = good("quantize", getattr(at, kind), "--out", folder, *named_tokenizer(kind, at))
    return at


def named_tokenizer(kind, at):
    return ["--tokenizer", at.text] if kind == "nanogpt" else []


def tensors_of(folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


# ---- From a float model to a packed one that runs -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_says_what_it_did_and_what_is_next(at, kind):
    out, err = at.said[kind]
    folder = at.packed[kind]
    size = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert f"{LAYERS[kind]} layers quantized, 0 left float. {folder}: {size:,} bytes, " in out
    assert f"next: potqat inspect '{folder}'; potqat generate '{folder}' --prompt " in out
    stored = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert f" bytes in float32, {stored:,} packed; quantizing takes about " in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_model_is_inspected(at, kind):
    found = json.loads(good("inspect", at.packed[kind], "--json")[0])
    assert len(found["layers"]) == LAYERS[kind]
    assert {layer["grid"] for layer in found["layers"]} == {"pot4", "int8"}
    table = good("inspect", at.packed[kind])[0].splitlines()
    assert len(table) == LAYERS[kind] + 5  # a head, the layers, a blank line, and the totals with a head


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


def test_settings_reach_the_file(at, tmp_path):
    out, _ = good(
        "quantize", f"{at.llama}/", "--out", tmp_path / "new" / "packed", "--grid", "e2m1", "--granularity", 32,
        "--scale", "mse", "--rounding", "log", "--activations", "float", "--embedding-grid", "float", "--dtype",
        "bfloat16", "--skip", "lm_head", "--override", "*.mlp.*:grid=int4,granularity=channel,activations=int8",
    )  # fmt: skip
    assert "left float: model.embed_tokens (embedding_grid is None)" in out
    assert "left float: lm_head (matches skip pattern 'lm_head')" in out
    config = json.loads((tmp_path / "new" / "packed" / "config.json").read_text())
    for name, fields in config["quantization_config"]["modules"].items():
        grid, granularity, activations = ("int4", "channel", "int8") if ".mlp." in name else ("e2m1", 32, None)
        assert (fields["grid"], fields["granularity"], fields["activations"]) == (grid, granularity, activations)
        assert (fields["scale"], fields["rounding"]) == ("mse", "log")
    floats = [
        t for name, t in tensors_of(tmp_path / "new" / "packed").items() if not name.endswith((".packed", ".scale"))
    ]
    assert {tensor.dtype for tensor in floats} == {torch.bfloat16}
    result = json.loads(good("eval", tmp_path / "new" / "packed", "--text", at.text, "--tokens", 200, "--json")[0])
    assert result["tokens"] == 200


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_it_is_nearer_to_the_float_model(at, tmp_path, kind):
    model = getattr(at, kind)
    command = ["quantize", model, "--out", tmp_path / "packed", "--calibration", at.text, *named_tokenizer(kind, at)]
    report = json.loads(good(*command, "--json")[0])
    calibrated = [entry for entry in report["entries"] if entry["method"].startswith("scale=output, rounding=gptq")]
    assert len(calibrated) == {"gpt2": 10, "llama": 15, "nanogpt": 10}[kind]  # of gpt2 with the table, and its head
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    kl = [
        json.loads(good("eval", folder, "--text", at.text, "--tokens", 640, "--reference", model, "--json")[0])
        for folder in (tmp_path / "packed", at.packed[kind])
    ]
    assert kl[0]["reference"]["kl"] < 0.7 * kl[1]["reference"]["kl"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_file_it_calibrates_on_what_the_model_writes(at, tmp_path, kind):
    command = ["quantize", getattr(at, kind), "--calibration", "--calibration-tokens", 1000, "--json"]
    report = json.loads(good(*command, "--out", tmp_path / "a")[0])  # nanogpt's has no tokenizer, and needs none
    assert report["notes"][-1] == "calibrated on 1,024 tokens that the model wrote by itself, seed 0"
    assert any(entry["method"].startswith("scale=output, rounding=gptq") for entry in report["entries"])
    good(*command, "--out", tmp_path / "b")
    good(*command, "--out", tmp_path / "c", "--calibration-seed", 1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_what_the_model_writes_goes_beside_a_file(at, tmp_path, monkeypatch):
    seen, walk = [], calibrate.walk
    monkeypatch.setattr(
        calibrate, "walk", lambda model, batches, *more: seen.append(batches) or walk(model, batches, *more)
    )
    command = ["quantize", at.llama, "--calibration", at.text, "--calibration-tokens", 640]
    out, _ = good(*command, "--generated-tokens", 320, "--out", tmp_path / "both")
    hashed = hashlib.sha256(at.text.read_bytes()).hexdigest()
    assert (
        f"note: calibrated on 640 tokens of {at.text.name}, SHA-256 {hashed} and 320 tokens that the model wrote by "
        "itself, seed 0\n"
    ) in out
    good(*command, "--out", tmp_path / "file")
    both, file = (torch.cat(batches) for batches in seen)
    assert len(both) == len(file) + 5
    assert torch.equal(both[: len(file)], file)


def test_what_the_model_has_written_is_kept_for_the_same_command(at, tmp_path, monkeypatch):
    command = ["quantize", at.llama, "--calibration", "--calibration-tokens", 128]
    good(*command, "--out", tmp_path / "once")
    monkeypatch.setattr(calibrate, "walk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    kept = tmp_path / "new.generated"
    line = failure(130, *command, "--out", tmp_path / "new")[-1]
    assert line == f"potqat: stopped; what is finished is kept in {kept}; run the same command again to go on"
    monkeypatch.undo()
    line = failure(1, *command, "--calibration-seed", 1, "--out", tmp_path / "new")[-1]
    assert line == f"potqat: {kept}: holds text of another model or settings; delete it to start anew"
    monkeypatch.setattr(calibration_text, "generate_windows", None)  # it is not written again
    good(*command, "--out", tmp_path / "new")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "once")]
    assert files[0] == files[1]
    damaged = tmp_path / "again.generated"
    damaged.write_bytes(b"nothing")
    line = failure(1, *command, "--out", tmp_path / "again")[-1]
    assert line.startswith(f"potqat: {damaged}: cannot be read (")
    assert line.endswith("); delete it to start anew")


def test_calibration_settings_reach_the_file(at, tmp_path):
    command = ["quantize", at.gpt2, "--calibration", at.text, "--calibration-tokens", 100, "--override"]
    out, _ = good(*command, "*.mlp.*:scale=absmax", "--out", tmp_path / "a")
    assert "note: transformer.wpe: scale by least squared error" in out
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["modules"]
    fields = {name: (of["scale"], of["rounding"]) for name, of in config.items()}
    assert fields["transformer.h.0.attn.c_attn"] == ("output", "gptq")
    assert fields["transformer.h.0.mlp.c_fc"] == ("absmax", "gptq")
    assert fields["transformer.wte"] == fields["lm_head"] == ("output", "gptq")
    assert fields["transformer.wpe"] == ("mse", "nearest")
    good("quantize", at.gpt2, "--calibration", at.text, "--scale", "output", "--rounding", "nearest", "--out",
         tmp_path / "b")  # fmt: skip
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["modules"]
    assert config["transformer.h.0.attn.c_attn"]["rounding"] == "nearest"


def test_a_calibration_seed_draws_a_window_from_each_part_of_the_text(at, tmp_path):
    source = sources.find(str(at.gpt2))
    tokenizer = sources.tokenizer_of(source)
    ids = tokenizer(WORDS)["input_ids"]
    windows_of = functools.partial(calibration_text.windows_of_file, at.text, tokenizer, source)
    drawn = {seed: torch.cat(windows_of(300, seed=seed)) for seed in (0, 1)}
    part = len(ids) // 5
    for windows in drawn.values():
        assert windows.shape == (5, CONTEXT)
        for i, window in enumerate(windows.tolist()):
            places = [begin for begin in range(len(ids)) if ids[begin : begin + CONTEXT] == window]
            assert any(i * part <= place <= (i + 1) * part - CONTEXT for place in places)
    assert (drawn[0] != drawn[1]).any(1).sum() >= 4
    assert torch.equal(drawn[1], torch.cat(windows_of(300, seed=1)))
    (tmp_path / "tight.txt").write_text(tokenizer.decode(ids[:CONTEXT]))
    with pytest.raises(ValueError, match=r"tight.txt: has 64 tokens, and 1 calibration windows of 64 leave nothing to"):
        calibration_text.windows_of_file(tmp_path / "tight.txt", tokenizer, source, 64, seed=0)
    command = ["quantize", at.gpt2, "--calibration", at.text, "--calibration-tokens", 300, "--out"]
    for name, seed in (("a", []), ("b", ["--calibration-seed", 0]), ("c", ["--calibration-seed", 0])):
        good(*command, tmp_path / name, *seed)
    scales = [tensors_of(tmp_path / name)["transformer.h.1.mlp.c_fc.scale"] for name in "abc"]
    assert torch.equal(scales[1], scales[2])
    assert not torch.equal(scales[0], scales[1])


def test_bfloat16_weights_are_read(at, tmp_path):
    for dtype in ("float32", "bfloat16"):
        good("quantize", at.half, "--out", tmp_path / dtype, "--dtype", dtype)
    same = [tensors_of(tmp_path / dtype)["transformer.h.0.attn.c_attn.packed"] for dtype in ("float32", "bfloat16")]
    assert torch.equal(*same)
    assert good("generate", tmp_path / "bfloat16", "--prompt", "The", "--max-new-tokens", 3)[0].startswith("The")


def test_quantize_prints_json(at, tmp_path):
    report = json.loads(good("quantize", at.gpt2, "--out", tmp_path / "a", "--json")[0])
    assert len(report["entries"]) == LAYERS["gpt2"]
    size = sum((tmp_path / "a" / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert report["file_bytes"] == size < report["float_bytes"]


def test_a_model_without_a_tokenizer(at, tmp_path):
    out, _ = good("quantize", at.mute, "--out", tmp_path / "packed")
    assert "note: no tokenizer beside this model; generate and eval will need --tokenizer" in out
    assert good("generate", tmp_path / "packed", "--prompt", "The", "--tokenizer", at.gpt2)[0].startswith("The")


def test_names_on_the_hub(at, tmp_path, monkeypatch):
    """A cache in the hub's layout, without a network: the code path of `potqat quantize gpt2`."""
    constants = pytest.importorskip("huggingface_hub").constants
    for repository, folder in (("gpt2", at.gpt2), ("somebody--packed", at.packed["gpt2"])):
        snapshot = tmp_path / f"models--{repository}" / "snapshots" / ("a" * 40)
        shutil.copytree(folder, snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)  # 4.57
    monkeypatch.chdir(at.packed["gpt2"])  # where no folder has these names
    good("quantize", "gpt2", "--out", tmp_path / "out")
    files = [folder / "model.safetensors" for folder in (tmp_path / "out", at.packed["gpt2"])]
    assert files[0].read_bytes() == files[1].read_bytes()
    command = ["--prompt", "The number", "--max-new-tokens", 5]
    texts = [good("generate", name, *command)[0] for name in ("somebody/packed", at.packed["gpt2"])]
    assert texts[0] == texts[1]
    assert "already quantized; name the float" in failure(1, "quantize", "somebody/packed", "--out", tmp_path / "b")[-1]
    (line,) = failure(1, "generate", "somebody/absent", "--prompt", "x")
    assert "somebody/absent: not a file or folder here, and the hub does not give it: " in line
    (line,) = failure(1, "generate", at.mute, "--prompt", "x", "--tokenizer", "somebody/absent")
    assert "somebody/absent: no tokenizer of this name here, and the hub does not give one: " in line


# ---- Wrong uses ---------------------------------------------------------------------------------------------


def failure(status, *arguments):
    """The lines on stderr of a command that fails; the last one is the reason."""
    got, out, err = run(*arguments)
    assert (got, out) == (status, ""), err
    lines = err.splitlines()
    assert lines[-1].startswith("potqat: ")
    assert not lines[-1].startswith("potqat: potqat")
    return lines


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


# ---- Stopped, and out of room -------------------------------------------------------------------------------


def test_a_stopped_quantize_leaves_nothing(at, tmp_path, monkeypatch):
    """Ctrl-C when all files are written but the last."""
    saved = potqat.save

    def interrupted(model, folder):
        saved(model, folder)
        assert (folder / "model.safetensors").exists()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(potqat, "save", interrupted)
    assert failure(130, "quantize", at.gpt2, "--out", tmp_path / "new")[-1] == "potqat: stopped"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "new").mkdir()  # an empty folder may be filled
    good("quantize", at.gpt2, "--out", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_stopped_calibration_goes_on(at, tmp_path, monkeypatch):
    command = ["quantize", at.gpt2, "--calibration", at.text]
    good(*command, "--out", tmp_path / "once")
    walk, shown = calibrate.walk, []

    def interrupted(*arguments):
        for inputs in walk(*arguments):
            shown.append(inputs)
            if len(shown) == 6:  # the second of four in the second of two blocks
                signal.raise_signal(signal.SIGINT)
            yield inputs

    monkeypatch.setattr(calibrate, "walk", interrupted)
    kept = tmp_path / "new.unfinished"
    (line,) = failure(130, *command, "--out", tmp_path / "new")[1:]
    assert line == (f"potqat: stopped; what is finished is kept in {kept}; run the same command again to go on")
    assert len(list(kept.glob("*.safetensors"))) == 5
    assert not (tmp_path / "new").exists()
    (line,) = failure(1, *command, "--grid", "e2m1", "--out", tmp_path / "new")[1:]
    assert f"{kept}: holds an unfinished calibration of another model, text or settings; delete it" in line
    good(*command, "--out", tmp_path / "new")
    assert len(shown) == 6 + 3 + 1  # and the head with its table
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "once")]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "once"]


def test_a_full_disk_is_one_line_and_leaves_nothing(at, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # of a file; Python ignores the signal
    try:
        line = failure(1, "quantize", at.gpt2, "--out", tmp_path / "new")[-1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}: cannot write a folder there: " in line
    assert line.endswith("; make room or name another")
    assert not list(tmp_path.iterdir())


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


# ---- Memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--skip", "lm_head"], ["--embedding-grid", "float", "--dtype", "bfloat16"]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_size_is_known_before_a_weight_is_read(at, tmp_path, kind, options):
    _, err = good("quantize", getattr(at, kind), "--out", tmp_path / "packed", *options)
    stored = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "packed").values())
    assert f", {stored:,} packed; " in err


class LargestFloat(TorchDispatchMode):
    """The most elements of a float tensor that is made, and no view of a parameter."""

    def __init__(self, model):
        super().__init__()
        self.elements, self.known = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known
        if made and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


def test_quantizing_makes_no_float_copy_of_a_weight():
    """What the estimate rests on: beside the model there are its codes, its scales, and a few rows at a time."""
    model = transformers.GPT2LMHeadModel(gpt2_config(vocab_size=5000))
    with LargestFloat(model) as largest:
        potqat.quantize_(model, PoTConfig(granularity=32))
    assert 1000 < largest.elements < model.transformer.wte.shape[0] * 64 / 4
