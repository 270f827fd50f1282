"""What the service says of the backlog of jobs in GET /metrics: it asks the database with each scrape, as no process of
its own counts them."""
from prometheus_client.core import GaugeMetricFamily

from app.api.metrics import PREFIX
from app.errors import ServiceError
from app.jobs.broker import QUEUES
from app.jobs.metrics import OF_THE_SERVICE, backlog


class Backlog:
    """A prometheus-client collector. While the database is away, it says nothing, which Prometheus can tell from 0.

    jobs: calls.Jobs."""

    def __init__(self, jobs):
        self.jobs = jobs

    def collect(self):
        try:
            found, heard = self.jobs.asking.run(lambda: (self.jobs.store.backlog(), self.jobs.heard()))
        except ServiceError:
            return
        families = {name: GaugeMetricFamily(PREFIX + name, measure.help, labels=measure.labels)
                    for name, measure in OF_THE_SERVICE.items()}
        for name, labels, value in backlog(found):
            families[name].add_metric(labels, value)
        for queue in QUEUES:
            families["jobs_workers"].add_metric([queue], sum(queue in queues for queues, _ in heard))
        yield from families.values()
