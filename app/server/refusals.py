"""Answers that the worker gives without the application: to requests that nobody can read, and under overload; how it
ends connections, and itself if it cannot load. Imported with the first of these."""
import contextlib
import http.client
import json
import logging
import re
import socket
import sys
import time
import uuid

import gevent
from gunicorn.arbiter import Arbiter

from app.errors import ServiceError
from app.server import counters, logs

log = logging.getLogger("app.request")

LINGER_S = 5             # for a client to send the rest and get its answer before the connection is closed,
LINGER_PAUSE_S = 1       # provided it does not pause for longer than this
IDLE_STOP_S = 0.2        # the same when the worker stops, and for requests on their way on kept connections
RETRY_LOAD_AFTER_S = 2   # a worker that cannot load while others serve is restarted after this time
DISCARDED = bytearray(2**18)  # a buffer for data to be discarded,
DISCARD_EVERY_S = 0.001  # by all connections together: there may always be more, and gevent's reads do not switch then
VIEWS = "/predict/batch", "/predict", "/embed"
V2 = re.compile("/v2/models/[^/]+(/versions/[^/]+)?/infer")

lingering = set()  # sockets


def overloaded(worker, req, headers, error):
    """The HTTP response, as bytes, for a prediction that the full queue refuses. req: Gunicorn's; headers: {name in
    capitals: value}; error: slots.overloaded()."""
    started, request_id = time.monotonic(), logs.id_for(headers.get("X-REQUEST-ID"))
    settings = worker.wsgi.extensions["settings"]
    endpoint = endpoint_of(req.path, settings.open_inference)
    counters.count_answer(endpoint, req.method, error.status, error.code)
    answer = answer_in_one_shape(error, request_id, settings.open_inference and req.path.startswith("/v2/"))
    length, client = headers.get("CONTENT-LENGTH", "0"), client_of(req, settings.trusted_proxies)
    traced = worker.wsgi.extensions.get("traced_refusal")
    with traced(req, headers, endpoint, error, request_id) if traced else contextlib.nullcontext():
        log.info("request", extra={
            "request_id": request_id, "method": req.method, "path": req.path, "status": error.status,
            "duration_ms": round(1000 * (time.monotonic() - started), 2),
            "client": client, "bytes_in": int(length) if length.isdecimal() else 0,
            "bytes_out": len(answer.partition(b"\r\n\r\n")[2]), "error": error.code})
    return answer


def client_of(req, trusted_proxies):
    """The client's address, as Werkzeug's ProxyFix finds it: a proxy may append a header instead of an address."""
    forwarded = [address.strip() for name, value in req.headers if name == "X-FORWARDED-FOR"
                 for address in value.split(",")]
    if trusted_proxies and len(forwarded) >= trusted_proxies and forwarded[-trusted_proxies]:
        return forwarded[-trusted_proxies]
    return req.peer_addr[0] if isinstance(req.peer_addr, tuple) else None


def endpoint_of(path, has_v2):
    """The rule of a prediction's path, as in the application's own counts."""
    if has_v2 and (found := V2.fullmatch(path)):
        return f"/v2/models/<name>{'/versions/<version>' * bool(found[1])}/infer"
    for rule in VIEWS:
        if path.endswith(rule):
            return rule if path == rule else "/models/<name>" + rule
    return "none"


class OneShape:
    """Wraps the client's socket: turns the HTML error page that Gunicorn writes into the service's JSON."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        return getattr(self.client, name)

    def sendall(self, page):
        status = int(page.split(b" ", 2)[1])
        code, message = ("INTERNAL_ERROR", "The service failed.") if status == 500 else (
            "BAD_REQUEST", f"The request cannot be understood: {http.client.responses.get(status, 'Bad Request')}.")
        counters.count_answer("none", "other", status, code)
        self.client.sendall(answer_in_one_shape(ServiceError(status, code, message), str(uuid.uuid4())))


def answer_in_one_shape(error, request_id, is_v2=False):
    """The HTTP response, as bytes, for a ServiceError after which the connection is closed. is_v2: in V2's shape."""
    body = json.dumps({"error": error.message} if is_v2 else {**error.body(), "request_id": request_id}).encode()
    retry = f"Retry-After: {error.retry_after()}\r\n" if error.retry_after_s is not None else ""
    return (f"HTTP/1.1 {error.status} {http.client.responses.get(error.status, 'Bad Request')}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{retry}X-Content-Type-Options: nosniff\r\nX-Request-ID: {request_id}\r\n\r\n").encode() + body


def linger(worker, sock):
    """Before closing, let the client stop sending and get its answer: unread bytes would reset the connection."""
    with (contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as ended,
          worker.until(gevent.Timeout(LINGER_S if worker.alive else IDLE_STOP_S, False))):
        lingering.add(sock)
        ended.callback(lingering.discard, sock)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER_PAUSE_S)
        while sock.recv_into(DISCARDED):
            gevent.sleep(DISCARD_EVERY_S * len(lingering))


def reset(sock):
    """Close at once and discard unsent data."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()


def give_up(worker):
    """End a worker that could not load its model: with the code that stops Gunicorn, if no other one serves."""
    logs.flush()
    first = min(number for number, region in enumerate(counters.regions) if number and region.owner)
    if not counters.ready_workers() and worker.region in (None, first):  # one such exit stops Gunicorn, two break it
        sys.exit(Arbiter.WORKER_BOOT_ERROR)
    time.sleep(RETRY_LOAD_AFTER_S)
    sys.exit(1)
