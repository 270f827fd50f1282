"""Gunicorn's configuration, for CPU and GPU: `gunicorn 'app:create_app()'` reads it automatically."""
import dataclasses
import functools
import math
import os
import resource
import signal
import sys

# Until Gunicorn sets its own: process 1 of a container would ignore SIGTERM, another would leave a download running.
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: sys.exit("stopped before the model was ready"))

from gunicorn.workers import base
from gunicorn.workers.workertmp import WorkerTmp

from app.config import HANDED_DOWN, Settings, StartError
from app.handing_down import variables
from app.prepare import outcome_of, prepared, start_making
from app.prepare.bundles import hold, verify
from app.server import board, counters, lifecycle, shared_memory, start_checks, stderr_lines
from app.server.log_config import logging_config
from app.server.logs import flush
from app.server.machine import plan as plan_of
from app.server.machine import planned_cores
from app.setting_names import misspelt

for descriptor in (0, 1, 2):  # one that is closed would become a socket, and logs would be written into it
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)

if stderr_lines.is_wanted():
    stderr_lines.capture()
try:
    settings = Settings.load()
    doubtful = [] if HANDED_DOWN in os.environ else misspelt(os.environ)
    plan = plan_of(settings)
except StartError as e:
    sys.exit(f"error: {e}")
os.environ.update(variables(settings))  # for future workers: editing .env later changes nothing

# Set before any worker imports a library that reads them: one thread per inference, workers × streams = cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
worker_class = "app.server.worker.Worker"
workers = plan.workers
# A connection costs a greenlet and a descriptor, not a thread.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
descriptors = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
if soft != resource.RLIM_INFINITY and soft < descriptors:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
worker_connections = max(64, min(16_384, descriptors - 256))
backlog = 2048
timeout = 15            # seconds without a heartbeat
graceful_timeout = math.ceil(settings.request_timeout) + 5  # of a worker that is replaced; see lifecycle.py
keepalive = 75          # longer than the idle time of the usual load balancers, so that they close first
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
if worker_tmp_dir is None and hasattr(os, "memfd_create"):
    class Heartbeat(WorkerTmp):  # needs no folder to write to: a container may have none
        def __init__(self, cfg):
            self._tmp = os.fdopen(os.memfd_create("heartbeat"), "w+b", 0)
    base.WorkerTmp = Heartbeat
control_socket_disable = True
preload_app = False     # the model loads in each worker: torch and OpenVINO do not survive a fork
limit_request_line = 4094
limit_request_fields = 64
limit_request_field_size = 8190
logconfig_dict = logging_config(settings)

OURS = {"worker_class_str": worker_class, "threads": 1, "preload_app": False}
OPTIONS = {"worker_class_str": "-k/--worker-class", "threads": "--threads", "preload_app": "--preload"}
held = []  # of each publishing, the files of bundles.hold


def nworkers_changed(server, new, old):
    """The first hook that Gunicorn calls: applies the options of its command line, or refuses them, and what else would
    fail after the model has been prepared."""
    global settings, plan
    if old is not None:
        return
    for name, value in OURS.items():
        if getattr(server.cfg, name) != value:
            sys.exit(f"error: {OPTIONS[name]} cannot be chosen: the service has a worker class of its own, which loads "
                     "its model after the fork and needs no threads for connections")
    if server.cfg.keepalive < 1:
        sys.exit(f"error: --keep-alive must be at least 1, got {server.cfg.keepalive}")
    if new != plan.workers:  # -w: this many workers share the cores
        try:
            Settings.parse({"WORKERS": str(new)})  # the workers would refuse it, again and again
        except StartError:
            sys.exit(f"error: -w/--workers must be from 1 to 256, got {new}")
        settings = dataclasses.replace(settings, workers=new)
        plan = plan_of(settings)
        os.environ["WORKERS"] = str(new)
    try:
        start_checks.check(server.cfg, settings, plan)
    except StartError as e:
        sys.exit(f"error: {e}")


def on_starting(server):
    """Prepare the model once, before the workers; if that fails, the service does not start."""
    for sentence in doubtful:
        server.log.warning(sentence)
    cores = planned_cores(settings)
    if settings.cores and settings.cores > cores:
        server.log.warning("CORES is %d, but this process may use %d: these are planned for", settings.cores, cores)
    try:
        ready = prepared(settings, plan.engine)
    except StartError as e:
        sys.exit(f"error: {e}")
    shared_memory.create(2 * plan.workers + 64)  # SIGTTIN adds more
    address = server.cfg.address[0]
    board.own.write(plan=dataclasses.asdict(plan), port=address[1] if isinstance(address, tuple) else None)
    try:
        if settings.models:
            from app.server import traffic
            traffic.start(traffic.of(board.own), settings)
        board.own.publish(ready)
    except StartError as e:
        sys.exit(f"error: {e}")
    held[:] = [hold_all(ready)]
    server.log.info("starting", extra={"engine": plan.engine, "devices": list(plan.devices), "cores": cores,
                                       "workers": plan.workers, "streams": plan.streams, "slots": plan.slots,
                                       "queue": plan.queue, "model": lifecycle.titles(ready),
                                       **({"jobs": "run them with make worker, or python -m app worker"}
                                          if settings.optional and settings.optional.jobs else {})})


def hold_all(ready):
    return [hold(model.folder) for model in ready if model.folder]


def when_ready(server):
    # For workers, which may lack memory or descriptors when they need these.
    from app.server import model_swap, refusals, stopping  # noqa: F401

    def outcome(process):
        ready = outcome_of(process)
        for model in ready:
            if model.folder:
                verify(model.folder)
        held.append(hold_all(ready))
        del held[:-2]  # keep the previous ones while workers still load
        return ready
    lifecycle.install(server, settings, lambda: start_making(settings, "--check", "--beside"), outcome)


def ssl_context(conf, default_ssl_context_factory):
    """Leave the handshake to the connection's greenlet, which limits its time: see Worker.handle."""
    context = default_ssl_context_factory()
    context.wrap_socket = functools.partial(context.wrap_socket, do_handshake_on_connect=False)
    return context


def pre_fork(server, worker):
    """Give each worker a device: of several GPUs, the one with the fewest workers."""
    used = [w.device for w in server.WORKERS.values()]
    worker.region = shared_memory.free_region(w.region for w in server.WORKERS.values())
    worker.device = min(plan.devices, key=used.count)


def post_fork(server, worker):
    os.environ["DEVICE"] = worker.device
    counters.start_worker(worker.region)


def post_worker_init(worker):
    if worker.age == 1:  # the first worker is ready: log how to try the service
        url = lifecycle.url_of(worker.cfg)
        loader = worker.wsgi.extensions["model"]
        task = loader.current.task
        there = [path for path in ("tests/images/chelsea.jpg", "app/api/static/cat.jpg") if os.path.exists(path)]
        file = there[0] if there and "picture" in task.takes else "your-file"
        sample = f"-F file=@{file}" if task.is_file else task.curl_sample()
        instead = "; ".join(f" {model.name} instead of {name} (its weights could not be downloaded)"
                            for model in loader.models() for name in model.instead.values())
        key = "-H 'Authorization: Bearer KEY' " if settings.api_keys else ""
        worker.log.info(f"serving{instead}", extra={"url": url, "try": f"curl {key}{sample} {url}/predict"})


def child_exit(server, worker):
    shared_memory.end_worker(worker.region)


def pre_exec(server):
    stderr_lines.release()


def on_exit(server):
    flush()
