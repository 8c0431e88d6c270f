"""A run of potqat train: what is trained, from what start, what it leaves, and that its folder takes no other run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from train_command import VOCABULARY, command, outcome

import potqat
from potqat import PoTConfig, cpu_info
from potqat.cli import main
from potqat.flows import evaluate, sources, training
from potqat.flows.generated import generate_windows
from potqat.flows.recipe import QUANTIZER, Recipe


def test_a_run_leaves_a_packed_model_that_the_other_verbs_read(at, run, capsys):
    out, metrics = run
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG\r\n")
    text = at.root / "held_out.txt"
    text.write_text("The number 9 times 9 is 81, and so it goes on.\n" * 9)
    capsys.readouterr()
    arguments = ["eval", out / "packed", "--text", text, "--context", "16", "--reference", at.llama, "--json"]
    assert main([str(a) for a in arguments]) == 0
    assert json.loads(capsys.readouterr().out)["reference"]["perplexity_ratio"] > 0
    assert main(["generate", str(out / "packed"), "--prompt", "The number", "--max-new-tokens", "3"]) == 0
    files = ("config.json", "model.safetensors")
    assert metrics["file_bytes"] == sum((out / "packed" / name).stat().st_size for name in files)


@pytest.mark.parametrize("kind", ["llama", "nanogpt"])
def test_the_control_is_kept_as_a_model_to_compare_with(at, run, tmp_path, kind):
    out = run[0] if kind == "llama" else tmp_path / "out"
    if kind == "nanogpt":
        assert main(command(at, kind, out, "--loss=ce", "--control")) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    tokenizer = sources.tokenizer(str(at.text)) if kind == "nanogpt" else at.tokenizer
    recipe = replace(Recipe(), context=metrics["recipe"]["context"])
    data = training.load_data(at.text, tokenizer, sources.find(str(getattr(at, kind))), recipe)
    control = sources.logits_of(sources.load(sources.find(str(out / metrics["control"]))))
    again = evaluate.measure(control, data.held_out[: training.MEASURED_TOKENS], recipe.context)
    assert again.loss == metrics["results"]["control"]["loss"] != metrics["results"]["qat"]["loss"]


def test_training_lowers_the_loss_and_the_packed_model_keeps_it(run):
    _, metrics = run
    curve, found = metrics["curves"]["qat"], metrics["results"]
    assert [point["iteration"] for point in curve] == [0, 2, 4, 6]
    assert curve[-1]["val"] < curve[0]["val"]
    assert found["qat"]["loss"] == pytest.approx(curve[-1]["val"], abs=0.1)  # int8 activations, windows elsewhere
    assert len(metrics["losses"]["qat"]) == len(metrics["losses"]["control"]) == 6
    expected = math.exp(found["qat"]["loss"] - found["control"]["loss"])
    assert found["ratio_to_control"] == pytest.approx(expected)
    assert found["control"]["reference"]["loss"] == found["qat"]["reference"]["loss"]


def test_the_start_is_that_of_calibrated_quantization(at, run):
    """Before the first step the model has the weights that quantize_ packs on the same windows."""
    _, metrics = run
    source = sources.find(str(at.llama))
    recipe = replace(Recipe(), **{key: metrics["recipe"][key] for key in ("context", "calibration_tokens")})
    data = training.load_data(at.text, at.tokenizer, source, recipe)
    assert (metrics["text"]["train"], metrics["text"]["held_out"]) == (len(data.train), len(data.held_out))
    assert len(data.held_out) == pytest.approx(len(data.train) / 7, abs=1)
    check_start(metrics, sources.load(source), spread_windows(data))


def test_the_model_as_float_steps_made_it_writes_calibration_text(at, tmp_path, capsys):
    more = ["--loss=ce", "--float-steps=2", "--generated-tokens=100"]
    assert main(command(at, "llama", tmp_path, *more)) == 0
    source = sources.find(str(at.llama))
    written = load_file(tmp_path / "state" / "generated.safetensors")["windows"]
    assert written.shape == (7, 16)
    tuned = sources.load(source)
    tuned.load_state_dict(torch.load(tmp_path / "state" / "float.pt", weights_only=True)["model"])
    starts = torch.tensor([i for i in range(VOCABULARY) if i not in at.tokenizer.all_special_ids])
    if cpu_info()["bfloat16"]:
        tuned = tuned.to(torch.bfloat16)
    assert torch.equal(written, generate_windows(tuned, 7, 16, starts))
    data = training.load_data(at.text, at.tokenizer, source, replace(Recipe(), context=16))
    tuned = sources.load(source)
    tuned.load_state_dict(torch.load(tmp_path / "state" / "float.pt", weights_only=True)["model"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    check_start(metrics, tuned, torch.cat([spread_windows(data), written]))
    (tmp_path / "state" / "start.pt").unlink()
    (tmp_path / "state" / "generated.safetensors").write_bytes(b"damaged")
    assert main(command(at, "llama", tmp_path, *more)) == 1
    assert "generated.safetensors: cannot be read" in capsys.readouterr().err


def spread_windows(data):
    starts = torch.linspace(0, len(data.train) - 16, 16, dtype=torch.float64).long()
    return data.train[starts[:, None] + torch.arange(16)]


def check_start(metrics, model, windows):
    """A run's report of its start is that of quantize_ on the windows."""
    report = potqat.quantize_(model, PoTConfig(scale="output", rounding="reconstruct"), windows.split(8))
    packed, started = (
        {entry["name"]: (entry["block_error_before"], entry["block_error"]) for entry in entries}
        for entries in (report.to_dict()["entries"], metrics["start"]["entries"])
    )
    assert started.keys() == packed.keys()
    assert len([errors for errors in started.values() if None not in errors]) == 14
    first = [name for name in packed if ".layers.0." in name]  # no rounding lies before it
    assert len(first) == 7
    for name in first:
        assert started[name] == pytest.approx(packed[name], rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "nanogpt"])
@pytest.mark.parametrize("loss", ["kl", "last"])
def test_other_models_and_losses_run(at, tmp_path, kind, loss):
    quantizer = ["--granularity=32", "--grid=e2m1", "--embedding-grid=e2m1", "--override=wte:granularity=channel"]
    assert main(command(at, kind, tmp_path, f"--loss={loss}", "--steps=2", *quantizer)) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["recipe"]["loss"] == loss
    assert all(math.isfinite(value) for value in metrics["losses"]["qat"])
    assert list(metrics["results"]) == ["qat"]
    assert potqat.PoTConfig.from_dict(metrics["quantizer"]) == replace(
        QUANTIZER, granularity=32, grid="e2m1", embedding_grid="e2m1", overrides={"wte": {"granularity": "channel"}}
    )


@pytest.mark.parametrize(("more", "tolerance"), [("--checkpointing", 1e-5), ("--dtype=bfloat16", 0.1)])
def test_bfloat16_and_checkpointing_train(at, run, tmp_path, more, tolerance):
    assert main(command(at, "llama", tmp_path, "--loss=ce", more)) == 0
    found, plain = outcome(tmp_path)["losses"]["qat"], run[1]["losses"]["qat"]
    assert found == pytest.approx(plain, rel=tolerance)
    assert (found == plain) == (more == "--checkpointing")


# ---- Float steps --------------------------------------------------------------------------------------------


def test_float_steps_come_first_and_count(at, run, tmp_path):
    """Float steps see the windows of the control's first ones, and what they give is what is calibrated."""
    out = tmp_path / "run"
    assert main(command(at, "llama", out, "--loss=ce", "--control", "--float-steps=2", "--warmup=0")) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    iterations = {name: [point["iteration"] for point in curve] for name, curve in metrics["curves"].items()}
    assert iterations == {"float": [0, 2], "qat": [2, 4, 6], "control": [0, 2, 4, 6]}
    assert {name: len(losses) for name, losses in metrics["losses"].items()} == {"float": 2, "qat": 4, "control": 6}
    assert metrics["losses"]["float"][0] == metrics["losses"]["control"][0]
    start = torch.load(out / "state" / "start.pt", weights_only=True)["model"]
    trained = torch.load(out / "state" / "float.pt", weights_only=True)["model"]
    assert torch.equal(start["model.norm.weight"], trained["model.norm.weight"])
    assert not torch.equal(trained["model.norm.weight"], sources.load(sources.find(str(at.llama))).model.norm.weight)


def test_a_run_with_other_settings_is_refused(at, run, capsys):
    out, _ = run
    capsys.readouterr()
    assert main(command(at, "llama", out, "--loss=ce", "--seed=3")) == 1
    assert "holds a run with seed=0, and this one has 3" in capsys.readouterr().err
