"""Blocking calls of greenlets, such as those to the database: made in a few native threads of their own, so that a
service that hangs or is away costs those who need it a quick 503, and nobody else anything."""
import contextvars
import logging
import time

import gevent
from gevent.threadpool import ThreadPool

from app.engine.slots import Outcome
from app.errors import ServiceError

THREADS = 8
WAITING = 32      # calls that may wait for a thread
WITHIN_S = 4      # for a call, waiting included
AWAY_S = 1        # how long calls are refused after one that has failed; then one at a time is made, until one succeeds

log = logging.getLogger(__name__)


class Background:
    """Calls to one outside service. code, message: of the error while it is away."""

    def __init__(self, code, message):
        self.code, self.message = code, message
        self.pool, self.unfinished = None, 0  # calls, those that nobody waits for any longer included
        self.failed_at = None                 # of a service that is away: when the last call failed
        self.is_probing = False               # whether a call tries if it is back

    def run(self, call, *arguments, within_s=WITHIN_S):
        """Make a call in a native thread and return its value. Raises the ServiceErrors that it raises; for any other
        exception, and if it takes too long, ServiceError 503 with this object's code. A call that has not begun by then
        is not made."""
        is_probe = self.failed_at is not None
        if self.unfinished >= THREADS + WAITING or is_probe and (
                self.is_probing or time.monotonic() < self.failed_at + AWAY_S):
            raise self.away()
        self.is_probing = self.is_probing or is_probe
        try:
            value = self.outcome_of(call, arguments, within_s).get()
        except ServiceError:
            self.answers()
            raise
        except Exception as e:
            if self.failed_at is None:
                log.error("%s: %s: %s", self.code, type(e).__name__, (str(e) or "no answer").splitlines()[0])
            self.failed_at = time.monotonic()
            raise self.away() from e
        finally:
            self.is_probing = self.is_probing and not is_probe
        self.answers()
        return value

    def outcome_of(self, call, arguments, within_s):
        """Raises TimeoutError."""
        is_wanted, run = [True], contextvars.copy_context().run

        def call_if_wanted():
            return run(call, *arguments) if is_wanted else None

        def finished(_):
            self.unfinished -= 1
        if self.pool is None:
            self.pool = ThreadPool(THREADS)
        self.unfinished += 1
        has_begun = False
        try:
            with gevent.Timeout(within_s, TimeoutError(f"no answer within {within_s} s")):
                future = self.pool.spawn(Outcome, call_if_wanted)
                has_begun = True
                future.rawlink(finished)
                return future.get()
        finally:
            is_wanted.clear()
            if not has_begun:
                self.unfinished -= 1

    def answers(self):
        if self.failed_at is not None:
            self.failed_at = None
            log.warning("%s: it answers again", self.code)

    def away(self):
        return ServiceError(503, self.code, self.message, retry_after_s=5)
