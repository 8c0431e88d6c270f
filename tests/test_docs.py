"""The documents are true: links lead somewhere, code runs, tables and quoted messages are those of the code."""

import ast
import json
import logging
import re
from itertools import product
from pathlib import Path

import pytest
import torch

import potqat
from potqat import container, manifest, ops, reference
from potqat.config import GRIDS

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
FORMAT, FAQ = PAGES["format.md"], PAGES["faq.md"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page):
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_links_lead_somewhere(name):
    path = next(path for path in (ROOT / name, ROOT / "docs" / name) if path.exists())
    for target in re.findall(r"\]\((?!https?://)([^)]*)\)", PAGES[name]):
        file, _, anchor = target.partition("#")
        assert not file or (path.parent / file).exists(), target
        assert not anchor or anchor in anchors(PAGES[Path(file).name if file else name]), target


# ---- The format ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The namespace of format.md's code, run in order in a folder of its own, and that folder."""
    folder = tmp_path_factory.mktemp("format")
    namespace = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(FORMAT, "python"):
            exec(compile(block, "format.md", "exec"), namespace)
    return namespace, folder


def test_the_example_is_what_is_written(example):
    _, folder = example
    (shown,) = blocks(FORMAT, "json")
    written = json.loads((folder / "tiny" / "config.json").read_text())
    for module in written["quantization_config"]["modules"].values():
        module["sqnr_db"] = round(module["sqnr_db"], 2)
    assert json.loads(shown) == written
    tensors = {
        name: (stored.dtype, list(stored.shape)) for name, stored in container.open_folder(folder / "tiny").items()
    }
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (\[[\d, ]+\]) \|$", FORMAT, re.M)
    assert {name: (dtype, json.loads(shape)) for name, dtype, shape in rows} == tensors


def test_the_worked_example_is_where_it_says(example):
    namespace, _ = example
    model = namespace["model"]
    assert "`fc.packed[0, 0, 77]` is 94 = 0x5E" in FORMAT
    assert "`wte.packed[0, 0, 205]` is 46" in FORMAT
    assert model.fc.packed[0, 0, 77] == 94 == 0x5E
    levels = reference.unpack(model.fc.packed, "e2m1", 72, 72)
    assert (levels[3, 13], levels[3, 9]) == (6, -8)
    assert model.wte.packed[0, 0, 205] == 46 == reference.unpack(model.wte.packed, "int8", 50, 72)[3, 13]


@pytest.mark.parametrize(("grid", "granularity"), list(product(GRIDS, ["tensor", "channel", 64])))
def test_the_reader_of_numpy_reads_what_potqat_writes(example, tmp_path, grid, granularity):
    read_weight = example[0]["read_weight"]
    model = torch.nn.Sequential(torch.nn.Linear(150, 37), torch.nn.Linear(37, 2, bias=False))
    potqat.quantize_(model, potqat.PoTConfig(grid=grid, granularity=granularity))
    potqat.save(model, tmp_path)
    for path in ("0", "1"):
        module = model.get_submodule(path)
        expected = potqat.unpack(module.packed, module.scale, module.cfg, module.shape)
        assert torch.equal(torch.from_numpy(read_weight(tmp_path, path)), expected)


def test_the_tables_of_the_format_are_those_of_the_code():
    keys, entries = re.search(
        r"\| key \| value \|\n(.*?)\n\n.*?\| key \| value \| needed to \|\n(.*?)\n\n", FORMAT, re.S
    ).groups()

    def first_cells(table):
        return {key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split(" | ")[0])}

    assert first_cells(keys) == {"quant_method", "format_version", "modules"}
    assert first_cells(entries) == {"kind", "shape", "sqnr_db", "dtype", "tied_to", *manifest.CONFIG_FIELDS}
    assert all(key in manifest.__doc__ for key in first_cells(keys) | first_cells(entries))
    assert f'`"{manifest.FORMAT_VERSION}"`, a string' in FORMAT
    assert f"K at most {ops.MAX_IN_FEATURES:,}" in FORMAT
    assert f"other than {', '.join(container.DTYPES)}" in FORMAT
    assert f"more than {container.MAX_TENSORS:,} tensors" in FORMAT
    assert f"over {container.MAX_NAME_BYTES:,} bytes" in FORMAT
    assert f"over {container.MAX_JSON_BYTES // 10**6} MB" in FORMAT
    assert f"more than {container.MAX_RANK} dimensions" in FORMAT
    for grid in ("pot4", "e2m1", "int4"):
        assert f"| `{grid}` | 4 | {' '.join(map(str, reference.levels(grid)))} |" in FORMAT


def test_code_and_page_name_each_other():
    home = "docs/format.md"
    for file in ("potqat/manifest.py", "potqat/checkpoint.py", "potqat/container.py", "cpp/core/potqat.h"):
        assert home in (ROOT / file).read_text(encoding="utf-8"), file
        assert f"`{file}`" in FORMAT


# ---- Messages -----------------------------------------------------------------------------------------------


def literals():
    """Every string of the code, implicit concatenation undone; what an f-string fills in is NUL."""
    found = []
    for path in (*(ROOT / "potqat").rglob("*.py"), ROOT / "cmake" / "find_torch.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in (ROOT / "cpp").rglob("*.cpp"):
        text = path.read_text(encoding="utf-8")
        for run in re.findall(r'"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*', text):
            found.append("".join(re.findall(r'"((?:[^"\\\n]|\\.)*)"', run)))
    return [" ".join(text.split()) for text in found]


def quoted():
    """(page, message) of what the pages say that potqat says; ``...`` stands for what differs."""
    for heading in re.findall(r"^### (`.*)$", FAQ, re.M):
        if "(from " not in heading:
            yield from (("faq.md", message) for message in re.findall(r"`([^`]*)`", heading))
    for row in re.findall(r"^\| .* \| (`.*`) \|$", FORMAT.split("## What a reader must refuse")[1], re.M):
        yield from (("format.md", message) for message in re.findall(r"`([^`]*)`", row))


def fragments(message):
    """The parts of a message that are the same each time."""
    return [part.strip(" :;'()") for part in message.split("...") if len(part.strip(" :;'()")) > 2]


def test_every_quoted_message_is_in_the_code():
    code, messages = literals(), list(quoted())
    assert all(fragments(message) for _, message in messages)
    absent = [
        (page, fragment)
        for page, message in messages
        for fragment in fragments(message)
        if not any(fragment in text for text in code)
    ]
    assert not absent
    assert len([page for page, _ in messages if page == "faq.md"]) >= 25
    assert len([page for page, _ in messages if page == "format.md"]) >= 45


def test_every_refusal_of_a_file_is_on_the_page():
    """The other way round: no PoTFormatError that the page does not list."""
    listed = [fragment for page, message in quoted() if page == "format.md" for fragment in fragments(message)]
    unlisted = []
    for name in ("manifest", "checkpoint", "container"):
        for node in ast.walk(ast.parse((ROOT / "potqat" / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and getattr(getattr(node.exc, "func", None), "id", "") == "PoTFormatError":
                constants = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
                said = [" ".join(text.split()).strip(" :") for text in constants if isinstance(text, str)]
                words = [text for text in said if text not in ("", "is")]  # without: the words come from elsewhere
                if words and not any(fragment in text for fragment in listed for text in words):
                    unlisted.append(words)
    assert not unlisted


def test_a_packed_folder_without_potqat_hf_is_what_the_faq_says(tmp_path, monkeypatch, caplog):
    """The trap that the FAQ is loudest about: transformers only warns, and makes weights up."""
    transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
    from transformers.quantizers import auto

    config = transformers.GPT2Config(
        vocab_size=65, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    potqat.quantize_(model, potqat.PoTConfig())
    potqat.save(model, tmp_path)
    for registry in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(registry, "potqat")  # as before import potqat.hf
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])  # it does not propagate
    with caplog.at_level(logging.WARNING, "transformers"):
        wrong = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(wrong.lm_head) is torch.nn.Linear
    heading = re.search(r"^### `(Unknown quantization type.*?)\.\.\.` \(from transformers\)$", FAQ, re.MULTILINE)[1]
    assert heading.strip() in caplog.text
    assert "transformer.wte.packed" in caplog.text
    assert "transformer.wte.weight" in caplog.text


def test_the_code_of_the_faq_runs():
    for block in blocks(FAQ, "python"):
        exec(compile(block, "faq.md", "exec"), {})
