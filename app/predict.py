"""POST /predict."""
from flask import Blueprint, current_app, g, jsonify

from app import pipeline, uploads
from app.scheduler import Deadline

bp = Blueprint("predict", __name__)


@bp.post("/predict")
def predict():
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = Deadline(settings.request_timeout)
    with g.stages("read"):
        upload = uploads.read_file(settings)
        options = pipeline.Options(top_k=uploads.integer_option("top_k", 1, 10, settings.top_k))
    with g.stages("queue"):
        slot = model.scheduler.take_slot(deadline)
    with slot:
        answer = pipeline.answer(model, settings, upload.data, options, deadline, g.stages)
    return jsonify({"status": "success", "predictions": answer["predictions"],
                    "metadata": {"filename": upload.filename, **answer["metadata"]}})
