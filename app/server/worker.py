"""Gunicorn's gevent worker, extended for a model server: it sends heartbeats while the model loads, replaces models in
place, ends if its model no longer works, and limits the time of clients in both directions.

Each connection is a greenlet; computation runs in native threads (engine/slots.py). The standard library is not
patched, except for ssl if TLS is served: only the sockets of clients are gevent's.

GUNICORN lists what is overridden or called here and in lifecycle.py; a test compares it with the installed release.
"""
import contextlib
import ctypes
import functools
import logging
import os
import socket
import sys
import threading
import time

import gevent
from gevent import monkey
from gunicorn.arbiter import Arbiter
from gunicorn.workers.ggevent import GeventWorker

from app.config import StartError
from app.server import board, counters, logs

GUNICORN = {
    GeventWorker: ("patch", "load_wsgi", "timeout_ctx", "handle", "handle_request", "handle_error", "run"),
    Arbiter: ("handle_term", "handle_hup", "handle_chld", "handle_cld", "murder_workers", "signal", "WORKERS",
              "WORKER_BOOT_ERROR"),
}

HEADERS_WITHIN_S = 10    # from the connection to the end of the first request's headers
WRITE_SLACK_S = 0.75     # so that the application's own deadline comes first and its answer can be written
LOAD_WITHIN_S = 600      # heartbeats stop if the model takes longer to load
TURN_S = 0.005           # how long one client may occupy the loop
LOOK_AFTER_S = 0.1       # how often the model, the board and the log are checked
TRIM_EVERY_S = 5         # how often freed memory is returned to the system

# How long a thread waits for the GIL after a system call while another thread computes. With Python's default of 5 ms,
# the loop accepts only 200 connections per second at worst.
SWITCH_INTERVAL_S = 0.0003

LIBC, M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = ctypes.CDLL(None), -8, -3, -1

PREDICTIONS = ("/predict", "/predict/batch", "/embed", "/infer")
JSON_HEADER, LENGTH_HEADER = b"\r\nContent-Type: application/json\r\n", b"\r\nContent-Length: "


class Worker(GeventWorker):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.restart_reason = None
        self.waiting = {}  # {greenlet in a wait that may be cut short: the Timeout that ends it}
        self.answering = {}  # {greenlet that handles a request: its Fair socket}
        self.replacing = None  # the thread that loads a newly published model
        self.region = None  # number of its counters' region; set by gunicorn.conf.py

    def patch(self):
        """Gunicorn's patches everything; native threads need the original locks, queues and sleep."""
        if self.cfg.is_ssl:
            monkey.patch_ssl()
        self.sockets = [gevent.socket.socket(s.FAMILY, socket.SOCK_STREAM, fileno=s.sock.detach())
                        for s in self.sockets]

    # --- the model ---

    def load_wsgi(self):
        """Load the application and its model in a native thread, and send heartbeats meanwhile: OpenVINO gives the
        loading thread a stack for signal handlers and frees it with the model, after which a signal kills the process.
        On failure the worker exits: if it is the only one, with a code that stops the service, else with 1 later."""
        if hasattr(LIBC, "mallopt"):  # glibc; one heap per thread would take 40 MB more, and returning each request's
            for option, value in ((M_ARENA_MAX, 2), (M_MMAP_THRESHOLD, 2**22), (M_TRIM_THRESHOLD, 2**24)):
                LIBC.mallopt(option, value)  # tensors to the system at once costs half a millisecond
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.generation, until = board.own.published()["generation"], time.monotonic() + LOAD_WITHIN_S
        thread = threading.Thread(target=self.load, name="load-model")
        thread.start()
        while thread.is_alive():
            thread.join(1)
            if time.monotonic() < until:
                self.tmp.notify()
        if not hasattr(self, "wsgi"):
            from app.server import refusals
            refusals.give_up(self)
        counters.own.serves(self.wsgi.extensions["model"].generation)
        if self.wsgi.extensions["model"].generation < self.generation:
            counters.own.failed(self.generation)

    def load(self):
        try:
            super().load_wsgi()
        except BaseException as e:  # no error must affect the other workers
            self.log.critical("this worker cannot serve: %s", e, exc_info=not isinstance(e, StartError))

    def run(self):
        """Serve, then exit without the interpreter's shutdown, which a thread that hangs in native code would block."""
        code = 1
        try:
            gevent.get_hub().print_exception = lambda context, *e: self.log.error("%r failed", context, exc_info=e)
            gevent.spawn(self.look_after)
            super().run()
            code = 1 if self.restart_reason else 0
        except SystemExit as e:
            code = e.code or 0
        except Exception:  # logged as this process's last line
            self.log.exception("this worker ends")
        finally:
            self.wsgi.extensions["at_exit"]()
            logging.shutdown()
            os._exit(code)

    def look_after(self):
        trim_at = 0
        while True:
            gevent.sleep(LOOK_AFTER_S)
            try:
                logs.flush()
                self.replace_model()
                self.end_if_broken()
                if self.is_stopping():
                    from app.server import stopping
                    stopping.look_after(self)
                if time.monotonic() > trim_at and hasattr(LIBC, "malloc_trim"):  # glibc keeps 100 MB of large pictures
                    trim_at = time.monotonic() + TRIM_EVERY_S
                    threading.Thread(target=LIBC.malloc_trim, args=(0,)).start()
            except Exception:  # such as no memory for a thread; there may be some in the next turn
                self.log.exception("looking after the worker failed")

    def end_if_broken(self):
        reason = self.wsgi.extensions["model"].needs_restart()
        if reason and self.alive:
            self.restart_reason = reason
            self.log.error("this worker restarts: %s", reason)
            counters.own.release()
            self.alive = False

    def is_stopping(self):
        """Whether each answer now ends its connection."""
        return board.is_draining() or not self.alive

    def replace_model(self):
        """Load the latest published model, while serving."""
        published = board.own.published()
        if published["generation"] > self.generation and not (self.replacing and self.replacing.is_alive()):
            from app.server import model_swap
            model_swap.start(self, published)

    # --- clients ---

    def handle(self, listener, client, addr):
        counters.change("connections", 1)
        gevent.getcurrent().client = client
        try:
            if self.cfg.is_ssl:  # Gunicorn's own handshake has no time limit; after this one it does nothing
                with gevent.Timeout(HEADERS_WITHIN_S):
                    client.do_handshake()
            super().handle(listener, Fair(client), addr)
        except (OSError, gevent.Timeout) as e:  # no TLS, or no data at all
            self.log.debug("no TLS handshake: %r", e)
        finally:
            counters.change("connections", -1)

    def timeout_ctx(self):
        """Around the wait for a request: if its headers do not arrive in time, the connection is closed."""
        kept = getattr(gevent.getcurrent(), "has_answered", False)
        return self.until(gevent.Timeout(self.cfg.keepalive if kept else HEADERS_WITHIN_S, False))

    @contextlib.contextmanager
    def until(self, timeout):
        """Around a wait that a silent Timeout ends, or that ends early when the worker stops."""
        greenlet = gevent.getcurrent()
        with timeout:
            self.waiting[greenlet] = timeout
            try:
                yield
            finally:
                del self.waiting[greenlet]

    def handle_request(self, listener_name, req, sock, addr):
        """Handle one request within one time limit, including the writing of its answer."""
        sock.give_way()
        gevent.getcurrent().has_answered = True
        logs.request_id.set(None)
        # A stop, or a body that was not read, ends the connection. Asked for the headers; what they say holds.
        may_close = req.should_close
        req.should_close = functools.cache(lambda: may_close() or self.is_stopping() or is_unread(req.body))
        self.refuse_if_full(req, sock)
        if hasattr(req.body.reader, "length"):
            req.body.read1 = functools.partial(read1, req.body.reader)
        limit_s = self.wsgi.extensions["settings"].request_timeout + WRITE_SLACK_S
        self.answering[gevent.getcurrent()] = sock
        try:
            with gevent.Timeout(limit_s) as timeout:
                try:
                    return super().handle_request(listener_name, req, sock, addr)
                finally:
                    sock.sendall(b"")  # headers that no body followed, as of HEAD
                    del self.answering[gevent.getcurrent()]
        except gevent.Timeout as e:
            if e is not timeout:
                raise
            counters.count("connections_cut_off")
            self.log.info("cut off: a client did not read its answer within %g s", limit_s)
            from app.server import refusals
            refusals.reset(sock)
            raise StopIteration from e
        except StopIteration:
            from app.server import refusals  # with the first connection that ends
            refusals.linger(self, sock)
            raise

    def refuse_if_full(self, req, sock):
        """Refuse a prediction at once if the queue is full. In the application a refusal would take a millisecond, a
        good part of a prediction's time, and under overload slow down everything else."""
        slots, headers = self.wsgi.extensions["model"].slots, dict(req.headers)
        if not req.path.endswith(PREDICTIONS) or req.method not in ("POST", "PUT") or not slots.is_full():
            return
        if "ORIGIN" in headers and self.wsgi.extensions["settings"].cors_origins:
            return  # the application adds the headers that a browser needs to read the refusal
        from app.server import refusals  # with the first one
        with gevent.Timeout(refusals.LINGER_S, False):
            sock.sendall(refusals.overloaded(self, req, headers, slots.overloaded()))
        refusals.linger(self, sock)
        raise StopIteration

    def handle_error(self, req, client, addr, exc):
        """Requests that Gunicorn refuses before the application sees them."""
        from app.server import refusals  # with the first one
        super().handle_error(req, refusals.OneShape(client), addr, exc)
        refusals.linger(self, client)


def is_unread(body):
    """Whether part of a request's body (gunicorn.http.body.Body) has not been read."""
    reader = body.reader
    return reader.length > 0 if hasattr(reader, "length") else getattr(reader, "parser", None) is not None


def read1(reader, size):
    """Up to size bytes that have arrived of a body (gunicorn.http.body.LengthReader); Body.read copies them often."""
    most = min(size, reader.length)
    data = reader.unreader.read(None, read_ahead=most) if most else b""
    reader.unreader.unread(data[most:])
    reader.length -= len(data[:most])
    return data[:most]


class Fair:
    """Wraps a client's socket: a client that always has more data gives way to others now and then. A successful read
    of gevent's does not switch greenlets; neither time limits nor heartbeats would work."""

    def __init__(self, client):
        self.client, self.gave_way, self.held, self.is_writing = client, time.monotonic(), b"", False

    def __getattr__(self, name):
        self.sendall(b"")  # sendfile and others must not overtake what waits
        return getattr(self.client, name)

    def give_way(self):
        if time.monotonic() > self.gave_way + TURN_S:
            gevent.sleep(1e-9)  # a timer: of turns of sleep(0), gevent takes fifty before it looks at sockets again
            self.gave_way = time.monotonic()

    def sendall(self, data):
        """The headers of a JSON answer wait for its body: one system call, and the client wakes up once. b"" sends
        what still waits."""
        self.held += data
        if self.held and not (data.endswith(b"\r\n\r\n") and JSON_HEADER in data and LENGTH_HEADER in data):
            data, self.held, self.is_writing = self.held, b"", True
            self.client.sendall(data)
            self.is_writing = False

    def recv(self, size):
        self.give_way()
        loop, turn = gevent.get_hub().loop, gevent.get_hub().loop.now()
        data = self.client.recv(size)
        if loop.now() > turn:  # it had to wait; a large read takes time too, but nobody else has a turn meanwhile
            self.gave_way = time.monotonic()
        return data
