"""The plan for workers, streams and threads follows the machine's limits and the settings."""
import os

import pytest

from app import machine
from app.config import Settings, StartError


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
    assert machine.cpu_limit(tmp_path) == cpus


def test_affinity_is_respected():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("cores", "variables", "workers", "streams"), [
    (1, {}, 1, 1), (2, {}, 1, 2), (8, {}, 1, 8), (9, {}, 2, 5), (64, {}, 8, 8),
    (2, {"WORKERS": "2"}, 2, 1), (4, {"WORKERS": "3"}, 3, 2),
])
def test_streams_of_all_workers_fill_the_cores(monkeypatch, cores, variables, workers, streams):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    plan = machine.plan(Settings.parse({"DEVICE": "cpu", **variables}))
    assert (plan.workers, plan.streams, plan.devices, plan.engine) == (workers, streams, ("cpu",), "openvino")
    assert plan.threads >= plan.slots + plan.queue + machine.SPARE_THREADS


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
