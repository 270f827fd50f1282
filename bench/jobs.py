"""What jobs, history and tracing cost, and get done: make bench-jobs

--only jobs      jobs a second with 1, 2 and 4 processes of a worker, over files and over servers, beside what /predict
                 answers: jobs of one picture each, 500 x 375, with EfficientNet-Lite0. They wait in the queue while the
                 workers are stopped (SIGSTOP); from when they go on, the time to the last end counts. Then bench.load
                 puts eight connections on /predict of the same service while the workers are idle.
--only history   latency of /predict at 15 requests a second without a history, with one in SQLite and in PostgreSQL,
                 interleaved
--only tracing   the same without tracing, with a collector of traces, and with one that is away
--only off       with everything off: from the start to the first answer, memory after 100 predictions and a lone
                 prediction; with --before COMMIT beside those of another commit, interleaved

Wants an otherwise idle machine.
"""
import argparse
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import sqlite3
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
OFF = {**{name.upper(): "" for name in OptionalSettings.__dataclass_fields__}, **MODEL}  # also of what .env says
SUBMITTERS = 4
RATE, EACH_S = 15, 20  # requests a second, seconds


def variables_of(engine, folder, servers):
    variables = {**OFF, "JOBS": "on", "DATA_DIR": str(folder / "data"), "MAX_JOBS": "100000", "LONG_WORKERS": "0"}
    if engine == "servers":
        variables |= {"JOBS_BROKER": servers[0].database(), "DATABASE_URL": servers[1].database()}
    return variables


class Workers:
    def __init__(self, count, variables, log):
        self.count, self.port = count, services.free_port()
        self.database = Path(variables["DATA_DIR"], "service.db")  # there is none with PostgreSQL
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

    def pause(self):
        """Not while one of them holds SQLite's write lock, for which the service would wait."""
        self.signal(signal.SIGSTOP)
        time.sleep(0.05)  # until they have stopped
        while self.database.exists() and is_locked(self.database):
            self.signal(signal.SIGCONT)
            time.sleep(0.05)
            self.signal(signal.SIGSTOP)
            time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def is_locked(database):
    with contextlib.closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
        return False


def jobs_per_second(url, workers, pictures, number):
    """(jobs submitted, jobs done) a second."""
    session = requests.Session()

    def submit(i):
        answer = session.post(url + "/jobs", files={"file": ("a.jpg", pictures[i % len(pictures)])}, timeout=30)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]
    workers.pause()
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
    parser = argparse.ArgumentParser(prog="python -m bench.jobs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["jobs", "history", "tracing", "off"])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, help="default: 3, 6 of history and tracing, 12 of off")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--before", metavar="COMMIT")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-jobs-"))
    inputs.make(services.ROOT / "bench/work/inputs")
    files = sorted(map(str, (services.ROOT / "bench/work/inputs").glob("500x375-*.jpg")))
    print(machine()["name"])
    for name, experiment in (("jobs", jobs), ("history", history), ("tracing", tracing), ("off", off)):
        if arguments.only in (None, name):
            experiment(arguments, folder, files)
    shutil.rmtree(folder)  # with its logs, unless something failed


@contextlib.contextmanager
def servers(folder):
    """Redis and PostgreSQL."""
    started = Redis(folder).start(), Postgres(folder).start()
    try:
        yield started
    finally:
        for server in started:
            server.stop()
        started[1].remove()


def said(rows):
    """Print all measurements, for whoever wants more than medians."""
    print(json.dumps({" ".join(map(str, name if isinstance(name, tuple) else (name,))): found
                      for name, found in rows.items()}))


def jobs(arguments, folder, files):
    pictures, rows = [Path(file).read_bytes() for file in files], {}
    with servers(folder) as started:
        for _ in range(arguments.rounds or 3):
            for engine in ("embedded", "servers"):
                for count in map(int, arguments.workers.split(",")):
                    measure(engine, count, folder, started, files, pictures, arguments.jobs, rows)
    for (engine, count), found in rows.items():
        submitted, done, predictions = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{engine:9} {count} workers: {done:6.1f} jobs/s, {submitted:6.1f} submitted/s, /predict "
              f"{predictions:6.1f}/s, ratio {done / predictions:.2f}")
    said(rows)


def history(arguments, folder, files):
    with servers(folder) as (_, postgres):
        latencies("history", {"off": {}, "SQLite": {"HISTORY": "on"}, "PostgreSQL": {
            "HISTORY": "on", "DATABASE_URL": postgres.database()}}, arguments, folder, files)


def tracing(arguments, folder, files):
    from tests.otlp_receiver import Receiver
    collector, to = Receiver(), "OTEL_EXPORTER_OTLP_ENDPOINT"
    latencies("tracing", {"off": {}, "on": {to: collector.url}, "away": {
        to: f"http://127.0.0.1:{services.free_port()}"}}, arguments, folder, files)
    assert collector.spans
    collector.stop()


def latencies(what, kinds, arguments, folder, files):
    """Of a service with the variables of each kind, in turn."""
    rows = {}
    for turn in range(arguments.rounds or 6):
        for kind in [*kinds][turn % 3:] + [*kinds][:turn % 3]:
            own = Path(tempfile.mkdtemp(dir=folder))
            with Service({**OFF, "DATA_DIR": str(own / "data"), **kinds[kind]}, own) as service:
                found = service.load(files, rate=RATE, even=True, warm_s=2, seconds=EACH_S)
                assert set(found["statuses"]) == {"200"}, found["statuses"]
                dropped = [line for line in requests.get(service.url + "/metrics", timeout=10).text.splitlines()
                           if line.startswith("model_server_history_dropped_total") and not line.endswith(" 0.0")]
                assert not dropped, dropped
            rows.setdefault(kind, []).append([found["latency_ms"][name] for name in ("p50", "p99")])
    for kind, found in rows.items():
        p50, p99 = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{what} {kind:10} p50 {p50:5.1f} ms, p99 {p99:5.1f} ms")
    said(rows)


def off(arguments, folder, files):
    rows, trees = {}, {"now": services.ROOT}
    if arguments.before:
        trees["before"] = folder / "before"
        git("worktree", "add", "--detach", trees["before"], arguments.before)
    try:
        for turn in range((arguments.rounds or 12) + 1):
            for name in [*trees][::1 if turn % 2 else -1]:
                with Service(OFF, Path(tempfile.mkdtemp(dir=folder)), trees[name]) as service:
                    service.load(files, connections=1, warm_s=0, seconds=2)
                    found = [service.seconds_to_ready, services.pss_mb(service.process.pid),
                             service.load(files, connections=1, warm_s=0, seconds=2)["latency_ms"]["p50"]]
                if turn:  # the first start prepares the model
                    rows.setdefault(name, []).append(found)
    finally:
        if arguments.before:
            git("worktree", "remove", "--force", trees["before"])
    for name, found in rows.items():
        ready, memory, alone = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"everything off, {name:6} {ready:.3f} s to the first answer, {memory:.1f} MB, a lone prediction "
              f"{alone:.1f} ms")
    said(rows)


def git(*arguments):
    subprocess.run(["git", *map(str, arguments)], cwd=services.ROOT, check=True, capture_output=True)


class Service:
    """A service of a tree, stopped at the end of the block. seconds_to_ready: from its start to its first answer."""

    def __init__(self, variables, folder, tree=services.ROOT):
        self.port = services.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        started = time.perf_counter()
        with open(folder / "service.log", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "app:create_app()"], cwd=tree, stdout=log, stderr=log,
                start_new_session=True, env=services.environment({
                    **variables, "HOST": "127.0.0.1", "PORT": str(self.port), "DRAIN_SECONDS": "0",
                    "PYTHONPATH": str(tree)}))
        until = time.monotonic() + services.READY_WITHIN_S
        while not self.answers():
            if time.monotonic() > until or self.process.poll() is not None:
                self.stop()
                raise RuntimeError(f"the service did not become ready: {(folder / 'service.log').read_text()[-2000:]}")
            time.sleep(0.01)
        self.seconds_to_ready = time.perf_counter() - started

    def answers(self):
        try:
            return requests.get(self.url + "/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def load(self, files, **how):
        """bench.load's result on /predict."""
        return call("bench.load", {"path": "/predict", "files": files, "port": self.port, "tolerance": 1e-3,
                                   "expected": services.answers(self.port, files), **how})

    def stop(self):
        self.process.terminate()
        self.process.wait(30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def measure(engine, count, folder, servers, files, pictures, number, rows):
    own = Path(tempfile.mkdtemp(dir=folder))
    variables = variables_of(engine, own, servers)
    with open(own / "workers.log", "w") as log:
        workers = Workers(count, variables, log)
        try:
            with Service(variables, own) as service:
                workers.wait_ready()
                done = jobs_per_second(service.url, workers, pictures, number)
                predictions = service.load(files, connections=8, warm_s=1, seconds=4)["throughput"]
        finally:
            workers.stop()
    rows.setdefault((engine, count), []).append((*done, predictions))


if __name__ == "__main__":
    main()
