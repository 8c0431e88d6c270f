"""potqat quantize and inspect, from a float model to a packed folder."""

import json
import resource
import shutil
import signal

import pytest
import torch
from command import KINDS, LAYERS, failure, good, gpt2_config, tensors_of, transformers
from torch.utils._python_dispatch import TorchDispatchMode

import potqat
from potqat import PoTConfig


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
