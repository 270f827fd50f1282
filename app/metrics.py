"""GET /metrics for Prometheus: what is measured, and its sum over all workers, those that died too.

The counts live in counts.py; prometheus-client writes them out. Names and units follow Prometheus' conventions.
"""
import bisect
import contextlib
import platform
import time
from dataclasses import dataclass

from flask import Blueprint, Response, g, request
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder

from app import VERSION, counts, state

PREFIX = "model_server_"
SEPARATOR = "\x1f"  # between the parts of a key: the metric's name and its labels
METHODS = ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "PATCH")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
POWERS_OF_2 = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
IN_SLOT = ("decode", "preprocess", "inference")  # the stages of a request that holds a slot

bp = Blueprint("metrics", __name__)


@dataclass(frozen=True)
class Measure:
    """family: prometheus-client's class; buckets: a histogram's upper bounds; over_workers: how gauges are joined."""
    family: type
    help: str
    labels: tuple = ()
    buckets: tuple = ()
    over_workers: object = sum


MEASURES = {
    "requests": Measure(CounterMetricFamily, "Requests answered; error is the code of the answer, empty for a success.",
                        ("endpoint", "method", "status", "error")),
    "request_duration_seconds": Measure(HistogramMetricFamily, "From a request's headers to its answer.",
                                        ("endpoint",), SECONDS),
    "stage_duration_seconds": Measure(HistogramMetricFamily, "Time that requests spent in a stage.", ("stage",),
                                      SECONDS),
    "batch_size": Measure(HistogramMetricFamily, "Pictures in each batch that the engine ran, self-tests included.",
                          buckets=POWERS_OF_2),
    "cache_lookups": Measure(CounterMetricFamily, "Looks into the result cache, by result: hit or miss.", ("result",)),
    "batch_files": Measure(CounterMetricFamily, "Files of batch requests; error is the code of the file's result, "
                                                "empty for a success.", ("error",)),
    "overloaded": Measure(CounterMetricFamily, "Requests refused because the queue was full."),
    "deadline_exceeded": Measure(CounterMetricFamily, "Requests whose time ran out."),
    "worker_exits": Measure(CounterMetricFamily, "Workers that ended: crashed, killed, or replaced by a reload."),
    "requests_in_progress": Measure(GaugeMetricFamily, "Requests that are being answered, this scrape included."),
    "queue_depth": Measure(GaugeMetricFamily, "Requests that wait for a slot."),
    "queue_limit": Measure(GaugeMetricFamily, "Requests that may wait for a slot."),
    "slots_in_use": Measure(GaugeMetricFamily, "Slots whose request is being decoded or inferred."),
    "slots": Measure(GaugeMetricFamily, "Requests that may be decoded or inferred at once."),
    "workers_ready": Measure(GaugeMetricFamily, "Workers that have their model and answer."),
    "model_load_seconds": Measure(GaugeMetricFamily, "How long the model took to load and pass its self-test.",
                                  ("worker",)),
    "model_info": Measure(GaugeMetricFamily, "The model that answers; weights is the start of their SHA-256.",
                          ("model", "engine", "precision", "device", "weights"), over_workers=max),
    "info": Measure(GaugeMetricFamily, "The versions that answer.", ("version", "python"), over_workers=max),
    "draining": Measure(GaugeMetricFamily, "1 while the service was told to stop and waits for load balancers."),
}


def key(name, *labels):
    return SEPARATOR.join((name, *labels))


def is_gauge(of_key):
    return MEASURES[of_key.partition(SEPARATOR)[0]].family is GaugeMetricFamily


# --- counting ---

def count(name, *labels):
    counts.own.add(key(name, *labels), 1)


def change(name, amount):
    """Move a gauge of this worker."""
    counts.own.add(key(name), amount)


def observe(name, value, *labels):
    """One more value in a histogram."""
    buckets = MEASURES[name].buckets
    counts.own.observe(key(name, *labels), len(buckets) + 2, bisect.bisect_left(buckets, value), value)


@contextlib.contextmanager
def in_stage(stage):
    """Around a stage of a request."""
    gauge = "queue_depth" if stage == "queue" else "slots_in_use" if stage in IN_SLOT else None
    if gauge:
        change(gauge, 1)
    started = time.perf_counter()
    try:
        yield
    finally:
        observe("stage_duration_seconds", time.perf_counter() - started, stage)
        if gauge:
            change(gauge, -1)


def before_request():
    g.in_progress = True
    change("requests_in_progress", 1)


def after_request(response):
    endpoint = request.url_rule.rule if request.url_rule else "none"
    count_answer(endpoint, request.method, response.status_code, g.get("error_code", ""))
    observe("request_duration_seconds", time.perf_counter() - g.started, endpoint)
    return response


def count_answer(endpoint, method, status, error):
    count("requests", endpoint, method if method in METHODS else "other", str(status), error)
    if error == "OVERLOADED":
        count("overloaded")
    elif error == "DEADLINE_EXCEEDED":
        count("deadline_exceeded")


def teardown_request(_):
    if g.pop("in_progress", False):
        change("requests_in_progress", -1)


def start_worker(number):
    """In a new worker: count in region `number`; see counts.claim."""
    if number is not None:
        counts.regions[number].zero(is_gauge)
    counts.claim(number)


def end_worker(number):
    """In the master, when a worker ended: its gauges no longer count, its counters do."""
    if number is not None:
        counts.regions[number].release()
    count("worker_exits")


def note_model(model):
    """What this worker says of its model and its place in the service."""
    if not model.ready:
        return
    own = counts.own
    worker = str(counts.regions.index(own)) if own in counts.regions else "-"
    own.set(key("model_load_seconds", worker), model.load_seconds)
    own.set(key("model_info", model.name, model.manifest.engine, model.engine.precision, model.device,
                (model.manifest.weights["sha256"] or "")[:12]), 1)
    own.set(key("slots"), model.scheduler.slots)
    own.set(key("queue_limit"), model.scheduler.max_queue)


def register(app, model):
    note_model(model)
    app.before_request(before_request)
    app.after_request(after_request)
    app.teardown_request(teardown_request)


# --- writing out ---

class Sums:
    """A prometheus-client collector of everything, over all processes of this service."""

    def collect(self):
        sums = self.read()
        for name, measure in MEASURES.items():
            family = measure.family(PREFIX + name, measure.help, labels=measure.labels)
            found = sums.get(name, {})
            if not found and not measure.labels:
                found = {(): [0.0] * (len(measure.buckets) + 2 if measure.buckets else 1)}
            for labels, values in sorted(found.items()):
                if measure.buckets:
                    family.add_metric(labels, cumulative(measure.buckets, values[:-1]), values[-1])
                else:
                    family.add_metric(labels, values[0])
            yield family
        yield from processes()

    def read(self):
        """{metric's name: {labels: values}}, joined over the regions."""
        found = {}
        for region in counts.regions:
            for of_key, values in region.read().items():
                name, *labels = of_key.split(SEPARATOR)
                if is_gauge(of_key) and (not region.owner or labels and values == [0]):
                    continue  # of a worker that ended, in the second case of this one's predecessor
                found.setdefault(name, {}).setdefault(tuple(labels), []).append(values)
        sums = {name: {labels: [MEASURES[name].over_workers(column) for column in zip(*rows, strict=True)]
                       for labels, rows in by_labels.items()} for name, by_labels in found.items()}
        sums["info"] = {(VERSION, platform.python_version()): [1.0]}
        sums["draining"] = {(): [float(state.draining())]}
        sums["workers_ready"] = {(): [float(len(state.ready_workers()) if state.folder else 1)]}
        return sums


def cumulative(buckets, values):
    """[(upper bound as text, how many values are not above it)], with +Inf at the end."""
    total, bounds = 0.0, []
    for bound, value in zip((*map(float, buckets), "+Inf"), values, strict=True):
        total += value
        bounds.append((str(bound), total))
    return bounds


def processes():
    """prometheus-client's process metrics of each process, by its number: master, 1, 2, …"""
    families = {}
    for number, region in enumerate(counts.regions):
        if not region.owner:
            continue
        worker = "master" if number == 0 and len(counts.regions) > 1 else str(number)
        for family in ProcessCollector(pid=lambda pid=region.owner: pid, registry=None).collect():
            joined = families.setdefault(family.name, family)
            samples = [sample._replace(labels={"worker": worker}) for sample in family.samples]
            joined.samples = samples if joined is family else joined.samples + samples
    yield from families.values()


@bp.get("/metrics")
def metrics():
    encode, content_type = choose_encoder(request.headers.get("Accept"))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Sums())
    return Response(encode(registry), content_type=content_type)
