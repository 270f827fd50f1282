"""`python -m app worker`: runs jobs. It supervises processes that have the model and run one job at a time (node.py),
replaces those that end, and keeps up what stays (upkeep.py).

SIGTERM: no job is begun; those that run get DRAIN_SECONDS to end, then they go back to the queue.
SIGHUP: the model is prepared anew, then the processes are replaced one after the other, each when its job has ended.
"""
import contextlib
import dataclasses
import hmac
import http.server
import json
import logging.config
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings, StartError
from app.data.database import Database
from app.data.storage import Own
from app.handing_down import log_descriptors, variables
from app.jobs import metrics
from app.jobs.broker import QUEUES, Broker
from app.jobs.store import Store, first_line
from app.jobs.upkeep import Upkeep
from app.prepare import outcome_of, prepared, start_making
from app.prepare.bundles import hold
from app.server import board, counters, logs, shared_memory, stderr_lines
from app.server.log_config import logging_config
from app.server.machine import plan as plan_of
from app.setting_names import misspelt

LOOK_EVERY_S = 0.1
START_AGAIN_S = 1       # after a process has ended
KILL_AFTER_S = 2        # a process that has its job back in the queue

log = logging.getLogger(__name__)


class Node:
    """A process, and the one that replaces it when it ends."""

    def __init__(self, number, queues):
        self.number, self.queues, self.process, self.start_at = number, queues, None, 0.0
        self.generation = 0

    def start(self, environment, instance, devices):
        memory = board.own.descriptor
        command = [sys.executable, "-m", "app.jobs.node", "--number", str(self.number), "--queues",
                   ",".join(self.queues), "--instance", instance, "--parent", str(os.getpid())]
        if memory is not None:
            command += ["--memory", str(memory)]
        environment = {**environment, "DEVICE": devices[self.number % len(devices)]}
        passed_on = [*log_descriptors(), *([] if memory is None else [memory])]
        self.process = subprocess.Popen(command, env=environment, pass_fds=passed_on, start_new_session=True)
        self.generation = board.own.published()["generation"]

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Supervisor:
    def __init__(self, settings):
        self.settings, self.optional, self.instance = settings, settings.optional, uuid.uuid4().hex[:12]
        self.plan = plan_of(dataclasses.replace(settings, workers=1))  # each process may use all cores for its job
        self.environment = {**os.environ, **variables(settings)}
        long, short = self.optional.long_workers, self.optional.short_workers
        queues = [QUEUES[:1]] * short + [QUEUES[::-1]] * long  # so that a short job never waits for a long one alone
        self.nodes = [Node(number, names) for number, names in enumerate(queues, 1)]
        self.stop_at = self.preparing = self.replacing = None
        self.reload = False
        self.held = []

    def run(self):
        """Work until SIGTERM. Returns the exit code. Raises StartError."""
        if not self.nodes:
            raise StartError("SHORT_WORKERS and LONG_WORKERS are both 0")
        signal.signal(signal.SIGTERM, self.handle_stop)
        signal.signal(signal.SIGINT, self.handle_stop)
        signal.signal(signal.SIGHUP, self.handle_reload)
        export = None
        if self.optional.tracing:  # of callbacks
            from app import tracing
            _, export = tracing.start()
        ready = prepared(self.settings, self.plan.engine)
        shared_memory.create(len(self.nodes))
        board.own.write(plan=dataclasses.asdict(self.plan))
        self.publish(ready)
        database = Database(self.optional.database)
        with contextlib.suppress(SQLAlchemyError, OSError):  # it may come later; but not with tables of a newer version
            database.migrate()
        self.store = Store(database, self.optional)
        upkeep = Upkeep(self.optional, database, self.store, Broker(self.optional), Own(database, self.optional),
                        self.instance)
        metrics.register()
        if self.optional.worker_port:
            serve(self.settings.host, self.optional.worker_port, self)
        log.info("worker started", extra={"processes": len(self.nodes), "short": self.optional.short_workers,
                                          "long": self.optional.long_workers, "instance": self.instance})
        upkeep.start()
        try:
            return self.supervise()
        finally:
            upkeep.stop()
            with export.stopping() if export else contextlib.nullcontext():
                self.end_all()
            logs.flush()

    def publish(self, ready):
        board.own.publish(ready)
        self.held.append([hold(model.folder) for model in ready if model.folder])
        del self.held[:-2]

    # --- signals: handlers note what they ask for ---

    def handle_stop(self, *_):
        self.stop_at = time.monotonic() + (self.settings.drain_seconds if self.stop_at is None else 0)

    def handle_reload(self, *_):
        self.reload = True

    # --- the loop ---

    def supervise(self):
        told = False
        while True:
            logs.flush()
            stderr_lines.read()
            if self.stop_at is not None:
                if not told:
                    log.info("stopping; waiting up to %g s for running jobs", self.settings.drain_seconds)
                    for node in self.alive():
                        node.signal(signal.SIGTERM)
                    told = True
                if not self.alive() or time.monotonic() > self.stop_at:
                    return 0
            else:
                self.reload_model()
                self.start_missing()
                if self.cannot_start():
                    return 1
            time.sleep(LOOK_EVERY_S)

    def alive(self):
        return [node for node in self.nodes if node.process and node.process.poll() is None]

    def start_missing(self):
        now = time.monotonic()
        for node in self.nodes:
            if node.process and node.process.poll() is not None:
                log.log(logging.INFO if node.process.returncode == 0 else logging.ERROR, "a worker process ended",
                        extra={"worker": node.number, "code": node.process.returncode})
                shared_memory.end_worker(node.number)
                node.process, node.start_at = None, now + START_AGAIN_S * (node.process.returncode != 0)
            if node.process is None and now >= node.start_at:
                node.start(self.environment, self.instance, self.plan.devices)

    def cannot_start(self):
        """Whether the model could not be loaded at the start, by any process."""
        return not counters.ready_workers() and all(region.integers[counters.FAILED_AT]
                                                    for region in counters.regions[1:])

    def reload_model(self):
        if self.reload and self.preparing is None:
            self.reload = False
            log.info("reloading: preparing the model")
            self.preparing = start_making(self.settings, "--check", "--beside")
        if self.preparing and self.preparing.poll() is not None:
            try:
                self.publish(outcome_of(self.preparing))
            except StartError as e:
                log.error("reload failed, the old model goes on working: %s", e)
            self.preparing = None
        generation = board.own.published()["generation"]
        if any(node.process is None or not counters.regions[node.number].ready for node in self.nodes):
            return  # one after the other
        old = next((node for node in self.nodes if node.generation < generation), None)
        if old and self.replacing is not old.process:
            self.replacing = old.process
            old.signal(signal.SIGTERM)

    def end_all(self):
        """Kill the processes that still run, and put their jobs back into the queue."""
        late = self.alive()
        for node in late:
            node.signal(signal.SIGKILL)
        for node in late:
            node.process.wait(KILL_AFTER_S)
        if self.preparing:
            self.preparing.terminate()
        if late:
            try:
                number = self.store.give_back_all(self.instance)
                log.info("%d unfinished job%s returned to the queue", number, " was" if number == 1 else "s were")
            except SQLAlchemyError as e:  # their leases run out
                log.error("running jobs cannot be given back now: %s", first_line(e))


def serve(host, port, supervisor):
    """GET /metrics and /health of the worker, in threads. With API_KEYS, /metrics needs one of them."""
    from app.api.access import digest  # of equal length, so that the time taken reveals nothing about the keys
    keys = [digest(key) for key in (*(supervisor.settings.api_keys or ()),
                                    *(supervisor.optional.admin_keys or ()))]

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self):
            if self.path == "/metrics" and keys and not self.has_key():
                self.answer(401, "application/json", b'{"status": "error", "error": "UNAUTHORIZED", "message": '
                                                     b'"This needs a valid key."}')
            elif self.path == "/metrics":
                from app.api.metrics import Sums
                encode, content_type = choose_encoder(self.headers.get("Accept"))
                registry = CollectorRegistry(auto_describe=False)
                registry.register(Sums())
                self.answer(200, content_type, encode(registry))
            elif self.path in ("/health", "/ready", "/live"):
                ready, wanted = counters.ready_workers(), len(supervisor.nodes)
                is_healthy = ready == wanted or self.path == "/live"
                self.answer(200 if is_healthy else 503, "application/json", json.dumps({
                    "status": "healthy" if is_healthy else "unhealthy", "workers": ready, "of": wanted}).encode())
            else:
                self.answer(404, "application/json", b'{"status": "error", "error": "NOT_FOUND", "message": '
                                                     b'"There are /health and /metrics."}')

        def has_key(self):
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            given = token if scheme.lower() == "bearer" else self.headers.get("X-API-Key", "")
            given = digest(given.strip())
            return bool(sum([hmac.compare_digest(given, key) for key in keys]))

        def answer(self, status, content_type, body):
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    try:
        server = http.server.ThreadingHTTPServer((host, port), Handler)
    except OSError as e:
        raise StartError(f"WORKER_PORT {port} cannot be used: {e.strerror}") from e
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main():
    try:
        settings = Settings.load()
        if not (settings.optional and settings.optional.jobs):
            raise StartError("the worker runs jobs: set JOBS=on, as for the service")
    except StartError as e:
        stderr_lines.refuse(e)
        return 1
    if settings.log_format == "json":
        stderr_lines.capture()
    logging.config.dictConfig(logging_config(settings))
    for sentence in misspelt(os.environ):
        log.warning(sentence)
    try:
        code = Supervisor(settings).run()
    except StartError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    logging.shutdown()
    os._exit(code)  # without freeing everything first, one object after the other
