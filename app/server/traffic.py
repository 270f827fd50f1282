"""Which version of a model answers: the shares of its versions, the client's place among them, and the switch.

The shares lie in an area of their own on the Board, so that `python -m app traffic` changes them for all workers at
once. Only services of several models import this.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time

from app import model_settings
from app.config import StartError
from app.server import board
from app.server.shared_memory import running_service

SEQUENCE_AT = 0     # an integer: how often the shares were set
TEXTS_AT = 64       # two texts, each after its length; the one that counts is number (sequence % 2)
TEXT_BYTES = (board.BYTES - board.TRAFFIC_AT - TEXTS_AT) // 2 // 8 * 8
WRITE_WITHIN_S = 5  # while another process writes, or was stopped while it did


class Area:
    """{name: {"split": [[version, percent], …], "shadow": version or None}} in memory that processes share.

    A writer fills the text that does not count, then adds one to the sequence: one that is killed changes nothing.
    """

    def __init__(self, memory, descriptor=None):
        """descriptor: of the file to lock for writing; None if only this process writes."""
        self.bytes, self.integers, self.descriptor = memory, memory.cast("q"), descriptor
        self.lock = threading.Lock()
        self.last = 0, {}  # the sequence and what it stands for

    def read(self):
        """The shares of all names. Costs a comparison if they have not changed."""
        while self.last[0] != (sequence := self.integers[SEQUENCE_AT]):
            at = text_at(sequence)
            text = bytes(self.bytes[at + 8:at + 8 + self.integers[at // 8]])
            if self.integers[SEQUENCE_AT] == sequence:  # else it may have been overwritten meanwhile
                self.last = sequence, json.loads(text)
        return self.last[1]

    def write(self, change):
        """Set the shares to change(those that hold now). Raises StartError, also change's own."""
        with self.locked():
            text = json.dumps(change(self.read()), separators=(",", ":")).encode()
            at = text_at(self.integers[SEQUENCE_AT] + 1)
            if len(text) > TEXT_BYTES - 8:
                raise StartError(f"MODELS has too many models with versions: their names and shares take {len(text)} "
                                 f"bytes, and {TEXT_BYTES - 8} are the most")
            self.bytes[at + 8:at + 8 + len(text)] = text
            self.integers[at // 8] = len(text)
            self.integers[SEQUENCE_AT] += 1

    @contextlib.contextmanager
    def locked(self):
        """Exclude other writers, threads and processes; a killed one's lock is gone with it."""
        until = time.monotonic() + WRITE_WITHIN_S
        if not self.lock.acquire(timeout=WRITE_WITHIN_S):
            raise StartError("another process is changing the traffic: try again")
        try:
            while self.descriptor is not None:
                try:
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as e:
                    if time.monotonic() > until:
                        raise StartError("another process is changing the traffic: try again") from e
                    time.sleep(0.001)
            yield
        finally:
            if self.descriptor is not None:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self.lock.release()


def text_at(sequence):
    return TEXTS_AT + sequence % 2 * TEXT_BYTES


def of(its_board):
    """The Area on a Board."""
    return Area(its_board.bytes[board.TRAFFIC_AT:], its_board.descriptor)


def own(settings):
    """The Area of the service that this process belongs to; without Gunicorn, one of its own."""
    if board.own:
        return of(board.own)
    area = Area(memoryview(bytearray(board.BYTES - board.TRAFFIC_AT)))
    start(area, settings)
    return area


def start(area, settings):
    """Set the shares to those of the settings. Raises StartError."""
    area.write(lambda _: model_settings.traffic(settings))


def choose(name, split, client):
    """The version, of a split, that answers a client (a text that identifies it), always the same one. The versions'
    shares lie in order on a line from 0 to 100 %, and each client has its place there: if a share grows, only the
    clients in the part that it gains change their version."""
    place = int.from_bytes(hashlib.sha256(f"{name}\0{client}".encode()).digest()[:8]) % 10_000
    for version, percent in split:
        place -= round(100 * percent)
        if place < 0:
            return version
    return split[-1][0]


# --- the command ---

def show(name=None, pid=None, port=None):
    """A line for each name, or one. Raises StartError."""
    area, known = of_running_service(name, pid, port)
    return [line(one, known[one], area.read()[one]) for one in ([name] if name else known)]


def switch(name, split=None, shadow=None, pid=None, port=None):
    """Set the shares of a name in the running service, its shadow, or both, given as texts. Returns lines; raises
    StartError."""
    area, known = of_running_service(name, pid, port)

    def switched(shares):
        now = shares[name]
        to = model_settings.parse_split("SPLIT", split, known[name]) if split else now["split"]
        kept = None if to == [[now["shadow"], 100]] else now["shadow"]
        return {**shares, name: {"split": to, "shadow": kept if shadow is None else
                                 model_settings.parse_shadow("--shadow", shadow, known[name], to)}}
    try:
        area.write(switched)
    except ValueError as e:
        raise StartError(str(e)) from e
    return [line(name, known[name], area.read()[name]),
            f"This holds until the next restart; then {name.upper()}__SPLIT and {name.upper()}__SHADOW hold."]


def of_running_service(name, pid, port):
    """(Area, {name: versions}) of the service on this machine. Raises StartError, also if `name` is not in it."""
    if not hasattr(os, "memfd_create"):
        raise StartError("on this system the traffic of a running service cannot be switched: set NAME__SPLIT and "
                         "restart it")
    _, its_board, _ = running_service(pid, port)
    known = model_settings.versions(model["key"] for model in (its_board.published() or {"models": []})["models"])
    if not known:
        raise StartError("no model of this service has versions: see MODELS in docs/models.md")
    if name and name not in known:
        raise StartError(f"this service has no versions of {name}, only of {', '.join(known)}")
    return of(its_board), known


def line(name, known, share):
    percents = dict(share["split"])
    versions = ", ".join(f"version {version} gets {percents.get(version, 0)} %" for version in known)
    return f"{name}: {versions}; " + (f"version {share['shadow']} is the shadow" if share["shadow"] else "no shadow")
