"""The safetensors files of a folder: what they hold, checked in full before a byte of tensor data is read, and mapped.

A file is the header's length (8 bytes, little-endian), the header (a JSON object: tensor name -> dtype, shape,
data_offsets, and optionally ``__metadata__``, strings), then the tensors' bytes without a gap. safetensors' own reader
(https://github.com/huggingface/safetensors, "Format") passes over duplicate names, unknown keys and odd names, and its
errors name neither file nor tensor; what this one accepts, that one accepts too. docs/format.md lists the refusals.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names of the dtypes that torch computes in; 8-bit floats, complex and unsigned words are refused.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_JSON_BYTES = 100_000_000  # safetensors' own limit of a header
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 1024
MAX_RANK = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_JSON_INTEGER_DIGITS = 19  # what every 64-bit integer fits

_brief = reprlib.Repr()  # values from a file in a message: short, whatever they are
_brief.maxstring = _brief.maxother = 80
_brief.maxlist = _brief.maxdict = MAX_RANK


class PoTFormatError(ValueError):
    """A file that is not a potqat checkpoint, or one that cannot be trusted; names the file, the tensor, the reason."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: ``dtype`` is a key of DTYPES, its bytes are ``[begin, end)`` of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def open_folder(folder: str | os.PathLike) -> dict[str, Stored]:
    """Every tensor of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Reads and checks headers only; time and memory are linear in their size.

    Raises:
        FileNotFoundError: no such folder, or neither file in it.
        NotADirectoryError: ``folder`` is a file.
        PoTFormatError: both files, a pickle instead, a link out of the folder, or a file that cannot be trusted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{folder}: not a folder; give the folder that holds {WEIGHTS}")
        raise FileNotFoundError(f"{folder}: no such folder")
    weights, index = folder / WEIGHTS, folder / INDEX
    if os.path.lexists(weights) and os.path.lexists(index):
        raise PoTFormatError(f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if os.path.lexists(weights):
        _check_place(folder, weights)
        stored = _read_file(weights)
    elif os.path.lexists(index):
        _check_place(folder, index)
        stored = _read_shards(folder, index)
    else:
        for file in sorted(folder.iterdir()):
            if file.suffix in _PICKLES:
                raise PoTFormatError(f"{file}: potqat never reads pickles, they can run code; convert it to {WEIGHTS}")
        raise FileNotFoundError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    if len(stored) > MAX_TENSORS:
        raise PoTFormatError(f"{folder}: {len(stored)} tensors, {MAX_TENSORS:,} are the most")
    return stored


def map_tensors(stored: dict[str, Stored]) -> dict[str, torch.Tensor]:
    """The tensors themselves, memory-mapped: pages are read when touched, and writing to one changes no file.

    A tensor whose place is no multiple of its item size (safetensors' writer makes none) is copied instead: torch
    and the kernels read whole numbers. Codes are bytes and are never copied. The files must keep their length as long
    as the tensors are used; to change one, write another beside it and rename.

    Raises:
        PoTFormatError: a file is no longer what ``open_folder`` saw.
    """
    files: dict[Path, list[Stored]] = {}
    for item in stored.values():
        files.setdefault(item.file, []).append(item)
    tensors = {}
    for file, items in files.items():
        try:
            with safetensors.safe_open(file, "pt") as handle:
                for item in items:
                    found = handle.get_slice(item.name)
                    if (found.get_dtype(), tuple(found.get_shape())) != (item.dtype, item.shape):
                        raise PoTFormatError(f"{file}: {item.name}: changed while it was being loaded")
                    tensor = handle.get_tensor(item.name)
                    tensors[item.name] = _aligned_copy(tensor) if item.begin % tensor.itemsize else tensor
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            raise PoTFormatError(f"{file}: cannot be mapped: {str(error).partition(chr(10))[0]}") from None
    return {name: tensors[name] for name in stored}


def _aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8).clone().view(tensor.dtype).reshape(tensor.shape)


# ---- Which files --------------------------------------------------------------------------------------------


def _check_place(folder: Path, file: Path) -> None:
    """Refuse all but regular files inside the folder; in Hugging Face's cache they are links to ../../blobs."""
    if not os.path.isfile(file):
        raise PoTFormatError(f"{file}: missing, or not a regular file")
    home, target = folder.resolve(), Path(os.path.realpath(file))
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in homes):
        raise PoTFormatError(f"{file}: a link to {target}, outside its folder; put the file itself there")


def _read_shards(folder: Path, index: Path) -> dict[str, Stored]:
    parsed = read_json(index)
    shards = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(shards, dict) or not shards or not all(_is_text(shard) for shard in shards.values()):
        raise PoTFormatError(f"{index}: weight_map must be an object of tensor name -> file name, not empty")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        plain = len(shard) <= MAX_NAME_BYTES and not any(part in shard for part in ("/", "\\", "..", "\0"))
        if not plain or not shard.endswith(".safetensors"):
            raise PoTFormatError(f"{index}: {_brief.repr(shard)} is not the plain name of a .safetensors file")
        file = folder / shard
        _check_place(folder, file)
        for name, item in _read_file(file).items():
            if name in stored:
                raise PoTFormatError(f"{file}: {_shown(name)}: also in {stored[name].file.name}")
            if name not in shards:
                raise PoTFormatError(f"{file}: {_shown(name)}: not in {INDEX}")
            stored[name] = item
    for name, shard in shards.items():
        if name not in stored or stored[name].file.name != shard:
            raise PoTFormatError(f"{folder / shard}: {_shown(name)}: missing, though {INDEX} puts it there")
    return stored


# ---- One file -----------------------------------------------------------------------------------------------


def _read_file(file: Path) -> dict[str, Stored]:
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise PoTFormatError(f"{file}: {len(prefix)} bytes, too short to be a safetensors file")
        length = int.from_bytes(prefix, "little")
        if not 0 < length <= min(MAX_JSON_BYTES, size - 8):
            raise PoTFormatError(
                f"{file}: claims a header of {length} bytes; the file has {size}, and {MAX_JSON_BYTES:,} are the most"
            )
        header = stream.read(length)
    if not header.startswith(b"{"):
        raise PoTFormatError(f"{file}: the header starts with {_brief.repr(header[:8])}, not with an object")
    # Each tensor takes one { and two [ : counted first, a header full of them is never built up in memory.
    if header.count(b"{") > MAX_TENSORS + 2 or header.count(b"[") > 2 * MAX_TENSORS:
        raise PoTFormatError(f"{file}: more than {MAX_TENSORS:,} tensors")
    entries = _parse_json(file, header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(text) for pair in metadata.items() for text in pair):
        raise PoTFormatError(f"{file}: __metadata__ must be an object of strings, got {_brief.repr(metadata)}")
    stored = {name: _read_entry(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    at = 8 + length
    for item in sorted(stored.values(), key=lambda item: (item.begin, item.end)):
        if item.begin < at:
            raise PoTFormatError(f"{file}: {item.name}: overlaps the tensor before it by {at - item.begin} bytes")
        if item.begin > at:
            raise PoTFormatError(f"{file}: {item.name}: {item.begin - at} bytes before it belong to no tensor")
        at = item.end
    if at != size:
        raise PoTFormatError(f"{file}: {size - at} bytes after the last tensor")
    return stored


def _read_entry(file: Path, name: str, entry: Any, data: int, size: int) -> Stored:
    where = f"{file}: {_shown(name)}"
    if not _is_text(name) or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise PoTFormatError(f"{where}: a name is 1 to {MAX_NAME_BYTES} bytes of Unicode")
    if name.startswith("/") or any(part in name for part in ("\0", "..", "\\")):
        raise PoTFormatError(f"{where}: a name has no NUL, '..' or backslash and starts with no '/'")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        found = list(entry) if isinstance(entry, dict) else entry
        raise PoTFormatError(f"{where}: needs dtype, shape and data_offsets and nothing else, got {_brief.repr(found)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PoTFormatError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {_brief.repr(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise PoTFormatError(f"{where}: shape must be at most {MAX_RANK} integers >= 0, got {_brief.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise PoTFormatError(f"{where}: data_offsets must be [begin, end], begin <= end, got {_brief.repr(offsets)}")
    item_bytes = DTYPES[dtype].itemsize
    if math.prod(max(dim, 1) for dim in shape) * item_bytes >= 2**63:  # an empty tensor has strides too
        raise PoTFormatError(f"{where}: {dtype} {shape} overflows 64 bits")
    begin, end = offsets
    if math.prod(shape) * item_bytes != end - begin:
        raise PoTFormatError(
            f"{where}: {dtype} {shape} takes {math.prod(shape) * item_bytes} bytes, its data_offsets {offsets} span "
            f"{end - begin}"
        )
    if data + end > size:
        raise PoTFormatError(f"{where}: ends at byte {data + end} of {size}; the file was truncated: copy it again")
    return Stored(name, file, dtype, tuple(shape), data + begin, data + end)


# ---- JSON from strangers ------------------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        PoTFormatError: over 100 MB, not UTF-8 or JSON, nested too deep, or a key that is there twice.
    """
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise PoTFormatError(f"{file}: {size} bytes, {MAX_JSON_BYTES:,} are the most")
    return _parse_json(file, file.read_bytes())


def _parse_json(file: Path, content: bytes) -> Any:
    try:
        return json.loads(content.decode(), object_pairs_hook=_distinct, parse_int=_integer)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise PoTFormatError(f"{file}: bad JSON: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{_shown(twice)} is there twice")
    return fields


def _integer(digits: str) -> int | float:
    # As safetensors reads them, and in linear time: what is not a 64-bit integer is a float, which no field takes.
    return int(digits) if len(digits) <= _JSON_INTEGER_DIGITS and digits != "-0" else float(digits)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_text(value: Any) -> bool:
    """A string without lone surrogates, which JSON can spell and UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    return name if name.isprintable() and 0 < len(name) <= MAX_NAME_BYTES else _brief.repr(name)
