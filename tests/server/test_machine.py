"""The plan for workers, streams and slots follows the machine's limits and the settings."""
import os

import pytest

from app.config import Settings, StartError
from app.server import machine


@pytest.mark.parametrize(("files", "cpus"), [
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({}, None),
])
def test_cgroup_limit_is_read(tmp_path, files, cpus):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.cpu_limit(tmp_path, tmp_path / "missing") == cpus


V1 = {"cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(("membership", "groups", "cpus"), [
    # cgroup v2: systemd's CPUQuota on the unit, on its slice, on both
    ("0::/a.slice/b.service\n", {"a.slice/b.service": {"cpu.max": "250000 100000\n"}}, 2.5),
    ("0::/a.slice/b.service\n", {"a.slice/b.service": {"cpu.max": "max 100000\n"},
                                 "a.slice": {"cpu.max": "150000 100000\n"}}, 1.5),
    ("0::/a.slice/b.service\n", {"a.slice/b.service": {"cpu.max": "50000 100000\n"},
                                 "a.slice": {"cpu.max": "300000 100000\n"}}, 0.5),
    ("0::/a.slice/b.service\n", {"a.slice/b.service": {"cpu.max": "300000 100000\n"},
                                 "a.slice": {"cpu.max": "200000 100000\n"}}, 2),
    ("0::/a.slice/b.service\n", {"c.slice": {"cpu.max": "100000 100000\n"}}, None),  # another's
    # v1: the controllers have a mount together; where it has a link `cpu`, the order may be another
    ("5:memory:/other\n4:cpu,cpuacct:/docker/abc\n", {
        "cpu,cpuacct/docker/abc": {**V1, "cpu.cfs_quota_us": "150000\n"},
        "cpu,cpuacct/docker": {**V1, "cpu.cfs_quota_us": "-1\n"},
        "memory/other": {**V1, "cpu.cfs_quota_us": "1000\n"}}, 1.5),
    ("4:cpu,cpuacct:/docker/abc\n", {"cpu,cpuacct/docker/abc": {**V1, "cpu.cfs_quota_us": "-1\n"},
                                     "cpu,cpuacct/docker": {**V1, "cpu.cfs_quota_us": "200000\n"}}, 2),
    ("4:cpuacct,cpu:/docker/abc\n", {"cpu/docker/abc": {**V1, "cpu.cfs_quota_us": "50000\n"}}, 0.5),
    ("4:cpu,cpuacct:/docker/abc\n", {"cpu,cpuacct": {**V1, "cpu.cfs_quota_us": "50000\n"}}, 0.5),  # in the container
    ("4:cpuset:/a\n", {"cpuset/a": {**V1, "cpu.cfs_quota_us": "50000\n"}}, None),
    # garbage
    ("hello\n\n0:\n\xff\n0::/a\n", {"a": {"cpu.max": "150000 100000\n"}}, 1.5),
    ("0::/a/b/c\n", {"a/b/c": {"cpu.max": "much\n"}, "a/b": {"cpu.max": "100000 0\n"}, "a": {"cpu.max": ""},
                     ".": {"cpu.max": "-5 -5\n"}}, None),
    ("0::/../../elsewhere\n", {}, None),
])
def test_the_smallest_limit_of_the_groups_above_counts(tmp_path, membership, groups, cpus):
    root, own = tmp_path / "cgroup", tmp_path / "membership"
    own.write_bytes(membership.encode("latin-1"))
    for group, files in groups.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / group / name).write_text(text)
    assert machine.cpu_limit(root, own) == cpus


def test_affinity_is_respected():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("cores", "variables", "workers", "streams"), [
    (1, {}, 1, 1), (2, {}, 1, 2), (8, {}, 1, 8), (9, {}, 2, 5), (64, {}, 8, 8),
    (2, {"WORKERS": "2"}, 2, 1), (4, {"WORKERS": "3"}, 3, 2), (64, {"CORES": "2"}, 1, 2), (4, {"CORES": "64"}, 1, 4),
])
def test_streams_of_all_workers_fill_the_cores(monkeypatch, cores, variables, workers, streams):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    plan = machine.plan(Settings.parse({"DEVICE": "cpu", **variables}))
    assert (plan.workers, plan.streams, plan.devices, plan.engine) == (workers, streams, ("cpu",), "openvino")
    assert plan.slots == streams + max(1, streams // 2)
    assert plan.queue == machine.QUEUE * streams


def test_queue_is_a_setting():
    assert machine.plan(Settings.parse({"DEVICE": "cpu", "MAX_QUEUE": "0"})).queue == 0


def test_one_worker_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "cuda_devices", lambda: [0, 1])
    plan = machine.plan(Settings())
    assert (plan.engine, plan.devices, plan.workers) == ("torch", ("cuda:0", "cuda:1"), 2)
    assert machine.plan(Settings.parse({"DEVICE": "cuda:1"})).devices == ("cuda:1",)
    assert machine.plan(Settings.parse({"DEVICE": "cpu"})).devices == ("cpu",)
    with pytest.raises(StartError, match="this machine has cuda:0 to cuda:1"):
        machine.plan(Settings.parse({"DEVICE": "cuda:2"}))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "cuda_devices", lambda: [])
    with pytest.raises(StartError, match="no NVIDIA GPU"):
        machine.plan(Settings.parse({"DEVICE": "cuda"}))
