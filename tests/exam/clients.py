"""Clients of the exam: load from a separate process, a watcher of /health, many different requests at once."""
import http.client
import json
import subprocess
import sys
import threading
import time

from conftest import ROOT

from bench import load

started = []  # all BackgroundLoads, so that none outlives its check


def stop_all():
    for background in started:
        background.process.kill()
        background.process.wait()
        background.process.stdout.close()
    started.clear()


class BackgroundLoad:
    """bench.load in a process of its own, which ends after warm_s + seconds and the last answers."""

    def __init__(self, service, golden, seconds, warm_s=0, **how):
        self.process = subprocess.Popen([sys.executable, "-m", "bench.load"], cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        started.append(self)
        self.seconds = warm_s + seconds
        specification = {**golden, "port": service.port, "warm_s": warm_s, "seconds": seconds, **how}
        self.process.stdin.write(json.dumps(specification).encode())
        self.process.stdin.close()

    def running(self):
        return self.process.poll() is None

    def result(self):
        """Wait for bench.load to end and return its result."""
        with self.process.stdout as stdout:
            output = stdout.read()
        assert self.process.wait(self.seconds + load.DRAIN_S + 30) == 0
        return json.loads(output)


def put_load(service, golden, seconds, **how):
    return BackgroundLoad(service, golden, seconds, **how).result()


class Watcher:
    """Polls a path over new connections until its block ends. seen: (moment, status or None, seconds)."""

    def __init__(self, port, path="/health", every_s=0.05):
        self.port, self.path, self.every_s, self.seen = port, path, every_s, []
        self.thread, self.stopping = threading.Thread(target=self.work, daemon=True), threading.Event()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join(60)

    def work(self):
        while not self.stopping.wait(self.every_s):
            started = time.monotonic()
            try:
                status, _ = ask(self.port, "GET", self.path)
            except (OSError, http.client.HTTPException):
                status = None
            self.seen.append((started, status, time.monotonic() - started))

    def statuses(self):
        return {status for _, status, _ in self.seen}

    def p99_ms(self):
        return load.percentiles([seconds for _, _, seconds in self.seen])["p99"]


def ask(port, method, path, headers=None, body=None, connection=None, timeout_s=60):
    """One request → (status, the body's bytes). Raises OSError, HTTPException."""
    ours = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        ours.request(method, path, body, headers or {})
        answer = ours.getresponse()
        return answer.status, answer.read()
    finally:
        if connection is None:
            ours.close()


def multipart(data):
    """(headers, body) of a form with one file."""
    _, _, form = load.build_request(0, "/predict", data).partition(b"\r\n\r\n")
    return {"Content-Type": f"multipart/form-data; boundary={load.BOUNDARY.decode()}"}, form


def ask_all(port, requests, connections=4):
    """Send (key, method, path, headers, body) requests from an iterable over several keep-alive connections.

    Returns [(key, status or None if the connection broke, body, seconds)].
    """
    answers, lock, source = [], threading.Lock(), iter(requests)

    def work():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while True:
            with lock:
                request = next(source, None)
            if request is None:
                break
            key, *what = request
            started = time.monotonic()
            try:
                status, body = ask(port, *what, connection)
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request opens it again
                status, body = None, b""
            answers.append((key, status, body, time.monotonic() - started))
        connection.close()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
