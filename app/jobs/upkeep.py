"""What a worker's supervisor does beside: find lost jobs and lost messages, call back, remove what has expired. Every
machine with a worker does it; the steps are such that several may do them at once."""
import contextlib
import logging
import os
import re
import signal
import threading
import time

from app.jobs import webhooks
from app.jobs.answers import job_body
from app.jobs.broker import QUEUES
from app.jobs.store import AWAY, LEASE_S, RENEW_EVERY_S, UNFINISHED, first_line
from app.server import counters, logs
from app.server.counters import key

TURN_S = 0.5
GRACE_S = 3 * RENEW_EVERY_S
JOB_ID = "[0-9a-f]{32}"   # whatever else lies in the storage is not ours
LEFT_OVER_S = 3600        # the age at which a file in the storage that no unfinished job owns is removed

log = logging.getLogger(__name__)


class Upkeep:
    def __init__(self, optional, database, store, broker, storage, instance):
        self.optional, self.database, self.store = optional, database, store
        self.broker, self.storage, self.instance = broker, storage, instance
        steps = [(self.find_lost, TURN_S), (self.send_again, 2), (self.call_back, TURN_S), (self.count, 2),
                 (self.expire, 3), (self.remove_left_overs, 600)]
        self.looked_at = time.monotonic()
        self.leases_count_from = self.looked_at + GRACE_S  # the database may have been away until now
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
            lost = self.store.give_up_lost(self.instance, is_alive, time.monotonic() > self.leases_count_from)
        except AWAY:  # then nobody could renew a lease
            self.leases_count_from = time.monotonic() + LEASE_S
            raise
        for job_id, state, worker in lost:
            counters.count("jobs_lost", state)
            self.end_stuck(worker)
            log.warning("a worker was lost in the middle of a job", extra={"job": job_id, "state": state})
            if state != "queued":
                self.storage.delete_all(job_id)

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
        webhooks.run_due(self.database, self.optional, self.body_of)

    def body_of(self, job_id):
        row = self.store.get(job_id, None)
        return row and job_body(row, [])

    def count(self):
        found = self.store.counts()
        for queue in QUEUES:
            for state in UNFINISHED:
                counters.own.set(key("jobs_unfinished", queue, state), found.get((queue, state), 0))

    def expire(self):
        while self.store.expire() and not self.stopping.is_set():
            pass

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
