"""Damaged files: refused before their data is read, quickly, and with the reason."""

import json
import re
import struct

import pytest
from container_files import assemble, refused, take_apart

from potqat import container
from potqat.container import WEIGHTS

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
