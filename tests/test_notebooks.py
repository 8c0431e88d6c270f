"""The committed notebooks ran from top to bottom with clean outputs; and ``notebooks/run.py``, which executes them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(?:work|root|home|tmp|Users|usr)/")


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def texts(output):
    """The text of an output: a stream's, and each representation that is not a picture."""
    parts = [output.get("text", "")] + [v for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "".join("".join(part) for part in parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_ran_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"], f"no output: {''.join(cell['source'])[:80]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_hold_no_errors_warnings_or_machine_paths(path):
    for cell in code_cells(path):
        assert not MACHINE_PATH.search("".join(cell["source"]))
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
            assert not MACHINE_PATH.search(texts(output))
            assert "Warning" not in texts(output)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_holds_nothing_that_changes_from_run_to_run(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


def test_all_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["01_format", "02_nanogpt_qat", "03_gpt2_qat", "04_accuracy"]


# ---- run.py -------------------------------------------------------------------------------------------------


def run_on(tmp_path, source, *arguments):
    """run.py on a notebook of one cell: (exit status, stderr, the file before, the file after)."""
    shutil.copy(NOTEBOOKS[0].with_name("run.py"), tmp_path)
    path = tmp_path / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, tmp_path / "run.py", *arguments], capture_output=True, text=True)
    return done.returncode, done.stderr, before, path.read_bytes()


BAR = "from tqdm import trange\nfor i in trange(3): pass\n"


def test_run_writes_outputs_without_progress_bars(tmp_path):
    status, errors, _, after = run_on(tmp_path, BAR + "print('hello')")
    assert status == 0, errors
    (cell,) = json.loads(after)["cells"]
    assert [(output["name"], output["text"]) for output in cell["outputs"]] == [("stdout", ["hello\n"])]
    assert not list(tmp_path.glob("*.tmp"))


def test_run_small_sets_the_variable_and_writes_nothing(tmp_path):
    status, errors, before, after = run_on(tmp_path, "import os\nos.environ['POTQAT_NOTEBOOK_SMALL']", "--small")
    assert status == 0, errors
    assert after == before


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import warnings\nwarnings.warn('mind this')", "mind this")],
)
def test_run_fails_on_errors_and_warnings_and_leaves_the_file(tmp_path, source, message):
    status, errors, before, after = run_on(tmp_path, source)
    assert status == 1
    assert message in errors
    assert after == before
