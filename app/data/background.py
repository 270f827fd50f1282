"""Blocking calls of greenlets, such as those to the database: made in a few native threads of their own, so that a
service that hangs or is away costs those who need it a quick 503, and nobody else anything."""
import contextvars
import logging
import time

import gevent
from gevent.lock import Semaphore
from gevent.threadpool import ThreadPool

from app.data.database import had_no_connection, was_too_slow
from app.engine.slots import Outcome
from app.errors import ServiceError

THREADS = 8
WAITING = 1000    # calls that may wait for a thread: a greenlet each, which are cheap
WITHIN_S = 4      # for a call, waiting included
LISTINGS = 2      # lists of jobs and of the history at once, so that they leave connections to others
AWAY_S = 1        # how long calls are refused after one that has failed; then one at a time is made, until one succeeds

log = logging.getLogger(__name__)


class Threads:
    """Native threads, which several Backgrounds may share. count: how many calls run at once."""

    def __init__(self, count=THREADS):
        self.count, self.pool, self.free = count, None, Semaphore(count)
        self.waiting = 0      # calls that have not begun
        self.unfinished = 0   # calls in a thread, those that nobody waits for any longer included

    def take(self, within_s):
        """Whether there was a thread for a call within so many seconds; then `start` comes next, or `give_back`."""
        if self.waiting >= WAITING:
            return False
        self.waiting += 1
        try:
            return self.free.acquire(timeout=max(0, within_s))
        finally:
            self.waiting -= 1

    def give_back(self):
        self.free.release()

    def start(self, call, *arguments):
        """A result for `get`: the call's Outcome."""
        if self.pool is None:
            self.pool = ThreadPool(self.count)
        try:
            future = self.pool.spawn(Outcome, call, *arguments)
        except BaseException:
            self.give_back()
            raise
        self.unfinished += 1
        future.rawlink(self.finished)
        return future

    def finished(self, _):
        self.unfinished -= 1
        self.give_back()


class Late(TimeoutError):
    """A call has begun, but not ended in time."""


class Background:
    """Calls to one outside service. code, message: of the error while it is away; threads: see Threads."""

    def __init__(self, code, message, threads=None):
        self.code, self.message, self.threads = code, message, threads or Threads()
        self.failed_at = None                 # of a service that is away: when the last call failed
        self.is_probing = False               # whether a call tries if it is back

    def run(self, call, *arguments, within_s=WITHIN_S):
        """Make a call in a native thread and return its value. Raises the ServiceErrors that it raises; ServiceError
        OVERLOADED if no thread or connection was free in time, or the database took too long; for any other exception,
        and if the call takes too long, ServiceError 503 with this object's code. A call that has not begun by then is
        not made."""
        is_probe = self.failed_at is not None
        if is_probe and (self.is_probing or time.monotonic() < self.failed_at + AWAY_S):
            raise self.away()
        self.is_probing = self.is_probing or is_probe
        until = time.monotonic() + within_s
        try:
            self.take_thread(within_s, is_probe)
            return self.value(call, arguments, within_s, until)
        finally:
            self.is_probing = self.is_probing and not is_probe

    def take_thread(self, within_s, is_probe):
        """Raises ServiceError. That all threads are busy does not mean that the service is away."""
        if not self.threads.take(within_s):
            if self.failed_at is None:
                raise overloaded()
            if is_probe:
                self.failed_at = time.monotonic()
            raise self.away()
        if self.failed_at is not None and not is_probe:  # known since this call has waited
            self.threads.give_back()
            raise self.away()

    def value(self, call, arguments, within_s, until):
        """That of a call which has a thread. Raises ServiceError."""
        left_s = until - time.monotonic()
        try:
            value = self.outcome_of(call, arguments, left_s).get()
        except ServiceError:
            self.answers()
            raise
        except Exception as e:
            if was_too_slow(e):
                self.answers()
                raise overloaded() from e
            # One that has waited for long for its thread had little time, which proves nothing.
            is_overload = had_no_connection(e) or isinstance(e, Late) and left_s < within_s / 2
            if is_overload and self.failed_at is None:
                raise overloaded() from e
            if self.failed_at is None:
                log.error("%s: %s: %s", self.code, type(e).__name__, (str(e) or "no answer").splitlines()[0])
            self.failed_at = time.monotonic()
            raise self.away() from e
        self.answers()
        return value

    def outcome_of(self, call, arguments, within_s):
        """Raises Late."""
        future = self.threads.start(contextvars.copy_context().run, call, *arguments)
        with gevent.Timeout(max(0, within_s), Late(f"no answer within {within_s:.3g} s")):
            return future.get()

    def answers(self):
        if self.failed_at is not None:
            self.failed_at = None
            log.warning("%s: it answers again", self.code)

    def away(self):
        return ServiceError(503, self.code, self.message, retry_after_s=5)


def overloaded():
    return ServiceError(503, "OVERLOADED", "The service is at its limit; try again later.", retry_after_s=5)
