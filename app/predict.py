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
    with g.stages("queue"):
        slot = model.scheduler.take_slot(deadline)
    with slot:
        answer = pipeline.answer(model, settings, data, options, deadline, g.stages)
    return jsonify({"status": "success", "predictions": answer["predictions"],
                    "metadata": {"filename": filename, **answer["metadata"]}})
