"""POST /predict: one file, one answer."""
from flask import Blueprint, current_app, g, jsonify

from app import pipeline, uploads
from app.scheduler import Deadline

bp = Blueprint("predict", __name__)


@bp.route("/predict", methods=["POST", "PUT"])  # PUT is what `curl -T photo.jpg` sends
def predict():
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = Deadline(settings.request_timeout)
    with g.stages("read"):
        data, filename, option = uploads.read_one(settings)
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
            return pipeline.answer(model, settings, data, options, deadline, stages)
    if cache is None:
        return compute(), None
    answer, is_hit = cache.fetch(data, options, compute, deadline, stages, admitted)
    if is_hit:
        answer = {**answer, "metadata": {**answer["metadata"], "inference_time": 0.0, "timings_ms": stages.timings_ms}}
    return answer, is_hit
