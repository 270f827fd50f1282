"""The views of V2, below /v2. Errors there are {"error": "…"}; see app/api/error_answers.py."""
import functools
import json

import numpy as np
from flask import Response, current_app, g, jsonify, request

from app.api import batch, error_answers, json_body, uploads
from app.api.predict import client, client_watch, request_deadline
from app.config import NAME, VERSION
from app.engine.batches import run_batch
from app.engine.slots import in_native_thread
from app.errors import ServiceError, internal_error, out_of_memory
from app.open_inference import request_body, response_body, signatures, tensors
from app.server import board, counters
from app.suggestions import did_you_mean
from app.tasks import Call, options

EXTENSIONS = ["classification", "binary_tensor_data"]
MOST_OF_NUMBERS = 128 * 2**20  # bytes of a body that may be FP32 as JSON: 32 × 3 × 224 × 224 of them take up to 110 MB
OF_TRITON = ("binary_data_output", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
NUMBER_BYTES = 24              # of one in JSON


# --- health and metadata ---

def live():
    return jsonify({"live": True})


def not_ready():
    """Why no request can be answered now, as for /health, or None."""
    return "draining" if board.is_draining() else current_app.extensions["model"].state


def ready():
    reason = not_ready()
    return (jsonify({"ready": False, "error": f"The service is not ready: {reason}."}), 503) if reason else jsonify(
        {"ready": True})


def server():
    return jsonify({"name": NAME, "version": VERSION, "extensions": EXTENSIONS})


def index():
    sent = request.get_data() if request.method == "POST" else b""
    only_ready = json_body.parse(sent, request_body.MOST_PARTS).get("ready", False) if sent else False
    if not isinstance(only_ready, bool):
        raise tensors.invalid("ready must be true or false")
    found = []
    for state in current_app.extensions["model"].states():
        reason = not_ready()
        later = "" if state["loaded"] else "it is loaded with the first request"  # which makes it ready, as model_ready
        found.append({"name": state["name"], **({"version": state["version"]} if "version" in state else {}),
                      "state": "UNAVAILABLE" if reason else "READY", "reason": reason or later})
    return jsonify([one for one in found if one["state"] == "READY" or not only_ready])


def key_of(name, version):
    """The name by which the loader knows it. Raises ServiceError for NAME@VERSION, which is no name here."""
    name, at, named = name.partition("@")
    if at:
        raise ServiceError(404, "NOT_FOUND", f"A version goes into the path: /v2/models/{name[:80]}/versions/"
                                             f"{(version or named)[:40]}")
    return f"{name}@{version}" if version else name


def model_metadata(name, version=None):
    loader = current_app.extensions["model"]
    if name == "stats" and not any(state["name"] == name for state in loader.states()):  # Triton's of all models
        raise ServiceError(404, "NOT_FOUND", error_answers.not_found(request.path))
    signature = signatures.of(loader.tasks(key_of(name, version))[0], loader.settings)
    versions = [state["version"] for state in loader.states() if state["name"] == name and "version" in state]
    return jsonify({"name": name, **({"versions": versions} if versions else {}), "platform": signature.platform(),
                    "inputs": signature.inputs, "outputs": signature.outputs})


def model_ready(name, version=None):
    """200 also for a model that is loaded with its first request, as such a request will be answered; 503 for one that
    could not be loaded, until the next request would try again."""
    loader, key = current_app.extensions["model"], key_of(name, version)
    loader.tasks(key)
    reason = not_ready()
    if not reason and hasattr(loader, "has_failed") and loader.has_failed(loader.key_of(key)):
        reason = "it cannot be loaded now"
    return (jsonify({"name": name, "ready": False, "error": f"The model is not ready: {reason}."}), 503) if reason \
        else jsonify({"name": name, "ready": True})


# --- inference ---

def model_infer(name, version=None):
    loader, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = request_deadline(settings)
    loader.slots.check_room()  # before the body is read
    tasks = loader.tasks(key_of(name, version))
    encoding = request.headers.get("Content-Encoding", "").lower() or "identity"
    if encoding not in ("identity", "gzip", "deflate"):
        raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", f"Content-Encoding {encoding[:80]} is not accepted here; "
                                                          "send the body uncompressed, or as gzip or deflate.")
    bodies, most = current_app.extensions["bodies"], body_limit(tasks, settings)
    with bodies.one() as body_key:
        with g.stages("read"):
            body = uploads.receive(most, deadline, bodies, body_key)
            if encoding != "identity":
                from app.open_inference import compressed  # with the first one
                body = compressed.expanded(body, encoding, most, deadline, bodies, body_key)
        made = loader.when_loaded(functools.partial(answers, key_of(name, version), body, deadline), deadline)
    response = Response(made.body, mimetype="application/json" if made.header_length is None else
                        "application/octet-stream")
    if made.header_length is not None:
        response.headers[request_body.HEADER_LENGTH] = str(made.header_length)
    return response


def body_limit(tasks, settings):
    """The most bytes of a body: files in base64, or FP32 as JSON; at most MAX_BODY_MEMORY."""
    files = uploads.batch_limit(settings) * 4 // 3
    sides = [task.preprocessing.crop for task in tasks if hasattr(task, "preprocessing")]
    numbers = settings.max_batch_files * 3 * max(sides, default=0) ** 2 * NUMBER_BYTES
    most = min(max(files, min(numbers, MOST_OF_NUMBERS)), settings.max_body_memory)
    return most + uploads.FORM_OVERHEAD


class Asked:
    """A request, read for a model: items, options, outputs; and the answers so far."""

    def __init__(self, model, body, deadline):
        settings = current_app.extensions["settings"]
        sent = request_body.request(body, request.headers.get(request_body.HEADER_LENGTH), deadline,
                             request_body.MOST_PARTS if model.task.is_file else uploads.MOST_VALUES,
                             uploads.one_file_limit(settings) * 3 // 2 + uploads.FORM_OVERHEAD)  # base64, with escapes
        self.id, self.model, self.deadline = sent.id, model, deadline
        self.signature = signatures.of(model.task, settings)
        check_names(sent.parameters, model.task)
        chosen = options.read(functools.partial(parameter, sent.parameters), model.task)
        self.outputs = self.signature.wanted(sent.outputs, sent.is_binary, chosen)
        self.options = self.signature.options(chosen, self.outputs)
        self.items = self.signature.items(sent.inputs, deadline)
        self.found, self.to_record = None, []  # the latter for the history: (position, data, answer, is_hit)

    def answer(self, item, stages, data=None):
        """Model.answer to an item, in a slot's thread."""
        if data is None:
            with stages("read"):
                data = self.signature.data(item)
        call = Call(self.deadline, stages, item.field)
        answer = self.model.answer(data, self.options, call, self.signature.how(item))
        if len(self.items) == 1 and item.datatype == "BYTES":
            current_app.extensions["model"].answered(self.model, data, self.options, answer)
        return data, answer

    def response(self):
        """The response_body.Made response, in a native thread."""
        members = {"model_name": self.model.name, "model_version": self.model.version, "id": self.id}
        members = {name: value for name, value in members.items() if value is not None}
        arrays = [(output, self.signature.array(output, self.found)) for output in self.outputs]
        return response_body.response(members, arrays)


def check_names(parameters, task):
    """Raises ServiceError for a parameter that looks like a misspelt option; Triton's own and others are ignored."""
    known = [name for option in task.options for name in (option.name, *option.aliases)]
    for name in parameters.keys() - {*known, *OF_TRITON}:
        if meant := did_you_mean(name[:40], known):
            raise tensors.invalid(f"{ascii(name[:40])[1:-1]} is not an option of {task.name}{meant}")


def parameter(parameters, name, is_file=False):
    """An option as text, from the request's parameters; see options.Option.value. Raises ServiceError."""
    value = parameters.get(name)
    if value is None:
        return None
    if is_file:
        raise tensors.invalid(f"{name} is a file, which a parameter cannot be; send it to /predict")
    if isinstance(value, dict | list):
        raise tensors.invalid(f"the parameter {name} must be a single value")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def answers(key, body, deadline):
    """The response_body.Made response. Raises ServiceError."""
    loader, cache = current_app.extensions["model"], current_app.extensions["cache"]

    def read_in_slot():
        with g.stages("read"):
            asked = Asked(model, body, deadline)
        if len(asked.items) == 1 and not cache:
            return asked, asked.answer(asked.items[0], g.stages)
        return asked, None
    with loader.lease(key, client) as model:
        g.model = model
        asked, alone = loader.slots.run(read_in_slot, deadline, g.stages, client_watch())
        if alone:
            asked.to_record, asked.found = [(0, *alone, False)], [alone[1]]
        else:
            current_app.extensions["count_batch"](len(asked.items))
            with g.stages("files"):
                asked.found = run_batch(loader.slots, batch.traced([functools.partial(outcome, asked, item, i)
                                                                    for i, item in enumerate(asked.items)]))
            if len(asked.items) > 1:
                for one in asked.found:
                    counters.count("batch_files", one.code if isinstance(one, ServiceError) else "")
            first = next((one for one in asked.found if isinstance(one, ServiceError)), None)
            if first:
                raise first
        made = in_native_thread(asked.response)
        if current_app.extensions["record"]:
            for position, data, answer, is_hit in asked.to_record:
                current_app.extensions["record"](model, as_bytes(data, asked.items[position]), asked.options, answer,
                                                 is_hit, position)
        return made


def outcome(asked, item, position):
    """The answer to one of several items, or its ServiceError; as in batch.outcome."""
    loader, cache, stages, is_hit = current_app.extensions["model"], current_app.extensions["cache"], \
        type(g.stages)(), False

    def in_slot(data=None):
        return loader.slots.run(lambda: asked.answer(item, stages, data), asked.deadline, stages, admitted=True)
    try:
        if cache is None:
            data, answer = in_slot()
        else:
            data = in_native_thread(asked.signature.data, item)
            kind = {**asked.options, "open_inference": item.identity()}
            answer, is_hit = cache.fetch(asked.model, as_bytes(data, item), kind, lambda: in_slot(data)[1],
                                         asked.deadline, stages, admitted=True)
        if current_app.extensions["record"]:
            asked.to_record.append((position, data if item.datatype == "BYTES" else None, answer, is_hit))
        return answer
    except ServiceError as e:
        if len(asked.items) > 1 and e.status < 500:
            return ServiceError(e.status, e.code, f"{item.field}: {e.message}", e.retry_after_s)
        return e
    except MemoryError as e:
        return out_of_memory(e)
    except Exception as e:
        return internal_error(e)
    finally:
        stages.count()


def as_bytes(data, item):
    """What the cache's key and the history's hash are of: a file, text, JSON, or the bytes of a tensor."""
    return item.content.tobytes() if isinstance(item.content, np.ndarray) else data
