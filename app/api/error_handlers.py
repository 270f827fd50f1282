"""Renders every error as JSON, including those that Flask and Werkzeug raise."""
from flask import current_app, g, jsonify, request
from werkzeug.exceptions import HTTPException

from app.errors import ServiceError, internal_error, out_of_memory


def register(app):
    app.register_error_handler(ServiceError, render)
    app.register_error_handler(HTTPException, render_http_exception)
    app.register_error_handler(MemoryError, lambda e: render(out_of_memory(e)))
    app.register_error_handler(Exception, lambda e: render(internal_error(e)))


def render(error):
    is_v2 = f"{request.path}/".startswith("/v2/") and current_app.extensions["settings"].open_inference
    response = jsonify({"error": error.message} if is_v2 else {
        **error.body(), "request_id": g.get("request_id"), **error.details})
    response.status_code = error.status
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after())
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    g.error_code = error.code
    return response


def render_http_exception(e):
    from app.api import framework_errors  # with the first one
    return framework_errors.render(e)
