"""Checks 35 to 40: jobs while the processes and servers that they need are killed and come back."""
import collections
import http.server
import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
import requests
from conftest import Service
from job_workers import FINAL, Jobs, Worker
from servers import Postgres, Redis, find_program

EVERY_S = 0.06      # a job
PREDICT_EVERY_S = 0.25
END_WITHIN_S = 120  # after the trouble
PREDICT_WITHIN_S = 10


class Receiver:
    """Gets the webhooks of all jobs: how often each has ended, as its client sees it."""

    def __init__(self):
        self.ends, self.states, lock = collections.defaultdict(set), {}, threading.Lock()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    receiver.ends[event["job"]["id"]].add(event["id"])
                    receiver.states[event["job"]["id"]] = event["job"]["state"]
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Clients:
    """Submits jobs with an Idempotency-Key each, and repeats what was not answered; makes predictions beside."""

    def __init__(self, system):
        self.system, self.stopping = system, threading.Event()
        self.accepted, self.refused, self.unanswered = {}, 0, 0  # accepted: {job's ID: number of the picture}
        self.predictions = collections.Counter()
        self.threads = [threading.Thread(target=work) for work in (self.submit, self.submit, self.predict)]
        for thread in self.threads:
            thread.start()

    def submit(self):
        golden = self.system.golden
        pictures = [Path(path).read_bytes() for path in golden["files"]]
        number = 0
        while not self.stopping.is_set():
            number = (number + 1) % len(pictures)
            headers = {"Idempotency-Key": uuid.uuid4().hex}
            until = time.monotonic() + END_WITHIN_S
            while time.monotonic() < until:
                try:
                    answer = requests.post(
                        self.system.url + "/jobs", headers=headers, files={"file": ("a.png", pictures[number])},
                        data={"callback_url": self.system.receiver.url, "top_k": "1"}, timeout=20)
                except requests.RequestException:
                    self.unanswered += 1
                else:
                    if answer.status_code == 202:
                        self.accepted[answer.json()["id"]] = number
                        break
                    assert answer.status_code == 503, answer.text
                    self.refused += 1
                time.sleep(0.2)
            time.sleep(EVERY_S)

    def predict(self):
        with open(self.system.golden["files"][0], "rb") as file:
            picture = file.read()
        while not self.stopping.wait(PREDICT_EVERY_S):
            try:
                answer = requests.post(self.system.url + "/predict", files={"file": ("a.png", picture)},
                                       timeout=PREDICT_WITHIN_S)
                self.predictions[answer.status_code] += 1
            except requests.RequestException:
                self.predictions["no answer"] += 1

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()


class System:
    """A service, a worker, their servers, a receiver of webhooks."""

    def __init__(self, folder, golden, model_dir, with_servers):
        self.folder, self.golden, self.receiver = folder, golden, Receiver()
        self.variables = {"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir), "DEVICE": "cpu",
                          "JOBS": "on", "DATA_DIR": str(folder / "data"), "MAX_JOBS": "10000",
                          "CALLBACK_SECRET": "of-this-check-alone", "CALLBACK_URLS": self.receiver.url,
                          "PRIVATE_NETWORKS": "127.0.0.1/32"}
        self.redis = self.postgres = None
        if with_servers:
            for program in ("redis-server", "initdb"):
                if not find_program(program):
                    pytest.skip(f"{program} is not installed")
            self.redis, self.postgres = Redis(folder).start(), Postgres(folder).start()
            self.variables |= {"JOBS_BROKER": self.redis.url, "DATABASE_URL": self.postgres.url}
        self.worker = Worker(folder, self.variables)
        self.service = Service(folder, self.variables)
        self.port, self.url = self.service.port, self.service.wait_ready().url
        self.worker.wait_ready()

    def kill_process(self):
        pids = self.worker.nodes()
        if pids:
            os.kill(pids[0], signal.SIGKILL)

    def kill_worker(self):
        self.worker.stop(signal.SIGKILL)
        self.worker.start()

    def kill_service_process(self):
        for pid in self.service.workers():
            os.kill(pid, signal.SIGKILL)

    def kill_service(self):
        os.killpg(self.service.process.pid, signal.SIGKILL)
        self.service.process.wait()
        self.service = Service(self.folder, {**self.variables, "PORT": str(self.port)})
        self.service.port, self.service.url = self.port, self.url

    def restart(self, server):
        server.kill()
        time.sleep(1.5)
        server.start()

    def restart_redis(self):
        self.restart(self.redis)

    def restart_postgres(self):
        self.restart(self.postgres)

    def stop(self):
        self.worker.stop()
        self.service.stop()
        for server in filter(None, (self.redis, self.postgres)):
            server.stop()
        if self.postgres:
            self.postgres.remove()
        self.receiver.server.shutdown()
        self.receiver.server.server_close()


SERVERS, EMBEDDED = "Redis and PostgreSQL", "embedded"


@pytest.mark.parametrize(("trouble", "engine", "every_s"), [
    pytest.param(*row, marks=pytest.mark.check(number, what, "every accepted job ends once, with the right answer; "
                                                             "predictions go on"))
    for number, what, *row in [
        (35, "kill -9 a process of the worker under load (servers)", ["kill_process"], SERVERS, 3),
        (36, "kill -9 the worker under load (servers)", ["kill_worker"], SERVERS, 6),
        (37, "kill -9 the API, by turns its workers and all of it, under load (servers)",
         ["kill_service_process", "kill_service"], SERVERS, 6),
        (38, "kill -9 Redis and start it again, under load", ["restart_redis"], SERVERS, 6),
        (39, "kill -9 PostgreSQL and start it again, under load", ["restart_postgres"], SERVERS, 6),
        (40, "the same without servers: kill -9 a process, the worker, the API by turns",
         ["kill_process", "kill_worker", "kill_service_process", "kill_service"], EMBEDDED, 6)]])
def test_jobs_survive(trouble, engine, every_s, tmp_path, golden, model_dir, quick, record_property):
    system = System(tmp_path, golden, model_dir, engine == SERVERS)
    try:
        clients = Clients(system)
        for turn in range(4 if quick else 10):
            time.sleep(every_s)
            getattr(system, trouble[turn % len(trouble)])()
        time.sleep(every_s)
        clients.stop()
        system.service.wait_ready()
        jobs, until = Jobs(system.service), time.monotonic() + END_WITHIN_S
        found = {job_id: wait_final(jobs, job_id, until) for job_id in clients.accepted}
        lost = [job_id for job_id, job in found.items() if job["state"] not in FINAL]
        wrong = [job_id for job_id, job in found.items() if job_id not in lost
                 and not is_right(job, *golden["expected"][clients.accepted[job_id]])]
        while time.monotonic() < until and any(job_id not in system.receiver.ends for job_id in found):
            time.sleep(0.2)
        uncalled = [job_id for job_id in found if job_id not in system.receiver.ends]
        doubled = [job_id for job_id, ends in system.receiver.ends.items()
                   if len(ends) > 1 or system.receiver.states[job_id] != found.get(job_id, {}).get(
                       "state", system.receiver.states[job_id])]
        for name, value in (("kills", turn + 1), ("accepted", len(found)), ("lost", len(lost)),
                            ("doubled", len(doubled)), ("wrong", len(wrong)), ("without a webhook", len(uncalled)),
                            ("run again", sum(job["attempts"] > 1 for job in found.values())),
                            ("refused with 503", clients.refused), ("unanswered", clients.unanswered),
                            ("predictions", dict(clients.predictions))):
            record_property(name, value)
    finally:
        system.stop()
    assert len(found) > 50
    assert not lost
    assert not doubled
    assert not wrong, found[wrong[0]]
    assert not uncalled
    if "kill_service" not in trouble:
        assert set(clients.predictions) == {200}


def wait_final(jobs, job_id, until):
    while True:
        answer = requests.get(f"{jobs.url}/jobs/{job_id}", timeout=30)
        job = answer.json() if answer.status_code == 200 else {"state": f"{answer.status_code}", "attempts": 0}
        if job["state"] in FINAL or time.monotonic() > until:
            return job
        time.sleep(0.1)


def is_right(job, class_id, confidence):
    if job["state"] != "succeeded":
        return False
    best = job["result"]["predictions"][0]
    return best["class_id"] == class_id and abs(best["confidence"] - confidence) < 1e-3
