"""Request ids, stage timings and logs."""
import contextlib
import logging
import re
import time
import uuid

from flask import g, has_request_context, request

from app import metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
log = logging.getLogger("app.request")


class Stages:
    """Milliseconds that a request spent in each stage."""

    def __init__(self):
        self.timings_ms = {}

    @contextlib.contextmanager
    def __call__(self, stage):
        started = time.perf_counter()
        try:
            with metrics.in_stage(stage):
                yield
        finally:
            spent = 1000 * (time.perf_counter() - started)
            self.timings_ms[stage] = round(self.timings_ms.get(stage, 0) + spent, 2)


class RequestIdFilter(logging.Filter):
    def filter(self, record):
        if has_request_context():
            record.request_id = g.get("request_id")
        return True


def logging_config(settings):
    """A logging.config dictionary for the service and Gunicorn: one line a record, on standard error."""
    if settings.log_format == "json":
        formatter = {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": "%(levelname)s %(name)s %(message)s",
                     "timestamp": True, "rename_fields": {"levelname": "level", "name": "logger"}}
    else:
        formatter = {"()": "app.observability.TextFormatter"}
    return {"version": 1, "disable_existing_loggers": False,
            "filters": {"request_id": {"()": "app.observability.RequestIdFilter"}},
            "formatters": {"line": formatter},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["request_id"],
                                    "stream": "ext://sys.stderr"}},
            "root": {"level": settings.log_level, "handlers": ["stderr"]},
            "loggers": {"gunicorn.error": {"level": settings.log_level, "handlers": [], "propagate": True},
                        "gunicorn.access": {"level": "WARNING", "handlers": [], "propagate": True},
                        "PIL": {"level": "WARNING"}}}


class TextFormatter(logging.Formatter):
    """Time, level, message, then the extra fields as key=value."""
    standard = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record):
        extra = {k: v for k, v in record.__dict__.items() if k not in self.standard and v is not None}
        return " ".join([super().formatMessage(record), *(f"{k}={v}" for k, v in extra.items())])


def before_request():
    g.started = time.perf_counter()
    inbound = request.headers.get("X-Request-ID", "")
    g.request_id = inbound if REQUEST_ID.fullmatch(inbound) else str(uuid.uuid4())
    g.stages = Stages()


def after_request(response):
    response.headers["X-Request-ID"] = g.request_id
    timings = g.stages.timings_ms
    if timings:
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in timings.items())
    extra = {"method": request.method, "path": request.path, "status": response.status_code,
             "duration_ms": round(1000 * (time.perf_counter() - g.started), 2)}
    if "error_code" in g:
        extra["error"] = g.error_code
    if timings:
        extra["timings_ms"] = timings
    probe = request.endpoint is not None and request.endpoint.startswith("health.") and response.status_code == 200
    log.log(logging.DEBUG if probe else logging.INFO, "request", extra=extra)
    return response


def register(app):
    app.before_request(before_request)
    app.after_request(after_request)
