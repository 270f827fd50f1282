"""POST /predict."""
from flask import Blueprint, current_app, g, jsonify

from app import media, uploads
from app.scheduler import Deadline

bp = Blueprint("predict", __name__)


@bp.post("/predict")
def predict():
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline, stages = Deadline(settings.request_timeout), g.stages
    with stages("read"):
        upload = uploads.read_file(settings)
        top_k = uploads.integer_option("top_k", 1, 10, settings.top_k)
    with stages("queue"):
        slot = model.scheduler.take_slot(deadline)
    with slot:
        with stages("decode"):
            image, image_size = media.read_image(upload.data, settings.max_image_pixels, model.preprocessing.resize)
            deadline.check("decode")
        with stages("preprocess"):
            batch = model.preprocessing(image)[None]  # (1, 3, H, W)
        with stages("inference"):
            scores = model.infer(batch, deadline)[0]
    return jsonify({
        "status": "success",
        "predictions": model.top_k(scores, top_k),
        "metadata": {"filename": upload.filename, "model": model.name, "device": model.device,
                     "image_size": list(image_size), "inference_time": round(stages.timings_ms["inference"] / 1000, 6),
                     "timings_ms": stages.timings_ms}})
