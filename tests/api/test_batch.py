"""POST /predict/batch: one result for each file, whatever the others are."""
import base64
import contextlib
import dataclasses
import functools
import threading
import time

import gevent
import gevent.event
import pytest
from conftest import encoded, photo, post
from urllib3 import encode_multipart_formdata

from app import create_app
from app.engine.batches import run_batch
from app.engine.slots import Slots
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.server import counters
from app.server.counters import Stages

CAT, COFFEE = encoded(photo("chelsea"), "JPEG"), encoded(photo("coffee"), "PNG")
TEXT = b"hello, I am a text\n" * 50


def post_files(client, *files, path="/predict/batch", name="files", **options):
    body, content_type = encode_multipart_formdata([*[(name, file) for file in files], *options.items()])
    return client.post(path, data=body, content_type=content_type)


def test_each_file_has_its_result_in_order(client):
    response = post_files(client, ("a.jpg", CAT), ("b.txt", TEXT), ("c.png", COFFEE), ("d.jpg", b""), top_k="2")
    assert response.status_code == 200
    body = response.json
    assert (body["status"], body["count"], body["failed"]) == ("success", 4, 2)
    assert [r["index"] for r in body["results"]] == [0, 1, 2, 3]
    assert [r["filename"] for r in body["results"]] == ["a.jpg", "b.txt", "c.png", "d.jpg"]
    assert [r["status"] for r in body["results"]] == ["success", "error", "success", "error"]
    cat, text, coffee, empty = body["results"]
    assert cat["predictions"] == post(client, CAT, top_k=2).json["predictions"]
    assert coffee["predictions"] == post(client, COFFEE, top_k=2).json["predictions"]
    assert coffee["metadata"]["image_size"] == [600, 400]
    assert (text["error"], empty["error"]) == ("INVALID_IMAGE", "EMPTY_FILE")
    assert sorted(text) == ["error", "filename", "index", "message", "status"]


def test_files_under_different_names_keep_their_order(client):
    body, content_type = encode_multipart_formdata([
        ("file", ("0.jpg", CAT)), ("image", ("1.jpg", CAT)), ("file", ("2.jpg", CAT)), ("files[]", ("3.jpg", CAT))])
    results = client.post("/predict/batch", data=body, content_type=content_type).json["results"]
    assert [r["filename"] for r in results] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_instances_with_a_broken_one(client):
    instances = [{"b64": base64.b64encode(CAT).decode()}, {"b64": "@"}, 7, {"b64": base64.b64encode(COFFEE).decode()}]
    results = client.post("/predict/batch", json={"instances": instances, "top_k": 1}).json["results"]
    assert [r.get("error") for r in results] == [None, "INVALID_PARAMETER", "INVALID_PARAMETER", None]
    assert [r["predictions"][0]["class"] for r in (results[0], results[3])] == ["tiger cat", "espresso"]
    assert results[1]["message"].startswith("instances[1] must be base64")


def test_a_batch_of_one_raw_body(client):
    body = client.post("/predict/batch", data=CAT, content_type="image/jpeg").json
    assert (body["count"], body["failed"]) == (1, 0)


def test_none_answered_is_422_with_the_results(client):
    response = post_files(client, ("a.txt", TEXT), ("b.jpg", CAT[:999]))
    assert response.status_code == 422
    body = response.json
    assert (body["status"], body["error"], body["count"], body["failed"]) == ("error", "ALL_FAILED", 2, 2)
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert [r["error"] for r in body["results"]] == ["INVALID_IMAGE"] * 2


@pytest.mark.parametrize("send", [
    lambda client, count: post_files(client, *[("a.jpg", CAT)] * count),
    lambda client, count: client.post("/predict/batch", json={"instances": [base64.b64encode(CAT).decode()] * count})])
def test_at_most_32_files(client, send):
    assert send(client, 32).json["count"] == 32
    response = send(client, 33)
    assert (response.status_code, response.json["error"]) == (400, "TOO_MANY_FILES")
    assert "at most 32 files, found 33" in response.json["message"]


def test_no_file_at_all(client):
    for response in (client.post("/predict/batch", json={"instances": []}), post_files(client),
                     post_files(client, ("", b"")), client.post("/predict/batch")):
        assert (response.status_code, response.json["error"]) == (400, "MISSING_FILE")
        assert response.json["message"].startswith("No file provided")


def test_one_file_over_the_limit_and_a_body_over_the_limit(app, settings):
    small = create_app(dataclasses.replace(settings, max_file_size=len(CAT), max_video_size=len(CAT)),
                       app.extensions["model"]).test_client()
    results = post_files(small, ("a.jpg", CAT), ("b.jpg", CAT + b"\0")).json["results"]
    assert [r.get("error") for r in results] == [None, "FILE_TOO_LARGE"]
    response = post_files(small, *[("a.jpg", CAT)] * 13)
    assert (response.status_code, response.json["error"]) == (413, "FILE_TOO_LARGE")


def test_a_bad_option_is_the_whole_batchs(client):
    response = post_files(client, ("a.jpg", CAT), top_k="11")
    assert (response.status_code, response.json["error"]) == (400, "INVALID_PARAMETER")


def test_a_bug_met_by_one_file_is_that_files_alone(app, client, monkeypatch, caplog):
    engine = app.extensions["model"].current.task.engine
    infer, lock, calls = engine.infer, threading.Lock(), []

    def fails_once(*arguments):
        with lock:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("secret")
        return infer(*arguments)
    monkeypatch.setattr(engine, "infer", fails_once)
    response = post_files(client, ("a.jpg", CAT), ("b.jpg", CAT), ("c.jpg", CAT))
    assert (response.status_code, response.json["failed"]) == (200, 1)
    assert "secret" not in response.text
    assert "RuntimeError: secret" in caplog.text
    assert "in fails_once" in caplog.text  # the stack trace leads to where it was raised, in another thread
    monkeypatch.setattr(engine, "infer", lambda *arguments: 1 / 0)
    response = post_files(client, ("a.jpg", CAT))
    assert (response.status_code, response.json["error"]) == (500, "INTERNAL_ERROR")


@contextlib.contextmanager
def all_at_work(slots):
    """Around a time for which every slot is taken."""
    gate = threading.Event()
    greenlets = [gevent.spawn(slots.run, gate.wait, Deadline(30), Stages()) for _ in range(slots.count)]
    while len(slots.running) < slots.count:
        gevent.sleep(0.001)
    try:
        yield
    finally:
        gate.set()
        gevent.joinall(greenlets, raise_error=True)


def test_a_batch_is_longer_than_the_queue_and_a_full_queue_refuses_it(app, client, monkeypatch):
    slots = Slots(1, max_queue=0)
    monkeypatch.setattr(app.extensions["model"], "slots", slots)
    assert post_files(client, *[("a.jpg", CAT)] * 5).json["failed"] == 0
    with all_at_work(slots):
        response = post_files(client, ("a.jpg", CAT))
    assert (response.status_code, response.json["error"]) == (503, "OVERLOADED")
    assert int(response.headers["Retry-After"]) >= 1


def test_a_slot_is_free_again_when_the_answer_is_there_not_a_moment_later(monkeypatch):
    slots, change = Slots(1, max_queue=0), counters.change

    def slow_change(name, amount):  # which a slot's thread does at the end of a call
        change(name, amount)
        time.sleep(0.02)
    monkeypatch.setattr(counters, "change", slow_change)
    for _ in range(3):
        slots.run(list, Deadline(10), Stages())


def test_single_requests_get_their_turn_within_a_batch():
    slots, done, begun, gate = Slots(1, max_queue=4), [], threading.Event(), threading.Event()

    def work(i):
        if i == 2:
            begun.set()
            gate.wait(10)
        done.append(i)

    def call(i):
        slots.run(functools.partial(work, i), Deadline(10), Stages(), admitted=True)
    batch = gevent.spawn(run_batch, slots, [functools.partial(call, i) for i in range(20)])
    with gevent.Timeout(10):
        while not begun.is_set():
            gevent.sleep(0.001)
        single = gevent.spawn(slots.run, functools.partial(work, "single"), Deadline(10), Stages())
        while len(slots.waiting) < 1:
            gevent.sleep(0.001)
    gate.set()
    gevent.joinall([single, batch], timeout=10, raise_error=True)
    assert done.index("single") < 2 + 8
    assert [d for d in done if d != "single"] == list(range(20))


def test_a_file_of_a_batch_waits_where_a_single_request_is_refused():
    slots = Slots(1, max_queue=0)
    with all_at_work(slots):
        with pytest.raises(ServiceError, match="at its limit"):
            slots.run(list, Deadline(10), Stages())
        with pytest.raises(DeadlineExceeded, match="during queue"):
            slots.run(list, Deadline(0.05), Stages(), admitted=True)


def test_batches_that_wait_are_bounded():
    slots, gate = Slots(1, max_queue=4), gevent.event.Event()
    batch = gevent.spawn(run_batch, slots, [gate.wait] * 5)
    gevent.sleep(0)
    with pytest.raises(ServiceError) as e:
        run_batch(slots, [gate.wait])
    assert e.value.code == "OVERLOADED"
    gate.set()
    assert batch.get(timeout=5) == [True] * 5
    assert slots.batched == 0
    assert run_batch(slots, [gate.wait]) == [True]


def test_files_that_the_time_did_not_reach(app, settings, monkeypatch):
    loader, begun = app.extensions["model"], []
    engine = loader.current.task.engine
    infer = engine.infer

    def slow(*arguments):
        begun.append(1)
        if len(begun) == 2:
            time.sleep(1.6)
        return infer(*arguments)
    monkeypatch.setattr(engine, "infer", slow)
    monkeypatch.setattr(loader, "slots", Slots(1, max_queue=4))
    hasty = create_app(dataclasses.replace(settings, request_timeout=1.5), loader).test_client()
    results = post_files(hasty, *[("a.jpg", CAT)] * 6).json["results"]
    assert results[0]["status"] == "success"
    assert {r["error"] for r in results[1:]} == {"DEADLINE_EXCEEDED"}
    assert len(begun) == 2
    assert loader.slots.batched == len(loader.slots.waiting) == 0  # what had not begun never will


def test_a_batch_that_is_cut_off_while_it_waits_makes_room():
    slots = Slots(1, 4)
    batch = gevent.spawn(run_batch, slots, [functools.partial(gevent.sleep, 30)] * 4)
    with gevent.Timeout(10):
        while slots.batched != 4:
            gevent.sleep(0.001)
        batch.kill()
        while slots.batched:
            gevent.sleep(0.001)
