"""Checks 14 and 15: slow clients, and clients that disconnect."""
import contextlib
import getpass
import http.client
import random
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from clients import BackgroundLoad, ask, multipart
from conftest import free_port, need
from traffic import CAT, descriptors, open_request, wait_until

SLOW_CLIENTS = 200
REQUEST_TIMEOUT_S = 10

NGINX = """
user {user};
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 100m;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{upstream}; proxy_request_buffering on; }}
    }}
}}
"""


@contextlib.contextmanager
def dripping(port):
    """SLOW_CLIENTS that send one byte every half second, half of them in the headers, half in the body, and do not
    reconnect once they are disconnected."""
    stopping = threading.Event()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Slow: "
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(open_request(port, head if i % 2 else b"")) for i in range(SLOW_CLIENTS)]

        def drip():
            while not stopping.wait(0.5):
                for s in slow:
                    with contextlib.suppress(OSError):
                        s.send(b"x", socket.MSG_DONTWAIT)
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        yield
        stopping.set()
        thread.join()


@pytest.fixture
def proxy(tmp_path):
    """start(service): the port of an nginx in front of it that only forwards complete requests."""
    with contextlib.ExitStack() as stack:
        def start(service):
            port = free_port()
            configuration = NGINX.format(user=getpass.getuser(), folder=tmp_path, port=port, upstream=service.port)
            (tmp_path / "nginx.conf").write_text(configuration)
            command = [need("nginx"), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            stack.callback(process.terminate)
            return port
        yield start


@pytest.mark.check(14, "200 slow clients (headers or bodies)", "other clients' p99 < 1 s, without and with a proxy")
def test_slow_clients(start_service, golden, quick, proxy, record_property):
    service = start_service(REQUEST_TIMEOUT=str(REQUEST_TIMEOUT_S)).wait_ready()
    front = proxy(service)
    wait_until(lambda: one_is_answered(front), 10, "the proxy does not answer")
    for what, port in {"bare": service.port, "behind nginx": front}.items():
        with dripping(port):
            time.sleep(1)
            side = type("Side", (), {"port": port})
            result = BackgroundLoad(side, golden, 5 if quick else 10, connections=2).result()
        record_property(f"{what}: p99 ms", round(result["latency_ms"]["p99"]))
        record_property(f"{what}: answers, not 200", f"{result['right']}, {result['non_200']}")
        assert result["wrong"] == result["non_200"] == 0
        assert result["latency_ms"]["p99"] < 1000


def one_is_answered(port):
    """Whether a new client gets its prediction within a second."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        _, body = ask(port, "POST", "/predict", *multipart(CAT), timeout_s=1)
        return b"tiger cat" in body
    return False


def request_bytes(data):
    headers, body = multipart(data)
    return (f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {headers['Content-Type']}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def threads(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def leave(port, count, seed):
    """Clients that disconnect in mid-upload, or before or during their answer; half of them with a reset."""
    order, request = random.Random(seed), request_bytes(CAT)
    for i in range(count):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as s:
            if i % 2:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends RST
            if i % 3:
                s.sendall(request[:order.randrange(len(request))])
            else:
                s.sendall(request)
                if i % 6:
                    s.recv(1)


@pytest.mark.check(15, "1000 clients that disconnect mid-upload or mid-answer",
                   "as many descriptors and threads as before; no traceback")
def test_clients_that_leave(start_service, record_property):
    service = start_service().wait_ready()
    (worker,) = service.workers()
    leave(service.port, 200, seed=0)
    wait_until(lambda: one_is_answered(service.port), 30)
    time.sleep(2)
    before = descriptors(worker), threads(worker)
    leave(service.port, 1000, seed=1)
    wait_until(lambda: one_is_answered(service.port), 60)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: descriptors(worker) <= before[0] + 1 and threads(worker) <= before[1], 20)
    after = descriptors(worker), threads(worker)
    record_property("descriptors", f"{before[0]} → {after[0]}")
    record_property("threads", f"{before[1]} → {after[1]}")
    record_property("tracebacks", service.log.count("Traceback"))
    assert after[0] <= before[0] + 1
    assert after[1] <= before[1]
    assert "Traceback" not in service.log
    assert service.workers() == [worker]
