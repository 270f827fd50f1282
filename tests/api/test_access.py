"""Keys, limits and origins: who is let in, before a body is read, and what it looks like to those who are not."""
import base64
import collections
import contextlib
import http.client
import json
import socket
import subprocess
import time

import gevent
import pytest
import redis
import requests
from conftest import Service, encoded, free_port, need, post
from PIL import Image
from urllib3 import encode_multipart_formdata

from app import create_app
from app.api import rate_limits
from app.config import Settings, SettingsError

WHITE = encoded(Image.new("RGB", (40, 40), "white"))
KEYS = "first-key-0123456789, second-key-9876543210"


@pytest.fixture
def client_with(app):
    """client_with(**variables): a test client of an application with these settings and the model of `app`."""
    model = app.extensions["model"]

    def make(**variables):
        return create_app(Settings.parse(variables), model).test_client()
    return make


def assert_refused(answer, status, code):
    assert answer.status_code == status
    assert set(answer.json) == {"status", "error", "message", "request_id"}
    assert (answer.json["status"], answer.json["error"]) == ("error", code)
    assert answer.headers["X-Request-ID"] == answer.json["request_id"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


# --- keys ---

@pytest.mark.parametrize("headers", [{"Authorization": "Bearer first-key-0123456789"},
                                     {"Authorization": "bearer  second-key-9876543210"},
                                     {"X-API-Key": "second-key-9876543210"}])
def test_each_key_opens_in_either_header(client_with, headers):
    assert client_with(API_KEYS=KEYS).get("/info", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer first-key-012345678"},
                                     {"Authorization": "Basic first-key-0123456789"}, {"X-API-Key": ""},
                                     {"X-API-Key": KEYS}, {"X-API-Key": "Schl\u00fcssel"},
                                     {"Authorization": "first-key-0123456789"}])
@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/info", "/metrics"])
def test_without_a_valid_key_the_answer_is_401(client_with, path, headers):
    client = client_with(API_KEYS=KEYS)
    answer = client.post(path, headers=headers) if path.startswith("/predict") else client.get(path, headers=headers)
    assert_refused(answer, 401, "UNAUTHORIZED")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "first" not in answer.text


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/", "/docs", "/docs/swagger-ui.css", "/openapi.json",
                                  "/static/page.js"])
def test_probes_the_page_and_the_description_need_no_key(client_with, path):
    with client_with(API_KEYS=KEYS).get(path) as answer:  # closes a file that is sent
        assert answer.status_code == 200


def test_without_api_keys_nothing_needs_one(client):
    assert client.get("/info").status_code == 200


def test_keys_are_neither_shown_nor_logged(start_service):
    service = start_service(API_KEYS=KEYS, RATE_LIMIT="1/hour", LOG_LEVEL="debug").wait_ready()
    key = {"X-API-Key": "first-key-0123456789"}
    answers = [requests.post(service.url + "/predict", files={"file": WHITE}, headers=key, timeout=30)
               for _ in range(2)]
    answers.append(requests.get(service.url + "/info", headers=key, timeout=30))
    answers.append(requests.get(service.url + "/metrics", headers=key, timeout=30))
    assert [answer.status_code for answer in answers] == [200, 429, 200, 200]
    answers.append(requests.get(service.url + "/info", headers={"X-API-Key": "wrong-key-5555"}, timeout=30))
    service.stop()
    for secret in ("first-key", "second-key", "wrong-key"):
        assert secret not in service.log
        assert not any(secret in answer.text for answer in answers)


def test_settings_show_no_secret():
    settings = Settings.parse({"API_KEYS": KEYS, "RATE_LIMIT_STORAGE": "redis://:pass-word@127.0.0.1/0"})
    assert "first-key" not in repr(settings)
    assert "pass-word" not in repr(settings)


def test_a_refusal_comes_before_the_body(start_service):
    service = start_service(API_KEYS=KEYS).wait_ready()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=10))
                  for _ in range(100)]
        started = time.monotonic()
        for client in silent:
            client.sendall(head)
        statuses = [client.recv(100)[:13] for client in silent]  # though not a byte of the body was sent
        assert collections.Counter(statuses) == {b"HTTP/1.1 401 ": 30, b"HTTP/1.1 429 ": 70}
        assert requests.get(service.url + "/health", timeout=10).status_code == 200
        assert time.monotonic() - started < 8


def test_a_refused_upload_gets_its_answer(start_service):
    service = start_service(API_KEYS=KEYS).wait_ready()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    with contextlib.closing(connection):
        for size in (1000, 9_000_000, 60_000_000):  # http.client reads no answer before all of it is sent
            for path in ("/predict", "/predict/batch"):
                connection.request("POST", path, body=bytes(size), headers={"Content-Type": "image/png"})
                answer = connection.getresponse()
                assert (answer.status, json.loads(answer.read())["error"]) == (401, "UNAUTHORIZED")
                assert answer.headers["Connection"] == "close"  # so that the next request opens another
        connection.request("POST", "/predict", body=WHITE, headers={"X-API-Key": "first-key-0123456789"})
        assert connection.getresponse().status == 200
    assert "curl -H 'Authorization: Bearer KEY' -F file=@" in service.log  # how to try it


# --- guessing ---

GOOD, OTHER, WRONG = "first-key-0123456789", "second-key-9876543210", "wrong-key-{}"


def predict_from(client, address, key=None, path="/predict", headers=()):
    """A real prediction from an address with a key, or, with key=None, without one."""
    body, content_type = encode_multipart_formdata({"file": ("picture.png", WHITE)})
    headers = {**dict(headers), **({} if key is None else {"X-API-Key": key})}
    return client.post(path, data=body, content_type=content_type, headers=headers,
                       environ_base={"REMOTE_ADDR": address})


def test_keys_cannot_be_guessed_at_full_speed(client_with):
    client = client_with(API_KEYS=KEYS)
    guesses = [predict_from(client, "10.0.0.1", WRONG.format(i)) for i in range(35)]
    assert [answer.status_code for answer in guesses] == [401] * 30 + [429] * 5
    assert_refused(guesses[-1], 429, "RATE_LIMITED")
    assert 1 <= int(guesses[-1].headers["Retry-After"]) <= 61
    assert "30 per 1 minute" in guesses[-1].json["message"]
    # Now the right key is refused as well: an answer would tell the guesser that it is the right one.
    assert_refused(predict_from(client, "10.0.0.1", GOOD), 429, "RATE_LIMITED")
    assert client.get("/info", headers={"X-API-Key": GOOD},
                      environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code == 429
    assert predict_from(client, "10.0.0.2", GOOD).status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/info", "/metrics"])
def test_requests_without_a_key_are_limited_on_every_path_that_needs_one(client_with, path):
    client = client_with(API_KEYS=KEYS)
    method = "POST" if path.startswith("/predict") else "GET"
    statuses = [client.open(path, method=method).status_code for _ in range(31)]
    assert statuses == [401] * 30 + [429]
    for is_open in ("/health", "/ready", "/live", "/", "/docs", "/openapi.json"):
        assert client.get(is_open).status_code == 200


def test_a_guesser_does_not_lock_out_those_who_share_its_address(client_with):
    client = client_with(API_KEYS=KEYS)
    assert predict_from(client, "10.0.0.1", GOOD).status_code == 200
    for i in range(31):
        predict_from(client, "10.0.0.1", WRONG.format(i))
    assert predict_from(client, "10.0.0.1", GOOD).status_code == 200
    assert predict_from(client, "10.0.0.1", OTHER).status_code == 429  # it has not been used from there yet
    assert predict_from(client, "10.0.0.1", GOOD).status_code == 200


def test_valid_requests_do_not_count_as_guesses(client_with):
    client = client_with(API_KEYS=KEYS)
    def status(key):
        return client.get("/info", headers={"X-API-Key": key}).status_code
    assert [status(WRONG) for _ in range(28)] == [401] * 28
    assert [status(key) for _ in range(20) for key in (GOOD, OTHER)] == [200] * 40
    assert [status(WRONG) for _ in range(3)] == [401, 401, 429]


def test_guesses_from_one_ipv6_network_or_behind_a_proxy_count_per_client(client_with):
    client = client_with(API_KEYS=KEYS, TRUSTED_PROXIES="1")

    def forwarded(address):
        return predict_from(client, "10.0.0.9", WRONG, headers={"X-Forwarded-For": address}).status_code
    assert {forwarded(f"2001:db8::{i:x}") for i in range(1, 31)} == {401}
    assert [forwarded("2001:db8::ffff"), forwarded("2001:db8:0:1::1"), forwarded("10.0.0.1")] == [429, 401, 401]


def test_guesses_do_not_use_up_the_limit_of_predictions(client_with):
    client = client_with(API_KEYS=KEYS, RATE_LIMIT="2/hour")
    for i in range(5):
        assert predict_from(client, "10.0.0.1", WRONG.format(i)).status_code == 401
    assert [predict_from(client, "10.0.0.1", GOOD).status_code for _ in range(3)] == [200, 200, 429]


@pytest.fixture(scope="module")
def services_over_redis(tmp_path_factory, redis_server, model_dir, app):
    """(two ready Services with KEYS and six predictions an hour, their Redis's URL); three workers in all."""
    folder = tmp_path_factory.mktemp("over-redis")
    url = redis_server.database() + "?socket_timeout=30"  # however busy the machine, it is no outage
    variables = {"RATE_LIMIT": "6/hour", "RATE_LIMIT_STORAGE": url, "API_KEYS": KEYS, "DEVICE": "cpu",
                 "MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir)}
    services = [Service(folder, {**variables, "WORKERS": workers}, "tests.hanging_model:create_patient()")
                for workers in "21"]
    yield [service.wait_ready() for service in services], url
    for service in services:
        service.kill()


@pytest.fixture
def over_redis(services_over_redis):
    """(the two Services, a connection to their Redis), with all counts at 0."""
    services, url = services_over_redis
    with redis.Redis.from_url(url) as connection:
        connection.flushdb()
        yield services, connection


def test_redis_counts_guesses_over_workers_and_services(over_redis):
    services, connection = over_redis
    statuses = [requests.post(service.url + "/predict", files={"file": WHITE}, timeout=30,
                              headers={"X-API-Key": WRONG.format(i)}).status_code
                for i in range(17) for service in services]
    assert statuses == [401] * 30 + [429] * 4
    names = b" ".join(connection.keys())
    assert b"127.0.0.1" in names
    assert b"wrong-key" not in names


def test_guesses_are_limited_while_redis_is_unreachable(client_with):
    client = client_with(API_KEYS=KEYS, RATE_LIMIT_STORAGE=f"redis://127.0.0.1:{free_port()}/0")
    assert predict_from(client, "10.0.0.2", GOOD).status_code == 200
    assert [predict_from(client, "10.0.0.1", WRONG).status_code for _ in range(32)] == [401] * 30 + [429] * 2


# --- limits ---

def post_batch(client, files):
    body, content_type = encode_multipart_formdata([("files", (f"{i}.png", WHITE)) for i in range(files)])
    return client.post("/predict/batch", data=body, content_type=content_type)


def test_a_batch_counts_as_its_files(client_with):
    client = client_with(RATE_LIMIT="5/hour")
    answers = [post_batch(client, 3), post_batch(client, 3), post(client, WHITE), post(client, WHITE)]
    # Three of five are spent; the second batch does not fit and costs one, so one more is left.
    assert [answer.status_code for answer in answers] == [200, 429, 200, 429]
    assert answers[0].json["count"] == 3
    assert_refused(answers[1], 429, "RATE_LIMITED")
    assert "5 per 1 hour" in answers[1].json["message"]
    assert "each file of a batch counts" in answers[1].json["message"]
    assert 1 <= int(answers[1].headers["Retry-After"]) <= 3601


def test_a_batch_larger_than_the_limit_is_never_predicted(client_with):
    client = client_with(RATE_LIMIT="2/minute")
    answer = post_batch(client, 16)
    assert_refused(answer, 429, "RATE_LIMITED")
    assert "fewer files" in answer.json["message"]
    assert post(client, WHITE).status_code == 200


def test_instances_of_a_json_batch_count_too(client_with):
    client = client_with(RATE_LIMIT="4/hour")
    instances = [{"b64": base64.b64encode(WHITE).decode()}] * 4
    assert client.post("/predict/batch", json={"instances": instances}).json["count"] == 4
    assert post(client, WHITE).status_code == 429


def test_every_limit_of_several_counts_the_files(client_with):
    client = client_with(RATE_LIMIT="100/hour;4/day")
    assert [post_batch(client, n).status_code for n in (3, 2, 1)] == [200, 429, 429]


def test_redis_counts_the_files_of_batches(over_redis):
    services, _ = over_redis
    answers = [requests.post(service.url + "/predict/batch", timeout=60, headers={"X-API-Key": OTHER},
                             files=[("files", (f"{i}.png", WHITE)) for i in range(3)])
               for service in (*services, *services)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]


def test_while_redis_is_unreachable_files_are_counted_here(client_with):
    client = client_with(RATE_LIMIT="4/hour", RATE_LIMIT_STORAGE=f"redis://127.0.0.1:{free_port()}/0")
    assert [post_batch(client, 3).status_code, post_batch(client, 2).status_code] == [200, 429]


def test_over_the_limit_the_answer_is_429_with_the_time_to_wait(client_with):
    client = client_with(RATE_LIMIT="2/minute")
    assert [post(client, WHITE).status_code for _ in range(2)] == [200, 200]
    answer = post(client, WHITE)
    assert_refused(answer, 429, "RATE_LIMITED")
    assert 1 <= int(answer.headers["Retry-After"]) <= 61  # the limiter adds a second, as Redis rounds
    assert "2 per 1 minute" in answer.json["message"]


def test_after_the_time_to_wait_the_client_is_served_again(client_with):
    client = client_with(RATE_LIMIT="1/second;100/day")
    for _ in range(20):  # two within a second are enough
        refused = post(client, WHITE)
        if refused.status_code != 200:
            break
    assert refused.status_code == 429
    assert "1 per 1 second" in refused.json["message"]
    assert "100 per" not in refused.json["message"]
    time.sleep(int(refused.headers["Retry-After"]))
    assert post(client, WHITE).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/", "/info", "/metrics"])
def test_only_predictions_are_limited(client_with, path):
    client = client_with(RATE_LIMIT="1/hour")
    assert [client.get(path).status_code for _ in range(4)] == [200] * 4


def test_predictions_and_batches_count_together(client_with):
    client = client_with(RATE_LIMIT="2/hour")
    asked = [("POST", "/predict"), ("POST", "/predict/batch"), ("PUT", "/predict"), ("POST", "/predict/batch")]
    answers = [client.open(path, method=method, data=WHITE, content_type="image/png") for method, path in asked]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert answers[1].json["results"][0]["status"] == "success"
    for answer in answers[2:]:
        assert_refused(answer, 429, "RATE_LIMITED")


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_refused_uploads_count_too(client_with, path):
    client = client_with(RATE_LIMIT="2/hour")
    sent = [(b"no picture", "image/png"), (WHITE, "text/html"), (WHITE, "image/png")]
    statuses = [client.post(path, data=data, content_type=content_type).status_code for data, content_type in sent]
    assert statuses[0] in (400, 422)
    assert statuses[1:] == [415, 429]


def test_each_client_has_a_limit_of_its_own(client_with):
    def status(address, **headers):
        return client.post("/predict", environ_base={"REMOTE_ADDR": address}, headers=headers, data=WHITE,
                           content_type="image/png").status_code
    client = client_with(RATE_LIMIT="1/hour")
    assert [status("10.0.0.1"), status("10.0.0.1"), status("10.0.0.2")] == [200, 429, 200]
    assert [status("2001:db8::1"), status("2001:db8::2"), status("2001:db8:0:1::1")] == [200, 429, 200]
    assert [status("::ffff:10.0.0.2"), status("::ffff:10.0.0.3"), status("::ffff:10.0.0.4")] == [429, 200, 200]
    client = client_with(RATE_LIMIT="1/hour", API_KEYS="a,b")
    assert [status("10.0.0.1", X_API_KEY="a"), status("10.0.0.2", X_API_KEY="a"), status("10.0.0.1", X_API_KEY="b"),
            status("10.0.0.1")] == [200, 429, 200, 401]


@pytest.mark.parametrize(("trusted", "statuses"), [("0", [200, 429, 429]), ("1", [200, 200, 429])])
def test_forwarded_addresses_count_behind_trusted_proxies_only(client_with, trusted, statuses):
    client = client_with(RATE_LIMIT="1/hour", TRUSTED_PROXIES=trusted)
    answers = [client.post("/predict", headers={"X-Forwarded-For": address}, data=WHITE, content_type="image/png")
               for address in ("10.0.0.1", "10.0.0.2", "6.6.6.6, 10.0.0.2")]
    assert [answer.status_code for answer in answers] == statuses


@pytest.fixture
def start_redis(tmp_path):
    """start_redis(port): a real Redis server on loopback, stopped at the end."""
    servers = []

    def start(port):
        program = need("redis-server")
        servers.append(subprocess.Popen([program, "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                                         "--dir", str(tmp_path)], stdout=subprocess.DEVNULL))
        until = time.monotonic() + 20
        with redis.Redis(port=port) as connection:
            while True:
                try:
                    connection.ping()
                    return servers[-1]
                except redis.ConnectionError:
                    assert time.monotonic() < until
                    time.sleep(0.02)
    yield start
    for server in servers:
        server.kill()
        server.wait()


def test_redis_holds_the_limit_over_workers_and_services(over_redis):
    services, connection = over_redis
    key = {"X-API-Key": GOOD}
    statuses = [requests.post(service.url + "/predict", files={"file": WHITE}, headers=key, timeout=30).status_code
                for _ in range(5) for service in services]
    assert statuses == [200] * 6 + [429] * 4
    assert not any("Traceback" in service.log for service in services)
    names = b" ".join(connection.keys())
    assert names
    assert b"first-key" not in names


def test_an_unreachable_redis_breaks_no_answer(client_with, start_redis, caplog):
    port = free_port()
    client = client_with(RATE_LIMIT="3/hour", RATE_LIMIT_STORAGE=f"redis://:pass-word@127.0.0.1:{port}/0")
    assert [post(client, WHITE).status_code for _ in range(4)] == [200, 200, 200, 429]  # it counts by itself
    assert "pass-word" not in caplog.text
    assert [r.levelname for r in caplog.records if "memory" in r.getMessage()] == ["WARNING"]


def test_a_redis_that_dies_or_hangs_breaks_no_answer_and_comes_back(client_with, start_redis):
    port = free_port()
    server = start_redis(port)
    client = client_with(RATE_LIMIT="20/hour", RATE_LIMIT_STORAGE=f"redis://127.0.0.1:{port}/0")
    assert post(client, WHITE).status_code == 200
    server.send_signal(19)  # SIGSTOP: it takes connections and says nothing
    started = time.monotonic()
    assert [post(client, WHITE).status_code for _ in range(3)] == [200] * 3
    assert time.monotonic() - started < 20  # without a limit they would wait for ever
    server.kill()
    server.wait()
    assert post(client, WHITE).status_code == 200
    start_redis(port)
    with redis.Redis(port=port) as connection:
        until = time.monotonic() + 30
        while not connection.keys():  # counted there again
            assert post(client, b"").status_code in (400, 429)
            assert time.monotonic() < until
            time.sleep(0.2)


def test_a_redis_that_hangs_is_waited_for_once_not_by_one_request_after_the_other(start_redis, monkeypatch):
    port = free_port()
    server = start_redis(port)
    counts, limits = rate_limits.Counts(f"redis://127.0.0.1:{port}/0"), rate_limits.parse("1000/hour")
    assert counts.breach(limits, "predictions", "a") is None
    server.send_signal(19)  # SIGSTOP
    waited, first_breach = [], rate_limits.first_breach
    monkeypatch.setattr(rate_limits, "first_breach", lambda limiter, *asked: (
        waited.append(1) if limiter is counts.shared else None) or first_breach(limiter, *asked))
    waiting = [gevent.spawn(counts.breach, limits, "predictions", "a") for _ in range(900)]
    gevent.joinall(waiting, raise_error=True)
    assert [greenlet.value for greenlet in waiting] == [None] * 900
    assert 0 < len(waited) < 300  # those that ten threads had begun by then


# --- origins ---

def test_allowed_origins_may_read_the_answers(client_with):
    client = client_with(CORS_ORIGINS="https://shop.example, http://localhost:3000", API_KEYS=KEYS, RATE_LIMIT="1/hour")
    asked = "authorization, content-type, traceparent, tracestate"
    for origin in ("https://shop.example", "http://localhost:3000"):
        preflight = client.options("/predict", headers={
            "Origin": origin, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": asked})
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] == origin
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert preflight.headers["Access-Control-Allow-Headers"] == asked
        refused = client.post("/predict", headers={"Origin": origin})
        assert refused.status_code == 401
        assert refused.headers["Access-Control-Allow-Origin"] == origin
        assert "X-Request-ID" in refused.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in refused.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "https://shop.example.evil.example", "https://shopXexample",
                                    "http://shop.example", "null"])
def test_other_origins_may_not(client_with, origin):
    answer = client_with(CORS_ORIGINS="https://shop.example").get("/health", headers={"Origin": origin})
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_star_allows_every_origin(client_with):
    answer = client_with(CORS_ORIGINS="*").get("/health", headers={"Origin": "https://anyone.example"})
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_without_origins_there_are_no_cors_headers(client):
    answer = client.get("/health", headers={"Origin": "https://shop.example"})
    assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]


# --- settings ---

@pytest.mark.parametrize(("variable", "text", "takes"), [
    ("RATE_LIMIT", "60", "a limit such as 60/minute"),
    ("RATE_LIMIT", "60/fortnight", "a limit such as 60/minute"),
    ("RATE_LIMIT", "-1/minute", "a limit such as 60/minute"),
    ("CORS_ORIGINS", "example.org", "* or comma-separated origins such as https://example.org"),
    ("CORS_ORIGINS", "https://a.example/path", "* or comma-separated origins"),
    ("CORS_ORIGINS", "https://.*", "* or comma-separated origins"),
    ("TRUSTED_PROXIES", "yes", "an integer from 0 to 10"),
])
def test_bad_value_is_refused_in_one_line(variable, text, takes):
    with pytest.raises(SettingsError) as e:
        Settings.parse({variable: text})
    assert str(e.value).startswith(f"{variable} must be {takes}")
    assert str(e.value).endswith(f"got {text!r}")


@pytest.mark.parametrize(("variable", "text"), [
    ("API_KEYS", ","), ("API_KEYS", "has space"), ("API_KEYS", "good-key,Schl\u00fcssel"),
    ("CACHE_URL", "http://:pass-word@127.0.0.1"), ("RATE_LIMIT_STORAGE", "http://:pass-word@127.0.0.1"),
    ("RATE_LIMIT_STORAGE", "redis://")])
def test_bad_value_of_a_secret_is_refused_without_showing_it(variable, text):
    with pytest.raises(SettingsError) as e:
        Settings.parse({variable: text})
    assert str(e.value).startswith(f"{variable} must be ")
    assert str(e.value).endswith("got something else")
