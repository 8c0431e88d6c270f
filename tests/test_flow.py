"""The character-level experiment: its text, its measures, its exactly resumable training, and what a run leaves."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tqdm import tqdm

import potqat
from potqat.cli import main
from potqat.flows.experiment import ARMS, PRESETS, Experiment
from potqat.flows.text import load_text, split_text
from potqat.flows.trainer import Interrupted, Phase, cross_entropy, train
from potqat.metrics import evaluate, tokens_per_second
from potqat.models.gpt import GPT, GPTConfig

TINY = ["--layers=1", "--heads=2", "--width=32", "--context=16", "--batch=4", "--evaluate-every=10", "--threads=1"]
TINY += ["--float-iterations=30", "--total-iterations=50"]
WORDS = " ".join(f"the number {i} times {i} is {i * i}, and" for i in range(700))


# ---- Text ---------------------------------------------------------------------------------------------------


def test_text_is_split_80_10_10_by_position():
    text = split_text("words", WORDS, 64)
    n = len(WORDS)
    assert [len(text.splits[split]) for split in ("train", "val", "test")] == [
        round(0.8 * n),
        round(0.9 * n) - round(0.8 * n),
        n - round(0.9 * n),
    ]
    assert "".join(text.decode(text.splits[split]) for split in ("train", "val", "test")) == WORDS
    assert text.characters == "".join(sorted(set(WORDS)))


def test_text_of_any_script_round_trips():
    content = "naïve Ελλάδα 日本 🎲\r\n" * 40
    text = split_text("scripts", content, 8)
    assert "".join(map(text.decode, text.splits.values())) == content


def test_windows_are_even_and_their_inputs_cover_the_split_once():
    text = split_text("words", WORDS, 16)
    tokens = text.splits["val"]
    windows = text.windows("val", 16, 10**9)
    assert torch.equal(windows[:, :-1].flatten(), tokens[: windows[:, :-1].numel()])
    assert 0 < len(tokens) - windows[:, :-1].numel() <= 16
    assert torch.equal(windows[:-1, -1], windows[1:, 0])
    few = text.windows("val", 16, 7)
    assert len(few) == 7
    assert torch.equal(few[0], windows[0])
    assert torch.equal(few[-1], windows[-1])


def test_default_text_is_pythons_own_help(tmp_path):
    from pydoc_data.topics import topics

    text = load_text(None, 64)
    assert sum(map(len, text.splits.values())) == sum(map(len, topics.values()))
    path = tmp_path / "copy.txt"
    path.write_bytes("".join(topics[key] for key in sorted(topics)).encode())
    assert load_text(path, 64).sha256 == text.sha256


# ---- Measures -----------------------------------------------------------------------------------------------


def small_model(text, dropout=0.2):
    torch.manual_seed(1)
    return GPT(GPTConfig(len(text.characters), block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=dropout))


def test_loss_is_the_mean_over_all_positions_and_the_last_one_is_reported():
    text = split_text("words", WORDS, 16)
    model, windows = small_model(text), text.windows("val", 16, 33)
    measured = evaluate(model.train(), windows, batch=8)
    assert model.training
    with torch.no_grad():
        log_p = model.eval()(windows[:, :-1]).double().log_softmax(-1)
    picked = -log_p.gather(-1, windows[:, 1:, None])[..., 0]
    assert measured.loss == pytest.approx(picked.mean().item(), rel=1e-6)
    assert measured.last == pytest.approx(picked[:, -1].mean().item(), rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(picked.mean().item()), rel=1e-6)
    assert (measured.tokens, measured.windows) == (33 * 16, 33)
    assert evaluate(model, windows, batch=33).loss == pytest.approx(measured.loss, rel=1e-6)


def test_evaluating_nothing_is_refused():
    text = split_text("words", WORDS, 16)
    for shape in [(0, 17), (3, 1)]:
        with pytest.raises(ValueError, match="at least 1"):
            evaluate(small_model(text), torch.zeros(shape, dtype=torch.int64))


def test_speed_is_measured_for_every_model():
    text = split_text("words", WORDS, 16)
    speeds = tokens_per_second({"a": small_model(text), "b": small_model(text)}, text.windows("val", 16, 4)[:, :-1])
    assert list(speeds) == ["a", "b"]
    assert all(speed > 0 for speed in speeds.values())


# ---- Training and resuming ----------------------------------------------------------------------------------

PHASE = Phase("small", 0, 25, 1e-3, 1e-4, warmup=5, evaluate_every=10, seed=7)


def pt2e(model, config):
    batch = torch.export.Dim("batch", min=1)
    return potqat.pt2e.prepare(model, (torch.zeros(2, 16, dtype=torch.int64),), config, dynamic_shapes=({0: batch},))


def eager(model, config):
    potqat.prepare_qat_(model, config)
    return model


def trained(path, config=None, stop_at=None, phase=PHASE, prepare=eager):
    """Train a small model from the state in ``path``; with ``stop_at`` a stop is asked for in that iteration."""
    text = split_text("words", WORDS, 16)
    windows = text.windows("val", 16, 8)
    stop, model = threading.Event(), small_model(text)
    if config is not None:
        model = prepare(model, config)

    def batches_at(i):
        if i == stop_at:
            stop.set()
        return [text.at("train", torch.arange(4) * 50 + 7 * i, 16)]

    with tqdm(total=phase.iterations, disable=True) as bar:
        done = train(
            model, phase, batches_at, cross_entropy, lambda m: {"val": evaluate(m, windows).loss}, path, bar, stop
        )
    assert len(done.losses) == phase.iterations
    return model.state_dict(), done.curve


@pytest.mark.parametrize(("arm", "prepare"), [(None, eager), *((arm, eager) for arm in ARMS), ("pot4", pt2e)])
def test_training_stopped_and_resumed_is_training_in_one_go(tmp_path, one_thread, arm, prepare):
    torch.set_num_threads(1)
    config = ARMS[arm].config if arm else None
    state, curve = trained(tmp_path / "once.pt", config, prepare=prepare)
    assert [point["iteration"] for point in curve] == [0, 10, 20, 25]
    assert curve[-1]["val"] < curve[0]["val"]
    for i in (0, 9, 12, 23):
        with pytest.raises(Interrupted, match=f"stopped at iteration {i + 1} of 25 of 'small'"):
            trained(tmp_path / "stopped.pt", config, stop_at=i, prepare=prepare)
        torch.manual_seed(99)  # what the global generator holds in between must not matter
    again, curve_again = trained(tmp_path / "stopped.pt", config, prepare=prepare)
    assert curve_again == curve
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_finished_training_is_not_repeated(tmp_path):
    state, curve = trained(tmp_path / "state.pt")
    again, curve_again = trained(tmp_path / "state.pt")
    assert curve_again == curve
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model, text = small_model(split_text("words", WORDS, 16)), split_text("words", WORDS, 16)
    torch.manual_seed(3)
    with tqdm(total=25, disable=True) as bar:
        train(model, PHASE, lambda i: [text.at("train", torch.arange(4), 16)], cross_entropy, lambda m: {},
              tmp_path / "s.pt", bar, threading.Event())  # fmt: skip
    assert torch.equal(torch.rand(1), expected)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    phase = dataclasses.replace(PHASE, iterations=105)
    rates = [phase.learning_rate_at(i) for i in range(106)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[5] == 1e-3
    assert rates[55] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[105] == pytest.approx(1e-4)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_a_loss_that_is_not_finite_stops_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"small: the loss is nan at iteration \d+; lower the learning rate"):
        trained(tmp_path / "state.pt", phase=dataclasses.replace(PHASE, learning_rate=1e30))


def test_a_broken_state_is_named(tmp_path):
    path = tmp_path / "state.pt"
    for content in (b"", b"broken"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state.pt: cannot read the training state .*; delete it to train anew"):
            trained(path)


# ---- A whole run --------------------------------------------------------------------------------------------


def outcome(metrics):
    """What must be equal between two runs: all but speed and where they ran."""
    rows = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in metrics["rows"]]
    return rows, metrics["curves"], metrics["report"], metrics["text"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """(folder, metrics) of one tiny run of all arms through the command line."""
    out, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    assert main(["reproduce", *TINY, "--data", str(words), "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out, json.loads((out / "metrics.json").read_text())


def test_a_run_leaves_its_files(run):
    out, metrics = run
    packed = {f"{name}-{how}" for name in ARMS for how in ("ptq", "qat") if name != "pot9-paper"}
    assert {path.name for path in (out / "models").iterdir()} == packed | {
        "float32.safetensors",
        "bfloat16.safetensors",
    }
    assert (out / "loss_curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    for row in metrics["rows"]:
        if row["packed"]:
            assert row["bytes"] == sum(path.stat().st_size for path in (out / "models" / row["file"]).iterdir())
            assert row["bytes"] < metrics["float_bytes"]["bfloat16"] < metrics["float_bytes"]["float32"]
    assert not list(out.rglob("*.tmp"))


def test_the_table_has_a_row_for_every_model(run):
    out, metrics = run
    lines = (out / "table.txt").read_text().splitlines()
    assert len(metrics["rows"]) == 2 + 2 * len(ARMS) - 1
    for row in metrics["rows"]:
        (line,) = [line for line in lines if line.startswith(row["label"] + " ")]
        assert f"{row['val_loss']:.4f}" in line
        assert f"{row['test_loss']:.4f}" in line
        assert f"{row['bytes']:,}" in line if row["bytes"] else "not packed" in line
        assert row["test_perplexity"] == pytest.approx(math.exp(row["test_loss"]))
    note = " ".join(lines[-3:])
    assert f"{metrics['evaluation']['val_tokens']:,}" in note
    assert "context 16, stride 16" in note


def test_metrics_say_what_was_run(run, words):
    _, metrics = run
    assert metrics["text"]["sha256"] == load_text(words, 16).sha256
    assert metrics["experiment"]["seed"] == 0
    assert metrics["machine"]["threads"] == 1
    assert metrics["machine"]["isa"] == potqat.cpu_info()["isa"]
    assert metrics["machine"]["torch"] == torch.__version__
    for name, arm in ARMS.items():
        assert potqat.PoTConfig.from_dict(metrics["arms"][name]["config"]) == arm.config
    assert set(metrics["curves"]) == {"float", "control", *ARMS}
    assert [point["iteration"] for point in metrics["curves"]["float"]] == [0, 10, 20, 30]
    assert [point["iteration"] for point in metrics["curves"]["pot4"]] == [30, 40, 50]
    assert metrics["report"]["bytes_after"] < metrics["report"]["bytes_before"]


def test_a_packed_file_gives_the_loss_of_its_row(run, words):
    out, metrics = run
    text = load_text(words, 16)
    windows = text.windows("val", 16, 2000)
    for row in metrics["rows"]:
        if row["packed"]:
            model = potqat.load(out / "models" / row["file"], GPT(GPTConfig(**metrics["model"])))
            assert evaluate(model, windows).loss == row["val_loss"]
        if row["val_loss_fake_quantized"] is not None:
            assert row["val_loss"] == pytest.approx(row["val_loss_fake_quantized"], abs=0.02)


def test_samples_stand_side_by_side_from_the_same_start(run, words):
    out, metrics = run
    title, rule, *lines = (out / "samples.txt").read_text().splitlines()
    assert "control" in title
    assert metrics["rows"][-1]["label"] in title
    assert set(rule) == {"-", " ", "|"}
    left, right = lines[0].split("|")[0], lines[0].split("|")[1]
    start = load_text(words, 16).decode(load_text(words, 16).splits["test"][:20])
    assert left.startswith(start)
    assert right[1:].startswith(start)


def test_the_same_seed_gives_the_same_result_and_another_seed_another(run, words, tmp_path, one_thread):
    _, metrics = run
    for seed in (0, 1):
        arguments = ["reproduce", *TINY, f"--seed={seed}", "--arms=pot4", "--data", str(words), "--out"]
        assert main([*arguments, str(tmp_path / str(seed))]) == 0
        again = json.loads((tmp_path / str(seed) / "metrics.json").read_text())
        same = again["curves"]["pot4"] == metrics["curves"]["pot4"] and outcome(again)[0][-1] == outcome(metrics)[0][-1]
        assert same == (seed == 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_to_the_same_result(run, words, tmp_path, one_thread, how):
    """Ctrl-C saves at once and says how to go on; after a hard kill the last saved state counts."""
    _, metrics = run
    arguments = ["reproduce", *TINY, "--data", str(words), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "potqat", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "state" / "int4-paper.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, how)
    out, err = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped at iteration" in err.splitlines()[-1]
        assert "run the same command again to go on" in err.splitlines()[-1]
    assert not out
    assert not (tmp_path / "metrics.json").exists()
    assert main(arguments) == 0
    assert outcome(json.loads((tmp_path / "metrics.json").read_text())) == outcome(metrics)


def test_arms_can_be_added_to_a_finished_run(words, tmp_path, one_thread):
    arguments = ["reproduce", *TINY, "--data", str(words), "--out", str(tmp_path), "--arms"]
    assert main([*arguments, "int4"]) == 0
    before = (tmp_path / "state" / "float.pt").stat().st_mtime_ns
    assert main([*arguments, "int4,pot4"]) == 0
    assert (tmp_path / "state" / "float.pt").stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "control", "int4-ptq", "int4-qat", "pot4-ptq", "pot4-qat"]


def test_pt2e_trains_to_the_losses_of_eager(run, words, tmp_path, one_thread):
    _, metrics = run
    arguments = [
        "reproduce",
        *TINY,
        "--qat=pt2e",
        "--arms=pot4-paper,pot4",
        "--data",
        str(words),
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    eager = {row["name"]: row for row in metrics["rows"]}
    for row in json.loads((tmp_path / "metrics.json").read_text())["rows"]:
        assert row["val_loss"] == pytest.approx(eager[row["name"]]["val_loss"], abs=1e-4)


def test_presets_are_the_papers_model():
    for experiment in PRESETS.values():
        shape = (experiment.layers, experiment.heads, experiment.width, experiment.context, experiment.batch)
        assert shape == (4, 4, 128, 64, 12)
        assert experiment.dropout == 0.2
    assert (PRESETS["reproduce"].float_iterations, PRESETS["reproduce"].total_iterations) == (15_000, 22_500)


@pytest.mark.parametrize("change", [{"layers": 0}, {"arms": ("pot5",)}, {"total_iterations": 15_000}, {"qat": "no"}])
def test_experiments_without_a_meaning_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)) if "arms" not in change else "unknown arm 'pot5'"):
        Experiment(**change)
