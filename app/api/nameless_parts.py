"""Forms whose file is not where it is expected: in a part without a file name, which Werkzeug takes for text although
its Content-Type may be that of a picture or a video; in another field; or nowhere.
"""
import io
import re

from flask import current_app, request

from app.api import uploads
from app.api.uploads import STEP
from app.errors import ServiceError

MOST_HEADER_BYTES = 8192
DISPOSITION = re.compile(rb"(content-disposition:[^\r\n]*)", re.I)
HAS_NAME = re.compile(rb";[ \t]*filename\*?=", re.I)
HOLDS_FILE = re.compile(rb"\ncontent-type:[ \t]*(image|video)/", re.I)


def name_them():
    """Give these parts of the received body an empty file name, before the form is parsed."""
    body, named, copied = request.stream.getvalue(), io.BytesIO(), 0
    boundary = b"--" + request.mimetype_params.get("boundary", "").encode("latin-1", "replace")
    at = find(body, boundary)
    for _ in range(request.max_form_parts):
        start = at + len(boundary)
        end = body.find(b"\r\n\r\n", start, start + MOST_HEADER_BYTES)
        if at < 0 or end < 0:
            break
        headers = body[start:end]
        if HOLDS_FILE.search(headers) and not HAS_NAME.search(headers):
            copy(body, copied, start, named)
            named.write(DISPOSITION.sub(rb'\1; filename=""', headers))
            copied = end
        at = find(body, b"\r\n" + boundary, end)
        at += 2 if at >= 0 else 0
    if copied:
        copy(body, copied, len(body), named)
        request.stream, request.environ["CONTENT_LENGTH"] = named, str(named.tell())
        named.seek(0)


def find(body, part, start=0):
    """body.find(part, start), a piece at a time, as each search and each copy holds the GIL."""
    return next((found for at in range(start, len(body), STEP)
                 if (found := body.find(part, at, at + STEP + len(part) - 1)) >= 0), -1)


def copy(body, start, end, stream):
    stream.writelines(memoryview(body)[at:min(at + STEP, end)] for at in range(start, end, STEP))


def no_file(fields, task):
    """The ServiceError for a request without a file in any of these fields."""
    other = next((name for name in request.files if name and name not in fields), None)
    where = f"the form's file is in the field '{other[:80]}'; " if other else ""
    by_url = ', or as {"url": "URL"}' if current_app.extensions["fetch"] else ""
    return uploads.missing_file(where + task.how_to_send + by_url)


def text_for_a_file(name, files):
    """The ServiceError for a form whose field `name` has text instead of a file. files: those that it has besides."""
    if files:
        return ServiceError(400, "TOO_MANY_FILES", f"The form has a file in {files[0].field} and text in {name}; leave "
                                                   f"{name} out, or send it alone as JSON.")
    return uploads.missing_file(f"the form's field {name} has no filename, so it is text. With curl, write "
                                f"-F {name}=@photo.jpg, with the @; base64 goes into JSON")
