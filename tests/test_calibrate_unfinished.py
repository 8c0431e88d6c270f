"""Calibration that was stopped: finished layers are kept in a folder, and it goes on with them."""

import pytest
import torch
from calibration_models import CFG, START, assert_untouched, batches, make
from torch import nn

import potqat
from potqat import PoTConfig, gptq


def test_finished_layers_are_kept_until_all_are(tmp_path, monkeypatch):
    """Stopped twice; the command line's test compares with a run that was not."""
    kept, once, model = tmp_path / "kept", make("llama"), make("llama")
    expected = potqat.quantize_(once, CFG, calibration=batches())
    compensate, calls = gptq.compensate, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) in (3, 9):
            raise KeyboardInterrupt
        return compensate(*arguments)

    monkeypatch.setattr(gptq, "compensate", stopping)
    for done in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            potqat.quantize_(model, CFG, calibration=batches(), unfinished=kept)
        assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
        assert len(list(kept.glob("*.safetensors"))) == done
    with pytest.raises(ValueError, match="another model, text or settings; delete it to start anew"):
        potqat.quantize_(model, CFG, calibration=batches(2), unfinished=kept)
    report = potqat.quantize_(model, CFG, calibration=batches(), unfinished=kept)
    assert len(calls) == 15 + 2
    assert report.to_dict() == expected.to_dict()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not kept.exists()


def test_only_its_own_folder_is_taken_for_unfinished_work(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a folder of an unfinished calibration; name another one"):
        potqat.quantize_(make("own"), CFG, calibration=batches(), unfinished=tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="unfinished keeps calibrated layers; give calibration, too"):
        potqat.quantize_(make("own"), PoTConfig(), unfinished=tmp_path / "new")


def test_a_calibrated_preparation_that_was_stopped_goes_on(tmp_path, monkeypatch):
    model, once, folder = make("llama").train(), make("llama").train(), tmp_path / "unfinished"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    potqat.prepare_qat_(once, START, calibration=batches())
    count, compensate = 0, gptq.compensate

    def stopping(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return compensate(*arguments)

    monkeypatch.setattr(gptq, "compensate", stopping)
    with pytest.raises(KeyboardInterrupt):
        potqat.prepare_qat_(model, START, calibration=batches(), unfinished=folder)
    assert_untouched(model, before)
    assert model.training
    potqat.prepare_qat_(model, START, calibration=batches(), unfinished=folder)
    assert count == 6 + 10  # of 15, the first 5 were kept
    assert not folder.exists()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in once.state_dict().items())
