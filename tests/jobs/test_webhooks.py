"""Callbacks: which URLs, how they are signed, and that every delivery is made at least once and recorded."""
import base64
import hashlib
import hmac
import json
import re
import threading
import time
import uuid

import pytest
from conftest import documentation
from hostile_server import HostileServer, repeatedly
from sqlalchemy import insert, select, update

from app.config import Settings, SettingsError
from app.data import database as database_module
from app.data import schema
from app.data.database import Database
from app.errors import ServiceError
from app.jobs import webhooks
from app.jobs.answers import job_body
from app.outbound.event_loop import run

pytestmark = pytest.mark.usefixtures("own_board", "patient")  # what they count is not for /metrics of later tests

SECRET = "a secret of 23 characters".replace(" ", "_")
ACCEPTED = b"HTTP/1.1 204 No Content\r\n\r\n"
LONG_S = 120  # for what only a machine that is very busy takes so long for


def settings(**variables):
    return Settings.parse({"JOBS": "on", "CALLBACK_SECRET": SECRET, "PRIVATE_NETWORKS": "127.0.0.0/8",
                           **variables}).optional


@pytest.fixture
def patient(monkeypatch):
    """No attempt ends because the machine is slow, and no process waits too long for another one's transaction."""
    monkeypatch.setattr(webhooks, "WITHIN_S", LONG_S)
    monkeypatch.setattr(webhooks, "LEASE_S", 2 * LONG_S)
    monkeypatch.setattr(database_module, "LOCK_WITHIN_S", LONG_S)


@pytest.fixture
def receiver():
    one = HostileServer({"/hook": ACCEPTED})
    yield one
    one.close()


@pytest.fixture
def database(request, tmp_path):
    one = Database(f"sqlite:///{tmp_path / 'service.db'}")
    yield one
    one.close()


def due(database, url, **columns):
    """A delivery that is due; returns its id."""
    row = {"id": uuid.uuid4().hex, "job_id": "j1", "url": url, "state": "pending", "created_at": time.time(),
           "next_at": time.time() - 1, "attempts_json": "[]", **columns}
    with database.begin() as connection:
        connection.execute(insert(schema.deliveries).values(row))
    return row["id"]


def delivery(database, delivery_id):
    with database.read() as connection:
        found = connection.execute(select(schema.deliveries).where(schema.deliveries.c.id == delivery_id))
        row = found.mappings().one()
        return {**row, "attempts": json.loads(row["attempts_json"])}


RESULT = {"status": "success", "predictions": [{"class": "naïve ☃", "confidence": 0.5}]}
JOB = {"id": "j1", "state": "succeeded", "request_id": "r1", "model": "m", "version": None, "queue": "short",
       "created_at": 1.0, "started_at": 2.0, "ended_at": 3.0, "expires_at": 4.0, "attempt": 1, "done": 1, "total": 1,
       "cancel_requested": False, "unit": "files", "callback_url": "https://example.org/", "error_json": None,
       "result_json": json.dumps(RESULT)}


def message_of(row):
    return webhooks.message(row["id"], JOB)


def run_due(database, optional, message_of=message_of, slow=None):
    return webhooks.run_due(database, optional, message_of, {} if slow is None else slow)


def allowing(receiver, **variables):
    return settings(CALLBACK_URLS=receiver.url + "/", **variables)


# --- URLs ---

@pytest.mark.parametrize("url", [
    "https://example.org/hook", "http://example.org/hook?a=1", "http://10.1.2.3/", "https://example.org:443/",
])
def test_any_public_host_may_be_called_unless_settings_say_which(url):
    webhooks.check_callback(url, settings(PRIVATE_NETWORKS="10.0.0.0/8"))


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://169.254.169.254/latest/meta-data",
    "http://2130706433/", "https://example.org:8443/", "http://example.org:22/", "ftp://example.org/", "s3://bucket/key",
    "http://user:secret@example.org/", "/hook", "", None, 5, "https://example.org/\r\nX: y",
])
def test_other_urls_may_not(url):
    with pytest.raises(ServiceError, match="callback_url must be") as e:
        webhooks.check_callback(url, settings(PRIVATE_NETWORKS=""))
    assert (e.value.status, e.value.code) == (400, "INVALID_PARAMETER")


def test_only_what_callback_urls_allows():
    optional = settings(CALLBACK_URLS="https://example.org:8443/hooks/,https://*.example.net")
    for url in ("https://example.org:8443/hooks/1", "https://a.example.net/x"):
        webhooks.check_callback(url, optional)
    for url in ("https://example.org/hooks/1", "https://example.org:8443/", "https://example.net/",
                "https://example.org:8443/hooks/../x"):
        with pytest.raises(ServiceError, match="CALLBACK_URLS"):
            webhooks.check_callback(url, optional)


def test_without_a_secret_there_are_no_callbacks():
    with pytest.raises(ServiceError, match="CALLBACK_SECRET") as e:
        webhooks.check_callback("https://example.org/", settings(CALLBACK_SECRET=""))
    assert e.value.code == "INVALID_PARAMETER"


def test_a_secret_that_cannot_be_decoded_is_a_mistake_in_the_settings():
    for secret in ("whsec_" + 20 * "?", "whsec_abcdefghijklmnopqrstuvw", "too short"):
        with pytest.raises(SettingsError, match="CALLBACK_SECRET") as e:
            settings(CALLBACK_SECRET=secret)
        assert secret not in str(e.value)


# --- signatures ---

def verified(request, key):
    """The message in a received request, whose signature is computed here as the specification of Standard Webhooks
    says: HMAC-SHA256 of id.timestamp.body, in base64, after "v1,"."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [line.split(b": ", 1) for line in head.split(b"\r\n")[1:]]
    headers = {name.lower().decode(): value.decode() for name, value in lines}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert headers["content-type"] == "application/json"
    message = json.loads(body)
    assert message["id"] == headers["webhook-id"]
    return message


def test_the_specifications_example():
    """https://github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md"""
    headers = webhooks.signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330,
                              b'{"test": 2432232314}')
    assert headers["Webhook-Signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(("secret", "key"), [
    (SECRET, SECRET.encode()), ("whsec_" + base64.b64encode(bytes(range(32))).decode(), bytes(range(32)))])
def test_messages_are_signed(receiver, secret, key):
    row = {"id": "d1", "url": receiver.url + "/hook"}
    made, _ = run(webhooks.attempt(row, message_of(row), allowing(receiver, CALLBACK_SECRET=secret)))
    assert (made["status"], made["error"]) == (204, None)
    assert made["ms"] >= 0
    assert abs(made["at"] - time.time()) < 60
    assert verified(receiver.requests[0], key) == {"event": "job.succeeded", "id": "d1", "job": job_body(JOB, [])}
    assert verified(receiver.requests[0], key)["job"]["result"] == RESULT


def test_the_documentations_receiver_accepts_them_and_no_others(receiver):
    code = re.search(r"<!-- verify -->\n```python\n(.*?)```", documentation(), re.S)[1]
    exec(code, readme := {})
    body = b'{"event": "job.failed"}'
    for secret in (SECRET, "whsec_" + base64.b64encode(bytes(32)).decode()):
        headers = webhooks.signed(secret, "d1", int(time.time()), body)
        readme["verify"](secret, headers, body)
        old = webhooks.signed(secret, "d1", int(time.time()) - 400, body)
        for forged in (("another" + SECRET, headers, body), (secret, headers, body + b" "), (secret, old, body),
                       (secret, {**headers, "Webhook-Id": "d2"}, body)):
            with pytest.raises(ValueError, match="not from this service"):
                readme["verify"](*forged)


# --- deliveries ---

def test_a_delivery_that_is_accepted_is_over(database, receiver):
    delivery_id = due(database, receiver.url + "/hook")
    assert run_due(database, allowing(receiver)) == 1
    row = delivery(database, delivery_id)
    assert (row["state"], row["next_at"]) == ("delivered", None)
    assert [(one["status"], one["error"]) for one in row["attempts"]] == [(204, None)]
    assert run_due(database, allowing(receiver)) == 0
    assert len(receiver.requests) == 1


def test_what_is_not_due_yet_waits(database, receiver):
    due(database, receiver.url + "/hook", next_at=time.time() + 60)
    due(database, receiver.url + "/hook", state="failed")
    assert run_due(database, allowing(receiver)) == 0
    assert receiver.requests == []


@pytest.mark.parametrize(("answer", "status", "error"), [
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", 500, None),
    (b"HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n", 302, "redirects are not followed"),
    (b"", None, "its server ended the connection before it had sent everything"),
    (repeatedly(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.05), None, "no answer within 0.2 s"),
])
def test_what_fails_is_repeated_later_with_the_same_id(database, receiver, monkeypatch, answer, status, error):
    receiver.answers["/hook"] = answer
    delivery_id = due(database, receiver.url + "/hook")
    before = time.time()
    with monkeypatch.context() as patch:
        if "no answer" in (error or ""):
            patch.setattr(webhooks, "WITHIN_S", 0.2)
        run_due(database, allowing(receiver))
    row = delivery(database, delivery_id)
    assert row["state"] == "pending"
    assert [(one["status"], one["error"]) for one in row["attempts"]] == [(status, error)]
    assert before + 5 * 0.8 <= row["next_at"] <= time.time() + 5 * 1.2
    receiver.answers["/hook"] = ACCEPTED
    with database.begin() as connection:
        connection.execute(update(schema.deliveries).values(next_at=time.time()))
    run_due(database, allowing(receiver))
    row = delivery(database, delivery_id)
    assert row["state"] == "delivered"
    assert [one["status"] for one in row["attempts"]] == [status, 204]
    assert {verified(request, SECRET.encode())["id"] for request in receiver.requests} == {delivery_id}
    assert all(request.startswith(b"POST /hook ") for request in receiver.requests)


@pytest.mark.parametrize(("status", "retry_after", "least_s", "most_s"), [
    (503, b"100", 100, 120), (429, b"100", 100, 120), (503, b"1", 4, 6), (503, b"99999999", 21_600, 26_000),
    (503, b"-5", 4, 6), (503, b"soon", 4, 6), (503, b"Wed, 21 Oct 2015 07:28:00 GMT", 4, 6),
    (503, b"Fri, 01 Jan 9999 00:00:00 GMT", 21_600, 26_000)])
def test_a_receiver_may_ask_for_time(database, receiver, status, retry_after, least_s, most_s):
    receiver.answers["/hook"] = b"HTTP/1.1 %d No\r\nRetry-After: %s\r\n\r\n" % (status, retry_after)
    delivery_id, before = due(database, receiver.url + "/hook"), time.time()
    run_due(database, allowing(receiver))
    row = delivery(database, delivery_id)
    assert (row["state"], row["attempts"][0]["status"]) == ("pending", status)
    assert before + least_s <= row["next_at"] <= time.time() + most_s


def test_a_receiver_that_is_gone_gets_no_more(database, receiver):
    receiver.answers["/hook"] = b"HTTP/1.1 410 Gone\r\n\r\n"
    delivery_id = due(database, receiver.url + "/hook")
    run_due(database, allowing(receiver))
    row = delivery(database, delivery_id)
    assert (row["state"], row["next_at"]) == ("failed", None)
    assert [(one["status"], one["error"]) for one in row["attempts"]] == [(410, "the receiver wants no more messages")]


def test_what_is_due_is_decided_by_the_databases_clock(postgres_server, receiver, monkeypatch):
    """One machine's clock that is wrong neither sends too early nor takes from others what they are sending."""
    database = Database(postgres_server.database())
    delivery_id = due(database, receiver.url + "/hook", next_at=time.time() + 1000)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda real=time.time: real() + 5000)
        assert run_due(database, allowing(receiver)) == 0
    assert delivery(database, delivery_id)["state"] == "pending"
    database.close()


def test_an_address_that_turned_private_is_not_called(database, receiver):
    """Checked with each attempt, not only when the job was sent."""
    delivery_id = due(database, receiver.url + "/hook")
    run_due(database, allowing(receiver, PRIVATE_NETWORKS=""))
    assert delivery(database, delivery_id)["attempts"][0]["error"] == "the URL or its address is not allowed"
    assert receiver.requests == []


def test_the_time_between_attempts_grows_until_it_ends():
    delays = [webhooks.next_delay(attempts) for attempts in range(1, 8)]
    for delay, about in zip(delays, [5, 30, 120, 600, 3600, 21_600], strict=False):
        assert 0.8 * about <= delay <= 1.2 * about
    assert delays[6] is None
    assert len({webhooks.next_delay(1) for _ in range(10)}) > 1


def test_after_the_last_attempt_it_has_failed(database, receiver):
    receiver.answers["/hook"] = b"HTTP/1.1 404 Not Found\r\n\r\n"
    made = [{"at": 1.0, "status": 404, "error": None, "ms": 1}] * 6
    delivery_id = due(database, receiver.url + "/hook", attempts_json=json.dumps(made))
    run_due(database, allowing(receiver))
    row = delivery(database, delivery_id)
    assert (row["state"], row["next_at"], len(row["attempts"])) == ("failed", None, 7)


def test_a_callback_of_a_job_that_is_gone_has_failed(database, receiver):
    delivery_id = due(database, receiver.url + "/hook")
    run_due(database, allowing(receiver), lambda row: None)
    assert delivery(database, delivery_id)["state"] == "failed"
    assert receiver.requests == []


def test_a_process_that_is_killed_in_between_loses_nothing(database, receiver):
    delivery_id = due(database, receiver.url + "/hook")

    class Killed(BaseException):
        pass

    def kill(row):
        raise Killed
    with pytest.raises(Killed):
        run_due(database, allowing(receiver), kill)
    assert run_due(database, allowing(receiver)) == 0  # still claimed
    assert delivery(database, delivery_id)["next_at"] > time.time() + 30
    with database.begin() as connection:
        connection.execute(update(schema.deliveries).values(next_at=time.time() - 1))  # a minute later
    assert run_due(database, allowing(receiver)) == 1
    assert delivery(database, delivery_id)["state"] == "delivered"


def check_shared(database, other, receiver):
    """Two processes' worth of run_due at once deliver each once."""
    ids = [due(database, receiver.url + "/hook") for _ in range(80)]
    counts, start = [], threading.Barrier(2)

    def work(one):
        with one.read():  # it has a connection before they start
            start.wait(LONG_S)
        while made := run_due(one, allowing(receiver)):
            counts.append(made)
    threads = [threading.Thread(target=work, args=(one,)) for one in (database, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert [delivery(database, one)["attempts"] for one in ids if delivery(database, one)["state"] != "delivered"] == []
    assert sum(counts) == 80
    assert sorted(verified(request, SECRET.encode())["id"] for request in receiver.requests) == sorted(ids)
    assert {delivery(database, one)["state"] for one in ids} == {"delivered"}


def test_several_machines_share_the_deliveries(database, receiver):
    other = Database(str(database.url))
    check_shared(database, other, receiver)
    other.close()


def test_several_machines_share_the_deliveries_in_postgresql(postgres_server, receiver):
    url = postgres_server.database()
    one, other = Database(url), Database(url)
    check_shared(one, other, receiver)
    one.close()
    other.close()


class Waiting:
    """A receiver's path that answers once `over` is set."""

    def __init__(self):
        self.over, self.lock, self.now, self.most = threading.Event(), threading.Lock(), 0, 0

    def __call__(self, connection, closed):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.over.wait(LONG_S)
        with self.lock:
            self.now -= 1
        connection.sendall(ACCEPTED)


def wait_for(condition):
    until = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def running():
    """running(database, settings, slow): run_due in a thread; the jobs whose messages it has asked for."""
    threads, loaded = [], []

    def message(row):
        loaded.append(row["job_id"])
        return message_of(row)

    def start(database, optional, slow=None):
        threads.append(threading.Thread(target=run_due, args=(database, optional, message, slow)))
        threads[-1].start()
        return loaded
    yield start
    for thread in threads:
        thread.join(LONG_S)


def test_a_receiver_that_does_not_answer_delays_no_other(database, receiver, running):
    """Not even one whose callback becomes due while it is awaited."""
    receiver.answers["/slow"] = slow = Waiting()
    try:
        hanging = [due(database, receiver.url + "/slow", next_at=time.time() - 100) for _ in range(50)]
        other = receiver.url.replace("127.0.0.1", "127.0.0.2")
        optional = settings(CALLBACK_URLS=f"{receiver.url}/,{other}/")
        loaded = running(database, optional)
        wait_for(lambda: slow.now == webhooks.AT_ONCE_PER_HOST)
        assert len(loaded) == webhooks.AT_ONCE_PER_HOST  # no body is held for later
        second = HostileServer({"/hook": ACCEPTED}, host="127.0.0.2", port=receiver.port)
        quick = due(database, other + "/hook")
        wait_for(lambda: delivery(database, quick)["state"] == "delivered")  # recorded while the others are under way
        assert (slow.now, slow.most) == (webhooks.AT_ONCE_PER_HOST, webhooks.AT_ONCE_PER_HOST)
        unclaimed = [one for one in hanging if delivery(database, one)["next_at"] < time.time()]
        assert len(unclaimed) == 50 - webhooks.AT_ONCE_PER_HOST  # left to other machines
    finally:
        slow.over.set()
    wait_for(lambda: {delivery(database, one)["state"] for one in hanging} == {"delivered"})
    assert slow.most == webhooks.AT_ONCE_PER_HOST
    second.close()


def test_a_process_has_a_limited_number_of_callbacks_under_way(database, receiver, running, monkeypatch):
    monkeypatch.setattr(webhooks, "AT_ONCE_PER_HOST", 100)
    receiver.answers["/slow"] = slow = Waiting()
    ids = [due(database, receiver.url + "/slow", owner=str(i)) for i in range(webhooks.AT_ONCE + 8)]
    try:
        loaded = running(database, allowing(receiver))
        wait_for(lambda: slow.now == webhooks.AT_ONCE)
        time.sleep(2 * webhooks.LOOK_EVERY_S)
        assert len(loaded) == webhooks.AT_ONCE
    finally:
        slow.over.set()
    wait_for(lambda: {delivery(database, one)["state"] for one in ids} == {"delivered"})
    assert slow.most == webhooks.AT_ONCE


class Everywhere:
    """A server on all addresses of loopback: each of 127.0.0.2, 127.0.0.3, … is another host to the service."""

    def __init__(self):
        self.slow = Waiting()
        self.server = HostileServer({"/slow": self.slow, "/hook": ACCEPTED}, host="0.0.0.0")
        self.settings = settings(CALLBACK_URLS=",".join(self.url(number, "/") for number in range(2, 40)))

    def url(self, number, path):
        return f"http://127.0.0.{number}:{self.server.port}{path}"

    def close(self):
        self.slow.over.set()
        self.server.close()


@pytest.fixture
def everywhere():
    one = Everywhere()
    yield one
    one.close()


def test_no_owner_fills_all_places_however_many_hosts_it_names(database, everywhere, running):
    """A greedy client's receivers on 20 hosts never answer; others' callbacks are sent meanwhile."""
    greedy = [due(database, everywhere.url(2 + i % 20, "/slow"), owner="greedy", next_at=time.time() - 100)
              for i in range(100)]
    running(database, everywhere.settings)
    wait_for(lambda: everywhere.slow.now == webhooks.AT_ONCE // 2)
    for owner in ("a", "b"):
        also = [due(database, everywhere.url(22 + i, "/slow"), owner=f"greedy as {owner}") for i in range(16)]
        quick = due(database, everywhere.url(2, "/hook"), owner=owner)
        wait_for(lambda quick=quick: delivery(database, quick)["state"] == "delivered")
        assert everywhere.slow.now < webhooks.AT_ONCE
        assert {delivery(database, one)["state"] for one in (*greedy, *also)} == {"pending"}
    everywhere.slow.over.set()


def test_without_keys_receivers_that_were_slow_leave_room_for_the_others(database, everywhere, running, monkeypatch):
    """All clients are one owner then. At their next attempts, the hosts that have not answered share a part of the
    places."""
    monkeypatch.setattr(webhooks, "WITHIN_S", 0.3)
    monkeypatch.setattr(webhooks, "SLOW_MS", 200)
    slow = {}
    before = everywhere.server.answers["/before"] = Waiting()
    hosts = [due(database, everywhere.url(number, "/before")) for number in range(2, 22)]
    run_due(database, everywhere.settings, slow=slow)
    assert slow.keys() == {f"127.0.0.{number}" for number in range(2, 22)}
    assert {delivery(database, one)["attempts"][0]["error"] for one in hosts} == {"no answer within 0.3 s"}
    before.over.set()
    monkeypatch.setattr(webhooks, "WITHIN_S", LONG_S)
    monkeypatch.setattr(webhooks, "SLOW_MS", 1000 * LONG_S)
    for i in range(100):
        due(database, everywhere.url(2 + i % 20, "/slow"), next_at=time.time() - 100)
    running(database, everywhere.settings, slow)
    wait_for(lambda: everywhere.slow.now == webhooks.AT_ONCE // 2)
    quick = due(database, everywhere.url(30, "/hook"))
    wait_for(lambda: delivery(database, quick)["state"] == "delivered")
    recovered = due(database, everywhere.url(31, "/hook"))
    slow["127.0.0.31"] = True
    everywhere.slow.over.set()
    wait_for(lambda: delivery(database, recovered)["state"] == "delivered")
    assert "127.0.0.31" not in slow


def test_the_bytes_under_way_are_divided_too(monkeypatch):
    monkeypatch.setattr(webhooks, "AT_ONCE_BYTES", 256)
    places = webhooks.Places({})
    taken = [places.take({"owner": owner, "host": f"{owner}{i}", "bytes": 64}) for i in range(4) for owner in "abc"]
    assert taken == [True] * 3 + [False] * 9
    assert places.take({"owner": "a", "host": "small", "bytes": 0})
    assert places.bytes.total() == 192


def test_large_results_of_one_owner_do_not_hide_what_is_due_to_others(database, receiver, running, monkeypatch):
    monkeypatch.setattr(webhooks, "AT_ONCE_BYTES", 100)
    receiver.answers["/slow"] = slow = Waiting()
    large = [due(database, receiver.url + "/slow", owner="a", bytes=50, next_at=time.time() - 100) for _ in range(80)]
    running(database, allowing(receiver))
    wait_for(lambda: slow.now == 1)
    quick = due(database, receiver.url + "/hook", owner="b", bytes=10)
    wait_for(lambda: delivery(database, quick)["state"] == "delivered")
    assert slow.most == 1
    with database.begin() as connection:
        connection.execute(update(schema.deliveries).where(schema.deliveries.c.id.in_(large)).values(state="failed"))
    slow.over.set()


def test_what_was_under_way_is_recorded_when_the_next_one_cannot_be_sent(database, receiver):
    ids = [due(database, receiver.url + "/hook", job_id=f"j{i}", next_at=time.time() - 10 + i) for i in range(2)]

    def message(row):
        if row["job_id"] == "j1":
            raise OSError("the database is away")
        return message_of(row)
    with pytest.raises(OSError, match="away"):
        run_due(database, allowing(receiver), message)
    assert [delivery(database, one)["state"] for one in ids] == ["delivered", "pending"]


@pytest.mark.parametrize(("url", "host"), [
    ("https://Example.org:8443/a?b=c", "example.org"), ("http://example.org./", "example.org"),
    ("http://[2001:db8::1]/", "2001:db8::1")])
def test_hosts_are_told_apart_without_their_notation(database, url, host):
    assert delivery(database, due(database, url))["host"] == host
