"""How the Gunicorn master stops and reloads: what its own signals do less gently.

SIGTERM: /health says 503 `draining` for DRAIN_SECONDS while everything is still served; then the workers finish what
they have and the master ends. A second SIGTERM ends the waiting.
SIGHUP: the model is made ready and checked in a process of its own; then each worker is replaced by a new one, which
has loaded the model before the old one ends. A model that fails the check changes nothing.
"""
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from app import state
from app.config import Settings, StartError

READY_WITHIN_S = 120  # for one new worker to load the model

log = logging.getLogger(__name__)


def install(arbiter, drain_seconds):
    """Replace the master's handlers of SIGTERM, SIGHUP and SIGTTOU; called by gunicorn.conf.py in the master."""
    stop, one_less = arbiter.handle_term, arbiter.handle_ttou
    rolling = []

    def handle_term():
        if drain_seconds == 0 or state.draining():
            stop()
        arbiter.log.info("draining", extra={"seconds": drain_seconds})
        state.set_draining()
        signal.signal(signal.SIGALRM, lambda *_: arbiter.signal(signal.SIGTERM, None))
        signal.setitimer(signal.ITIMER_REAL, drain_seconds)

    def handle_hup():
        if state.draining() or rolling and rolling[-1].poll() is None and alive(rolling[-1].pid):
            arbiter.log.warning("reload refused: the service is reloading or stopping already")
            return
        rolling[:] = [subprocess.Popen([sys.executable, "-m", "app", "roll", "--state", str(state.folder)])]
        state.write_json("reloading.json", rolling[-1].pid)

    def handle_ttou():
        """One worker less: Gunicorn ends the oldest. When a reload is given up, that is one which has no model."""
        if state.take_given_up():
            for pid, worker in list(arbiter.WORKERS.items()):
                if pid not in state.ready_workers():
                    worker.age = 0
                    arbiter.kill_worker(pid, signal.SIGKILL)  # it may hang while it loads
        one_less()

    arbiter.handle_term, arbiter.handle_hup, arbiter.handle_ttou = handle_term, handle_hup, handle_ttou


def alive(pid):
    """Whether a child still runs; the master reaps all children itself, so poll() alone cannot tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def running_service(pid=None):
    """(master's process id, state folder) of the service on this machine, by its pid if there are several. Raises
    StartError."""
    found = state.services()
    if pid is not None:
        found = {p: folder for p, folder in found.items() if p == pid}
    if len(found) != 1:
        raise StartError("no running service was found" if not found else
                         f"several services run here: choose one with --pid ({', '.join(map(str, sorted(found)))})")
    return found.popitem()


def reload_and_wait(pid=None):
    """Ask the running service to reload (SIGHUP) and wait for the outcome. Returns (worked, one line)."""
    master, folder = running_service(pid)
    outcome, at_work = folder / "reload.json", folder / "reloading.json"
    for path in (outcome, at_work):
        path.unlink(missing_ok=True)
    os.kill(master, signal.SIGHUP)
    while not outcome.exists():
        if not alive(master):
            return False, "the service ended"
        has_ended = at_work.exists() and not alive(state.read_json(at_work))
        if has_ended and not outcome.exists():
            return False, "the reload ended before it was through; the log says more"
        time.sleep(0.05)
    answer = state.read_json(outcome)
    return answer["worked"], answer["message"]


def roll(folder, master):
    """Check the model, then replace worker by worker; the outcome goes to the log and to reload.json. Started by the
    master on SIGHUP. Returns whether it worked."""
    state.folder = Path(folder)
    before = state.served()
    try:
        from app.model_loader import ModelLoader
        from app.prepare import prepared
        settings = Settings.load()
        ready = prepared(settings)
        ModelLoader(settings).load(ready).engine.close()
    except StartError as e:
        return report(False, f"reload failed, the old model goes on serving: {e}")
    except Exception as e:
        log.exception("the new model cannot be checked")
        return report(False, f"reload failed, the old model goes on serving: {e!r}")
    old = state.ready_workers()
    state.publish(ready)
    for done in range(len(old)):
        known = state.ready_workers()
        os.kill(master, signal.SIGTTIN)
        if not wait_until(lambda known=known: state.ready_workers() - known, READY_WITHIN_S, master):
            if not done:
                state.publish(before)
            state.set_given_up()
            os.kill(master, signal.SIGTTOU)
            return report(False, f"reload failed, the old model goes on serving: worker {done + 1} did not get ready"
                          if not done else f"reload stopped half way: {done} of {len(old)} workers serve "
                          f"{ready.folder.name}, the others the old model; worker {done + 1} did not get ready")
        os.kill(master, signal.SIGTTOU)
        left = len(state.ready_workers())
        wait_until(lambda left=left: len(state.ready_workers()) < left, READY_WITHIN_S, master)
    return report(True, f"reloaded: {len(old)} workers serve {ready.folder.name}")


def wait_until(condition, seconds, master):
    until = time.monotonic() + seconds
    while time.monotonic() < until and alive(master):
        if condition():
            return True
        time.sleep(0.02)
    return False


def report(worked, message):
    log.log(logging.INFO if worked else logging.ERROR, message)
    state.write_json("reload.json", {"worked": worked, "message": message})
    return worked
