"""GET / and GET /info: the endpoints, the model, the limits and the versions."""
import platform

from flask import Blueprint, current_app, jsonify, make_response, render_template, request

from app.api import uploads
from app.config import NAME, VERSION
from app.engine.bundle import installed_versions
from app.media import containers, pictures

bp = Blueprint("info", __name__)

ENDPOINTS = {
    "/": "this list; in a browser, a page to try it",
    "/predict": "POST what the model takes, get its prediction",
    "/predict/batch": "POST several inputs, get one result for each",
    "/embed": "POST what the model takes, get the vector before its last layer",
    "/models": "the models; each has /models/NAME/predict, /models/NAME/predict/batch and /models/NAME/embed",
    "/health": "readiness, for load balancers",
    "/ready": "the same as /health",
    "/live": "liveness: 200 as long as the process answers",
    "/info": "the model, the limits and the versions",
    "/metrics": "counts and times, for Prometheus",
    "/openapi.json": "the OpenAPI document",
    "/docs": "the same to read and try, in a browser",
}

# The page has no inline scripts or styles and loads nothing from other hosts; blob: is the chosen picture.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
                               "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self)",
    "Referrer-Policy": "no-referrer",
}


@bp.get("/")
def index():
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        response = make_response(render_template("index.html"), PAGE_HEADERS)
    else:
        response = jsonify({"name": NAME, "version": VERSION, "status": "running",
                            "endpoints": ENDPOINTS | current_app.extensions.get("endpoints", {})})
    response.vary.add("Accept")
    return response


@bp.get("/models")
def models():
    return jsonify({"status": "success", "models": current_app.extensions["model"].states()})


@bp.get("/info")
def info():
    settings, loader = current_app.extensions["settings"], current_app.extensions["model"]
    return jsonify({
        "status": "success",
        "model": loader.info(request.args.get("model")),
        "config": {"max_file_size": settings.max_file_size, "max_image_pixels": settings.max_image_pixels,
                   "max_video_size": settings.max_video_size, "max_video_seconds": settings.max_video_seconds,
                   "allowed_extensions": [*pictures.EXTENSIONS, *containers.EXTENSIONS],
                   "max_batch_files": settings.max_batch_files,
                   "max_batch_size": uploads.batch_limit(settings),
                   "request_timeout": settings.request_timeout,
                   "cache": settings.cache_url and settings.cache_url.partition(":")[0],
                   "cache_ttl": settings.cache_ttl,
                   "top_k": settings.top_k, "face_method": settings.face_method, "tta": settings.tta,
                   "video_frames": settings.video_frames},
        "versions": {"service": VERSION, "python": platform.python_version(),
                     **installed_versions("flask", "gunicorn", "numpy", "opencv-python-headless", "openvino", "pillow",
                                          "torch", "torchvision")}})
