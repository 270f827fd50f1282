"""Jobs in the database: each step, over SQLite and PostgreSQL; the broker's folder; what the upkeep removes."""
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty

import pytest
from conftest import ROOT
from kombu.exceptions import ChannelError
from sqlalchemy import event, select, update
from sqlalchemy.exc import OperationalError

from app.config import Settings
from app.data import database as database_module
from app.data.database import Database
from app.data.schema import deliveries, jobs, workers
from app.data.storage import Own
from app.errors import ServiceError
from app.jobs import presence, shares
from app.jobs import store as module
from app.jobs import upkeep as upkeep_module
from app.jobs.broker import Broker
from app.jobs.store import Lost, Store, Uncertain
from app.jobs.upkeep import Upkeep


@pytest.fixture
def optional(engines):
    return Settings.parse({**engines, "JOBS": "on", "MAX_JOBS": "8", "MAX_JOBS_STORAGE": "1000"}).optional


@pytest.fixture
def store(optional, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 120)  # none runs out because the machine is slow
    database = Database(optional.database)
    yield Store(database, optional)
    database.close()


def row(**values):
    return {"id": uuid.uuid4().hex, "owner": "", "queue": "short", "request_id": "r", "model": "m", "version": None,
            "is_batch": False, "options_json": "{}", "inputs_json": "[]", "input_bytes": 10, "fingerprint": "f",
            "idempotency_key": None, "callback_url": None, "total": 2, "unit": "files"} | values


def added(store, **values):
    return store.add(row(**values))[0]["id"]


def claim(store, job_id, worker):
    """The row, or None; no other job may be waiting before it."""
    claimed = store.claim("short", ["m"], worker)
    assert claimed is None or claimed["id"] == job_id
    return claimed


def set_columns(store, job_id, **values):
    with store.database.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))


def test_job_is_claimed_and_finished_once(store):
    job_id = added(store)
    claimed = claim(store, job_id, "i/1")
    assert (claimed["state"], claimed["attempt"]) == ("running", 1)
    assert claim(store, job_id, "i/2") is None
    store.finish(job_id, 1, "succeeded", 2, {"predictions": "\ud800"})
    with pytest.raises(Lost):
        store.finish(job_id, 1, "failed", 0)
    found = store.get(job_id, "")
    assert found["state"] == "succeeded"
    assert json.loads(found["result_json"]) == {"predictions": "\ud800"}
    assert found["expires_at"] - found["ended_at"] == store.optional.jobs_ttl


def test_worker_that_was_given_up_can_neither_renew_nor_finish(store):
    job_id = added(store)
    claim(store, job_id, "i/1")
    assert store.give_up_lost("i", lambda pid: False) == [(job_id, "queued", "i/1")]
    assert claim(store, job_id, "i/2")["attempt"] == 2
    for call in (lambda: store.renew(job_id, 1, 1), lambda: store.finish(job_id, 1, "succeeded", 1)):
        with pytest.raises(Lost):
            call()
    assert store.renew(job_id, 2, 1) is False
    assert store.get(job_id, "")["done"] == 1


def test_lease_that_ran_out_counts_only_while_leases_count(store):
    job_id = added(store)
    claim(store, job_id, "elsewhere/1")
    assert store.give_up_lost("i", lambda pid: True) == []
    set_columns(store, job_id, lease_until=time.time() - 1)
    assert store.give_up_lost("i", lambda pid: True, leases_count=lambda now: False) == []
    assert store.give_up_lost("i", lambda pid: True) == [(job_id, "queued", "elsewhere/1")]


def test_third_loss_fails_the_job_and_a_hang_is_its_deadline(store):
    lost, hung = added(store), added(store)
    for attempt in range(3):
        claim(store, lost, f"i/{attempt}")
        (_, state, _), = store.give_up_lost("i", lambda pid: False)
    assert state == "failed"
    assert json.loads(store.get(lost, "")["error_json"])["error"] == "WORKER_LOST"
    claim(store, hung, "i/9")
    now = time.time()
    set_columns(store, hung, started_at=now - store.optional.job_timeout - module.LEASE_S - 1, lease_until=now - 1)
    assert store.give_up_lost() == [(hung, "failed", "i/9")]
    assert json.loads(store.get(hung, "")["error_json"])["error"] == "DEADLINE_EXCEEDED"


def test_leases_are_by_the_databases_clock(store, monkeypatch):
    job_id = added(store)
    claim(store, job_id, "i/1")
    if store.database.is_sqlite:
        pytest.skip("SQLite is for one machine, and has its clock")
    monkeypatch.setattr(module.time, "time", lambda: 1e10)
    assert store.give_up_lost("j", lambda pid: True) == []
    assert store.expire() == 0


def test_cancelling(store):
    queued, running = added(store), added(store)
    assert store.cancel(queued, "")["state"] == "cancelled"
    assert claim(store, running, "i/1")
    assert store.claim("short", ["m"], "i/2") is None
    assert store.cancel(running, "somebody") is None
    assert not store.get(running, "")["cancel_requested"]
    assert store.cancel(running, "")["state"] == "running"
    assert store.renew(running, 1, 0) is True


@pytest.mark.parametrize("give_back", [lambda store, job_id: store.give_back(job_id, 1),
                                       lambda store, job_id: store.give_back_all("i"),
                                       lambda store, job_id: store.give_up_lost("i", lambda pid: False)])
def test_job_that_was_cancelled_is_not_queued_again(store, give_back):
    job_id = added(store)
    claim(store, job_id, "i/1")
    store.cancel(job_id, "")
    give_back(store, job_id)
    assert store.get(job_id, "")["state"] == "cancelled"


def test_job_that_is_given_back_costs_no_loss(store):
    job_id = added(store)
    for attempt in range(5):
        assert claim(store, job_id, "i/1")["attempt"] == attempt + 1
        assert store.give_back_all("i") == 1
    assert (store.get(job_id, "")["losses"], store.give_back_all("i")) == (0, 0)


def test_job_whose_storage_is_away_for_an_hour_fails(store):
    job_id = added(store)
    claim(store, job_id, "i/1")
    store.give_back(job_id, 1)
    assert store.get(job_id, "")["state"] == "queued"
    claim(store, job_id, "i/1")
    set_columns(store, job_id, created_at=time.time() - 3700)
    store.give_back(job_id, 2)
    assert json.loads(store.get(job_id, "")["error_json"])["error"] == "STORAGE_UNAVAILABLE"


def test_owners_take_turns_and_large_jobs_count_for_more(store, monkeypatch):
    """Whoever comes first with many delays others by one job, also where one process alone runs them."""
    monkeypatch.setattr(shares, "check_room", lambda connection, optional, owner, size:
                        shares.used(connection, jobs.c.owner == owner)[2])  # whatever the room
    a, b, c = ("abc"[i] * 64 for i in range(3))
    greedy = [added(store, owner=a, total=1) for _ in range(6)]
    order = [greedy[0]]
    claim(store, greedy[0], "i/1")
    modest, large, after_it = (added(store, owner=owner, total=total) for owner, total in ((b, 1), (c, 3), (c, 1)))
    order += [greedy[1], modest, large]
    last = added(store, owner=b, total=1)  # its second turn
    order += [greedy[2], last, greedy[3], greedy[4], after_it, greedy[5]]
    for job_id in order[1:]:
        claim(store, job_id, "i/1")
    assert store.claim("short", ["m"], "i/1") is None


def test_turns_go_on_while_none_waits(store, monkeypatch):
    """Or else an owner whose many jobs have been run would wait for as many of the next one's."""
    monkeypatch.setattr(shares, "check_room", lambda connection, optional, owner, size:
                        shares.used(connection, jobs.c.owner == owner)[2])  # whatever the room
    a, b = "a" * 64, "b" * 64
    for _ in range(4):
        claim(store, added(store, owner=a, total=3, input_bytes=0), "i/1")
    first, second = (added(store, owner=b, total=1, input_bytes=0) for _ in range(2))
    others = [added(store, owner=owner, total=1, input_bytes=0) for owner in (b, b, b, a)]
    for job_id in (first, second, *others[:2], others[3]):
        claim(store, job_id, "i/1")


def test_without_keys_jobs_are_run_in_their_order(store):
    ids = [added(store, total=total) for total in (3, 1, 2)]
    claim(store, ids[0], "i/1")
    store.give_up_lost("i", lambda pid: False)  # it is tried again at once
    for job_id in ids:
        claim(store, job_id, "i/1")


def test_job_whose_storage_is_away_lets_others_go_first(store):
    first, second = added(store), added(store)
    claim(store, first, "i/1")
    store.give_back(first, 1)
    claim(store, second, "i/1")
    claim(store, first, "i/1")


def test_several_workers_at_once_get_different_jobs(store, optional):
    ids = {added(store, owner=str(i % 2) * 64, input_bytes=0) for i in range(8)}
    with ThreadPoolExecutor(4) as pool:
        claimed = list(pool.map(lambda number: store.claim("short", ["m"], f"i/{number}"), range(10)))
    found = [row["id"] for row in claimed if row]
    assert sorted(found) == sorted(ids)
    assert {row["attempt"] for row in claimed if row} == {1}


def test_jobs_of_other_models_are_left_to_other_workers(store):
    plain, versioned = added(store), added(store, version="2")
    assert store.claim("short", ["n", "m@1"], "i/1") is None
    assert store.left_to_others("short", ["m"]) == "m@2"
    assert store.left_to_others("short", ["m", "m@2"]) is None
    assert store.left_to_others("long", []) is None
    assert store.claim("short", ["m@2"], "i/1")["id"] == versioned
    assert store.claim("short", ["m"], "i/1")["id"] == plain


def test_lease_counts_neither_for_too_long_nor_while_the_clock_is_being_set(store, optional, monkeypatch):
    monkeypatch.setattr(upkeep_module, "GRACE_S", 3600)
    upkeep = Upkeep(optional, store.database, store, None, None, "i")

    def counts(ahead_s):
        """By a clock of the database that is so far ahead of the machine's."""
        return upkeep.leases_count(time.monotonic() + ahead_s)
    assert not counts(1000)  # at its start, the database may have been away until then
    upkeep.leases_count_from = 0
    assert counts(1000)
    for ahead_s in (5000, 1000):
        assert not counts(ahead_s)
        upkeep.leases_count_from = 0
        assert counts(ahead_s)
    job_id = added(store)
    claim(store, job_id, "elsewhere/1")
    set_columns(store, job_id, lease_until=time.time() + 3600)  # from before the clock was put back
    assert store.give_up_lost("i", lambda pid: True) == [(job_id, "queued", "elsewhere/1")]


def test_job_is_withdrawn_unless_nobody_can_tell(store, monkeypatch):
    """A database that goes away before the commit has withdrawn nothing, one that goes in the middle of it perhaps."""
    begin, job_id = store.database.begin, added(store)

    @contextlib.contextmanager
    def away(is_late):
        if not is_late:
            raise OperationalError("DELETE", {}, OSError("away"))
        with begin() as connection:
            yield connection
        raise OperationalError("COMMIT", {}, OSError("away"))
    monkeypatch.setattr(store.database, "begin", lambda: away(False))
    assert store.withdraw(job_id) is False
    with pytest.raises(OperationalError):
        store.add(row())
    monkeypatch.setattr(store.database, "begin", lambda: away(True))
    for call in (lambda: store.withdraw(job_id), lambda: store.add(row())):
        with pytest.raises(Uncertain):
            call()


def test_workers_are_there_as_long_as_they_say_so(store):
    database = store.database
    for _ in range(2):
        presence.beat(database, "i/1", ["short"], ["m"])
    presence.beat(database, "i/2", ["long", "short"], ["m", "n@2"])
    assert sorted(presence.heard(database)) == [(["long", "short"], ["m", "n@2"]), (["short"], ["m"])]
    presence.leave(database, "i/2")
    assert presence.heard(database) == [(["short"], ["m"])]
    with database.begin() as connection:
        connection.execute(update(workers).values(seen_at=workers.c.seen_at - presence.HEARD_WITHIN_S - 1))
    assert presence.heard(database) == []
    with database.begin() as connection:
        connection.execute(update(workers).values(seen_at=workers.c.seen_at - presence.FORGOTTEN_AFTER_S))
    presence.forget(database)
    with database.read() as connection:
        assert connection.execute(select(workers)).all() == []


def test_backlog_is_counted_with_its_age(store):
    first, _ = added(store), added(store)
    set_columns(store, first, created_at=time.time() - 50)
    found = store.backlog()
    assert list(found) == [("short", "queued")]
    number, seconds = found["short", "queued"]
    assert number == 2
    assert 49 < seconds < 80


def test_no_worker_is_given_up_while_nobody_can_renew_a_lease(store, optional, monkeypatch):
    if not store.database.is_sqlite:
        pytest.skip("PostgreSQL has many writers at a time")
    monkeypatch.setattr(database_module, "LOCK_WITHIN_S", 60)
    for name in ("LEASE_S", "JUMP_S"):  # however slow this machine is
        monkeypatch.setattr(upkeep_module, name, 3600)
    upkeep, job_id = Upkeep(optional, store.database, store, None, None, "i"), added(store)
    claim(store, job_id, "elsewhere/1")
    set_columns(store, job_id, lease_until=time.time() - 1)
    upkeep.leases_count_from, started = 0, time.monotonic()
    with store.database.begin(), pytest.raises(OperationalError, match="locked"):
        upkeep.find_lost()
    assert time.monotonic() < started + 40  # or else it would be there when the lock is free again
    upkeep.find_lost()
    assert store.get(job_id, "")["state"] == "running"
    upkeep.leases_count_from = 0
    upkeep.find_lost()
    assert store.get(job_id, "")["state"] == "queued"


def test_next_job_is_read_from_an_index(store):
    """In its order, so that the number of jobs that wait does not matter."""
    if not store.database.is_sqlite:
        pytest.skip("PostgreSQL reads a table of a few rows as a whole")
    statements = []
    listen = functools.partial(event.listen, store.database.engine, "after_cursor_execute")
    listen(lambda connection, cursor, statement, parameters, *_: statements.append((statement, parameters)))
    store.claim("short", ["m"], "i/1")
    statement, parameters = next(one for one in statements if one[0].startswith("UPDATE jobs"))
    with store.database.read() as connection:
        plan = [one[3] for one in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, parameters)]
    assert any("USING INDEX jobs_in_turn" in step for step in plan), plan
    assert not any("TEMP B-TREE" in step for step in plan), plan


def test_what_is_done_often_reads_no_whole_table(store):
    """PostgreSQL's plans depend on what is in the tables."""
    if not store.database.is_sqlite:
        pytest.skip("of SQLite")
    statements, steps = [], []
    store.check("", 0)
    event.listen(store.database.engine, "before_cursor_execute", lambda connection, cursor, statement, parameters, *_:
                 statements.append((statement, parameters)))
    added(store, owner="a" * 64)
    store.due({"short": 0, "long": 0})
    store.give_up_lost("i", lambda pid: True)
    store.give_back_all("i")
    store.backlog()
    for statement, parameters in statements[:]:
        if "FROM jobs" in statement or "UPDATE jobs" in statement:
            with store.database.read() as connection:
                steps += [one[3] for one in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, parameters)]
    assert sum("USING COVERING INDEX jobs_shares" in step for step in steps) > 3, steps
    assert [step for step in steps if "jobs" in step and "INDEX" not in step or step.startswith("SCAN jobs")] == []


def test_message_is_sent_again_only_where_one_is_missing(store):
    first, second = added(store), added(store)
    assert store.due({"short": 0, "long": 0}) == []  # they were sent just now
    for job_id in (first, second):
        set_columns(store, job_id, dispatched_at=time.time() - 20)
    assert store.due({"short": 2, "long": 0}) == []
    assert store.due({"short": 1, "long": 0}) == []
    assert sorted(store.due({"short": 0, "long": 0})) == sorted([(first, "short"), (second, "short")])
    set_columns(store, first, dispatched_at=time.time() - 400)
    assert store.due({"short": 2, "long": 0}) == []
    assert store.due({"short": 1, "long": 0}) == [(first, "short")]
    store.not_sent([first])
    assert store.due({"short": 2, "long": 0}) == [(first, "short")]
    set_columns(store, second, dispatched_at=time.time() + 86_400)  # the clock was put back
    assert store.due({"short": 0, "long": 0}) == [(second, "short")]


def test_many_lost_messages_of_short_jobs_delay_no_long_one(store, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 2)
    short, long = [added(store) for _ in range(3)], added(store, queue="long")
    for job_id in (*short, long):
        set_columns(store, job_id, dispatched_at=time.time() - 60)
    found = store.due({"short": 0, "long": 0})
    assert sorted(queue for _, queue in found) == ["long", "short", "short"]


def test_there_is_room_for_so_many_jobs_and_so_many_bytes(store):
    ids = [added(store) for _ in range(8)]
    with pytest.raises(ServiceError, match="too many unfinished jobs; try"):
        added(store)
    for job_id in ids[:2]:
        store.cancel(job_id, "")
    added(store, input_bytes=900)
    with pytest.raises(ServiceError, match="too many unfinished jobs; try"):
        store.check("", 100)


def test_no_key_keeps_the_others_out(store):
    for _ in range(4):
        added(store, owner="a" * 64)
    with pytest.raises(ServiceError, match="too many unfinished jobs of yours") as e:
        added(store, owner="a" * 64)
    assert (e.value.status, e.value.code) == (503, "OVERLOADED")
    added(store, owner="b" * 64, input_bytes=400)
    with pytest.raises(ServiceError, match="of yours"):
        added(store, owner="b" * 64, input_bytes=200)


def test_job_is_kept_until_it_has_been_called_back(store):
    job_id = added(store, callback_url="https://example.org/")
    claim(store, job_id, "i/1")
    store.finish(job_id, 1, "succeeded", 1, {})
    set_columns(store, job_id, expires_at=1.0)
    assert store.expire() == 0
    with store.database.begin() as connection:
        connection.execute(update(deliveries).values(state="failed"))
    assert store.expire() == 1
    assert (store.get(job_id, None), store.deliveries(job_id)) == (None, [])


def test_others_may_write_while_large_results_are_removed(store, monkeypatch):
    for _ in range(3):
        set_columns(store, added(store), state="succeeded", expires_at=1.0)
    monkeypatch.setattr(module, "REMOVE_FOR_S", 0.05)
    event.listen(store.database.engine, "after_cursor_execute", lambda connection, cursor, statement, *_:
                 "DELETE FROM jobs" in statement and time.sleep(0.06))  # as if its result was large
    assert [store.expire() for _ in range(4)] == [1, 1, 1, 0]


def test_others_get_the_lock_between_two_removals(store, optional, monkeypatch):
    """SQLite's waiters look for it every few milliseconds: without a pause, they would hardly ever find it free."""
    upkeep, pauses = Upkeep(optional, store.database, store, None, None, "i"), []
    monkeypatch.setattr(upkeep.stopping, "wait", pauses.append)
    monkeypatch.setattr(module, "AT_ONCE", 1)
    for _ in range(2):
        set_columns(store, added(store), state="succeeded", expires_at=1.0)
    upkeep.expire()
    assert pauses == [upkeep_module.PAUSE_S] * 2
    assert store.expire() == 0


def test_upkeep_removes_files_of_jobs_alone(store, optional, tmp_path):
    """Whatever others keep in the same storage: names of 32 digits are often those of files by their MD5."""
    storage = Own(store.database, optional)
    unfinished, ended, others = added(store), uuid.uuid4().hex, ["photos", "0" * 31, uuid.uuid4().hex]
    for name in (unfinished, ended, "not-a-job"):
        storage.put(f"{name}/0", b"x")
    for name in others:
        storage.storage.put(f"{name}/0", b"x")
    old = time.time() - 7200
    for path in Path(optional.storage).rglob("*"):
        os.utime(path, (old, old))
    Upkeep(optional, store.database, store, None, storage, "i").remove_left_overs()
    own = f"jobs-{store.database.name()}"
    assert sorted(os.listdir(optional.storage)) == sorted([own, *others])
    assert sorted(os.listdir(os.path.join(optional.storage, own))) == sorted([unfinished, "not-a-job"])


def test_message_in_the_brokers_folder_is_seen_when_it_is_whole(tmp_path, monkeypatch):
    broker = Broker(Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path)}).optional)
    broker.publish("0" * 32, "short")
    replace, seen = Path.replace, []

    def replaced(part, path):
        seen.append((broker.waiting()["short"], json.loads(part.read_bytes())["headers"]["task"]))
        replace(part, path)
    monkeypatch.setattr(Path, "replace", replaced)
    broker.publish("1" * 32, "short")
    assert seen == [(1, "jobs.run")]
    assert broker.waiting() == {"short": 2, "long": 0}


def test_message_in_the_brokers_folder_is_taken_by_one(tmp_path, monkeypatch):
    broker = Broker(Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path)}).optional)
    for queue in ("short", "short", "long"):
        broker.publish("0" * 32, queue)
    read_bytes = Path.read_bytes

    def read_while_another_takes_it(path):
        data = read_bytes(path)
        path.unlink()
        monkeypatch.undo()
        return data
    monkeypatch.setattr(Path, "read_bytes", read_while_another_takes_it)
    with broker.celery.connection_for_read() as connection:
        assert connection.default_channel._get("short")["headers"]["task"] == "jobs.run"
        with pytest.raises(Empty):
            connection.default_channel._get("short")
    assert broker.waiting() == {"short": 0, "long": 1}


def test_message_that_cannot_be_taken_keeps_no_other_from_it(tmp_path):
    broker = Broker(Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path)}).optional)
    broker.publish("0" * 32, "short")
    for number, damage in enumerate((b"", b"\xff")):  # as a power cut may leave it
        (tmp_path / f"queue/{number}.short.msg").write_bytes(damage)
    (tmp_path / "queue/2.short.msg").mkdir()
    with broker.celery.connection_for_read() as connection:
        assert connection.default_channel._get("short")["headers"]["task"] == "jobs.run"
        with pytest.raises(ChannelError, match=r"2\.short\.msg"):
            connection.default_channel._get("short")
    assert broker.waiting() == {"short": 1, "long": 0}


def test_damaged_file_in_the_brokers_folder_is_mended(tmp_path):
    optional = Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path)}).optional
    broker, damaged = Broker(optional), tmp_path / "queue/control/short.exchange"
    damaged.write_bytes(b"")
    broker.publish("0" * 32, "short")
    assert broker.waiting() == {"short": 1, "long": 0}
    damaged.write_bytes(b"[")
    left, being_written = tmp_path / "queue/1.short.msg.part", tmp_path / "queue/2.short.msg.part"
    for part in (left, being_written):
        part.touch()
    os.utime(left, (0, 0))
    Broker(optional)
    assert not damaged.exists()
    assert not left.exists()
    assert being_written.exists()


def test_process_whose_supervisor_is_gone_ends(tmp_path):
    ended = subprocess.run([sys.executable, "-m", "app.jobs.node", "--number", "1", "--queues", "short", "--instance",
                            "i", "--parent", "1"], cwd=ROOT, timeout=300)
    assert ended.returncode == 1
