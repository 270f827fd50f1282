"""The errors that Flask and Werkzeug raise, as the service's own. Imported with the first one."""
from http import HTTPStatus

from app.api import error_handlers
from app.errors import ServiceError

# The codes and messages for errors that the framework raises.
FRAMEWORK = {
    404: ("NOT_FOUND", "There is nothing at this path; GET / lists the endpoints."),
    405: ("METHOD_NOT_ALLOWED", "This path does not allow this method; the Allow header lists those it does."),
    413: ("FILE_TOO_LARGE", "The request is larger than this service accepts; GET /info lists the limits."),
    415: ("UNSUPPORTED_MEDIA_TYPE", "Send the file as multipart/form-data in the field 'file'."),
}


def render(e):
    """The response for an HTTPException."""
    if e.code is not None and e.code < 400:  # a redirect is an answer, not an error
        return e
    code, message = FRAMEWORK.get(e.code, (None, None))
    if code is None and e.code is not None and e.code >= 500:
        code, message = "INTERNAL_ERROR", "The service failed; its log has the reason under the request ID."
    elif code is None:
        code, message = "BAD_REQUEST", f"The request cannot be understood: {HTTPStatus(e.code or 400).phrase}."
    response = error_handlers.render(ServiceError(e.code or 400, code, message))
    if getattr(e, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(e.valid_methods))
    return response
