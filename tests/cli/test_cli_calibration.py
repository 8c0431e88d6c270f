"""potqat quantize --calibration: what it reads and writes, keeps when stopped, and gains."""

import functools
import hashlib
import json
import signal

import pytest
import torch
from command import CONTEXT, KINDS, WORDS, failure, good, named_tokenizer, tensors_of

from potqat import calibrate
from potqat.flows import calibration_text, sources


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_it_is_nearer_to_the_float_model(at, tmp_path, kind):
    model = getattr(at, kind)
    command = ["quantize", model, "--out", tmp_path / "packed", "--calibration", at.text, *named_tokenizer(kind, at)]
    report = json.loads(good(*command, "--json")[0])
    calibrated = [entry for entry in report["entries"] if entry["method"].startswith("scale=output, rounding=gptq")]
    assert len(calibrated) == {"gpt2": 10, "llama": 15, "nanogpt": 10}[kind]  # of gpt2 with the table, and its head
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    kl = [
        json.loads(good("eval", folder, "--text", at.text, "--tokens", 640, "--reference", model, "--json")[0])
        for folder in (tmp_path / "packed", at.packed[kind])
    ]
    assert kl[0]["reference"]["kl"] < 0.7 * kl[1]["reference"]["kl"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_file_it_calibrates_on_what_the_model_writes(at, tmp_path, kind):
    command = ["quantize", getattr(at, kind), "--calibration", "--calibration-tokens", 1000, "--json"]
    report = json.loads(good(*command, "--out", tmp_path / "a")[0])  # nanogpt's has no tokenizer, and needs none
    assert report["notes"][-1] == "calibrated on 1,024 tokens that the model wrote by itself, seed 0"
    assert any(entry["method"].startswith("scale=output, rounding=gptq") for entry in report["entries"])
    good(*command, "--out", tmp_path / "b")
    good(*command, "--out", tmp_path / "c", "--calibration-seed", 1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_what_the_model_writes_goes_beside_a_file(at, tmp_path, monkeypatch):
    seen, walk = [], calibrate.walk
    monkeypatch.setattr(
        calibrate, "walk", lambda model, batches, *more: seen.append(batches) or walk(model, batches, *more)
    )
    command = ["quantize", at.llama, "--calibration", at.text, "--calibration-tokens", 640]
    out, _ = good(*command, "--generated-tokens", 320, "--out", tmp_path / "both")
    hashed = hashlib.sha256(at.text.read_bytes()).hexdigest()
    assert (
        f"note: calibrated on 640 tokens of {at.text.name}, SHA-256 {hashed} and 320 tokens that the model wrote by "
        "itself, seed 0\n"
    ) in out
    good(*command, "--out", tmp_path / "file")
    both, file = (torch.cat(batches) for batches in seen)
    assert len(both) == len(file) + 5
    assert torch.equal(both[: len(file)], file)


def test_what_the_model_has_written_is_kept_for_the_same_command(at, tmp_path, monkeypatch):
    command = ["quantize", at.llama, "--calibration", "--calibration-tokens", 128]
    good(*command, "--out", tmp_path / "once")
    monkeypatch.setattr(calibrate, "walk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    kept = tmp_path / "new.generated"
    line = failure(130, *command, "--out", tmp_path / "new")[-1]
    assert line == f"potqat: stopped; what is finished is kept in {kept}; run the same command again to go on"
    monkeypatch.undo()
    line = failure(1, *command, "--calibration-seed", 1, "--out", tmp_path / "new")[-1]
    assert line == f"potqat: {kept}: holds text of another model or settings; delete it to start anew"
    monkeypatch.setattr(calibration_text, "generate_windows", None)  # it is not written again
    good(*command, "--out", tmp_path / "new")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "once")]
    assert files[0] == files[1]
    damaged = tmp_path / "again.generated"
    damaged.write_bytes(b"nothing")
    line = failure(1, *command, "--out", tmp_path / "again")[-1]
    assert line.startswith(f"potqat: {damaged}: cannot be read (")
    assert line.endswith("); delete it to start anew")


def test_calibration_settings_reach_the_file(at, tmp_path):
    command = ["quantize", at.gpt2, "--calibration", at.text, "--calibration-tokens", 100, "--override"]
    out, _ = good(*command, "*.mlp.*:scale=absmax", "--out", tmp_path / "a")
    assert "note: transformer.wpe: scale by least squared error" in out
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["modules"]
    fields = {name: (of["scale"], of["rounding"]) for name, of in config.items()}
    assert fields["transformer.h.0.attn.c_attn"] == ("output", "gptq")
    assert fields["transformer.h.0.mlp.c_fc"] == ("absmax", "gptq")
    assert fields["transformer.wte"] == fields["lm_head"] == ("output", "gptq")
    assert fields["transformer.wpe"] == ("mse", "nearest")
    good("quantize", at.gpt2, "--calibration", at.text, "--scale", "output", "--rounding", "nearest", "--out",
         tmp_path / "b")  # fmt: skip
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["modules"]
    assert config["transformer.h.0.attn.c_attn"]["rounding"] == "nearest"


def test_a_calibration_seed_draws_a_window_from_each_part_of_the_text(at, tmp_path):
    source = sources.find(str(at.gpt2))
    tokenizer = sources.tokenizer_of(source)
    ids = tokenizer(WORDS)["input_ids"]
    windows_of = functools.partial(calibration_text.windows_of_file, at.text, tokenizer, source)
    drawn = {seed: torch.cat(windows_of(300, seed=seed)) for seed in (0, 1)}
    part = len(ids) // 5
    for windows in drawn.values():
        assert windows.shape == (5, CONTEXT)
        for i, window in enumerate(windows.tolist()):
            places = [begin for begin in range(len(ids)) if ids[begin : begin + CONTEXT] == window]
            assert any(i * part <= place <= (i + 1) * part - CONTEXT for place in places)
    assert (drawn[0] != drawn[1]).any(1).sum() >= 4
    assert torch.equal(drawn[1], torch.cat(windows_of(300, seed=1)))
    (tmp_path / "tight.txt").write_text(tokenizer.decode(ids[:CONTEXT]))
    with pytest.raises(ValueError, match=r"tight.txt: has 64 tokens, and 1 calibration windows of 64 leave nothing to"):
        calibration_text.windows_of_file(tmp_path / "tight.txt", tokenizer, source, 64, seed=0)
    command = ["quantize", at.gpt2, "--calibration", at.text, "--calibration-tokens", 300, "--out"]
    for name, seed in (("a", []), ("b", ["--calibration-seed", 0]), ("c", ["--calibration-seed", 0])):
        good(*command, tmp_path / name, *seed)
    scales = [tensors_of(tmp_path / name)["transformer.h.1.mlp.c_fc.scale"] for name in "abc"]
    assert torch.equal(scales[1], scales[2])
    assert not torch.equal(scales[0], scales[1])


def test_a_stopped_calibration_goes_on(at, tmp_path, monkeypatch):
    command = ["quantize", at.gpt2, "--calibration", at.text]
    good(*command, "--out", tmp_path / "once")
    walk, shown = calibrate.walk, []

    def interrupted(*arguments):
        for inputs in walk(*arguments):
            shown.append(inputs)
            if len(shown) == 6:  # the second of four in the second of two blocks
                signal.raise_signal(signal.SIGINT)
            yield inputs

    monkeypatch.setattr(calibrate, "walk", interrupted)
    kept = tmp_path / "new.unfinished"
    (line,) = failure(130, *command, "--out", tmp_path / "new")[1:]
    assert line == (f"potqat: stopped; what is finished is kept in {kept}; run the same command again to go on")
    assert len(list(kept.glob("*.safetensors"))) == 5
    assert not (tmp_path / "new").exists()
    (line,) = failure(1, *command, "--grid", "e2m1", "--out", tmp_path / "new")[1:]
    assert f"{kept}: holds an unfinished calibration of another model, text or settings; delete it" in line
    good(*command, "--out", tmp_path / "new")
    assert len(shown) == 6 + 3 + 1  # and the head with its table
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "once")]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "once"]
