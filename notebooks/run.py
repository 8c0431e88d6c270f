"""Execute the notebooks of this folder and write their outputs in place.

    python notebooks/run.py              # all of them, as committed
    python notebooks/run.py --small      # a short version: only checks that every cell runs, writes nothing
    python notebooks/run.py 01_format    # one of them

A notebook reads POTQAT_NOTEBOOK_SMALL in the cell that chooses its settings. A cell that raises, or that writes to
stderr anything but a progress bar (a warning, say), fails the run; the committed file is replaced only when the whole
notebook has run. Needs the extra ``potqat[notebooks]``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  builds its cache here, once, and not with a message into the first output
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
PROGRESS = re.compile(r"[^\n]*\[\d+:\d+(?::\d+)?[<,][^\n]*\n?")  # a line of tqdm
COLOR = re.compile(r"\x1b\[[0-9;]*m")  # IPython's in a traceback
TIMEOUT = 1800  # seconds a cell


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks of this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks without .ipynb (default: all)")
    parser.add_argument("--small", action="store_true", help="short settings, nothing is written")
    arguments = parser.parse_args()
    if arguments.small:
        os.environ["POTQAT_NOTEBOOK_SMALL"] = "1"  # kernels inherit it
    else:
        os.environ.pop("POTQAT_NOTEBOOK_SMALL", None)
    paths = [FOLDER / f"{name}.ipynb" for name in arguments.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        begin = time.perf_counter()
        print(f"{path.name} ...", flush=True)
        try:
            notebook = execute(path)
        except (CellExecutionError, FileNotFoundError, ValueError) as error:
            print(f"{path.name}: {COLOR.sub('', str(error))}", file=sys.stderr)
            return 1
        if not arguments.small:
            temporary = path.with_suffix(".tmp")
            nbformat.write(notebook, temporary)
            os.replace(temporary, path)
        done = "ran" if arguments.small else "written"
        print(f"{path.name}: {done}, {time.perf_counter() - begin:.0f} s", flush=True)
    return 0


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs and nothing in it that changes from run to run.

    Raises:
        CellExecutionError: a cell raised.
        FileNotFoundError: no such notebook.
        ValueError: a cell wrote to stderr.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},  # where cells run, whatever the caller's folder
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # without the warning that the kernel listens on TCP, on this machine
    ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    if output.output_type != "stream" or output.name != "stderr":
        return False
    rest = PROGRESS.sub("", output.text).strip()
    if rest:
        raise ValueError(f"a cell wrote to stderr; repair it, for outputs show it to readers: {rest}")
    return True


if __name__ == "__main__":
    sys.exit(main())
