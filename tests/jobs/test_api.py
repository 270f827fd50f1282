"""Jobs over HTTP: what every request leaves in the database, the storage and the broker, and what clients are told."""
import base64
import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path

import gevent
import openapi_spec_validator
import pytest
import redis
import requests
import sqlalchemy
import videos
from conftest import Service, encoded, need, photo
from PIL import Image
from servers import Redis
from sqlalchemy import update
from urllib3 import encode_multipart_formdata

from app import create_app
from app.config import Settings, SettingsError
from app.data import database
from app.data.background import LISTINGS, Background
from app.data.schema import deliveries
from app.data.schema import jobs as table
from app.errors import Deadline, ServiceError
from app.jobs import api, calls, webhooks
from app.jobs.store import label
from app.server.counters import Stages

WHITE, RED, BLUE = (encoded(Image.new("RGB", (40, 40), colour)) for colour in ("white", "red", "blue"))
B64 = [base64.b64encode(data).decode() for data in (WHITE, RED, BLUE)]
CLIP = videos.write([videos.numbered(i) for i in range(12)])
KEYS = {"API_KEYS": "key-of-ann,key-of-ben", "ADMIN_KEYS": "key-of-admin"}
LONG_S = 120  # for what only a machine that is very busy takes so long for


@pytest.fixture
def patient(monkeypatch):
    """No call of many at once is refused because the machine is slow."""
    monkeypatch.setitem(Background.run.__kwdefaults__, "within_s", LONG_S)
    monkeypatch.setattr(database, "CONNECT_WITHIN_S", LONG_S)
    monkeypatch.setattr(api, "ENOUGH_S", LONG_S)


class Ask:
    """A test client of an application with jobs, and what lies behind it."""

    def __init__(self, app, variables):
        self.app, self.client, self.variables = app, app.test_client(), variables
        self.jobs = app.extensions["jobs"]
        self.store = self.jobs.store
        self.folder = Path(variables["DATA_DIR"]) / "storage"

    def post(self, *fields, path="/jobs", method="POST", headers=None, **options):
        """A form of (field, filename, data), and options."""
        parts = [(field, (filename, data)) for field, filename, data in fields]
        body, content_type = encode_multipart_formdata([*parts, *options.items()])
        return self.client.open(path, method=method, data=body, content_type=content_type, headers=headers or {})

    def row(self, answer):
        assert answer.status_code == 202, answer.text
        return self.store.get(answer.json["id"], None)

    def rows(self):
        return self.store.listed(None, limit=1000)

    def stored(self):
        """{key: bytes} of the storage, without the folder that is the database's."""
        found = {}
        for path in sorted(Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names):
            with contextlib.suppress(FileNotFoundError):  # it is being removed, perhaps with its folder
                found["/".join(path.relative_to(self.folder).parts[1:])] = path.read_bytes()
        return found

    def stored_of(self, row):
        return [data for key, data in self.stored().items() if key.startswith(row["id"])]

    def messages(self):
        """IDs of the jobs that the broker has been given."""
        if "JOBS_BROKER" in self.variables:
            with contextlib.closing(redis.Redis.from_url(self.variables["JOBS_BROKER"])) as client:
                texts = [text for queue in ("short", "long") for text in client.lrange(queue, 0, -1)]
        else:
            texts = [path.read_bytes() for path in (Path(self.variables["DATA_DIR"]) / "queue").glob("*.msg")]
        return [json.loads(base64.b64decode(json.loads(text)["body"]))[0][0] for text in texts]

    def is_empty(self):
        return not self.rows() and not self.stored() and not self.messages()

    def claim(self, answer):
        """Begin an attempt at a job as a worker does, before its turn has come."""
        with self.store.database.begin() as connection:
            connection.execute(update(table).where(table.c.id == answer.json["id"]).values(turn=-1))
        return self.store.claim(answer.json["queue"], [label(answer.json["model"], answer.json.get("version"))],
                                "a-worker/1")

    def finish(self, answer, state="succeeded", **outcome):
        """End a job as a worker does."""
        row = self.claim(answer)
        self.store.finish(row["id"], row["attempt"], state, row["total"], **outcome)


@pytest.fixture(scope="module")
def applications(app):
    """applications(variables): an Ask with these settings and the model of `app`, or that of MODELS."""
    made = []

    def make(variables, loader=None):
        if loader is None and "MODELS" not in variables:
            loader = app.extensions["model"]
        settings = Settings.parse({"JOBS": "on", "DEVICE": "cpu", **variables})
        made.append(Ask(create_app(settings, loader), variables))
        return made[-1]
    yield make
    for one in made:
        one.app.extensions["database"].close()


@pytest.fixture
def ask(applications, tmp_path):
    """ask(**variables): the same with everything embedded."""
    return lambda **variables: applications({"DATA_DIR": str(tmp_path / "data"), **variables})


@pytest.fixture(scope="module")
def plain(applications, tmp_path_factory):
    """An Ask that tests share which find in it only what is their own, or nothing."""
    return applications({"DATA_DIR": str(tmp_path_factory.mktemp("data")), "CALLBACK_SECRET": "0123456789abcdef0123"})


@pytest.fixture
def on_engines(applications, engines):
    """on_engines(**variables): the same, once embedded and once with PostgreSQL and Redis."""
    return lambda **variables: applications({**engines, **variables})


def error_of(response):
    body = response.json
    assert sorted(body) == ["error", "message", "request_id", "status"]
    assert body["status"] == "error"
    assert body["request_id"] == response.headers["X-Request-ID"]
    return response.status_code, body["error"]


def wait_for(condition):
    """In greenlets."""
    with gevent.Timeout(LONG_S):
        while not condition():
            gevent.sleep(0.02)


# --- submitting ---

def test_a_job_is_in_the_database_the_storage_and_the_broker(on_engines):
    ask = on_engines()
    answer = ask.post(("file", "pictures/white.png", WHITE), top_k="3")
    body = answer.json
    assert answer.status_code == 202
    assert answer.headers["Location"] == body["url"] == f"/jobs/{body['id']}"
    assert answer.headers["Retry-After"] == "1"
    assert abs(body.pop("created_at") - time.time()) < 10
    assert "efficientnet_lite0 from the queue short" in body.pop("warning")
    assert body == {"status": "success", "id": body["id"], "state": "queued", "url": f"/jobs/{body['id']}",
                    "request_id": answer.headers["X-Request-ID"], "model": "efficientnet_lite0", "queue": "short",
                    "started_at": None, "ended_at": None, "expires_at": None, "attempts": 0, "cancel_requested": False,
                    "progress": {"done": 0, "total": 1, "unit": "files"}, "callback": None, "error": None,
                    "result": None}
    row = ask.row(answer)
    key = f"{body['id']}/0"
    assert json.loads(row["inputs_json"]) == [{
        "key": key, "filename": "white.png", "field": "file", "bytes": len(WHITE), "kind": "file",
        "sha256": hashlib.sha256(WHITE).hexdigest()}]
    assert json.loads(row["options_json"])["top_k"] == 3
    assert (row["owner"], row["is_batch"], row["input_bytes"]) == ("", False, len(WHITE))
    assert row["request_id"] == answer.headers["X-Request-ID"]
    assert ask.stored() == {key: WHITE}
    assert ask.messages() == [body["id"]]
    assert ask.client.get(body["url"]).json == answer.json


def form(*fields, **options):
    body, content_type = encode_multipart_formdata([*((f, (name, data)) for f, name, data in fields),
                                                    *options.items()])
    return {"data": body, "content_type": content_type}


NAMELESS = {"data": b"--x\r\nContent-Disposition: form-data; name=file\r\nContent-Type: image/png\r\n\r\n" + WHITE
                    + b"\r\n--x--\r\n", "content_type": "multipart/form-data; boundary=x"}
# name → (request, whether it is a batch, contents)
FORMS = {
    **{field: (form((field, "a.png", WHITE)), False, [WHITE]) for field in ("file", "image", "video", "data")},
    "raw": ({"data": WHITE, "content_type": "image/png"}, False, [WHITE]),
    "raw, no type": ({"data": WHITE}, False, [WHITE]),
    "PUT": ({"data": WHITE, "method": "PUT"}, False, [WHITE]),
    "part without a name": (NAMELESS, False, [WHITE]),
    "base64": ({"json": {"image": B64[0]}}, False, [WHITE]),
    "data: URL": ({"json": {"file": f"data:image/png;base64,{B64[0]}"}}, False, [WHITE]),
    "one instance": ({"json": {"instances": [{"b64": B64[0]}]}}, False, [WHITE]),
    "instances": ({"json": {"instances": [{"b64": B64[0]}, {"image": {"b64": B64[1]}}, B64[2]]}}, True,
                  [WHITE, RED, BLUE]),
    "JSON, files": ({"json": {"files": B64[1]}}, True, [RED]),
    "one in files": (form(("files", "a.png", WHITE)), True, [WHITE]),
    "one in files[]": (form(("files[]", "a.png", WHITE)), True, [WHITE]),
    "files": (form(*(("files", f"{i}.png", data) for i, data in enumerate((WHITE, RED, BLUE)))), True,
              [WHITE, RED, BLUE]),
    "file twice": (form(("file", "a.png", RED), ("file", "b.png", BLUE)), True, [RED, BLUE]),
    "different fields": (form(("image", "a.png", RED), ("files", "b.png", BLUE)), True, [RED, BLUE]),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("path", ["/jobs", "/predict/async", "/models/efficientnet_lite0/jobs"])
def test_every_upload_form_of_predict_and_batch_works(plain, path, name):
    request, is_batch, contents = FORMS[name]
    row = plain.row(plain.client.open(path, **{"method": "POST", **request}, query_string={"top_k": 2}))
    assert plain.stored_of(row) == contents
    assert (row["is_batch"], row["total"], row["unit"]) == (is_batch, len(contents), "files")
    assert json.loads(row["options_json"])["top_k"] == 2


MANY = [("files", f"{i}.png", WHITE) for i in range(5)]
BAD = [
    ({}, 400, "MISSING_FILE"),
    (form(("file", "", b"")), 400, "MISSING_FILE"),
    (form(file="text"), 400, "MISSING_FILE"),
    (form(("file", "a.png", b"")), 400, "EMPTY_FILE"),
    ({"data": b"", "content_type": "image/png"}, 400, "EMPTY_FILE"),
    ({"json": {"image": "not base64!"}}, 400, "INVALID_PARAMETER"),
    ({"json": {"instances": [5]}}, 400, "INVALID_PARAMETER"),
    ({"json": {"instances": "x"}}, 400, "INVALID_JSON"),
    ({"json": {"image": B64[0], "instances": [B64[1]]}}, 400, "TOO_MANY_FILES"),
    ({"data": b"{", "content_type": "application/json"}, 400, "INVALID_JSON"),
    ({"data": WHITE, "content_type": "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    ({"json": {"image": f"data:text/html;base64,{B64[0]}"}}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    ({"data": WHITE, "headers": {"Content-Encoding": "gzip"}}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    ({"data": bytes(20_001)}, 413, "FILE_TOO_LARGE"),
    (form(("file", "a.png", bytes(20_001))), 413, "FILE_TOO_LARGE"),
    ({"data": bytes(200_000)}, 413, "FILE_TOO_LARGE"),
    (form(*MANY), 400, "TOO_MANY_FILES"),
    ({"data": WHITE, "query_string": {"top_k": 20}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "query_string": {"frames": 99}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "query_string": {"topk": 2}}, 400, "INVALID_PARAMETER"),
    (form(("file", "a.png", WHITE), method="nose"), 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "query_string": "top_k=1&top_k=2"}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "query_string": {"model": "other"}}, 404, "NOT_FOUND"),
    ({"data": WHITE, "headers": {"X-Request-Timeout": "-1"}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "headers": {"X-Request-Timeout": "0.000001"}}, 504, "DEADLINE_EXCEEDED"),
    ({"data": WHITE, "headers": {"Idempotency-Key": ""}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "headers": {"Idempotency-Key": "a" * 256}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "headers": {"Idempotency-Key": "a b"}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "headers": {"Idempotency-Key": "schl\u00fcssel"}}, 400, "INVALID_PARAMETER"),
    ({"data": WHITE, "query_string": {"callback_url": "https://example.org/"}}, 400, "INVALID_PARAMETER"),  # no secret
    ({"json": {"image": B64[0], "callback_url": ["https://example.org/"]}}, 400, "INVALID_PARAMETER"),
]


@pytest.fixture(scope="module")
def strict(applications, tmp_path_factory):
    """An Ask with low limits."""
    return applications({"DATA_DIR": str(tmp_path_factory.mktemp("strict")), "MAX_FILE_SIZE": "20000",
                         "MAX_VIDEO_SIZE": "20000", "MAX_JOB_SIZE": "100000", "MAX_JOB_FILES": "4"})


@pytest.mark.parametrize(("request_", "status", "code"), BAD)
def test_a_bad_request_is_refused_at_once_and_leaves_nothing(strict, request_, status, code):
    before = strict.rows(), strict.stored(), strict.messages()
    assert error_of(strict.client.post("/jobs", **request_)) == (status, code)
    assert (strict.rows(), strict.stored(), strict.messages()) == before


@pytest.mark.parametrize("url", ["javascript:alert(1)", "file:///etc/passwd", "ftp://example.org/", "//example.org/",
                                 "https://", "https://user:word@example.org/", "http://127.0.0.1/", "http://[::1]/",
                                 "http://169.254.169.254/latest/meta-data", "http://2130706433/", "http://0x7f.1/",
                                 "https://example.org/\r\nHost: x", "https://example.org/\0", "https://ex ample.org/",
                                 "https://example.org/" + "a" * 3000, "5", "https://ex\u00e4mple.org/\u2028"])
def test_odd_callback_urls_are_refused(plain, url):
    before = plain.rows(), plain.stored()
    for answer in (plain.post(("file", "a.png", WHITE), callback_url=url),
                   plain.client.post("/jobs", json={"image": B64[0], "callback_url": url}),
                   plain.client.post("/jobs", data=WHITE, query_string={"callback_url": url})):
        assert error_of(answer) == (400, "INVALID_PARAMETER")
    assert (plain.rows(), plain.stored()) == before


def test_a_callback_is_kept_and_shown_with_its_deliveries(on_engines):
    ask = on_engines(CALLBACK_SECRET="0123456789abcdef0123")
    url = "https://example.org/hook?x=1"
    answer = ask.client.post("/jobs", json={"image": B64[0], "callback_url": url})
    assert ask.row(answer)["callback_url"] == url
    assert answer.json["callback"] == {"url": url, "id": None, "state": None, "next_at": None, "attempts": []}
    ask.finish(answer, result={"status": "success"})
    for body in (ask.client.get(answer.json["url"]).json, ask.client.get("/jobs").json["jobs"][0]):
        message_id, next_at = (body["callback"].pop(name) for name in ("id", "next_at"))
        assert body["callback"] == {"url": url, "state": "pending", "attempts": []}
        assert (len(message_id), next_at) == (32, body["ended_at"])


def test_an_attempt_that_was_redirected_says_why_it_failed(ask):
    asked = ask(CALLBACK_SECRET="0123456789abcdef0123")
    answer = asked.client.post("/jobs", json={"image": B64[0], "callback_url": "https://example.org/hook"})
    asked.finish(answer, result={"status": "success"})
    attempts = [{"at": 1.0, "status": status, "error": None, "ms": 1} for status in (302, 404)]
    with asked.store.database.begin() as connection:
        connection.execute(update(deliveries).values(attempts_json=json.dumps(attempts)))
    found = asked.client.get(answer.json["url"]).json["callback"]["attempts"]
    assert [one["error"] for one in found] == ["redirects are not followed", None]


def test_bad_files_of_a_batch_become_their_own_results(strict):
    row = strict.row(strict.post(("files", "a.png", b""), ("files", "b.png", WHITE), ("files", "c.png", bytes(20_001))))
    first, second, third = json.loads(row["inputs_json"])
    assert (first["filename"], first["field"], first["error"]["error"]) == ("a.png", "files", "EMPTY_FILE")
    assert second["key"] == f"{row['id']}/1"
    assert third["error"] == {"error": "FILE_TOO_LARGE",
                              "message": "The file has 20,001 bytes; the limit is 20,000 bytes (MAX_FILE_SIZE)."}
    assert strict.stored_of(row) == [WHITE]
    row = strict.row(strict.client.post("/jobs", json={"instances": ["no base64!", 5]}))
    assert [one["error"]["error"] for one in json.loads(row["inputs_json"])] == ["INVALID_PARAMETER"] * 2
    assert (row["input_bytes"], row["total"]) == (0, 2)


@pytest.mark.parametrize("name", ["a\0b.png", "\U0001f600.png", "a'; DROP TABLE jobs; --.png", "a" * 2000 + ".png"])
def test_odd_file_names_are_kept(on_engines, name):
    body = (b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + name.encode()
            + b'"\r\nContent-Type: image/png\r\n\r\n' + WHITE + b"\r\n--x--\r\n")
    ask = on_engines()
    row = ask.row(ask.client.post("/jobs", data=body, content_type="multipart/form-data; boundary=x"))
    assert [one["filename"] for one in json.loads(row["inputs_json"])] == [name]
    assert list(ask.stored()) == [f"{row['id']}/0"]


def test_videos_and_many_files_are_for_the_long_queue(on_engines):
    ask = on_engines()
    queues = [ask.row(ask.post(*fields))["queue"] for fields in (
        [("file", "clip.mp4", CLIP)], [("files", "a.png", WHITE), ("files", "clip.mp4", CLIP)],
        [("files", "a.png", WHITE)] * 8, [("files", "a.png", WHITE)] * 9)]
    assert queues == ["long", "long", "short", "long"]
    assert len(ask.messages()) == 4


@pytest.mark.parametrize(("options", "total"), [({}, 1), ({"frames": "7"}, 7), ({"frames": "7", "at": "0.1"}, 1)])
def test_the_progress_of_a_video_is_in_frames(plain, options, total):
    asked = plain
    assert asked.post(("file", "clip.mp4", CLIP), **options).json["progress"] == {
        "done": 0, "total": total, "unit": "frames"}
    assert asked.post(("files", "clip.mp4", CLIP), **options).json["progress"] == {
        "done": 0, "total": 1, "unit": "files"}


def test_ten_thousand_parts_are_not_too_many_where_the_settings_allow_them(ask):
    asked = ask(MAX_JOB_FILES="6000")
    instances = [{"b64": "eA=="}] * 6000
    assert asked.row(asked.client.post("/jobs", json={"instances": instances[:200]}))["total"] == 200
    assert error_of(asked.client.post("/jobs", json={"instances": [*instances, "eA=="]})) == (400, "TOO_MANY_FILES")
    assert asked.row(asked.post(*[("files", "a.png", b"x")] * 300))["total"] == 300


# --- models of one's own, several models ---

@pytest.fixture(scope="module")
def own_loaders():
    """own_loaders(MODEL_NAME): the loader of a model of tests/own_tasks.py, loaded once."""
    loaders = {}

    def get(name):
        if name not in loaders:
            settings = Settings.parse({"MODEL_NAME": f"tests.own_tasks:{name}", "DEVICE": "cpu"})
            loaders[name] = create_app(settings).extensions["model"]
        return loaders[name]
    return get


@pytest.fixture
def own(applications, tmp_path, own_loaders):
    return lambda name: applications({"DATA_DIR": str(tmp_path / "data")}, own_loaders(name))


def inputs_of(asked, answer):
    """[(kind, what the storage holds)] of a job."""
    stored = asked.stored()
    return [(one["kind"], json.loads(stored[one["key"]])) for one in json.loads(asked.row(answer)["inputs_json"])]


def test_json_inputs_are_kept_as_json(own):
    asked = own("Sum")
    answer = asked.client.post("/jobs", json={"numbers": [1, 2.5], "times": 3})
    assert inputs_of(asked, answer) == [("json", [1, 2.5])]
    assert json.loads(asked.row(answer)["options_json"])["times"] == 3
    answer = asked.client.post("/jobs", json={"instances": [{"numbers": [1]}]})
    assert inputs_of(asked, answer) == [("instances", [[[1], "instances[0]"]])]
    assert not asked.row(answer)["is_batch"]
    answer = asked.client.post("/jobs", json={"instances": [[1], {"numbers": [2]}, "text"]})
    assert inputs_of(asked, answer) == [("json", [1]), ("json", [2]), ("json", "text")]
    assert asked.row(answer)["is_batch"]
    for body, code in (({}, "MISSING_INPUT"), ({"instances": []}, "MISSING_INPUT"),
                       ({"numbers": [1], "times": 99}, "INVALID_PARAMETER")):
        assert error_of(asked.client.post("/jobs", json=body)) == (400, code)


def test_a_callback_is_no_member_of_an_input_that_is_the_whole_body(own):
    asked = own("Members")
    answer = asked.client.post("/jobs", json={"a": 1, "b": None, "times": 3, "callback_url": None})
    assert inputs_of(asked, answer) == [("json", {"a": 1, "b": None})]


def test_an_option_that_is_a_file_is_stored_too(own):
    asked = own("Sum")
    body = {"numbers": [1], "more": base64.b64encode(b"voice").decode()}
    row = asked.row(asked.client.post("/jobs", json=body))
    key = f"{row['id']}/option-more"
    assert json.loads(row["options_json"])["more"] == {"key": key}
    assert asked.stored()[key] == b"voice"
    assert row["input_bytes"] == len("[1]") + len("voice")


def test_text_is_taken_in_every_form_and_media_models_are_for_the_long_queue(own):
    asked = own("Tone")
    for request in ({"json": {"text": "la l\u00e4"}}, {"data": "la l\u00e4".encode(), "content_type": "text/plain"},
                    {"data": {"text": "la l\u00e4"}}, form(("text", "a.txt", "la l\u00e4".encode()))):
        answer = asked.client.post("/jobs", **request)
        assert inputs_of(asked, answer) == [("json", "la l\u00e4")]
        assert answer.json["queue"] == "long"
    answer = asked.client.post("/jobs", json={"instances": ["a", 5, "b"]})
    assert [one.get("error", {}).get("error") for one in json.loads(asked.row(answer)["inputs_json"])] == [
        None, "INVALID_PARAMETER", None]
    assert error_of(asked.client.post("/jobs", json={"text": 5})) == (400, "INVALID_PARAMETER")


def test_a_recording_is_for_the_long_queue(own):
    asked = own("Length")
    assert asked.client.post("/jobs", data=b"RIFF", content_type="audio/wav").json["queue"] == "long"


def test_the_version_that_the_client_gets_is_recorded(applications, tmp_path):
    asked = applications({"DATA_DIR": str(tmp_path / "data"), "SPLIT_HEADER": "X-User", "SUM__SPLIT": "1:50,2:50",
                          "MODELS": "tone=tests.own_tasks:Tone,sum@1=tests.own_tasks:Sum,sum@2=tests.own_tasks:Sum",
                          "LOAD_MODELS": "first_use"})

    def versions(path="/models/sum/jobs", **body):
        answers = [asked.client.post(path, json={"numbers": [1], **body}, headers={"X-User": f"user-{user}"})
                   for user in range(12)]
        return [(answer.json["model"], answer.json["version"]) for answer in answers]
    chosen = versions()
    assert set(chosen) == {("sum", "1"), ("sum", "2")}
    assert versions("/jobs", model="sum") == chosen  # the same client, the same version
    assert set(versions("/models/sum@2/jobs")) == {("sum", "2")}
    assert "version" not in asked.client.post("/jobs", json={"text": "la"}).json
    assert error_of(asked.client.post("/models/none/jobs", json={"text": "la"})) == (404, "NOT_FOUND")


# --- Idempotency-Key ---

def keyed(asked, key, *fields, headers=None, **options):
    return asked.post(*fields, headers={"Idempotency-Key": key, **(headers or {})}, **options)


def test_a_repeat_gets_the_same_job(on_engines):
    ask = on_engines()
    first = keyed(ask, "key-1", ("file", "a.png", WHITE), top_k="2")
    again = keyed(ask, "key-1", ("file", "a.png", WHITE), top_k="2")
    other = keyed(ask, "key-2", ("file", "a.png", WHITE), top_k="2")
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Location"] == first.headers["Location"] != other.headers["Location"]
    assert again.json == first.json
    assert len(ask.rows()) == len(ask.stored()) == len(ask.messages()) == 2
    ask.finish(first, result={"status": "success", "predictions": []})
    assert keyed(ask, "key-1", ("file", "a.png", WHITE), top_k="2").json["result"] == {
        "status": "success", "predictions": []}


def test_the_form_of_the_same_content_does_not_matter(plain):
    """The boundary, the order of the fields, where options are, and multipart or JSON."""
    asked = plain
    parts = [("file", ("a.png", WHITE)), ("top_k", "2"), ("frames", "3")]
    requests_ = [{"data": body, "content_type": content_type} for body, content_type in (
        encode_multipart_formdata(parts), encode_multipart_formdata(parts[::-1], boundary="another"))]
    requests_.append({**form(("image", "a.png", WHITE), frames="3"), "query_string": {"top_k": "2"}})
    ids = {asked.client.post("/jobs", headers={"Idempotency-Key": "k"}, **one).json["id"] for one in requests_}
    assert len(ids) == 1
    raw = {"data": WHITE, "query_string": {"top_k": "2"}, "headers": {"Idempotency-Key": "raw"}}
    json_ = {"json": {"image": B64[0], "top_k": 2, "callback_url": None}, "headers": {"Idempotency-Key": "raw"}}
    assert asked.client.put("/jobs", **raw).json["id"] == asked.client.post("/jobs", **json_).json["id"]


@pytest.mark.parametrize("change", [
    {"fields": [("file", "a.png", RED)]}, {"fields": [("file", "b.png", WHITE)]},
    {"fields": [("files", "a.png", WHITE)]}, {"fields": [("file", "a.png", WHITE)] * 2}, {"top_k": "3"},
    {"frames": "2"}])
def test_other_content_with_the_same_key_is_refused(plain, change):
    key, original = str(uuid.uuid4()), {"fields": [("file", "a.png", WHITE)], "top_k": "2"}
    answers, left = [], []
    for sent in (original, {**original, **change}):
        fields = sent.pop("fields")
        answers.append(keyed(plain, key, *fields, **sent))
        left.append((plain.rows(), plain.stored(), plain.messages()))
    assert answers[0].status_code == 202
    assert error_of(answers[1]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert left[0] == left[1]


def test_identical_requests_at_the_same_time_make_one_job(on_engines, patient):
    ask = on_engines()
    keyed(ask, "warm-up", ("file", "a.png", RED))
    tasks = [gevent.spawn(keyed, ask, f"key-{i % 3}", ("file", "a.png", WHITE)) for i in range(18)]
    answers = [task.get() for task in tasks]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json["id"] for answer in answers}) == 3
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 3
    ids = {row["id"] for row in ask.rows()}
    assert len(ids) == 4
    wait_for(lambda: {key.partition("/")[0] for key in ask.stored()} == ids == set(ask.messages()))
    assert len(ask.messages()) == 4


def test_a_job_that_a_repeat_was_told_of_is_not_withdrawn(on_engines, patient):
    """Of two requests with the same key, one may fail to publish after the other was answered."""
    ask = on_engines()
    publish, is_publishing, fails = ask.jobs.broker.publish, threading.Event(), threading.Event()

    def late(*_):
        is_publishing.set()
        fails.wait(LONG_S)
        raise ConnectionError("the broker is away")
    ask.jobs.broker.publish = late
    first = gevent.spawn(keyed, ask, "k", ("file", "a.png", WHITE))
    wait_for(is_publishing.is_set)
    again = keyed(ask, "k", ("file", "a.png", WHITE))
    fails.set()
    assert first.get().json["id"] == again.json["id"] == ask.rows()[0]["id"]
    assert len(ask.stored()) == 1
    ask.jobs.broker.publish = publish


def test_a_job_is_withdrawn_only_if_nobody_relies_on_it(on_engines):
    store = on_engines().store
    row = {"id": uuid.uuid4().hex, "owner": "", "queue": "short", "request_id": "r", "model": "m", "version": None,
           "is_batch": False, "options_json": "{}", "inputs_json": "[]", "input_bytes": 0, "fingerprint": "",
           "idempotency_key": "k", "callback_url": None, "total": 1, "unit": "files"}
    store.add(row)
    assert store.rely_on(row["id"])
    assert not store.withdraw(row["id"])
    other = {**row, "id": uuid.uuid4().hex, "idempotency_key": None}
    store.add(other)
    assert store.withdraw(other["id"])
    assert not store.rely_on(other["id"])
    assert [one["id"] for one in store.listed(None)] == [row["id"]]


# --- the jobs that there are ---

def test_a_finished_job_has_its_result(on_engines):
    ask = on_engines()
    answer = ask.post(("file", "a.png", WHITE))
    result = {"status": "success", "predictions": [{"class": "caf\u00e9 \u2028"}], "metadata": {"filename": "a.png"}}
    ask.finish(answer, result=result)
    found = ask.client.get(answer.json["url"])
    assert (found.status_code, found.json["state"], found.json["result"]) == (200, "succeeded", result)
    assert found.json["progress"] == {"done": 1, "total": 1, "unit": "files"}
    assert found.json["attempts"] == 1
    assert found.json["created_at"] <= found.json["started_at"] <= found.json["ended_at"] < found.json["expires_at"]
    assert "Retry-After" not in found.headers
    answer = ask.post(("file", "a.png", WHITE))
    error = {"error": "INVALID_IMAGE", "message": "It is none."}
    ask.finish(answer, "failed", error=error)
    found = ask.client.get(answer.json["url"]).json
    assert (found["status"], found["state"], found["error"], found["result"]) == ("success", "failed", error, None)


@pytest.mark.parametrize("job_id", ["0" * 32, "x", "0" * 31, "A" * 32, "%00", "..%2f", "0" * 400])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_there_is_no_such_job(plain, method, job_id):
    assert error_of(plain.client.open(f"/jobs/{job_id}", method=method)) == (404, "NOT_FOUND")


def test_each_key_sees_its_own_jobs_and_an_admin_all(on_engines):
    ask = on_engines(**KEYS)
    ann, ben, admin = ({"X-API-Key": f"key-of-{name}"} for name in ("ann", "ben", "admin"))
    of_ann = keyed(ask, "same-key", ("file", "a.png", WHITE), headers=ann)
    of_ben = keyed(ask, "same-key", ("file", "a.png", WHITE), headers=ben)
    of_admin = keyed(ask, "same-key", ("file", "a.png", WHITE), headers=admin)
    assert len({answer.json["id"] for answer in (of_ann, of_ben, of_admin)}) == 3
    assert ask.row(of_ann)["owner"] == hashlib.sha256(b"key-of-ann").hexdigest()

    def seen(headers):
        return [job["id"] for job in ask.client.get("/jobs", headers=headers).json["jobs"]]
    assert seen(ann) == [of_ann.json["id"]]
    assert seen(ben) == [of_ben.json["id"]]
    assert seen(admin) == [one.json["id"] for one in (of_admin, of_ben, of_ann)]
    for headers, status in ((ann, 200), (ben, 404), (admin, 200), ({}, 401), ({"X-API-Key": "none"}, 401)):
        assert ask.client.get(of_ann.json["url"], headers=headers).status_code == status
    assert error_of(ask.client.delete(of_ann.json["url"], headers=ben)) == (404, "NOT_FOUND")
    assert ask.client.get(of_ann.json["url"], headers=ann).json["state"] == "queued"
    assert ask.client.delete(of_ann.json["url"], headers=admin).json["state"] == "cancelled"
    for method, path in (("POST", "/jobs"), ("GET", "/jobs"), ("DELETE", of_ben.json["url"]),
                         ("POST", "/predict/async"), ("POST", "/models/x/jobs")):
        assert error_of(ask.client.open(path, method=method)) == (401, "UNAUTHORIZED")


def test_admin_keys_need_api_keys():
    with pytest.raises(SettingsError, match="ADMIN_KEYS needs API_KEYS"):
        Settings.parse({"JOBS": "on", "ADMIN_KEYS": "a-key"})


def test_pages_show_each_job_once_while_others_are_submitted(on_engines):
    ask = on_engines()
    made = [ask.post(("file", "a.png", WHITE)).json["id"] for _ in range(7)]
    seen, after = [], None
    while True:
        page = ask.client.get("/jobs", query_string={"limit": 2, **({"after": after} if after else {})}).json
        seen += [job["id"] for job in page["jobs"]]
        ask.post(("file", "a.png", RED))
        after = page["next"]
        if after is None:
            break
        assert len(page["jobs"]) == 2
        pattern = next(one for one in ask.client.get("/openapi.json").json["paths"]["/jobs"]["get"]["parameters"]
                       if one["name"] == "after")["schema"]["pattern"]
        assert re.fullmatch(pattern, after)
    assert seen == made[::-1]
    assert "result" not in page["jobs"][0]


def test_jobs_of_the_same_moment_are_paged_too(on_engines):
    ask = on_engines()
    ids = sorted(ask.post(("file", "a.png", WHITE)).json["id"] for _ in range(5))
    with ask.store.database.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET created_at = 1700000000.1234567")
    seen, after = [], ""
    while after is not None:
        page = ask.client.get("/jobs", query_string={"limit": 1, "after": after}).json
        seen += [job["id"] for job in page["jobs"]]
        after = page["next"]
    assert seen == ids[::-1]


def test_jobs_are_filtered(on_engines):
    ask = on_engines()
    queued, done, cancelled = (ask.post(("file", "a.png", WHITE)) for _ in range(3))
    ask.client.delete(cancelled.json["url"])
    ask.finish(done, result={"status": "success"})

    def ids(**query):
        return {job["id"] for job in ask.client.get("/jobs", query_string=query).json["jobs"]}
    queued, done, cancelled = (answer.json for answer in (queued, done, cancelled))
    assert ids(state="queued") == {queued["id"]}
    assert ids(state="queued,succeeded") == {queued["id"], done["id"]}
    assert ids(state="running") == set()
    assert ids(model="efficientnet_lite0") == {queued["id"], done["id"], cancelled["id"]}
    assert ids(model="other") == set()
    assert ids(since=repr(done["created_at"])) == {done["id"], cancelled["id"]}
    assert ids(until=repr(done["created_at"])) == {queued["id"]}
    assert len(ids(since="2020-01-01", until="2100-01-01T00:00:00+02:00")) == 3
    assert ids(since="2100-01-01T00:00:00Z") == set()


FORGED = [base64.urlsafe_b64encode(text.encode()).decode() for text in (
    "", "x", f"1.5 {'0' * 31}", f"nan {'0' * 32}", f"1.5 {'0' * 32}' OR 1=1", f"-1.5 {'0' * 32}", f"1e5 {'0' * 32}",
    f"1.5 {'0' * 31}\0")]


@pytest.mark.parametrize("query", [
    "limit=0", "limit=101", "limit=x", "limit=-1", "limit=1&limit=2", "limit=\u0661", "state=done", "state=queued,x",
    "state=queued&state=failed", "since=yesterday", "since=nan", "since=inf", "until=99999999999999999999", "since=%00",
    "model=a%00b", "model=x'--", "model=" + "a" * 65, "after=%00", "after=\u00e4", "after=" + "a" * 9000, "after=a",
    *(f"after={forged}" for forged in FORGED if forged)])
def test_bad_filters_are_refused(plain, query):
    assert error_of(plain.client.get("/jobs?" + query)) == (400, "INVALID_PARAMETER")


def test_a_misspelt_filter_is_refused(plain):
    answer = plain.client.get("/jobs?status=failed")
    assert error_of(answer) == (400, "INVALID_PARAMETER")
    assert answer.json["message"] == "status is not a filter; there are state, model, since, until, limit and after"


@pytest.mark.parametrize(("asked_for", "index"), [
    ({"owner": "a"}, "jobs_listed "),
    ({"owner": "a", "model": "m"}, "jobs_listed_by_model "),
    ({"owner": "a", "model": "m", "since": 1.0, "until": 2.0}, "jobs_listed_by_model "),
    ({"owner": "a", "states": ["succeeded"]}, "jobs_listed_by_state "),
    ({"owner": "a", "states": ["succeeded", "failed"], "after": (1.0, "0")}, "jobs_listed_by_state "),
    ({"owner": None}, "jobs_by_time "),
])
def test_lists_are_read_from_an_index(plain, asked_for, index):
    """In its order, so that the number of jobs does not matter: what is sorted is at most a page of each state."""
    statements = []

    def keep(connection, cursor, statement, parameters, *_):
        if "FROM jobs" in statement:
            statements.append((statement, parameters))
    engine = plain.store.database.engine
    sqlalchemy.event.listen(engine, "after_cursor_execute", keep)
    try:
        plain.store.listed(**asked_for)
    finally:
        sqlalchemy.event.remove(engine, "after_cursor_execute", keep)
    with plain.store.database.read() as connection:
        statement, parameters = statements[0]
        plan = [(row[1], row[3] + " ") for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement,
                                                                             parameters)]
    looked_up = [(parent, step) for parent, step in plan if " jobs " in step]
    assert len(looked_up) == len(asked_for.get("states", [1]))
    assert all(f"USING INDEX {index}" in step for _, step in looked_up), plan
    sorting = {parent for parent, step in plan if "TEMP B-TREE" in step}  # subqueries by their number
    assert not sorting & {parent for parent, _ in looked_up}, plan


def test_a_forged_cursor_shows_nothing_of_others(ask):
    asked = ask(**KEYS)
    keyed(asked, "k", ("file", "a.png", WHITE), headers={"X-API-Key": "key-of-ann"})
    forged = base64.urlsafe_b64encode(f"99999999999.0 {'f' * 32}".encode()).decode()
    page = asked.client.get(f"/jobs?after={forged}", headers={"X-API-Key": "key-of-ben"})
    assert page.json == {"status": "success", "jobs": [], "workers": 0, "next": None}


def test_cancelling(on_engines):
    ask = on_engines()
    answer = ask.post(("file", "a.png", WHITE))
    for _ in range(2):
        cancelled = ask.client.delete(answer.json["url"])
        assert (cancelled.status_code, cancelled.json["state"]) == (200, "cancelled")
    wait_for(lambda: ask.stored() == {})
    running = ask.post(("file", "a.png", WHITE))
    row = ask.claim(running)
    asked = ask.client.delete(running.json["url"])
    assert (asked.status_code, asked.json["state"], asked.json["cancel_requested"]) == (202, "running", True)
    assert asked.headers["Retry-After"] == "1"
    assert len(ask.stored()) == 1  # the worker may be reading it
    ask.store.finish(row["id"], row["attempt"], "succeeded", 1, {"status": "success"})
    for answer in (running, ask.post(("file", "b.png", WHITE))):
        if answer is not running:
            ask.finish(answer, "failed", error={"error": "X", "message": "x"})
        assert error_of(ask.client.delete(answer.json["url"])) == (409, "JOB_FINISHED")


# --- limits ---

def test_too_many_unfinished_jobs_are_refused_and_leave_nothing(on_engines):
    ask = on_engines(MAX_JOBS="2")
    first, _ = ask.post(("file", "a.png", WHITE)), keyed(ask, "k", ("file", "a.png", WHITE))
    answer = ask.post(("file", "a.png", WHITE))
    assert error_of(answer) == (503, "OVERLOADED")
    assert answer.headers["Retry-After"] == "30"
    wait_for(lambda: len(ask.rows()) == len(ask.stored()) == 2)
    assert keyed(ask, "k", ("file", "a.png", WHITE)).status_code == 202  # a repeat needs no room
    ask.client.delete(first.json["url"])
    assert ask.post(("file", "a.png", WHITE)).status_code == 202


def test_the_storage_of_unfinished_jobs_is_limited(on_engines):
    ask = on_engines(MAX_JOBS_STORAGE=str(2 * len(WHITE)))
    assert [ask.post(("file", "a.png", WHITE)).status_code for _ in range(3)] == [202, 202, 503]
    wait_for(lambda: len(ask.stored()) == 2)


def test_each_file_counts_against_the_rate_limit_and_a_look_does_not(ask):
    asked = ask(RATE_LIMIT="4/hour")
    url = asked.post(*MANY[:3]).json["url"]
    answer = asked.post(*MANY[:2])
    assert error_of(answer) == (429, "RATE_LIMITED")
    assert int(answer.headers["Retry-After"]) > 0
    for _ in range(5):
        assert asked.client.get(url).status_code == asked.client.get("/jobs").status_code == 200
    assert asked.client.delete(url).status_code == 200
    assert len(asked.rows()) == 1
    assert error_of(asked.client.put("/predict/async", data=WHITE)) == (429, "RATE_LIMITED")


def test_other_origins_may_submit_poll_and_cancel(ask):
    client = ask(CORS_ORIGINS="https://example.org").client
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "DELETE",
               "Access-Control-Request-Headers": "Idempotency-Key"}
    answer = client.options("/jobs/" + "0" * 32, headers=headers)
    assert "DELETE" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"].lower() == "idempotency-key"
    answer = client.post("/jobs", data=WHITE, headers={"Origin": "https://example.org"})
    assert {"Location", "Idempotent-Replayed", "Retry-After"} <= set(
        answer.headers["Access-Control-Expose-Headers"].split(", "))


# --- what is away costs a quick 503, and predictions nothing ---

def assert_unavailable(answer):
    assert error_of(answer) == (503, "JOBS_UNAVAILABLE")
    assert int(answer.headers["Retry-After"]) >= 1


def assert_logged(caplog, variable):
    """The log of an outage says which variable to look at."""
    logged = [record.message for record in caplog.records if record.message.startswith("JOBS_UNAVAILABLE: ")]
    assert any(f": {variable}: " in message for message in logged), logged


@pytest.fixture
def own_redis(tmp_path):
    """A Redis to stop."""
    need("redis-server")
    server = Redis(tmp_path).start()
    yield server
    server.stop()


def test_without_the_broker_a_job_is_refused_and_leaves_nothing(applications, own_redis, tmp_path, caplog):
    broker = own_redis
    ask = applications({"DATA_DIR": str(tmp_path / "data"), "JOBS_BROKER": broker.url})
    url = ask.post(("file", "a.png", WHITE)).json["url"]
    for silence in (broker.pause, broker.kill):
        silence()
        for key in ("k", "l"):
            assert_unavailable(keyed(ask, key, ("file", "a.png", RED)))
    assert_logged(caplog, "JOBS_BROKER")
    wait_for(lambda: len(ask.rows()) == len(ask.stored()) == 1)
    assert ask.client.get(url).json["state"] == "queued"
    assert ask.post(("file", "a.png", RED), path="/predict").status_code == 200
    broker.start()
    wait_for(lambda: keyed(ask, "k", ("file", "a.png", RED)).status_code == 202)


def test_without_the_storage_a_job_is_refused_and_leaves_nothing(ask, caplog):
    asked = ask()
    asked.folder.parent.mkdir(exist_ok=True)
    asked.folder.write_text("no folder")
    assert_unavailable(asked.post(("file", "a.png", WHITE)))
    assert_unavailable(asked.post(*MANY))
    assert_logged(caplog, "DATA_DIR")
    assert asked.rows() == asked.messages() == []
    assert asked.post(("file", "a.png", WHITE), path="/predict").status_code == 200


def test_what_was_stored_before_the_storage_failed_is_removed(ask):
    asked = ask()
    put = asked.jobs.storage.put

    def full(key, data):
        if key.endswith("/4"):
            raise OSError(28, "No space left on device")
        put(key, data)
    asked.jobs.storage.put = full
    assert_unavailable(asked.post(*MANY))
    wait_for(asked.is_empty)


def test_a_slow_removal_of_inputs_refuses_nobody_and_is_no_outage(ask, monkeypatch):
    monkeypatch.setattr(calls, "REMOVED_WITHIN_S", 0.2)
    asked, goes_on = ask(MAX_JOBS="100"), threading.Event()
    asked.jobs.storage.delete_all = lambda job_id: goes_on.wait(10 * LONG_S)
    try:
        for _ in range(20):  # more than there are threads
            answer = asked.post(("file", "a.png", WHITE))
            assert asked.client.delete(answer.json["url"]).status_code == 200
        publish, asked.jobs.broker.publish = asked.jobs.broker.publish, raise_overloaded
        started = time.monotonic()
        assert error_of(asked.post(("file", "a.png", WHITE))) == (503, "OVERLOADED")
        assert time.monotonic() - started < LONG_S
        asked.jobs.broker.publish = publish
        wait_for(lambda: asked.jobs.removing.failed_at is not None)
        assert asked.post(("file", "a.png", WHITE)).status_code == 202
        assert asked.jobs.submitting.failed_at is None
    finally:
        goes_on.set()


def raise_overloaded(*_):
    raise ServiceError(503, "OVERLOADED", "Too much.", retry_after_s=1)


def test_a_burst_of_requests_is_answered(on_engines, patient):
    ask = on_engines()
    url = ask.post(("file", "a.png", WHITE)).json["url"]
    tasks = [gevent.spawn(ask.client.open, url) for _ in range(300)]
    gevent.joinall(tasks)
    assert {task.get().status_code for task in tasks} == {200}


def test_lists_leave_connections_to_others(ask, patient):
    """However many are asked for at once, and however slow they are."""
    asked = ask(HISTORY="on")
    asked.post(("file", "a.png", WHITE))
    listed, history = asked.jobs.listed, asked.app.extensions["history"]
    read, goes_on, now, most = history.read, threading.Event(), [], []

    def slowly(call, *arguments, **named):
        now.append(1)
        most.append(len(now))
        with asked.app.extensions["database"].read():
            goes_on.wait(LONG_S)
        now.pop()
        return call(*arguments, **named)
    asked.jobs.listed, history.read = (functools.partial(slowly, call) for call in (listed, read))
    tasks = [gevent.spawn(asked.client.get, path) for path in ["/jobs", "/history"] * 10]
    try:
        wait_for(lambda: len(now) == LISTINGS)
        assert asked.client.get("/jobs/" + "0" * 32).status_code == 404
        assert asked.post(("file", "a.png", WHITE)).status_code == 202
    finally:
        goes_on.set()
    gevent.joinall(tasks)
    assert {task.get().status_code for task in tasks} == {200}
    assert max(most) == LISTINGS


def test_without_the_database_jobs_are_refused_and_leave_nothing(applications, postgres_server, tmp_path, caplog):
    url = postgres_server.database()
    ask = applications({"DATA_DIR": str(tmp_path / "data"), "DATABASE_URL": url})
    job = ask.post(("file", "a.png", WHITE)).json["url"]
    name = url.rpartition("/")[2]
    postgres_server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    postgres_server.execute(f"SELECT pg_terminate_backend(pid, {1000 * LONG_S}) FROM pg_stat_activity "
                            f"WHERE datname = '{name}'")  # and waits for their end
    for answer in (keyed(ask, "k", ("file", "a.png", RED)), ask.post(("file", "a.png", RED)), ask.client.get(job),
                   ask.client.get("/jobs"), ask.client.delete(job)):
        assert_unavailable(answer)
    assert_logged(caplog, "DATABASE_URL")
    assert len(ask.stored()) == 1
    assert ask.post(("file", "a.png", RED), path="/predict").status_code == 200
    postgres_server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    wait_for(lambda: keyed(ask, "k", ("file", "a.png", RED)).status_code == 202)


def test_a_request_that_nobody_waits_for_any_more_takes_back_what_it_has_stored(ask):
    asked = ask()
    asked.post(("file", "a.png", WHITE))
    put, begun = asked.jobs.storage.put, []

    def slow(key, data):
        begun.append(key)
        put(key, data)
        time.sleep(0.5)
    asked.jobs.storage.put = slow
    answer = asked.post(*MANY * 4, headers={"X-Request-Timeout": "0.2"})
    assert error_of(answer) == (504, "DEADLINE_EXCEEDED")
    asked.jobs.storage.put = lambda key, data: (begun.append(key), put(key, data))
    assert asked.post(("file", "b.png", WHITE)).status_code == 202  # others are not refused for it
    wait_for(lambda: len(asked.stored()) == 2)
    assert 0 < len(begun) < 20
    assert len(asked.rows()) == len(asked.messages()) == 2


def test_a_database_that_hangs_costs_predictions_nothing(applications, postgres_server, tmp_path, patient):
    ask = applications({"DATA_DIR": str(tmp_path / "data"), "DATABASE_URL": postgres_server.database()})
    url = ask.post(("file", "a.png", WHITE)).json["url"]
    postgres_server.pause()
    try:
        tasks = [gevent.spawn(ask.client.open, url, method=method) for method in ["GET", "DELETE"] * 30]
        tasks += [gevent.spawn(ask.post, ("file", "a.png", WHITE)) for _ in range(30)]
        gevent.sleep(0)
        assert ask.post(("file", "a.png", RED), path="/predict").status_code == 200
        waiting = [task for task in tasks if not task.ready()]
        assert waiting
        for task in set(tasks) - set(waiting):  # too many wait already
            assert_unavailable(task.get())
    finally:
        postgres_server.resume()
    gevent.joinall(tasks)
    assert {task.get().status_code for task in tasks} <= {200, 202, 503}


# --- what is said of it ---

@pytest.fixture(scope="module")
def document(app, tmp_path_factory):
    variables = {"JOBS": "on", "DATA_DIR": str(tmp_path_factory.mktemp("data")), **KEYS}
    application = create_app(Settings.parse(variables), app.extensions["model"])
    return application, application.test_client().get("/openapi.json").json


def test_the_openapi_document_is_valid_and_has_every_path_and_method(document):
    application, document = document
    openapi_spec_validator.OpenAPIV31SpecValidator(document).validate()
    served = {(rule.rule.replace("<", "{").replace(">", "}"), method.lower())
              for rule in application.url_map.iter_rules() for method in rule.methods - {"HEAD", "OPTIONS"}
              if "filename" not in rule.arguments and not rule.rule.startswith("/docs/")}
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == served


def test_the_document_has_every_code_of_jobs_and_says_where_a_key_is_needed(document):
    application, document = document
    for code in ("JOBS_UNAVAILABLE", "JOB_FINISHED", "IDEMPOTENCY_KEY_REUSED"):
        assert code in str(document)
    client, addresses = application.test_client(), itertools.count(1)  # each address may lack a key a few times
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            address = {"REMOTE_ADDR": f"192.0.2.{next(addresses)}"}
            refused = client.open(path, method=method.upper(), environ_overrides=address).status_code == 401
            assert (bool(operation.get("security")), "401" in operation["responses"]) == (refused, refused), path


def test_the_document_describes_the_message_of_callbacks_where_there_are_any(document, ask):
    assert "webhooks" not in document[1]
    made = ask(CALLBACK_SECRET="0123456789abcdef0123").client.get("/openapi.json").json
    openapi_spec_validator.OpenAPIV31SpecValidator(made).validate()
    message = made["webhooks"]["jobEnded"]["post"]
    assert {one["name"] for one in message["parameters"]} | {"Content-Type"} == set(
        webhooks.signed("0123456789abcdef0123", "id", 1, b"{}"))


def test_every_answer_fits_the_document(document, plain):
    from jsonschema import Draft202012Validator
    asked, schemas = plain, document[1]["components"]["schemas"]

    def check(name, body):
        schema = {"components": {"schemas": schemas}, "$ref": f"#/components/schemas/{name}"}
        Draft202012Validator(schema).validate(body)
    job = asked.post(("file", "a.png", WHITE))
    check("Job", job.json)
    check("Jobs", asked.client.get("/jobs").json)
    asked.finish(job, result=asked.post(("file", "a.png", WHITE), path="/predict").json)
    check("Job", asked.client.get(job.json["url"]).json)
    job = asked.post(*MANY)
    asked.finish(job, result=asked.post(*MANY, path="/predict/batch").json)
    check("Job", asked.client.get(job.json["url"]).json)
    check("Jobs", asked.client.get("/jobs").json)
    check("Job", asked.client.delete(asked.post(("file", "a.png", WHITE)).json["url"]).json)
    check("Job", document[1]["components"]["schemas"]["Job"]["example"])


def test_the_endpoints_are_listed(plain, client):
    assert {"/jobs", "/jobs/ID", "/predict/async", "/models/NAME/jobs"} <= set(plain.client.get("/").json["endpoints"])
    assert "/jobs" not in client.get("/").json["endpoints"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/jobs"), ("GET", "/jobs"), ("POST", "/predict/async"),
                                              ("GET", "/jobs/" + "0" * 32)])
def test_without_jobs_there_is_none_of_this(client, method, path):
    assert error_of(client.open(path, method=method))[0] == 404


# --- the service itself ---

@pytest.fixture(scope="module")
def running(tmp_path_factory, settings, app):
    """A Service with jobs, but without a worker, and its data folder."""
    folder = tmp_path_factory.mktemp("jobs-service")
    service = Service(folder, {"MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "JOBS": "on", "WORKERS": "1",
                               "DATA_DIR": str(folder / "data"), "MODEL_DIR": str(settings.model_dir)})
    yield service.wait_ready(), folder / "data"
    service.stop()


def test_the_service_takes_jobs_shows_them_and_cancels_them(running):
    service, _ = running
    answer = requests.post(service.url + "/jobs", files={"file": ("chelsea.jpg", encoded(photo("chelsea"), "JPEG"))},
                           headers={"Idempotency-Key": "service-1"}, timeout=60)
    assert answer.status_code == 202
    url = service.url + answer.headers["Location"]
    assert requests.get(url, timeout=60).json() == answer.json()
    assert answer.json() in [{**job, "result": None} for job in requests.get(service.url + "/jobs",
                                                                             timeout=60).json()["jobs"]]
    assert requests.delete(url, timeout=60).json()["state"] == "cancelled"
    assert "Traceback" not in service.log
    assert "make worker" in service.log.partition('"message": "starting"')[2].partition("\n")[0]


def test_threads_with_the_same_key_get_the_same_job(running):
    service, _ = running
    answers = []

    def submit():
        while not (answer := requests.put(service.url + "/jobs", data=WHITE, headers={"Idempotency-Key": "threads"},
                                          timeout=60)).ok:
            assert answer.status_code == 503, answer.text  # a machine that is very busy
            time.sleep(0.2)
        answers.append(answer.json()["id"])
    threads = [threading.Thread(target=submit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    assert len(set(answers)) == 1


def test_a_client_that_leaves_during_its_upload_leaves_nothing(running):
    service, data = running

    def jobs():
        return len(requests.get(service.url + "/jobs?limit=100", timeout=60).json()["jobs"])
    before, stored = jobs(), set((data / "storage").rglob("*"))
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 900000\r\n\r\n"
                       + bytes(300_000))
    wait_for(lambda: '"error": "BAD_REQUEST"' in service.log)
    assert jobs() == before
    assert set((data / "storage").rglob("*")) <= stored  # of earlier tests' jobs, some may have been removed


def test_a_body_beyond_max_job_size_is_refused_by_its_headers(running):
    service, _ = running
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/jobs")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", str(2**40))
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]) == (413, "FILE_TOO_LARGE")


def test_a_full_queue_of_predictions_refuses_no_job(plain, app):
    asked, slots = plain, app.extensions["model"].slots
    release, tasks = threading.Event(), []
    try:
        for _ in range(slots.count + slots.max_queue):
            tasks.append(gevent.spawn(slots.run, release.wait, Deadline(30), Stages()))
        wait_for(lambda: len(slots.running) + len(slots.waiting) == len(tasks))
        assert error_of(asked.post(("file", "a.png", WHITE), path="/predict")) == (503, "OVERLOADED")
        assert asked.post(("file", "a.png", WHITE)).status_code == 202
    finally:
        release.set()
        gevent.joinall(tasks)
