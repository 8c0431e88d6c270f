"""``_C.check_packed``: every code that no packer writes is found at its place; the layout is taken from potqat.h."""

import sys
import threading

import numpy as np
import pytest
import torch

import potqat
from potqat import _C, PoTConfig

GRIDS = ["pot4", "e2m1", "int4", "int8"]
SHAPES = [(1, 1), (2, 3), (16, 64), (16, 63), (15, 64), (17, 65), (18, 130), (3, 200)]


def packed(grid, n, k):
    cfg, w = PoTConfig(grid=grid), torch.randn(n, k)
    return potqat.pack(w, potqat.compute_scale(w, cfg), cfg).numpy()


def codes(grid, data):
    """(index of the byte, shift, output, input) of every code, padding included, as potqat.h specifies."""
    _, columns, tile_bytes = data.shape
    for i in range(data.size):
        tile, line, byte = i // tile_bytes, i % tile_bytes // 64, i % 64
        output, first = tile // columns * 16 + byte // 4, tile % columns * 64 + byte % 4
        if grid == "int8":
            yield i, 0, output, first + 4 * line
        else:
            yield i, 0, output, first + 8 * line
            yield i, 4, output, first + 8 * line + 4


def refused(data, grid, n, k):
    """What check_packed says, None if it passes; a bare try, as pytest.raises takes longer than the check."""
    try:
        _C.check_packed(data, grid, n, k)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_damaged_code_is_found_at_its_place(grid, shape):
    n, k = shape
    data = packed(grid, n, k)
    flat, bits = data.reshape(-1), 8 if grid == "int8" else 4
    minus_zero, mask = 1 << (bits - 1), (1 << bits) - 1
    _C.check_packed(data, grid, n, k)
    for i, shift, output, input in codes(grid, data):
        before = flat[i]
        inside = output < n and input < k
        values = (minus_zero,) if inside else (1, minus_zero)
        what = f"output {output}, input {input} is"
        expected = f"code of {what} minus zero" if inside else f"padding at {what} not zero"
        for value in values:
            flat[i] = before & ~np.uint8(mask << shift) | value << shift
            assert refused(data, grid, n, k) == expected
        flat[i] = before
    _C.check_packed(data, grid, n, k)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_other_code_passes_beside_every_other(grid):
    """No byte without minus zero is refused in a whole tile, nor any that has one let through."""
    for byte in range(256):
        bad = byte == 0x80 if grid == "int8" else 8 in (byte & 15, byte >> 4)
        for at in (0, 7, 8, 300, 511):
            for around in (0x77, 0x01, 0xFF, 0x7F):
                data = np.full((1, 1, 1024 if grid == "int8" else 512), around, np.uint8)
                data[0, 0, at] = byte
                assert (refused(data, grid, 16, 64) is not None) == bad


@pytest.mark.parametrize("grid", GRIDS)
def test_every_nonzero_padding_is_found(grid):
    data = packed(grid, 1, 1)
    flat, bits = data.reshape(-1), 8 if grid == "int8" else 4
    for i, shift, output, input in codes(grid, data):
        if (output, input) == (0, 0) or (bits == 8 and i % 5):  # a fifth of the 261,120 cases of int8
            continue
        before = flat[i]
        for value in range(1, 1 << bits):
            flat[i] = before | value << shift
            assert refused(data, grid, 1, 1) == f"padding at output {output}, input {input} is not zero"
        flat[i] = before


def test_the_first_of_many_is_named():
    data = packed("pot4", 40, 200)
    places = {(output, input): (i, shift) for i, shift, output, input in codes("pot4", data)}
    flat = data.reshape(-1)
    for place in [(39, 0), (20, 199), (20, 7), (17, 230), (47, 1)]:
        i, shift = places[place]
        flat[i] = flat[i] & (0xF0 >> shift) | 8 << shift
    assert refused(data, "pot4", 40, 200) == "padding at output 17, input 230 is not zero"


def test_empty_weights_pass():
    _C.check_packed(np.empty((0, 2, 512), np.uint8), "pot4", 0, 100)
    _C.check_packed(np.empty((2, 0, 512), np.uint8), "pot4", 20, 0)


@pytest.mark.parametrize(
    ("data", "grid", "n", "k", "message"),
    [
        (np.zeros((1, 1, 512), np.int8), "pot4", 16, 64, r"C-contiguous uint8 \[1, 1, 512\] for a pot4 weight"),
        (np.zeros((1, 1, 1024), np.uint8)[:, :, ::2], "pot4", 16, 64, "C-contiguous"),
        (np.zeros((1, 1, 512), np.uint8), "pot4", 17, 64, r"uint8 \[2, 1, 512\] for a pot4 weight \[17, 64\]"),
        (np.zeros((1, 1, 512), np.uint8), "int8", 16, 64, r"uint8 \[1, 1, 1024\]"),
        (np.zeros(512, np.uint8), "pot4", 16, 64, r"uint8 \[1, 1, 512\]"),
        (np.zeros((1, 1, 512), np.uint8), "pot4", -1, 64, "out_features must be at least 0"),
        (np.zeros((1, 1, 512), np.uint8), "pot4", 16, 131072, "in_features 0 to 131071"),
        (np.zeros((1, 1, 512), np.uint8), "pot4", sys.maxsize, 64, "uint8"),
        (np.zeros((1, 1, 512), np.uint8), "pot(7)", 16, 64, "fake-quantization only"),
        (np.zeros((1, 1, 512), np.uint8), "pot5", 16, 64, "unknown grid"),
    ],
)
def test_wrong_arguments_are_refused(data, grid, n, k, message):
    with pytest.raises(ValueError, match=message):
        _C.check_packed(data, grid, n, k)


def test_other_threads_run_meanwhile():
    data, go, ran = np.zeros((1024, 64, 512), np.uint8), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: go.wait() and ran.set())
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody takes the interpreter's lock away: the thread runs if check_packed lets go
    try:
        go.set()
        for _ in range(100):
            _C.check_packed(data, "pot4", 16384, 4096)
            if ran.is_set():
                break
        assert ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
