"""The command line: help, exit status, and one line for everything a user can get wrong."""

import json
import re
import subprocess
import sys

import pytest
import torch

import potqat
from potqat.cli import main

TINY = ["--layers=1", "--heads=2", "--width=32", "--context=16", "--batch=2", "--threads=1", "--arms=pot4"]
TINY += ["--float-iterations=4", "--total-iterations=6", "--evaluate-every=4"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a line of text, one of many\n" * 40)
    return path


def failure(capsys, arguments, status):
    """The single line that a failing command prints."""
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("potqat: ")
    return line


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert main(["demo", "--help"]) == 0
    assert main(["reproduce", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.count("example: potqat") == 3
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"potqat {potqat.__version__}\n"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "potqat", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"potqat {potqat.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["demo", "--seed", "x"], ["demo", "--layers", "2"], ["reproduce", "--qat", "other"]]
)
def test_wrong_usage_exits_2(capsys, arguments):
    assert main(arguments) == 2
    assert "usage: potqat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "pot4,pot5"], "unknown arm 'pot5'; the arms are: int4-paper, "),
        (["--float-iterations", "9", "--total-iterations", "9"], "total_iterations must be more than float_iterations"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_arguments_without_a_meaning_exit_2(capsys, tmp_path, arguments, message):
    assert message in failure(capsys, ["reproduce", "--out", tmp_path, *arguments], 2)
    assert not list(tmp_path.iterdir())


def test_json_on_stdout_and_progress_on_stderr(capsys, text, tmp_path, one_thread):
    assert main(["reproduce", *TINY, "--data", str(text), "--out", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    metrics = json.loads(out)
    assert [row["name"] for row in metrics["rows"]] == ["float", "control", "pot4-ptq", "pot4-qat"]
    assert "it/s" in err


def test_the_table_and_samples_are_printed(capsys, text, tmp_path, one_thread):
    assert main(["reproduce", *TINY, "--data", str(text), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "out" / "table.txt").read_text() in out
    assert (tmp_path / "out" / "samples.txt").read_text() in out
    assert f"Everything is in {tmp_path / 'out'}/" in out


def test_bad_text_is_one_line(capsys, tmp_path):
    def line(path):
        return failure(capsys, ["demo", "--data", path, "--out", tmp_path / "out"], 1)

    assert "absent.txt: cannot read the text: No such file" in line(tmp_path / "absent.txt")
    assert "cannot read the text: Is a directory" in line(tmp_path)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"")
    assert "bad.txt: the file is empty" in line(bad)
    bad.write_bytes(b"caf\xe9 " * 1000)
    assert "bad.txt: not UTF-8 text (byte 3 is 0xe9); convert it" in line(bad)
    bad.write_text("short " * 100)
    assert "bad.txt: the text is too short: its val split holds 60 characters of 600" in line(bad)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(capsys, text):
    for out in (text, text / "out"):
        line = failure(capsys, ["reproduce", *TINY, "--data", text, "--out", out], 1)
        assert f"{out}: cannot write results there: Not a directory; choose another folder" in line


def test_a_folder_with_another_run_is_one_line(capsys, text, tmp_path, one_thread):
    command = ["reproduce", *TINY, "--data", text, "--out", tmp_path / "out"]
    assert main([str(argument) for argument in command]) == 0
    capsys.readouterr()
    assert "holds a run with seed=0, and this one has 3; choose another" in failure(capsys, [*command, "--seed=3"], 1)
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 80)
    assert "holds a run with text=" in failure(capsys, [*command, "--data", other], 1)


def test_heads_that_do_not_divide_the_width_are_one_line(capsys, text, tmp_path):
    line = failure(capsys, ["reproduce", "--heads=3", "--data", text, "--out", tmp_path / "out"], 1)
    assert "n_head must divide n_embd, got 3 and 128" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the message where there is no GPU")
def test_no_gpu_is_one_line(capsys):
    assert "--device cuda: PyTorch sees no CUDA GPU here" in failure(capsys, ["demo", "--device", "cuda"], 1)


def test_missing_matplotlib_is_said_before_training(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from potqat.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("potqat: matplotlib draws loss_curves.png and is not installed; run: pip install")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_verbs_import_what_they_need_when_they_run():
    code = (
        "import sys; from potqat.cli import main; status = main(sys.argv[1:])\n"
        "heavy = ('transformers', 'torchao', 'matplotlib', 'potqat.flows.nanogpt', 'potqat.flows.doctor',"
        " 'potqat.flows.inspection', 'potqat.flows.sources')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_verb_has_an_example(capsys):
    assert main(["--help"]) == 0
    verbs = re.findall(r"^    (\w+)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert {"demo", "reproduce", "train", "inspect", "doctor"} <= set(verbs)
    for verb in verbs:
        assert main([verb, "--help"]) == 0
        assert f"example: potqat {verb}" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error_message():
    """potqat ... | head: the pipe is closed before anything is written to it."""
    code = "import sys, time; sys.stdin.read(1); from potqat.cli import main; sys.exit(main(['doctor', '--json']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.write(b"x")
    process.stdin.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
