"""Jobs in the database: each step, over SQLite and PostgreSQL; the broker's folder; what the upkeep removes."""
import json
import os
import subprocess
import sys
import time
import uuid

import pytest
from conftest import ROOT
from sqlalchemy import update

from app.config import Settings
from app.data.database import Database
from app.data.schema import deliveries, jobs
from app.data.storage import Storage
from app.errors import ServiceError
from app.jobs import store as module
from app.jobs.broker import Broker
from app.jobs.store import LEASE_S, Lost, Store
from app.jobs.upkeep import Upkeep


@pytest.fixture
def optional(engines):
    return Settings.parse({**engines, "JOBS": "on", "MAX_JOBS": "8", "MAX_JOBS_STORAGE": "1000"}).optional


@pytest.fixture
def store(optional):
    database = Database(optional.database)
    yield Store(database, optional)
    database.close()


def row(**values):
    return {"id": uuid.uuid4().hex, "owner": "", "queue": "short", "request_id": "r", "model": "m", "version": None,
            "is_batch": False, "options_json": "{}", "inputs_json": "[]", "input_bytes": 10, "fingerprint": "f",
            "idempotency_key": None, "callback_url": None, "total": 2, "unit": "files"} | values


def added(store, **values):
    return store.add(row(**values))[0]["id"]


def set_columns(store, job_id, **values):
    with store.database.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))


def test_job_is_claimed_and_finished_once(store):
    job_id = added(store)
    claimed = store.claim(job_id, "i/1")
    assert (claimed["state"], claimed["attempt"]) == ("running", 1)
    assert store.claim(job_id, "i/2") is None
    store.finish(job_id, 1, "succeeded", 2, {"predictions": "\ud800"})
    with pytest.raises(Lost):
        store.finish(job_id, 1, "failed", 0)
    found = store.get(job_id, "")
    assert found["state"] == "succeeded"
    assert json.loads(found["result_json"]) == {"predictions": "\ud800"}
    assert found["expires_at"] - found["ended_at"] == store.optional.jobs_ttl


def test_worker_that_was_given_up_can_neither_renew_nor_finish(store):
    job_id = added(store)
    store.claim(job_id, "i/1")
    assert store.give_up_lost("i", lambda pid: False) == [(job_id, "queued", "i/1")]
    assert store.claim(job_id, "i/2")["attempt"] == 2
    for call in (lambda: store.renew(job_id, 1, 1), lambda: store.finish(job_id, 1, "succeeded", 1)):
        with pytest.raises(Lost):
            call()
    assert store.renew(job_id, 2, 1) is False
    assert store.get(job_id, "")["done"] == 1


def test_lease_that_ran_out_counts_only_while_leases_count(store):
    job_id = added(store)
    store.claim(job_id, "elsewhere/1")
    assert store.give_up_lost("i", lambda pid: True) == []
    set_columns(store, job_id, lease_until=time.time() - 1)
    assert store.give_up_lost("i", lambda pid: True, by_lease=False) == []
    assert store.give_up_lost("i", lambda pid: True) == [(job_id, "queued", "elsewhere/1")]


def test_third_loss_fails_the_job_and_a_hang_is_its_deadline(store):
    lost, hung = added(store), added(store)
    for attempt in range(3):
        store.claim(lost, f"i/{attempt}")
        (_, state, _), = store.give_up_lost("i", lambda pid: False)
    assert state == "failed"
    assert json.loads(store.get(lost, "")["error_json"])["error"] == "WORKER_LOST"
    store.claim(hung, "i/9")
    now = time.time()
    set_columns(store, hung, started_at=now - store.optional.job_timeout - LEASE_S - 1, lease_until=now - 1)
    assert store.give_up_lost() == [(hung, "failed", "i/9")]
    assert json.loads(store.get(hung, "")["error_json"])["error"] == "DEADLINE_EXCEEDED"


def test_leases_are_by_the_databases_clock(store, monkeypatch):
    job_id = added(store)
    store.claim(job_id, "i/1")
    if store.database.is_sqlite:
        pytest.skip("SQLite is for one machine, and has its clock")
    monkeypatch.setattr(module.time, "time", lambda: 1e10)
    assert store.give_up_lost("j", lambda pid: True) == []
    assert store.expire() == 0


def test_cancelling(store):
    queued, running = added(store), added(store)
    assert store.cancel(queued, "")["state"] == "cancelled"
    assert store.claim(queued, "i/1") is None
    store.claim(running, "i/1")
    assert store.cancel(running, "somebody") is None
    assert not store.get(running, "")["cancel_requested"]
    assert store.cancel(running, "")["state"] == "running"
    assert store.renew(running, 1, 0) is True


@pytest.mark.parametrize("give_back", [lambda store, job_id: store.give_back(job_id, 1),
                                       lambda store, job_id: store.give_back_all("i"),
                                       lambda store, job_id: store.give_up_lost("i", lambda pid: False)])
def test_job_that_was_cancelled_is_not_queued_again(store, give_back):
    job_id = added(store)
    store.claim(job_id, "i/1")
    store.cancel(job_id, "")
    give_back(store, job_id)
    assert store.get(job_id, "")["state"] == "cancelled"


def test_job_that_is_given_back_costs_no_loss(store):
    job_id = added(store)
    for attempt in range(5):
        assert store.claim(job_id, "i/1")["attempt"] == attempt + 1
        assert store.give_back_all("i") == 1
    assert (store.get(job_id, "")["losses"], store.give_back_all("i")) == (0, 0)


def test_job_whose_storage_is_away_for_an_hour_fails(store):
    job_id = added(store)
    store.claim(job_id, "i/1")
    store.give_back(job_id, 1)
    assert store.get(job_id, "")["state"] == "queued"
    store.claim(job_id, "i/1")
    set_columns(store, job_id, created_at=time.time() - 3700)
    store.give_back(job_id, 2)
    assert json.loads(store.get(job_id, "")["error_json"])["error"] == "STORAGE_UNAVAILABLE"


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
    store.claim(job_id, "i/1")
    store.finish(job_id, 1, "succeeded", 1, {})
    set_columns(store, job_id, expires_at=1.0)
    assert store.expire() == 0
    with store.database.begin() as connection:
        connection.execute(update(deliveries).values(state="failed"))
    assert store.expire() == 1
    assert (store.get(job_id, None), store.deliveries(job_id)) == (None, [])


def test_upkeep_removes_files_of_jobs_alone(store, optional, tmp_path):
    storage = Storage(optional.storage)
    unfinished, ended, others = added(store), uuid.uuid4().hex, ["photos", "thesis", "0" * 31]
    for name in (unfinished, ended, *others):
        storage.put(f"{name}/0", b"x")
        old = time.time() - 7200
        os.utime(os.path.join(optional.storage, name), (old, old))
    Upkeep(optional, store.database, store, None, storage, "i").remove_left_overs()
    assert sorted(os.listdir(optional.storage)) == sorted([unfinished, *others])


def test_damaged_file_in_the_brokers_folder_is_mended(tmp_path):
    optional = Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path)}).optional
    broker, damaged = Broker(optional), tmp_path / "queue/control/short.exchange"
    damaged.write_bytes(b"")
    broker.publish("0" * 32, "short")
    assert broker.waiting() == {"short": 1, "long": 0}
    damaged.write_bytes(b"[")
    Broker(optional)
    assert not damaged.exists()


def test_process_whose_supervisor_is_gone_ends(tmp_path):
    ended = subprocess.run([sys.executable, "-m", "app.jobs.node", "--number", "1", "--queues", "short", "--instance",
                            "i", "--parent", "1"], cwd=ROOT, timeout=60)
    assert ended.returncode == 1
