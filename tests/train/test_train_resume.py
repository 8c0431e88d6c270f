"""A run of potqat train that was stopped or killed goes on to the same losses."""

import os
import shutil
import signal
import subprocess
import sys
import time

from train_command import command, outcome

from potqat import calibrate
from potqat.cli import main


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
