"""POST /predict."""
import select
import socket

from flask import Blueprint, current_app, g, jsonify, request

from app import pipeline, uploads
from app.errors import ServiceError, invalid_parameter
from app.scheduler import Deadline

bp = Blueprint("predict", __name__)


@bp.post("/predict")
def predict():
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = request_deadline(settings)
    with model.scheduler.admission():
        with g.stages("read"):
            upload = uploads.read_file(settings, deadline)
            options = pipeline.Options(top_k=uploads.integer_option("top_k", 1, 10, settings.top_k))
        with g.stages("queue"):
            slot = model.scheduler.take_slot(deadline)
        with slot:
            drop_if_client_left()
            answer = pipeline.answer(model, settings, upload.data, options, deadline, g.stages)
    return jsonify({"status": "success", "predictions": answer["predictions"],
                    "metadata": {"filename": upload.filename, **answer["metadata"]}})


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
    if connection is None or not select.select([connection], [], [], 0)[0]:
        return
    try:
        left = connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except (BlockingIOError, ValueError):  # nothing to read after all; a TLS socket cannot peek
        left = False
    except OSError:
        left = True
    if left:
        raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "The client left before its turn came.")
