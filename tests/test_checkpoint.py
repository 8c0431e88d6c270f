import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from test_modules import IDS, Tiny

import potqat
from potqat import PoTConfig, PoTFormatError
from potqat.modules import TiedLinear

CFG = PoTConfig(skip=("proj",), overrides={"fc": {"granularity": 32}})


@pytest.fixture
def saved(tmp_path):
    model = Tiny()
    potqat.quantize_(model, CFG)
    folder = tmp_path / "model"
    size = potqat.save(model, folder)
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    return model, folder


def test_round_trip_is_exact(saved):
    model, folder = saved
    fresh = potqat.load(folder, Tiny())
    assert torch.equal(fresh(IDS), model(IDS))
    assert fresh.fc.cfg == model.fc.cfg
    assert fresh.fc.sqnr_db == model.fc.sqnr_db
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_without_memory_is_filled(saved):
    model, folder = saved
    with torch.device("meta"):
        fresh = Tiny()
    assert torch.equal(potqat.load(folder, fresh)(IDS), model(IDS))


def test_a_tied_weight_is_stored_once_and_stays_tied(saved):
    _, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "wte.packed" in names
    assert not [name for name in names if name.startswith("lm_head")]
    fresh = potqat.load(folder, Tiny())
    assert isinstance(fresh.lm_head, TiedLinear)
    assert fresh.lm_head.packed is fresh.wte.packed


def test_a_tied_head_takes_the_activations_of_its_table(tmp_path):
    model = Tiny()
    potqat.quantize_(model, PoTConfig(overrides={"wte": {"activations": "int16"}}))
    potqat.save(model, tmp_path)
    fresh = potqat.load(tmp_path, Tiny())
    assert (fresh.lm_head.cfg.activations, fresh.fc.cfg.activations) == ("int16", "int8")
    assert torch.equal(fresh(IDS), model(IDS))


@pytest.mark.parametrize("tied_in_model", [True, False])
def test_float_ties_are_stored_once(tmp_path, tied_in_model):
    model = Tiny()
    potqat.quantize_(model, PoTConfig(embedding_grid=None))
    potqat.save(model, tmp_path)
    fresh = Tiny()
    if not tied_in_model:
        fresh.lm_head.weight = torch.nn.Parameter(torch.zeros_like(fresh.wte.weight))
        with pytest.raises(PoTFormatError, match=r"lm_head\.weight: missing; the model wants"):
            potqat.load(tmp_path, fresh)
        return
    potqat.load(tmp_path, fresh)
    assert fresh.lm_head.weight is fresh.wte.weight
    assert torch.equal(fresh(IDS), model(IDS))


def test_half_precision_models_come_back_in_half_precision(tmp_path):
    model = Tiny().to(torch.bfloat16)
    potqat.quantize_(model, PoTConfig())
    potqat.save(model, tmp_path)
    fresh = potqat.load(tmp_path, Tiny())
    assert fresh(IDS).dtype == torch.bfloat16
    assert fresh.fc.scale.dtype == torch.float32
    assert torch.equal(fresh(IDS), model(IDS))


def test_saving_again_does_not_disturb_a_model_that_maps_the_old_file(saved):
    model, folder = saved
    mapped = potqat.load(folder, Tiny())
    other = Tiny()
    torch.nn.init.normal_(other.fc.weight)
    potqat.quantize_(other, CFG)
    potqat.save(other, folder)
    assert torch.equal(mapped(IDS), model(IDS))
    assert torch.equal(potqat.load(folder, Tiny())(IDS), other(IDS))


def test_others_may_read_the_file_as_any_other(saved):
    _, folder = saved
    plain = folder / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="Tiny holds no packed module"):
        potqat.save(Tiny(), tmp_path / "x")
    assert not list(tmp_path.iterdir())
    model = Tiny()
    potqat.quantize_(model, CFG)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        potqat.save(model, tmp_path / "file")
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(FileExistsError, match="holds the shards of another checkpoint"):
        potqat.save(model, tmp_path)


# ---- Folders that cannot be trusted: their files are sound (tests/container has those that are not) ---------------


def modules(config):
    return config["quantization_config"]["modules"]


def change(path, *keys, to):
    """Set config[path][keys...]."""

    def apply(config, tensors):
        place = config["quantization_config"]
        for key in (path, *keys)[:-1]:
            place = place[key]
        place[(path, *keys)[-1]] = to

    return apply


def poke(name, index, value):
    def apply(config, tensors):
        tensors[name][index] = value

    return apply


def drop(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def replace(name, value):
    return lambda config, tensors: tensors.update({name: value})


FC = ("modules", "fc")
BAD = {
    "no config": (lambda c, t: c.pop("quantization_config"), "quantization_config is not potqat's"),
    "another method": (change("quant_method", to="gptq"), "not potqat's .quant_method is 'gptq'"),
    "version 2": (change("format_version", to="2"), "format version '2'; this potqat reads '1'"),
    "version as a number": (change("format_version", to=1), "format version 1; this potqat reads '1'"),
    "unknown key": (change("bits", to=4), "quantization_config has the unknown key 'bits'"),
    "no modules": (change("modules", to={}), "must be an object with at least one module"),
    "modules a list": (change("modules", to=["fc"]), "must be an object with at least one module"),
    "module a string": (change(*FC, to="pot4"), "fc: must be an object, got 'pot4'"),
    "unknown module key": (change(*FC, "class", to="os.system"), "fc: it has the unknown key 'class'"),
    "missing module key": (lambda c, t: modules(c)["fc"].pop("grid"), "fc: it lacks the key 'grid'"),
    "unknown kind": (change(*FC, "kind", to="conv"), "fc: kind must be"),
    "kind that lies": (change("modules", "wpe", "kind", to="linear"), "wpe: it has the unknown key 'dtype'"),
    "unknown grid": (change(*FC, "grid", to="pot5"), "fc: grid must be one of"),
    "grid without a packed form": (change(*FC, "grid", to="pot(7)"), "fc: grid must be one of"),
    "grid that lies": (change(*FC, "grid", to="int8"), r"fc\.packed is \[10, 2, 512\] in the file, \[10, 2, 1024\]"),
    "unhashable grid": (change(*FC, "grid", to=[]), "fc: grid must be one of"),
    "group of 48": (change(*FC, "granularity", to=48), "fc: PoTConfig: granularity must be"),
    "group that lies": (change(*FC, "granularity", to=64), r"fc\.scale is \[3, 160\] in the file, \[2, 160\]"),
    "unknown activations": (change(*FC, "activations", to="int4"), "fc: PoTConfig: activations must be"),
    "shape that lies": (change(*FC, "shape", to=[160, 200]), r"fc is \[160, 200\] in the file, \[160, 96\] in the"),
    "shape that overflows": (change(*FC, "shape", to=[2**62, 96]), r"fc is \[4611686018427387904, 96\] in the file"),
    "shape with a bool": (change(*FC, "shape", to=[True, 96]), "fc: shape must be two positive integers"),
    "zero outputs": (change(*FC, "shape", to=[0, 96]), "fc: shape must be two positive integers"),
    "too many inputs": (change(*FC, "shape", to=[160, 2**20]), "fc: 1048576 inputs, at most 131071"),
    "sqnr of text": (change(*FC, "sqnr_db", to="14"), "fc: sqnr_db must be a number or null"),
    "unknown dtype": (change("modules", "wte", "dtype", to="complex64"), "wte: dtype must be one of"),
    "tie to nothing": (change("modules", "lm_head", "tied_to", to="nope"), "lm_head: tied to 'nope', which"),
    "tie to itself": (change("modules", "lm_head", "tied_to", to="lm_head"), "tied to 'lm_head', which is tied"),
    "tie of other shapes": (change("modules", "lm_head", "tied_to", to="fc"), "tied to .fc., which has another"),
    "tie as a number": (change("modules", "lm_head", "tied_to", to=3), "lm_head: tied_to must be a module path"),
    "missing tie": (lambda c, t: modules(c)["lm_head"].pop("tied_to"), r"lm_head\.packed: missing"),
    "module of another model": (
        lambda c, t: modules(c).update(nope=modules(c).pop("fc")), "module nope is not in this Tiny"
    ),
    "module path upwards": (
        lambda c, t: modules(c).update({"../fc": modules(c).pop("fc")}), r"module \.\./fc is not in this Tiny"
    ),
    "missing scale": (drop("fc.scale"), r"fc\.scale: missing; the model wants \[3, 160\]"),
    "missing bias": (drop("fc.bias"), r"fc\.bias: missing; the model wants \[160\]"),
    "missing float tensor": (drop("proj.weight"), r"proj\.weight: missing; the model wants \[96, 160\]"),
    "tensor too many": (replace("extra", torch.ones(2)), "extra: this Tiny has no such tensor"),
    "codes as int16": (lambda c, t: t.update({"fc.packed": t["fc.packed"].short()}), r"fc\.packed: dtype is I16"),
    "scales in half": (lambda c, t: t.update({"fc.scale": t["fc.scale"].half()}), r"fc\.scale: dtype is F16"),
    "weights as integers": (lambda c, t: t.update({"proj.weight": t["proj.weight"].int()}), r"weight: dtype is I32"),
    "minus zero": (poke("fc.packed", (0, 0, 0), 8), r"fc\.packed: .*is minus zero"),
    "padding in use": (poke("fc.packed", (9, 1, 511), 1), r"fc\.packed: .*padding"),
    "NaN scale": (poke("fc.scale", (1, 7), float("nan")), r"scale of output 7, group 1 is nan"),
    "infinite scale": (poke("fc.scale", (0, 0), float("inf")), "is inf; it must be positive"),
    "negative scale": (poke("fc.scale", (2, 159), -1.0), r"scale of output 159, group 2 is -1\.0"),
    "zero scale": (poke("wte.scale", (0, 3), 0.0), r"wte\.scale: the scale of output 3, group 0 is 0\.0"),
    "scale that overflows": (poke("wte.scale", (0, 3), 1e38), r"is 9\.99\d+e\+37; it must be positive and at most"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_folders_that_cannot_be_trusted(saved, name):
    damage, message = BAD[name]
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    damage(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = Tiny()
    with pytest.raises(PoTFormatError, match=message) as error:
        potqat.load(folder, model)
    assert str(folder) in str(error.value)
    assert type(model.fc) is torch.nn.Linear


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"potqat"', "[" * 100_000, "\ud800", '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_object(saved, text):
    _, folder = saved
    (folder / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(PoTFormatError, match=r"config\.json: "):
        potqat.load(folder, Tiny())


def test_other_architectures_and_other_files(saved, tmp_path):
    _, folder = saved
    with pytest.raises(PoTFormatError, match=r"wte is \[65, 96\] in the file, \[70, 96\] in the model"):
        potqat.load(folder, Tiny(vocabulary=70))
    already = potqat.load(folder, Tiny())
    with pytest.raises(PoTFormatError, match="fc: linear in the file, PackedLinear in the model"):
        potqat.load(folder, already)
    with pytest.raises(FileNotFoundError, match="a saved model is a folder with"):
        potqat.load(tmp_path / "missing", Tiny())
    (folder / "model.safetensors").write_text("hello")
    with pytest.raises(PoTFormatError, match="too short to be a safetensors file"):
        potqat.load(folder, Tiny())
