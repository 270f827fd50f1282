"""From an HTTP request to files and options."""
import io
import os.path
from dataclasses import dataclass

from flask import Request, request
from werkzeug.exceptions import ClientDisconnected

from app.errors import ServiceError, invalid_parameter

FILE_FIELDS = ("file", "image", "video", "data")
FORM_OVERHEAD = 64 * 1024  # bytes of a multipart body beside the file: boundaries, headers, options


class MemoryRequest(Request):
    """A request whose uploads stay in memory: Werkzeug would write those over 500 kB to a temporary file."""
    max_form_parts = 64

    def _get_file_stream(self, total_content_length, content_type, filename=None, content_length=None):
        return io.BytesIO()


@dataclass(frozen=True)
class Upload:
    """One file: its bytes, and its base name as the client gave it, or None."""
    data: bytes
    filename: str | None


def read_file(settings, deadline):
    """The one file of the current request. Raises ServiceError."""
    try:
        return parse_file(settings)
    except ClientDisconnected as e:  # also what the worker's read deadline looks like from here
        deadline.check("read")
        raise ServiceError(400, "BAD_REQUEST", "The connection ended before the whole request was there.") from e


def parse_file(settings):
    if request.mimetype != "multipart/form-data":
        if not request.mimetype and not request.content_length:
            raise missing_file()
        raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE",
                           f"Content-Type {request.mimetype or '(none)'} is not taken here: "
                           "send the file as multipart/form-data in the field 'file'.")
    part = next((request.files[name] for name in FILE_FIELDS if name in request.files), None)
    if part is None:
        raise missing_file()
    upload = Upload(part.stream.getvalue(), os.path.basename((part.filename or "").replace("\\", "/")) or None)
    if not upload.data:
        if upload.filename is None:  # a browser's form with no file chosen
            raise missing_file()
        raise ServiceError(400, "EMPTY_FILE", "The file is empty; send one that has content.")
    if len(upload.data) > settings.max_file_size:
        raise ServiceError(413, "FILE_TOO_LARGE", f"The file has {len(upload.data)} bytes; "
                                                  f"at most {settings.max_file_size} are taken.")
    return upload


def missing_file():
    return ServiceError(400, "MISSING_FILE", "No file provided: send one as multipart/form-data in the field 'file'.")


def option(name):
    """An option's text, from the form or else from the query; None where it was not sent."""
    return request.form.get(name, request.args.get(name))


def integer_option(name, low, high, default):
    text = option(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high or not text.strip().lstrip("+-").isascii():
        raise invalid_parameter(name, f"an integer from {low} to {high}", text[:40])
    return value
