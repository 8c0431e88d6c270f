"""The safetensors files of a folder: damaged ones are refused before their data is read, good ones are mapped."""

import json
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from potqat import container
from potqat.container import DTYPES, INDEX, WEIGHTS, PoTFormatError, map_tensors, open_folder

TENSORS = {
    "a.scale": torch.tensor([[0.5, 0.25]]),
    "a.packed": torch.arange(256, dtype=torch.uint8).repeat(2).reshape(1, 1, 512),
    "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(7),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / WEIGHTS, {"format": "pt"})
    return tmp_path


def assemble(header: bytes | dict, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def take_apart(content: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def agrees_with_safetensors(stored):
    """The library reads the same names, dtypes and shapes, and its tensors are the bytes where we found them."""
    tensors = map_tensors(stored)
    assert list(tensors) == list(stored)
    for file in {item.file for item in stored.values()}:
        content = file.read_bytes()
        with safe_open(file, "pt") as handle:
            assert set(handle.keys()) == {item.name for item in stored.values() if item.file == file}
            for item in (item for item in stored.values() if item.file == file):
                found = handle.get_slice(item.name)
                assert (found.get_dtype(), tuple(found.get_shape())) == (item.dtype, item.shape)
                tensor = tensors[item.name]
                assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[item.dtype], item.shape)
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content[item.begin : item.end]


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


# ---- Malformed files: damage -> (tensor to blame or None, reason) -------------------------------------------


def header(change):
    """Damage by a change of the parsed header; the data stays."""

    def damage(content):
        entries, data = take_apart(content)
        return assemble(change(entries) or entries, data)

    return damage


def entry(name, **fields):
    return header(lambda entries: entries[name].update(fields))


def text(old, new):
    """Damage by a replacement in the header's text, its length kept right."""

    def damage(content):
        entries, data = take_apart(content)
        before = json.dumps(entries).encode()
        assert old in before
        return assemble(before.replace(old, new, 1), data)

    return damage


def renamed(name):
    return header(lambda entries: {name if key == "step" else key: value for key, value in entries.items()})


def moved(name, begin, end):
    return entry(name, data_offsets=[begin, end])


PREFIX = [
    ("empty file", lambda c: b"", None, "0 bytes, too short"),
    ("seven bytes", lambda c: c[:7], None, "7 bytes, too short"),
    ("length alone", lambda c: c[:8], None, "claims a header of"),
    ("no header", lambda c: assemble(b"", b"x" * 99), None, "claims a header of 0 bytes"),
    ("header past the end", lambda c: assemble(c[8:108], b"", length=101), None, "claims a header of 101 bytes"),
    ("header of 2^63", lambda c: assemble(c[8:108], b"", length=2**63), None, "claims a header of 9223372036854775808"),
    ("header of 2^64 - 1", lambda c: assemble(c[8:108], b"", length=2**64 - 1), None, "claims a header of 1844674407"),
    ("header of 1 GB", lambda c: assemble(c[8:108], b"", length=10**9), None, "claims a header of 1000000000"),
    ("big-endian length", lambda c: c[:8][::-1] + c[8:], None, "claims a header of"),
    ("truncated in the header", lambda c: c[:50], None, "claims a header of"),
    ("text file", lambda c: b"version https://git-lfs.github.com/spec/v1\n", None, "claims a header of"),
    ("not an object", lambda c: assemble(b"[1, 2]", b""), None, r"the header starts with b'\[1, 2\]'"),
    ("space first", lambda c: assemble(b" {}", b""), None, "the header starts with b' {}'"),
    ("byte order mark", lambda c: assemble(b"\xef\xbb\xbf{}", b""), None, "the header starts with"),
    ("not UTF-8", text(b'"step"', b'"st\xffp"'), None, "'utf-8' codec can't decode byte 0xff"),
    ("UTF-16", lambda c: assemble("{}".encode("utf-16-le"), b""), None, "bad JSON"),
    ("cut JSON", lambda c: assemble(b'{"a": {"dtype"', b""), None, "bad JSON: Expecting ':'"),
    ("two objects", lambda c: assemble(b"{} {}", b""), None, "bad JSON: Extra data"),
    ("NUL after the object", lambda c: assemble(b"{}\0", b""), None, "bad JSON: Extra data"),
    ("raw control character", text(b'"step"', b'"st\x01p"'), None, "bad JSON: Invalid control character"),
    ("nested lists", lambda c: assemble(b'{"a":' + b"[" * 10**6, b""), None, "bad JSON: "),
    ("nested objects", lambda c: assemble(b'{"a":' * 10**5, b""), None, "bad JSON: "),
    ("nested metadata", text(b'"pt"', b"[" * 900 + b"]" * 900), None, "__metadata__ must be an object of strings"),
    ("same tensor twice", text(b'"step":', b'"a.scale":'), "a.scale", "is there twice"),
    ("same key twice", text(b'"shape": [3]', b'"shape": [3], "shape": [3]'), None, "bad JSON: shape is there twice"),
    ("metadata twice", text(b'"step":', b'"__metadata__":'), None, "bad JSON: __metadata__ is there twice"),
    ("metadata null", text(b'{"format": "pt"}', b"null"), None, "__metadata__ must be an object of strings, got None"),
    ("metadata list", text(b'{"format": "pt"}', b'["pt"]'), None, "__metadata__ must be an object of strings"),
    ("metadata number", text(b'"pt"', b"1"), None, "__metadata__ must be an object of strings, got {'format': 1}"),
    ("metadata long number", text(b'"pt"', b"1" * 30), None, "__metadata__ must be an object of strings"),
    ("metadata nested", text(b'"pt"', b'{"a": "b"}'), None, "__metadata__ must be an object of strings"),
    ("metadata surrogate", text(b'"pt"', rb'"\ud800"'), None, "__metadata__ must be an object of strings"),
]
ENTRIES = [
    ("entry null", header(lambda e: e | {"step": None}), "step", "needs dtype, shape and data_offsets .*, got None"),
    ("entry list", header(lambda e: e | {"step": ["I64", [], [0, 8]]}), "step", "needs dtype, shape and data_offsets"),
    ("no shape", header(lambda e: e["step"].pop("shape") and None), "step", r"got \['dtype', 'data_offsets'\]"),
    ("extra key", entry("step", stride=[1]), "step", "nothing else, got .*'stride'"),
    ("unknown dtype", entry("step", dtype="Q64"), "step", "dtype must be one of F64, .*, got 'Q64'"),
    ("dtype of another case", entry("step", dtype="i64"), "step", "dtype must be one of"),
    ("8-bit float", entry("a.packed", dtype="F8_E4M3"), "a.packed", "dtype must be one of .*, got 'F8_E4M3'"),
    ("4-bit float", entry("a.packed", dtype="F4"), "a.packed", "dtype must be one of"),
    ("dtype number", entry("step", dtype=3), "step", "dtype must be one of .*, got 3"),
    ("dtype list", entry("step", dtype=["I64"]), "step", "dtype must be one of"),
    ("endless dtype", entry("step", dtype="F" * 10**6), "step", "dtype must be one of .*, got 'FFF"),
    ("shape string", entry("a.scale", shape="12"), "a.scale", "shape must be at most 8 integers"),
    ("negative size", entry("a.scale", shape=[-1, -2]), "a.scale", r"shape must be .*, got \[-1, -2\]"),
    ("float size", entry("a.scale", shape=[1.0, 2]), "a.scale", r"shape must be .*, got \[1.0, 2\]"),
    ("bool size", entry("a.scale", shape=[True, 2]), "a.scale", r"shape must be .*, got \[True, 2\]"),
    ("minus zero size", text(b"[0, 4]", b"[-0, 4]"), "empty", r"shape must be .*, got \[-0.0, 4\]"),
    ("not a number size", text(b"[0, 4]", b"[NaN, 4]"), "empty", r"shape must be .*, got \[nan, 4\]"),
    ("size of 10^5 digits", text(b"[1, 2]", b"[1, " + b"9" * 10**5 + b"]"), "a.scale", r"shape must be .*\[1, inf\]"),
    ("nine dimensions", entry("a.scale", shape=[1] * 8 + [2]), "a.scale", "shape must be at most 8 integers"),
    ("10^5 dimensions", entry("a.scale", shape=[1] * 10**5), "a.scale", "shape must be at most 8 integers"),
    ("product of 2^64", entry("a.scale", shape=[2**32, 2**32]), "a.scale", "overflows 64 bits"),
    ("product that wraps to 8", entry("a.scale", shape=[2**61 + 1, 2]), "a.scale", "overflows 64 bits"),
    ("product of 2^63", entry("a.packed", shape=[2**31, 2**31, 2]), "a.packed", "overflows 64 bits"),
    ("empty with wild strides", entry("empty", shape=[0, 2**62, 2]), "empty", "overflows 64 bits"),
    (
        "a lying shape",
        entry("a.packed", shape=[2, 2, 512]),
        "a.packed",
        r"takes 2048 bytes, its data_offsets .* span 512",
    ),
    ("a lying dtype", entry("a.packed", dtype="F32"), "a.packed", "takes 2048 bytes, .* span 512"),
    ("a shape too small", entry("a.packed", shape=[1, 1, 511]), "a.packed", "takes 511 bytes, .* span 512"),
    ("half a terabyte", entry("a.packed", shape=[2**39]), "a.packed", "takes 549755813888 bytes, .* span 512"),
    ("one offset", entry("step", data_offsets=[0]), "step", "data_offsets must be"),
    ("three offsets", entry("step", data_offsets=[0, 8, 8]), "step", "data_offsets must be"),
    ("offsets swapped", moved("step", 8, 0), "step", r"data_offsets must be .*, got \[8, 0\]"),
    ("negative offset", moved("step", -8, 0), "step", r"data_offsets must be .*, got \[-8, 0\]"),
    ("float offset", entry("step", data_offsets=[0.0, 8.0]), "step", "data_offsets must be"),
    ("huge offsets", moved("step", 2**62, 2**62 + 8), "step", "ends at byte 4611686018427"),
    ("offset of 2^64", moved("step", 2**64, 2**64 + 8), "step", "data_offsets must be"),
    ("end past the file", moved("a.packed", 24, 536), "a.packed", "ends at byte .*; the file was truncated"),
    ("truncated data", lambda c: c[:-1], "a.packed", "ends at byte .*; the file was truncated"),
    ("data cut off", lambda c: c[:-534], "step", "ends at byte .*; the file was truncated"),
    ("overlap", moved("a.packed", 20, 532), "a.packed", "overlaps the tensor before it by 2 bytes"),
    ("same place twice", moved("a.scale", 0, 8), r"(a\.scale|step)", "overlaps the tensor before it by 8 bytes"),
    ("empty inside another", moved("empty", 4, 4), "empty", "overlaps the tensor before it by 4 bytes"),
    ("hole", header(lambda e: e.pop("step") and None), r"\S+", "8 bytes before it belong to no tensor"),
    ("trailing byte", lambda c: c + b"\0", None, "1 bytes after the last tensor"),
    ("a second file behind", lambda c: c + c, None, "bytes after the last tensor"),
    ("data without tensors", lambda c: assemble(b"{}", b"1234"), None, "4 bytes after the last tensor"),
    ("no name", renamed(""), "''", "a name is 1 to 1024 bytes"),
    ("long name", renamed("n" * 1025), "'nnn\\S+", "a name is 1 to 1024 bytes"),
    ("long name in bytes", renamed("\u20ac" * 342), "\u20ac+", "a name is 1 to 1024 bytes"),
    ("endless name", renamed("n" * 10**6), "'nnn\\S+", "a name is 1 to 1024 bytes"),
    ("surrogate name", text(b'"step"', rb'"\ud800"'), r"'\\ud800'", "a name is 1 to 1024 bytes of Unicode"),
    ("NUL in a name", renamed("a\0b"), r"'a\\x00b'", "a name has no NUL"),
    ("parent in a name", renamed("../x"), r"\.\./x", "a name has no NUL, '..'"),
    ("absolute name", renamed("/etc/x"), "/etc/x", "a name has no NUL, '..' or backslash and starts with no '/'"),
    ("backslash in a name", renamed("a\\b"), r"a\\b", "a name has no NUL, '..' or backslash"),
    ("terminal escapes in a name", renamed("\x1b[2Jx\0"), r"'\\x1b\[2Jx\\x00'", "a name has no NUL"),
]


def refused(folder: Path, memory: int | None = None) -> str:
    """The reason, found quickly and in at most ``memory`` bytes: by default what JSON of that size takes in Python."""
    if memory is None:
        memory = 2**20 + 24 * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(PoTFormatError) as error:
            open_folder(folder)
        assert time.process_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize(("damage", "tensor", "reason"), [c[1:] for c in PREFIX + ENTRIES],
                         ids=[c[0].replace(" ", "-") for c in PREFIX + ENTRIES])  # fmt: skip
def test_malformed_files_are_refused(folder, damage, tensor, reason):
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    where = re.escape(f"{file}: ") + (f"(bad JSON: )?{tensor}:? " if tensor else "")
    assert re.match(f"{where}.*{reason}", refused(folder))


def test_a_million_tensors_are_too_many(tmp_path):
    one = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"%d":%s' % (i, one) for i in range(container.MAX_TENSORS + 3)) + b"}"
    (tmp_path / WEIGHTS).write_bytes(assemble(text, b""))
    assert "more than 1,000,000 tensors" in refused(tmp_path, memory=len(text) + 2**20)


def test_a_header_of_lists_is_not_built_up(tmp_path):
    text = b'{"a":[' + b"[]," * 10**7 + b"[]]}"
    (tmp_path / WEIGHTS).write_bytes(assemble(text, b""))
    assert "more than 1,000,000 tensors" in refused(tmp_path, memory=len(text) + 2**20)


def test_a_header_over_safetensors_limit(tmp_path):
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(200_000_000)  # a sparse file: the header would fit
    assert "claims a header of 100000001 bytes" in refused(tmp_path, memory=2**20)


# ---- Folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index, and a way to change the index."""
    names = list(TENSORS)
    shards = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for shard, held in shards.items():
        safetensors.torch.save_file({name: TENSORS[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}

    def write(change=lambda weight_map: None):
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": change(weight_map) or weight_map}))
        return tmp_path

    write()
    return write


def test_shards(sharded):
    stored = open_folder(sharded())
    assert {item.file.name for item in stored.values()} == {"one.safetensors", "two.safetensors"}
    agrees_with_safetensors(stored)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in map_tensors(stored).items())


def shard(name):
    return lambda weight_map: weight_map | {"step": name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.pop("step") and None, "two.safetensors: step: not in model.safetensors.index.json"),
        (lambda m: m.update(new="two.safetensors"), "two.safetensors: new: missing, though"),
        (lambda m: m.update({"a.scale": "two.safetensors"}), "two.safetensors: a.scale: missing, though"),
        (shard("three.safetensors"), "three.safetensors: missing, or not a regular file"),
        (shard("../one.safetensors"), "index.json: '../one.safetensors' is not the plain name"),
        (shard("sub/one.safetensors"), "index.json: 'sub/one.safetensors' is not the plain name"),
        (shard("sub\\one.safetensors"), "is not the plain name"),
        (shard("/etc/passwd"), "index.json: '/etc/passwd' is not the plain name"),
        (shard("..safetensors"), "is not the plain name"),
        (shard("one.safetensors\0"), "is not the plain name"),
        (shard("one.bin"), "index.json: 'one.bin' is not the plain name of a .safetensors file"),
        (shard("n" * 10**6 + ".safetensors"), "is not the plain name"),
        (shard("n" * 300 + ".safetensors"), "missing, or not a regular file"),
        (shard(3), "weight_map must be an object of tensor name -> file name"),
        (shard(None), "weight_map must be an object"),
        (lambda m: list(m), "weight_map must be an object"),
        (lambda m: m.clear(), "weight_map must be an object .*, not empty"),
    ],
)
def test_wrong_indexes_are_refused(sharded, change, reason):
    assert re.search(reason, refused(sharded(change)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "bad JSON: Expecting value"),
        (b"[]", "weight_map must be an object"),
        (b"{}", "weight_map must be an object"),
        (b"\xff\xfe", "bad JSON: 'utf-8' codec"),
        (b"[" * 10**6, "bad JSON: "),
        (b'{"weight_map": {"step": "two.safetensors", "step": "one.safetensors"}}', "bad JSON: step is there twice"),
    ],
)
def test_broken_indexes_are_refused(sharded, content, reason):
    folder = sharded()
    (folder / INDEX).write_bytes(content)
    assert re.search(f"{INDEX}: {reason}", refused(folder))


def test_an_index_over_the_limit_is_not_read(sharded):
    folder = sharded()
    os.truncate(folder / INDEX, 10**11)  # sparse
    assert "index.json: 100000000000 bytes, 100,000,000 are the most" in refused(folder, memory=2**20)


def test_a_tensor_in_two_shards(sharded):
    folder = sharded()
    safetensors.torch.save_file({n: TENSORS[n] for n in ("step", "empty", "a.scale")}, folder / "two.safetensors")
    assert "two.safetensors: a.scale: also in one.safetensors" in refused(folder)


def test_the_limit_holds_for_all_shards_together(sharded, monkeypatch):
    monkeypatch.setattr(container, "MAX_TENSORS", len(TENSORS))
    assert len(open_folder(sharded())) == len(TENSORS)
    monkeypatch.setattr(container, "MAX_TENSORS", len(TENSORS) - 1)
    assert f"{sharded()}: 5 tensors, 4 are the most" in refused(sharded())


def test_a_damaged_shard_is_named(sharded):
    folder = sharded()
    os.truncate(folder / "two.safetensors", 100)
    assert f"{folder / 'two.safetensors'}: " in refused(folder)


def test_a_file_and_an_index_are_never_both_taken(sharded):
    folder = sharded()
    safetensors.torch.save_file(TENSORS, folder / WEIGHTS)
    assert f"{folder}: holds both {WEIGHTS} and {INDEX}" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_read(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    assert f"{tmp_path / name}: potqat never reads pickles" in refused(tmp_path)


def test_no_folder(folder, tmp_path_factory):
    with pytest.raises(NotADirectoryError, match="not a folder; give the folder that holds"):
        open_folder(folder / WEIGHTS)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_folder(folder / "missing")
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        open_folder(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere"),
                                  lambda file: file.symlink_to(file.name)],
                         ids=["folder", "pipe", "dangling-link", "link-to-itself"])  # fmt: skip
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / WEIGHTS)
    assert "missing, or not a regular file" in refused(tmp_path)


def test_links_stay_inside_the_folder(folder, sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / WEIGHTS).rename(outside / WEIGHTS)
    (folder / "one.safetensors").rename(outside / "one.safetensors")
    (folder / "one.safetensors").symlink_to(outside / "one.safetensors")
    assert f"one.safetensors: a link to {outside / 'one.safetensors'}, outside its folder" in refused(folder)
    (folder / "one.safetensors").unlink()
    (folder / "kept").mkdir()
    (outside / "one.safetensors").rename(folder / "kept" / "real")
    (folder / "one.safetensors").symlink_to("kept/real")
    assert len(open_folder(folder)) == len(TENSORS)
    (folder / INDEX).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    assert "outside its folder" in refused(folder)


def test_the_layout_of_the_hub_cache(folder, tmp_path_factory):
    """huggingface_hub keeps files in <repository>/blobs and links to them from <repository>/snapshots/<revision>."""
    repository = tmp_path_factory.mktemp("models--a--b")
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / WEIGHTS).rename(blobs / "cafe")
    (snapshot / WEIGHTS).symlink_to("../../blobs/cafe")
    agrees_with_safetensors(open_folder(snapshot))
    (blobs / "cafe").rename(repository / "cafe")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../cafe")
    assert "outside its folder" in refused(snapshot)


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


# ---- Random damage ------------------------------------------------------------------------------------------


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
