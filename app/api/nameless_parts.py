"""Parts of a form that hold a picture or a video by their Content-Type, but have no file name: to Werkzeug, text."""
import io
import re

from flask import request

MOST_HEADER_BYTES = 8192
DISPOSITION = re.compile(rb"(content-disposition:[^\r\n]*)", re.I)
HAS_NAME = re.compile(rb";[ \t]*filename\*?=", re.I)
HOLDS_FILE = re.compile(rb"\ncontent-type:[ \t]*(image|video)/", re.I)


def name_them():
    """Give these parts of the received body an empty file name, before the form is parsed."""
    body, pieces, copied = request.stream.getvalue(), [], 0
    boundary = b"--" + request.mimetype_params.get("boundary", "").encode("latin-1", "replace")
    at = body.find(boundary)
    for _ in range(request.max_form_parts):
        start = at + len(boundary)
        end = body.find(b"\r\n\r\n", start, start + MOST_HEADER_BYTES)
        if at < 0 or end < 0:
            break
        headers = body[start:end]
        if HOLDS_FILE.search(headers) and not HAS_NAME.search(headers):
            pieces += [body[copied:start], DISPOSITION.sub(rb'\1; filename=""', headers)]
            copied = end
        at = body.find(b"\r\n" + boundary, end)
        at += 2 if at >= 0 else 0
    if pieces:
        request.stream = io.BytesIO(b"".join([*pieces, body[copied:]]))
        request.environ["CONTENT_LENGTH"] = str(len(request.stream.getbuffer()))
