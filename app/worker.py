"""Gunicorn's threaded worker, with what a model server needs beside it: a heartbeat while the model loads, threads for
probes alone, a cheap refusal when all threads are taken, a deadline for slow clients, an end for a worker whose model
can no longer be trusted, errors in the service's one shape.
"""
import contextlib
import ctypes
import http.client
import json
import logging
import os
import re
import selectors
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from app import metrics, state
from app.config import StartError
from app.errors import ServiceError

HEADERS_WITHIN_S = 10   # a client must have sent its first byte by then, and in as much time again its headers
SLACK_S = 0.25          # the application's own deadline, which starts a little later, comes first
LOAD_WITHIN_S = 600     # no more heartbeats for a model that takes longer to load
LINGER_S = 5            # for a client to send what it still sends and get its answer before the connection is closed,
LINGER_PAUSE_S = 0.5    # as long as it does not pause
LINGER_AT_ONCE = 8      # threads of a worker that may do so: half of those that are there for more than predictions
REFUSED_PAUSE_S = 0.05  # the same for a client that is refused because all threads are taken
LOOK_AFTER_S = 0.1      # how often the main loop looks after the model and the slow clients
TRIM_EVERY_S = 5        # how often freed memory goes back to the system
RETRY_LOAD_AFTER_S = 2  # a worker that cannot load while others serve is started again after this time


PROBE = re.compile(rb"(GET|HEAD) /(health|ready|live|info|metrics)[ ?].*\r\n\r\n", re.S)
PREDICTION = re.compile(rb"(POST|PUT) (/predict(?:/batch)?)[ ?]")
PROBE_THREADS = 2
REFUSING_THREADS = 12  # most of their time they wait for clients to close

# A thread that comes back from a system call waits so long for Python's lock while another one calculates. With
# Python's 5 ms, the main loop accepts 200 connections a second at worst.
SWITCH_INTERVAL_S = 0.0003

LIBC, M_ARENA_MAX = ctypes.CDLL(None), -8
request_log = logging.getLogger("app.request")
DISCARDED = bytearray(2**18)  # what nobody wants to read is read into this, by all threads


class Worker(ThreadWorker):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read_until = {}  # connection → when its read side is shut
        self.restart_reason = None
        self.look_at = self.trim_at = 0
        self.lingering = threading.Semaphore(LINGER_AT_ONCE)
        self.under_way = 0  # requests that have a thread of Gunicorn's pool or wait for one; of the main loop's alone

    # --- the model ---

    def load_wsgi(self):
        """Load the application and its model. Failing, the worker ends: with an exit code that stops the service if it
        is the only one, with another, after a pause, if others serve."""
        if hasattr(LIBC, "mallopt"):  # glibc; a heap for each of the threads would keep 40 MB more
            LIBC.mallopt(M_ARENA_MAX, 2)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        loaded = threading.Event()
        threading.Thread(target=self.beat_until, args=(loaded,), daemon=True).start()
        try:
            super().load_wsgi()
        except StartError as e:
            self.log.critical("this worker cannot serve: %s", e)
            self.give_up()
        except Exception:  # whatever it was, it must not take the other workers along
            self.log.exception("this worker cannot serve")
            self.give_up()
        finally:
            loaded.set()

    def beat_until(self, loaded):
        until = time.monotonic() + LOAD_WITHIN_S
        while not loaded.wait(1) and time.monotonic() < until:
            self.notify()

    def give_up(self):
        if not state.ready_workers():
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        time.sleep(RETRY_LOAD_AFTER_S)
        sys.exit(1)

    def is_parent_alive(self):
        """Called once a turn of the main loop: also looks after the model and the slow clients."""
        if time.monotonic() > self.look_at:
            self.look_at = time.monotonic() + LOOK_AFTER_S
            self.look_after()
        return super().is_parent_alive()

    def look_after(self):
        self.restart_reason = self.restart_reason or self.wsgi.extensions["model"].needs_restart()
        if self.restart_reason and self.alive:
            self.log.error("this worker restarts: %s", self.restart_reason)
            state.set_gone(self.pid)
            self.alive = False
        self.shut_late_reads()
        self.give_memory_back()

    def give_memory_back(self):
        """Of what decoding large pictures in many threads has freed, the heap keeps 100 MB and more for itself. A trim
        takes 2 to 8 ms, beside the requests."""
        if time.monotonic() > self.trim_at and hasattr(LIBC, "malloc_trim"):  # glibc
            self.trim_at = time.monotonic() + TRIM_EVERY_S
            LIBC.malloc_trim(0)

    def run(self):
        super().run()
        if self.restart_reason:  # a thread that hangs in native code would hold up an orderly exit
            logging.shutdown()
            os._exit(1)

    # --- which thread a request gets ---

    def init_process(self):
        self.probes = ThreadPoolExecutor(PROBE_THREADS, "probe")
        self.refusing = ThreadPoolExecutor(REFUSING_THREADS, "refusing")
        super().init_process()

    def enqueue_req(self, conn):
        """Give a connection to a thread, once it has something to say: probes to one of their own, which never wait
        behind predictions; a prediction for which no thread is free to one that refuses it without parsing it.

        Refused in the application, as up to then, a request costs a millisecond of Python, two thirds of what its
        prediction would; of more than the processor has time for, each would wait for seconds to hear that it is one
        too many."""
        head = first_bytes(conn)
        if head is None and not conn.initialized:
            self.await_first_byte(conn)
            return
        conn.data_ready = True
        self.read_until[conn] = time.monotonic() + HEADERS_WITHIN_S
        prediction = PREDICTION.match(head or b"")
        if PROBE.match(head or b""):
            self.submit(self.probes, self.handle, conn)
        elif prediction and self.under_way >= self.cfg.threads:
            self.submit(self.refusing, self.refuse, conn, *prediction.groups())
        else:
            self.under_way += 1
            self.submit(self.tpool, self.handle, conn).add_done_callback(
                lambda _: self.method_queue.defer(self.has_ended))

    def submit(self, pool, work, conn, *arguments):
        future = pool.submit(work, conn, *arguments)
        future.add_done_callback(lambda future: self.method_queue.defer(self.finish_request, conn, future))
        return future

    def has_ended(self):
        self.under_way -= 1

    def await_first_byte(self, conn):
        """Gunicorn would wait for it in a thread, for 5 s."""
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + HEADERS_WITHIN_S
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def _cap_keepalive(self, deadline):
        """Gunicorn's, when the worker stops: those who never said anything are not waited for either."""
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def refuse(self, conn, method, path):
        """Answer 503 OVERLOADED and close. Returns False: not to be kept."""
        started = time.monotonic()
        error = self.wsgi.extensions["model"].scheduler.overloaded()
        method, path, request_id = method.decode(), path.decode(), str(uuid.uuid4())
        metrics.count_answer(path, method, 503, error.code)
        with contextlib.suppress(OSError):
            conn.sock.settimeout(REFUSED_PAUSE_S)
            conn.sock.sendall(answer_in_one_shape(error, request_id))
        self.read_until.pop(conn, None)
        self.let_go(conn, REFUSED_PAUSE_S)
        request_log.info("request", extra={"request_id": request_id, "method": method, "path": path, "status": 503,
                                           "duration_ms": round(1000 * (time.monotonic() - started), 2),
                                           "error": error.code})
        return False

    # --- slow clients ---

    def handle(self, conn):
        try:
            kept = super().handle(conn)
        finally:
            self.read_until.pop(conn, None)
        if kept is False:
            self.linger(conn)
        return kept

    def linger(self, conn):
        """Before a connection is closed, let the client stop sending and get its answer: closed with bytes unread, it
        would be reset. Gunicorn would wait for that in its main loop, up to 2 s for each slow client, and do nothing
        else meanwhile."""
        if self.lingering.acquire(blocking=False):
            try:
                self.let_go(conn, LINGER_PAUSE_S)
            finally:
                self.lingering.release()
        else:
            self.let_go(conn, 0)

    def let_go(self, conn, pause_s):
        """Read what still comes and forget it, until the client is done or pauses for so long. Gunicorn finds a closed
        socket then, and its own lingering ends at once."""
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):  # the client is gone, or pauses
            conn.sock.shutdown(socket.SHUT_WR)
            while pause_s and (left_s := until - time.monotonic()) > 0:
                conn.sock.settimeout(min(left_s, pause_s))
                if not conn.sock.recv_into(DISCARDED):
                    break
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_RDWR)

    def handle_request(self, req, conn):
        self.read_until[conn] = time.monotonic() + self.wsgi.extensions["settings"].request_timeout + SLACK_S
        # A request that is refused before its body is read ends its connection, and the answer says so. Gunicorn would
        # promise to keep it, read 64 kB, and if there is more close it after all: the client's next request is lost.
        may_close = req.should_close
        req.should_close = lambda: may_close() or is_unread(req.body)
        return super().handle_request(req, conn)

    def shut_late_reads(self):
        """End the waiting for bytes that should have come: the thread that reads sees the end of the stream."""
        now = time.monotonic()
        for conn, until in list(self.read_until.items()):
            if now > until:
                self.read_until.pop(conn, None)
                try:
                    conn.sock.shutdown(socket.SHUT_RD)
                except OSError:  # gone by itself
                    continue

    # --- requests that Gunicorn refuses before the application sees them ---

    def handle_error(self, req, client, addr, exc):
        super().handle_error(req, OneShape(client), addr, exc)


def first_bytes(conn):
    """What a connection's next request begins with, as far as it is there; None where nothing is yet."""
    try:
        conn.sock.setblocking(False)
        return conn.sock.recv(4096, socket.MSG_PEEK)
    except OSError:  # nothing yet; or an error, which is as good as nothing and is met again by who reads
        return None


def is_unread(body):
    """Whether there is more of a request's body (gunicorn.http.body.Body) than was read."""
    reader = body.reader
    return reader.length > 0 if hasattr(reader, "length") else getattr(reader, "parser", None) is not None


class OneShape:
    """Stands for the client's socket: turns the HTML error page that Gunicorn writes into the service's JSON."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        return getattr(self.client, name)

    def sendall(self, page):
        status = int(page.split(b" ", 2)[1])
        code, message = ("INTERNAL_ERROR", "The service failed.") if status == 500 else (
            "BAD_REQUEST", f"The request cannot be understood: {http.client.responses.get(status, 'Bad Request')}.")
        metrics.count_answer("none", "other", status, code)
        self.client.sendall(answer_in_one_shape(ServiceError(status, code, message), str(uuid.uuid4())))


def answer_in_one_shape(error, request_id):
    """An HTTP response, as bytes, that says a ServiceError and that the connection ends."""
    body = json.dumps({**error.body(), "request_id": request_id}).encode()
    retry = f"Retry-After: {error.retry_after()}\r\n" if error.retry_after_s is not None else ""
    return (f"HTTP/1.1 {error.status} {http.client.responses.get(error.status, 'Bad Request')}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{retry}"
            f"X-Request-ID: {request_id}\r\n\r\n").encode() + body
