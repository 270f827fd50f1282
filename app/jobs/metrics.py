"""What workers count of jobs, beside counters.MEASURES."""
from app.history import recorder
from app.jobs.broker import QUEUES
from app.jobs.shares import UNFINISHED
from app.server import counters
from app.server.counters import Measure

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 3600)

BACKLOG = {
    "jobs_unfinished": Measure("gauge", "Jobs queued and running, in all.", ("queue", "state"), join=max),
    "jobs_oldest_seconds": Measure("gauge", "Since the submission of the oldest of these jobs; 0 if there is none.",
                                   ("queue", "state"), join=max),
}
OF_THE_SERVICE = {
    **BACKLOG,
    "jobs_workers": Measure("gauge", "Processes that take jobs from this queue.", ("queue",)),
}
MEASURES = {
    "jobs": Measure("counter", "Jobs that this worker ended; error is the job's code, empty for a success.",
                    ("queue", "state", "error")),
    "job_wait_seconds": Measure("histogram", "From a job's acceptance to an attempt.", ("queue",), SECONDS),
    "job_duration_seconds": Measure("histogram", "From the start of an attempt to its end.", ("queue",), SECONDS),
    **BACKLOG,
    "jobs_lost": Measure("counter", "Jobs whose worker was lost, by what became of them: queued again or failed.",
                         ("state",)),
    "jobs_sent_again": Measure("counter", "Queued jobs whose message was lost and has been sent again."),
    "webhook_attempts": Measure("counter", "Attempts to deliver a webhook, by result: delivered or failed.",
                                ("result",)),
}


def register():
    """Make them known in this process."""
    counters.MEASURES.update(MEASURES | recorder.MEASURES)


def backlog(found):
    """Yield (name, labels, value) of BACKLOG. found: Store.backlog's."""
    for queue in QUEUES:
        for state in UNFINISHED:
            for name, value in zip(BACKLOG, found.get((queue, state), (0, 0.0)), strict=True):
                yield name, (queue, state), value
