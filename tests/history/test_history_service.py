"""The history of a running service: predictions never wait for it, and what it has is written at the end."""
import os
import signal
import threading
import time

import pytest
import requests
from conftest import encoded, need, photo
from servers import Postgres
from sqlalchemy import func, select

from app.data.database import Database
from app.data.schema import history
from app.history.recorder import LOG_EVERY_S

PICTURE = encoded(photo("coffee").resize((320, 213)), "JPEG")
WITHIN_S = 120


def recorded(database):
    """{request ID: how often it was recorded}."""
    with database.read() as connection:
        return dict(connection.execute(select(history.c.request_id, func.count()).group_by(history.c.request_id)).all())


def wait_for(call, within_s=WITHIN_S):
    until = time.monotonic() + within_s
    while not (value := call()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return value


def predict(service, number):
    """IDs of that many predictions, all of which are answered."""
    answers = [service.predict(PICTURE) for _ in range(number)]
    assert [answer.status_code for answer in answers] == [200] * number
    return [answer.headers["X-Request-ID"] for answer in answers]


def test_a_worker_that_stops_writes_all_and_one_that_is_killed_loses_only_the_last_ones(start_service, tmp_path):
    service = start_service(HISTORY="on", DATA_DIR=str(tmp_path / "data")).wait_ready()
    database = Database(f"sqlite:///{tmp_path / 'data' / 'service.db'}")
    older = predict(service, 5)
    wait_for(lambda: set(older) <= set(recorded(database)))
    worker, = service.workers()
    last = predict(service, 3)
    os.kill(worker, signal.SIGKILL)
    found = recorded(database)
    assert [found[one] for one in older] == [1] * 5
    assert set(found) <= {*older, *last}
    wait_for(lambda: service.workers() not in ([], [worker]))
    service.wait_ready()
    last = predict(service, 4)  # the first one is written at once, then it is half a second until the next
    service.stop(signal.SIGQUIT)  # which waits for nothing
    found = recorded(database)
    assert [found.get(one) for one in last] == [1] * 4
    database.close()


@pytest.fixture
def server(tmp_path):
    need("initdb")
    made = Postgres(tmp_path).start()
    yield made
    made.remove()


def test_a_database_that_hangs_costs_no_prediction_anything(start_service, server):
    url = server.database()
    service = start_service(HISTORY="on", DATABASE_URL=url, WORKERS="2").wait_ready()
    database, ids, lock, ended = Database(url), [], threading.Lock(), threading.Event()
    ids += predict(service, 1)
    wait_for(lambda: recorded(database))

    def load():
        while not ended.is_set():
            found = predict(service, 1)
            with lock:
                ids.extend(found)
    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: len(recorded(database)) > 10)
        server.pause()
        refused = requests.get(service.url + "/history", timeout=WITHIN_S)
        before = len(ids)
        wait_for(lambda: len(ids) > before + 30, 30)  # if each waited for the database, these would take 45 s
    finally:
        server.resume()
        ended.set()
        for client in clients:
            client.join()
    assert (refused.status_code, refused.json()["error"]) == (503, "HISTORY_UNAVAILABLE")
    assert refused.headers["Retry-After"] == "5"
    wait_for(lambda: recorded(database).keys() >= set(ids))
    last = predict(service, 3)
    assert service.stop() == 0
    found = recorded(database)
    assert found == dict.fromkeys([*ids, *last], 1)
    database.close()


def test_a_job_is_recorded_by_the_worker_that_ran_it(start_service, start_worker, tmp_path):
    variables = {"JOBS": "on", "HISTORY": "on", "DATA_DIR": str(tmp_path / "data"), "SHORT_WORKERS": "0",
                 "MODEL_NAME": "efficientnet_lite0"}
    service, worker = start_service(**variables), start_worker(**variables, DRAIN_SECONDS="60")
    service.wait_ready()
    files = [("files", ("a.jpg", PICTURE)), ("files", ("b.jpg", b"no picture")), ("files", ("c.jpg", PICTURE))]
    accepted = requests.post(service.url + "/jobs", files=files, headers={"X-Request-ID": "of-a-job"}, timeout=60)
    assert accepted.status_code == 202, accepted.text

    def job():
        return requests.get(service.url + accepted.json()["url"], timeout=60).json()
    found = wait_for(lambda: (body := job())["result"] and body)
    worker.stop()
    history = requests.get(service.url + "/history/of-a-job", timeout=60).json()["history"]
    assert sorted((one["position"], str(one["predictions"])) for one in history) == [
        (i, str(found["result"]["results"][i]["predictions"])) for i in (0, 2)]
    assert "history_dropped_total 0.0" in requests.get(service.url + "/metrics", timeout=60).text


def test_a_service_starts_and_predicts_without_its_database(start_service):
    service = start_service(HISTORY="on", DATABASE_URL="postgresql+psycopg://postgres@127.0.0.1:1/none").wait_ready()
    started = time.monotonic()
    predict(service, 2)
    assert requests.get(service.url + "/history", timeout=60).status_code == 503
    assert service.stop() == 0
    assert "2 predictions could not be written before the end" in service.log
    lines = service.log.count("history: it cannot be written now")
    assert 1 <= lines <= 1 + (time.monotonic() - started) // LOG_EVERY_S  # not with each attempt
