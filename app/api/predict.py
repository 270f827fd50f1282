"""POST /predict: one file, one answer."""
import select

from flask import Blueprint, current_app, g, jsonify, request

from app.api import uploads
from app.engine.slots import in_native_thread
from app.errors import Deadline, invalid_parameter
from app.tasks import options

bp = Blueprint("predict", __name__)


@bp.route("/predict", methods=["POST", "PUT"])  # PUT is what `curl -T photo.jpg` sends
def predict():
    loader, settings, cache = (current_app.extensions[name] for name in ("model", "settings", "cache"))
    deadline = request_deadline(settings)
    loader.slots.check_room()  # before the body is read
    with uploads.received(uploads.one_file_limit(settings), deadline), loader.lease() as model:
        client_is_there = client_watch()

        def read():
            with g.stages("read"):
                data, filename, option = uploads.one_file(settings)
                return data, filename, options.read(option, settings, model.task.options)

        def answer(data, chosen):
            return model.task.answer(model, settings, data, chosen, deadline, g.stages)

        def read_and_answer():
            data, filename, chosen = read()
            return filename, answer(data, chosen)

        def in_slot(call):
            return loader.slots.run(call, deadline, g.stages, client_is_there)
        is_hit = None
        if cache is None:
            filename, found = in_slot(read_and_answer)
        else:  # a cached answer needs no slot
            data, filename, chosen = in_native_thread(read)
            found, is_hit = cache.fetch(model, data, chosen, lambda: in_slot(lambda: answer(data, chosen)), deadline,
                                        g.stages)
    response = jsonify({"status": "success", "predictions": found["predictions"],
                        "metadata": {"filename": filename, **found["metadata"]}})
    if is_hit is not None:
        response.headers["X-Cache"] = "hit" if is_hit else "miss"
    return response


def request_deadline(settings):
    """REQUEST_TIMEOUT from now, or X-Request-Timeout (seconds) if that is shorter. Raises ServiceError."""
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


def client_watch():
    """A function that says whether the client is still connected; None if that cannot be determined."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None or not hasattr(select, "POLLRDHUP"):
        return None
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    return lambda: not poll.poll(0)
