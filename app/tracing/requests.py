"""A span for each request, from its headers to its answer, also of predictions that the worker refuses as the queue is
full; not of invalid HTTP.
"""
import contextlib
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
    app.extensions["traced_file"], app.extensions["traced_refusal"] = spans.traced_file, refused
    before = app.extensions["at_exit"]

    def at_exit():
        with export.stopping():
            before()
    app.extensions["at_exit"] = at_exit


def begin(_, **__):
    if request.blueprint == UNTRACED:
        return
    g.context_before, parent = context.get_current(), propagate.extract(request.headers, context.Context())
    rule = request.url_rule and request.url_rule.rule
    g.span = of_request(parent, request.method, request.path, rule, request.scheme, request.host)
    context.attach(trace.set_span_in_context(g.span, parent))


def of_request(parent, method, path, rule, scheme, host):
    """A new span. parent: its Context; rule: of Flask's routes, or None; host: at which the client reached the service.
    """
    about = {"url.path": path, "url.scheme": scheme}
    if method in METHODS:
        about["http.request.method"] = method
    else:
        about |= {"http.request.method": "_OTHER", "http.request.method_original": method}
        method = "HTTP"
    route = rule and re.sub(r"<(?:[^<>:]*:)?([^<>]*)>", r"{\1}", rule)
    about |= {"http.route": route} if route else {}
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{host}")
        if parts.hostname:
            about |= {"server.address": parts.hostname, "server.port": parts.port or {"https": 443}.get(scheme, 80)}
    return spans.tracer.start_span(f"{method} {route}" if route else method, parent, SpanKind.SERVER, about)


@contextlib.contextmanager
def refused(req, headers, rule, error, request_id):
    """Around what is logged of a request that refusals.overloaded answers with this ServiceError."""
    parent = propagate.extract({name.lower(): value for name, value in headers.items()}, context.Context())
    span = of_request(parent, req.method, req.path, rule, req.scheme, headers.get("HOST", ""))
    span.set_attributes({"http.response.status_code": error.status, "request.id": request_id})
    mark(span, error.code, True)
    token = context.attach(trace.set_span_in_context(span, parent))
    try:
        yield
    finally:
        context.detach(token)
        span.end()


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
