"""A collector of traces: takes OTLP over HTTP and keeps what arrives."""
import gzip
import secrets
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from servers import free_port


@dataclass
class Span:
    """start, end: Unix nanoseconds; parent: a span's ID, or ""; kind: SERVER, INTERNAL, …; status: UNSET, OK, ERROR."""
    name: str
    trace_id: str
    span_id: str
    parent: str
    kind: str
    status: str
    start: int
    end: int
    attributes: dict
    resource: dict
    state: str
    sent: Sent

    def is_within(self, other):
        return other.start <= self.start <= self.end <= other.end


class Receiver:
    """answer: the status that it answers with, or None: it never answers."""

    def __init__(self):
        self.spans, self.answer, self.asked, self.released = [], 200, 0, threading.Event()
        self.port, self.server = free_port(), None  # which it has again after a stop
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.asked += 1
                if receiver.answer is None:
                    receiver.released.wait(60)
                    return
                if receiver.answer == 200:
                    assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
                    receiver.take(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(receiver.answer)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def take(self, body):
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes(of_resource.resource)
            for scope in of_resource.scope_spans:
                self.spans += [Span(
                    one.name, one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(),
                    Sent.SpanKind.Name(one.kind).removeprefix("SPAN_KIND_"),
                    Status.StatusCode.Name(one.status.code).removeprefix("STATUS_CODE_"), one.start_time_unix_nano,
                    one.end_time_unix_nano, attributes(one), resource, one.trace_state, one) for one in scope.spans]

    def trace(self, trace_id, names=(), timeout_s=120):
        """Its spans, once there is one of each of these names."""
        until = time.monotonic() + timeout_s
        while True:
            found = [span for span in list(self.spans) if span.trace_id == trace_id]
            if set(names) <= {span.name for span in found}:
                return found
            assert time.monotonic() < until, f"there are {[span.name for span in found]}, not all of {names}"
            time.sleep(0.02)


def attributes(message):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in message.attributes}


def only(spans, name):
    """The one span of this name."""
    found, = [span for span in spans if span.name == name]
    return found


def children(spans, parent):
    return [span for span in spans if span.parent == parent.span_id]


class Caller:
    """The span of a client: its IDs, and the header that tells them."""

    def __init__(self, flags="01"):
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{flags}"}
