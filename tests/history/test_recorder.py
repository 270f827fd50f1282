"""The recorder never waits, keeps what fits while the database is away, and writes each prediction once."""
import dataclasses
import hashlib
import json
import time
from types import SimpleNamespace

import pytest
from conftest import encoded, need, photo, post
from servers import Postgres
from sqlalchemy import event, func, insert, select

from app import create_app
from app.config import Settings
from app.data.database import Database
from app.data.schema import history
from app.history import recorder as module
from app.history.recorder import Recorder, as_bytes, described, purge

WITHIN_S = 120
ANSWER = {"predictions": [{"class": "cat", "confidence": 0.5, "class_id": 1}],
          "metadata": {"timings_ms": {"read": 1.0, "inference": 2.5}}}
MODEL = SimpleNamespace(name="cats", version="1", task=object())  # as one's own: its task has no manifest
OPTIONAL = Settings.parse({"HISTORY": "on"}).optional


def new(url):
    made = Recorder(Database(url), OPTIONAL)
    made.purge_at += 10_000  # not in the middle of a test
    return made


@pytest.fixture(params=["sqlite", "postgresql"])
def recorder(request, tmp_path):
    made = new(f"sqlite:///{tmp_path / 'service.db'}" if request.param == "sqlite" else
               request.getfixturevalue("postgres_server").database())
    yield made
    made.stop()
    made.database.close()


@pytest.fixture
def server(tmp_path):
    """A PostgreSQL to stop."""
    need("initdb")
    made = Postgres(tmp_path).start()
    yield made
    made.remove()


def record(recorder, number=1, data=b"data", options=None):
    for i in range(number):
        recorder.record(MODEL, data, options or {}, ANSWER, False, i, "a-request", "")


def rows(recorder):
    with recorder.database.read() as connection:
        return connection.execute(select(history).order_by(history.c.id)).mappings().all()


def count(recorder):
    with recorder.database.read() as connection:
        return connection.execute(select(func.count()).select_from(history)).scalar()


def wait_for(call, expected):
    until = time.monotonic() + WITHIN_S
    while (value := call()) != expected:
        assert time.monotonic() < until, value
        time.sleep(0.05)


def test_what_was_recorded_is_written_within_a_second_or_at_the_end(recorder):
    record(recorder, 3)
    wait_for(lambda: count(recorder), 3)
    record(recorder, 1200)  # more than one transaction takes
    recorder.stop(WITHIN_S)
    assert count(recorder) == 1203
    assert recorder.dropped == 0
    assert recorder.waiting_bytes == 0
    found = rows(recorder)[0]
    assert (found["milliseconds"], found["top_class"], found["weights"]) == (3.5, "cat", None)


def test_a_job_is_recorded_under_the_request_that_submitted_it(recorder):
    recorder.of_job(MODEL, "text", {}, ANSWER, {"request_id": "of-a-job", "owner": "someone"}, 4)
    recorder.stop(WITHIN_S)
    found, = rows(recorder)
    assert (found["request_id"], found["owner"], found["position"]) == ("of-a-job", "someone", 4)


def test_a_batch_whose_commit_was_not_acknowledged_is_not_written_twice(recorder):
    record(recorder, 2)
    wait_for(lambda: count(recorder), 2)
    failures = []

    @event.listens_for(recorder.database.engine, "commit")
    def committed(connection):
        if not failures:
            failures.append(1)
            connection.connection.dbapi_connection.commit() if not recorder.database.is_sqlite else \
                connection.connection.dbapi_connection.execute("COMMIT")
            raise OSError("the connection is lost")
    record(recorder, 5)
    wait_for(lambda: (len(failures), len(recorder.batch)), (1, 0))
    record(recorder, 1)
    recorder.stop(WITHIN_S)
    assert count(recorder) == 8


def test_what_the_database_refuses_does_not_hold_up_the_rest(recorder, monkeypatch):
    monkeypatch.setattr(module, "described", lambda data, *_: described(data, *_) | (
        {"input_sha256": None} if data == b"bad" else {}))
    for data in (b"good", b"bad", b"good", b"good", b"bad", *[b"good"] * 8):  # perhaps all in one transaction
        record(recorder, 1, data)
    wait_for(lambda: (count(recorder), recorder.dropped), (11, 2))
    record(recorder, 1)
    wait_for(lambda: count(recorder), 12)


def test_it_keeps_what_fits_while_the_database_is_away(server, monkeypatch):
    monkeypatch.setattr(module, "MOST", 40)
    recorder = new(server.database())
    record(recorder)
    wait_for(lambda: count(recorder), 1)
    server.kill()
    record(recorder, 50)
    server.start()
    wait_for(lambda: count(recorder), 41)
    assert recorder.dropped == 10
    record(recorder, 2)
    wait_for(lambda: count(recorder), 43)
    recorder.stop()
    recorder.database.close()


def test_the_end_does_not_wait_long_for_a_database_that_hangs(server):
    recorder = new(server.database())
    record(recorder)
    wait_for(lambda: count(recorder), 1)
    server.pause()
    try:
        record(recorder, 3)
        recorder.stop(within_s=0.5)
        assert recorder.dropped == 3
        assert recorder.thread.is_alive()
    finally:
        server.resume()
        recorder.thread.join(WITHIN_S)
    assert not recorder.thread.is_alive()
    recorder.database.close()


def test_inputs_that_wait_take_no_more_memory_than_allowed(tmp_path, monkeypatch):
    recorder = new(f"sqlite:///{tmp_path / 'service.db'}")
    monkeypatch.setattr(recorder, "start", lambda: None)  # it has not come to them yet
    for size in (30, 30, 10):
        record(recorder, 1, bytes(size * 2**20))
    assert (len(recorder.waiting), recorder.dropped) == (2, 1)
    record(recorder, 1000, ["JSON"])  # of which nobody knows the size
    assert recorder.waiting_bytes <= module.MOST_BYTES
    recorder.read_in()
    assert recorder.waiting_bytes == 0
    record(recorder, 1, bytes(30 * 2**20))
    assert len(recorder.waiting) == 1


def test_an_input_that_is_being_hashed_counts_among_those_that_wait(tmp_path, monkeypatch):
    recorder, counts = new(f"sqlite:///{tmp_path / 'service.db'}"), []
    monkeypatch.setattr(recorder, "start", lambda: None)  # read_in is called here

    def counted(*about):
        counts.append((len(recorder.waiting) + len(recorder.rows), recorder.waiting_bytes > 0))
        return described(*about)
    monkeypatch.setattr(module, "described", counted)
    record(recorder, 3)
    recorder.read_in()
    assert counts == [(3, True)] * 3
    assert (len(recorder.rows), recorder.waiting_bytes) == (3, 0)


def test_drops_are_counted_in_the_metrics(app, settings, tmp_path, monkeypatch):
    optional = dataclasses.replace(OPTIONAL, database_url=f"sqlite:///{tmp_path / 'service.db'}")
    made = create_app(dataclasses.replace(settings, optional=optional), app.extensions["model"])
    name, client = "model_server_history_dropped_total", made.test_client()

    def dropped():
        return next((float(line.split()[1]) for line in client.get("/metrics").text.splitlines()
                     if line.startswith(name)), None)
    before = dropped()
    monkeypatch.setattr(module, "MOST", 0)
    assert post(client, encoded(photo("coffee"))).status_code == 200
    assert dropped() == before + 1
    made.extensions["at_exit"]()
    made.extensions["database"].close()


# --- what the columns hold ---

def test_inputs_are_hashed_as_documented():
    assert hashlib.sha256(as_bytes(b"\xff")).hexdigest() == hashlib.sha256(b"\xff").hexdigest()
    assert as_bytes("ä\ud800") == b"\xc3\xa4\xed\xa0\x80"
    assert as_bytes({"b": [1, 2.5], "a": None}) == b'{"a":null,"b":[1,2.5]}'


@pytest.mark.parametrize(("predictions", "kept", "top_class", "confidence"), [
    ([{"class": "cat", "confidence": 0.75, "class_id": 0}, {"class": "dog"}], True, "cat", 0.75),
    ({"class": "setosa", "confidence": 1}, True, "setosa", 1.0),
    ({"class": "no\0where \ud800"}, True, "nowhere ?", None),
    ({"openness": 0.5}, True, None, None),
    ("x" * 4094, True, None, None),
    ("x" * 4095, False, None, None),
    ([0.5] * 4000, False, None, None),
    ({"media_type": "audio/wav", "b64": "AAAA"}, False, None, None),
    ([], True, None, None),
    (None, True, None, None),
])
def test_answers_are_kept_up_to_4_kib(predictions, kept, top_class, confidence):
    found = described(b"", {}, predictions)
    assert json.loads(found["predictions_json"]) == (predictions if kept else None)
    assert (found["top_class"], found["confidence"]) == (top_class, confidence)


def test_options_that_are_files_or_long_are_kept_as_hashes():
    found = json.loads(described(b"", {"voice": b"RIFF", "style": "x" * 1001, "speed": 1.5, "at": None}, None)
                       ["options_json"])
    assert found == {"voice": {"sha256": hashlib.sha256(b"RIFF").hexdigest()},
                     "style": {"sha256": hashlib.sha256(b"x" * 1001).hexdigest()}, "speed": 1.5, "at": None}


# --- HISTORY_DAYS ---

def test_old_predictions_are_removed_and_no_others(recorder, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 10)
    record(recorder, 3)
    wait_for(lambda: count(recorder), 3)
    now, recent = time.time(), dict(rows(recorder)[0])
    del recent["id"]
    with recorder.database.begin() as connection:
        connection.execute(insert(history), [recent | {"time": now - 86_400 * days} for days in (29.9, *[30.1] * 25)])
    assert purge(recorder.database, 30) == 25
    assert purge(recorder.database, 30) == 0
    assert count(recorder) == 4


def test_the_recorder_removes_them_itself_piece_by_piece(recorder, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 10)
    record(recorder)
    wait_for(lambda: count(recorder), 1)
    old = dict(rows(recorder)[0]) | {"time": 0.0}
    del old["id"]
    with recorder.database.begin() as connection:
        connection.execute(insert(history), [old] * 25)
    recorder.purge_at = 0.0
    record(recorder)
    wait_for(lambda: count(recorder), 2)
    assert recorder.purge_at > time.monotonic() + 3000
