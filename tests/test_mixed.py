"""Layers on different grids: given by name, and chosen by measured sensitivity (potqat quantize --target-loss)."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import potqat
from potqat import PoTConfig, modules
from potqat.cli import main
from potqat.flows import calibration_text, mixed, sources
from potqat.flows.mixed import Choice

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
pytest.importorskip("matplotlib")

WORDS = "".join(f"The number {i} times {i} is {i * i}, and so it goes on from {i % 7}.\n" for i in range(200))
CFG = PoTConfig(scale="output")  # rounded to nearest: error compensation would change nothing but take longer
LAYERS = 2 * 7 + 1


@pytest.fixture(scope="module")
def at(tmp_path_factory, small_llama):
    """A folder with a small Llama, its tokenizer and a text."""
    root = tmp_path_factory.mktemp("mixed")
    small_llama(root / "float", WORDS)
    (root / "words.txt").write_text(WORDS)
    return root


@pytest.fixture(scope="module")
def float_model(at):
    return sources.load(sources.find(str(at / "float")))


@pytest.fixture(scope="module")
def split(at):
    source = sources.find(str(at / "float"))
    batches = calibration_text.windows_of_file(at / "words.txt", sources.tokenizer_of(source), source, 40 * 64)
    return mixed.split_windows(batches)


# ---- By name ------------------------------------------------------------------------------------------------


def test_layers_on_different_grids_from_quantizing_to_a_file_and_back(float_model, split, tmp_path):
    fields = {
        "*.mlp.*": {"grid": "e2m1", "granularity": 32},
        "down_proj": {"grid": "int8", "granularity": "channel"},
        "q_proj": {"grid": "int4", "scale": "mse"},
        "model.layers.1.self_attn.o_proj": {"granularity": 64, "rounding": "gptq", "activations": None},
    }
    model = copy.deepcopy(float_model)
    report = potqat.quantize_(model, PoTConfig(scale="output", overrides=fields), split[0])
    by_name = {entry.name.removeprefix("model.layers."): (entry.grid, entry.granularity) for entry in report.entries}
    assert by_name["0.mlp.up_proj"] == ("e2m1", 32)
    assert by_name["0.mlp.down_proj"] == ("int8", "channel")
    assert by_name["1.self_attn.q_proj"] == ("int4", "channel")
    assert by_name["1.self_attn.o_proj"] == ("pot4", 64)
    assert by_name["0.self_attn.o_proj"] == ("pot4", "channel")
    size = {name: entry.bytes_after for name, entry in zip(by_name, report.entries, strict=True)}
    assert size["0.mlp.down_proj"] > 1.8 * size["1.self_attn.o_proj"] > 0
    assert sum(size.values()) == report.bytes_after
    potqat.save(model, tmp_path / "packed")
    again = potqat.load(tmp_path / "packed", copy.deepcopy(float_model))
    logits, expected = (sources.logits_of(m)(split[2]) for m in (again, model))
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, sources.logits_of(float_model)(split[2]))
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        assert again.get_submodule(name).cfg == model.get_submodule(name).cfg


# ---- Choosing -----------------------------------------------------------------------------------------------


def layers_of(rows):
    """{name: choices} from (bytes, loss) pairs."""
    return {f"l{i}": [Choice("pot4", "channel", b, 0.0, x) for b, x in row] for i, row in enumerate(rows)}


def test_the_layer_that_wins_most_a_byte_changes_first():
    layers = layers_of([[(10, 0.5), (20, 0.1)], [(10, 0.3), (10, 0.2), (12, 0.05)], [(10, 0.4), (110, 0.0)]])
    chosen, steps = mixed.choose(layers, 0.7)
    assert [(step.bytes, round(step.loss, 9)) for step in steps] == [(30, 1.2), (30, 1.1), (32, 0.95), (42, 0.55)]
    assert [chosen[name].loss for name in layers] == [0.1, 0.05, 0.4]
    assert [step.bytes for step in mixed.all_steps(layers)] == [30, 30, 32, 42, 142]
    with pytest.raises(
        ValueError, match=r"--target-loss 0.1: with the best choice for every layer 0.1500 nats a token"
    ):
        mixed.choose(layers, 0.1)


pair = st.tuples(st.integers(1, 30), st.floats(0.01, 1, allow_nan=False))


@given(st.lists(st.lists(pair, min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0.05, 1))
def test_no_choice_within_the_target_is_much_smaller(rows, share):
    """Against every combination: greedy is off by no more than one layer's change (as for a knapsack)."""
    rows = [[max(row, key=lambda r: r[1]), *row] for row in rows]  # it starts with the worst of a layer
    low = sum(min(loss for _, loss in row) for row in rows)
    high = sum(row[0][1] for row in rows)
    target = low + share * (high - low) + 1e-9
    _, steps = mixed.choose(layers_of(rows), target)
    assert steps[-1].loss <= target
    assert all(a.loss > b.loss for a, b in itertools.pairwise(steps))
    best = min(
        sum(b for b, _ in way) for way in itertools.product(*rows) if math.fsum(loss for _, loss in way) <= target
    )
    spread = max(max(b for b, _ in row) - min(b for b, _ in row) for row in rows)
    start = sum(row[0][0] for row in rows)
    if best >= start:  # otherwise leaving layers as they were asked for is what costs
        assert steps[-1].bytes <= best + 2 * spread


# ---- Measuring ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensed(float_model, split, tmp_path_factory):
    """(choices of every layer, the folder that holds what was done)."""
    folder = tmp_path_factory.mktemp("sensed") / "kept"
    before = {name: tensor.clone() for name, tensor in float_model.state_dict().items()}  # it is smoothed, and back
    layers = mixed.sensitivities(float_model, CFG, split[0], split[1], folder)
    after = float_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert list(folder.glob("*.smoothed"))
    return layers, folder


def test_windows_are_held_back_and_apart(split):
    kept, sensing, checking = split
    rows = [tuple(row.tolist()) for part in (torch.cat(kept), sensing, checking) for row in part]
    assert len(set(rows)) == len(rows) == 40
    assert (len(sensing), len(checking)) == (2, 3)
    with pytest.raises(ValueError, match=r"holds back one calibration window of 8 and needs 24, got 12; give a longer"):
        mixed.split_windows([torch.zeros(12, 64, dtype=torch.int64)])


def test_a_layers_loss_is_that_of_a_model_with_only_this_layer_packed(float_model, split, tmp_path):
    """Measured by whole passes here; the line through two candidates goes by the error of outputs. With float
    activations, for which nothing is smoothed: what smoothing does depends on the layers beside."""
    floating = PoTConfig(scale="output", activations=None)
    layers = mixed.sensitivities(float_model, floating, split[0], split[1], tmp_path / "kept")
    assert len(layers) == LAYERS
    rows = split[1]
    log_p = sources.logits_of(float_model)(rows).double().log_softmax(-1)[:, :-1]
    floats = dict(float_model.named_modules())
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        choices = layers[name]
        assert [(c.grid, c.granularity) for c in choices] == list(mixed.CANDIDATES)
        for choice in (choices[0], choices[-1]):
            model = copy.deepcopy(float_model)
            field = {"grid": choice.grid, "granularity": choice.granularity}
            others = tuple(n for n, m in floats.items() if n != name and isinstance(m, torch.nn.Linear))
            cfg = PoTConfig(scale="output", activations=None, embedding_grid=None, skip=others, **field)
            potqat.quantize_(model, cfg, split[0])
            assert isinstance(model.get_submodule(name), modules.PackedLinear)
            log_q = sources.logits_of(model)(rows).double().log_softmax(-1)[:, :-1]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            assert choice.loss == pytest.approx(kl, rel=1e-3)
        (a, b), middle = (choices[0], choices[-1]), choices[1]
        assert a.error > middle.error > b.error
        expected = b.loss + (a.loss - b.loss) * (middle.error - b.error) / (a.error - b.error)
        assert middle.loss == pytest.approx(expected)
        assert [c.bytes for c in choices] == sorted(c.bytes for c in choices)


def test_layers_that_an_override_settles_are_not_chosen_for(float_model, split, tmp_path):
    cfg = PoTConfig(scale="output", overrides={"*.0.*": {"grid": "e2m1"}, "lm_head": {"grid": "int8"}})
    layers = mixed.sensitivities(float_model, cfg, split[0], split[1], tmp_path / "kept")
    assert set(layers) == {name for name in dict(float_model.named_modules()) if ".1." in name and "proj" in name}
    everything = PoTConfig(scale="output", overrides={"*": {"granularity": 32}})
    with pytest.raises(ValueError, match="overrides settle every layer"):
        mixed.sensitivities(float_model, everything, split[0], split[1], tmp_path / "other")


def test_what_was_measured_is_not_measured_again(float_model, split, sensed, tmp_path, monkeypatch):
    layers, _ = sensed
    before = {name: tensor.clone() for name, tensor in float_model.state_dict().items()}
    measured, kl = [], mixed._Tail.kl

    def interrupted(self, module):
        measured.append(module)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return kl(self, module)

    monkeypatch.setattr(mixed._Tail, "kl", interrupted)
    arguments = float_model, CFG, split[0], split[1], tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        mixed.sensitivities(*arguments)
    assert all(isinstance(m, torch.nn.Linear) for n, m in float_model.named_modules() if n.endswith("_proj"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in float_model.state_dict().items())
    monkeypatch.setattr(mixed.calibrate, "walk", lambda *_: pytest.fail("calibrated again"))
    assert mixed.sensitivities(*arguments) == layers
    assert len(measured) == 8 + 2 * (LAYERS - 3)
    with pytest.raises(ValueError, match="holds an unfinished calibration of another model, text or settings"):
        mixed.sensitivities(*arguments[:3], split[2], tmp_path / "kept")


# ---- The command --------------------------------------------------------------------------------------------


def test_the_command_meets_its_target(at, float_model, split, sensed, tmp_path, capsys):
    start, end = (mixed.all_steps(sensed[0])[i].loss for i in (0, -1))
    target = end + 0.4 * (start - end)
    command = ["quantize", str(at / "float"), "--out", str(tmp_path / "mixed"), "--calibration", str(at / "words.txt")]
    command += ["--rounding", "nearest"]
    assert main([*command, "--calibration-tokens", str(40 * 64), "--target-loss", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    outcome = report["mixed"]
    chosen, _ = mixed.choose(sensed[0], target)
    assert {name: row["chosen"]["loss"] for name, row in outcome["layers"].items()} == {
        name: choice.loss for name, choice in chosen.items()
    }
    assert outcome["predicted"]["loss"] <= target < outcome["curve"][0]["loss"]
    for entry in report["entries"]:
        if entry["name"] in chosen:
            choice = chosen[entry["name"]]
            assert (entry["grid"], entry["granularity"]) == (choice.grid, choice.granularity)
            assert entry["bytes_after"] == choice.bytes
    assert len({(c.grid, c.granularity) for c in chosen.values()}) > 1
    packed = sources.load(sources.find(str(tmp_path / "mixed")))
    log_p, log_q = (sources.logits_of(m)(split[2]).double().log_softmax(-1)[:, :-1] for m in (float_model, packed))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert outcome["measured"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert json.loads((tmp_path / "mixed.mixed.json").read_text()) == outcome
    assert (tmp_path / "mixed.mixed.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "mixed.mixed.json", "mixed.mixed.png"]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--target-loss=0.1"], 2, "--target-loss goes with --calibration and must be above 0, got 0.1"),
        (["--calibration={text}", "--target-loss=0"], 2, "must be above 0, got 0.0"),
        (["--calibration={text}", "--target-loss=nan"], 2, "must be above 0, got nan"),
        (["--calibration={text}", "--target-loss=1", "--grid=int8"], 1, "and int8 is the most"),
        (["--calibration={text}", "--target-loss=1", "--calibration-tokens=640"], 1, "and needs 24, got 10; give a"),
        (
            ["--calibration={text}", "--target-loss=1e-9"],
            1,
            "--target-loss 1e-09: with the best choice for every layer",
        ),
    ],
)
def test_targets_that_cannot_be_met_are_refused(at, tmp_path, capsys, more, status, message):
    words = ["--rounding=nearest", *(word.format(text=at / "words.txt") for word in more)]
    assert main(["quantize", str(at / "float"), "--out", str(tmp_path / "new"), *words]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
