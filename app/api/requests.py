"""Each request's ID, stage timings, counters and log line."""
import logging
import time

from flask import g, request

from app.server import counters, logs

log = logging.getLogger("app.request")


def register(app):
    app.before_request(before_request)
    app.after_request(after_request)
    app.teardown_request(teardown_request)


def before_request():
    g.started = time.perf_counter()
    g.request_id = logs.id_for(request.headers.get("X-Request-ID"))
    logs.request_id.set(g.request_id)
    g.stages = counters.Stages()
    g.in_progress = True
    counters.change("requests_in_progress", 1)


def after_request(response):
    timings = dict(g.stages.timings_ms)  # a call that runs past its deadline may still add to them
    response.headers["X-Request-ID"] = g.request_id
    response.headers["X-Content-Type-Options"] = "nosniff"  # an uploader's text in a JSON answer never becomes a page
    if timings:
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in timings.items())
    if "is_stream" not in g:  # whose end is later
        size = response.content_length or response.calculate_content_length()
        ended(response.status_code, 0 if request.method == "HEAD" else size)
    return response


def ended(status, bytes_out):
    """Count and log the current request, once. bytes_out: of the response's body."""
    endpoint = request.url_rule.rule if request.url_rule else "none"
    seconds, error = time.perf_counter() - g.started, g.get("error_code", "")
    timings, model = dict(g.stages.timings_ms), g.get("model")
    g.stages.count()
    counters.count_answer(endpoint, request.method, status, error)
    counters.observe("request_duration_seconds", seconds, endpoint)
    if model:
        counters.count("model_requests", model.name, model.version or "", str(status), error)
        counters.observe("model_duration_seconds", seconds, model.name, model.version or "")
    extra = {"method": request.method, "path": request.path, "status": status,
             "duration_ms": round(1000 * seconds, 2), "client": request.remote_addr,
             "bytes_in": request.headers.get("Content-Length", 0, int), "bytes_out": bytes_out,
             **({"model": model.label} if model else {}),
             **({"error": error} if error else {}), **({"timings_ms": timings} if timings else {})}
    probe = request.blueprint in ("health", "v2_health") and status == 200
    log.log(logging.DEBUG if probe else logging.INFO, "request", extra=extra)


def teardown_request(_):
    if g.pop("in_progress", False):
        counters.change("requests_in_progress", -1)
