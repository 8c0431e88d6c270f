"""Measuring: the calibration in the core, turns and figures, ``potqat bench``, and what benchmarks/ makes of them.

Nothing here looks at a time: that is what the benchmarks are for."""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import potqat
from potqat import _C, PoTConfig
from potqat.cli import main
from potqat.flows import bench, measure
from potqat.models.gpt import GPTConfig

ISAS = potqat.cpu_info()["available"]
TINY = bench.Plan(shapes=((64, 96), (48, 64)), rows=(1, 3), threads=(1, 2), rounds=2)


@pytest.fixture
def quick(monkeypatch, one_thread):
    """The short form on tiny weights, and little to rotate through."""
    monkeypatch.setattr(bench, "SHORT", replace(TINY, threads=()))
    monkeypatch.setattr(bench, "rotation_bytes", lambda peers: 100_000)
    for name in ("LEAST_SECONDS", "CALIBRATION_SECONDS", "WARM_SECONDS"):
        monkeypatch.setattr(measure, name, 1e-4)


# ---- The core -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 255, 256, 257, 4096, 10007])
def test_read_sees_every_byte(isa, size):
    before = potqat.cpu_info()["isa"]
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    words = np.zeros(-(-size // 8) * 8, np.uint8)
    words[:size] = data
    try:
        _C.set_isa(isa)
        assert _C.read(data) == _C.read(data, 3) == int(np.bitwise_xor.reduce(words.view(np.uint64)))
    finally:
        _C.set_isa(before)


def test_read_refuses_a_strided_array():
    with pytest.raises(ValueError, match="C-contiguous"):
        _C.read(np.zeros((4, 4))[:, ::2])


def test_read_in_several_threads_keeps_count_of_references():
    data = np.zeros(64, np.uint8)
    before = sys.getrefcount(data.dtype)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: _C.read(data, 1000), range(1200)))
    after = sys.getrefcount(data.dtype)  # not in the assert, which holds one
    assert after == before


@pytest.mark.parametrize("isa", ISAS)
def test_peak_counts_multiply_adds(isa):
    once = _C.peak(isa, 1)
    assert once > 0
    assert _C.peak(isa, 7) == 7 * once
    assert _C.peak(isa, 0) == 0


def test_peak_of_an_absent_instruction_set():
    with pytest.raises(ValueError, match=r"'sse9' is not available here; available: .*scalar"):
        _C.peak("sse9", 1)


# ---- Turns --------------------------------------------------------------------------------------------------


class Clock:
    """A sample whose calls take the given seconds, whatever the clock says."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, itertools.cycle(seconds)

    def __call__(self, count):
        self.log.append((self.name, count))
        return count, count * next(self.seconds)


def test_samples_take_turns():
    log, turns = [], []
    samples = {name: Clock(name, log, seconds) for name, seconds in (("a", (3, 1, 2)), ("b", (5, 5, 5)))}
    times = measure.interleave(samples, 3, calls=4, turn=lambda: turns.append(1))
    assert log == [("a", 4), ("b", 4)] * 3
    assert times == {"a": measure.Times(2, 1, 3, 4), "b": measure.Times(5, 5, 5, 4)}
    assert len(turns) == 6


def test_short_calls_are_made_often_enough():
    log = []
    times = measure.interleave({"short": Clock("short", log, [1e-6]), "long": Clock("long", log, [0.1])}, 2)
    assert times["short"].calls * 1e-6 >= measure.LEAST_SECONDS
    assert times["long"].calls == 1
    assert times["short"].median == pytest.approx(1e-6)


def test_a_sample_may_make_more_calls_than_asked_for():
    times = measure.interleave({"graph": lambda count: (32, 64.0)}, 3, calls=1)
    assert times["graph"].median == 2.0


def test_cache_size(tmp_path):
    assert measure.cache_bytes(tmp_path) is None
    for index, size in enumerate(("48K", "2048K", "30M", "")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert measure.cache_bytes(tmp_path) == 30 << 20


def test_rotation_leaves_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda: 100)
    monkeypatch.setattr(measure, "available_memory", lambda: 10_000)
    assert bench.rotation_bytes(5) == 400
    assert bench.rotation_bytes(50) == 100
    monkeypatch.setattr(measure, "cache_bytes", lambda: None)
    monkeypatch.setattr(measure, "available_memory", lambda: None)
    assert bench.rotation_bytes(5) == 4 * bench.UNKNOWN_CACHE


# ---- Linear layers ------------------------------------------------------------------------------------------


def test_every_group_has_every_peer(quick):
    before = torch.get_num_threads()
    turns = []
    groups = list(bench.run(TINY, (*bench.OURS, *bench.TORCH), lambda: turns.append(1)))
    assert torch.get_num_threads() == before
    assert len(turns) == TINY.turns((*bench.OURS, *bench.TORCH)) == 2 * 5 * len(groups)
    seen = [tuple(calibration[name] for name in bench.KEY) for calibration, _ in groups]
    expected = [
        (n, k, m, threads, residency)
        for (n, k), threads, (residency, m) in itertools.product(
            TINY.shapes, TINY.threads, ((bench.HOT, 1), (bench.HOT, 3), (bench.ROTATED, 1))
        )
    ]
    assert seen == expected
    for calibration, rows in groups:
        assert calibration["isa"] == potqat.cpu_info()["isa"]
        assert calibration["read_gb_per_second"] > 0
        assert calibration["peak_gops"] > 0
        assert [row.peer for row in rows] == [peer.name for peer in (*bench.OURS, *bench.TORCH)]
        for row in rows:
            assert row.error is None
            assert tuple(getattr(row, name) for name in bench.KEY) in expected
            assert 0 < row.microseconds["min"] <= row.microseconds["median"] <= row.microseconds["max"]
            copies, rest = divmod(row.rotated_bytes, row.weight_bytes)
            assert rest == 0
            assert copies == 1 if row.residency == bench.HOT else row.rotated_bytes >= 100_000


def test_bytes_are_those_of_codes_and_scales(quick):
    w = torch.randn(64, 256)
    found = {peer.name: peer.build(w).bytes for peer in (*bench.OURS, *bench.TORCH)}
    assert found == {
        "potqat pot4": 64 * 256 // 2 + 4 * 64,
        "potqat pot4, groups of 128": 64 * 256 // 2 + 2 * 4 * 64,
        "torch float32": 4 * 64 * 256,
        "torch bfloat16": 2 * 64 * 256,
        "torch int8": 64 * 256 + 4 * 64,
    }


def test_a_peer_that_fails_is_a_row_that_says_so(quick):
    def absent(w):
        raise ImportError("no such library")

    class Broken:
        bytes = 8

        def start(self, x, copies, threads):
            return lambda count: 1 / 0

    peers = (bench.OURS[0], bench.Peer("absent", absent), bench.Peer("broken", lambda w: Broken()))
    for calibration, rows in bench.run(replace(TINY, threads=(1,)), peers):
        errors = ["ImportError: no such library", "ZeroDivisionError: division by zero"]
        assert [row.error for row in rows] == [None, *errors]
        assert "absent" in (text := bench.table(calibration, rows))
        assert "did not run: ZeroDivisionError" in text


def test_peers_compute_the_layer():
    """What is timed is the linear layer: potqat's op bit for bit its module, int8 within its rounding."""
    w, x = torch.randn(96, 128) * 0.02, torch.randn(5, 128)
    for cfg in (PoTConfig(scale="absmax"), PoTConfig(scale="absmax", granularity=128)):
        op = bench.Op(w, cfg)
        assert torch.equal(op(x, op.packed), bench.packed_linear(w, cfg)(x))
    torch.testing.assert_close(bench.Int8Linear(w)(x), x @ w.T, rtol=0, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(bench.TORCH[0].build(w).module(x), x @ w.T)


# ---- The command --------------------------------------------------------------------------------------------


def test_bench_prints_json(quick, capsys):
    assert main(["bench", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["isa"] == potqat.cpu_info()["isa"]
    assert found["machine"]["threads"] == 1
    assert len(found["calibration"]) == 6
    assert len(found["rows"]) == 30
    assert not [row["error"] for row in found["rows"] if row["error"]]


def test_bench_prints_tables(quick, capsys):
    assert main(["bench", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("calibration: read") == 6
    for peer in (*bench.OURS, *bench.TORCH):
        assert out.count(f"\n  {peer.name}  ") == 6, peer.name
    assert "1 x 64 x 96 (m, n, k), threads: 1, hot" in out
    assert f"{potqat.cpu_info()['isa']} kernels, torch {torch.__version__}" in out


@pytest.mark.parametrize(("threads", "why"), [("0", "at least 1"), ("99999", "at most"), ("two", "invalid int")])
def test_bench_refuses_bad_threads(threads, why, capsys):
    assert main(["bench", "--threads", threads]) == 2
    assert why in capsys.readouterr().err


# ---- benchmarks/ --------------------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


def test_results_are_merged_by_group(benchmarks, quick, tmp_path):
    import report

    path = tmp_path / "kernels.json"
    plans = [replace(TINY, shapes=(shape,), threads=(1,)) for shape in TINY.shapes]
    first, second = (bench.report(list(bench.run(plan, bench.OURS))) for plan in plans)
    assert report.merge(path, first, bench.KEY) == first
    path.write_text(json.dumps(first))
    both = report.merge(path, second, bench.KEY)
    assert both["rows"] == first["rows"] + second["rows"]
    again = report.merge(path, first, bench.KEY)
    assert again["rows"] == first["rows"]
    path.write_text(json.dumps(first | {"machine": first["machine"] | {"cpu": "another"}}))
    assert report.merge(path, second, bench.KEY) == second


@pytest.mark.parametrize("left_out", [0, 1])  # results may be merged of runs of some shapes or threads only
def test_the_roofline_is_drawn(benchmarks, quick, tmp_path, left_out):
    pytest.importorskip("matplotlib")
    import roofline

    plans = [replace(TINY, shapes=(shape,)) for shape in TINY.shapes]
    plans[1] = replace(plans[1], threads=TINY.threads[left_out:])
    roofline.plot(
        tmp_path / "kernels.png", bench.report([group for plan in plans for group in bench.run(plan, bench.OURS)])
    )
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_arms(benchmarks, quick):
    import decode

    shape = GPTConfig(vocab_size=67, block_size=decode.PREFILL, n_layer=1, n_head=2, n_embd=64)
    found = decode.run(shape, ["float32", "pot4"], threads=1, rounds=2)
    floats, ours = found["rows"]
    assert floats["cosine"] == pytest.approx(1)
    assert 0.8 < ours["cosine"] < 1
    body = 12 * 64 * 64 + (2 * 2 + 3 + 1 + 4 + 1) * 64 + 2 * 64  # matrices, layer norms and biases
    assert floats["bytes_per_token"] == 4 * (body + 67 * 64)
    codes = 12 * 64 * 64 // 2 + 80 * 64 // 2  # the head is padded to whole tiles
    scales = 4 * (3 + 1 + 4 + 1) * 64 + 4 * 67
    assert ours["bytes_per_token"] == codes + scales + 4 * (body - 12 * 64 * 64)
    for row in found["rows"]:
        assert row["error"] is None
        for phase in ("prefill", "decode"):
            assert row[phase]["tokens_per_second"] > 0
    assert "float32" in decode.table(found)


def test_an_arm_that_decodes_other_logits_is_an_error(benchmarks, quick, monkeypatch):
    import decode

    @torch.no_grad()
    def spoil(model):
        model.lm_head.weight.neg_()
        return model

    monkeypatch.setitem(decode.ARMS, "spoiled", partial(decode.torch_arm, spoil, "eager"))
    shape = GPTConfig(vocab_size=67, block_size=decode.PREFILL, n_layer=1, n_head=2, n_embd=64)
    (row,) = decode.run(shape, ["spoiled"], threads=1, rounds=2)["rows"]
    assert "cosine" in row["error"]
    assert "decode" not in row


def test_llama_reads_the_same_model(benchmarks, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs potqat[bench]")
    import llama

    from potqat.models.gpt import GPT

    model = GPT(GPTConfig(vocab_size=96, block_size=64, n_layer=2, n_head=2, n_embd=64)).eval()
    llama.write_gguf(model, tmp_path / "model.gguf")
    reader = llama.Process(tmp_path / "model.gguf", 64, 1, False)
    ids = torch.randint(96, (1, 20))
    reader.read(ids[0, :12].tolist(), 0)
    assert reader.read_each(ids[0, 12:].tolist(), 12) > 0
    with torch.no_grad():
        truth = model(ids)[0, -1]
    assert torch.cosine_similarity(reader.last_logits(), truth, dim=0) > 0.97
