"""Workers as their users run them: `python -m app worker`, on loopback."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests
from conftest import ROOT, free_port

from app.config import Settings
from app.optional_settings import OptionalSettings

FINAL = ("succeeded", "failed", "cancelled")
OURS = {*Settings.__dataclass_fields__, *OptionalSettings.__dataclass_fields__}


class Worker:
    """`python -m app worker` with a service's variables, logging to a file."""

    def __init__(self, folder, variables):
        self.port = free_port()
        self.log_path = folder / f"worker-{self.port}.log"
        environment = {k: v for k, v in os.environ.items() if k.lower() not in OURS and not k.startswith("OTEL_")}
        self.environment = environment | {"WORKER_PORT": str(self.port), "HOST": "127.0.0.1", "DRAIN_SECONDS": "0.5",
                                          **variables}
        self.process = None
        self.start()

    def start(self):
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "app", "worker"], cwd=ROOT, stdout=log, stderr=log,
                                            start_new_session=True, env=self.environment)

    def wait_ready(self, timeout_s=300):
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log}"
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=10).status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"not ready within {timeout_s} s:\n{self.log}")

    @property
    def log(self):
        return self.log_path.read_text()

    def metrics(self):
        return requests.get(f"http://127.0.0.1:{self.port}/metrics", timeout=60).text

    def nodes(self):
        """Process IDs of those that run jobs."""
        found = []
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if b"app.jobs.node" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append(int(pid))
        return found

    def stop(self, signal_number=signal.SIGTERM):
        """Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


class Jobs:
    """A client of a service's jobs."""

    def __init__(self, service):
        self.url = service.url

    def submit(self, text=None, **arguments):
        """POST /jobs; returns the response. text: for models that take text."""
        if text is not None:
            arguments.setdefault("json", {"text": text})
        return requests.post(self.url + "/jobs", timeout=60, **arguments)

    def accepted(self, text=None, **arguments):
        """The ID of a new job."""
        answer = self.submit(text, **arguments)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def get(self, job_id):
        answer = requests.get(f"{self.url}/jobs/{job_id}", timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def cancel(self, job_id):
        return requests.delete(f"{self.url}/jobs/{job_id}", timeout=60)

    def wait(self, job_id, states=FINAL, timeout_s=180):
        """The job, once it is in one of these states."""
        until = time.monotonic() + timeout_s
        while (job := self.get(job_id))["state"] not in states:
            assert time.monotonic() < until, f"still {job}"
            time.sleep(0.05)
        return job
