"""How the Gunicorn master stops and reloads, more gently than with Gunicorn's own signal handlers.

SIGTERM: /health returns 503 `draining` for DRAIN_SECONDS while requests are still served; then the workers have
FINISH_SECONDS for what they have, and the master ends. A second SIGTERM ends the wait.
SIGHUP: the new model is prepared and checked in a process of its own, then published; each worker loads it while it
goes on serving, then switches to it. A model that fails the check changes nothing.
"""
import logging
import math
import os
import signal
import time

from app.server import board, stderr_lines
from app.server.counters import FAILED_AT, GENERATION_AT
from app.server.shared_memory import running_service

SWAP_WITHIN_S = 120  # for all workers to load a published model

log = logging.getLogger(__name__)


def install(arbiter, settings, start_preparing, outcome_of):
    """Replace the master's handlers of SIGTERM, SIGHUP and SIGCHLD; called by gunicorn.conf.py in the master.

    start_preparing() starts the process that prepares and checks the models; outcome_of(process), called when it has
    ended, returns the list of Prepared or raises StartError.
    """
    stop, reap, look_after, own = arbiter.handle_term, arbiter.handle_chld, arbiter.murder_workers, board.own
    reload = {"process": None, "covers": 0, "again": False}

    def handle_term():
        drain_s, finish_s = settings.drain_seconds, settings.finish_seconds
        if drain_s == 0 or own.draining:
            own.end_at(time.monotonic() + finish_s)
            arbiter.cfg.set("graceful_timeout", math.ceil(finish_s))
            if reload["process"]:
                reload["process"].terminate()
            stop()
        arbiter.log.info("draining", extra={"seconds": drain_s})
        own.end_at(time.monotonic() + drain_s + finish_s)
        signal.signal(signal.SIGALRM, lambda *_: arbiter.signal(signal.SIGTERM, None))
        signal.setitimer(signal.ITIMER_REAL, drain_s)

    def handle_hup():
        if own.draining:
            end_reload(own.tickets, False, "reload refused: the service is stopping")
        elif reload["process"]:  # it may have begun with files that have changed since
            reload["again"] = True
        else:
            log.info("reloading: preparing the model")
            reload.update(covers=own.tickets, again=False)
            try:
                reload["process"] = start_preparing()
            except OSError as e:  # no descriptor or no process is available
                end_reload(reload["covers"], False, f"reload failed, the old model goes on serving: {e}")

    def handle_chld():
        reap()
        process = reload["process"]
        if process is None or is_alive(process.pid):
            return
        reload["process"] = None
        try:
            models = outcome_of(process)
            generation = own.publish(models)
        except Exception as e:  # no error must end the service
            end_reload(reload["covers"], False, f"reload failed, the old model goes on serving: {e}")
        else:
            end_reload(reload["covers"], True, f"published {titles(models)}", generation)
        if reload["again"]:
            handle_hup()

    def murder_workers():  # called about once a second
        stderr_lines.read()
        look_after()

    def end_reload(covers, worked, message, generation=None):
        log.log(logging.INFO if worked else logging.ERROR, message)
        own.add_outcome(covers, worked, message, generation)

    arbiter.handle_term, arbiter.handle_hup = handle_term, handle_hup
    arbiter.handle_chld = arbiter.handle_cld = handle_chld
    arbiter.murder_workers = murder_workers


def titles(models):
    """A list of Prepared, for people."""
    return ", ".join((f"{model.key}=" if len(models) > 1 else "") + (model.own or model.folder.name)
                     for model in models)


def url_of(cfg):
    """The URL at which this machine reaches a service with this Gunicorn configuration, at its first address."""
    address = cfg.address[0]
    if isinstance(address, str | bytes):
        return f"unix:{os.fsdecode(address)}"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address[0], address[0])
    return f"http{'s' if cfg.is_ssl else ''}://{f'[{host}]' if ':' in host and '[' not in host else host}:{address[1]}"


def is_alive(pid):
    """Whether a process is running; the master reaps all of its children itself, so poll() cannot tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def swapped(region, generation):
    """Whether the worker that owns a counters.Region serves this generation; None while it has not tried."""
    if region.integers[GENERATION_AT] >= generation:
        return True
    return False if region.integers[FAILED_AT] >= generation else None


def reload_and_wait(pid=None):
    """Ask the running service to reload, and wait for the outcome. Returns (worked, a one-line message)."""
    master, its_board, regions = running_service(pid)
    ticket = its_board.draw_ticket()
    os.kill(master, signal.SIGHUP)
    while not (outcomes := [one for one in its_board.read().get("reloads", []) if one["covers"] >= ticket]):
        if not is_alive(master):
            return False, "the service ended"
        time.sleep(0.02)
    if not outcomes[0]["worked"]:
        return False, outcomes[0]["message"]
    name, until = outcomes[0]["message"].removeprefix("published "), time.monotonic() + SWAP_WITHIN_S
    while True:
        by_worker = [swapped(region, outcomes[0]["generation"]) for region in regions if region.owner]
        if by_worker and None not in by_worker or time.monotonic() > until:
            break
        if not is_alive(master):
            return False, "the service ended"
        time.sleep(0.02)
    serving = by_worker.count(True)
    if serving == len(by_worker):
        return True, f"reloaded: {serving} worker{'s' if serving > 1 else ''} serve{'' if serving > 1 else 's'} {name}"
    return False, (f"reload failed: {serving} of {len(by_worker)} workers serve {name}, the others keep the old model; "
                   "the log says why")
