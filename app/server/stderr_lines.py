"""LOG_FORMAT=json: what is written to standard error past the logs becomes log lines as well: what native libraries
write there, Python's tracebacks, the last words of a process that crashes.

In the process that the others descend from, descriptor 2 becomes a pipe that it reads itself, about once a second.
Nobody who writes there ever waits: what does not fit into the pipe is lost. The logs themselves go past the pipe.
"""
import atexit
import contextlib
import fcntl
import io
import logging.config
import os
import re
import sys
import types
from pathlib import Path

from app.handing_down import LOG_DESCRIPTOR
from app.server.log_config import json_formatter, logging_config

PIPE_BYTES = 2**20       # as large as an unprivileged process may make it
LINE_CHARS = 2000        # of a line; the rest is cut off
TRACEBACK_CHARS = 20_000
MOST_LINES = 500         # at a time
IN_FILE = re.compile(r"^\s*(?:export\s+)?LOG_FORMAT\s*=[\s'\"]*(\w*)", re.MULTILINE | re.IGNORECASE)

log = logging.getLogger("stderr")
reader = None  # of this process, if it has one


def is_wanted():
    """Whether LOG_FORMAT is json. Asked before the settings are read, as they may be wrong."""
    found = re.findall(r"LOG_FORMAT=(\w*)", os.environ.get("SERVICE_DEFAULTS", ""))
    with contextlib.suppress(OSError, ValueError):
        found += IN_FILE.findall(Path(".env").read_text(encoding="utf-8-sig"))
    return os.environ.get("LOG_FORMAT", ["", *found][-1]).strip().lower() != "text"


def refuse(error):
    """Say why this process, which captures nothing yet, does not start."""
    text = f"error: {error}"
    print(json_formatter().format(logging.makeLogRecord({"levelname": "ERROR", "name": "stderr", "msg": text}))
          if is_wanted() else text, file=sys.stderr)


def capture():
    """Make descriptor 2 a pipe and log what comes out of it; read() has to be called now and then."""
    global reader
    logs_to, about = os.dup(2), os.fstat(2)
    os.environ[LOG_DESCRIPTOR] = f"{logs_to}:{about.st_dev}:{about.st_ino}"
    logging.config.dictConfig(logging_config(types.SimpleNamespace(log_format="json", log_level="INFO")))
    come_out, go_in = os.pipe()
    for descriptor in (come_out, go_in):
        os.set_blocking(descriptor, False)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        fcntl.fcntl(go_in, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    reader = Reader(come_out)
    atexit.register(end, os.getpid(), logs_to)
    sys.stderr = io.TextIOWrapper(Unblocked(), errors="backslashreplace", write_through=True)
    os.dup2(go_in, 2)
    os.close(go_in)


class Unblocked(io.RawIOBase):
    """Descriptor 2; Python's own object for it raises an error where nobody reads."""

    def writable(self):
        return True

    def fileno(self):
        return 2

    def write(self, data):
        with contextlib.suppress(OSError):
            os.write(2, data)
        return len(data)


class Reader:
    def __init__(self, descriptor):
        self.descriptor, self.rest = descriptor, b""

    def read(self, at_end=False):
        """Log the lines that have come."""
        try:
            data = os.read(self.descriptor, PIPE_BYTES)
        except BlockingIOError:
            data = b""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (at_end or not data or len(self.rest) > LINE_CHARS):  # it has no end, or not soon
            lines.append(self.rest)
            self.rest = b""
        for message in messages(lines[:MOST_LINES]):
            log.log(logging.ERROR if message.startswith(("error: ", "Traceback ", "Fatal ")) else logging.WARNING,
                    "%s", message)
        if len(lines) > MOST_LINES:
            log.warning("%d further lines on standard error were dropped", len(lines) - MOST_LINES)


def messages(lines):
    """Texts for the log: one for each line that is not empty, and one for a whole traceback."""
    found, in_traceback = [], False
    for line in lines:
        text = line.decode(errors="backslashreplace").rstrip().rpartition("\r")[2][:LINE_CHARS]
        if text and in_traceback and len(found[-1]) < TRACEBACK_CHARS:
            found[-1] += "\n" + text
            in_traceback = text[0] == " "  # its last line is the error
        elif text:
            found.append(text)
            in_traceback = text.startswith("Traceback (most recent call last)")
    return found


def read():
    if reader:
        reader.read()


def release():
    """Before another program takes this one's place: give it the true standard error."""
    if LOG_DESCRIPTOR in os.environ:
        os.dup2(int(os.environ[LOG_DESCRIPTOR].partition(":")[0]), 2)


def end(process, logs_to):
    """At the end of the process, but not of one that was forked: log the rest, such as why it ends."""
    if os.getpid() == process:
        read()
        reader.read(at_end=True)
        os.dup2(logs_to, 2)  # for what comes even later
