"""Clients of a running service, good and bad: closed-loop load, requests sent in part, and what to wait for."""
import os
import re
import socket
import threading
import time

import requests
from conftest import ROOT

CAT = (ROOT / "tests/images/chelsea.jpg").read_bytes()


def wait_until(condition, seconds, what=""):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what or condition
        time.sleep(0.02)


def workers_ready(url):
    """model_server_workers_ready of a running service's /metrics."""
    return float(re.search(r"^model_server_workers_ready (\S+)", requests.get(url + "/metrics").text, re.M)[1])


class Load:
    """Closed-loop clients in threads, until stopped; they pause between requests where the machine need not be busy.
    answers: (status, code or class) of every request; errors: what
    failed below HTTP, failed_from: when each of those was sent; slowest: seconds."""

    def __init__(self, url, clients, data=CAT, keep_alive=False, pause_s=0):
        self.url, self.data, self.keep_alive, self.pause_s = url, data, keep_alive, pause_s
        self.answers, self.errors, self.failed_from, self.retry_after = [], [], [], []
        self.slowest, self.stopping = 0, False
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        for thread in self.threads:
            thread.join(60)

    def work(self):
        session = requests.Session()
        while not self.stopping:
            started = time.monotonic()
            try:
                answer = (session if self.keep_alive else requests).post(
                    self.url + "/predict", files={"file": ("cat.jpg", self.data)}, timeout=60)
                body = answer.json()
                self.answers.append((answer.status_code, body["error"] if body["status"] == "error"
                                     else body["predictions"][0]["class"]))
                if "Retry-After" in answer.headers:
                    self.retry_after.append(int(answer.headers["Retry-After"]))
                if answer.status_code == 503:
                    time.sleep(0.05)
            except requests.RequestException as e:
                self.errors.append(e)
                self.failed_from.append(started)
                time.sleep(0.05)
            self.slowest = max(self.slowest, time.monotonic() - started)
            time.sleep(self.pause_s)


def open_request(port, head=b"", length=100_000):
    s = socket.create_connection(("127.0.0.1", port))
    s.sendall(head or (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                       b"Content-Length: %d\r\n\r\n--b\r\n" % length))
    return s


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def health_status(url):
    try:
        return requests.get(url + "/health", timeout=5).status_code
    except requests.RequestException:
        return None
