"""potqat train: what is trained, from what start, and that a killed run goes on to the same losses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import potqat
from potqat import PoTConfig, calibrate, cpu_info
from potqat.cli import main
from potqat.flows import evaluate, losses, sources, training
from potqat.flows.generated import generate_windows
from potqat.flows.recipe import LOSSES, PARTS, PRESETS, QUANTIZER, Recipe
from potqat.models.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
pytestmark = pytest.mark.usefixtures("command_settings")

WORDS = "".join(f"The number {i} times {i} is {i * i}, and so it goes on from {i % 7}.\n" for i in range(160))
VOCABULARY = 300
TINY = ["--context=16", "--batch=2", "--accumulate=2", "--steps=6", "--evaluate-every=2"]
TINY += ["--calibration-tokens=256", "--threads=1", "--learning-rate=1e-3"]


def llama_config(**changes):
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, "initializer_range": 0.2}
    return transformers.LlamaConfig(**fields | ends | changes)


def gpt2_config():
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def at(tmp_path_factory, bpe_tokenizer):
    """A text, and float models of three kinds."""
    tokenizer = bpe_tokenizer(WORDS, VOCABULARY)
    root = tmp_path_factory.mktemp("train")
    at = SimpleNamespace(root=root, text=root / "words.txt", nanogpt=root / "ckpt.pt", tokenizer=tokenizer)
    at.text.write_text(WORDS)
    for name, config in (("llama", llama_config()), ("gpt2", gpt2_config())):
        torch.manual_seed(0)
        setattr(at, name, root / name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": False}
    shape |= {"vocab_size": len(set(WORDS)), "dropout": 0.1}
    torch.manual_seed(0)
    torch.save({"model": GPT(GPTConfig(**shape)).state_dict(), "model_args": shape}, at.nanogpt)
    return at


def command(at, kind, out, *more):
    tokenizer = ["--tokenizer", at.text] if kind == "nanogpt" else []
    return [str(a) for a in ("train", getattr(at, kind), "--data", at.text, "--out", out, *TINY, *tokenizer, *more)]


def outcome(out):
    metrics = json.loads((out / "metrics.json").read_text())
    return {key: metrics[key] for key in ("curves", "losses", "results", "file_bytes", "start")}


@pytest.fixture(scope="module")
def run(at):
    """(folder, its metrics) of one run with a control."""
    out = at.root / "run"
    threads = torch.get_num_threads()
    assert main(command(at, "llama", out, "--loss=ce", "--control")) == 0
    torch.set_num_threads(threads)
    return out, json.loads((out / "metrics.json").read_text())


# ---- A run --------------------------------------------------------------------------------------------------


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


# ---- Resuming -----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_losses(at, tmp_path):
    """kill -9 in float steps, in calibration and again in training; a calibrated start is not calibrated again, and
    losses are those of a run from that start in one go."""
    out, once = tmp_path / "killed", tmp_path / "once"
    arguments = command(at, "llama", out, "--loss=ce", "--control", "--float-steps=2")
    for begun in ("float.pt", "calibration/work.txt", "qat.pt"):
        process = subprocess.Popen(
            [sys.executable, "-m", "potqat", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (out / "state" / begun).exists():
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "metrics.json").exists()
        assert (out / "state" / "start.pt").exists() == (begun == "qat.pt")
    before = (out / "state" / "start.pt").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (out / "state" / "start.pt").stat().st_mtime_ns == before
    assert not (out / "state" / "calibration").exists()
    (once / "state").mkdir(parents=True)
    shutil.copy(out / "state" / "start.pt", once / "state")
    assert main(command(at, "llama", once, "--loss=ce", "--control", "--float-steps=2")) == 0
    assert outcome(once) == outcome(out)


def test_a_run_stopped_in_calibration_says_how_to_go_on(at, tmp_path, monkeypatch, capsys):
    walk = calibrate.walk

    def interrupted(*arguments):
        for inputs in walk(*arguments):
            signal.raise_signal(signal.SIGINT)
            yield inputs

    monkeypatch.setattr(calibrate, "walk", interrupted)
    assert main(command(at, "llama", tmp_path / "run")) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"potqat: stopped; the state is in {tmp_path / 'run'}: run the same command again to go on"


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


# ---- Parts and losses ---------------------------------------------------------------------------------------


def prepared(config=None):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config or llama_config())
    potqat.prepare_qat_(model, PoTConfig(scale="learned"))
    return model


@pytest.mark.parametrize("config", [llama_config(), gpt2_config()])
def test_parts_are_what_takes_gradients(config):
    model = prepared(config)
    tables = ("embed_tokens", "lm_head", "wte", "wpe")
    expected = {
        "scales": lambda name, p: name.endswith("log2_scale"),
        "norms": lambda name, p: name.endswith(("log2_scale", "bias")) or "norm" in name or "ln_" in name,
        "blocks": lambda name, p: not any(table in name for table in tables),
        "all": lambda name, p: True,
    }
    assert set(expected) == set(PARTS)
    for parts, is_part in expected.items():
        training.choose_parts(model, parts)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == is_part(name, parameter), (parts, name)
    float_model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match="Sequential has no parameters of the parts 'norms'"):
        training.choose_parts(float_model, "norms")


def test_losses_are_what_they_are_called():
    torch.manual_seed(1)
    model, teacher = prepared(), transformers.AutoModelForCausalLM.from_config(llama_config())
    windows = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        log_q, log_p = (m(windows[:, :-1]).logits.double().log_softmax(-1) for m in (model, teacher))
    targets = -log_q.gather(-1, windows[:, 1:, None])[..., 0]
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(), "ce": targets.mean(), "last": targets[:, -1].mean(),
    }  # fmt: skip
    assert set(expected) == set(LOSSES)
    for name, value in expected.items():
        loss = losses.make(Recipe(loss=name), teacher)(model, windows)
        assert loss.item() == pytest.approx(value.item(), rel=1e-5)
        loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    ce, kl = losses.held_out(Recipe(), model, teacher, windows)
    assert (ce, kl) == pytest.approx((expected["ce"].item(), expected["kl"].item()), rel=1e-5)
    assert losses.kl_divergence(teacher, teacher, windows).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_divergence_and_its_gradient_in_parts_are_those_of_the_whole(dtype):
    torch.manual_seed(2)
    count, vocabulary = 2 * losses.ROWS + 7, 19
    logits = (4 * torch.randn(1, count, vocabulary)).to(dtype).requires_grad_()
    theirs = (4 * torch.randn(1, count, vocabulary)).to(dtype)
    exact = logits.detach().double().requires_grad_()
    log_q, log_p = exact.log_softmax(-1), theirs.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()

    ids = torch.zeros(1, count, dtype=torch.int64)
    student, teacher = (lambda t=t, **_: SimpleNamespace(logits=t) for t in (logits, theirs))
    loss = losses.kl_divergence(student, teacher, ids)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    # A few roundings of values up to 1 / count, and one to the logits' own dtype.
    bound = 1e-6 / count + torch.finfo(dtype).eps * 3 * exact.grad.abs()
    assert ((logits.grad.double() - 3 * exact.grad).abs() <= bound).all()


def test_the_papers_preset_is_their_protocol():
    papers = PRESETS["papers"]
    assert (papers.loss, papers.context, papers.batch, papers.accumulate) == ("last", 64, 12, 32)
    phase = papers.quantized_phase("qat")
    assert {phase.learning_rate_at(i) for i in range(papers.steps + 1)} == {0.5e-5}


# ---- Wrong usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--loss=kl", "--control"], 1, "a float control of KL training is the float model itself"),
        (["--loss=ce", "--parts=scales", "--control"], 1, "a float control has no scales to train"),
        (["--loss=kl", "--float-steps=2"], 1, "float steps need loss ce or last"),
        (["--float-steps=6"], 2, "float_steps must be from 0 to below the 6 steps, got 6"),
        (["--context=400"], 1, "context 400 is more than the 64 tokens this model takes"),
        (["--warmup=1"], 2, "warmup must be a share of the steps, from 0 to below 1, got 1.0"),
        (["--generated-tokens=-1"], 2, "generated_tokens must be at least 0, got -1"),
        (["--batch=0"], 2, "batch must be at least 1, got 0"),
        (["--granularity=33"], 2, "granularity must be 'tensor', 'channel' or a group size"),
        (["--data=absent.txt"], 1, "absent.txt: cannot read the text"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(at, tmp_path, capsys, more, status, message):
    assert main(command(at, "llama", tmp_path / "out", *more)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_checkpointing_of_a_nanogpt_is_refused(at, tmp_path, capsys):
    assert main(command(at, "nanogpt", tmp_path / "out", "--checkpointing")) == 1
    assert "gradient checkpointing is for Hugging Face models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- In transformers.Trainer --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_three_steps_in_transformers_trainer(tmp_path):
    model = prepared()
    ids = torch.randint(VOCABULARY, (12, 16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": i, "labels": i} for i in ids]
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(math.isfinite(loss) for loss in logged)
    assert all((before[name] != p).any() for name, p in model.named_parameters())
    model.eval()
    with torch.no_grad():
        fake = model(input_ids=ids).logits
        potqat.convert_(model)
        packed = model(input_ids=ids).logits
    assert (packed - fake).abs().max() < 0.05 * fake.abs().max()  # int8 activations
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(sources.load(sources.find(str(tmp_path / "packed")))(input_ids=ids).logits, packed)
