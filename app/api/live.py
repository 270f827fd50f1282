"""stream=true for a body that is still arriving: JPEGs one after the other (MJPEG), as cameras and ffmpeg send them,
are answered meanwhile. Imported with the first such request.
"""
import contextlib
import functools
import io

import gevent
from flask import current_app, g, request
from gevent.event import Event

from app.api import uploads
from app.api.predict import client
from app.api.stream import Audience, answered, event, started
from app.engine.batches import run_batch
from app.errors import DeadlineExceeded, ServiceError
from app.media.modes import END_OF_IMAGE, MARKER
from app.media.pictures import invalid_image
from app.server import counters
from app.tasks import options

PIECE = 1024  # bytes to wait for; the end of a picture may wait for that much of the next one
START = b"\xff\xd8\xff"
MOST_SEGMENTS = 200  # of a picture: there are some 10, or 60 if it is progressive
PAUSE_S = 0.005  # after each picture, as any number of tiny ones may arrive
WIND_UP_S = 0.25  # before the deadline, to send the end


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
        audience = kept.enter_context(Audience(is_there))
        camera = Camera(request.environ["wsgi.input"], settings.max_file_size, bodies, kept.enter_context(bodies.one()))
        kept.callback(gevent.spawn(camera.receive).kill)  # and wait: two greenlets must not read from one socket
        while (picture := camera.next(deadline.remaining() - WIND_UP_S)) is not None:
            audience.check()
            if count:
                current_app.extensions["count_batch"](2)  # this one, as the first has been counted
            answer = functools.partial(answered, model, uploads.Upload(picture[1], None, "the body"), chosen, deadline,
                                       count)
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


class Camera:
    """The pictures in a body that is arriving; only the newest is kept."""

    def __init__(self, body, most_bytes, bodies, key):
        self.body, self.jpegs, self.bodies, self.key = body, Jpegs(most_bytes), bodies, key
        self.newest, self.number = None, 0  # (index, bytes); how many there have been
        self.taken = None  # what `next` returned last, which is being answered
        self.has_ended, self.error, self.arrived = False, None, Event()

    def receive(self):
        """Read until the body ends. Runs in a greenlet of its own."""
        self.bodies.receiving[self.key] = gevent.getcurrent()
        try:
            while piece := self.body.read(PIECE):
                for jpeg in self.jpegs.add(piece):
                    self.newest, self.number = (self.number, jpeg), self.number + 1
                    self.arrived.set()
                    gevent.sleep(PAUSE_S)
                self.bodies.add(self.key, self.growth())
                gevent.sleep(0)  # there may always be more to read
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

    def growth(self):
        """By how many bytes more is kept than has been counted."""
        pictures = sum(len(picture[1]) for picture in (self.newest, self.taken) if picture)
        return len(self.jpegs.data) + pictures - self.bodies.sizes[self.key]

    def next(self, within_s):
        """(index, bytes) of the newest picture, once there is one that has not been returned; None at the end of the
        body, or of the time. Raises ServiceError."""
        self.taken = None
        if not self.has_ended and not self.error:
            self.arrived.wait(max(0, within_s))
        if within_s <= 0:
            return None
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
            raise ServiceError(413, "FILE_TOO_LARGE", f"A picture has more than {self.most_bytes} bytes.")

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
