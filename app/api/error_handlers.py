"""Renders every error as JSON, including those that Flask and Werkzeug raise."""
from http import HTTPStatus

from flask import g, jsonify
from werkzeug.exceptions import HTTPException

from app.errors import ServiceError, internal_error, out_of_memory

# The codes and messages for errors that the framework raises.
FRAMEWORK = {
    404: ("NOT_FOUND", "There is nothing at this path; GET / lists the endpoints."),
    405: ("METHOD_NOT_ALLOWED", "This path does not allow this method; the Allow header lists those it does."),
    413: ("FILE_TOO_LARGE", "The request is larger than this service accepts; GET /info lists the limits."),
    415: ("UNSUPPORTED_MEDIA_TYPE", "Send the file as multipart/form-data in the field 'file'."),
}


def register(app):
    app.register_error_handler(ServiceError, render)
    app.register_error_handler(HTTPException, render_http_exception)
    app.register_error_handler(MemoryError, lambda e: render(out_of_memory(e)))
    app.register_error_handler(Exception, lambda e: render(internal_error(e)))


def render(error):
    response = jsonify({**error.body(), "request_id": g.get("request_id"), **error.details})
    response.status_code = error.status
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after())
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    g.error_code = error.code
    return response


def render_http_exception(e):
    if e.code is not None and e.code < 400:  # a redirect is an answer, not an error
        return e
    code, message = FRAMEWORK.get(e.code, (None, None))
    if code is None and e.code is not None and e.code >= 500:
        code, message = "INTERNAL_ERROR", "The service failed; its log has the reason under the request ID."
    elif code is None:
        code, message = "BAD_REQUEST", f"The request cannot be understood: {HTTPStatus(e.code or 400).phrase}."
    response = render(ServiceError(e.code or 400, code, message))
    if getattr(e, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(e.valid_methods))
    return response
