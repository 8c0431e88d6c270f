"""Calibration that is refused or fails half way, and the model as it was."""

import pytest
import torch
from calibration_models import CFG, VOCABULARY, assert_untouched, batches, make
from torch import nn

import potqat
from potqat import PoTConfig


@pytest.mark.parametrize(
    ("calibration", "cfg", "message"),
    [
        (None, PoTConfig(rounding="gptq"), r"wte: rounding='gptq' needs calibration data; pass calibration=\["),
        (None, PoTConfig(scale="output"), "scale='output' needs calibration data; pass .* or use scale='mse'"),
        (batches(), PoTConfig(), "calibration is given, and nothing uses it; set rounding='gptq'"),
        ([], CFG, "calibration is empty; give at least one"),
        (batches()[0], CFG, r"must be an iterable of token tensors, got one tensor; pass \[tokens\]"),
        ([torch.zeros(2, 8)], CFG, r"calibration\[0\] must be int64 token ids \[B, T\], got torch.float32 \[2, 8\]"),
        ([*batches(), [1, 2]], CFG, r"calibration\[3\] must be int64 token ids \[B, T\], got list"),
        ([torch.zeros(8, dtype=torch.int64)], CFG, r"got torch.int64 \[8\]"),
        (
            [*batches(), torch.tensor([[1, 65]])],
            CFG,
            r"tokens \[2\] up to id 65: IndexError",
        ),
        (batches(t=25), CFG, r"tokens \[25\] up to id 64: ValueError: GPT: at most block_size=24"),
    ],
)
def test_bad_calibration_is_refused_and_the_model_untouched(calibration, cfg, message):
    model = make("own")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        potqat.quantize_(model, cfg, calibration=calibration)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.h.1.mlp.c_fc.weight", torch.nan, "transformer.h.1.mlp.c_fc: .* NaN or infinity"),
        ("transformer.h.1.ln_2.weight", torch.inf, "transformer.h.1.mlp.c_fc: its inputs hold NaN or infinity"),
    ],
)
def test_after_an_error_half_way_the_float_model_is_back(name, value, message):
    model = make("own").train()
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = value
    before = {key: tensor.nan_to_num(7).clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        potqat.quantize_(model, CFG, calibration=batches())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.nan_to_num_(7)
    assert_untouched(model, before)
    assert all(m.training for m in model.modules())


def test_a_model_without_a_chain_of_blocks_is_refused():
    class Skips(nn.Module):
        """Each block sees the first hidden state, too."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 16)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, ids):
            first = x = self.table(ids)
            for block in self.blocks:
                x = block(x + first)
            return x

    with pytest.raises(ValueError, match=r"Skips holds no nn.ModuleList of blocks that are called one after another"):
        potqat.quantize_(Skips(), CFG, calibration=batches())
