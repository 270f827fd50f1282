"""How a worker stops: idle connections are closed, and requests that take too long are refused. Imported once it does.
"""
import contextlib
import os
import select
import socket
import time

import gevent

from app.errors import ServiceError
from app.server import board
from app.server.refusals import DISCARDED, IDLE_STOP_S

REFUSE_BEFORE_S = 1     # the end of the service: what is not answered by then is told so,
EXIT_BEFORE_S = 0.5     # and the process ends, before the master kills it
RETRY_AFTER_S = 1       # another instance may answer at once

idle_since = {}  # {Timeout of a connection on which nothing is asked: when it was first seen}
refused = set()  # Fair sockets


def look_after(worker):
    """Called ten times a second once the worker, or the service, is told to stop."""
    loop, now = gevent.get_hub().loop, time.monotonic()
    end = board.own.integers[board.DRAINING_AT] / 1000 or float("inf")  # only this worker ends
    if not worker.alive:
        for greenlet, timeout in worker.waiting.items():
            if now > idle_since.setdefault(timeout, now) + IDLE_STOP_S:
                loop.run_callback(close, worker, greenlet, timeout)
    if now > end - REFUSE_BEFORE_S:
        for greenlet, sock in worker.answering.items():
            loop.run_callback(refuse, worker, greenlet, sock)
    if now > end - EXIT_BEFORE_S and not worker.alive:
        raise SystemExit(0)  # which gevent passes on to the main greenlet


def close(worker, greenlet, timeout):
    """Close a connection, unless a request has come meanwhile. In the event loop."""
    if worker.waiting.get(greenlet) is not timeout:  # closed by an earlier call of this, perhaps
        return
    client, poll = greenlet.client, select.poll()
    poll.register(client.fileno(), select.POLLIN)
    if poll.poll(0):
        return
    with contextlib.suppress(OSError):  # such as no descriptors; then without a farewell
        kept = gevent.socket.socket(client.family, socket.SOCK_STREAM, fileno=os.dup(client.fileno()))
        gevent.spawn(farewell, kept)
    greenlet.throw(timeout)


def farewell(client):
    """Let a client notice the end and close: what it sends into a closed connection would reset it."""
    with client, contextlib.suppress(OSError), gevent.Timeout(IDLE_STOP_S, False):
        client.shutdown(socket.SHUT_WR)
        while client.recv_into(DISCARDED):
            pass


def refuse(worker, greenlet, sock):
    """Answer a request with 503 SHUTTING_DOWN, unless its answer is being written. In the event loop."""
    if worker.answering.get(greenlet) is sock and not sock.is_writing and sock not in refused:
        refused.add(sock)
        greenlet.throw(ServiceError(503, "SHUTTING_DOWN", "The service is stopping; try another instance, or "
                                    "again later.", retry_after_s=RETRY_AFTER_S))
