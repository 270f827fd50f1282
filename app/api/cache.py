"""The result cache: answers are reused until CACHE_TTL expires."""
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

MEMORY_ENTRIES = 1024   # of about 1 kB each for a classifier
REDIS_TIMEOUT_S = 0.05  # a request waits this long when an outage starts
REDIS_PROBE_S = 1.0     # how often an unreachable Redis is retried in the background
KEY_PREFIX = "prediction:"
LARGE = 2**18           # bytes, which take a millisecond to hash; more, and JSON, are hashed in a native thread


class PlainSerializer:
    """Keeps bytes as they are: cachelib's own would unpickle, and thus run, whatever someone put into Redis."""

    def dumps(self, value):
        return value

    def loads(self, value):
        return value


class ResultCache:
    """Answers stored as JSON under the SHA-256 of everything that determines them: the file, the options, the model.

    Its methods run in the event loop, where nothing else runs between two waits; Redis is called in native threads. If
    the store is unreachable, the service logs a warning, goes on without it and retries it in the background.
    """

    def __init__(self, settings, slots):
        self.slots = slots
        self.flights = {}  # key → AsyncResult of the answer that a request is computing
        self.in_reach = True
        if settings.cache_url == "memory://":
            self.store, self.errors, self.call = SimpleCache(MEMORY_ENTRIES, settings.cache_ttl), (), call_here
        else:
            self.store, self.errors = redis_store(settings.cache_url, settings.cache_ttl)
            self.call = in_native_thread

    def fetch(self, model, data, options, compute, deadline, stages, admitted=False):
        """(the answer, whether it came from the cache or from a concurrent request).

        compute() → the answer as JSON types. Each worker computes concurrent identical requests once: the others wait
        in places of the queue and share the answer or a 4xx; if the computing request fails for another reason, the
        next one takes over. Raises what compute raises, DeadlineExceeded, OVERLOADED.
        """
        if not model.task.deterministic:
            return compute(), False
        with stages("cache"):
            key = key_of(data, options, model) if isinstance(data, bytes) and len(data) <= LARGE else \
                in_native_thread(key_of, data, options, model)
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
        """How the other request ended: None or an exception. Waits for it in a place of the queue."""
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
            del self.flights[key], flight  # may hold the error, whose traceback holds this frame

    def load(self, key):
        text = self.ask(self.store.get, key)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return None  # not written by this service

    def save(self, key, answer):
        self.ask(self.store.set, key, json.dumps(answer).encode())

    def ask(self, call, *arguments):
        """The store's answer; None while it is unreachable."""
        if not self.in_reach:
            return None
        try:
            return self.call(call, *arguments)
        except self.errors as e:
            if self.in_reach:
                self.in_reach = False
                log.warning("the cache is unreachable, going on without it: %s", e)
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
            log.warning("the cache is reachable again")


def call_here(call, *arguments):
    return call(*arguments)


def key_of(data, options, model):
    if not isinstance(data, bytes):  # text or JSON; a list is one input, Instances are several
        data = json.dumps([type(data).__name__, data], sort_keys=True).encode()
    content = hashlib.sha256(data).digest()
    asked = json.dumps(options, sort_keys=True, default=lambda file: hashlib.sha256(file).hexdigest()).encode()
    return KEY_PREFIX + hashlib.sha256(b"\0".join([content, asked, VERSION.encode(), model.identity])).hexdigest()


def redis_store(url, ttl_s):
    """(cachelib's Redis store, the exceptions that it raises when Redis is unreachable)."""
    import redis
    client = redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S,
                                  retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    store = RedisCache(client, default_timeout=ttl_s)
    store.serializer = PlainSerializer()
    return store, (redis.RedisError, OSError)
