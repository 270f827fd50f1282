"""How many jobs a second workers get done, beside what /predict answers: make bench-jobs

Jobs of one picture each, ResNet-50's inputs at 500 × 375 with EfficientNet-Lite0. The jobs wait in the queue while the
workers are stopped (SIGSTOP); from when they go on, the time to the last end counts. Before and after each, bench.load
puts eight connections on /predict of the same service while the workers are idle.
"""
import argparse
import concurrent.futures
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

from app.optional_settings import OptionalSettings
from bench import inputs, services
from bench.__main__ import call
from bench.machine import machine
from tests.servers import Postgres, Redis

MODEL = {"MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu"}
SUBMITTERS = 4


def variables_of(engine, folder, servers):
    variables = {**{name.upper(): "" for name in OptionalSettings.__dataclass_fields__}, **MODEL, "JOBS": "on",
                 "DATA_DIR": str(folder / "data"), "MAX_JOBS": "100000", "LONG_WORKERS": "0"}
    if engine == "servers":
        variables |= {"JOBS_BROKER": servers[0].database(), "DATABASE_URL": servers[1].database()}
    return variables


class Workers:
    def __init__(self, count, variables, log):
        self.count, self.port = count, services.free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", "worker"], cwd=services.ROOT, stdout=log, stderr=log, start_new_session=True,
            env=services.environment({**variables, "SHORT_WORKERS": str(count), "WORKER_PORT": str(self.port),
                                      "HOST": "127.0.0.1"}))

    def wait_ready(self):
        until = time.monotonic() + services.READY_WITHIN_S
        while time.monotonic() < until:
            try:
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.05)
        raise RuntimeError("the workers did not become ready")

    def nodes(self):
        found = [pid for pid in services.processes(self.process.pid) if pid != self.process.pid]
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return {*found, *map(int, children)}

    def signal(self, number):
        for pid in self.nodes():
            os.kill(pid, number)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def jobs_per_second(url, workers, pictures, number):
    """(jobs submitted, jobs done) a second."""
    session = requests.Session()

    def submit(i):
        answer = session.post(url + "/jobs", files={"file": ("a.jpg", pictures[i % len(pictures)])}, timeout=30)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]
    workers.signal(signal.SIGSTOP)
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(SUBMITTERS) as pool:
        ids = list(pool.map(submit, range(number)))
    submitted = number / (time.monotonic() - started)
    began = time.time()
    workers.signal(signal.SIGCONT)
    while requests.get(url + "/jobs?state=queued,running&limit=1", timeout=30).json()["jobs"]:
        time.sleep(0.25)
    found = [session.get(f"{url}/jobs/{job_id}", timeout=30).json() for job_id in ids]
    assert all(job["state"] == "succeeded" and job["attempts"] == 1 for job in found)
    return submitted, number / (max(job["ended_at"] for job in found) - began)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2,4")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-jobs-"))
    inputs.make(services.ROOT / "bench/work/inputs")
    files = sorted(map(str, (services.ROOT / "bench/work/inputs").glob("500x375-*.jpg")))
    pictures = [Path(file).read_bytes() for file in files]
    servers = Redis(folder).start(), Postgres(folder).start()
    rows = {}
    try:
        for _ in range(arguments.rounds):
            for engine in ("embedded", "servers"):
                for count in map(int, arguments.workers.split(",")):
                    measure(engine, count, folder, servers, files, pictures, arguments.jobs, rows)
    finally:
        for server in servers:
            server.stop()
        servers[1].remove()
    print(machine()["name"])
    for (engine, count), found in rows.items():
        submitted, done, predictions = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{engine:9} {count} workers: {done:6.1f} jobs/s, {submitted:6.1f} submitted/s, /predict "
              f"{predictions:6.1f}/s, ratio {done / predictions:.2f}")
    print(json.dumps({f"{engine} {count}": found for (engine, count), found in rows.items()}))


def measure(engine, count, folder, servers, files, pictures, number, rows):
    own = Path(tempfile.mkdtemp(dir=folder))
    variables = variables_of(engine, own, servers)
    probe = {"path": "/predict", "files": files, "expected": None, "tolerance": None}
    with open(own / "workers.log", "w") as log:
        workers = Workers(count, variables, log)
        service = None
        try:
            port = services.free_port()
            service = subprocess.Popen([sys.executable, "-m", "gunicorn", "app:create_app()"], cwd=services.ROOT,
                                       stdout=log, stderr=log, start_new_session=True, env=services.environment(
                                           {**variables, "HOST": "127.0.0.1", "PORT": str(port), "DRAIN_SECONDS": "0"}))
            workers.wait_ready()
            url = f"http://127.0.0.1:{port}"
            wait_for(url)
            probe["expected"] = services.answers(port, files)
            done = jobs_per_second(url, workers, pictures, number)
            predictions = call("bench.load", {**probe, "port": port, "connections": 8, "warm_s": 1, "seconds": 4,
                                              "tolerance": 1e-3})["throughput"]
            rows.setdefault((engine, count), []).append((*done, predictions))
        finally:
            workers.stop()
            if service:
                service.terminate()
                service.wait(30)


def wait_for(url):
    until = time.monotonic() + services.READY_WITHIN_S
    while time.monotonic() < until:
        try:
            if requests.get(url + "/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.05)
    raise RuntimeError("the service did not become ready")


if __name__ == "__main__":
    main()
