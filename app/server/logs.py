"""Logs: one line per record, on standard error, without ever waiting for a reader."""
import collections
import contextlib
import contextvars
import functools
import logging
import os
import re
import select
import socket
import stat
import uuid

from app.server import counters

MOST_PENDING_BYTES = 2**20  # kept for a slow reader; beyond this, lines are dropped and counted
PIECE = select.PIPE_BUF     # a writable pipe accepts this much without blocking, and in one piece
descriptor = 2              # to write to; see log_config.py

request_id = contextvars.ContextVar("request_id", default=None)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def id_for(inbound):
    """The ID of a request: the client's if it is safe to log, else a new one."""
    return inbound if inbound and REQUEST_ID.fullmatch(inbound) else str(uuid.uuid4())


class StderrHandler(logging.Handler):
    """Writes to standard error what it accepts at once, and keeps the rest for the next record or flush()."""

    def __init__(self):
        super().__init__()
        self.pending, self.pending_bytes = collections.deque(), 0
        self.poll = None
        os.register_at_fork(after_in_child=self.pending.clear)  # the parent writes these

    def emit(self, record):
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:  # as logging does: a record that cannot be formatted is reported, not raised
            self.handleError(record)
            return
        if self.pending_bytes + len(line) > MOST_PENDING_BYTES:
            counters.count("log_lines_dropped")
        else:
            self.pending.append(line)
            self.pending_bytes += len(line)
        self.flush()

    def flush(self):
        with self.lock:
            try:
                while self.pending and self.write_some():
                    pass
            except BlockingIOError:
                return
            except OSError:  # the reader is gone
                self.pending.clear()
                self.pending_bytes = 0

    def write_some(self):
        """Write a piece of the oldest line; False if that would block."""
        if self.poll is None:
            self.open()
        if not any(event & select.POLLOUT for _, event in self.poll.poll(0)):
            return False
        line = self.pending[0]
        written = self.write(line[:self.most])
        self.pending_bytes -= written
        self.pending[0] = line[written:]
        if not self.pending[0]:
            self.pending.popleft()
        return True

    def open(self):
        """Find a way to write to standard error without waiting. Raises OSError if it is closed."""
        to, kind = descriptor, os.fstat(descriptor).st_mode
        self.most = PIECE if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind) else MOST_PENDING_BYTES
        self.write = functools.partial(os.write, to)
        if stat.S_ISSOCK(kind):
            connection = socket.socket(fileno=os.dup(to))
            self.write = lambda piece: connection.send(piece, socket.MSG_DONTWAIT)
        elif stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):  # opened anew, so that other programs keep their flags
            with contextlib.suppress(OSError):  # not Linux, or another user's
                to = os.open(f"/proc/self/fd/{to}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
                self.write = functools.partial(os.write, to)
                os.dup2(to, descriptor)  # native code must not wait for a reader either
                self.most = MOST_PENDING_BYTES  # so that other processes' lines rarely come in between
        poll = select.poll()
        poll.register(to, select.POLLOUT)
        self.poll = poll


class RequestIdFilter(logging.Filter):
    def filter(self, record):
        if request_id.get() and not hasattr(record, "request_id"):
            record.request_id = request_id.get()
        return True


def flush():
    """Write what is kept for a slow reader; called now and then."""
    for handler in logging.getLogger().handlers:
        handler.flush()
