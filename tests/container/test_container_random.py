"""Files damaged at random load as safetensors reads them or are refused."""

import struct
from pathlib import Path

import pytest
import safetensors.torch
from container_files import TENSORS, agrees_with_safetensors, assemble
from hypothesis import given, settings
from hypothesis import strategies as st

from potqat.container import WEIGHTS, PoTFormatError, open_folder


def refused_or_agrees(content: bytes, folder: Path) -> dict | None:
    (folder / WEIGHTS).write_bytes(content)
    try:
        stored = open_folder(folder)
    except PoTFormatError as error:
        refusal = str(error)
    else:
        agrees_with_safetensors(stored)
        return stored
    assert str(folder / WEIGHTS) in refusal
    return None


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    safetensors.torch.save_file(TENSORS, folder / WEIGHTS, {"format": "pt"})
    return folder, (folder / WEIGHTS).read_bytes()


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=3), st.integers(0, 2**16))
def test_flipped_and_cut_bytes_load_alike_or_are_refused(good, flips, cut):
    folder, content = good
    damaged = bytearray(content)
    for at, mask in flips:
        damaged[at % len(damaged)] ^= mask
    if cut <= len(damaged):
        del damaged[cut:]
    stored = refused_or_agrees(bytes(damaged), folder)
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    if len(damaged) == len(content) and damaged[:header_end] == content[:header_end]:
        assert {name: item.shape for name, item in stored.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}


PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\t", b"0", b"1", b"-1", b"-0", b"8", b"512", b"00",
    b"1e0", b"1.0", b"9223372036854775808", b"18446744073709551616", b"4294967296", b"null", b"true", b"NaN", b"{}",
    b"[]", b'""', b'"F32"', b'"U8"', b'"BOOL"', b'"step"', b'"shape"', b'"__metadata__":{},', b'"x":{},',
    b'"n":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', rb"\ud800", rb"\u0000", rb"\/", b"\xc3\xa9", b"\xff",
]  # fmt: skip


@settings(max_examples=1000)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 12), st.sampled_from(PIECES)), min_size=1, max_size=3))
def test_rewritten_headers_load_as_safetensors_reads_them_or_are_refused(good, edits):
    folder, content = good
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = content[8:end].rstrip()
    for at, length, piece in edits:
        at %= len(header)
        header = header[:at] + piece + header[at + length :]
    refused_or_agrees(assemble(header, content[end:]), folder)
