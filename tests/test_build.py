"""What is inside the built libraries: stable ABI only, no stray vector code, and an import that stays light."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from potqat import _C

LIBRARIES = Path(_C.__file__).parent


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_ops_library_uses_the_stable_abi_only():
    """No C++ symbol of libtorch, and no shim newer than torch 2.10, the oldest torch we support."""
    symbols = run("nm", "-D", "--undefined-only", "--demangle", str(LIBRARIES / "libpotqat_ops.so"))
    assert "aoti_torch" in symbols
    assert not re.findall(r".*\b(?:at|c10|torch)::.*", symbols)
    newer = ["torch_from_blob", "torch_library_def_with_tags", "torch_exception_get_what", "torch_new_stable_ivalue",
             "set_python_module", "pyobject"]  # fmt: skip
    assert not [name for name in newer if name in symbols]
    assert not re.findall(r".*\bPy[A-Z]\w+", symbols)


def test_libraries_find_torch_by_name_only():
    for name in ("libpotqat_ops.so", "libpotqat_core.so", Path(_C.__file__).name):
        dynamic = run("readelf", "-d", str(LIBRARIES / name))
        paths = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", dynamic)
        assert set(paths) <= {"$ORIGIN"}, (name, paths)
    assert "libtorch_cpu.so" in run("readelf", "-d", str(LIBRARIES / "libpotqat_ops.so"))


def test_core_needs_neither_torch_nor_python():
    needed = run("readelf", "-d", str(LIBRARIES / "libpotqat_core.so"))
    assert not re.findall(r"NEEDED.*(?:torch|python|gomp)", needed)


def test_vector_code_stays_in_its_units():
    """What not every x86-64 (ymm and zmm registers) or aarch64 (int8 dot products) has appears only in the unnamed
    namespaces of its units: no shared inline function was compiled with their flags."""
    listing = run("objdump", "-d", "--demangle", "--no-show-raw-insn", str(LIBRARIES / "libpotqat_core.so"))
    optional = r"%[yz]mm\d" if "x86-64" in listing else r"\t(?:sdot|smmla)\t" if "aarch64" in listing else None
    if optional is None:
        pytest.skip("neither an x86-64 nor an aarch64 library")
    owners = [block.split("\n", 1)[0] for block in listing.split("\n\n") if re.search(optional, block)]
    assert any("(anonymous namespace)::dot" in owner for owner in owners)
    assert not [owner for owner in owners if "(anonymous namespace)" not in owner]


def test_import_is_light():
    """No torchao, matplotlib or transformers at import, and nothing printed."""
    code = "import sys, potqat; print([m for m in ('torchao', 'matplotlib', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_core_module_needs_no_torch():
    """_C alone loads and packs without torch being imported."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "import numpy as np\n"
        "p = m.pack(np.ones((3, 5), np.float32), np.ones((1, 3), np.float32), 'pot4', 'nearest')\n"
        "print(p.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(1, 1, 512) False\n", done.stderr


@pytest.mark.parametrize("name", ["doesnotexist", "AVX2"])
def test_a_wrong_isa_name_is_an_error(name, monkeypatch):
    import potqat

    with pytest.raises(ValueError, match=f"'{name}' is not available here; available: .*scalar"):
        potqat.set_isa(name)
    monkeypatch.setenv("POTQAT_ISA", name)
    done = subprocess.run([sys.executable, "-c", "import potqat"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "POTQAT_ISA names an instruction set that is not available here; available:" in done.stderr


def test_forced_isa_is_used(monkeypatch):
    monkeypatch.setenv("POTQAT_ISA", "scalar")
    done = subprocess.run(
        [sys.executable, "-c", "import potqat; print(potqat.cpu_info()['isa'])"], capture_output=True, text=True
    )
    assert done.stdout == "scalar\n", done.stderr
