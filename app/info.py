"""GET / and GET /info: what this service is and what answers."""
import platform

from flask import Blueprint, current_app, jsonify

from app.bundle import installed_versions
from app.media import EXTENSIONS

NAME, VERSION = "image-classifier-service", "0.1.0"

bp = Blueprint("info", __name__)

ENDPOINTS = {
    "/": "this list",
    "/predict": "POST a picture, get its classes",
    "/health": "readiness, for load balancers",
    "/ready": "the same as /health",
    "/live": "liveness: 200 as long as the process answers",
    "/info": "the model, the limits and the versions",
    "/metrics": "counts and times, for Prometheus",
}


@bp.get("/")
def index():
    return jsonify({"name": NAME, "version": VERSION, "status": "running", "endpoints": ENDPOINTS})


@bp.get("/info")
def info():
    settings, model = current_app.extensions["settings"], current_app.extensions["model"]
    return jsonify({
        "status": "success",
        "model": model.info(),
        "config": {"max_file_size": settings.max_file_size, "max_image_pixels": settings.max_image_pixels,
                   "allowed_extensions": list(EXTENSIONS), "request_timeout": settings.request_timeout,
                   "top_k": settings.top_k},
        "versions": {"service": VERSION, "python": platform.python_version(),
                     **installed_versions("flask", "gunicorn", "numpy", "opencv-python-headless", "openvino", "pillow",
                                          "torch", "torchvision")}})
