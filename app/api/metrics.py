"""GET /metrics for Prometheus: the totals of counters.py over all workers, including those that have ended."""
import itertools
import platform

from flask import Blueprint, Response, current_app, request
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder

from app.config import VERSION
from app.server import board, counters
from app.server.counters import MEASURES, SEPARATOR

PREFIX = "model_server_"
FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}

bp = Blueprint("metrics", __name__)


@bp.get("/metrics")
def metrics():
    encode, content_type = choose_encoder(request.headers.get("Accept"))
    registry = CollectorRegistry(auto_describe=False)
    for collector in (Sums(), *current_app.extensions.get("collectors", ())):
        registry.register(collector)
    return Response(encode(registry), content_type=content_type)


class Sums:
    """A prometheus-client collector of all measures, over all processes of this service."""

    def collect(self):
        sums = self.read()
        for name, measure in MEASURES.items():
            family = FAMILIES[measure.kind](PREFIX + name, measure.help, labels=measure.labels)
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
        """{measure's name: {labels: values}}, combined over the regions."""
        found = {}
        for region in counters.regions:
            for of_key, values in region.read().items():
                name, *labels = of_key.split(SEPARATOR)
                if MEASURES[name].kind == "gauge" and (not region.owner or labels and values == [0]):
                    continue  # of an ended worker, or, if 0, of a predecessor or the previous model
                found.setdefault(name, {}).setdefault(tuple(labels), []).append(values)
        sums = {name: {labels: [MEASURES[name].join(column) for column in zip(*rows, strict=True)]
                       for labels, rows in by_labels.items()} for name, by_labels in found.items()}
        sums["info"] = {(VERSION, platform.python_version()): [1.0]}
        ready = float(counters.ready_workers())
        return sums | {"draining": {(): [float(board.is_draining())]}, "workers_ready": {(): [ready]}}


def cumulative(buckets, values):
    """[(upper bound as text, number of values up to it)], ending with +Inf."""
    return list(zip((*map(str, map(float, buckets)), "+Inf"), itertools.accumulate(values), strict=True))


def processes():
    """prometheus-client's process metrics of each process, labelled master, 1, 2, …"""
    families = {}
    for number, region in enumerate(counters.regions):
        if not region.owner:
            continue
        worker = "master" if number == 0 and len(counters.regions) > 1 else str(number)
        for family in ProcessCollector(pid=lambda pid=region.owner: pid, registry=None).collect():
            joined = families.setdefault(family.name, family)
            samples = [sample._replace(labels={"worker": worker}) for sample in family.samples]
            joined.samples = samples if joined is family else joined.samples + samples
    yield from families.values()
