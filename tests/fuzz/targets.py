"""What is fuzzed: each target takes any bytes, and may raise nothing but an error that is the client's, a 4xx."""
import contextlib
import struct
import types
import zlib

from flask import Flask, g
from mutations import bodies, pictures
from werkzeug.exceptions import HTTPException

from app.api import batch, json_body, uploads
from app.config import Settings
from app.errors import Deadline, ServiceError
from app.media.containers import is_video
from app.media.pictures import read_image
from app.media.video import is_cut_off
from app.server.counters import Stages
from app.tasks.classify import Classify

MAX_PIXELS = 2_000_000  # 8 MB of pixels, so that much more memory is not the picture's own
PNG = b"\x89PNG\r\n\x1a\n"

settings = Settings.parse({})
app = Flask("fuzz")  # the application's way to read a request, without a model
app.request_class = uploads.MemoryRequest
app.extensions["bodies"] = uploads.Bodies(settings.max_body_memory)
app.extensions["fetch"] = None
app.extensions["model"] = types.SimpleNamespace(tasks=lambda name: [Classify])  # what it could be asked for


@contextlib.contextmanager
def refusals_allowed():
    try:
        yield
    except (ServiceError, HTTPException) as e:  # the second kind is Werkzeug's own, which the service renders as JSON
        if not 400 <= (e.status if isinstance(e, ServiceError) else e.code) < 500:
            raise


def decode_picture(data):
    for shorter_side in (None, 8):  # whole, and at a reduced scale
        with refusals_allowed():
            image, (width, height), _ = read_image(data, MAX_PIXELS, shorter_side)
            assert image.mode == "RGB"
            assert width * height <= MAX_PIXELS
            assert len(image.tobytes()) == 3 * image.width * image.height


def tell_container(data):
    assert is_video(data) in (True, False)
    with refusals_allowed():
        assert is_cut_off(data) in (True, False)


def parse_json(data):
    with refusals_allowed():
        for name, value in json_body.parse(data, 10_000).items():
            with refusals_allowed():
                assert isinstance(json_body.from_base64(value, name[:40]), bytes)


def parse_upload(data):
    """data: the Content-Type, a line feed, the query, a line feed, the body."""
    content_type, _, rest = data.partition(b"\n")
    query, _, body = rest.partition(b"\n")
    if not query.isascii():  # Gunicorn refuses it
        return
    for path, most, read in (("/predict", uploads.one_file_limit, uploads.one_file),
                             ("/predict/batch", uploads.batch_limit, batch.batch_of_files)):
        with app.test_request_context(path, method="POST", data=body, environ_overrides={
                "CONTENT_TYPE": content_type.decode("latin-1"), "QUERY_STRING": query.decode("latin-1")}):
            g.stages = Stages()
            with refusals_allowed(), uploads.received(most(settings), Deadline(30), [Classify]):
                option, found = uploads.sent_options(), read(Classify, settings)
                for upload in found if path == "/predict/batch" else [found]:
                    with refusals_allowed():
                        assert upload.read(settings)
                for name in ("top_k", "frames", "tta", "x"):
                    with refusals_allowed():
                        assert isinstance(option(name), str | None)


def with_correct_checksums(data):
    """A PNG with the checksum that each chunk should have; else Pillow never looks into a mutated one. Other data is
    returned as it is."""
    if not data.startswith(PNG):
        return data
    data, at = bytearray(data), len(PNG)
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4:end]))
        at = end + 4
    return bytes(data)


# Each target with the files from which its inputs are derived.
TARGETS = {
    "pictures": (decode_picture, lambda: list(pictures().values())),
    "containers": (tell_container, lambda: [
        b"\0\0\0\x18ftypisom\0\0\0\0isommp42\0\0\0\x08mdat\0\0\0\x08moov", b"RIFF\x10\0\0\0AVI LIST\x04\0\0\0hdrl",
        b"\0\0\0\x01mdat\0\0\0\0\0\0\0\x18xxxxxxxx\0\0\0\0moov", b"\x1a\x45\xdf\xa3\x84abcd\x18\x53\x80\x67\x84abcd"]),
    "json": (parse_json, lambda: [body for content_type, body in bodies() if content_type == "application/json"]),
    "uploads": (parse_upload, lambda: [content_type.encode() + b"\ntop_k=2\n" + body
                                       for content_type, body in bodies()]),
}
