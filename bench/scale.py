"""What several instances of this service behind HAProxy cost and survive: make bench-scale

1, 2, 4 and 8 instances share this machine's cores (each is bound to one; a single one has all), behind HAProxy on
loopback, with EfficientNet-Lite0. Measures the throughput, HAProxy's own processor time, what is lost when an instance
is killed or drains under load, and how soon a fresh one is used. Writes scale.json, and the tables into scale.md.
"""
import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

from app.server.machine import usable_cores
from bench import inputs, services
from bench.__main__ import Beside, call
from bench.machine import machine
from bench.report import DISTURBED_ABOVE, LARGE, SMALL, disturbed_by, table, text

HERE = Path(__file__).parent
INSTANCES = (1, 2, 4, 8)
CONNECTIONS = 16  # enough that each of eight instances always has work
BEGIN, END = "<!-- measured by bench/scale.py -->", "<!-- end of what bench/scale.py measured -->"

CONFIGURATION = """\
global
    # A request that fits into a buffer is sent to another instance if its own dies before it has answered.
    tune.bufsize 262144
    nbthread 1
defaults
    mode http
    timeout connect 2s
    timeout client 35s
    timeout server 35s
    option http-buffer-request
    option redispatch
    retries 3
    retry-on conn-failure empty-response
frontend in
    bind 127.0.0.1:{port}
    default_backend model
backend model
    balance leastconn
    option httpchk GET /health
    http-check expect status 200
    default-server check inter 500ms fall 2 rise 1
{servers}
"""


class Instance:
    """One instance of this service, on a port of loopback and on some cores. Ready once made, unless wait is false."""

    def __init__(self, folder, cores, port=None, wait=True):
        self.port, self.folder, self.started = port or services.free_port(), folder, time.monotonic()
        self.log = folder / f"instance-{self.port}-{time.monotonic_ns()}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "app:create_app()"], stdout=log, stderr=log, cwd=services.ROOT,
                start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
                env=services.environment({"HOST": "127.0.0.1", "PORT": str(self.port), "WORKERS": "1",
                                          "MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "DRAIN_SECONDS": "3",
                                          "MODEL_DIR": str(HERE / "work/models")}))
        if wait:
            self.wait_ready()

    def wait_ready(self):
        while time.monotonic() < self.started + services.READY_WITHIN_S:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok:
                    return time.monotonic() - self.started
            time.sleep(0.01)
        raise RuntimeError(f"not ready:\n{self.log.read_text()[-2000:]}")

    def kill(self):
        for pid in services.processes(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


class Balancer:
    def __init__(self, program, folder, ports):
        self.port = services.free_port()
        configuration = folder / f"haproxy-{self.port}.cfg"
        configuration.write_text(CONFIGURATION.format(port=self.port, servers="\n".join(
            f"    server instance{i} 127.0.0.1:{port}" for i, port in enumerate(ports))))
        with open(folder / f"haproxy-{self.port}.log", "w") as log:
            self.process = subprocess.Popen([program, "-f", str(configuration), "-db"], stdout=log, stderr=log)
        self.wait_ready(len(ports))

    def wait_ready(self, instances):
        until, good = time.monotonic() + 30, 0
        while good < 2 * instances:
            if time.monotonic() > until:
                raise RuntimeError("HAProxy does not reach the instances")
            with contextlib.suppress(requests.RequestException):
                good += requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok
            time.sleep(0.05)

    def cpu_s(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


@contextlib.contextmanager
def running(program, folder, count):
    """(instances, their balancer), stopped at the end of the block."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        instances = [Instance(folder, set(cores) if count == 1 else {cores[i % len(cores)]}, wait=False)
                     for i in range(count)]
        for instance in instances:
            stack.callback(instance.kill)
        for instance in instances:
            instance.wait_ready()
        balancer = Balancer(program, folder, [instance.port for instance in instances])
        stack.callback(balancer.stop)
        yield instances, balancer


def specification(files, expected, size, **options):
    chosen = [file for file in files if Path(file).name.startswith(size)]
    return {"path": "/predict", "files": chosen, "expected": [expected[file] for file in chosen], "tolerance": 1e-3,
            "connections": CONNECTIONS, "warm_s": 1, **options}


def throughput(spec, port, balancer=None):
    """Of a load on a port: {throughput, lost and refused, the balancer's milliseconds a request, disturbance}."""
    beside, before = Beside(), balancer.cpu_s() if balancer else 0.0
    result = call("bench.load", {**spec, "port": port})
    spent = balancer.cpu_s() - before if balancer else 0.0
    answered = result["throughput"] * (spec["warm_s"] + spec["seconds"])
    bytes_each = statistics.mean(Path(file).stat().st_size for file in spec["files"])
    return {"throughput": result["throughput"], "non_200": result["non_200"], "wrong": result["wrong"],
            "p95_ms": result["latency_ms"] and result["latency_ms"]["p95"], "bytes_each": bytes_each,
            "balancer_ms": 1000 * spent / answered if balancer and answered else None,
            "stolen_cpu": beside.fields(0.0)["stolen_cpu"]}


def under_load(spec, port, disturb):
    """Run disturb() a third of the way into a load. Returns bench.load's counts."""
    found = {}
    thread = threading.Thread(target=lambda: found.update(call("bench.load", {**spec, "port": port})))
    thread.start()
    time.sleep(spec["warm_s"] + spec["seconds"] / 3)
    outcome = disturb()
    thread.join()
    counts = {name: found[name] for name in ("right", "wrong", "non_200", "lost", "unanswered", "statuses")}
    return counts | (outcome or {})


def survive(program, folder, load):
    """What two instances lose when one of them is killed, replaced, and stopped with SIGTERM."""
    cores, found = set(os.sched_getaffinity(0)), {}
    with running(program, folder, 2) as (instances, balancer):
        found["killed"] = under_load(load(SMALL, seconds=6, connections=8), balancer.port, instances[0].kill)

        def replace():
            fresh = Instance(folder, cores, instances[0].port, wait=False)
            instances[0] = fresh
            ready = fresh.wait_ready()
            while '"path": "/predict"' not in fresh.log.read_text():
                if time.monotonic() > fresh.started + 60:
                    raise RuntimeError("the balancer does not use the fresh instance")
                time.sleep(0.01)
            return {"ready_s": ready, "used_s": time.monotonic() - fresh.started}
        try:
            found["replaced"] = under_load(load(SMALL, seconds=12, connections=8), balancer.port, replace)
            found["drained"] = under_load(load(SMALL, seconds=12, connections=8), balancer.port, instances[1].stop)
        finally:
            instances[0].kill()
    with running(program, folder, 2) as (instances, balancer):
        found["killed, 3 MB each"] = under_load(load(LARGE, seconds=6, connections=8), balancer.port, instances[0].kill)
    return found


def measure(program, rounds, seconds):
    inputs.make(HERE / "work/inputs")
    files = sorted(str(path) for size in (SMALL, LARGE) for path in (HERE / "work/inputs").glob(f"{size}-*.jpg"))
    found = {"machine": machine(), "date": datetime.date.today().isoformat(), "rounds": rounds, "instances": {},
             "direct": [], "large": []}
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as name:
        folder = Path(name)
        one = Instance(folder, set(os.sched_getaffinity(0)))
        try:
            expected = dict(zip(files, services.answers(one.port, files), strict=True))
            found["pss_mb"] = services.pss_mb(one.process.pid)
        finally:
            one.kill()

        def load(size, **options):
            return specification(files, expected, size, **options)
        idle = Beside()
        time.sleep(2)
        found |= idle.fields(0.0)
        for number in range(rounds):
            for count in INSTANCES if number % 2 == 0 else INSTANCES[::-1]:
                print(f"round {number + 1} of {rounds}: {count} instances", file=sys.stderr, flush=True)
                with running(program, folder, count) as (instances, balancer):
                    if count == 1:
                        found["direct"].append(throughput(load(SMALL, seconds=seconds), instances[0].port))
                        found["large"].append(throughput(load(LARGE, seconds=seconds), balancer.port, balancer))
                    found["instances"].setdefault(count, []).append(
                        throughput(load(SMALL, seconds=seconds), balancer.port, balancer))
        print("losses", file=sys.stderr, flush=True)
        found["survive"] = survive(program, folder, load)
    return found


def median(rounds, name):
    return statistics.median(row[name] for row in rounds)


def balancer_costs(found):
    """(milliseconds a request, milliseconds a megabyte) of HAProxy, from two sizes of pictures."""
    small, large = found["instances"][1], found["large"]
    per_mb = ((median(large, "balancer_ms") - median(small, "balancer_ms"))
              / (median(large, "bytes_each") - median(small, "bytes_each")) * 1e6)
    return median(small, "balancer_ms") - per_mb * median(small, "bytes_each") / 1e6, per_mb


def markdown(found):
    alone = median(found["direct"], "throughput")
    per_request, per_mb = balancer_costs(found)
    rows = [["one, without HAProxy", text(alone), "1.00", text(median(found["direct"], "p95_ms"), 0), "–"]]
    rows += [[str(count), text(median(rounds, "throughput")), text(median(rounds, "throughput") / alone, 2),
              text(median(rounds, "p95_ms"), 0), text(median(rounds, "balancer_ms"), 2)]
             for count, rounds in found["instances"].items()]
    lost = [[what, str(row["right"]), str(row["non_200"]), str(row["wrong"])]
            for what, row in found["survive"].items()]
    replaced = found["survive"]["replaced"]
    noise = "" if disturbed_by(found) <= DISTURBED_ABOVE else (
        f" **Other programs took {disturbed_by(found):.2f} cores: compare nothing with these figures.**")
    return "\n\n".join([
        f"{found['machine']['name']}, {found['date']}, EfficientNet-Lite0, fp32, {CONNECTIONS} connections, medians of "
        f"{found['rounds']} round{'s' * (found['rounds'] > 1)}.{noise}",
        table(["instances", "answers/s", "of one alone", "p95 ms", "HAProxy, ms a request"], rows),
        f"HAProxy takes {per_request:.2f} ms of a core a request and {per_mb:.2f} ms a megabyte. An instance has "
        f"{found['pss_mb']:.0f} MB (PSS). A fresh one was ready {replaced['ready_s']:.2f} s after its start, and used "
        f"{replaced['used_s']:.2f} s after it.",
        table(["two instances, one of them", "right answers", "lost or refused", "wrong"], lost)])


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    arguments = parser.parse_args()
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        print("skipped: there is no haproxy on this machine")
        return
    if usable_cores() < 2:
        print("skipped: one core cannot show what splitting costs")
        return
    found = measure(program, arguments.rounds, arguments.seconds)
    (HERE / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    measured = markdown(found)
    page = HERE / "scale.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}")
    print(measured)


if __name__ == "__main__":
    main()
