"""What kernels.py and decode.py share: a quiet start, and results that a long run writes in pieces."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import potqat
from potqat.flows.doctor import installed

RESULTS = Path(__file__).parent / "results"


def start(isa: str | None, name: str | None, kind: str) -> Path:
    """Use an instruction set (None: the best) and silence what other libraries say; returns the file of the results,
    called ``name`` or by kind and instruction set.

    Raises:
        ValueError: the instruction set is not available.
    """
    warnings.simplefilter("ignore")  # torch and torchao deprecate what is timed here
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if isa:
        potqat.set_isa(isa)
    return RESULTS / f"{name or kind + '_' + potqat.cpu_info()['isa']}.json"


def versions() -> dict[str, str | None]:
    """Of the peers that are packages of their own (None: not installed), and what oneDNN, which multiplies for PyTorch,
    may use at most (None: what there is)."""
    packages = {name: installed(name) for name in ("torchao", "llama-cpp-python")}
    return packages | {"ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA")}


def merge(path: Path, report: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    """``report``, and from an earlier one in ``path`` the ``calibration`` and ``rows`` with other values of ``key``, if
    it comes from the same machine and versions (threads aside)."""
    if not path.exists():
        return report
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["machine"] | {"threads": 0} != report["machine"] | {"threads": 0}:
        print(f"{path} is of another machine or version: replaced")
        return report

    def of(entry: dict[str, Any]) -> tuple:
        return tuple(entry[name] for name in key)

    now = {of(entry) for entry in report["calibration"]}
    kept = {part: [entry for entry in earlier[part] if of(entry) not in now] for part in ("calibration", "rows")}
    return report | {part: kept[part] + report[part] for part in kept}
