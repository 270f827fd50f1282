"""From an HTTP request to inputs and options: multipart, raw body and JSON through one path.

The body is received in the event loop, in large pieces and within a limit for all bodies together; it is parsed where
the caller chooses, in a native thread.
"""
import contextlib
import functools
import io
import json
import os.path
import re
from dataclasses import dataclass
from typing import Any

import gevent
from flask import Request, current_app, g, request
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser

from app.errors import DeadlineExceeded, ServiceError, invalid_parameter
from app.media.containers import is_video
from app.server import counters
from app.tasks.options import ALL, STREAM

FILE_FIELDS = ("file", "image", "video", "data")  # of a form or a JSON object, for one file
BATCH_FIELDS = ("files", "files[]", *FILE_FIELDS)
SMALL_PIECE, PIECE, STEP = 2**13, 2**20, 2**18  # bytes of a body to read at once, at its start and later; to parse
INSTANCES = "instances"         # TensorFlow Serving's list
KNOWN_NAMES = {*BATCH_FIELDS, INSTANCES, "model", "url", *(name for one in (*ALL, STREAM)
                                                           for name in (one.name, *one.aliases))}
FORM_OVERHEAD = 64 * 1024       # bytes of a body besides the files: boundaries, headers, options
MOST_VALUES = 200_000           # of JSON that is an input itself: such as a tensor of 3 × 224 × 224
BATCH_BODY_FILES = 8            # a batch's body may be as large as this many of the largest pictures
# How curl, requests and browsers begin a form of one file: its boundary, field, file name and type.
PLAIN_FORM = re.compile(rb'--([ -~]{1,99})\r\nContent-Disposition: form-data; name="(\w{1,99})"; '
                        rb'filename="([\w. -]{1,255})"\r\nContent-Type: ([\w./+-]{1,99})\r\n\r\n')


class FormParser(FormDataParser):
    """Werkzeug's, which searches slowly for the end of a file, and copies it five times; a plain form of one file is
    taken apart here, in pieces, as each call holds the GIL."""

    def parse(self, stream, mimetype, content_length, options=None):
        body = stream.getvalue() if mimetype == "multipart/form-data" and isinstance(stream, io.BytesIO) else b""
        head, last = PLAIN_FORM.match(body), f"\r\n--{(options or {}).get('boundary', '')}--\r\n".encode()
        if not head or head[1] != last[4:-4] or not body.endswith(last) or any(body.find(last[2:-4], at, min(
                at + STEP + len(last), len(body) - 5)) >= 0 for at in range(head.end(), len(body), STEP)):
            return super().parse(stream, mimetype, content_length, options)
        name, filename, content_type = (text.decode() for text in head.groups()[1:])
        container = self.stream_factory(content_length, content_type, filename)
        file = memoryview(body)[head.end():-len(last)]
        container.writelines(file[at:at + STEP] for at in range(0, len(file), STEP))
        container.seek(0)
        stream.truncate(0)  # the file is in memory once
        return stream, self.cls(), self.cls([(name, FileStorage(container, filename, name, content_type))])


class MemoryRequest(Request):
    """A request whose uploads stay in memory: Werkzeug would write those over 500 kB to a temporary file."""
    form_data_parser_class = FormParser
    max_form_parts = 64
    max_json_parts = 10_000  # lists, objects and members; base64 has none

    @functools.cached_property
    def file_streams(self):
        """The contents of the form's files in the body's order, whatever their names."""
        return []

    def _get_file_stream(self, total_content_length, content_type, filename=None, content_length=None):
        self.file_streams.append(io.BytesIO())
        return self.file_streams[-1]


@dataclass(frozen=True)
class Upload:
    """One file as it was sent, unchecked.

    content: its bytes, or the JSON value that should be base64; filename: the base name that the client gave, or None;
    field: where it was found, for messages.
    """
    content: Any
    filename: str | None
    field: str

    def read(self, settings):
        """The file's bytes. Raises ServiceError."""
        data = self.content
        if not isinstance(data, bytes):
            from app.api import json_body
            data = json_body.from_base64(data, self.field)
        if not data:
            raise ServiceError(400, "EMPTY_FILE", f"The file sent as {self.field} is empty.")
        kind, setting = ("video", "MAX_VIDEO_SIZE") if is_video(data) else ("file", "MAX_FILE_SIZE")
        if len(data) > (most := getattr(settings, setting.lower())):
            from app.sizes import too_many
            raise ServiceError(413, "FILE_TOO_LARGE", f"The {kind} has {too_many(len(data), most, setting)}.")
        return data


class Bodies:
    """The memory of all request bodies in this process: beyond `most` bytes, the largest body that is still being
    received is refused, however many bytes the others declare. A lone body is never refused."""

    def __init__(self, most):
        self.most, self.total = most, 0
        self.sizes, self.receiving = {}, {}  # {key: bytes}, {key: greenlet that receives}

    @contextlib.contextmanager
    def one(self):
        """Around the time for which a body is kept. Yields its key."""
        key = object()
        self.sizes[key] = 0
        try:
            yield key
        finally:
            self.receiving.pop(key, None)
            self.grow(key, -self.sizes[key])
            del self.sizes[key]

    def grow(self, key, size):
        self.sizes[key] += size
        self.total += size
        counters.change("body_bytes", size)

    def add(self, key, size):
        """Count more bytes of a body. Raises ServiceError OVERLOADED in the greenlet of the body that is refused."""
        self.grow(key, size)
        while self.total > self.most and len(self.sizes) > 1 and any(self.receiving.values()):
            largest = max(filter(self.receiving.get, self.receiving), key=self.sizes.get)
            if largest is key:
                raise no_memory()
            greenlet, self.receiving[largest] = self.receiving[largest], None
            self.grow(largest, -self.sizes[largest])
            gevent.get_hub().loop.run_callback(self.refuse, largest, greenlet)

    def refuse(self, key, greenlet):
        if key in self.receiving:  # if it is complete by now, it may stay
            greenlet.throw(no_memory())


@contextlib.contextmanager
def received(max_bytes, deadline, tasks):
    """Receive the current request's body and keep it until the end of the block. max_bytes: of its files; tasks: those
    that may answer it, if that is known.

    Raises ServiceError for a body that is too large (as HTTPException 413), cut off, or too slow.
    """
    check_media_type(tasks)
    if not all(task.is_file for task in tasks):
        request.max_json_parts = MOST_VALUES
    most = (max_bytes * 4 // 3 if request.is_json else max_bytes) + FORM_OVERHEAD  # base64 turns 3 bytes into 4
    bodies = current_app.extensions["bodies"]
    with bodies.one() as key:
        with g.stages("read"):
            body = receive(most, deadline, bodies, key)
            if current_app.extensions["fetch"]:
                current_app.extensions["fetch"](body, max_bytes, deadline, tasks, bodies, key)
        request.max_content_length = most  # which it does not exceed
        request.environ["CONTENT_LENGTH"], request.stream = str(len(body)), io.BytesIO(body)  # shares the bytes
        del body
        try:
            yield
        finally:
            request.stream = io.BytesIO()


def check_media_type(tasks):
    """Raises ServiceError UNSUPPORTED_MEDIA_TYPE if, by its headers, the body cannot hold an input of one of these
    tasks, or is compressed."""
    mimetype, encoding = request.mimetype, request.headers.get("Content-Encoding", "")
    if encoding.lower() not in ("", "identity"):
        raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", f"Content-Encoding {encoding[:80]} is not accepted here; "
                                                          "send the body uncompressed.")
    if request.is_json or not tasks or any(
            task.body_types.fullmatch(mimetype) or mimetype == "multipart/form-data" and "json" not in task.takes
            for task in tasks):
        return
    raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", f"Content-Type {mimetype[:80]} is not accepted here: "
                       f"{tasks[0].how_to_send}. With curl --data-binary add -H 'Content-Type: {tasks[0].body_type}'.")


def receive(most, deadline, bodies, key):
    """The body of the current request as bytes."""
    declared, stream, body = request.content_length, request.environ["wsgi.input"], io.BytesIO()
    if declared is None and request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return b""
    if declared is not None and declared > most:
        raise RequestEntityTooLarge
    read = getattr(stream, "read1", None)  # see server/worker.py
    bodies.receiving[key] = gevent.getcurrent()
    try:
        with gevent.Timeout(max(0, deadline.remaining()), DeadlineExceeded("read")):
            while declared is None or body.tell() < declared:
                most_now = PIECE if read else min(PIECE, max(SMALL_PIECE, body.tell()))  # little is uncounted
                piece = (read or stream.read)(most_now if declared is None else min(most_now, declared - body.tell()))
                if not piece:
                    break
                body.write(piece)
                bodies.add(key, len(piece))
                if body.tell() > most:
                    raise RequestEntityTooLarge
    except (ServiceError, HTTPException, MemoryError):
        raise
    except Exception as e:  # each server has its own exceptions for clients that send nonsense or disconnect
        raise cut_off() from e
    finally:
        bodies.receiving.pop(key, None)
    if declared is not None and body.tell() < declared:
        raise cut_off()
    return body.getvalue()


def no_memory():
    return ServiceError(503, "OVERLOADED", "There is no memory for this upload now; try again later.", retry_after_s=5)


def cut_off():
    return ServiceError(400, "BAD_REQUEST", "The connection ended before the request was complete.")


def one_file(task, settings):
    """The only input of the received body, after sent_options. Raises ServiceError."""
    if not task.is_file:
        from app.api import values
        return values.one(task, settings)
    files = parse_body(FILE_FIELDS, task)
    if len(files) > 1:
        raise ServiceError(400, "TOO_MANY_FILES", f"This path accepts one file, found {len(files)} "
                           f"({', '.join(f.field for f in files[:4])}); send one, or all of them to /predict/batch.")
    return files[0]


def one_file_limit(settings):
    """The maximum size of a prediction's file, in bytes."""
    return max(settings.max_file_size, settings.max_video_size)


def batch_limit(settings):
    """The maximum total size of a batch's files, in bytes."""
    return max(BATCH_BODY_FILES * settings.max_file_size, settings.max_video_size)


def sent_options():
    """option(name, is_file=False): what the body or else the query has under that name, as text, or a file's bytes;
    None if it was not sent. Raises ServiceError for a form or JSON that cannot be parsed, or with an option that no
    model knows.

    option raises ServiceError if it is repeated within either, or is a list or an object in JSON.
    """
    head = request.stream.getvalue()[:FORM_OVERHEAD] if request.mimetype == "multipart/form-data" else b"filename="
    if b"filename=" not in head.partition(b"\r\n\r\n")[0]:  # nor, probably, in the further parts
        from app.api import nameless_parts  # rarely needed
        nameless_parts.name_them()
    if request.is_json:
        from app.api import json_body  # with the first JSON body
        sent = {name: [value] for name, value in json_body.members().items() if value is not None}
    else:
        sent = request.form.to_dict(flat=False)
    if unknown := {*sent, *request.args} - KNOWN_NAMES:
        from app.api import unknown_options
        unknown_options.check(unknown)

    def option(name, is_file=False):
        values = sent.get(name) or request.args.getlist(name)
        if is_file:
            from app.api import values as of_values
            return of_values.option_file(name, request.files.getlist(name) + values)
        if len(values) > 1:
            raise ServiceError(400, "INVALID_PARAMETER", f"{name} must be sent once, not {len(values)} times")
        value = values[0] if values else None
        if isinstance(value, dict | list):
            raise invalid_parameter(name, "a single value", "a list" if isinstance(value, list) else "an object")
        if request.is_json:
            value = json_body.whole(value)  # a model of one's own may have an option with a name like `data`
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 3.0 is an integer in JSON
        return value if value is None or isinstance(value, str) else json.dumps(value)
    return option


def parse_body(fields, task):
    """At least one Upload from any type of request, after sent_options. Raises ServiceError."""
    if request.mimetype == "multipart/form-data":
        files = files_of_form(fields)
    elif request.is_json:
        from app.api import json_body
        files = json_body.files(fields, task)
    else:
        body = request.get_data(cache=False)
        files = [Upload(body, None, "the body")] if body or request.mimetype else []
    if not files:
        from app.api import nameless_parts
        raise nameless_parts.no_file(fields, task)
    return files


def files_of_form(fields):
    parts = [(name, part) for name, part in request.files.items(multi=True) if name in fields]  # grouped by name
    place = {id(stream): i for i, stream in enumerate(request.file_streams)}
    parts.sort(key=lambda named: place[id(named[1].stream)])
    files = [Upload(part.stream.getvalue(), base_name(part.filename), name) for name, part in parts]
    # For a file input in which nothing was chosen, a browser sends a part with neither name nor content.
    files = [file for file in files if file.filename or file.content]
    if texts := [name for name in (*fields, INSTANCES) if request.form.get(name)]:
        from app.api import nameless_parts
        raise nameless_parts.text_for_a_file(texts[0], files)
    return files


def base_name(filename):
    return os.path.basename((filename or "").replace("\\", "/")) or None


def missing_file(why):
    return ServiceError(400, "MISSING_FILE", f"No file provided: {why}.")
