"""Print the folder of the installed torch, found without importing it; one sentence on stderr and exit 1 if none."""

import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

HEADER = Path("include/torch/csrc/stable/library.h")

spec = find_spec("torch")
candidates = [Path(spec.origin).parent] if spec and spec.origin else []
candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
for folder in candidates:
    if (folder / HEADER).is_file():
        print(folder)
        sys.exit(0)
sys.exit(
    "potqat is built against the torch it will run with, and found none (torch 2.10 or later) in "
    f"{sysconfig.get_path('purelib')}: install torch first (for example 'pip install torch'), then potqat again."
)
