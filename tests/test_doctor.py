"""potqat doctor: what it reads from the machine, and a self-test that passes here and can fail."""

import json

import pytest
import torch

import potqat
from potqat.cli import doctor as verb
from potqat.cli import main
from potqat.config import GRIDS
from potqat.flows import doctor


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_every_kernel_is_exact_and_settings_come_back(one_thread):
    before = potqat.cpu_info()["isa"]
    try:
        potqat.set_isa("scalar")
        torch.set_num_threads(1)
        test = doctor.self_test()
        assert (potqat.cpu_info()["isa"], torch.get_num_threads()) == ("scalar", 1)
    finally:
        potqat.set_isa(before)
    assert test.failures == ()
    # 1 thread and 2, two granularities, three comparisons
    assert test.checks == len(potqat.cpu_info()["available"]) * 2 * len(GRIDS) * 2 * 3


def test_bits_are_compared_and_not_values():
    a = torch.tensor([[1.0, 0.0], [float("nan"), 2.0]])
    assert doctor.first_difference(a, a.clone()) is None
    b = a.clone()
    b[0, 1] = -0.0
    b[1, 1] = torch.nextafter(b[1, 1], torch.tensor(3.0))
    assert doctor.first_difference(a, b) == "differ in 2 of 4 values, first at [0, 1]: 0.0 and -0.0"
    assert doctor.first_difference(a, a[:1]) == "differ in shape: [2, 2] and [1, 2]"


def test_a_failure_is_shown_and_exits_1(found, capsys):
    what = f"linear {doctor.first_difference(torch.ones(2), torch.tensor([1.0, 3.0]))}"
    failure = {"isa": "avx2", "threads": 2, "grid": "pot4", "granularity": 32, "what": what}
    failed = found | {"ok": False, "self_test": found["self_test"] | {"failures": [failure]}}
    assert verb.show(failed, as_json=False) == 1
    out = capsys.readouterr().out
    assert "1 failed" in out
    line = next(line for line in out.splitlines() if line.startswith("FAILED "))
    assert line.endswith(
        "avx2, pot4, granularity=32, threads=2: linear differ in 1 of 2 values, first at [1]: 1.0 and 3.0"
    )
    assert verb.show(failed, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["self_test"]["failures"] == [failure]


def test_the_verb(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"potqat         {potqat.__version__}\n" in out
    assert f"torch          {torch.__version__}\n" in out
    assert f"kernels        {potqat.cpu_info()['isa']} runs; available: " in out
    assert "libpotqat_ops.so\n" in out
    assert "equal bit for bit\n" in out


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["kernels"]["active"] == potqat.cpu_info()["isa"]
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert {"potqat", "python", "torch", "torchao", "numpy", "safetensors"} <= found["versions"].keys()
    assert found["extras"]["matplotlib"]["extra"] == "plot"


def test_forced_kernels_are_named(found, capsys, monkeypatch):
    monkeypatch.setenv("POTQAT_ISA", "scalar")
    kernels = doctor.kernels()
    assert kernels["POTQAT_ISA"] == "scalar"
    verb.show(found | {"kernels": kernels | {"available": ["scalar"], "built": ["avx2", "scalar"]}}, as_json=False)
    out = capsys.readouterr().out
    assert "POTQAT_ISA     scalar\n" in out
    assert "built in, not on this machine: avx2\n" in out


def test_a_missing_extra_says_how_to_get_it(found, capsys):
    assert doctor.installed("potqat-is-never-this") is None
    verb.show(found | {"extras": {"lm-eval": {"version": None, "extra": "eval"}}}, as_json=False)
    assert "lm-eval        not installed: pip install 'potqat[eval]'\n" in capsys.readouterr().out


def tree(root, groups, files):
    """The files that the kernel shows of control groups, under ``root``."""
    for path, content in {"proc/self/cgroup": groups, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


V1 = "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "100000 50000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "5000 10000\n"}, 0.5),
        ("0::/not/shown/here\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1.0),
        (
            V1,
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            1.5,
        ),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("2:cpuset:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1\n"}, None),
    ],
)
def test_cpu_quota(tmp_path, groups, files, quota):
    assert doctor.cpu_quota(tree(tmp_path, groups, files)) == quota


def test_no_control_groups(tmp_path):
    assert doctor.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("threads", "cpus", "quota", "warning"),
    [
        (8, 8, None, None),
        (1, 8, 0.5, None),
        (2, 8, 2.0, None),
        (8, 8, 2.5, "torch uses 8 threads and this container may use 2.5 CPUs: set OMP_NUM_THREADS=2"),
        (2, 8, 0.5, "torch uses 2 threads and this container may use 0.5 CPUs: set OMP_NUM_THREADS=1"),
        (8, 4, None, "torch uses 8 threads and this process may run on 4 CPUs: set OMP_NUM_THREADS=4"),
        (8, 4, 6.0, "torch uses 8 threads and this process may run on 4 CPUs: set OMP_NUM_THREADS=4"),
    ],
)
def test_more_threads_than_cpus_is_a_warning(threads, cpus, quota, warning):
    assert doctor.thread_warnings(threads, cpus, quota) == ([warning] if warning else [])


def test_the_warning_is_printed(capsys, one_thread, found):
    torch.set_num_threads(found["cpu"]["cpus"] + 1)
    assert main(["doctor"]) == 0
    assert "\nwarning        torch uses " in capsys.readouterr().out
