"""POST /predict and /models/NAME/predict: one input, one answer; and the way to batches."""
import contextlib
import operator
import select

from flask import Blueprint, current_app, g, jsonify, request

from app.api import uploads
from app.engine.slots import in_native_thread
from app.errors import Deadline, invalid_parameter
from app.tasks import Call, options

bp = Blueprint("predict", __name__)


@bp.route("/predict", methods=["POST", "PUT"])  # PUT is what `curl -T photo.jpg` sends
@bp.route("/models/<name>/predict", methods=["POST", "PUT"])
def predict(name=None):
    loader, settings, cache = (current_app.extensions[name] for name in ("model", "settings", "cache"))
    deadline, client_is_there = request_deadline(settings), client_watch()
    loader.slots.check_room()  # before the body is read

    def read(option, model):
        g.model = model
        upload, chosen = uploads.one_file(model.task, settings), options.read(option, model.task)
        return upload.filename, upload.read(settings), chosen, Call(deadline, g.stages, upload.field)

    def in_slot(call):
        return loader.slots.run(call, deadline, g.stages, client_is_there)

    def answer(run):
        with contextlib.ExitStack() as leased:
            with g.stages("read"):
                option = run(uploads.sent_options)
                if options.STREAM.value(option, settings):
                    return None, None, None, option
                model = leased.enter_context(loader.lease(name or option("model"), client))
                filename, data, chosen, call = run(read, option, model)
            if cache:
                found, is_hit = cache.fetch(model, data, chosen, lambda: in_slot(
                    lambda: model.answer(data, chosen, call)), deadline, g.stages)
            else:
                found, is_hit = model.answer(data, chosen, call), None
            if not is_hit:
                loader.answered(model, data, chosen, found)
            return filename, found, is_hit, (model, data, chosen)
    most_bytes = uploads.one_file_limit(settings)
    if "stream" in request.args:
        from app.api import stream  # with the first one
        if stream.is_live(settings):
            return stream.respond_live(name, deadline, client_is_there)
        most_bytes = stream.body_limit(settings)
    with uploads.received(most_bytes, deadline, loader.tasks(name or request.args.get("model"))):
        # What the cache has needs no slot.
        filename, found, is_hit, asked = loader.when_loaded(
            lambda: answer(in_native_thread) if cache else in_slot(lambda: answer(operator.call)), deadline)
        if found is None:
            from app.api import stream
            return stream.respond(name, asked, deadline, client_is_there)
    if current_app.extensions["record"]:
        current_app.extensions["record"](*asked, found, is_hit)
    response = None
    if g.model.task.media_types:
        from app.api import values  # with the first answer that may be a file
        response = values.media_response(found)
    response = response or jsonify({"status": "success", "predictions": found["predictions"],
                                    "metadata": {"filename": filename, **found["metadata"]}})
    if is_hit is not None:
        response.headers["X-Cache"] = "hit" if is_hit else "miss"
    return response


def client():
    from app.api import access  # with the first choice between versions
    return access.client_id()


def request_deadline(settings):
    """REQUEST_TIMEOUT from now, or X-Request-Timeout (seconds) if that is shorter. Raises ServiceError."""
    text = request.headers.get("X-Request-Timeout", settings.request_timeout)
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
