"""Versions of a model behind one name, in real workers: shares, switches under load, killed workers, reloads."""
import collections
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT
from traffic import wait_until, workers_ready

from app.server import traffic

WHICH = '''
import time
from app.tasks.own import OwnTask

class Which(OwnTask):
    """Says which version it is, and since when."""
    takes = "text"

    def load(self):
        self.which = [self.settings.model_path.name, self.settings.model_path.read_text()]

    def predict(self, batch):
        time.sleep(0.005)
        return [self.which for _ in batch]
'''
USERS = [f"user-{i}" for i in range(60)]


@pytest.fixture
def service(start_service, tmp_path):
    """A ready service of two workers: cats@1, cats@2 and another model, split 90:10 by the header X-User."""
    (tmp_path / "which.py").write_text(WHICH)
    for version in "12":
        (tmp_path / version).write_text("first")
    running = start_service(MODELS="cats@1=which:Which,cats@2=which:Which,other=which:Which", PYTHONPATH=str(tmp_path),
                            CATS__1__MODEL_PATH=str(tmp_path / "1"), CATS__2__MODEL_PATH=str(tmp_path / "2"),
                            OTHER__MODEL_PATH=str(tmp_path / "2"), CATS__SPLIT="90:10", SPLIT_HEADER="X-User",
                            WORKERS="2", MODEL_NAME="").wait_ready()
    wait_until(lambda: workers_ready(running.url) == 2, 30)
    return running


def ask(service, user, name="cats"):
    """(version, metadata's version, since) of the answer to a user."""
    answer = requests.post(f"{service.url}/models/{name}/predict", json={"text": "?"}, headers={"X-User": user},
                           timeout=30)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return *body["predictions"], body["metadata"].get("version")


def command(service, *arguments):
    done = subprocess.run([sys.executable, "-m", "app", *arguments, "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_user_gets_the_version_of_the_split_from_every_worker(service):
    expected = {user: traffic.choose("cats", [["1", 90], ["2", 10]], user) for user in USERS}
    assert collections.Counter(expected.values())["2"] in range(1, 15)
    for _ in range(3):
        for user in USERS:
            version, _, said = ask(service, user)
            assert (version, said) == (expected[user], expected[user])
    assert {ask(service, user, "cats@2")[0] for user in USERS[:10]} == {"2"}
    assert {ask(service, user, "other")[2] for user in USERS[:10]} == {None}


def test_a_switch_and_back_under_load_holds_at_once_and_drops_nothing(service):
    answers, failures, stopping = [], [], threading.Event()

    def load(number):
        with requests.Session() as session:
            while not stopping.is_set():
                asked = time.monotonic()
                try:
                    answer = session.post(f"{service.url}/models/cats/predict", json={"text": "?"}, timeout=30,
                                          headers={"X-User": f"{number}-{len(answers)}"})
                    answers.append((asked, time.monotonic(), answer.status_code,
                                    answer.json().get("predictions", [None])[0]))
                except requests.RequestException as e:
                    failures.append(e)
    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    switched = []  # (from when, until when, the version that answers)
    try:
        for version in "21212":
            command(service, "traffic", "cats", version)
            since = time.monotonic()
            wait_until(lambda since=since: sum(since < asked for asked, *_ in answers) > 3, 30)
            switched.append((since, time.monotonic(), version))
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert {status for _, _, status, _ in answers} == {200}
    for since, until, version in switched:
        # Of requests sent once the command had ended, and answered before the next one began.
        seen = collections.Counter(got for asked, answered, _, got in answers if since < asked and answered < until)
        assert set(seen) == {version}
        assert seen[version] > 3


def test_a_switch_survives_killed_workers_and_reloads(service, tmp_path):
    workers = service.workers()
    command(service, "traffic", "cats", "2")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(service.workers()) == 2 and not set(workers) & set(service.workers()), 30)
    service.wait_ready()
    assert {ask(service, user)[0] for user in USERS} == {"2"}
    (tmp_path / "2").write_text("second")
    stdout = command(service, "reload")
    assert stdout == ("reloaded: 2 workers serve cats@1=which:Which, cats@2=which:Which, other=which:Which\n")
    assert {ask(service, user) for user in USERS} == {("2", "second", "2")}
    assert "version 1 gets 0 %, version 2 gets 100 %" in command(service, "traffic")


def test_a_reload_of_which_one_version_fails_changes_none(service, tmp_path):
    (tmp_path / "1").write_text("second")
    (tmp_path / "2").unlink()
    done = subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("reload failed, the old model goes on serving: cats@2: ")
    assert {ask(service, user, "cats@1") for user in USERS[:10]} == {("1", "first", "1")}
    assert {ask(service, user, "cats@2") for user in USERS[:10]} == {("2", "first", "2")}
