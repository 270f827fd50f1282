"""A process of `python -m app worker`: one model, one job at a time. Celery gets the jobs.

    python -m app.jobs.node --number 1 --queues long,short --memory 5 --instance 0f4b…
"""
import argparse
import contextlib
import ctypes
import logging.config
import mmap
import os
import signal
import sys
import threading
import time
import warnings

from celery import signals
from celery.apps.worker import Worker
from celery.platforms import SecurityWarning
from celery.worker import state

from app import load_model
from app.config import Settings, StartError
from app.data.database import Database
from app.data.storage import Own
from app.history.recorder import Recorder
from app.jobs import metrics, presence
from app.jobs.broker import TASK, Broker
from app.jobs.store import AWAY, Store
from app.jobs.work import Work
from app.server import board, counters, logs
from app.server.log_config import logging_config
from app.server.shared_memory import regions_in

BROKER_WITHIN_S = 30  # longer than a poll of it
LOOK_EVERY_S = 1
DEAF_AFTER_S = 4
END_AFTER_S = 0.2

log = logging.getLogger(__name__)


def main():
    parser = argparse.ArgumentParser(prog="python -m app.jobs.node")
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--queues", required=True)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--instance", required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the API's workers: each slot is one core
    end_with(arguments.parent)
    settings = Settings.load()
    logging.config.dictConfig(logging_config(settings))
    quieten()
    metrics.register()
    if arguments.memory is not None:
        attach(arguments)
    recorder = spans = None
    try:
        if settings.optional.tracing:
            from app import tracing
            spans, export = tracing.start()
        database = Database(settings.optional.database)
        if settings.optional.history:
            recorder = Recorder(database, settings.optional)
        work = Work(settings, load_model(settings), Store(database, settings.optional),
                    Own(database, settings.optional), Broker(settings.optional), arguments.instance, recorder, spans)
    except StartError as e:
        log.critical("this worker cannot run jobs: %s", e)
        counters.own.failed(1)
        logs.flush()
        return 1
    counters.own.serves(work.loader.generation)
    queues = arguments.queues.split(",")
    ended = threading.Lock()

    def end():
        """End this process, whoever comes first."""
        ended.acquire()
        with contextlib.suppress(*AWAY):
            presence.leave(database, work.worker)
        with export.stopping() if spans else contextlib.nullcontext():
            if recorder:
                recorder.stop()
        logging.shutdown()
        os._exit(0 if state.should_stop == 0 else 1)  # without waiting for threads that hang in native code
    for watch, *of_it in ((look_after, work, queues), (say_that_it_is_there, work, queues), (end_when_told, work, end)):
        threading.Thread(target=watch, args=of_it, daemon=True).start()
    consume(work, arguments, queues)
    end()


def end_with(parent):
    """Be killed when the supervisor is, or end now if it has been: it alone looks after this process."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


def quieten():
    """Celery's lines about each message say less than ours, and its warning about root is for brokers that carry
    code: ours carry IDs."""
    for name in ("celery", "kombu"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=SecurityWarning)


def attach(arguments):
    """Use the supervisor's memory: its Board, and this process's region of counters."""
    memory = memoryview(mmap.mmap(arguments.memory, 0))
    board.own = board.Board(memory, arguments.memory)
    counters.regions = regions_in(memory)
    counters.start_worker(arguments.number)


def look_after(work, queues):
    """End this process, which the supervisor replaces, if its model no longer works, or if it no longer hears of jobs:
    after Redis was away for a moment, kombu may not ask it again."""
    messages, deaf_since = 0, None
    while True:
        time.sleep(LOOK_EVERY_S)
        logs.flush()
        try:
            may_work = work.is_idle and work.messages == messages and any(
                work.broker.waiting()[name] for name in queues)
        except OSError:  # the broker is away
            may_work = False
        messages, deaf_since = work.messages, (deaf_since or time.monotonic()) if may_work else None
        reason = work.loader.needs_restart()
        if deaf_since and time.monotonic() > deaf_since + DEAF_AFTER_S:
            reason = "it gets no jobs, although there are some"
        if reason:
            log.error("this worker restarts: %s", reason)
            logs.flush()
            os._exit(1)


def say_that_it_is_there(work, queues):
    """In the database, for the service to tell its clients and its operator."""
    while not work.is_closed:
        with contextlib.suppress(*AWAY):  # then a second later
            presence.beat(work.store.database, work.worker, queues, work.models())
            time.sleep(presence.BEAT_EVERY_S - LOOK_EVERY_S)
        time.sleep(LOOK_EVERY_S)


def end_when_told(work, end):
    """End this process after SIGTERM, once it has no job: Celery looks for messages for some seconds first."""
    should_stop.wait()
    work.close()
    while not work.is_idle:
        time.sleep(0.02)
    work.has_passed_on.wait(END_AFTER_S)  # a message that was on its way
    end()


should_stop = threading.Event()


def take_over_sigterm(**_):
    """End after the present job. Celery's own handler does the same, but writes to standard error, past the log."""
    def stop(*_):
        state.should_stop = 0
        should_stop.set()
    signal.signal(signal.SIGTERM, stop)


def consume(work, arguments, queues):
    """Run jobs until SIGTERM."""
    celery = Broker(work.settings.optional, BROKER_WITHIN_S).celery
    celery.conf.worker_prefetch_multiplier = 1

    @celery.task(name=TASK, bind=True, ignore_result=True)
    def run(task, job_id):
        work.run(job_id, task.request.delivery_info["routing_key"])
    signals.setup_logging.connect(lambda **_: None, weak=False)  # it is set up
    signals.worker_ready.connect(take_over_sigterm, weak=False)
    Worker(app=celery, pool_cls="solo", concurrency=1, queues=queues, without_gossip=True,
           without_mingle=True, without_heartbeat=True, hostname=f"{arguments.number}@{arguments.instance}",
           quiet=True).start()


if __name__ == "__main__":
    sys.exit(main())
