"""Which version answers: shares, clients that keep theirs, and a switch that all processes see at once."""
import collections
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from app.config import Settings, StartError
from app.engine.bundle import Prepared
from app.server import shared_memory, traffic

CLIENTS = [f"10.0.{i // 256}.{i % 256}" for i in range(20_000)]
VARIABLES = {"MODELS": "cats@1,cats@2,cats@3,dogs,birds@a", "CATS__SPLIT": "90:10", "CATS__SHADOW": "3"}
AT_FIRST = {"cats": {"split": [["1", 90], ["2", 10]], "shadow": "3"},
            "birds": {"split": [["a", 100]], "shadow": None}}


@pytest.fixture
def service():
    """A process with a Board that has published the models of VARIABLES, as a service's master has."""
    code = f"""
import sys
from pathlib import Path
from app import model_settings
from app.config import Settings
from app.engine.bundle import Prepared
from app.server import board, shared_memory, traffic
settings = Settings.parse({VARIABLES!r})
shared_memory.create(1)
traffic.start(traffic.of(board.own), settings)
board.own.publish([Prepared(Path(key), key=key) for key in model_settings.each(settings)])
print("ready", flush=True)
sys.stdin.read()"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                          text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def area_of(service):
    return traffic.of(shared_memory.running_service(service.pid)[1])


def command(service, *arguments):
    return subprocess.run([sys.executable, "-m", "app", "traffic", *arguments, "--pid", str(service.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)


# --- who gets which version ---

@pytest.mark.parametrize("split", [[["1", 90], ["2", 10]], [["1", 50], ["2", 50]], [["1", 99.5], ["2", 0.5]]])
def test_versions_get_their_shares(split):
    got = collections.Counter(traffic.choose("cats", split, client) for client in CLIENTS)
    for version, percent in split:
        expected = len(CLIENTS) * percent / 100
        spread = (expected * (1 - percent / 100)) ** 0.5
        assert abs(got[version] - expected) < 4 * spread


def test_a_client_keeps_its_version_in_every_process():
    split = [["1", 50], ["2", 50]]
    here = [traffic.choose("cats", split, client) for client in CLIENTS[:200]]
    code = f"""
from app.server import traffic
print("".join(traffic.choose("cats", {split!r}, client) for client in {CLIENTS[:200]!r}))"""
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "".join(here) == there.strip()
    assert "".join(here[:20]) == "11122222221111222112"  # and in every release: from sha256sum


def test_a_growing_share_moves_only_those_who_must():
    before = [traffic.choose("cats", [["1", 90], ["2", 10]], client) for client in CLIENTS]
    after = [traffic.choose("cats", [["1", 80], ["2", 20]], client) for client in CLIENTS]
    moved = collections.Counter(zip(before, after, strict=True))
    assert moved["2", "1"] == 0
    assert abs(moved["1", "2"] - len(CLIENTS) / 10) < 4 * (len(CLIENTS) * 0.1 * 0.9) ** 0.5


def test_names_split_their_clients_independently():
    split = [["1", 50], ["2", 50]]
    both = collections.Counter((traffic.choose("cats", split, one), traffic.choose("dogs", split, one))
                               for one in CLIENTS)
    assert min(both.values()) > 0.23 * len(CLIENTS)


def test_one_version_gets_all_and_none_gets_nothing():
    assert {traffic.choose("cats", [["2", 100]], client) for client in CLIENTS} == {"2"}
    assert {traffic.choose("cats", [["1", 99.99], ["2", 0.01]], client) for client in CLIENTS} == {"1", "2"}


# --- the memory ---

def test_without_gunicorn_the_settings_hold():
    assert traffic.own(Settings.parse(VARIABLES)).read() == AT_FIRST
    assert traffic.own(Settings()).read() == {}


def test_the_models_and_the_traffic_do_not_touch_each_other(own_board):
    area = traffic.of(own_board)
    traffic.start(area, Settings.parse(VARIABLES))
    own_board.publish([Prepared(Path("/" + "x" * 240), key=f"model_{i}") for i in range(60)])
    for i in range(40):
        own_board.add_outcome(i, False, "😀" * 5000)
    assert area.read() == AT_FIRST
    assert len(own_board.published()["models"]) == 60
    assert own_board.read()["reloads"][-1]["covers"] == 39
    with pytest.raises(StartError, match="^100 models are too many for one service"):
        own_board.publish([Prepared(Path("/" + "x" * 240), key=f"model_{i}") for i in range(100)])
    assert len(own_board.published()["models"]) == 60
    many = ",".join(f"{'x' * 60}{i}@{j}" for i in range(120) for j in (1, 2))
    with pytest.raises(StartError, match="^MODELS has too many models with versions"):
        traffic.start(area, Settings.parse({"MODELS": many}))
    assert area.read() == AT_FIRST


def test_readers_parse_only_what_has_changed():
    area = traffic.own(Settings.parse(VARIABLES))
    first = area.read()
    assert area.read() is first
    area.write(lambda shares: {**shares, "cats": {"split": [["2", 100]], "shadow": None}})
    assert area.read() == {**first, "cats": {"split": [["2", 100]], "shadow": None}}
    assert first == AT_FIRST  # whoever still works with it is not disturbed


def test_a_writer_that_is_killed_at_any_point_changes_nothing(service):
    """Killed in the middle of its change, after the text, and after its length: before the one step that counts."""
    area = area_of(service)
    for at in ("json", "bytes", "length"):
        code = f"""
import os, signal
from app.server import traffic
from app.server.shared_memory import running_service
area = traffic.of(running_service({service.pid})[1])
class Memory:
    def __init__(self, memory, dies_at): self.memory, self.dies_at = memory, dies_at
    def __getitem__(self, at): return self.memory[at]
    def __setitem__(self, at, value):
        self.memory[at] = value
        if self.dies_at: os.kill(os.getpid(), signal.SIGKILL)
area.bytes = Memory(area.bytes, {at == "bytes"})
area.integers = Memory(area.integers, {at == "length"})
area.write(lambda shares: {{}} if {at!r} != "json" else os.kill(os.getpid(), signal.SIGKILL))"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert area.read() == area_of(service).read() == AT_FIRST
    done = command(service, "cats", "2")  # and the next one is not locked out
    assert done.returncode == 0, done.stderr
    assert area.read()["cats"]["split"] == [["2", 100]]


def test_writers_in_many_processes_lose_none_of_each_others_changes(service):
    code = f"""
import sys, time
from app.server import traffic
from app.server.shared_memory import running_service
area = traffic.of(running_service({service.pid})[1])
def change(shares):
    time.sleep(0.002)  # so that another one that came in between would be lost
    return {{**shares, sys.argv[1]: shares.get(sys.argv[1], 0) + 1}}
for i in range(100):
    area.write(change)"""
    area, seen = area_of(service), []
    writers = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT) for name in ("a", "b", "a", "b")]
    while any(writer.poll() is None for writer in writers):
        shares = area.read()
        assert shares["cats"] == AT_FIRST["cats"]
        seen.append(shares.get("a", 0) + shares.get("b", 0))
        time.sleep(0.0005)
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert (area.read()["a"], area.read()["b"]) == (200, 200)


def test_writers_in_threads_lose_none_of_each_others_changes():
    area = traffic.own(Settings())

    def change(shares):
        time.sleep(0.0001)
        return {"a": shares.get("a", 0) + 1}

    def work():
        for _ in range(200):
            area.write(change)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert area.read() == {"a": 800}


def test_a_writer_that_does_not_end_is_not_waited_for_for_ever(service, monkeypatch):
    monkeypatch.setattr(traffic, "WRITE_WITHIN_S", 0.2)
    area, other = area_of(service), area_of(service)
    fcntl.flock(other.descriptor, fcntl.LOCK_EX)
    started = time.monotonic()
    with pytest.raises(StartError, match="another process is changing the traffic"):
        area.write(lambda shares: {})
    assert time.monotonic() - started < 4
    assert area.read() == AT_FIRST  # readers never wait
    fcntl.flock(other.descriptor, fcntl.LOCK_UN)
    area.write(lambda shares: {})
    assert area.read() == {}


def test_a_process_that_ends_while_services_are_looked_for_hides_none(service, monkeypatch):
    ended, scandir = f"/proc/{os.getpid()}/fd", os.scandir

    def scan(path):
        if str(path) == ended:
            raise FileNotFoundError(ended)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", scan)
    assert service.pid in shared_memory.services()


# --- the command ---

def test_the_command_shows_and_switches_what_all_processes_see(service):
    area = area_of(service)
    done = command(service)
    assert (done.returncode, done.stdout) == (0, (
        "cats: version 1 gets 90 %, version 2 gets 10 %, version 3 gets 0 %; version 3 is the shadow\n"
        "birds: version a gets 100 %; no shadow\n"))
    for arguments, percents, shadow, split in (
            (["1:80,2:20"], (80, 20, 0), "3", [["1", 80], ["2", 20]]),
            (["--shadow", "2"], (80, 20, 0), "2", [["1", 80], ["2", 20]]),
            (["2"], (0, 100, 0), None, [["2", 100]]),
            (["3:50,2:50", "--shadow", "1"], (0, 50, 50), "1", [["2", 50], ["3", 50]]),
            (["1", "--shadow", "none"], (100, 0, 0), None, [["1", 100]])):
        line = (", ".join(f"version {i} gets {percent} %" for i, percent in enumerate(percents, 1))
                + (f"; version {shadow} is the shadow" if shadow else "; no shadow"))
        done = command(service, "cats", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            "cats: " + line, "This holds until the next restart; then CATS__SPLIT and CATS__SHADOW hold."]
        assert area.read() == {**AT_FIRST, "cats": {"split": split, "shadow": shadow}}
        assert command(service, "cats").stdout == f"cats: {line}\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["dogs", "1"], "this service has no versions of dogs, only of cats, birds"),
    (["cats", "4"], "SPLIT must be one of its versions (1, 2, 3), or percentages of two"),
    (["cats", "1:90,2:20"], "SPLIT must be one of its versions (1, 2, 3), or percentages of two"),
    (["cats", "1", "--shadow", "1"], "--shadow must be 2 or 3 or none"),
    (["cats", "--shadow", "9"], "--shadow must be 1 or 2 or 3 or none"),
    (["cats", "--shadow", ""], "--shadow must be 1 or 2 or 3 or none"),
    (["--shadow", "2"], "--shadow needs the NAME of a model"),
])
def test_a_switch_that_does_not_fit_changes_nothing_and_says_so_in_one_line(service, arguments, message):
    done = command(service, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert area_of(service).read() == AT_FIRST


def test_without_a_service_the_command_says_so():
    done = subprocess.run([sys.executable, "-m", "app", "traffic", "cats", "1", "--pid", "0"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no running service ")  # others may run on this machine
