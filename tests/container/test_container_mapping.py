"""Good files: found as safetensors finds them, mapped and not copied."""

import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from container_files import TENSORS, agrees_with_safetensors, assemble, take_apart

from potqat.container import DTYPES, WEIGHTS, PoTFormatError, map_tensors, open_folder


def test_a_good_file_is_what_was_saved(folder):
    stored = open_folder(folder)
    assert {name: item.shape for name, item in stored.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert {item.file for item in stored.values()} == {folder / WEIGHTS}
    agrees_with_safetensors(stored)
    for name, tensor in map_tensors(stored).items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_any_order_in_the_header_and_empty_tensors_anywhere(folder):
    file = folder / WEIGHTS
    entries, data = take_apart(file.read_bytes())
    for begin in (0, 8, len(data)):
        entries[f"empty.{begin}"] = {"dtype": "U8", "shape": [0, 3], "data_offsets": [begin, begin]}
    file.write_bytes(assemble(dict(sorted(entries.items(), reverse=True)), data))
    stored = open_folder(folder)
    assert len(stored) == len(TENSORS) + 3
    agrees_with_safetensors(stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_the_folder_as_text(tmp_path, dtype):
    tensor = torch.ones(2, 3).to(DTYPES[dtype])
    safetensors.torch.save_file({"x": tensor}, tmp_path / WEIGHTS)
    stored = open_folder(str(tmp_path))
    assert stored["x"].dtype == dtype
    assert torch.equal(map_tensors(stored)["x"], tensor)


# ---- Mapping ------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_tensors_are_mapped_and_not_copied(tmp_path):
    size = 200 * 2**20
    file = tmp_path / WEIGHTS
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file.write_bytes(assemble(header, b""))
    os.truncate(file, 8 + len(header) + size)
    before = resident_bytes()
    tensor = map_tensors(open_folder(tmp_path))["x"]
    assert resident_bytes() - before < 10 * 2**20
    mapped = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file)))
    begin, end = (int(address, 16) for address in mapped.split()[0].split("-"))
    assert begin <= tensor.data_ptr() < tensor.data_ptr() + size <= end
    assert not tensor.any()
    assert resident_bytes() - before > size // 2  # the measure sees pages that are touched
    tensor[:4096] = 1
    assert open_folder(tmp_path)["x"].shape == (size,)
    with open(file, "rb") as stream:
        stream.seek(8 + len(header))
        assert not any(stream.read(4096)), "writing to a mapped tensor must not change the file"


def test_tensors_at_odd_places_are_whole(tmp_path):
    """Another writer may put float32 anywhere; torch and the kernels read it from a multiple of four."""
    entries, data = {}, b""
    for name, tensor in (("byte", torch.tensor([5], dtype=torch.uint8)), *TENSORS.items()):
        bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = next(key for key, value in DTYPES.items() if value == tensor.dtype)
        offsets = [len(data), len(data) + len(bits)]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += bits
    (tmp_path / WEIGHTS).write_bytes(assemble(entries, data))
    stored = open_folder(tmp_path)
    assert any(item.begin % DTYPES[item.dtype].itemsize for item in stored.values())
    tensors = map_tensors(stored)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors.values())
    agrees_with_safetensors(stored)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: os.truncate(file, 100), "cannot be mapped: "),
        (lambda file: os.truncate(file, 0), "cannot be mapped: "),
        (lambda file: file.unlink(), "cannot be mapped: "),
        (lambda file: safetensors.torch.save_file({"step": TENSORS["step"]}, file), "cannot be mapped: File does not"),
        (
            lambda file: safetensors.torch.save_file(TENSORS | {"a.packed": torch.zeros(5)}, file),
            "a.packed: changed while it was being loaded",
        ),
        (
            lambda file: safetensors.torch.save_file(TENSORS | {"step": torch.tensor(7.0)}, file),
            "step: changed while it was being loaded",
        ),
    ],
    ids=["truncated", "emptied", "deleted", "fewer-tensors", "another-shape", "another-dtype"],
)
def test_files_that_change_between_check_and_mapping(folder, change, reason):
    stored = open_folder(folder)
    change(folder / WEIGHTS)
    with pytest.raises(PoTFormatError, match=re.escape(f"{folder / WEIGHTS}: ") + reason) as error:
        map_tensors(stored)
    assert "\n" not in str(error.value)
