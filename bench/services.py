"""Starts this service and its rivals as their users do, waits until they answer, measures memory, stops them."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from app.config import Settings
from bench import load

ROOT = Path(__file__).parent.parent
READY_WITHIN_S = 120


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rival_python(name):
    """The Python of a rival's virtual environment, which the Makefile creates next to this one."""
    return f"{sys.prefix}-rival-{name}/bin/python"


def command(name, port, cores):
    """The command line of a service, on a port of loopback."""
    if name == "this":
        return [sys.executable, "-m", "gunicorn", "app:create_app()"]
    arguments = {
        "litserve": ["bench.rivals.litserve_app", str(cores), str(port)],
        "flask": ["gunicorn", "--workers", str(cores), "--bind", f"127.0.0.1:{port}", "bench.rivals.flask_app:app"],
        "fastapi": ["uvicorn", "--workers", str(cores), "--host", "127.0.0.1", "--port", str(port), "--no-access-log",
                    "bench.rivals.fastapi_app:app"],
        "bentoml": ["bentoml", "serve", "--host", "127.0.0.1", "--port", str(port),
                    "bench.rivals.bentoml_app:Classifier"],
    }
    return [rival_python(name), "-m", *arguments[name]]


def environment(variables):
    """This process's environment with the service's settings at their defaults (an empty string means unset, and
    overrides `.env`) except for `variables`."""
    return {**os.environ, **{name.upper(): "" for name in Settings.__dataclass_fields__}, **variables}


def processes(leader):
    """IDs of all processes of a service that was started as a session leader: its session, and all descendants."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, _, session = map(int, path.read_text().rpartition(")")[2].split()[1:4])
        except (OSError, ValueError):
            continue
        parents[int(path.parent.name)] = parent
        if session == leader:
            found.append(int(path.parent.name))
    for pid in found:  # grows: BentoML's workers are sessions of their own
        found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return found


def pss_mb(leader, part="Pss"):
    """Proportional set size of all processes of a service, in 10⁶ bytes: memory shared between them counts once.

    part: Pss, or Pss_Anon for memory not backed by files, which alone does not depend on what other programs run.
    """
    kib = 0
    for pid in processes(leader):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        kib += sum(int(line.split()[1]) for line in lines if line.startswith(f"{part}:"))
    return kib * 1024 / 1e6


def answers(port, files):
    """[class_id, probability] of the best answer for each file, for a load's specification."""
    found = []
    for file in files:
        with open(file, "rb") as picture:
            answer = requests.post(f"http://127.0.0.1:{port}/predict", files={"file": picture}, timeout=30).json()
        found.append([answer["predictions"][0]["class_id"], answer["predictions"][0]["confidence"]])
    return found


class Running:
    """A started service: its `port`, and `seconds_to_ready` from the start to its first right answer."""

    def __init__(self, name, variables, cores, folder, probe):
        """variables: for the environment; folder: for its log; probe: a load specification with one picture."""
        self.port = free_port()
        self.log = folder / f"{name}-{self.port}.log"
        started = time.perf_counter()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command(name, self.port, cores), stdout=log, stderr=log, start_new_session=True,
                cwd=ROOT if name == "this" else folder,  # gunicorn.conf.py is only for this service
                env=environment({"HOST": "127.0.0.1", "PORT": str(self.port), "DRAIN_SECONDS": "0",
                                 "PYTHONPATH": str(ROOT), **variables}))
        try:
            self.wait_ready(probe)
        except BaseException:
            self.stop()
            raise
        self.seconds_to_ready = time.perf_counter() - started

    def wait_ready(self, probe):
        """Wait until one request is answered right. Raises RuntimeError."""
        until = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError):
                if load.answers_right({**probe, "port": self.port}):
                    return
            time.sleep(0.01)
        raise RuntimeError(f"not ready within {READY_WITHIN_S} s:\n{self.log.read_text()[-2000:]}")

    def cpu_s(self):
        """Seconds of processor time that all its processes have used."""
        ticks = 0
        for pid in processes(self.process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self):
        its_own = processes(self.process.pid)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for pid in {*its_own, *processes(self.process.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
