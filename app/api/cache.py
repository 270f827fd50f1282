"""The result cache: an answer that was computed once is given again, until CACHE_TTL."""
import hashlib
import json
import logging

import gevent
from cachelib import RedisCache, SimpleCache
from gevent.event import AsyncResult

from app.config import VERSION
from app.engine.slots import in_native_thread
from app.errors import DeadlineExceeded, ServiceError
from app.server import counters

log = logging.getLogger(__name__)

MEMORY_ENTRIES = 1024   # of about 1 kB for a classifier
REDIS_TIMEOUT_S = 0.05  # a request pays it once an outage
REDIS_PROBE_S = 1.0     # how often a Redis that is out of reach is tried again, in the background
KEY_PREFIX = "prediction:"
LARGE = 2**18           # bytes that are hashed in a native thread: a millisecond of them


class PlainSerializer:
    """Bytes as they are: cachelib's own would unpickle, and thereby run, whatever someone has put into Redis."""

    def dumps(self, value):
        return value

    def loads(self, value):
        return value


class ResultCache:
    """Answers kept as JSON under the SHA-256 of all that determines them: the file, the options, the model.

    It is asked in the loop, where nothing else runs between two calls that wait; a Redis is asked in native threads. A
    store that is out of reach costs a warning; the service goes on without it and tries it again in the background.
    """

    def __init__(self, settings, slots):
        self.slots = slots
        self.flights = {}  # key → AsyncResult of the answer that a request is computing now
        self.in_reach = True
        if settings.cache_url == "memory://":
            self.store, self.errors, self.call = SimpleCache(MEMORY_ENTRIES, settings.cache_ttl), (), call_here
        else:
            self.store, self.errors = redis_store(settings.cache_url, settings.cache_ttl)
            self.call = in_native_thread

    def fetch(self, model, data, options, compute, deadline, stages, admitted=False):
        """(the answer, whether it was there or computed by another request just now).

        compute() → the answer as JSON's types. Identical requests at the same time compute once in each worker: the
        others wait, in places of the queue, and share the answer or a 4xx; when the one that computes fails for another
        reason, the next one computes. Raises what compute raises, DeadlineExceeded, OVERLOADED.
        """
        with stages("cache"):
            key = in_native_thread(key_of, data, options, model) if len(data) > LARGE else key_of(data, options, model)
        while True:
            flight = self.flights.get(key)
            if flight is None:
                answer, is_hit = self.lead(key, compute, stages)
                break
            error = self.outcome(flight, deadline, stages, admitted)
            if error is None:
                answer, is_hit = flight.get(), True
                break
            if isinstance(error, ServiceError) and error.status < 499:  # 499: its client left, this one did not
                raise error
        counters.count("cache_lookups", "hit" if is_hit else "miss")
        if is_hit:
            answer = {**answer, "metadata": {**answer["metadata"], "inference_time": 0.0,
                                             "timings_ms": stages.timings_ms}}
        return answer, is_hit

    def outcome(self, flight, deadline, stages, admitted):
        """What the other request ended with: None or an exception. Waits in a place of the queue."""
        if not admitted:
            self.slots.check_room()
        self.slots.onlookers += 1
        try:
            with stages("cache"), gevent.Timeout(max(0, deadline.remaining()), DeadlineExceeded("queue")):
                flight.wait()
        finally:
            self.slots.onlookers -= 1
        return flight.exception

    def lead(self, key, compute, stages):
        flight = self.flights[key] = AsyncResult()
        try:
            with stages("cache"):
                answer = self.load(key)
            is_hit = answer is not None
            if not is_hit:
                answer = compute()
                self.save(key, answer)
            flight.set(answer)
            return answer, is_hit
        except BaseException as e:
            flight.set_exception(e)
            raise
        finally:
            del self.flights[key], flight  # which may hold the error, whose stack trace holds this frame

    def load(self, key):
        text = self.ask(self.store.get, key)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return None  # not written by this service

    def save(self, key, answer):
        self.ask(self.store.set, key, json.dumps(answer).encode())

    def ask(self, call, *arguments):
        """What the store answers; None while it is out of reach."""
        if not self.in_reach:
            return None
        try:
            return self.call(call, *arguments)
        except self.errors as e:
            if self.in_reach:
                self.in_reach = False
                log.warning("the cache is out of reach, going on without it: %s", e)
                gevent.spawn(self.probe)
            return None

    def probe(self):
        while not self.in_reach:
            gevent.sleep(REDIS_PROBE_S)
            try:
                self.call(self.store.has, KEY_PREFIX)
            except self.errors:
                continue
            self.in_reach = True
            log.warning("the cache is in reach again")


def call_here(call, *arguments):
    return call(*arguments)


def key_of(data, options, model):
    content = hashlib.sha256(data).digest()
    asked = json.dumps(options, sort_keys=True).encode()
    return KEY_PREFIX + hashlib.sha256(b"\0".join([content, asked, VERSION.encode(), model.identity])).hexdigest()


def redis_store(url, ttl_s):
    """(cachelib's store on a Redis server, what it raises when that is out of reach)."""
    import redis
    client = redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S,
                                  retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    store = RedisCache(client, default_timeout=ttl_s)
    store.serializer = PlainSerializer()
    return store, (redis.RedisError, OSError)
