"""Starts this service and its rivals as their users do, waits until they answer, measures memory, stops them."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from app.config import Settings
from bench import load

ROOT = Path(__file__).parent.parent
READY_WITHIN_S = 120


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def machine_cpu_s():
    """Seconds of processor time that the whole machine has spent, including time stolen by its host."""
    ticks = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    user, nice, system, _, _, irq, softirq, steal, *_ = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def rival_python(name):
    """The Python of a rival's virtual environment, which the Makefile creates next to this one."""
    return f"{sys.prefix}-rival-{name}/bin/python"


def commands(port, cores):
    """The command line of each service by name, on a port of loopback."""
    return {
        "this": [sys.executable, "-m", "gunicorn", "app:create_app()"],
        "litserve": [rival_python("litserve"), "-m", "bench.rivals.litserve_torch", str(cores), str(port)],
        "flask": [rival_python("flask"), "-m", "gunicorn", "--workers", str(cores),
                  "--bind", f"127.0.0.1:{port}", "bench.rivals.flask_torch:app"],
        "fastapi": [rival_python("fastapi"), "-m", "uvicorn", "--workers", str(cores), "--host", "127.0.0.1",
                    "--port", str(port), "--no-access-log", "bench.rivals.fastapi_torch:app"],
    }


def environment(variables):
    """This process's environment with the service's settings at their defaults (an empty string means unset, and
    overrides `.env`) except for `variables`."""
    return {**os.environ, **{name.upper(): "" for name in Settings.__dataclass_fields__}, **variables}


def processes(session):
    """IDs of all processes of a session, for a service that was started as a session leader."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            its_session = int(path.read_text().rpartition(")")[2].split()[3])
        except (OSError, ValueError):
            continue
        if its_session == session:
            found.append(int(path.parent.name))
    return found


def pss_mb(session, part="Pss"):
    """Proportional set size of all processes of a session, in 10⁶ bytes: memory shared between them counts once.

    part: Pss, or Pss_Anon for memory not backed by files, which alone does not depend on what other programs run.
    """
    kib = 0
    for pid in processes(session):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        kib += sum(int(line.split()[1]) for line in lines if line.startswith(f"{part}:"))
    return kib * 1024 / 1e6


class Running:
    """A started service: its `port`, and `seconds_to_ready` from the start to its first right answer."""

    def __init__(self, name, variables, cores, folder, probe):
        """variables: for the environment; folder: for its log; probe: a load specification with one picture."""
        self.port = free_port()
        self.log = folder / f"{name}-{self.port}.log"
        started = time.perf_counter()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                commands(self.port, cores)[name], stdout=log, stderr=log, start_new_session=True,
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
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for pid in processes(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
