"""README's Python blocks run as one script, as a reader would paste them; its files and links exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    assert "2 quantized, 0 skipped" in capsys.readouterr().out
    assert (tmp_path / "gpt-pot4" / "model.safetensors").stat().st_size > 0


def test_the_map_names_real_places():
    places = re.findall(r"^(\w[\w./]*)  ", README.split("## Map")[1].split("```")[1], re.M)
    assert len(places) >= 8
    assert not [place for place in places if not (ROOT / place).exists()]


def test_the_results_are_those_of_the_committed_runs():
    code = (ROOT / "benchmarks" / "readme.py").read_text(encoding="utf-8")
    namespace = {"__file__": str(ROOT / "benchmarks" / "readme.py"), "__name__": "readme"}
    exec(compile(code, "readme.py", "exec"), namespace)
    assert namespace["with_results"](README) == README
