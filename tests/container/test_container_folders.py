"""Which files of a folder are read: shards and their index, links; never pickles."""

import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from container_files import TENSORS, agrees_with_safetensors, refused

from potqat import container
from potqat.container import INDEX, WEIGHTS, map_tensors, open_folder


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index, and a way to change the index."""
    names = list(TENSORS)
    shards = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for shard, held in shards.items():
        safetensors.torch.save_file({name: TENSORS[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}

    def write(change=lambda weight_map: None):
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": change(weight_map) or weight_map}))
        return tmp_path

    write()
    return write


def test_shards(sharded):
    stored = open_folder(sharded())
    assert {item.file.name for item in stored.values()} == {"one.safetensors", "two.safetensors"}
    agrees_with_safetensors(stored)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in map_tensors(stored).items())


def shard(name):
    return lambda weight_map: weight_map | {"step": name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.pop("step") and None, "two.safetensors: step: not in model.safetensors.index.json"),
        (lambda m: m.update(new="two.safetensors"), "two.safetensors: new: missing, though"),
        (lambda m: m.update({"a.scale": "two.safetensors"}), "two.safetensors: a.scale: missing, though"),
        (shard("three.safetensors"), "three.safetensors: missing, or not a regular file"),
        (shard("../one.safetensors"), "index.json: '../one.safetensors' is not the plain name"),
        (shard("sub/one.safetensors"), "index.json: 'sub/one.safetensors' is not the plain name"),
        (shard("sub\\one.safetensors"), "is not the plain name"),
        (shard("/etc/passwd"), "index.json: '/etc/passwd' is not the plain name"),
        (shard("..safetensors"), "is not the plain name"),
        (shard("one.safetensors\0"), "is not the plain name"),
        (shard("one.bin"), "index.json: 'one.bin' is not the plain name of a .safetensors file"),
        (shard("n" * 10**6 + ".safetensors"), "is not the plain name"),
        (shard("n" * 300 + ".safetensors"), "missing, or not a regular file"),
        (shard(3), "weight_map must be an object of tensor name -> file name"),
        (shard(None), "weight_map must be an object"),
        (lambda m: list(m), "weight_map must be an object"),
        (lambda m: m.clear(), "weight_map must be an object .*, not empty"),
    ],
)
def test_wrong_indexes_are_refused(sharded, change, reason):
    assert re.search(reason, refused(sharded(change)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "bad JSON: Expecting value"),
        (b"[]", "weight_map must be an object"),
        (b"{}", "weight_map must be an object"),
        (b"\xff\xfe", "bad JSON: 'utf-8' codec"),
        (b"[" * 10**6, "bad JSON: "),
        (b'{"weight_map": {"step": "two.safetensors", "step": "one.safetensors"}}', "bad JSON: step is there twice"),
    ],
)
def test_broken_indexes_are_refused(sharded, content, reason):
    folder = sharded()
    (folder / INDEX).write_bytes(content)
    assert re.search(f"{INDEX}: {reason}", refused(folder))


def test_an_index_over_the_limit_is_not_read(sharded):
    folder = sharded()
    os.truncate(folder / INDEX, 10**11)  # sparse
    assert "index.json: 100000000000 bytes, 100,000,000 are the most" in refused(folder, memory=2**20)


def test_a_tensor_in_two_shards(sharded):
    folder = sharded()
    safetensors.torch.save_file({n: TENSORS[n] for n in ("step", "empty", "a.scale")}, folder / "two.safetensors")
    assert "two.safetensors: a.scale: also in one.safetensors" in refused(folder)


def test_the_limit_holds_for_all_shards_together(sharded, monkeypatch):
    monkeypatch.setattr(container, "MAX_TENSORS", len(TENSORS))
    assert len(open_folder(sharded())) == len(TENSORS)
    monkeypatch.setattr(container, "MAX_TENSORS", len(TENSORS) - 1)
    assert f"{sharded()}: 5 tensors, 4 are the most" in refused(sharded())


def test_a_damaged_shard_is_named(sharded):
    folder = sharded()
    os.truncate(folder / "two.safetensors", 100)
    assert f"{folder / 'two.safetensors'}: " in refused(folder)


def test_a_file_and_an_index_are_never_both_taken(sharded):
    folder = sharded()
    safetensors.torch.save_file(TENSORS, folder / WEIGHTS)
    assert f"{folder}: holds both {WEIGHTS} and {INDEX}" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_read(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    assert f"{tmp_path / name}: potqat never reads pickles" in refused(tmp_path)


def test_no_folder(folder, tmp_path_factory):
    with pytest.raises(NotADirectoryError, match="not a folder; give the folder that holds"):
        open_folder(folder / WEIGHTS)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_folder(folder / "missing")
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        open_folder(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere"),
                                  lambda file: file.symlink_to(file.name)],
                         ids=["folder", "pipe", "dangling-link", "link-to-itself"])  # fmt: skip
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / WEIGHTS)
    assert "missing, or not a regular file" in refused(tmp_path)


def test_links_stay_inside_the_folder(folder, sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / WEIGHTS).rename(outside / WEIGHTS)
    (folder / "one.safetensors").rename(outside / "one.safetensors")
    (folder / "one.safetensors").symlink_to(outside / "one.safetensors")
    assert f"one.safetensors: a link to {outside / 'one.safetensors'}, outside its folder" in refused(folder)
    (folder / "one.safetensors").unlink()
    (folder / "kept").mkdir()
    (outside / "one.safetensors").rename(folder / "kept" / "real")
    (folder / "one.safetensors").symlink_to("kept/real")
    assert len(open_folder(folder)) == len(TENSORS)
    (folder / INDEX).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    assert "outside its folder" in refused(folder)


def test_the_layout_of_the_hub_cache(folder, tmp_path_factory):
    """huggingface_hub keeps files in <repository>/blobs and links to them from <repository>/snapshots/<revision>."""
    repository = tmp_path_factory.mktemp("models--a--b")
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / WEIGHTS).rename(blobs / "cafe")
    (snapshot / WEIGHTS).symlink_to("../../blobs/cafe")
    agrees_with_safetensors(open_folder(snapshot))
    (blobs / "cafe").rename(repository / "cafe")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../cafe")
    assert "outside its folder" in refused(snapshot)
