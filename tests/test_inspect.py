"""potqat inspect: level use and bytes counted right, the verb on saved folders, and its wrong uses."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import potqat
from potqat import PoTConfig, reference
from potqat.cli import main
from potqat.flows import inspection, inspection_plot
from potqat.flows.inspection_plot import plot
from potqat.models.gpt import GPT, GPTConfig
from potqat.modules import PackedLinear, TiedLinear


def packed_gpt(**fields):
    """A GPT with its head tied to its embedding, packed; and its float twin."""
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32))
    floats = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    potqat.quantize_(model, PoTConfig(**fields))
    return model, floats


def failure(capsys, arguments, status):
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("potqat: ")
    return line


@pytest.fixture
def folder(tmp_path):
    potqat.save(packed_gpt(granularity=32)[0], tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (50, 100), (33, 200)])
@pytest.mark.parametrize("grid", ["pot4", "e2m1", "int4", "int8"])
def test_levels_are_counted_over_all_chunks(monkeypatch, grid, shape):
    """Every weight once and no padding, whether a chunk is the whole weight or one row of tiles."""
    cfg, w = PoTConfig(grid=grid, granularity=32), torch.randn(*shape)
    scale = potqat.compute_scale(w, cfg)
    module = PackedLinear(potqat.pack(w, scale, cfg), scale, None, cfg, shape)
    levels = reference.quantize(w, scale, grid, cfg.rounding, cfg.group_size).long().flatten().tolist()
    signed = sorted({sign * level for level in reference.levels(grid) for sign in (1, -1)})
    expected = {level: levels.count(level) for level in signed}
    for chunk in (inspection.CHUNK, 1):
        monkeypatch.setattr(inspection, "CHUNK", chunk)
        counts = inspection.count_levels(module)
        assert counts == expected
        assert list(counts) == signed


def layer(counts, name="layer"):
    return inspection.Layer(name, "linear", (1, 1), "int4", "absmax", "channel", None, counts, 0, 0, None)


def test_shares_and_entropy():
    uniform = layer({level: 10 for level in range(-7, 8)})
    assert uniform.zero == pytest.approx(1 / 15)
    assert uniform.top == pytest.approx(2 / 15)
    assert uniform.entropy == pytest.approx(math.log2(15))
    one = layer(dict.fromkeys(range(-7, 8), 0) | {0: 5})
    assert (one.zero, one.top, one.entropy) == (1.0, 0.0, 0.0)
    coin = layer(dict.fromkeys(range(-7, 8), 0) | {7: 4, -7: 4})
    assert (coin.zero, coin.top, coin.entropy) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "type_", "block"),
    [
        ("transformer.h.11.attn.c_attn", "transformer.h.*.attn.c_attn", 11),
        ("layers.3.experts.7.up", "layers.*.experts.7.up", 3),
        ("0", "*", 0),
        ("conv2.w1", "conv2.w1", None),
        ("lm_head", "lm_head", None),
    ],
)
def test_type_and_block_of_a_name(name, type_, block):
    assert (layer({0: 1}, name).type, layer({0: 1}, name).block) == (type_, block)


def test_a_model_with_a_tied_head():
    model, floats = packed_gpt(granularity=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = inspection.inspect(model)
    layers = {layer.name: layer for layer in found.layers}
    assert [layer.name for layer in found.layers] == [n for n, m in model.named_modules() if hasattr(m, "sqnr_db")]
    table, head = layers["transformer.wte"], layers["lm_head"]
    assert (table.kind, table.grid, table.tied_to) == ("embedding", "int8", None)
    assert (head.kind, head.tied_to, head.code_bytes, head.scale_bytes) == ("linear", "transformer.wte", 0, 0)
    assert head.counts == table.counts
    fc = layers["transformer.h.1.mlp.c_fc"]
    assert (fc.shape, fc.grid, fc.scale, fc.granularity) == ((128, 32), "pot4", "absmax", 32)
    assert (fc.code_bytes, fc.scale_bytes) == (8 * 512, 128 * 4)
    assert fc.sqnr_db == model.get_submodule(fc.name).sqnr_db
    assert all(sum(layer.counts.values()) == layer.weights for layer in found.layers)
    # The float model has exactly these numbers (its head is its embedding), and the packed one exactly these bytes.
    totals = found.totals()
    numbers = sum(p.numel() for p in floats.values())
    assert totals["model"]["numbers"] == numbers
    assert (totals["model"]["float32_bytes"], totals["model"]["bfloat16_bytes"]) == (4 * numbers, 2 * numbers)
    assert totals["model"]["bytes"] == sum(t.nbytes for t in before.values())
    assert totals["weights"]["bytes"] == sum(t.nbytes for n, t in before.items() if n.endswith((".packed", ".scale")))
    assert totals["weights"]["numbers"] == sum(p.numel() for n, p in floats.items() if p.dim() == 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tied_layer_before_its_owner():
    cfg, w = PoTConfig(), torch.randn(20, 32)
    scale = potqat.compute_scale(w, cfg)
    owner = PackedLinear(potqat.pack(w, scale, cfg), scale, None, cfg, (20, 32))
    head, table = inspection.inspect(nn.ModuleDict({"head": TiedLinear(owner, None, cfg), "table": owner})).layers
    assert (head.name, head.tied_to, head.code_bytes) == ("head", "table", 0)
    assert (table.name, table.tied_to, table.code_bytes) == ("table", None, 2 * 512)
    assert head.counts == table.counts


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match=r"Linear holds no packed module: potqat.quantize_ it first"):
        inspection.inspect(nn.Linear(2, 2))


def test_the_verb_prints_a_table(capsys, folder):
    assert main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "grid", "scale", "granularity", "SQNR", "dB", "zero", "top",
                                "entropy", "codes", "scales"]  # fmt: skip
    (row,) = (line.split() for line in lines if line.startswith("transformer.h.0.mlp.c_proj "))
    assert row[1:6] == ["linear", "32x128", "pot4", "absmax", "32"]
    assert 10 < float(row[6]) < 25
    assert row[-2:] == [f"{2 * 2 * 512:,}", f"{4 * 32 * 4:,}"]
    (head,) = (line for line in lines if line.startswith("lm_head "))
    assert head.endswith("tied to transformer.wte")
    assert lines[-3].split() == ["bytes", "of", "float32", "of", "bfloat16"]
    assert [line.split()[0] for line in lines[-2:]] == ["weights", "model"]


def test_json(capsys, folder):
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = found["layers"][0]
    assert first["name"] == "transformer.wte"
    assert len(first["levels"]) == 255
    assert sum(first["levels"].values()) == pytest.approx(1)
    assert found["totals"]["model"]["bytes"] < found["totals"]["model"]["bfloat16_bytes"]


def test_unknown_and_infinite_errors(capsys):
    from potqat.cli.inspect import table

    model, _ = packed_gpt()
    model.transformer.wpe.sqnr_db = None
    model.transformer.wte.sqnr_db = math.inf
    found = inspection.inspect(model)
    rows = {line.split()[0]: line for line in table(found).splitlines() if line}
    assert rows["transformer.wpe"].split()[6].endswith("%")  # the column before is blank
    assert rows["transformer.wte"].split()[6] == "inf"
    layers = found.to_dict()["layers"]
    assert [layers[0]["sqnr_db"], layers[1]["sqnr_db"]] == [None, None]
    json.dumps(found.to_dict(), allow_nan=False)


def test_plot(capsys, folder, tmp_path):
    picture = tmp_path / "levels.png"
    assert main(["inspect", str(folder), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["levels.png", "packed"]


def test_plot_without_known_errors_and_of_one_layer(tmp_path):
    plot(tmp_path / "one.png", [layer(dict.fromkeys(range(-7, 8), 1))])
    assert (tmp_path / "one.png").exists()


def test_plot_tells_no_error_from_error_not_known(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(inspection_plot, "save_figure", lambda figure, path: figures.append(figure))
    counts = dict.fromkeys(range(-7, 8), 1)
    errors = {"exact": math.inf, "unknown": None, "usual": 20.0}
    plot(tmp_path / "one.png", [replace(layer(counts, name), sqnr_db=error) for name, error in errors.items()])
    (legend,) = figures[0].subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["exact: no error", "unknown: error not known", "usual"]


def test_wrong_uses_are_one_line(capsys, folder, tmp_path):
    line = failure(capsys, ["inspect", folder, "--plot", tmp_path / "a.jpg"], 2)
    assert "--plot writes PNG: name a file that ends in .png, got " in line
    line = failure(capsys, ["inspect", folder, "--plot", tmp_path / "absent" / "a.png"], 2)
    assert f"no folder {tmp_path / 'absent'}" in line
    assert str(tmp_path / "absent") in failure(capsys, ["inspect", tmp_path / "absent"], 1)
    file = tmp_path / "file.txt"
    file.write_text("text")
    assert f"{file}: a file" in failure(capsys, ["inspect", file], 1)
    assert str(tmp_path) in failure(capsys, ["inspect", tmp_path], 1)  # a folder without a model
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "a float model; quantize it first" in failure(capsys, ["inspect", folder], 1)
    assert main(["inspect"]) == 2
    assert "usage: potqat inspect" in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_any_work(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from potqat.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "inspect", str(tmp_path / "absent"), "--plot", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "potqat: matplotlib draws a.png and is not installed; run: pip install 'potqat[plot]'\n"
