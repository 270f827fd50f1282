"""The JSON of errors, those that Flask and Werkzeug raise included. Imported with the first one."""
import re
from http import HTTPStatus

from flask import current_app, g, jsonify, request
from werkzeug.exceptions import HTTPException

from app.errors import ServiceError, internal_error, out_of_memory

# The codes and messages for errors that the framework raises.
FRAMEWORK = {
    404: ("NOT_FOUND", "There is nothing at this path; GET / lists the endpoints."),
    405: ("METHOD_NOT_ALLOWED", "This path does not take this method; the Allow header lists those it takes."),
    413: ("FILE_TOO_LARGE", "The request is larger than this service accepts; GET /info lists the limits."),
    415: ("UNSUPPORTED_MEDIA_TYPE", "Send the file as multipart/form-data in the field 'file'."),
}
OF_TRITON = re.compile(  # what its clients may ask besides V2
    r"/v2/(models/[^/]+/(versions/[^/]+/)?(stats|config|trace/setting)|models/stats|trace/setting|logging|"
    r"repository/models/[^/]+/(load|unload)|(systemsharedmemory|cudasharedmemory)/.+)")


OF_JOBS = re.compile(r"/jobs(/.*)?|/predict/async|/models/[^/]+/jobs")


def not_found(path):
    """The message for a path that there is not."""
    settings = current_app.extensions["settings"]
    if settings.open_inference and OF_TRITON.fullmatch(path):
        return f"{path[:200]} of Triton is not supported here."
    if OF_JOBS.fullmatch(path) and not (settings.optional and settings.optional.jobs):
        return "This service runs no jobs: JOBS=on turns them on."
    if path.startswith("/history") and not (settings.optional and settings.optional.history):
        return "This service keeps no history: HISTORY=on turns it on."
    return FRAMEWORK[404][1]


def render(error):
    """The response for any exception."""
    if isinstance(error, HTTPException):
        return render_http_exception(error)
    if not isinstance(error, ServiceError):
        error = out_of_memory(error) if isinstance(error, MemoryError) else internal_error(error)
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
    if e.code is not None and e.code < 400:  # a redirect is an answer, not an error
        return e
    code, message = FRAMEWORK.get(e.code, (None, None))
    if e.code == 404:
        message = not_found(request.path)
    elif methods := sorted(set(getattr(e, "valid_methods", None) or ()) - {"HEAD", "OPTIONS"}):
        message = f"This path takes {' and '.join(methods)}, not {request.method}."
    if code is None and e.code is not None and e.code >= 500:
        code, message = "INTERNAL_ERROR", "The service failed; its log has the reason under the request ID."
    elif code is None:
        code, message = "BAD_REQUEST", f"The request cannot be understood: {HTTPStatus(e.code or 400).phrase}."
    response = render(ServiceError(e.code or 400, code, message))
    if getattr(e, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(e.valid_methods))
    return response
