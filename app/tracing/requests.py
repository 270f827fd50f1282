"""A span for each request, from its headers to its answer.

What the worker refuses before the application sees it (a full queue, invalid HTTP) has none.
"""
import re
from urllib.parse import urlsplit

from flask import g, request, request_finished, request_started, request_tearing_down
from opentelemetry import context, propagate, trace
from opentelemetry.trace import SpanKind

from app.server.counters import METHODS
from app.tracing import export, spans
from app.tracing.spans import mark

UNTRACED = "metrics"  # and probes that succeed
PROBES = ("health", "v2_health")


def register(app):
    request_started.connect(begin, app)
    app.before_request(trace_stages)
    request_finished.connect(describe, app)
    request_tearing_down.connect(end, app)
    app.extensions["traced_file"] = spans.traced_file
    before = app.extensions["at_exit"]

    def at_exit():
        with export.stopping():
            before()
    app.extensions["at_exit"] = at_exit


def begin(_, **__):
    if request.blueprint == UNTRACED:
        return
    about, method = {"url.path": request.path, "url.scheme": request.scheme}, request.method
    if method in METHODS:
        about["http.request.method"] = method
    else:
        about |= {"http.request.method": "_OTHER", "http.request.method_original": method}
        method = "HTTP"
    route = request.url_rule and re.sub(r"<(?:[^<>:]*:)?([^<>]*)>", r"{\1}", request.url_rule.rule)
    about |= {"http.route": route} if route else {}
    g.context_before, parent = context.get_current(), propagate.extract(request.headers, context.Context())
    g.span = spans.tracer.start_span(f"{method} {route}" if route else method, parent, SpanKind.SERVER,
                                     about | server())
    context.attach(trace.set_span_in_context(g.span, parent))


def server():
    """The address and port at which the client reached the service."""
    try:
        parts = urlsplit(f"//{request.host}")
        return {"server.address": parts.hostname, "server.port": parts.port or {"https": 443}.get(request.scheme, 80)} \
            if parts.hostname else {}
    except ValueError:
        return {}


def trace_stages():
    if "span" in g:
        g.stages = spans.Stages()


def describe(_, response, **__):
    span, error, model = g.get("span"), g.get("error_code"), g.get("model")
    if span is None:
        return
    g.is_probe = request.blueprint in PROBES and response.status_code == 200
    span.set_attributes({"http.response.status_code": response.status_code, "request.id": g.request_id,
                         **({"model.name": model.name} if model else {}),
                         **({"model.version": model.version} if model and model.version else {})})
    if error or response.status_code >= 500:
        mark(span, error or str(response.status_code), response.status_code >= 500)


def end(_, exc=None, **__):
    status = g.get("stream_status")  # once all events are sent, when there is another teardown
    if "is_stream" in g and status is None:
        return
    span = g.pop("span", None)
    if span is None:
        return
    if exc is not None:  # the client is gone, or its time is over
        mark(span, type(exc).__name__, True)
    elif status and g.get("error_code"):
        mark(span, g.error_code, status >= 500)
    if not g.get("is_probe"):  # a span that does not end is never sent
        span.end()
    context.attach(g.pop("context_before"))
