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
AWAY_S = 1        # after a failure, for which all calls but one are refused

log = logging.getLogger(__name__)


class Background:
    """Calls to one outside service. code, message: of the error while it is away."""

    def __init__(self, code, message):
        self.code, self.message = code, message
        self.pool, self.waiting = None, 0
        self.failed_at = -AWAY_S

    def run(self, call, *arguments, within_s=WITHIN_S):
        """Make a call in a native thread and return its value. Raises the ServiceErrors that it raises; for any other
        exception, and if it takes too long, ServiceError 503 with this object's code."""
        if self.pool is None:
            self.pool = ThreadPool(THREADS)
        now = time.monotonic()
        if self.waiting >= THREADS + WAITING or self.waiting and now < self.failed_at + AWAY_S:
            raise self.away()
        run, self.waiting = contextvars.copy_context().run, self.waiting + 1
        try:
            future = self.pool.spawn(Outcome, run, call, *arguments)
            future.rawlink(self.finished)
        except BaseException:
            self.waiting -= 1
            raise
        try:
            with gevent.Timeout(within_s):
                outcome = future.get()
            value = outcome.get()
        except ServiceError:
            raise
        except (Exception, gevent.Timeout) as e:
            if now > self.failed_at + AWAY_S:
                log.error("%s: %s: %s", self.code, type(e).__name__, (str(e) or "no answer").splitlines()[0])
            self.failed_at = time.monotonic()
            raise self.away() from e
        self.failed_at = -AWAY_S
        return value

    def finished(self, _):
        self.waiting -= 1

    def away(self):
        return ServiceError(503, self.code, self.message, retry_after_s=5)
