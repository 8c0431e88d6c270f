"""The finished layers of a calibration that was stopped: a folder with a file a layer, good for equal work only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from potqat.config import PoTConfig
from potqat.modules import PackedLinear
from potqat.report import Entry
from potqat.smooth import Smoothing

WORK = "work.txt"  # the hash of the work that the layers belong to
SMOOTHED = ".smoothed"  # ends the name of a file that holds a block's factors


def work_hash(model: nn.Module, cfg: PoTConfig, batches: Iterable[torch.Tensor]) -> str:
    """SHA-256 of all that decides the result: the settings, every weight, every token."""
    from potqat import __version__

    digest = hashlib.sha256(json.dumps([__version__, cfg.to_dict()], sort_keys=True).encode())
    for name, tensor in [*model.state_dict().items(), *((str(i), ids) for i, ids in enumerate(batches))]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Unfinished:
    """Layers kept in ``folder`` for work of hash ``work``; the folder is made for the first one.

    Raises:
        ValueError: the folder is there and holds other work, or something else.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, work: str):
        self.folder, self.work = folder, work
        if not folder.exists():
            return
        mark = folder / WORK
        if not folder.is_dir() or not mark.exists():
            raise ValueError(f"{folder}: not a folder of an unfinished calibration; name another one")
        if mark.read_text() != work:
            raise ValueError(
                f"{folder}: holds an unfinished calibration of another model, text or settings; delete it to start anew"
            )

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], Entry] | None:
        """{"packed", "scale"} and the entry of layer ``name``, or None if it is not finished."""
        file = self._file(name)
        if not file.exists():
            return None
        with safe_open(file, "pt") as opened:
            fields = json.loads(opened.metadata()["entry"])
            tensors = {key: opened.get_tensor(key) for key in ("packed", "scale")}
        return tensors, Entry(**fields | {"shape": tuple(fields["shape"])})

    def save(self, name: str, new: PackedLinear, entry: Entry) -> None:
        self._begin()
        tensors = {"packed": new.packed, "scale": new.scale.contiguous()}
        _write(self._file(name), lambda part: save_file(tensors, part, {"entry": json.dumps(asdict(entry))}))

    def load_smoothings(self) -> dict[str, list[Smoothing]]:
        """What smooth.smooth did to each block that it came to, by its name."""
        found = {}
        for file in sorted(self.folder.glob(f"*{SMOOTHED}")):
            with safe_open(file, "pt") as opened:
                places = json.loads(opened.metadata()["places"])
                found[file.name.removesuffix(SMOOTHED)] = [
                    Smoothing(maker, tuple(readers), opened.get_tensor(str(i)))
                    for i, (maker, readers) in enumerate(places)
                ]
        return found

    def save_smoothings(self, block: str, smoothings: list[Smoothing]) -> None:
        """To be called before the first layer of the block is saved."""
        self._begin()
        tensors = {str(i): smoothing.factors for i, smoothing in enumerate(smoothings)}
        places = {"places": json.dumps([(smoothing.maker, smoothing.readers) for smoothing in smoothings])}
        _write(self.folder / f"{block}{SMOOTHED}", lambda part: save_file(tensors, part, places))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            _write(self.folder / WORK, lambda part: part.write_text(self.work))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _write(file: Path, write) -> None:
    part = file.with_name(f"{file.name}.part")
    write(part)
    os.replace(part, file)
