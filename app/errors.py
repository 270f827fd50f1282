"""The API's errors, which carry their HTTP status and a stable code."""
import gc
import logging
import math
import time

log = logging.getLogger(__name__)


class ServiceError(Exception):
    """An error response: HTTP status, stable machine-readable code, a sentence for the caller."""

    def __init__(self, status, code, message, retry_after_s=None, details=None):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s
        self.details = details or {}  # additional members of the body

    def retry_after(self):
        """Whole seconds for the Retry-After header."""
        return max(1, math.ceil(self.retry_after_s))

    def body(self):
        return {"status": "error", "error": self.code, "message": self.message}


class DeadlineExceeded(ServiceError):
    """The request's time is up. stage: where it was then: read, queue, decode, face, inference or work."""

    def __init__(self, stage):
        super().__init__(504, "DEADLINE_EXCEEDED", f"The time allowed for this request ran out (during {stage}).")


class Deadline:
    """The moment by which a request must be answered."""

    def __init__(self, seconds):
        self.at = time.monotonic() + seconds

    def remaining(self):
        """Seconds left; negative when it has passed."""
        return self.at - time.monotonic()

    def check(self, stage):
        """Raises DeadlineExceeded if it has passed."""
        if self.remaining() <= 0:
            raise DeadlineExceeded(stage)


def invalid_parameter(name, takes, got):
    return ServiceError(400, "INVALID_PARAMETER", f"{name} must be {takes}, got {got}")


def out_of_memory(e):
    """The error for the caller when the model or a decoder runs out of memory. Frees what it can."""
    log.error("out of memory: %s", e)
    gc.collect()
    return ServiceError(503, "OUT_OF_MEMORY", "There was not enough memory for this request; try again later.",
                        retry_after_s=5)


def internal_error(e):
    """The error for the caller after a bug, which is logged with its stack trace."""
    log.error("unexpected error", exc_info=e)
    return ServiceError(500, "INTERNAL_ERROR", "The service failed; its log has the reason under the request ID.")
