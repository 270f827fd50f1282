"""What a worker's supervisor does beside: find lost jobs and lost messages, call back, remove what has expired. Every
machine with a worker does it; the steps are such that several may do them at once."""
import contextlib
import logging
import os
import re
import signal
import threading
import time

from app.jobs import presence, webhooks
from app.jobs.metrics import backlog
from app.jobs.store import AWAY, LEASE_S, RENEW_EVERY_S, first_line
from app.server import counters, logs
from app.server.counters import key

TURN_S = 0.5
PAUSE_S = 0.05            # between two transactions: as long as others need to see that SQLite's lock is free
GRACE_S = 3 * RENEW_EVERY_S
JUMP_S = 2                # by which a clock may go wrong before that is noticed
JOB_ID = "[0-9a-f]{32}"   # whatever else lies in the storage is not ours
LEFT_OVER_S = 3600        # the age at which a file in the storage that no unfinished job owns is removed

log = logging.getLogger(__name__)


class Upkeep:
    def __init__(self, optional, database, store, broker, storage, instance):
        self.optional, self.database, self.store = optional, database, store
        self.broker, self.storage, self.instance = broker, storage, instance
        self.slow_hosts = {}
        steps = [(self.find_lost, TURN_S), (self.send_again, 2), (self.call_back, TURN_S), (self.count, 2),
                 (self.expire, 3), (self.remove_left_overs, 600), (self.forget, 60)]
        self.looked_at = time.monotonic()
        self.leases_count_from = self.looked_at + GRACE_S  # the database may have been away until now
        self.clock_ahead = None  # of the database, of this machine's monotonic one
        self.away = set()  # names of steps that fail, each logged once
        self.stopping = threading.Event()
        # Each in a thread of its own, so that a slow storage or receiver delays nothing else.
        self.threads = [threading.Thread(target=self.repeat, args=step, name=step[0].__name__, daemon=True)
                        for step in steps]

    def start(self):
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.stopping.set()

    def repeat(self, step, every_s):
        self.take(step)
        while not self.stopping.wait(every_s):
            self.take(step)

    def take(self, step):
        name = step.__name__
        try:
            step()
        except AWAY as e:
            if name not in self.away:
                log.error("%s does not work now: %s", name, first_line(e))
            self.away.add(name)
        except Exception as e:  # a bug in one step must not end the others
            log.error("%s failed", name, exc_info=e)
        else:
            if name in self.away:
                log.info("%s works again", name)
            self.away.discard(name)
        logs.flush()

    # --- the steps ---

    def find_lost(self):
        now = time.monotonic()
        if now > self.looked_at + LEASE_S / 2:  # this machine stood still, and its workers too
            self.leases_count_from = max(self.leases_count_from, now + GRACE_S)
        self.looked_at = now
        try:
            lost = self.store.give_up_lost(self.instance, is_alive, self.leases_count)
        except AWAY:  # then nobody could renew a lease
            self.leases_count_from = time.monotonic() + LEASE_S
            raise
        for job_id, state, worker in lost:
            counters.count("jobs_lost", state)
            self.end_stuck(worker)
            log.warning("a worker was lost in the middle of a job", extra={"job": job_id, "state": state})
            if state != "queued":
                self.storage.delete_all(job_id)

    def leases_count(self, now):
        """Whether leases count, at this time of the database: not while nobody may have been able to renew them, nor
        just after its clock was set."""
        ahead, before = now - time.monotonic(), self.clock_ahead
        self.clock_ahead = ahead
        if before is not None and abs(ahead - before) > JUMP_S:
            log.warning("the clock of the database was set by %+.0f s", ahead - before)
            self.leases_count_from = max(self.leases_count_from, time.monotonic() + GRACE_S)
        return time.monotonic() > self.leases_count_from

    def end_stuck(self, worker):
        """Kill a process of this machine's that has lost its job while it still exists: it renews no lease, so it
        hangs in code that lets no other thread run, and the supervisor replaces it."""
        instance, _, pid = worker.rpartition("/")
        if instance == self.instance:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def send_again(self):
        due = self.store.due(self.broker.waiting())
        for i, (job_id, queue) in enumerate(due):
            try:
                self.broker.publish(job_id, queue)
            except OSError:
                self.store.not_sent([job_id for job_id, _ in due[i:]])
                raise
            counters.count("jobs_sent_again")

    def call_back(self):
        webhooks.run_due(self.database, self.optional, self.message_of, self.slow_hosts)

    def message_of(self, delivery):
        job = self.store.get(delivery["job_id"], None)
        return job and webhooks.message(delivery["id"], job)

    def count(self):
        for name, labels, value in backlog(self.store.backlog()):
            counters.own.set(key(name, *labels), value)

    def expire(self):
        while self.store.expire() and not self.stopping.wait(PAUSE_S):
            pass

    def forget(self):
        presence.forget(self.database)

    def remove_left_overs(self):
        """Remove the files of jobs that have ended or were never accepted, which a killed process has left."""
        old = [name for name in self.storage.prefixes(LEFT_OVER_S) if re.fullmatch(JOB_ID, name)]
        for job_id in set(old) - self.store.unfinished(old):
            self.storage.delete_all(job_id)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
