"""Checks 4 to 13: killed, stopped and hung workers, reloads, stops, and models that do not load."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from clients import BackgroundLoad, Watcher, put_load
from conftest import ROOT, encoded, free_port
from hanging_model import copy_model_dir, replace_model
from PIL import Image
from planted import SLOW_LOAD_S
from traffic import CAT, Load, wait_until

from app.model_loader import HUNG_AFTER_S
from app.prepare.bundles import sha256
from app.server.machine import usable_cores

WORKER_TIMEOUT_S = int(re.search(r"^timeout = (\d+)", (ROOT / "gunicorn.conf.py").read_text(), re.M)[1])
READY = "model ready"


def ready_service(start_service, workers, **variables):
    service = start_service(WORKERS=str(workers), **variables).wait_ready()
    wait_until(lambda: service.log.count(READY) == workers, 30)
    return service


def load_seconds(service):
    """How long each model load took, in log order."""
    lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{") and READY in line]
    return [line["seconds"] for line in lines]


def open_connections(pid, port):
    """Connections that a process has accepted on a port."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(descriptor)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and row[3] != "0A" and int(row[1].split(":")[1], 16) == port for row in rows)


@pytest.mark.check(4, "kill -9 a worker every 5 s under load",
                   "lost: at most that worker's open connections; all workers back within load time + 3 s; no wrong "
                   "answer")
def test_killed_workers(start_service, golden, quick, record_property):
    service = ready_service(start_service, 2)
    kills = 3 if quick else 8
    load = BackgroundLoad(service, golden, 5 * kills + 3, connections=8)
    had_open, slowest = 0, 0.0
    for number in range(kills):
        time.sleep(1)
        victim = service.workers()[number % 2]
        os.kill(victim, signal.SIGSTOP)  # so that the count matches what is lost
        had_open += open_connections(victim, service.port)
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        wait_until(lambda n=number: service.log.count(READY) == n + 3, 60, "no new worker became ready")
        slowest = max(slowest, time.monotonic() - started - load_seconds(service)[-1])
        time.sleep(max(0, started + 4 - time.monotonic()))
    result = load.result()
    record_property("kills", kills)
    record_property("lost", result["lost"] + result["unanswered"])
    record_property("open when killed", had_open)
    record_property("wrong", result["wrong"])
    record_property("answers", result["right"])
    record_property("full pool after load time + s", round(slowest, 2))
    assert result["right"] > 0
    assert result["wrong"] == 0
    assert result["lost"] + result["unanswered"] <= had_open
    assert set(result["statuses"]) == {"200"}
    assert slowest <= 3


@pytest.mark.check(5, "kill -9 the master", "workers gone ≤ 5 s, port free, restart works")
def test_killed_master(start_service, golden, record_property):
    service = ready_service(start_service, 2)
    workers = service.workers()
    load = BackgroundLoad(service, golden, 2, connections=4)
    time.sleep(1)
    service.process.kill()
    service.process.wait()
    started = time.monotonic()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)
    gone_s = time.monotonic() - started
    first = load.result()
    again = start_service(PORT=str(service.port), WORKERS="2")
    again.port, again.url = service.port, service.url
    again.wait_ready()
    result = put_load(again, golden, 1, connections=2)
    record_property("workers gone after s", round(gone_s, 2))
    record_property("right before, after", f"{first['right']}, {result['right']}")
    assert gone_s <= 5
    assert first["wrong"] == result["wrong"] == result["non_200"] == 0
    assert result["right"] > 0


@pytest.mark.check(6, "SIGSTOP a worker", "replaced within its timeout + 5 s; no wrong answer")
def test_stopped_worker(start_service, golden, record_property):
    service = ready_service(start_service, 2)
    victim = service.workers()[0]
    load = BackgroundLoad(service, golden, 5, connections=4)
    time.sleep(1)
    os.kill(victim, signal.SIGSTOP)
    started = time.monotonic()
    wait_until(lambda: service.log.count(READY) == 3 and victim not in service.workers(), 60, "it was not replaced")
    replaced_s = time.monotonic() - started
    during, after = load.result(), put_load(service, golden, 2, connections=4)
    record_property("time-out s", WORKER_TIMEOUT_S)
    record_property("replaced after s", round(replaced_s, 1))
    record_property("right, lost meanwhile", f"{during['right']}, {during['lost'] + during['unanswered']}")
    record_property("right, not 200 after", f"{after['right']}, {after['non_200']}")
    assert replaced_s <= WORKER_TIMEOUT_S + 5
    assert during["wrong"] == after["wrong"] == after["non_200"] == 0
    assert during["right"] > 0
    assert after["right"] > 0


@pytest.mark.check(7, "an inference that hangs", "its client gets 504 by the deadline; the slot is freed")
def test_hung_inference(start_service, model_dir, app, tmp_path, record_property):
    copy_model_dir(model_dir, tmp_path)
    replace_model(tmp_path)
    deadline_s = 2
    service = start_service(MODEL_DIR=str(tmp_path), REQUEST_TIMEOUT=str(deadline_s)).wait_ready()
    before = service.predict(CAT).json()["predictions"]
    white = encoded(Image.new("RGB", (300, 300), "white"))
    started = time.monotonic()
    answer = service.predict(white)
    answered_s = time.monotonic() - started
    others = [service.predict(CAT) for _ in range(5)]
    wait_until(lambda: service.log.count(READY) == 2, HUNG_AFTER_S + 30, "the hung worker was not replaced")
    service.wait_ready()
    back_s = time.monotonic() - started
    with Load(service.url, 4) as load:  # more connections than slots
        time.sleep(1)
    record_property("answer", f"{answer.status_code} {answer.json().get('error', '')}")
    record_property("deadline s", deadline_s)
    record_property("answered after s", round(answered_s, 2))
    record_property("all slots back after s", round(back_s, 1))
    assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    assert answered_s <= deadline_s + 0.5
    assert all(other.json()["predictions"] == before for other in others)
    assert not load.errors
    assert set(load.answers) == {(200, before[0]["class"])}


def reload(service):
    return subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.check(8, "reload under load, with a slow model load", "no error; slowest answer ≤ p99 + 1 s")
def test_reload(start_service, golden, quick, record_property):
    service = ready_service(start_service, 2, application="tests.exam.planted:create_slow()")
    workers = service.workers()
    before = put_load(service, golden, 5 if quick else 10, warm_s=1, connections=2)
    load = BackgroundLoad(service, golden, 18 if quick else 25, connections=2)
    time.sleep(1)
    started = time.monotonic()
    done = reload(service)
    took_s = time.monotonic() - started
    covered = load.running()
    result = load.result()
    record_property("load of the model s", SLOW_LOAD_S)
    record_property("reload of 2 workers s", round(took_s, 1))
    record_property("answers", result["right"])
    record_property("not 200", result["non_200"])
    record_property("wrong", result["wrong"])
    record_property("p99 before ms", round(before["latency_ms"]["p99"]))
    record_property("slowest ms", round(result["latency_ms"]["max"]))
    assert done.returncode == 0, done.stderr
    assert covered, "the reload outlasted the load"
    assert service.workers() == workers
    assert result["wrong"] == result["non_200"] == 0
    assert result["latency_ms"]["max"] <= before["latency_ms"]["p99"] + 1000


@pytest.mark.check(9, "reload with broken or missing weights", "the old model keeps serving; the failure is reported")
def test_bad_reload(start_service, checkpoint, tmp_path, record_property):
    path, good = tmp_path / "model.pt", checkpoint("resnet18", seed=1).read_bytes()
    path.write_bytes(good)
    service = ready_service(start_service, 2, MODEL_NAME="resnet18", MODEL_PATH=str(path))
    workers = service.workers()
    best = service.predict(CAT).json()["predictions"][0]
    outcomes = {}
    damages = {"missing": None, "cut off": good[:10**6], "no weights": b"no weights",
               "other model": checkpoint("resnet34").read_bytes()}
    with Load(service.url, 2) as load:
        for damage, data in damages.items():
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)
            outcomes[damage] = reload(service)
    for damage, done in outcomes.items():
        record_property(damage, f"exit {done.returncode}")
    record_property("answers", len(load.answers))
    record_property("not 200", sum(status != 200 for status, _ in load.answers) + len(load.errors))
    record_property("slowest s", round(load.slowest, 2))
    assert all(done.returncode == 1 and "the old model goes on serving" in done.stderr for done in outcomes.values())
    assert all(len(done.stderr.splitlines()) == 1 for done in outcomes.values())
    assert service.log.count("reload failed") == len(outcomes)
    wait_until(lambda: service.workers() == workers, 5, "other workers")  # the reload's own process ends
    assert not load.errors
    assert set(load.answers) == {(200, best["class"])}
    assert service.predict(CAT).json()["predictions"][0] == best


@pytest.mark.check(10, "SIGTERM under load", "requests in flight complete; exit 0")
def test_stop_under_load(start_service, quick, record_property):
    lost = answered = 0
    codes = set()
    rounds = 2 if quick else 5
    for _ in range(rounds):
        service = start_service().wait_ready()
        with Load(service.url, 16) as load:
            time.sleep(1)
            told = time.monotonic()
            codes.add(service.stop())
        # Sent less than 50 ms before the signal, a request may not have been accepted yet.
        lost += sum(sent < told - 0.05 for sent in load.failed_from)
        answered += len(load.answers)
        assert set(load.answers) == {(200, "tiger cat")}
    record_property("rounds", rounds)
    record_property("in flight each", 16)
    record_property("answers", answered)
    record_property("lost", lost)
    record_property("exit codes", ", ".join(map(str, codes)))
    assert lost == 0
    assert codes == {0}


@pytest.mark.check(11, "start with weights missing, truncated, one bit flipped",
                   "non-zero exit within 10 s, one clear line; never ready")
def test_start_without_good_weights(start_service, checkpoint, tmp_path, record_property):
    good = bytearray(checkpoint("mobilenet_v2").read_bytes())
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    for damage, data in {"missing": None, "truncated": good[:len(good) * 2 // 3], "one bit flipped": flipped}.items():
        path = tmp_path / f"{damage.replace(' ', '-')}.pt"
        if data is not None:
            path.write_bytes(data)
        started = time.monotonic()
        service = start_service(MODEL_NAME="mobilenet_v2", MODEL_PATH=str(path))
        with Watcher(service.port) as watcher:
            code = service.process.wait(60)
            took_s = time.monotonic() - started
        lines = [line for line in service.log.splitlines() if "error: " in line]
        record_property(damage, f"exit {code} after {took_s:.1f} s")
        assert code != 0, damage
        assert took_s <= 10, damage
        assert 200 not in watcher.statuses(), damage
        assert len(lines) == 1, (damage, service.log)
        assert "Traceback" not in service.log, damage


@pytest.mark.check(12, "weights deleted, then a worker killed", "the other one serves; the master survives")
def test_deleted_weights(start_service, model_dir, app, tmp_path, golden, record_property):
    copy_model_dir(model_dir, tmp_path)
    service = ready_service(start_service, 2, MODEL_DIR=str(tmp_path))
    victim, other = service.workers()
    shutil.rmtree(tmp_path / "bundles")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "this worker cannot serve" in service.log, 15)
    result = put_load(service, golden, 8, connections=4)
    attempts = service.log.count("this worker cannot serve")
    record_property("answers", result["right"])
    record_property("not 200", result["non_200"])
    record_property("wrong", result["wrong"])
    record_property("attempts to replace it", attempts)
    assert service.process.poll() is None
    assert other in service.workers()
    assert result["right"] > 0
    assert result["wrong"] == result["non_200"] == 0


@pytest.mark.check(13, "before the model is warm", "/health 503 or no connection, never 200")
def test_never_ready_too_early(start_service, record_property):
    started = time.monotonic()
    service = start_service(application="tests.exam.planted:create_slow()", WORKERS="2")
    with Watcher(service.port, every_s=0.005) as watcher:
        wait_until(lambda: 200 in watcher.statuses(), 60)
        answer = service.predict(CAT)
    first = next(moment + took_s for moment, status, took_s in watcher.seen if status == 200)  # when the answer arrived
    record_property("asked", len(watcher.seen))
    record_property("first 200 after s", round(first - started, 2))
    record_property("load of the model s", SLOW_LOAD_S)
    assert answer.json()["predictions"][0]["class"] == "tiger cat"
    assert watcher.statuses() <= {None, 503, 200}
    assert first - started >= SLOW_LOAD_S


@pytest.mark.check(30, "all of the service's files in /dev/shm and /tmp removed",
                   "predictions continue; SIGTERM stops it; a crashed worker is replaced")
def test_files_removed(start_service, golden, record_property):
    service = ready_service(start_service, 2)
    removed = 0
    for pid in (service.process.pid, *service.workers()):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = Path(os.readlink(link))
            if target.is_relative_to("/dev/shm") or target.is_relative_to("/tmp") and "pytest-" not in str(target):
                removed += target.exists()
                target.unlink(missing_ok=True)
    for path in (*Path("/dev/shm").glob("*model-server*"), *Path("/tmp").glob("*model-server*")):
        shutil.rmtree(path, ignore_errors=True)
        removed += 1
    load = BackgroundLoad(service, golden, 4, connections=4)
    time.sleep(1)
    os.kill(service.workers()[0], signal.SIGKILL)
    wait_until(lambda: service.log.count(READY) == 3, 30, "the worker was not replaced")
    result = load.result()
    code = service.stop()
    record_property("removed", removed)
    record_property("right", result["right"])
    record_property("statuses", json.dumps(result["statuses"]))
    record_property("lost with the crashed worker", result["lost"] + result["unanswered"])
    record_property("wrong", result["wrong"])
    record_property("exit code", code)
    assert result["right"] > 0
    assert set(result["statuses"]) == {"200"}
    assert result["wrong"] == 0
    assert result["lost"] + result["unanswered"] <= 4
    assert code == 0


@pytest.mark.check(31, "two reloads at once; the preparing process killed halfway",
                   "each reports its true outcome; as many workers as before; the next reload works")
def test_reloads_at_once(start_service, checkpoint, tmp_path, golden, record_property):
    path = tmp_path / "model.pt"

    def put(seed):
        shutil.copy(checkpoint("resnet18", seed=seed), tmp_path / "new.pt")
        os.replace(tmp_path / "new.pt", path)
        return sha256(path)

    def ask_for_reload():
        return subprocess.Popen([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def serves():
        return {requests.get(service.url + "/info").json()["model"]["weights"]["sha256"] for _ in range(8)}
    first = put(1)
    service = ready_service(start_service, 2, MODEL_NAME="resnet18", MODEL_PATH=str(path))
    workers = service.workers()
    with Load(service.url, 2) as load:
        put(2)
        one = ask_for_reload()
        wait_until(lambda: service.log.count("reloading: preparing") == 1, 10)
        third = put(3)
        other = ask_for_reload()
        texts = [process.communicate(timeout=120)[0].strip() for process in (one, other)]
        codes, after_both = (one.returncode, other.returncode), serves()
        put(4)
        killed = ask_for_reload()
        wait_until(lambda: len(service.workers()) == 3, 10)
        (preparing,) = set(service.workers()) - set(workers)
        os.kill(preparing, signal.SIGKILL)
        texts.append(killed.communicate(timeout=60)[0].strip())
        after_kill = serves()
        again = put(5)
        last = ask_for_reload()
        texts.append(last.communicate(timeout=120)[0].strip())
        after_last = serves()
    record_property("outcomes", "; ".join(texts))
    record_property("answers, not 200", f"{len(load.answers)}, {sum(status != 200 for status, _ in load.answers)}")
    assert first not in after_both
    assert codes == (0, 0)
    assert after_both == after_kill == {third}
    assert third[:12] in texts[1]
    assert killed.returncode == 1
    assert "ended prematurely" in texts[2]
    assert (last.returncode, after_last) == (0, {again})
    assert service.workers() == workers
    assert not load.errors
    assert {status for status, _ in load.answers} == {200}


@pytest.mark.check(34, "Gunicorn's command line: -w, -b, -k, --threads, --preload",
                   "applied, or refused with one line; never ignored")
def test_command_line(start_service, record_property):
    port = free_port()
    service = start_service(GUNICORN_CMD_ARGS=f"-w 2 -b 127.0.0.1:{port}")
    service.port, service.url = port, f"http://127.0.0.1:{port}"
    service.wait_ready()
    wait_until(lambda: service.log.count(READY) == 2, 30)
    starting = next(json.loads(line) for line in service.log.splitlines() if '"starting"' in line)
    said = f"{starting['workers']} workers of {starting['streams']} streams"
    record_property("-w 2 -b", f"{said}, {service.url} in the log: {service.url in service.log}")
    assert starting["workers"] * starting["streams"] <= max(2, usable_cores())
    assert f'"url": "{service.url}"' in service.log
    assert service.predict(CAT).status_code == 200
    for arguments in ("-k sync", "-k gthread", "--threads 4", "--preload", "-w 0"):
        refused = start_service(GUNICORN_CMD_ARGS=arguments)
        code = refused.process.wait(30)
        lines = [line for line in refused.log.splitlines() if "error: " in line]
        record_property(arguments, f"exit {code}: {lines[0] if lines else ''}")
        assert code != 0, arguments
        assert len(lines) == 1, refused.log
        assert "Traceback" not in refused.log
