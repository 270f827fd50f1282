"""The service's errors, and the one place that turns any error into JSON."""
import gc
import logging
import math
from http import HTTPStatus

from flask import g, jsonify
from werkzeug.exceptions import HTTPException

log = logging.getLogger(__name__)


class ServiceError(Exception):
    """An answer other than the wished one: HTTP status, stable machine code, a sentence for the caller."""

    def __init__(self, status, code, message, retry_after_s=None, details=None):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s
        self.details = details or {}  # further members of the body

    def retry_after(self):
        """Whole seconds for the header Retry-After."""
        return max(1, math.ceil(self.retry_after_s))

    def body(self):
        return {"status": "error", "error": self.code, "message": self.message}


def invalid_parameter(name, takes, got):
    return ServiceError(400, "INVALID_PARAMETER", f"{name} must be {takes}, got {got}")


# What the framework itself raises, in the words of the contract.
FRAMEWORK = {
    404: ("NOT_FOUND", "There is nothing at this path; GET / lists the endpoints."),
    405: ("METHOD_NOT_ALLOWED", "This path does not take this method; the Allow header names those it takes."),
    413: ("FILE_TOO_LARGE", "The request is larger than this service accepts; GET /info says how much it takes."),
    415: ("UNSUPPORTED_MEDIA_TYPE", "Send the file as multipart/form-data in the field 'file'."),
}


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
        code, message = "INTERNAL_ERROR", "The service failed; the request id finds the reason in its log."
    elif code is None:
        code, message = "BAD_REQUEST", f"The request cannot be understood: {HTTPStatus(e.code or 400).phrase}."
    response = render(ServiceError(e.code or 400, code, message))
    if getattr(e, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(e.valid_methods))
    return response


def out_of_memory(e):
    """What a caller is told when the model or the decoder found no memory; what can be freed is."""
    log.error("out of memory: %s", e)
    gc.collect()
    return ServiceError(503, "OUT_OF_MEMORY", "There was not enough memory for this request; try again later.",
                        retry_after_s=5)


def internal_error(e):
    """What a caller is told of a bug, which goes to the log with its stack trace."""
    log.error("unexpected error", exc_info=e)
    return ServiceError(500, "INTERNAL_ERROR", "The service failed; the request id finds the reason in its log.")


def render_bug(e):
    return render(internal_error(e))


def register(app):
    app.register_error_handler(ServiceError, render)
    app.register_error_handler(HTTPException, render_http_exception)
    app.register_error_handler(MemoryError, lambda e: render(out_of_memory(e)))
    app.register_error_handler(Exception, render_bug)
