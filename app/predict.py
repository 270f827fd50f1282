"""POST /predict: one file, one answer."""
import socket

from flask import Blueprint, current_app, g, jsonify, request

from app import metrics, pipeline, uploads
from app.errors import ServiceError, invalid_parameter
from app.scheduler import Deadline

bp = Blueprint("predict", __name__)


@bp.route("/predict", methods=["POST", "PUT"])  # PUT is what `curl -T photo.jpg` sends
def predict():
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = request_deadline(settings)
    with model.scheduler.admission():
        with g.stages("read"):
            data, filename, option = uploads.read_one(settings, deadline)
            options = pipeline.options_from(option, settings, model)
        answer, is_hit = answer_or_cached(data, options, deadline, g.stages)
    response = jsonify({"status": "success", "predictions": answer["predictions"],
                        "metadata": {"filename": filename, **answer["metadata"]}})
    if is_hit is not None:
        response.headers["X-Cache"] = "hit" if is_hit else "miss"
    return response


def answer_or_cached(data, options, deadline, stages, admitted=False):
    """(pipeline.answer in a slot, or the same from the cache; whether it is from there, None without a cache).

    admitted: see Scheduler.take_slot. Raises ServiceError.
    """
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    cache = current_app.extensions["cache"]

    def compute():
        with stages("queue"):
            slot = model.scheduler.take_slot(deadline, admitted)
        with slot:
            drop_if_client_left()
            return pipeline.answer(model, settings, data, options, deadline, stages)
    if cache is None:
        return compute(), None
    answer, is_hit = cache.fetch(data, options, compute, deadline, stages, admitted)
    metrics.count("cache_lookups", "hit" if is_hit else "miss")
    if is_hit:
        answer = {**answer, "metadata": {**answer["metadata"], "inference_time": 0.0, "timings_ms": stages.timings_ms}}
    return answer, is_hit


def request_deadline(settings):
    """REQUEST_TIMEOUT from now, or less by the client's X-Request-Timeout (seconds). Raises ServiceError."""
    text = request.headers.get("X-Request-Timeout")
    if text is None:
        return Deadline(settings.request_timeout)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise invalid_parameter("X-Request-Timeout", "a number of seconds above 0", text[:40])
    return Deadline(min(seconds, settings.request_timeout))


def drop_if_client_left():
    """Raises ServiceError where the client has closed the connection: nobody would read the answer."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None:
        return
    try:
        left = connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except (BlockingIOError, ValueError):  # nothing to read; a TLS socket cannot peek
        left = False
    except OSError:
        left = True
    if left:
        raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "The client left before its turn came.")
