"""Inputs that are text or JSON, options that are files, and answers that are media: what only models of one's own have.
"""
import base64
from dataclasses import dataclass

from flask import Response, current_app, request

from app.api import json_body, uploads
from app.api.long_texts import whole
from app.errors import ServiceError, invalid_parameter
from app.tasks import Task
from app.tasks.own import Instances
from app.tasks.own_inputs import is_unicode

# --- inputs ---


@dataclass(frozen=True)
class Value(uploads.Upload):
    """An input that is no file. content: text, JSON types, or Instances; task: whose, if it has not been checked."""
    task: Task | None = None

    def read(self, settings):
        return checked(self.task, self.content, self.field) if self.task else self.content


def one(task, settings):
    """The input of a request, which may be several in `instances`. Raises ServiceError."""
    body = json_body.members() if request.is_json else {}
    if uploads.INSTANCES not in body:
        return Value(*single(task, body))
    found = listed(task, body)
    if len(found) > settings.max_batch_files:
        raise ServiceError(400, "TOO_MANY_FILES", f"A request may have at most {settings.max_batch_files} instances, "
                           f"found {len(found)}; send the others in a second one.")
    current_app.extensions["count_batch"](len(found))
    return Value(Instances((checked(task, value, field), field) for value, field in found), None, uploads.INSTANCES)


def several(task):
    """The inputs of a batch."""
    body = json_body.members() if request.is_json else {}
    if uploads.INSTANCES not in body:
        return [Value(*single(task, body))]
    return [Value(value, None, field, task) for value, field in listed(task, body)]


def listed(task, body):
    """[(input, its name in messages)] of `instances`, unchecked; each alone, or as the only member of an object."""
    if task.field and body.get(task.field) is not None:
        raise ServiceError(400, "INVALID_PARAMETER", f"The object has {task.field} and instances; send one of them.")
    if body[uploads.INSTANCES] == []:
        raise missing_input(task)
    found = json_body.instances(body[uploads.INSTANCES], "inputs")
    return [(whole(one[task.field] if isinstance(one, dict) and list(one) == [task.field] else one), field)
            for one, field in found]


def single(task, body):
    """(input, file name, its name in messages)."""
    if request.is_json:
        if task.field is None:
            options = {"model", "stream", *(name for option in task.options for name in (option.name, *option.aliases))}
            return whole({name: value for name, value in body.items() if name not in options}), None, "the body"
        if body.get(task.field) is None:
            raise missing_input(task)
        return checked(task, whole(body[task.field]), task.field), None, task.field
    if "form" not in request.mimetype:
        return text_of(task, request.get_data(cache=False), "the body"), None, "the body"
    parts = request.files.getlist(task.field) + request.form.getlist(task.field)
    if len(parts) > 1:
        raise ServiceError(400, "INVALID_PARAMETER", f"{task.field} must be sent once, not {len(parts)} times")
    part = request.files.get(task.field)
    if part is not None:
        return text_of(task, part.stream.getvalue(), task.field), uploads.base_name(part.filename), task.field
    return text_of(task, request.form.get(task.field, ""), task.field), None, task.field


def text_of(task, sent, field):
    if isinstance(sent, bytes):
        try:
            sent = sent.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise invalid_parameter(field, "text in UTF-8", "other bytes") from e
    return checked(task, sent, field)


def checked(task, value, field):
    if task.takes == ("text",) and not isinstance(value, str):
        raise invalid_parameter(field, "text", json_body.json_type(value))
    if task.takes == ("text",) and not is_unicode(value):
        raise invalid_parameter(field, "text in Unicode", "half of a surrogate pair")
    if task.takes == ("json",) and task.field is None and not isinstance(value, dict):
        raise invalid_parameter(field, "an object", json_body.json_type(value))
    if value == "":
        raise missing_input(task)
    return value


def missing_input(task):
    return ServiceError(400, "MISSING_INPUT", f"No input provided: {task.how_to_send}.")


# --- options ---

def option_file(name, sent):
    """The bytes of an option that is a file. sent: parts of a form, and values of JSON, a form or the query."""
    sent = [one for one in sent if one not in (None, "") and getattr(one, "filename", True)]
    if len(sent) > 1:
        raise ServiceError(400, "INVALID_PARAMETER", f"{name} must be sent once, not {len(sent)} times")
    if not sent:
        return None
    if not request.is_json and not hasattr(sent[0], "stream"):
        raise invalid_parameter(name, f"a file: with curl, -F {name}=@file", "text")
    if hasattr(sent[0], "stream"):
        return sent[0].stream.getvalue()
    content = json_body.upload(sent[0], name).content
    return content if isinstance(content, bytes) else json_body.from_base64(content, name, None)


# --- answers ---

def media_response(found):
    """The Response for an answer that is media, None if the client prefers JSON."""
    predictions = found["predictions"]
    if not isinstance(predictions, dict) or set(predictions) != {"media_type", "b64"}:
        return None
    media_type = predictions["media_type"]
    if request.accept_mimetypes.best_match([media_type, "application/json"], media_type) != media_type:
        return None
    metadata = found["metadata"]
    label = f"{metadata['model']}@{metadata['version']}" if "version" in metadata else metadata["model"]
    return Response(base64.b64decode(predictions["b64"]), content_type=media_type,
                    headers={"X-Model": label, "Vary": "Accept"})
