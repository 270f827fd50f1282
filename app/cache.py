"""The result cache: an answer that was computed once is given again, until CACHE_TTL."""
import dataclasses
import functools
import hashlib
import json
import logging
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from cachelib import RedisCache, SimpleCache

from app import VERSION
from app.errors import ServiceError
from app.scheduler import DeadlineExceeded

log = logging.getLogger(__name__)

MEMORY_ENTRIES = 1024   # of about 1 kB for a classifier
REDIS_TIMEOUT_S = 0.05  # a request pays it once an outage
REDIS_PROBE_S = 1.0     # how often a Redis that is out of reach is tried again, in the background
KEY_PREFIX = "prediction:"


class PlainSerializer:
    """Bytes as they are: cachelib's own would unpickle, and thereby run, whatever someone has put into Redis."""

    def dumps(self, value):
        return value

    def loads(self, value):
        return value


class ResultCache:
    """Answers kept as JSON under the SHA-256 of all that determines them: the file, the options, the model.

    A store that is out of reach costs a warning; the service goes on without it and tries it again in the background.
    """

    def __init__(self, settings, model):
        self.model = model
        self.flights = {}  # key → Future of the answer that a request is computing now
        self.lock = threading.Lock()
        self.in_reach = True
        if settings.cache_url == "memory://":
            self.store, self.errors = SimpleCache(MEMORY_ENTRIES, settings.cache_ttl), ()
        else:
            self.store, self.errors = redis_store(settings.cache_url, settings.cache_ttl)

    @functools.cached_property
    def model_identity(self):
        model, manifest = self.model, self.model.manifest
        return json.dumps([VERSION, model.name, model.task, model.labels, manifest.weights, manifest.network,
                           manifest.preprocessing, manifest.engine, manifest.versions, model.engine.precision,
                           model.device.partition(":")[0]], sort_keys=True).encode()

    def key(self, data, options):
        content = hashlib.sha256(data).digest()
        asked = json.dumps(dataclasses.asdict(options), sort_keys=True).encode()
        return KEY_PREFIX + hashlib.sha256(b"\0".join([content, asked, self.model_identity])).hexdigest()

    def fetch(self, data, options, compute, deadline, stages, admitted=False):
        """(the answer, whether it was there or computed by another request just now).

        compute() → the answer as JSON's types. Identical requests at the same time compute once in each worker: the
        others wait, in places of the scheduler's queue, and share the answer or a 4xx; when the one that computes
        fails for another reason, the next one computes. Raises what compute raises, DeadlineExceeded, OVERLOADED.
        """
        with stages("cache"):
            key = self.key(data, options)
        while True:
            with self.lock:
                flight = self.flights.get(key)
                leads = flight is None
                if leads:
                    flight = self.flights[key] = Future()
            if leads:
                return self.lead(key, flight, compute, stages)
            with stages("cache"), self.model.scheduler.watching(admitted):
                try:
                    error = flight.exception(max(0, deadline.remaining()))
                except FutureTimeout:
                    raise DeadlineExceeded("queue") from None
            if error is None:
                return flight.result(), True
            if isinstance(error, ServiceError) and error.status < 499:  # 499: its client left, this one did not
                raise error

    def lead(self, key, flight, compute, stages):
        try:
            with stages("cache"):
                answer = self.load(key)
            is_hit = answer is not None
            if not is_hit:
                answer = compute()
                self.save(key, answer)
            flight.set_result(answer)
            return answer, is_hit
        except BaseException as e:
            flight.set_exception(e)
            raise
        finally:
            with self.lock:
                del self.flights[key]

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
            return call(*arguments)
        except self.errors as e:
            with self.lock:
                first, self.in_reach = self.in_reach, False
            if first:
                log.warning("the cache is out of reach, going on without it: %s", e)
                threading.Thread(target=self.probe, name="cache-probe", daemon=True).start()
            return None

    def probe(self):
        while not self.in_reach:
            time.sleep(REDIS_PROBE_S)
            try:
                self.store.has(KEY_PREFIX)
            except self.errors:
                continue
            self.in_reach = True
            log.warning("the cache is in reach again")


def redis_store(url, ttl_s):
    """(cachelib's store on a Redis server, what it raises when that is out of reach)."""
    import redis
    client = redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S,
                                  retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    store = RedisCache(client, default_timeout=ttl_s)
    store.serializer = PlainSerializer()
    return store, (redis.RedisError, OSError)
