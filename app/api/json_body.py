"""JSON bodies: their members, and files in base64."""
import base64
import functools
import io
import itertools
import json
import re
import urllib.parse

from flask import current_app, g, request

from app.api import uploads
from app.api.long_texts import Text, in_utf8, left_out, marked, put_back, whole
from app.errors import ServiceError, invalid_parameter
from app.media.containers import MEDIA_TYPE

LARGE, PIECE = 2**20, 2**18  # bytes of a body that is read in pieces; of one, each of which holds the GIL
DATA_URL = re.compile(r"data:(?P<type>[^;,]*+)(?P<parameters>[^,]*+),", re.I)  # possessive: linear without a comma
FILE_TYPE = re.compile(MEDIA_TYPE.pattern.replace("(image|video)", "(image|video|audio)"))
URL_SAFE, WHITE_SPACE = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\v\f"


def members():
    """The members of the JSON object in the received body, as a dict. Raises ServiceError INVALID_JSON."""
    if "json_members" not in g:
        g.json_members = parse(request.get_data(cache=False), request.max_json_parts)
    return g.json_members


def parse(text, most_parts):
    """The members of the JSON object in a body's bytes. most_parts: lists, objects and members; parsing these takes a
    hundred times their size. Long texts of a large body are str, or long_texts.Text where a file may be: below
    BATCH_FIELDS and INSTANCES. Raises ServiceError INVALID_JSON."""
    parts = 0
    for at in range(0, len(text), PIECE):
        parts += sum(text.count(one, at, at + PIECE) for one in (b",", b"[", b"{"))
        if parts > most_parts:
            raise ServiceError(400, "INVALID_JSON", f"The body has more than {most_parts} lists, objects and members.")
    later = ()
    try:
        if len(text) > LARGE:
            text, later = left_out(in_utf8(text), parts)
        body = json.loads(text, object_pairs_hook=functools.partial(unique_members, later=later),
                          parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError) as e:
        why = e.args[0] if isinstance(e, NotJSON) else "it cannot be parsed"
        raise ServiceError(400, "INVALID_JSON", f"The body is not valid JSON: {why}.") from e
    if not isinstance(body, dict):
        raise ServiceError(400, "INVALID_JSON", f"The body must be a JSON object, got {json_type(body)}.")
    if later:
        put_back(body, functools.partial(marked, later=later))
        for name in body.keys() - {*uploads.BATCH_FIELDS, uploads.INSTANCES}:
            body[name] = whole(body[name])
    return body


def files(fields, task):
    """[uploads.Upload] of the object's files."""
    body = members()
    found = [name for name in (*fields, uploads.INSTANCES, "url") if body.get(name) is not None]
    if len(found) > 1:
        raise ServiceError(400, "TOO_MANY_FILES", f"The object has {' and '.join(found)}; send one of them.")
    if not found:
        return []
    name, value = found[0], body[found[0]]
    if name == "url":
        return [upload({"url": value}, name)]
    if name != uploads.INSTANCES:
        return [upload(value, name)]
    return [upload(one, field) for one, field in instances(value, "{\"b64\": \"BASE64\"}")]


def upload(value, field):
    url = url_of(value)
    if url is None:
        return uploads.Upload(value, None, field)
    path = urllib.parse.unquote(re.sub(r"^[^/]*//[^/]*|[?#].*", "", url, flags=re.S))
    fetched = g.get("fetched", {}).get(url)
    return uploads.Upload(not_fetched() if fetched is None else fetched, uploads.base_name(path), field)


def url_of(value):
    """The URL of {"url": "…"}; None for anything else."""
    is_url = isinstance(value, dict) and len(value) == 1 and isinstance(value.get("url"), str)
    return value["url"] if is_url else None


def not_fetched():
    if current_app.extensions["fetch"] is None:
        return uploads.missing_file("inputs by URL are off in this service, INPUT_URLS turns them on; send the file")
    return uploads.missing_file("this path does not fetch inputs by URL; send the file")


def instances(value, of):
    """[(instance, its name in messages)] of a body's member `instances`. of: what it lists, in words."""
    if not isinstance(value, list):
        raise ServiceError(400, "INVALID_JSON", f"instances must be a list of {of}, got {json_type(value)}.")
    if not value:
        raise uploads.missing_file("the list instances is empty")
    return [(instance, f"instances[{i}]") for i, instance in enumerate(value)]


class NotJSON(ValueError):
    """The message is for the caller."""


def finite(text):
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise NotJSON(f"{text[:20]} is too large a number")
    return value


def no_constant(name):
    raise NotJSON(f"it has {name}, which JSON lacks")


def unique_members(pairs, later=()):
    """later: the texts that names and values may stand for."""
    members = {}
    for name, value in pairs:
        name = whole(marked(name, later))
        if name == "url":
            value = whole(marked(value, later))
        if name in members:
            raise NotJSON(f"the member {name[:40]!r} is repeated")
        members[name] = value
    return members


def json_type(value):
    return {dict: "an object", list: "a list", str: "a string", Text: "a string", bool: "true or false",
            type(None): "null"}.get(
        type(value), "a number")


def from_base64(value, field, media_type=FILE_TYPE):
    """Decode base64 or a base64 data: URL, also inside TensorFlow Serving's {"b64": …}, alone or under a name.

    White space, the URL-safe alphabet and missing padding are accepted. media_type: a pattern of what a data: URL may
    hold; None: anything. Raises ServiceError.
    """
    if isinstance(value, ServiceError):  # of an input by URL
        raise ServiceError(value.status, value.code, value.message)
    for _ in range(2):
        if isinstance(value, dict) and len(value) == 1:
            value = next(iter(value.values()))
    takes = "base64, a base64 data: URL or {\"b64\": \"BASE64\"}"
    if not isinstance(value, str | Text):
        raise invalid_parameter(field, takes, json_type(value))
    head = ""
    try:
        pieces = (str(piece, "latin-1") for piece in value.pieces()) if isinstance(value, Text) else (
            value[at:at + PIECE] for at in range(0, len(value), PIECE))
        head = next(pieces, "")
        url = DATA_URL.match(head)
        if url:
            if media_type and (not media_type.fullmatch(url["type"].lower())
                               or not url["type"] and not url["parameters"]):
                raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", f"The data: URL in {field} holds "
                                   f"{url['type'][:40] or 'text/plain'}; send one that holds image/* or video/*.")
            if not url["parameters"].lower().endswith(";base64"):
                raise invalid_parameter(field, takes, "a data: URL without ;base64")
        return decoded(itertools.chain([head[url.end():] if url else head], pieces))
    except ValueError as e:
        is_url = media_type and re.match(r"(https?|s3)://", head, re.I)
        raise invalid_parameter(field, takes, "a URL; to send a URL, use {\"url\": \"URL\"}" if is_url else
                                "text that cannot be decoded") from e


def decoded(pieces):
    """The bytes of base64 in pieces of str. Raises ValueError."""
    found, left, has_ended = io.BytesIO(), b"", False
    for piece in pieces:
        sent = piece.encode("ascii").translate(URL_SAFE, WHITE_SPACE)
        text = sent.rstrip(b"=")
        if b"=" in text or has_ended and text:
            raise ValueError("more follows the padding")
        has_ended = has_ended or len(text) < len(sent)
        text = left + text
        fours = len(text) // 4 * 4
        found.write(base64.b64decode(text[:fours], validate=True))
        left = text[fours:]
    found.write(base64.b64decode(left + b"=" * (-len(left) % 4), validate=True))
    return found.getvalue()
