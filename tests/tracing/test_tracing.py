"""Traces as a collector gets them from the service and its worker as their users run them."""
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from certificates import certificate
from conftest import ROOT, Service, encoded, photo
from hostile_server import HostileServer, ok
from job_workers import Jobs, Worker
from otlp_receiver import Caller, Receiver, children, only

from app.config import NAME, VERSION, Settings, SettingsError

CAT = encoded(photo("chelsea"))
STAGES = {"read", "queue", "decode", "preprocess", "inference"}
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(scope="module")
def receiver():
    one = Receiver()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def origin():
    """Where inputs are fetched from and callbacks go to."""
    one = HostileServer({"/cat.png?token=secret": ok(CAT), "/gone.png": b"HTTP/1.1 404 Not Found\r\n\r\n",
                         "/hook": b"HTTP/1.1 204 No Content\r\n\r\n"})
    yield one
    one.close()


@pytest.fixture(scope="module")
def bucket(s3_server):
    name = s3_server.bucket()
    requests.put(f"{s3_server.url}/{name}/cat.png", data=CAT, timeout=10).raise_for_status()
    return name


@pytest.fixture(scope="module")
def variables(tmp_path_factory, settings, app, receiver, origin, bucket, s3_server):
    return {"MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "MODEL_DIR": str(settings.model_dir), "WORKERS": "1",
            "JOBS": "on", "DATA_DIR": str(tmp_path_factory.mktemp("traced-data")),
            "INPUT_URLS": f"{origin.url}/,s3://{bucket}/", **s3_server.variables,
            "CALLBACK_URLS": origin.url + "/", "CALLBACK_SECRET": "a-secret-of-24-characters",
            "PRIVATE_NETWORKS": "127.0.0.0/8", "LONG_WORKERS": "0", ENDPOINT: receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}


@pytest.fixture(scope="module")
def traced(tmp_path_factory, variables):
    """A ready Service that is traced."""
    running = Service(tmp_path_factory.mktemp("traced"), variables)
    yield running.wait_ready()
    running.kill()


@pytest.fixture(scope="module")
def worker(tmp_path_factory, variables, traced):
    """A ready Worker for its jobs, traced under a name of its own."""
    running = Worker(tmp_path_factory.mktemp("traced-worker"), {
        **variables, "OTEL_SERVICE_NAME": "the-worker", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"})
    yield running.wait_ready()
    running.stop()


def ask(service, caller=None, path="/predict", method="POST", session=requests, **options):
    options.setdefault("files", {"file": ("cat.png", CAT)} if method == "POST" and "json" not in options else None)
    headers = {**(caller.headers if caller else {}), **options.pop("headers", {})}
    return session.request(method, service.url + path, headers=headers, timeout=60, **options)


def lines(log, request_id):
    """The JSON lines of a log about one request."""
    found = [json.loads(line) for line in log.splitlines() if request_id in line]
    return [line for line in found if line.get("request_id") == request_id]


def run(code, **variables):
    """A Python program, and what it prints; in its environment no other OTEL_* variables than these."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | variables, capture_output=True,
                          text=True, timeout=300, check=False)


# --- requests ---

def test_request_is_a_span_with_one_for_each_stage(traced, receiver):
    caller = Caller()
    answer = ask(traced, caller, headers={"tracestate": "vendor=value", "X-Request-ID": "my-id"})
    assert answer.status_code == 200, answer.text
    spans = receiver.trace(caller.trace_id, ["POST /predict"])
    request = only(spans, "POST /predict")
    assert (request.kind, request.parent, request.status, request.state) == (
        "SERVER", caller.span_id, "UNSET", "vendor=value")
    assert request.attributes == {
        "http.request.method": "POST", "http.route": "/predict", "url.path": "/predict", "url.scheme": "http",
        "http.response.status_code": 200, "server.address": "127.0.0.1", "server.port": traced.port,
        "request.id": "my-id", "model.name": "efficientnet_lite0"}
    assert (request.resource["service.name"], request.resource["service.version"]) == (NAME, VERSION)
    stages = children(spans, request)
    assert len(stages) == len(spans) - 1
    assert Counter(stage.name for stage in stages) == {**dict.fromkeys(STAGES, 1), "read": 2}  # received, parsed
    took = Counter()
    for stage in stages:
        assert stage.is_within(request), stage.name
        assert stage.kind == "INTERNAL"
        took[stage.name] += (stage.end - stage.start) / 1e6
    assert took == pytest.approx(answer.json()["metadata"]["timings_ms"], abs=0.02)
    inference = only(spans, "inference")
    assert all(stage.end <= inference.start for stage in stages if stage.name in ("decode", "preprocess", "queue"))


def test_request_without_a_caller_begins_a_trace_that_the_log_names(traced, receiver):
    answer = ask(traced)
    line, = lines(traced.log, answer.headers["X-Request-ID"])
    request = only(receiver.trace(line["trace_id"], ["POST /predict"]), "POST /predict")
    assert (request.parent, request.span_id) == ("", line["span_id"])


@pytest.mark.parametrize("value", [
    "", "00", "00-" + 32 * "0" + "-" + 16 * "1" + "-01", "ff-" + 32 * "1" + "-" + 16 * "1" + "-01", "é" * 500,
    "00-" + 32 * "G" + "-" + 16 * "1" + "-01", "00-1-1-1", 8000 * "0", "00-" + 32 * "1" + "-" + 16 * "1" + "-01,x"])
def test_a_header_that_is_no_traceparent_begins_a_new_trace(traced, value):
    answer = ask(traced, path="/", method="GET", headers={
        "traceparent": value.encode("latin-1"), "tracestate": b"\xff=,=,", "baggage": b"=;\xff,a==%zz"})
    assert answer.status_code == 200
    line, = lines(traced.log, answer.headers["X-Request-ID"])
    assert len(line["trace_id"]) == 32
    assert line["trace_id"] != 32 * "1"


@pytest.mark.parametrize(("options", "name", "status", "code", "stage"), [
    ({"files": {"file": ("a.txt", b"not a picture")}}, "POST /predict", 400, "INVALID_IMAGE", "decode"),
    ({"headers": {"X-Request-Timeout": "0.00001"}}, "POST /predict", 504, "DEADLINE_EXCEEDED", None),
    ({"path": "/models/none/predict"}, "POST /models/{name}/predict", 404, "NOT_FOUND", None),
    ({"path": "/nowhere", "method": "GET"}, "GET", 404, "NOT_FOUND", None),
    ({"path": "/predict", "method": "BREW"}, "HTTP", 405, "METHOD_NOT_ALLOWED", None)])
def test_errors_have_their_code_and_those_of_the_service_the_status(traced, receiver, options, name, status, code,
                                                                    stage):
    caller = Caller()
    answer = ask(traced, caller, **options)
    assert (answer.status_code, answer.json()["error"]) == (status, code)
    spans = receiver.trace(caller.trace_id, [name])
    request = only(spans, name)
    assert request.attributes["error.type"] == code
    assert request.attributes["http.response.status_code"] == status
    assert request.status == ("ERROR" if status >= 500 else "UNSET")
    assert ("http.route" in request.attributes) == (" " in name)
    if stage:
        failed = only(spans, stage)
        assert (failed.attributes, failed.status) == ({"error.type": code}, "UNSET")
    assert not any(span.sent.events for span in spans)  # which would quote what the client sent


def test_probes_and_metrics_have_no_spans(traced, receiver):
    caller = Caller()
    for path in ("/health", "/ready", "/live", "/metrics", "/v2/health/live", "/v2/health/ready"):
        assert ask(traced, caller, path, "GET").status_code == 200
    assert ask(traced, caller, "/info", "GET").status_code == 200
    assert [span.name for span in receiver.trace(caller.trace_id, ["GET /info"])] == ["GET /info"]


def test_each_file_of_a_batch_has_a_span_with_its_stages(traced, receiver):
    caller = Caller()
    files = [("files", ("a.png", CAT)), ("files", ("b.txt", b"not a picture")), ("files", ("c.png", CAT))]
    assert ask(traced, caller, "/predict/batch", files=files).json()["failed"] == 1
    spans = receiver.trace(caller.trace_id, ["POST /predict/batch"])
    request = only(spans, "POST /predict/batch")
    of_files = sorted((span for span in children(spans, request) if span.name == "file"),
                      key=lambda span: span.attributes["file.index"])
    assert [one.attributes for one in of_files] == [
        {"file.index": 0}, {"file.index": 1, "error.type": "INVALID_IMAGE"}, {"file.index": 2}]
    for one in of_files:
        stages = children(spans, one)
        assert {stage.name for stage in stages} == ({"read", "queue", "decode"} if "error.type" in one.attributes
                                                    else STAGES)
        assert one.is_within(request)
        assert all(stage.is_within(one) for stage in stages)
    assert "files" in {span.name for span in children(spans, request)}


def test_drawing_maps_is_a_stage(traced, receiver):
    caller = Caller()
    answer = ask(traced, caller, data={"explain": "true"})
    assert "explain;dur=" in answer.headers["Server-Timing"]
    spans = receiver.trace(caller.trace_id, ["POST /predict"])
    assert only(spans, "explain") in children(spans, only(spans, "POST /predict"))


def test_a_stage_that_fails_in_a_frame_is_marked():
    """A class as the collector would see it: a frame's failed inference among others."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from app.errors import DeadlineExceeded
    from app.tasks.videos import Overlapping
    from app.tracing import spans
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    before, spans.tracer = spans.tracer, provider.get_tracer("test")
    try:
        with spans.span("request"):
            stages = Overlapping(spans.Stages())
            with stages("inference"), contextlib.suppress(DeadlineExceeded), stages("inference"):
                raise DeadlineExceeded("inference")
            with stages("inference"):
                pass
    finally:
        spans.tracer = before
    first, second, _ = kept.get_finished_spans()
    assert (first.attributes["error.type"], first.status.is_ok) == ("DEADLINE_EXCEEDED", False)
    assert "error.type" not in second.attributes


def test_a_refusal_of_the_worker_is_a_span(start_service, receiver):
    service = start_service(WORKERS="1", MODEL_NAME="tests.own_tasks:Long", MAX_QUEUE="0",
                            OTEL_BSP_SCHEDULE_DELAY="50", **{ENDPOINT: receiver.url}).wait_ready()
    refused = threading.Event()

    def press():
        while not refused.is_set():
            requests.post(service.url + "/predict", json={"text": "a"}, timeout=60)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(press)
        caller, until = Caller(), time.monotonic() + 120
        try:
            while (answer := ask(service, caller, json={"text": "a"})).status_code != 503 and time.monotonic() < until:
                caller = Caller()
        finally:
            refused.set()
    assert answer.status_code == 503
    span = only(receiver.trace(caller.trace_id, ["POST /predict"]), "POST /predict")
    assert (span.kind, span.status, span.parent) == ("SERVER", "ERROR", caller.span_id)
    assert span.attributes == {
        "http.request.method": "POST", "http.route": "/predict", "url.path": "/predict", "url.scheme": "http",
        "http.response.status_code": 503, "server.address": "127.0.0.1", "server.port": service.port,
        "request.id": answer.headers["X-Request-ID"], "error.type": "OVERLOADED"}
    line, = lines(service.log, answer.headers["X-Request-ID"])
    assert (line["trace_id"], line["span_id"]) == (caller.trace_id, span.span_id)


def test_a_stream_is_a_span_until_its_end(traced, receiver):
    caller = Caller()
    files = [("files", ("a.png", CAT)), ("files", ("c.png", CAT))]
    assert "event: end" in ask(traced, caller, "/predict?stream=true", files=files).text
    spans = receiver.trace(caller.trace_id, ["POST /predict"])
    request = only(spans, "POST /predict")
    assert all(span.is_within(request) for span in spans if span is not request)
    of_files = [span for span in children(spans, request) if span.name == "file"]
    assert sorted(span.attributes["file.index"] for span in of_files) == [0, 1]


def test_requests_of_one_connection_do_not_mix(traced, receiver):
    callers = [Caller(), None, Caller(), Caller("00"), None]
    with requests.Session() as session:
        ids = [ask(traced, caller, session=session).headers["X-Request-ID"] for caller in callers]
        untraced = ask(traced, None, "/metrics", "GET", session).headers["X-Request-ID"]
    assert "trace_id" not in lines(traced.log, untraced)[0]
    logged = [lines(traced.log, request_id)[0]["trace_id"] for request_id in ids]
    assert len(set(logged)) == len(callers)
    for caller, trace_id in zip(callers, logged, strict=True):
        assert caller is None or trace_id == caller.trace_id
        if caller and caller.headers["traceparent"].endswith("01"):
            assert Counter(span.name for span in receiver.trace(trace_id, ["POST /predict"]))["inference"] == 1
    for trace_id in (logged[1], logged[4]):
        assert only(receiver.trace(trace_id, ["POST /predict"]), "POST /predict").parent == ""
    assert receiver.trace(callers[3].trace_id) == []  # its caller does not sample it


def test_requests_at_the_same_time_do_not_mix(traced, receiver):
    callers = [Caller() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda caller: ask(traced, caller), callers))
    assert {answer.status_code for answer in answers} == {200}
    for caller, answer in zip(callers, answers, strict=True):
        spans = receiver.trace(caller.trace_id, ["POST /predict"])
        request = only(spans, "POST /predict")
        assert request.attributes["request.id"] == answer.headers["X-Request-ID"]
        assert {span.parent for span in spans} == {caller.span_id, request.span_id}
        assert all(stage.is_within(request) for stage in children(spans, request))
        took = Counter()
        for stage in children(spans, request):
            took[stage.name] += (stage.end - stage.start) / 1e6
        assert took == pytest.approx(answer.json()["metadata"]["timings_ms"], abs=0.02)
        line, = lines(traced.log, answer.headers["X-Request-ID"])
        assert (line["trace_id"], line["span_id"]) == (caller.trace_id, request.span_id)


# --- to others ---

def headers_of(sent):
    """{name in lower case: value} of a request that a HostileServer got."""
    return dict((name.lower(), value.strip()) for name, _, value in (
        line.partition(":") for line in sent.split(b"\r\n\r\n")[0].decode().split("\r\n")[1:]))


def test_inputs_are_fetched_within_the_trace(traced, receiver, origin):
    caller = Caller()
    answer = ask(traced, caller, json={"url": origin.url + "/cat.png?token=secret"}, headers={
        "tracestate": "vendor=value", "baggage": "user=ann"})
    assert answer.status_code == 200, answer.text
    spans = receiver.trace(caller.trace_id, ["POST /predict"])
    request, fetch = only(spans, "POST /predict"), only(spans, "GET")
    headers = headers_of(origin.requests[-1])
    assert headers["traceparent"] == f"00-{caller.trace_id}-{fetch.span_id}-01"
    assert (headers["tracestate"], headers["baggage"]) == ("vendor=value", "user=ann")
    assert fetch.kind == "CLIENT"
    assert fetch.attributes == {
        "http.request.method": "GET", "url.full": origin.url + "/cat.png", "server.address": "127.0.0.1",
        "server.port": origin.port, "http.response.status_code": 200}
    assert fetch.parent == request.span_id
    assert fetch.is_within(request)
    assert not any("secret" in str(span.sent) for span in spans)


def test_requests_to_s3_have_spans(traced, receiver, bucket):
    for key, status, error in (("cat.png", 200, {}), ("none.png", 422, {"error.type": "FileNotFoundError"})):
        caller = Caller()
        assert ask(traced, caller, json={"url": f"s3://{bucket}/{key}"}).status_code == status
        spans = receiver.trace(caller.trace_id, ["POST /predict", "S3/GetObject"])
        span = only(spans, "S3/GetObject")
        assert (span.kind, span.parent) == ("CLIENT", only(spans, "POST /predict").span_id)
        assert span.attributes == {"rpc.system": "aws-api", "rpc.service": "S3", "rpc.method": "GetObject",
                                   "aws.s3.bucket": bucket, "aws.s3.key": key, **error}


def test_a_failed_fetch_is_an_error(traced, receiver, origin):
    caller = Caller()
    assert ask(traced, caller, json={"url": origin.url + "/gone.png"}).status_code == 422
    fetch = only(receiver.trace(caller.trace_id, ["POST /predict", "GET"]), "GET")
    assert (fetch.status, fetch.attributes["error.type"]) == ("ERROR", "404")


def test_trace_goes_through_a_job_to_its_callback(traced, worker, receiver, origin):
    caller = Caller()
    origin.requests.clear()
    answer = ask(traced, caller, "/jobs", data={"callback_url": origin.url + "/hook"}, headers={"baggage": "user=ann"})
    assert answer.status_code == 202, answer.text
    spans = receiver.trace(caller.trace_id, ["POST /jobs", "job", "POST"])
    request, job, callback = (only(spans, name) for name in ("POST /jobs", "job", "POST"))
    assert (request.parent, job.parent, callback.parent) == (caller.span_id, request.span_id, job.span_id)
    assert (job.kind, callback.kind) == ("CONSUMER", "CLIENT")
    assert {span.name for span in children(spans, request)} == {"read", "store", "job"}
    stages = [span for span in children(spans, job) if span is not callback]
    assert {stage.name for stage in stages} == STAGES
    assert all(stage.is_within(job) for stage in stages)
    assert job.attributes == {
        "job.id": answer.json()["id"], "job.queue": "short", "job.attempt": 1, "job.state": "succeeded",
        "model.name": "efficientnet_lite0", "request.id": answer.headers["X-Request-ID"]}
    assert (job.resource["service.name"], job.resource["deployment.environment.name"]) == ("the-worker", "test")
    assert callback.attributes["http.response.status_code"] == 204
    headers = headers_of(origin.requests[-1])
    assert headers["traceparent"] == f"00-{caller.trace_id}-{callback.span_id}-01"
    assert headers["baggage"] == "user=ann"
    line, = [line for line in lines(worker.log, answer.headers["X-Request-ID"]) if line["message"] == "job"]
    assert (line["trace_id"], line["span_id"]) == (caller.trace_id, job.span_id)


def test_files_of_a_job_have_spans(traced, worker, receiver):
    caller = Caller()
    files = [("files", ("a.png", CAT)), ("files", ("b.txt", b"not a picture"))]
    job_id = ask(traced, caller, "/jobs", files=files).json()["id"]
    assert Jobs(traced).wait(job_id)["result"]["failed"] == 1
    spans = receiver.trace(caller.trace_id, ["job"])
    job, of_files = only(spans, "job"), [span for span in spans if span.name == "file"]
    assert {one.parent for one in of_files} == {job.span_id}
    assert {one.attributes["file.index"]: one.attributes.get("error.type") for one in of_files} == {
        0: None, 1: "INVALID_IMAGE"}
    assert {stage.name for one in of_files for stage in children(spans, one)} == STAGES


def test_a_job_that_fails_is_an_error(traced, worker, receiver):
    caller = Caller()
    Jobs(traced).wait(ask(traced, caller, "/jobs", files={"file": ("a.txt", b"not a picture")}).json()["id"])
    job = only(receiver.trace(caller.trace_id, ["job"]), "job")
    assert (job.status, job.attributes["job.state"], job.attributes["error.type"]) == (
        "ERROR", "failed", "INVALID_IMAGE")


# --- collectors ---

@pytest.mark.parametrize("trouble", ["refuses", "hangs", "is away"])
def test_a_troubled_collector_costs_spans_and_nothing_else(traced, receiver, trouble):
    if trouble == "is away":
        receiver.stop()
    receiver.answer, receiver.asked = None if trouble == "hangs" else 500, 0
    try:
        callers = [Caller() for _ in range(10)]
        assert {ask(traced, caller).status_code for caller in callers} == {200}
        until = time.monotonic() + 120
        while trouble != "is away" and not receiver.asked and time.monotonic() < until:
            time.sleep(0.02)
        assert trouble == "is away" or receiver.asked
    finally:
        receiver.answer = 200
        if trouble == "is away":
            receiver.released.clear()
            receiver.start()
        receiver.released.set()
    caller = Caller()
    assert ask(traced, caller).status_code == 200
    receiver.trace(caller.trace_id, ["POST /predict"])  # it comes back by itself
    receiver.released.clear()
    assert 1 <= traced.log.count("tracing: ") <= 3  # for the three troubles of this test


def test_a_worker_that_replaces_another_is_traced(traced, receiver):
    before, = traced.workers()
    os.kill(before, signal.SIGKILL)
    traced.wait_ready()
    caller, until = Caller(), time.monotonic() + 120
    while time.monotonic() < until:
        with contextlib.suppress(requests.ConnectionError):  # one that the old one had accepted
            if traced.workers() != [before] and ask(traced, caller).status_code == 200:
                break
    receiver.trace(caller.trace_id, ["POST /predict"])


def test_what_is_not_sampled_is_only_logged_and_what_waits_is_sent_at_the_end(start_service, receiver):
    service = start_service(WORKERS="1", API_KEYS="a-key", LOG_FORMAT="text", OTEL_TRACES_EXPORTER="otlp",
                            OTEL_TRACES_SAMPLER="parentbased_always_off", OTEL_BSP_SCHEDULE_DELAY="60000",
                            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=receiver.url + "/v1/traces",
                            OTEL_EXPORTER_OTLP_COMPRESSION="gzip").wait_ready()
    unsampled, sampled, refused = Caller("00"), Caller(), Caller()
    for caller in (None, unsampled, sampled):
        assert ask(service, caller, headers={"X-API-Key": "a-key"}).status_code == 200
    assert ask(service, refused).status_code == 401
    assert service.stop() == 0
    assert {span.name for span in receiver.trace(sampled.trace_id, ["POST /predict"])} == {"POST /predict", *STAGES}
    assert only(receiver.trace(refused.trace_id, ["POST /predict"]), "POST /predict").attributes["error.type"] == \
        "UNAUTHORIZED"
    assert receiver.trace(unsampled.trace_id) == []
    found = [line for line in service.log.splitlines() if "path=/predict" in line]
    assert len(found) == 4
    assert all(" trace_id=" in line and " span_id=" in line for line in found)
    assert f"trace_id={unsampled.trace_id}" in found[1]


def test_a_process_ends_although_its_collector_hangs(receiver):
    receiver.answer = None
    try:
        done = run("import os\nfrom app import tracing\nspans, export = tracing.start()\n"
                   "with spans.span('last'): pass\nwith export.stopping(0.2): pass\n"
                   "print('ended', flush=True)\nos._exit(0)", **{ENDPOINT: receiver.url})
    finally:
        receiver.released.set()
        receiver.answer = 200
    assert (done.returncode, done.stdout) == (0, "ended\n")
    assert "the last spans could not be sent" in done.stderr
    receiver.released.clear()


def test_an_answer_without_an_end_is_not_read():
    endless = HostileServer({"/v1/traces": lambda connection, closed: (connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n{"), closed.wait(60))})
    done = run("from app import tracing\nspans, export = tracing.start()\nwith spans.span('one'): pass\n"
               "with export.stopping(30): print('sending')", **{ENDPOINT: endless.url})
    endless.close()
    assert (done.returncode, done.stderr, len(endless.requests)) == (0, "", 1)


@pytest.mark.parametrize("trusted", ["the collector's", "another"])
def test_tls_with_a_certificate_of_its_own(tmp_path, trusted):
    """Also where a variable of another library names other certificates."""
    own, other = certificate(tmp_path / "own.pem"), certificate(tmp_path / "other.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    collector = HostileServer({"/v1/traces": ok(b"")}, tls=context)
    chosen, of_requests = (own, other) if trusted == "the collector's" else (other, own)
    done = run("from app import tracing\nspans, export = tracing.start()\nwith spans.span('one'): pass\n"
               "with export.stopping(30): pass", **{ENDPOINT: collector.url, "REQUESTS_CA_BUNDLE": str(of_requests),
                                                   "OTEL_EXPORTER_OTLP_CERTIFICATE": str(chosen)})
    collector.close()
    if trusted == "the collector's":
        assert (done.stderr, len(collector.requests)) == ("", 1)
    else:
        assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
        assert (done.stderr.count("\n"), collector.requests) == (1, [])


def test_console():
    done = run("from app import tracing\nspans, export = tracing.start()\nwith spans.span('shown'): pass\n"
               "with export.stopping(): pass", OTEL_TRACES_EXPORTER="console")
    assert json.loads(done.stdout)["name"] == "shown"


# --- settings ---

@pytest.mark.parametrize(("variables", "is_on"), [
    ({}, False), ({"OTEL_SERVICE_NAME": "a"}, False), ({ENDPOINT: ""}, False),
    ({"OTEL_TRACES_EXPORTER": "none"}, False), ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
    ({"OTEL_TRACES_EXPORTER": "console, otlp"}, True), ({ENDPOINT: "http://collector:4318"}, True),
    ({ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "True"}, False),
    ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
    ({ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ({ENDPOINT: "http://collector:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
      "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, True)])
def test_otel_variables_alone_switch_it_on(variables, is_on, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    optional = Settings.parse(variables).optional
    assert (optional is not None and optional.tracing) == is_on


@pytest.mark.parametrize(("variables", "message"), [
    ({ENDPOINT: "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
     "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, got 'grpc'"),
    ({ENDPOINT: "http://c:4317", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
     "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL must be http/protobuf, got 'http/json'"),
    ({"OTEL_TRACES_EXPORTER": "zipkin"},
     "OTEL_TRACES_EXPORTER must be otlp, console, none or the name of an exporter that is installed, got 'zipkin'"),
    ({"OTEL_TRACES_EXPORTER": "console,otlp_proto_grpc"},
     "OTEL_TRACES_EXPORTER must be otlp, console, none or the name of an exporter that is installed, got "
     "'otlp_proto_grpc'")])
def test_what_cannot_be_exported_is_refused_in_one_line(variables, message):
    with pytest.raises(SettingsError) as e:
        Settings.parse(variables)
    assert str(e.value) == message


def test_without_the_packages_their_installation_is_named():
    done = run("import sys; sys.modules['opentelemetry'] = None\nfrom app.config import Settings, SettingsError\n"
               "try: Settings.parse({'OTEL_TRACES_EXPORTER': 'otlp'})\nexcept SettingsError as e: print(e)")
    assert done.stdout == ("the OTEL_* variables switch tracing on, which needs further packages: pip install -r "
                           "app/tracing/requirements.txt\n"), done.stderr


@pytest.mark.parametrize("variables", [{"OTEL_PROPAGATORS": "nonsense"}, {"OTEL_BSP_MAX_QUEUE_SIZE": "1"},
                                       {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "many"}])
def test_what_the_sdk_refuses_is_said_in_one_line(variables):
    done = run("from app import tracing\nfrom app.config import StartError\n"
               "try: tracing.start()\nexcept StartError as e: print(e)", OTEL_TRACES_EXPORTER="otlp", **variables)
    assert done.stdout.startswith("tracing cannot start with these OTEL_* variables: ValueError: "), done.stderr
    assert done.stdout.count("\n") == 1


def test_variables_of_the_file_reach_the_sdk(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text(f"{ENDPOINT}=http://of.the.file:4318\nOTEL_SERVICE_NAME=of the file\n")
    monkeypatch.setattr(os, "environ", {"OTEL_SERVICE_NAME": "of the environment"})
    assert Settings.load(tmp_path / ".env").optional.tracing
    assert os.environ == {"OTEL_SERVICE_NAME": "of the environment", ENDPOINT: "http://of.the.file:4318"}
