"""Spans: of requests and jobs, of their stages and files, and of what they ask others."""
import contextlib
import json
import time
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import context, propagate, trace
from opentelemetry.trace import SpanKind, StatusCode

from app.config import NAME, VERSION
from app.errors import ServiceError
from app.server import counters

tracer = trace.get_tracer(NAME, VERSION)


def fault_of(error):
    """(error.type, whether it is the service's fault) of an exception."""
    if isinstance(error, ServiceError):
        return error.code, error.status >= 500
    status = getattr(error, "code", None)  # of an HTTPException
    return type(error).__name__, not (isinstance(status, int) and status < 500)


def mark(span, error_type, is_fault):
    """Set a span's error, if it has none."""
    if "error.type" in (getattr(span, "attributes", None) or ()):
        return
    span.set_attribute("error.type", error_type)
    if is_fault:
        span.set_status(StatusCode.ERROR)


class Stages(counters.Stages):
    """Those of the current span, which gets a child for each stage."""

    def __init__(self):
        super().__init__()
        self.context, self.is_recording = context.get_current(), trace.get_current_span().is_recording()

    @contextlib.contextmanager
    def __call__(self, stage):
        started, error = time.perf_counter(), None
        try:
            yield
        except BaseException as e:
            error = e
            raise
        finally:
            self.add(stage, time.perf_counter() - started, error)
            del error  # or its traceback would hold this frame

    def add(self, stage, seconds, error=None):
        """The stage ends now, with this exception if it has failed. From any thread."""
        super().add(stage, seconds)
        if not self.is_recording:
            return
        end = time.time_ns()
        span = tracer.start_span(stage, self.context, start_time=end - round(1e9 * seconds))
        if error is not None:
            mark(span, *fault_of(error))
        span.end(end)


def traced_file(position, call):
    """call() in the span of one file of a batch; it returns the file's result, or its ServiceError."""
    with span("file", attributes={"file.index": position}) as of_file:
        result = call()
        if isinstance(result, ServiceError):
            mark(of_file, *fault_of(result))
        return result


@contextlib.contextmanager
def span(name, **options):
    """A span around the block. An exception is its error, without the message, which may quote what a client sent."""
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False, **options) as one:
        try:
            yield one
        except BaseException as e:
            mark(one, *fault_of(e))
            raise


# --- across processes ---

def carrier():
    """The current span for another process, as JSON text; None if there is nothing to continue."""
    headers = {}
    propagate.inject(headers)
    return json.dumps(headers) if headers else None


def continue_here(text):
    """Make what a carrier's text describes the current span. Returns a token for context.detach, which an asyncio task
    does not need."""
    return context.attach(propagate.extract(json.loads(text) if text else {}, context.Context()))


@contextlib.contextmanager
def job(row):
    """Around an attempt at a job. row: of schema.jobs."""
    about = {"job.id": row["id"], "job.queue": row["queue"], "job.attempt": row["attempt"], "model.name": row["model"],
             **({"model.version": row["version"]} if row["version"] else {}), "request.id": row["request_id"]}
    token = continue_here(row["trace_json"])
    try:
        with span("job", kind=SpanKind.CONSUMER, attributes=about) as one:
            yield one
    finally:
        context.detach(token)


def ended(of_job, state, error):
    """error: as job objects have it, or None."""
    of_job.set_attribute("job.state", state)
    if error:
        mark(of_job, error["error"], True)


@contextlib.asynccontextmanager
async def outgoing(method, target, headers, send):
    """Around an HTTP request to an addresses.Target, by send(headers), a context manager around its answer."""
    parts = urlsplit(target.url)
    about = {"http.request.method": method, "server.address": target.host, "server.port": target.port,
             "url.full": urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))}  # a query may hold a secret
    with span(method, kind=SpanKind.CLIENT, attributes=about) as one:
        headers = dict(headers)
        propagate.inject(headers)
        async with send(headers) as answer:
            one.set_attribute("http.response.status_code", answer.status)
            if answer.status >= 400:
                mark(one, str(answer.status), True)
            yield answer


def s3(method, bucket, key):
    """Around a request to S3, as OpenTelemetry's conventions describe it. method: such as GetObject; key: or None."""
    about = {"rpc.system": "aws-api", "rpc.service": "S3", "rpc.method": method, "aws.s3.bucket": bucket,
             **({"aws.s3.key": key} if key else {})}
    return span(f"S3/{method}", kind=SpanKind.CLIENT, attributes=about)
