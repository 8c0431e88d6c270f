"""Measuring: the calibration in the core."""

import numpy as np
import pytest

import potqat
from potqat import _C

ISAS = potqat.cpu_info()["available"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 255, 256, 257, 4096, 10007])
def test_read_sees_every_byte(isa, size):
    before = potqat.cpu_info()["isa"]
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    words = np.zeros(-(-size // 8) * 8, np.uint8)
    words[:size] = data
    try:
        _C.set_isa(isa)
        assert _C.read(data) == _C.read(data, 3) == int(np.bitwise_xor.reduce(words.view(np.uint64)))
    finally:
        _C.set_isa(before)


def test_read_refuses_a_strided_array():
    with pytest.raises(ValueError, match="C-contiguous"):
        _C.read(np.zeros((4, 4))[:, ::2])


@pytest.mark.parametrize("isa", ISAS)
def test_peak_counts_multiply_adds(isa):
    once = _C.peak(isa, 1)
    assert once > 0
    assert _C.peak(isa, 7) == 7 * once
    assert _C.peak(isa, 0) == 0


def test_peak_of_an_absent_instruction_set():
    with pytest.raises(ValueError, match=r"'sse9' is not available here; available: .*scalar"):
        _C.peak("sse9", 1)
