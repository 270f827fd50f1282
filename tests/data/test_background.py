"""Blocking calls of greenlets: nothing waits for long for a service that hangs, and all is as before once it is back.
"""
import contextlib
import threading
import time

import gevent
import pytest
from conftest import need
from servers import Postgres

from app.data import background, postgres
from app.data import database as database_module
from app.data.background import THREADS, Background, Threads
from app.data.database import Database
from app.errors import ServiceError

LONG_S = 120  # for what only a machine that is very busy takes so long for


@pytest.fixture
def away():
    return Background("HISTORY_UNAVAILABLE", "The history is away.")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Refusals that do not last, so that the tests do not either; calls that nobody limits have long enough."""
    monkeypatch.setattr(background, "AWAY_S", 0)
    monkeypatch.setitem(Background.run.__kwdefaults__, "within_s", LONG_S)


def fail():
    raise OSError("refused")


def wait_for(condition):
    """In greenlets: a slow machine starts many of them in several turns."""
    with gevent.Timeout(LONG_S):
        while not condition():
            gevent.sleep(0.005)


def refused(away, call, *arguments, **options):
    with pytest.raises(ServiceError) as e:
        away.run(call, *arguments, **options)
    assert (e.value.status, e.value.code, e.value.message) == (503, "HISTORY_UNAVAILABLE", "The history is away.")
    assert e.value.retry_after() == 5
    return e.value


def test_a_call_runs_beside_the_event_loop(away):
    goes_on = threading.Event()

    def turn():
        for _ in range(5):
            gevent.sleep(0.01)
        goes_on.set()
    gevent.spawn(turn)
    has_gone_on, thread = away.run(lambda: (goes_on.wait(60), threading.current_thread()))
    assert has_gone_on
    assert thread is not threading.current_thread()


def test_errors_of_the_service_are_those_of_the_call(away):
    def missing():
        raise ServiceError(404, "NOT_FOUND", "There is none.")
    for _ in range(2):  # it answers, so the second call is made too
        with pytest.raises(ServiceError, match="There is none"):
            away.run(missing)


def test_after_a_failure_one_call_at_a_time_tries_whether_it_is_back(away, monkeypatch):
    calls = []
    monkeypatch.setattr(background, "AWAY_S", 3600)
    refused(away, fail)
    refused(away, calls.append, 1)
    monkeypatch.setattr(background, "AWAY_S", 0)
    waiting, goes_on = [], threading.Event()
    probe = gevent.spawn(away.run, goes_on.wait)
    wait_for(lambda: away.is_probing)
    waiting += [gevent.spawn(refused, away, calls.append, number) for number in range(5)]
    gevent.joinall(waiting, raise_error=True)
    assert calls == []
    goes_on.set()
    assert probe.get() is True
    away.run(calls.append, 2)
    assert calls == [2]


def test_a_call_that_hangs_is_not_waited_for(away):
    goes_on = threading.Event()
    try:
        assert "no answer" in str(refused(away, goes_on.wait, within_s=1).__cause__)
    finally:
        goes_on.set()


def test_calls_that_have_not_begun_in_time_are_not_made(away, monkeypatch):
    monkeypatch.setattr(background, "WAITING", 50)
    goes_on, made = threading.Event(), []
    hanging = [gevent.spawn(refused, away, goes_on.wait, within_s=4) for _ in range(THREADS)]
    wait_for(lambda: away.threads.unfinished == THREADS)
    waiting = [gevent.spawn(refused, away, made.append, number, within_s=5) for number in range(50)]
    wait_for(lambda: away.threads.waiting == 50)
    overloaded(away, made.append, "one too many")
    try:
        gevent.joinall([*hanging, *waiting], raise_error=True)
    finally:
        goes_on.set()
    assert away.run(lambda: "answer") == "answer"
    assert made == []
    wait_for(lambda: not away.threads.unfinished)
    assert (away.threads.waiting, away.threads.free.counter) == (0, THREADS)


def overloaded(away, call, *arguments, **options):
    with pytest.raises(ServiceError) as e:
        away.run(call, *arguments, **options)
    assert (e.value.status, e.value.code, e.value.retry_after()) == (503, "OVERLOADED", 5)
    assert away.failed_at is None


def test_a_burst_of_calls_waits_and_is_answered(away):
    calls = [gevent.spawn(away.run, lambda: time.sleep(0.01)) for _ in range(300)]
    gevent.joinall(calls, raise_error=True)


def test_calls_that_found_no_thread_are_no_outage(away):
    goes_on, made = threading.Event(), []
    running = [gevent.spawn(away.run, goes_on.wait) for _ in range(THREADS)]
    wait_for(lambda: away.threads.unfinished == THREADS)
    overloaded(away, made.append, 1, within_s=0.2)
    goes_on.set()
    gevent.joinall(running, raise_error=True)
    assert away.run(lambda: "answer") == "answer"
    assert made == []


def test_a_call_that_got_its_thread_late_is_no_outage(away):
    goes_on, never = threading.Event(), threading.Event()
    running = [gevent.spawn(away.run, goes_on.wait) for _ in range(THREADS)]
    wait_for(lambda: away.threads.unfinished == THREADS)
    late = gevent.spawn(overloaded, away, never.wait, within_s=0.5)
    gevent.sleep(0.4)
    goes_on.set()
    try:
        gevent.joinall([late, *running], raise_error=True)
    finally:
        never.set()


def test_waiting_for_a_connection_or_a_slow_statement_is_overload_and_no_outage(away, tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "CONNECT_WITHIN_S", 0.2)
    monkeypatch.setattr(database_module, "STATEMENT_WITHIN_S", 0.3)
    database = Database(f"sqlite:///{tmp_path / 'service.db'}")

    def read(statement="SELECT 1"):
        with database.read() as connection:
            return connection.exec_driver_sql(statement).scalar()
    assert away.run(read) == 1
    with contextlib.ExitStack() as stack:
        for _ in range(database_module.SQLITE_POOL):
            stack.enter_context(database.read())
        overloaded(away, read)
    overloaded(away, read, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")

    def write():
        with database.begin(0.1) as connection:
            connection.exec_driver_sql("SELECT 1")
    with database.begin():
        overloaded(away, write)
    away.run(write)
    assert away.run(read) == 1
    database.close()


def test_an_outage_that_began_while_calls_waited_is_told_to_them(away):
    goes_on, made = threading.Event(), []

    def fail_later():
        goes_on.wait()
        raise OSError("gone")
    failing = [gevent.spawn(refused, away, fail_later) for _ in range(THREADS)]
    wait_for(lambda: away.threads.unfinished == THREADS)
    waiting = [gevent.spawn(refused, away, made.append, number) for number in range(20)]
    wait_for(lambda: away.threads.waiting == 20)
    goes_on.set()
    gevent.joinall([*failing, *waiting], raise_error=True)
    assert made == []


def test_a_probe_without_a_thread_or_connection_leaves_the_service_away(away, monkeypatch):
    goes_on = threading.Event()
    hanging = [gevent.spawn(refused, away, goes_on.wait, within_s=1) for _ in range(THREADS)]
    gevent.joinall(hanging, raise_error=True)
    try:
        refused(away, time.monotonic, within_s=0.1)  # the probe
        monkeypatch.setattr(background, "AWAY_S", 3600)
        started = time.monotonic()
        refused(away, time.monotonic)
        assert time.monotonic() - started < LONG_S / 2  # at once: it would wait for a thread for LONG_S
    finally:
        goes_on.set()


def test_backgrounds_can_share_their_threads(away):
    goes_on, two = threading.Event(), Threads(2)
    shared = [Background("A", "A is away.", two), Background("B", "B is away.", two)]
    running = [gevent.spawn(one.run, goes_on.wait) for one in shared]
    wait_for(lambda: two.unfinished == 2)
    for one in shared:
        overloaded(one, time.monotonic, within_s=0.1)
    assert away.run(lambda: "answer") == "answer"
    goes_on.set()
    gevent.joinall(running, raise_error=True)


def test_the_time_limit_of_the_request_is_not_taken_for_the_services(away):
    goes_on = threading.Event()
    try:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
            away.run(goes_on.wait)
        assert away.run(lambda: "answer") == "answer"
    finally:
        goes_on.set()


def test_it_needs_no_more_threads_or_connections_after_outages(away, tmp_path, monkeypatch):
    need("initdb")
    monkeypatch.setattr(postgres.Connection, "answer_within_s", 1.5)
    server, threads = Postgres(tmp_path).start(), threading.active_count()
    database = Database(server.database())

    def select():
        with database.read() as connection:
            return connection.exec_driver_sql("SELECT 1").scalar()

    def storm():
        """Many calls at once; how many were answered."""
        def call():
            try:
                return away.run(select, within_s=1)
            except ServiceError:
                return 0
        calls = [gevent.spawn(call) for _ in range(30)]
        gevent.joinall(calls)
        return sum(one.value for one in calls)

    def back():
        until = time.monotonic() + LONG_S
        while not storm():
            assert time.monotonic() < until
            gevent.sleep(0.1)
        while away.threads.unfinished:
            assert time.monotonic() < until
            gevent.sleep(0.05)
    try:
        back()
        for _ in range(2):
            server.pause()
            assert storm() == 0
            server.kill()
            assert storm() == 0
            server.start()
            back()
        assert threading.active_count() <= threads + THREADS + 1
        assert away.threads.pool.size <= THREADS
        assert database.engine.pool.checkedout() == 0
        found = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'test1'"
        wait_for(lambda: server.execute(found)[0][0] <= database_module.POOL)  # it sees late who has left
    finally:
        database.close()
        server.remove()
