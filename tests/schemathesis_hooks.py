"""What schemathesis cannot make up by itself: pictures."""
import base64
import contextlib
import io

import schemathesis
from hypothesis import strategies
from PIL import Image

from app.api.stream import LIVE
from app.config import FACE_METHODS, YES_OR_NO
from app.tasks.options import AT, STREAM


def picture(colour, size, format):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


PICTURES = strategies.builds(
    picture, strategies.tuples(*[strategies.integers(0, 255)] * 3),
    strategies.tuples(*[strategies.integers(1, 40)] * 2), strategies.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]))

LONG_ENOUGH_S = 20  # so that no request ends with 504, which is right where the client wants it
RIGHT = {"top_k": ["", *map(str, range(1, 11))], "frames": ["", *map(str, range(1, 33))], "method": ["", *FACE_METHODS],
         **dict.fromkeys(("tta", "explain", "embedding", "normalize", "stream"), ["", "True", "False", *YES_OR_NO])}


def is_right(name, value):
    if name == "at":
        with contextlib.suppress(ValueError):
            return not value or AT.parse(str(value)) is not None
        return False
    return str(value) in RIGHT.get(name, ())


schemathesis.openapi.format("binary", PICTURES)
schemathesis.openapi.format("base64-picture", PICTURES.map(lambda data: base64.b64encode(data).decode()))
schemathesis.openapi.media_type("image/*", PICTURES)
schemathesis.openapi.media_type("video/*", PICTURES)
schemathesis.openapi.media_type("application/octet-stream", PICTURES)
for live in LIVE:
    schemathesis.openapi.media_type(live, PICTURES.filter(lambda data: data.startswith(b"\xff\xd8")))


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """What the document leaves out because people need not know it: other words for true and false, that options may be
    empty, and that forms may have options, but nothing else. No schema can say which classes the model has, so what
    explain_class accepts is not tried here."""
    def more(part):
        if isinstance(part, list):
            return [more(one) for one in part if not (isinstance(one, dict) and one.get("name") == "explain_class")]
        if not isinstance(part, dict):
            return part
        part = {name: more(value) for name, value in part.items() if name != "explain_class"}
        if part.get("type") in ("boolean", ["boolean", "null"]):
            part = {"enum": [*STREAM.schema["enum"], *[None] * ("null" in part["type"])]}
        if "multipart/form-data" in part:
            part["multipart/form-data"]["schema"]["additionalProperties"] = False
        return {**part, "allowEmptyValue": True} if part.get("in") == "query" else part
    for path, operations in raw_schema["paths"].items():
        for operation in operations.values():
            for name in ("parameters", "requestBody"):
                if name in operation and not path.startswith("/v2"):
                    operation[name] = more(operation[name])


@schemathesis.hook
def before_call(context, case, kwargs):
    """The body wins over the query, so a wrong option in the query is seen only where the body does not have it. With
    stream=true, /predict takes several instances, which the schema does not say."""
    if case.media_type in LIVE and "stream" in (case.query or {}):  # which no schema can ask for
        case.query["stream"] = "true"
    if isinstance(case.body, dict) and len(case.body.get("instances") or "") > 1:
        for sent in (case.body, case.query or {}):
            sent.pop("stream", None)
    if isinstance(case.body, dict):
        hidden = [name for name, value in (case.query or {}).items()
                  if name in case.body and not is_right(name, value)]
        if hidden:
            case.body = {name: value for name, value in case.body.items() if name not in hidden}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        if 0 < float(case.headers["X-Request-Timeout"]) < LONG_ENOUGH_S:
            case.headers["X-Request-Timeout"] = str(LONG_ENOUGH_S)
