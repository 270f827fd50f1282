"""Gunicorn's configuration, for CPU and GPU: `gunicorn 'app:create_app()'` reads it by itself."""
import math
import os
import resource
import signal
import sys

from app import counts, lifecycle, metrics, state
from app.config import Settings, StartError
from app.machine import plan as plan_of
from app.observability import logging_config
from app.prepare import prepared

try:
    settings = Settings.load()
    plan = plan_of(settings)
except StartError as e:
    sys.exit(f"error: {e}")
os.environ.update(settings.variables())  # for the workers to come: a .env that is edited later changes nothing

# Before any worker imports a library that reads them: each inference has one thread, workers × streams = cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
worker_class = "app.worker.Worker"
workers = plan.workers
threads = plan.threads
# Idle connections wait for their next request without a thread, but each with a descriptor.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
descriptors = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
if soft != resource.RLIM_INFINITY and soft < descriptors:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
worker_connections = max(plan.threads + 1, min(max(1000, 4 * plan.threads), descriptors - 128))
backlog = 512
timeout = 15            # seconds without a heartbeat; the main loop gives it whatever the threads do
graceful_timeout = math.ceil(settings.request_timeout) + 5
keepalive = 75          # longer than the idle time of the usual load balancers, so that they close first
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
control_socket_disable = True
preload_app = False     # the model loads in each worker: torch and OpenVINO do not survive a fork
limit_request_line = 4094
limit_request_fields = 64
limit_request_field_size = 8190
logconfig_dict = logging_config(settings)


def on_starting(server):
    """Get the model ready once, before the workers; a model that cannot be had stops the start."""
    # Until Gunicorn sets its own: process 1 of a container would not hear it, another would leave the download behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before the model was ready"))
    try:
        ready = prepared(settings)
    except StartError as e:
        sys.exit(f"error: {e}")
    state.create()
    counts.share(2 * plan.workers + 16)  # a reload has one more worker than usual; SIGTTIN adds others
    state.publish(ready)
    server.log.info("starting", extra={"engine": plan.engine, "devices": list(plan.devices), "workers": plan.workers,
                                       "streams": plan.streams, "queue": plan.queue, "threads": plan.threads,
                                       "model": str(ready.folder.name)})


def pre_fork(server, worker):
    """Each worker its device: of several GPUs the one with the fewest workers, then the one whose are oldest (in a
    reload they end next)."""
    ages = {device: [w.age for w in server.WORKERS.values() if w.device == device] for device in plan.devices}
    worker.region = counts.free_region(w.region for w in server.WORKERS.values())
    worker.device = min(plan.devices, key=lambda d: (len(ages[d]), max(ages[d], default=0)))


def post_fork(server, worker):
    os.environ["DEVICE"] = worker.device
    state.lock.close()  # the master's alone
    metrics.start_worker(worker.region)


def when_ready(server):
    lifecycle.install(server, settings.drain_seconds)


def post_worker_init(worker):
    state.set_ready(worker.pid)
    if worker.age == 1:  # the first one has its model: say how to try it
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        print(f"\nServing on http://{host}:{settings.port} - try:\n"
              f"  curl -F file=@tests/images/chelsea.jpg http://{host}:{settings.port}/predict\n"
          f"or open http://{host}:{settings.port} in a browser\n", file=sys.stderr)


def child_exit(server, worker):
    state.set_gone(worker.pid)
    metrics.end_worker(worker.region)


def on_exit(server):
    state.remove()
