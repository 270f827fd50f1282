"""stream=true for a body that is still arriving: JPEGs one after the other (MJPEG), as cameras and ffmpeg send them,
are answered meanwhile. Imported with the first such request.
"""
import collections
import contextlib
import functools
import io
import time

import gevent
from flask import current_app, g, request
from gevent.event import Event

from app import sizes
from app.api import access, uploads
from app.api.predict import client
from app.api.stream import SILENCE, SILENT_S, Audience, answered, event, started
from app.engine.batches import run_batch
from app.errors import DeadlineExceeded, ServiceError
from app.media.modes import END_OF_IMAGE, MARKER
from app.media.pictures import invalid_image
from app.server import counters
from app.server.arriving import Arriving
from app.tasks import options

START = b"\xff\xd8\xff"
PIECE, AT_ONCE = 2**18, 2**16  # bytes to receive at once, which may cost a wait for the GIL, and to look through
EACH_S, TURN_S = 0.00002, 0.0005  # what a piece costs besides; the time after which others have their turn,
OTHERS = 3  # for this many times as long: all live streams together have a quarter of the event loop's time
MOST_SEGMENTS = 200  # of a picture: there are some 10, or 60 if it is progressive
PAUSE_S = 0.005  # after each picture, as any number of tiny ones may arrive
WIND_UP_S = 0.25  # before the deadline, to send the end
AGAIN_AFTER_S = 5  # if there are too many


def respond(name, deadline, is_there):
    """The Response to the current request. Raises what happens before the first event."""
    events = events_of(name, deadline, is_there)
    return started(next(events), events)


def events_of(name, deadline, is_there):
    """Yield a `frame` or an `error` for each picture that is answered, then an `end`, at the latest at the deadline.
    Pictures that arrive while others are answered replace each other."""
    loader, settings, bodies = (current_app.extensions[name] for name in ("model", "settings", "bodies"))
    request.stream = io.BytesIO()  # the body has no options, and may have any length
    option = uploads.sent_options()
    count = failed = 0
    with contextlib.ExitStack() as kept:
        model = g.model = loader.when_loaded(
            lambda: kept.enter_context(loader.lease(name or option("model"), client)), deadline)
        if "picture" not in model.task.takes:
            raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", f"{model.name} takes no pictures: "
                                                              f"{model.task.how_to_send}.")
        chosen = options.read(option, model.task)
        live = kept.enter_context(one_of_few(loader.slots))
        audience = kept.enter_context(Audience(is_there))
        camera = Camera(request.environ["wsgi.input"], settings.max_file_size, bodies, kept.enter_context(bodies.one()),
                        live)
        kept.callback(gevent.spawn(camera.receive).kill)  # and wait: two greenlets must not read from one socket
        while not camera.is_over and (left_s := deadline.remaining() - WIND_UP_S) > 0:
            picture = camera.next(min(left_s, SILENT_S))
            audience.check()
            if picture is None:
                if count and left_s > SILENT_S and not camera.is_over:
                    yield SILENCE
                continue
            if count:
                current_app.extensions["count_batch"](2)  # this one, as the first has been counted
            answer = functools.partial(answered, model, uploads.Upload(picture[1], None, "the body"), chosen, deadline,
                                       picture[0])
            try:
                found = run_batch(loader.slots, [answer])[0]
            except ServiceError as e:
                if e.code != "OVERLOADED" or not count:
                    raise
                continue  # this one is skipped
            is_error = isinstance(found, ServiceError)
            counters.count("batch_files", found.code if is_error else "")
            count, failed = count + 1, failed + is_error
            yield event("error" if is_error else "frame", {
                "index": picture[0], "filename": None, **(found.body() if is_error else found)})
    if not count and not camera.has_ended:
        raise DeadlineExceeded("read")
    if not count:
        raise uploads.missing_file("the body has no JPEG in it")
    yield event("end", {"status": "success", "count": count, "failed": failed, "skipped": camera.number - count,
                        "is_complete": camera.has_ended})


@contextlib.contextmanager
def one_of_few(slots):
    """Around a live stream: a worker has at most as many of them as of other requests, half of them of the same client.
    Yields the Counter of live streams by client. Raises ServiceError."""
    most, here = slots.count + slots.max_queue, current_app.extensions.setdefault("live", collections.Counter())
    who = g.get("client") or access.client_address()
    if here.total() >= most:
        raise ServiceError(503, "OVERLOADED", f"There are {most} live streams, the most that a worker answers; try "
                                              "again later.", AGAIN_AFTER_S)
    if here[who] >= (most + 1) // 2:
        raise ServiceError(429, "RATE_LIMITED", f"You have {here[who]} live streams, the most that one client may have "
                                                "in a worker; end one, or try again later.", AGAIN_AFTER_S)
    here[who] += 1
    try:
        yield here
    finally:
        here[who] -= 1
        if not here[who]:
            del here[who]


class Camera:
    """The pictures in a body that is arriving; only the newest is kept."""

    def __init__(self, body, most_bytes, bodies, key, live):
        self.body, self.jpegs, self.bodies, self.key = Arriving(body, PIECE), Jpegs(most_bytes), bodies, key
        self.newest, self.number = None, 0  # (index, bytes); how many there have been
        self.taken = None  # what `next` returned last, which is being answered
        self.has_ended, self.error, self.arrived = False, None, Event()
        self.live, self.spent_s = live, 0  # the Counter of live streams; what this one has cost since its last pause

    def receive(self):
        """Read until the body ends. Runs in a greenlet of its own."""
        self.bodies.receiving[self.key] = gevent.getcurrent()
        try:
            while arrived := self.body.read():
                for at in range(0, len(arrived), AT_ONCE):
                    self.look_through(arrived[at:at + AT_ONCE])
            self.has_ended = True
        except ServiceError as e:
            self.error, self.newest = e, None
        except Exception:  # each server has its own exceptions for clients that send nonsense or disconnect
            self.error = uploads.cut_off()
        finally:
            self.bodies.receiving.pop(self.key, None)
            self.jpegs.data.clear()
        self.bodies.grow(self.key, self.growth())
        self.arrived.set()

    def look_through(self, piece):
        started = time.perf_counter()
        for jpeg in self.jpegs.add(piece):
            self.newest, self.number = (self.number, jpeg), self.number + 1
            self.arrived.set()
            self.spent_s += time.perf_counter() - started
            gevent.sleep(PAUSE_S)
            started = time.perf_counter()
        self.bodies.add(self.key, self.growth())
        self.spent_s += EACH_S + time.perf_counter() - started
        if self.spent_s > TURN_S:  # there may always be more to read
            gevent.sleep(OTHERS * self.live.total() * self.spent_s)
            self.spent_s = 0

    def growth(self):
        """By how many bytes more is kept than has been counted."""
        pictures = sum(len(picture[1]) for picture in (self.newest, self.taken) if picture)
        return len(self.jpegs.data) + pictures - self.bodies.sizes[self.key]

    @property
    def is_over(self):
        """Whether the body has ended, and `next` has returned its last picture."""
        return self.has_ended and self.newest is None

    def next(self, within_s):
        """(index, bytes) of the newest picture, once there is one that has not been returned; None at the end of the
        body, or of the time. Raises ServiceError."""
        self.taken = None
        if not self.has_ended and not self.error:
            self.arrived.wait(within_s)
        self.arrived.clear()
        self.taken, self.newest = self.newest, None
        if self.taken is None and self.error:
            raise self.error
        return self.taken


class Jpegs:
    """Cuts JPEGs out of bytes, in which they follow each other directly, or after the headers of a multipart body."""

    def __init__(self, most_bytes):
        self.data, self.most_bytes = bytearray(), most_bytes
        self.at, self.segments = None, 0  # where to look for the next marker (None: no picture); how many there were

    def add(self, piece):
        """Yield the pictures, as bytes, that these bytes complete. Raises ServiceError."""
        self.data += piece
        while (end := self.end()) is not None:
            jpeg = bytes(self.data[:end])
            del self.data[:end]
            self.at = None
            yield jpeg
        if len(self.data) > self.most_bytes:
            raise ServiceError(413, "FILE_TOO_LARGE", f"A picture has more than {sizes.words(self.most_bytes)}.")

    def end(self):
        """Where the first picture ends; None if it is not complete."""
        if self.at is None:
            start = self.data.find(START)
            del self.data[:start if start >= 0 else max(0, len(self.data) - len(START) + 1)]
            if start < 0:
                return None
            self.at, self.segments = 2, 0
        while marker := MARKER.search(self.data, self.at):
            if marker[0] == END_OF_IMAGE:
                return marker.end()
            length = int.from_bytes(self.data[marker.end():marker.end() + 2], "big")
            self.at = marker.start()
            if marker.end() + max(2, length) > len(self.data):
                return None
            self.at = marker.end() + length  # a segment, which may hold a smaller picture
            self.segments += 1
            if self.segments > MOST_SEGMENTS:
                raise invalid_image(f"it has more than {MOST_SEGMENTS} segments")
        self.at = max(self.at, len(self.data) - 1)
        return None
