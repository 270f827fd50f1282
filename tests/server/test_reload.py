"""Reloads: models swapped in place under load, and what is served when a reload goes wrong."""
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from conftest import ROOT, Service, exported
from hanging_model import copy_model_dir
from traffic import CAT, Load, wait_until, workers_ready

from app.config import Settings


def reload(service):
    return subprocess.Popen([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def beside(workers, service):
    """The process that prepares a reload, as soon as there is one."""
    found = set()
    wait_until(lambda: found.update(set(service.workers()) - set(workers)) or found, 60)
    (pid,) = found
    return pid


def weights_of(service):
    return requests.get(service.url + "/info").json()["model"]["weights"]["sha256"]


@pytest.fixture(scope="module")
def reloads_dir(tmp_path_factory, model_dir, checkpoint, app):
    """A MODEL_DIR for squeezenet1_1 with the seeds 1 to 3, of which 2 is to be exported by the first reload: of each
    model only KEPT bundles stay."""
    folder = copy_model_dir(model_dir, tmp_path_factory.mktemp("reloads"))
    for seed in (1, 3):
        path = checkpoint("squeezenet1_1", seed=seed)
        exported(Settings.parse({"MODEL_NAME": "squeezenet1_1", "MODEL_PATH": str(path), "DEVICE": "cpu",
                                 "MODEL_DIR": str(folder)}))
    return folder


@pytest.fixture
def two_workers(start_service, checkpoint, reloads_dir, tmp_path):
    """(a Service of two workers with a squeezenet1_1, put(seed) which replaces its weights)."""
    path = tmp_path / "model.pt"

    def put(seed):
        shutil.copy(checkpoint("squeezenet1_1", seed=seed), tmp_path / "new.pt")
        os.replace(tmp_path / "new.pt", path)
    put(1)
    service = start_service(MODEL_NAME="squeezenet1_1", MODEL_PATH=str(path), MODEL_DIR=str(reloads_dir),
                            WORKERS="2").wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    return service, put


def test_new_weights_are_reloaded_in_place_without_a_gap(two_workers):
    service, put = two_workers
    workers, before = service.workers(), weights_of(service)
    with Load(service.url, 2, pause_s=0.2) as load:
        time.sleep(0.3)
        put(2)
        done = reload(service)
        stdout, stderr = done.communicate(timeout=120)
        time.sleep(0.3)
    assert done.returncode == 0, stderr
    assert "reloaded: 2 workers serve squeezenet1_1-" in stdout
    assert service.workers() == workers
    assert {weights_of(service) for _ in range(8)}.isdisjoint({before})
    assert not load.errors
    assert {status for status, _ in load.answers} == {200}


def test_two_who_ask_at_once_are_told_of_a_reload_that_began_after_they_asked(two_workers):
    service, put = two_workers
    workers, cores = service.workers(), len(os.sched_getaffinity(0))
    put(2)
    first = reload(service)
    preparing = beside(workers, service)
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, preparing) == min(19, os.nice(0) + 10), 30)
    wait_until(lambda: len(os.sched_getaffinity(preparing)) <= max(1, cores // 2), 30)  # beside the workers
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in workers} == {os.nice(0)}
    put(3)
    second = reload(service)
    outcomes = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert all("reloaded: 2 workers" in outcome for outcome in outcomes)
    assert service.log.count("reloading: preparing") == 2
    expected = hashlib.sha256((Path(service.log_path).parent / "model.pt").read_bytes()).hexdigest()
    assert {weights_of(service) for _ in range(8)} == {expected}
    assert "squeezenet1_1-" + expected[:12] in outcomes[1]


def test_a_replaced_model_gives_its_memory_back(service):
    def resident():
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in service.workers()) / 256  # MiB
    sizes = []
    for _ in range(3):
        process = reload(service)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282
        sizes.append(resident())
    wait_until(lambda: resident() < sizes[1] + 25, 30, sizes)  # a model takes 60


@pytest.fixture(scope="module")
def squeezenet1_1(tmp_path_factory, checkpoint, reloads_dir):
    """(a ready Service with a squeezenet1_1, the path of its weights)."""
    path = tmp_path_factory.mktemp("squeezenet1_1") / "model.pt"
    shutil.copy(checkpoint("squeezenet1_1", seed=1), path)
    running = Service(path.parent, {"MODEL_NAME": "squeezenet1_1", "MODEL_PATH": str(path), "DEVICE": "cpu",
                                    "MODEL_DIR": str(reloads_dir)})
    yield running.wait_ready(), path
    running.kill()


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_reload_of_a_bad_model_changes_nothing(squeezenet1_1, checkpoint, damage):
    service, path = squeezenet1_1
    workers, so_far = service.workers(), len(service.log)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(checkpoint("squeezenet1_1", seed=2).read_bytes()[:10**6] if damage == "cut" else b"no weights")
    done = subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the old model goes on serving" in done.stderr
    assert "reload failed" in service.log[so_far:]
    wait_until(lambda: service.workers() == workers, 30)  # and nothing is left of the check's own process
    assert service.predict(CAT).status_code == 200
    os.kill(workers[0], signal.SIGKILL)  # a worker that is replaced now gets the old model too
    wait_until(lambda: "model ready" in service.log[so_far:], 30)
    assert service.wait_ready().predict(CAT).status_code == 200


def test_a_reload_of_several_models_is_all_or_nothing(start_service, checkpoint, reloads_dir, tmp_path):
    path = tmp_path / "model.pt"
    shutil.copy(checkpoint("squeezenet1_1", seed=1), path)
    service = start_service(MODELS="efficientnet_lite0,other@1=squeezenet1_1", OTHER__1__MODEL_PATH=str(path),
                            MODEL_DIR=str(reloads_dir)).wait_ready()
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    (tmp_path / "broken.pt").replace(path)
    command = reload(service)
    assert "reload failed, the old model goes on serving: other@1: " in command.communicate(timeout=120)[1]
    assert command.returncode == 1
    shutil.copy(checkpoint("squeezenet1_1", seed=2), path)
    command = reload(service)
    assert re.fullmatch("reloaded: 1 worker serves efficientnet_lite0=efficientnet_lite0-[^ ,]+, "
                        "other@1=squeezenet1_1-[^ ,]+\n", command.communicate(timeout=120)[0])
    assert service.log.count("published ") == 1
    assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282


OWN = """
import os, subprocess, sys, threading, time
from app.tasks.own import OwnTask

print("a line, and half of the next", end="")

class Twice(OwnTask):
    takes, field, example = "json", "number", 2

    def load(self):
        os.write(1, b"no JSON")
        if "app/__main__.py" in sys.argv[0]:  # while it is checked
            threading.Thread(target=time.sleep, args=(600,)).start()
            subprocess.Popen(["sleep", "60"], close_fds=False)
            os.register_at_fork(after_in_child=lambda: time.sleep(60))
            os.fork()

    def predict(self, batch):
        return [FACTOR * one for one in batch]
"""


def answer_of(service, number):
    return requests.post(service.url + "/predict", json={"number": number}).json()["predictions"]


def test_new_code_of_a_model_of_ones_own_is_reloaded_whatever_it_prints_and_leaves_behind(start_service, tmp_path):
    (tmp_path / "own_model.py").write_text(OWN.replace("FACTOR", "2"))
    service = start_service(MODEL_NAME="own_model:Twice", PYTHONPATH=str(tmp_path), WORKERS="2").wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    assert answer_of(service, 4) == 8
    (tmp_path / "own_model.py").write_text(OWN.replace("FACTOR", "30"))
    command = reload(service)
    assert command.communicate(timeout=45) == ("reloaded: 2 workers serve own_model:Twice\n", "")
    assert {answer_of(service, 4) for _ in range(8)} == {120}


@pytest.fixture(scope="module")
def twice(tmp_path_factory, model_dir):
    """(a ready Service with OWN and another model, the path of its code)."""
    path = tmp_path_factory.mktemp("twice") / "own_model.py"
    path.write_text(OWN.replace("FACTOR", "2"))
    running = Service(path.parent, {"MODELS": "twice=own_model:Twice,efficientnet_lite0", "DEVICE": "cpu",
                                    "PYTHONPATH": str(path.parent), "MODEL_DIR": str(model_dir)})
    yield running.wait_ready(), path
    running.kill()


@pytest.mark.parametrize(("code", "why"), [
    ("import not_there\n" + OWN, "failed: ModuleNotFoundError: No module named 'not_there' (own_model.py, line 1)"),
    (OWN.replace("FACTOR", "None"), "fails its self-test"),
    (OWN.replace("FACTOR", "os._exit(3)"), "ended prematurely"),
    (OWN.replace("class Twice", "class Thrice"), "own_model:Twice cannot be served: Twice is not in own_model")])
def test_broken_code_of_a_model_of_ones_own_changes_nothing(twice, code, why):
    service, path = twice
    path.write_text(code)
    command = reload(service)
    stderr = command.communicate(timeout=45)[1]
    assert command.returncode == 1
    assert "reload failed, the old model goes on serving: " in stderr
    assert why in stderr
    assert answer_of(service, 4) == 8


def test_a_reload_that_is_killed_is_told_and_the_next_one_works(start_service):
    service = start_service().wait_ready()
    workers = service.workers()
    command = reload(service)
    os.kill(beside(workers, service), signal.SIGKILL)
    assert "ended prematurely" in command.communicate(timeout=60)[1]
    assert command.returncode == 1
    wait_until(lambda: service.workers() == workers, 30)
    assert service.predict(CAT).status_code == 200
    command = reload(service)
    assert "reloaded: 1 worker serves" in command.communicate(timeout=60)[0]


def test_a_worker_that_cannot_load_what_was_published_keeps_what_it_has(start_service, model_dir, app, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    service = start_service(MODEL_DIR=str(tmp_path), WORKERS="2").wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    victim = service.workers()[0]
    pages = int(Path(f"/proc/{victim}/statm").read_text().split()[0])
    resource.prlimit(victim, resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**20, resource.RLIM_INFINITY))
    command = reload(service)
    stderr = command.communicate(timeout=60)[1]
    assert command.returncode == 1
    assert "1 of 2 workers serve" in stderr
    assert "this worker keeps the old model" in service.log
    resource.prlimit(victim, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for _ in range(8):
        assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282


def test_a_published_bundle_that_is_gone_is_replaced_by_the_one_before(two_workers):
    service, put = two_workers
    before = weights_of(service)
    put(2)
    assert "reloaded: 2 workers" in reload(service).communicate(timeout=60)[0]
    published = weights_of(service)
    (folder,) = model_folders(service, published)
    shutil.rmtree(folder)
    for pid in service.workers():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: service.log.count("model ready") == 6, 30)
    assert {weights_of(service) for _ in range(4)} == {before}
    assert "the published model cannot be loaded" in service.log


def model_folders(service, sha256):
    environment = Path(f"/proc/{service.process.pid}/environ").read_bytes().decode().split("\0")
    model_dir = next(line for line in environment if line.startswith("MODEL_DIR=")).partition("=")[2]
    return list(Path(model_dir).glob(f"bundles/squeezenet1_1-{sha256[:12]}*"))
