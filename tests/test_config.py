import copy
import json
import pickle

import pytest

from potqat import PoTConfig


def test_round_trip_through_json_pickle_and_copy():
    cfg = PoTConfig(granularity=64, skip=("lm_head",), overrides={"*.c_proj": {"grid": "e2m1"}}, embedding_grid=None)
    assert PoTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert copy.deepcopy(cfg) == cfg
    assert hash(copy.deepcopy(cfg)) == hash(cfg)


def test_frozen():
    cfg = PoTConfig(overrides={"a": {"grid": "int4"}})
    with pytest.raises(AttributeError):
        cfg.grid = "int4"
    with pytest.raises(TypeError):
        cfg.overrides["b"] = {}
    with pytest.raises(TypeError):
        cfg.overrides["a"]["grid"] = "pot4"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": "pot5"}, "grid must be one of pot4, e2m1, int4, int8 or pot"),
        ({"grid": "pot(31)"}, "k = 0..30; got 'pot\\(31\\)'"),
        ({"embedding_grid": "fp8"}, "embedding_grid must be"),
        ({"granularity": 48}, "positive multiple of 32 .*got 48"),
        ({"granularity": 0}, "got 0"),
        ({"granularity": True}, "got True"),
        ({"granularity": "row"}, "got 'row'"),
        ({"scale": "max"}, "scale must be one of 'absmax'"),
        ({"scale": "paper"}, "needs granularity='tensor', got 'channel'"),
        ({"rounding": "floor"}, "rounding must be one of"),
        ({"activations": "int4"}, "activations must be one of 'int8', 'int16', None"),
        ({"ste": "soft"}, "ste must be"),
        ({"scale_init": "learned"}, "scale_init must be"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"skip": "lm_head"}, "skip must be a tuple of patterns"),
        ({"overrides": {"a": {"bits": 3}}}, r"overrides\['a'\]: unknown key 'bits'"),
        ({"overrides": {"a": {"grid": "x"}}}, "grid must be"),
        ({"overrides": {"a": {"skip": ()}}}, "cannot hold skip"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PoTConfig(**fields)


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="unknown key 'bits'; known keys: activations, "):
        PoTConfig.from_dict({"bits": 4})


def test_patterns_match_the_path_or_a_segment():
    cfg = PoTConfig(skip=("lm_head", "*.mlp.down_proj", "layer?"))
    assert cfg.skips("lm_head")
    assert cfg.skips("model.lm_head")
    assert cfg.skips("model.h.3.mlp.down_proj")
    assert cfg.skips("x.layer7.q")
    assert not cfg.skips("model.h.3.mlp.up_proj")
    assert not cfg.skips("x.layer10.q")


def test_overrides_apply_in_order_and_to_embeddings():
    cfg = PoTConfig(overrides={"h": {"grid": "e2m1", "granularity": 32}, "*.1.*": {"grid": "int4"}})
    assert cfg.at("h.0.fc").grid == "e2m1"
    assert (cfg.at("h.1.fc").grid, cfg.at("h.1.fc").granularity) == ("int4", 32)
    assert cfg.at("wte").grid == "pot4"
    assert cfg.at("wte", embedding=True).grid == "int8"
    assert PoTConfig(embedding_grid=None).at("wte", embedding=True) is None
    assert PoTConfig(overrides={"wte": {"grid": "pot4"}}).at("wte", embedding=True).grid == "pot4"
