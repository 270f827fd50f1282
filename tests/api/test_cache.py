"""The result cache: what is kept, for how long, and what happens without its Redis."""
import base64
import contextlib
import copy
import dataclasses
import signal
import subprocess
import threading
import time

import gevent
import pytest
import redis
from conftest import encoded, free_port, need, photo, post

from app import create_app
from app.api.cache import KEY_PREFIX, REDIS_TIMEOUT_S
from app.config import Settings, SettingsError
from app.engine.slots import Slots
from app.errors import ServiceError

CAT, COFFEE = encoded(photo("chelsea"), "JPEG"), encoded(photo("coffee"), "PNG")


class RedisServer:
    """A real redis-server on a free port of loopback, that keeps nothing on disk."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [need("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--dir", str(self.folder)], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(redis.ConnectionError):
                return self.client.ping()
            time.sleep(0.02)
        raise AssertionError("redis-server does not answer")

    def stop(self):
        self.process.kill()  # it may have been stopped
        self.process.wait(10)


@pytest.fixture
def redis_server(tmp_path):
    server = RedisServer(tmp_path)
    yield server
    server.client.close()
    server.stop()


@pytest.fixture
def cached(app, settings, monkeypatch):
    """cached(url, **settings): a client of the service with that cache, which is patient with Redis."""
    monkeypatch.setattr("app.api.cache.REDIS_TIMEOUT_S", 10)
    clients = []

    def make(url="memory://", **changes):
        cached_app = create_app(dataclasses.replace(settings, cache_url=url, **changes), app.extensions["model"])
        clients.append(cached_app)
        return cached_app.test_client()
    yield make
    for cached_app in clients:
        store = cached_app.extensions["cache"].store
        if hasattr(store, "_read_client"):
            store._read_client.close()
            cached_app.extensions["cache"].in_reach = True  # ends its probe


def x_cache(response):
    assert response.status_code == 200
    return response.headers.get("X-Cache")


@pytest.fixture(params=["memory", "redis"])
def url(request):
    return "memory://" if request.param == "memory" else request.getfixturevalue("redis_server").url


def test_there_is_none_by_default(client):
    assert Settings().cache_url is None
    assert [x_cache(post(client, CAT)) for _ in range(2)] == [None, None]


def test_the_same_file_and_options_hit(cached, url):
    client = cached(url)
    first, second = post(client, CAT, "a.jpg"), post(client, CAT, "b.jpg")
    assert (x_cache(first), x_cache(second)) == ("miss", "hit")
    assert first.json["predictions"] == second.json["predictions"]
    metadata = second.json["metadata"]
    assert metadata["filename"] == "b.jpg"
    assert metadata["image_size"] == [451, 300]
    assert metadata["inference_time"] == 0
    assert list(metadata["timings_ms"]) == ["read", "cache"]
    as_json = client.post("/predict", json={"image": base64.b64encode(CAT).decode(), "top_k": 5})
    assert x_cache(as_json) == "hit"


@pytest.mark.parametrize("other", [
    lambda manifest: {"weights": {**manifest.weights, "sha256": "0" * 64}},
    lambda manifest: {"quantization": {"chosen": "int8"}, "files": {"model.bin": "0" * 64}}],  # calibrated anew
    ids=["weights", "int8"])
def test_another_file_other_options_or_another_model_miss(cached, url, app, monkeypatch, other):
    client = cached(url)
    post(client, CAT)
    assert x_cache(post(client, CAT, top_k=1)) == "miss"
    assert len(post(client, CAT, top_k=1).json["predictions"]) == 1
    assert x_cache(post(client, CAT + b"\0")) == "miss"
    assert x_cache(post(client, CAT)) == "hit"
    loader = app.extensions["model"]
    model, manifest = copy.copy(loader.current), loader.current.task.manifest
    model.task = copy.copy(model.task)
    model.task.manifest = dataclasses.replace(manifest, **other(manifest))
    model.__dict__.pop("identity", None)
    monkeypatch.setattr(loader, "current", model)
    assert x_cache(post(client, CAT)) == "miss"


def test_answers_expire(cached, url):
    client = cached(url, cache_ttl=1)
    post(client, CAT)
    time.sleep(2.1)
    assert x_cache(post(client, CAT)) == "miss"


def test_errors_are_not_kept(cached, url):
    client = cached(url)
    for _ in range(2):
        response = post(client, b"no picture")
        assert response.json["error"] == "INVALID_IMAGE"
        assert "X-Cache" not in response.headers


def test_an_error_writes_no_stack_trace(cached, capfd):
    assert post(cached(), b"").json["error"] == "EMPTY_FILE"
    assert "Traceback" not in capfd.readouterr().err


def test_memory_is_bounded(cached):
    client = cached()
    cache = client.application.extensions["cache"]
    for i in range(1100):
        cache.save(str(i), {"predictions": []})
    assert len(cache.store._cache) <= 1025


def test_a_batch_uses_the_cache(cached):
    client = cached()
    post(client, CAT)
    picture = base64.b64encode(CAT).decode()
    results = client.post("/predict/batch", json={"instances": [picture] * 3}).json["results"]
    assert [r["metadata"]["inference_time"] for r in results] == [0, 0, 0]


class Counting:
    """An engine's infer that waits at a gate and counts its calls."""

    def __init__(self, engine):
        self.infer, self.gate, self.calls = engine.infer, threading.Event(), []

    def __call__(self, *arguments):
        self.calls.append(1)
        assert self.gate.wait(10)
        return self.infer(*arguments)


def at_once(client, count, data=CAT):
    """Start `count` equal requests; returns their greenlets, and a function that waits for their responses."""
    greenlets = [gevent.spawn(post, client.application.test_client(), data) for _ in range(count)]
    return greenlets, lambda: [greenlet.get(timeout=20) for greenlet in greenlets]


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        gevent.sleep(0.005)


def test_equal_requests_at_once_compute_once(cached, url, app, monkeypatch):
    loader = app.extensions["model"]
    counting = Counting(loader.current.task.engine)
    monkeypatch.setattr(loader.current.task.engine, "infer", counting)
    client = cached(url)
    _, finish = at_once(client, 6)
    wait_until(lambda: loader.slots.onlookers == 5)
    counting.gate.set()
    responses = finish()
    assert sorted(x_cache(r) for r in responses) == ["hit"] * 5 + ["miss"]
    assert len(counting.calls) == 1
    assert loader.slots.onlookers == 0


def test_who_waits_for_an_equal_request_stands_in_the_queue(cached, app, monkeypatch):
    loader = app.extensions["model"]
    counting = Counting(loader.current.task.engine)
    monkeypatch.setattr(loader.current.task.engine, "infer", counting)
    monkeypatch.setattr(loader, "slots", Slots(1, max_queue=2))
    client = cached()
    greenlets, finish = at_once(client, 5)
    wait_until(lambda: loader.slots.onlookers == 2 and sum(greenlet.ready() for greenlet in greenlets) == 2)
    counting.gate.set()
    assert sorted(r.status_code for r in finish()) == [200, 200, 200, 503, 503]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ServiceError(503, "OVERLOADED", "Later."),
                                   ServiceError(499, "CLIENT_CLOSED_REQUEST", "The client left.")])
def test_when_the_one_that_computes_fails_the_next_one_computes(cached, app, monkeypatch, error):
    loader = app.extensions["model"]
    counting = Counting(loader.current.task.engine)

    def infer(*arguments):
        scores = counting(*arguments)
        if len(counting.calls) == 1:
            raise error
        return scores
    monkeypatch.setattr(loader.current.task.engine, "infer", infer)
    _, finish = at_once(cached(), 3)
    wait_until(lambda: loader.slots.onlookers == 2)
    counting.gate.set()
    assert sorted(r.status_code for r in finish()) == [200, 200, getattr(error, "status", 500)]


def test_redis_is_shared_and_holds_plain_json(cached, redis_server):
    one, other = cached(redis_server.url), cached(redis_server.url)
    post(one, CAT)
    assert x_cache(post(other, CAT)) == "hit"
    key, = redis_server.client.keys(f"{KEY_PREFIX}*")
    assert redis_server.client.get(key).startswith(b'{"predictions": [{"class": "tiger cat"')
    assert 0 < redis_server.client.ttl(key) <= 3600


@pytest.mark.parametrize("planted", [b"not json", b"!\x80\x04cposix\nsystem\n", b"\xff"])
def test_what_others_put_into_redis_is_never_run(cached, redis_server, planted):
    client = cached(redis_server.url)
    answer = post(client, CAT).json["predictions"]
    key, = redis_server.client.keys(f"{KEY_PREFIX}*")
    redis_server.client.set(key, planted)
    response = post(client, CAT)
    assert x_cache(response) == "miss"
    assert response.json["predictions"] == answer


def test_redis_that_goes_and_comes_back(cached, redis_server, caplog):
    client = cached(redis_server.url)
    assert [x_cache(post(client, CAT)) for _ in range(2)] == ["miss", "hit"]
    redis_server.stop()
    assert [x_cache(post(client, CAT)) for _ in range(5)] == ["miss"] * 5
    warnings = [r.getMessage() for r in caplog.records if r.name == "app.api.cache"]
    assert len(warnings) == 1
    assert warnings[0].startswith("the cache is unreachable, going on without it:")
    redis_server.start()
    wait_until(lambda: client.application.extensions["cache"].in_reach)
    assert [x_cache(post(client, CAT)) for _ in range(2)] == ["miss", "hit"]


def test_redis_that_never_answers_costs_milliseconds(cached, redis_server, monkeypatch):
    monkeypatch.setattr("app.api.cache.REDIS_TIMEOUT_S", REDIS_TIMEOUT_S)
    client = cached(redis_server.url)
    post(client, CAT)
    redis_server.process.send_signal(signal.SIGSTOP)
    spent = []
    for _ in range(4):
        started = time.perf_counter()
        assert x_cache(post(client, CAT)) == "miss"
        spent.append(time.perf_counter() - started)
    assert max(spent) < 5
    redis_server.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("text", ["memory", "memory://x", "memcached://127.0.0.1", "redis://", "redis:"])
def test_bad_cache_url(text):
    with pytest.raises(SettingsError, match="CACHE_URL must be memory:// or the URL of a Redis server"):
        Settings.parse({"CACHE_URL": text})
