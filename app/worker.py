"""Gunicorn's threaded worker, with what a model server needs beside it: a heartbeat while the model loads, a deadline
for slow clients, an end for a worker whose model can no longer be trusted, errors in the service's one shape.
"""
import contextlib
import ctypes
import http.client
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid

from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from app import metrics, state
from app.config import StartError

HEADERS_WITHIN_S = 10   # a client must have sent its request's headers by then
SLACK_S = 0.25          # the application's own deadline, which starts a little later, comes first
LOAD_WITHIN_S = 600     # no more heartbeats for a model that takes longer to load
LINGER_S = 5            # for a client to send what it still sends and get its answer before the connection is closed,
LINGER_PAUSE_S = 0.5    # as long as it does not pause
LINGER_AT_ONCE = 8      # threads of a worker that may do so: half of those that are there for more than predictions
TRIM_EVERY_S = 5        # how often freed memory goes back to the system
RETRY_LOAD_AFTER_S = 2  # a worker that cannot load while others serve is started again after this time


LIBC, M_ARENA_MAX = ctypes.CDLL(None), -8
DISCARDED = bytearray(2**18)  # what nobody wants to read is read into this, by all threads


class Worker(ThreadWorker):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read_until = {}  # connection → when its read side is shut
        self.restart_reason = None
        self.trim_at = 0
        self.lingering = threading.Semaphore(LINGER_AT_ONCE)

    # --- the model ---

    def load_wsgi(self):
        """Load the application and its model. Failing, the worker ends: with an exit code that stops the service if it
        is the only one, with another, after a pause, if others serve."""
        if hasattr(LIBC, "mallopt"):  # glibc; a heap for each of the threads would keep 40 MB more
            LIBC.mallopt(M_ARENA_MAX, 2)
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
        model = self.wsgi.extensions["model"]
        self.restart_reason = self.restart_reason or model.needs_restart()
        if self.restart_reason and self.alive:
            self.log.error("this worker restarts: %s", self.restart_reason)
            state.set_gone(self.pid)
            self.alive = False
        self.shut_late_reads()
        self.give_memory_back()
        return super().is_parent_alive()

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

    # --- slow clients ---

    def enqueue_req(self, conn):
        """A connection's time begins when it has something to say, not when a thread is free to listen: of many slow
        clients, those that waited for a thread are not given the whole time again."""
        self.read_until[conn] = time.monotonic() + HEADERS_WITHIN_S
        super().enqueue_req(conn)

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
                self.discard(conn.sock)
            finally:
                self.lingering.release()
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_RDWR)  # Gunicorn's own lingering ends at once

    def discard(self, sock):
        """Read what still comes and forget it."""
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):  # the client is gone, or pauses
            sock.shutdown(socket.SHUT_WR)
            while (left_s := until - time.monotonic()) > 0:
                sock.settimeout(min(left_s, LINGER_PAUSE_S))
                if not sock.recv_into(DISCARDED):
                    return

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
        request_id = str(uuid.uuid4())
        code, message = ("INTERNAL_ERROR", "The service failed.") if status == 500 else (
            "BAD_REQUEST", f"The request cannot be understood: {http.client.responses.get(status, 'Bad Request')}.")
        metrics.count_answer("none", "other", status, code)
        body = json.dumps({"status": "error", "error": code, "message": message, "request_id": request_id}).encode()
        head = (f"HTTP/1.1 {status} {http.client.responses.get(status, 'Bad Request')}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\n\r\n")
        self.client.sendall(head.encode() + body)
