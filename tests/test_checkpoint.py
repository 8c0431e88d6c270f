import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from test_modules import IDS, Tiny

import potqat
from potqat import PoTConfig, PoTFormatError


@pytest.fixture
def saved(tmp_path):
    model = Tiny()
    potqat.quantize_(model, PoTConfig(skip=("proj",), overrides={"fc": {"granularity": 32}}))
    path = tmp_path / "model.safetensors"
    size = potqat.save(model, path)
    assert size == path.stat().st_size
    return model, path


def test_round_trip_is_exact(saved):
    model, path = saved
    fresh = potqat.load(path, Tiny())
    assert torch.equal(fresh(IDS), model(IDS))
    assert fresh.wte.packed.data_ptr() == fresh.lm_head.packed.data_ptr()
    assert fresh.fc.cfg == model.fc.cfg
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_others_may_read_the_file_as_any_other(saved):
    _, path = saved
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_tied_weight_is_stored_once(saved):
    _, path = saved
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert "wte.packed" in names
    assert "lm_head.packed" not in names


def test_float_models_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="Tiny holds no packed module"):
        potqat.save(Tiny(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def damage_code(metadata, tensors):
    tensors["fc.packed"][0, 0, 0] = 8


def change_module(metadata, tensors, **fields):
    modules = json.loads(metadata["modules"])
    modules["fc"] |= fields
    metadata["modules"] = json.dumps(modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.pop("format"), "not a potqat checkpoint"),
        (lambda m, t: m.update(format_version="2"), "format version '2'; this potqat reads '1'"),
        (lambda m, t: t.pop("fc.scale"), "KeyError: 'fc.scale'"),
        (lambda m, t: t.pop("proj.weight"), r"tensor proj.weight: the file has none, the model wants \[96, 160\]"),
        (lambda m, t: t.update(extra=torch.ones(2)), r"tensor extra: the file has \[2\], the model wants none"),
        (lambda m, t: change_module(m, t, shape=[160, 200]), "packed must be uint8"),
        (lambda m, t: change_module(m, t, config={"bits": 4}), "unknown key 'bits'"),
        (damage_code, "is minus zero"),
        (lambda m, t: t["fc.scale"].fill_(float("nan")), "scale of output"),
    ],
)
def test_files_that_cannot_be_trusted(saved, change, message):
    _, path = saved
    rewrite(path, change)
    model = Tiny()
    with pytest.raises(PoTFormatError, match=message) as error:
        potqat.load(path, model)
    assert str(path) in str(error.value)
    assert type(model.fc) is torch.nn.Linear


def test_other_architectures_and_other_files(saved, tmp_path):
    _, path = saved
    with pytest.raises(PoTFormatError, match=r"wte is \[65, 96\] in the file, \[70, 96\] in the model"):
        potqat.load(path, Tiny(vocabulary=70))
    with pytest.raises(FileNotFoundError, match="no file"):
        potqat.load(tmp_path / "missing.safetensors", Tiny())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PoTFormatError, match="text: SafetensorError"):
        potqat.load(tmp_path / "text", Tiny())
