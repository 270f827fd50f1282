"""Where spans go: through the SDK's bounded queue and its native thread to the exporters that the OTEL_* variables ask
for. A collector that is away, slow or refuses costs spans, and a line in the log now and then."""
import contextlib
import importlib.metadata
import logging
import os
import threading
import time

import requests
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from app.config import NAME, VERSION
from app.optional_settings import trace_exporters

LOG_EVERY_S = 60
FLUSH_WITHIN_S = 2
MOST_MESSAGE = 300  # characters

log = logging.getLogger(__name__)


def start():
    provider = TracerProvider(resource=resource(), shutdown_on_exit=False)  # which would wait for 30 s
    for name in trace_exporters(os.environ):
        provider.add_span_processor(BatchSpanProcessor(exporter(name)))
    trace.set_tracer_provider(provider)  # the global one: a model of one's own may add spans
    own = logging.getLogger("opentelemetry")
    own.handlers, own.propagate = [Seldom()], False
    for handler in logging.getLogger().handlers:
        handler.addFilter(add_ids)


def resource():
    found = Resource.create()  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    if found.attributes["service.name"].startswith("unknown_service"):
        found = found.merge(Resource({"service.name": NAME}))
    return found if "service.version" in found.attributes else found.merge(Resource({"service.version": VERSION}))


def exporter(name):
    """A new exporter by the name under which its package registers it."""
    if name == "otlp_proto_http":
        return OTLPSpanExporter(session=session())
    entry, = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    return entry.load()()


class Session(requests.Session):
    def merge_environment_settings(self, url, proxies, stream, verify, cert):
        """OTEL_EXPORTER_OTLP_CERTIFICATE, which is in self.verify, goes before REQUESTS_CA_BUNDLE."""
        return super().merge_environment_settings(url, proxies, stream, self.verify if verify is None else verify, cert)


def session():
    """Takes from an answer its status and headers alone: a collector's body could be endless, in time or in bytes."""
    made = Session()
    made.stream = True
    made.hooks["response"].append(lambda response, *_, **__: response.close())
    return made


@contextlib.contextmanager
def stopping(within_s=FLUSH_WITHIN_S):
    """Send what waits while the block runs, and for at most this long. Raises nothing."""
    until = time.monotonic() + within_s
    thread = threading.Thread(target=trace.get_tracer_provider().shutdown, name="end-tracing", daemon=True)
    with contextlib.suppress(RuntimeError):  # there is no memory for a thread
        thread.start()
    yield
    if thread.is_alive():
        thread.join(max(0.0, until - time.monotonic()))
    if thread.is_alive():
        log.warning("tracing: the last spans could not be sent before the end")


def add_ids(record):
    """A filter of log records: trace_id and span_id of what is being done."""
    found = trace.get_current_span().get_span_context()
    if found.is_valid:
        record.trace_id, record.span_id = trace.format_trace_id(found.trace_id), trace.format_span_id(found.span_id)
    return True


class Seldom(logging.Handler):
    """Logs what the SDK has to say in lines of the service's own, one each LOG_EVERY_S."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.log_at, self.left_out = -LOG_EVERY_S, 0

    def emit(self, record):
        if time.monotonic() < self.log_at + LOG_EVERY_S:
            self.left_out += 1
            return
        more = {"left_out": self.left_out} if self.left_out else {}
        self.log_at, self.left_out = time.monotonic(), 0
        message = (record.getMessage().splitlines() or [""])[0]
        if record.exc_info and record.exc_info[1]:
            message += f" {record.exc_info[1]!r}"
        log.warning("tracing: %s", message[:MOST_MESSAGE], extra=more)
