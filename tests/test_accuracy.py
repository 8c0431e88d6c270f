"""benchmarks/accuracy.py: arms, what a run leaves and resumes, and what is made of its results."""

import contextlib
import io
import json
from pathlib import Path

import pytest

import potqat
from potqat import PoTConfig
from potqat.cli import main
from potqat.flows import evaluate, sources

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
pytest.importorskip("matplotlib")

WORDS = "".join(f"The number {i} times {i} is {i * i}, and so it goes on from {i % 7}.\n" for i in range(60))


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import accuracy

    return accuracy


@pytest.fixture(scope="module")
def at(tmp_path_factory, small_llama):
    """A folder with a small Llama, its tokenizer and two texts."""
    root = tmp_path_factory.mktemp("accuracy")
    small_llama(root / "float", WORDS)
    (root / "words.txt").write_text(WORDS)
    (root / "other.txt").write_text(WORDS[700:2800])
    return root


def words_of(at, tmp_path, *more):
    words = [at / "float", "--calibration", at / "words.txt", "--calibration-tokens", 256, "--context", 32]
    words += ["--text", at / "words.txt", "--text", at / "other.txt", "--tokens", 320]
    return [*map(str, [*words, "--work", tmp_path / "work", "--json", tmp_path / "accuracy.json", *more])]


def test_an_arm_is_what_its_name_says(accuracy):
    made = accuracy.arm("e2m1-128-gptq-float-seed3")
    assert (made.grid, made.granularity, made.calibrated, made.number("seed")) == ("e2m1", "128", True, 3)
    assert made.label == "`e2m1`, groups of 128, gptq, float activations, sample 3"
    assert made.settings == [
        "--grid", "e2m1", "--granularity", "128", "--activations", "float", "--calibration-seed", "3",
    ]  # fmt: skip
    whole = accuracy.arm("pot4-channel-absmax-embedding")
    assert whole.settings[4:] == ["--scale", "absmax", "--rounding", "nearest", "--embedding-grid", "pot4"]
    assert not whole.calibrated
    head = accuracy.arm("pot4-32-gptq-head16")
    assert head.settings[4:] == ["--override", "embed_tokens:activations=int16"]
    assert head.label == "`pot4`, groups of 32, gptq, int16 activations for the head"
    own = accuracy.arm("pot4-channel-reconstruct-tokens1024-own75")
    assert own.label.endswith("reconstruct, 1,024 tokens, 75% of the text its own")
    assert own.tokens(2048) == (256, 768)
    assert accuracy.arm("pot4-channel-gptq").tokens(2048) == (2048, 0)
    assert len(set(accuracy.ARMS)) == len(accuracy.ARMS)
    for name in (
        "pot4-channel",
        "pot5-channel-gptq",
        "pot4-channel-rtn",
        "pot4-channel-mse-seed1",
        "pot4-32-gptq-x",
        "pot4-32-absmax-own50",
    ):
        with pytest.raises(accuracy.argparse.ArgumentTypeError, match="must be GRID-GRANULARITY-METHOD"):
            accuracy.arm(name)


@pytest.fixture
def commands(accuracy, monkeypatch):
    """The commands that a run makes; they run in this process, for a new one takes seconds to start."""
    made = []

    def potqat_(words):
        made.append((words[0], Path(words[-1] if words[0] == "eval" else words[3]).name))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(words) == 0
        return json.loads(out.getvalue()), {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1}

    monkeypatch.setattr(accuracy, "potqat", potqat_)
    return made


def test_a_command_is_timed_in_a_process_of_its_own(accuracy, at, capfd):
    report, took = accuracy.potqat(["quantize", str(at / "float"), "--out", str(at / "made"), "--json"])
    assert report["file_bytes"] > 10_000
    assert took["peak_bytes"] > 100e6  # Python and torch alone take more
    assert took["cpu_seconds"] > 0
    assert took["seconds"] > 0
    with pytest.raises(ValueError, match=r"potqat quantize failed \(status 2\), see above"):
        accuracy.potqat(["quantize", str(at / "float"), "--out", str(at / "made"), "--json"])
    assert "exists and is not an empty folder" in capfd.readouterr().err


def test_a_run_measures_packed_folders_and_goes_on(accuracy, commands, at, tmp_path, monkeypatch, capfd):
    """Its figures are those of the same folders in this process; what is there is not made or measured again."""
    assert accuracy.main(words_of(at, tmp_path, "--arms", "pot4-32-absmax")) == 0
    first = json.loads((tmp_path / "accuracy.json").read_text())
    commands.clear()
    model = sources.load(sources.find(str(at / "float")))
    potqat.quantize_(model, PoTConfig(grid="e2m1"))
    trained = tmp_path / "trained"
    potqat.save(model, trained)
    sources.tokenizer_of(sources.find(str(at / "float"))).save_pretrained(trained)
    arms = ["--arms", "pot4-32-absmax", "pot4-channel-gptq-seed1", "--packed", f"a folder={trained}"]
    assert accuracy.main(words_of(at, tmp_path, *arms)) == 0
    assert commands == [
        ("quantize", "pot4-channel-gptq-seed1"),
        ("eval", "pot4-channel-gptq-seed1.eval.json"),
        ("eval", "a_folder.eval.json"),
    ]
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["arms"]["pot4-32-absmax"] == first["arms"]["pot4-32-absmax"]
    assert list(report["arms"]) == ["pot4-32-absmax", "pot4-channel-gptq-seed1", "a folder"]
    calibrated = report["arms"]["pot4-channel-gptq-seed1"]
    assert (calibrated["calibration_seed"], calibrated["quantize"]["resumed"]) == (1, False)
    assert calibrated["bytes_per_weight"] == pytest.approx(0.5 + 4 / 64, rel=0.2)  # scales, and padding to whole tiles
    reference = sources.logits_of(sources.load(sources.find(str(at / "float"))))
    for name, folder in (("pot4-32-absmax", tmp_path / "work" / "pot4-32-absmax"), ("a folder", trained)):
        logits = sources.logits_of(sources.load(sources.find(str(folder))))
        for file, text in zip(("words.txt", "other.txt"), report["arms"][name]["texts"], strict=True):
            tokenizer = sources.tokenizer_of(sources.find(str(at / "float")))
            plan = evaluate.plan_text(at / file, tokenizer, model="m", max_context=32, tokens=320)
            expected = evaluate.measure(logits, plan.tokens, 32, reference=reference).to_dict()
            assert text["reference"]["kl"] == pytest.approx(expected["reference"]["kl"], rel=1e-6)
            assert (text["text"]["file"], text["windows"]) == (file, 10)
    assert str(tmp_path) not in (tmp_path / "accuracy.json").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    import readme

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    arms[1:1] = ["pot4-channel-gptq"]
    assert accuracy.main(words_of(at, tmp_path, *arms)) == 0
    shown = readme._accuracy()
    cells = [line.split(" | ") for line in shown if line.startswith("| ")]
    rows = [row[0].removeprefix("| ") for row in cells]
    assert sorted(rows[2:4]) == ["`pot4`, a scale a channel, gptq", "`pot4`, a scale a channel, gptq, sample 1"]
    assert [*rows[:2], *rows[4:]] == ["model", "float32", "`pot4`, groups of 32, absmax", "a folder"]
    assert float(cells[2][3].split()[0]) >= float(cells[3][3].split()[0])  # from worst to best
    against = report["arms"]["a folder"]["texts"][0]["reference"]
    low, high = against["kl_interval"]
    assert f" {against['kl']:.3f} ({low:.3f} to {high:.3f}) " in next(line for line in shown if "a folder" in line)
    assert "Ratios of pot4-channel-gptq over 2 calibration samples: " in shown[-2]
    commands.clear()
    assert accuracy.main(words_of(at, tmp_path, *arms)) == 0  # nothing left to do
    assert not commands
    assert accuracy.main([*words_of(at, tmp_path, *arms), "--context", "64"]) == 1
    assert "accuracy.json: made with other settings (context); name another" in capfd.readouterr().err
    assert accuracy.main([*words_of(at, tmp_path, *arms), "--calibration-tokens", "64"]) == 1
    assert "settings.json: made with other settings (calibration); name another" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "absent.txt"], "absent.txt: cannot read the text"),
        (["--tokens", "99999"], "words.txt: the text has "),
        (["--packed", "a={float}"], "float: a float model; give a folder that potqat wrote"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(accuracy, at, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr(accuracy, "potqat", lambda words: pytest.fail("it ran"))
    assert accuracy.main(words_of(at, tmp_path, *(word.format(float=at / "float") for word in more))) == 1
    assert message in capsys.readouterr().err
