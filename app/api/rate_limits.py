"""Counts what each client does against limits such as 60/minute, in Redis or in this process."""
import logging
import time

from limits import parse_many
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from app.engine.slots import in_native_thread
from app.errors import ServiceError

REDIS_TIMEOUT_S = 0.1   # a request waits this long when an outage starts, and at each retry
RETRY_REDIS_AFTER_S = 2
PREFIX = "model-server"

log = logging.getLogger(__name__)


class Counts:
    """The counts of all limits. While Redis is unreachable, this process counts on its own; one request in
    RETRY_REDIS_AFTER_S tries Redis again. Redis is called in native threads."""

    def __init__(self, url):
        self.here, self.shared, self.errors = FixedWindowRateLimiter(MemoryStorage()), None, ()
        self.in_reach, self.retry_at = True, 0.0
        if url != "memory://":
            import redis
            from limits.storage import RedisStorage
            self.errors = redis.RedisError, OSError
            self.shared = FixedWindowRateLimiter(RedisStorage(
                url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S,
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0)))

    def breach(self, limits, name, client, *, cost=1, look_first=False, only_look=False):
        """Add `cost` to a client's count of each limit, unless one does not allow it. Returns (that limit, seconds
        until its count starts again), or None.

        look_first: a request that does not fit adds nothing to any count; only_look: none does.
        """
        asked = limits, (PREFIX, name, client), cost, look_first or only_look, only_look
        if self.shared and (self.in_reach or time.monotonic() > self.retry_at):
            self.retry_at = time.monotonic() + RETRY_REDIS_AFTER_S  # during an outage, the others do not wait as well
            try:
                found = in_native_thread(self.first_shared_breach, self.in_reach, *asked)
                self.report(True)
                return found
            except self.errors as e:
                self.report(False, e)
        return first_breach(self.here, *asked)

    def first_shared_breach(self, was_in_reach, *asked):
        if was_in_reach and not self.in_reach:  # others have found out while this call waited for a thread
            raise OSError("unreachable")
        return first_breach(self.shared, *asked)

    def report(self, in_reach, error=None):
        if in_reach != self.in_reach:
            self.in_reach = in_reach
            log.warning("RATE_LIMIT_STORAGE is reachable again" if in_reach else
                        f"RATE_LIMIT_STORAGE is unreachable, counting in memory: {error}")


def parse(text):
    """The limits in a text such as 5/second;1000/day, the shortest period first."""
    return sorted(parse_many(text))


def first_breach(limiter, limits, who, cost, look_first, only_look):
    for call in [limiter.test] * look_first + [limiter.hit] * (not only_look):
        for limit in limits:
            if not call(limit, *who, cost=cost):
                return limit, limiter.get_window_stats(limit, *who).reset_time - time.time()
    return None


def refusal(breach, message):
    """The error for a breach. message: with {} for the limit."""
    limit, seconds = breach
    return ServiceError(429, "RATE_LIMITED", message.format(limit), retry_after_s=seconds)
