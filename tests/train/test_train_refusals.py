"""What potqat train refuses: one line, and nothing left behind."""

import pytest
from train_command import command

from potqat.cli import main


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
