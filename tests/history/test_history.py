"""GET /history over SQLite and PostgreSQL: what is recorded, who sees it, and how it is searched."""
import base64
import csv
import dataclasses
import hashlib
import io
import re
import time
import urllib.parse

import jsonschema
import openapi_spec_validator
import pytest
from conftest import encoded, photo, post
from sqlalchemy import insert
from urllib3 import encode_multipart_formdata

from app import create_app
from app.config import Settings
from app.data.schema import history

KEYS = [f"key-{i}" for i in range(100)]
ADMIN = "admin-key"
PICTURE = encoded(photo("chelsea"), "JPEG")
WITHIN_S = 120


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def recording(request, app, settings, tmp_path_factory):
    """The application with a history and a cache."""
    url = f"sqlite:///{tmp_path_factory.mktemp('history') / 'service.db'}" if request.param == "sqlite" else \
        request.getfixturevalue("postgres_server").database()
    both = Settings.parse({"HISTORY": "on", "DATABASE_URL": url, "API_KEYS": ",".join(KEYS), "ADMIN_KEYS": ADMIN,
                           "HISTORY_DAYS": "36600"})  # what tests add is of 1970
    made = create_app(dataclasses.replace(settings, api_keys=both.api_keys, optional=both.optional,
                                          cache_url="memory://"), app.extensions["model"])
    yield made
    made.extensions["at_exit"]()
    made.extensions["database"].close()


class Client:
    """Asks with a key of its own."""

    def __init__(self, app, key):
        self.app, self.key, self.client = app, key, app.test_client()
        self.owner = hashlib.sha256(key.encode()).hexdigest()

    def open(self, path, headers=(), **arguments):
        return self.client.open(path, headers={"X-API-Key": self.key, **dict(headers)}, **arguments)

    def post(self, path, **arguments):
        return self.open(path, method="POST", **arguments)

    def predict(self, data=PICTURE, **options):
        """A prediction's answer, and the request's ID."""
        answer = post(self, data, **options)
        return answer, answer.headers["X-Request-ID"]

    def found(self, **query):
        """The predictions on one page."""
        answer = self.open("/history?" + urllib.parse.urlencode(query))
        assert answer.status_code == 200, answer.text
        return answer.json["history"]

    def recorded(self, number):
        """All, once there are as many as that."""
        until = time.monotonic() + WITHIN_S
        while len(found := self.found()) < number:
            assert time.monotonic() < until, found
            time.sleep(0.05)
        return found

    def add(self, *rows):
        """Predictions of this client's, put into the table."""
        blank = {"owner": self.owner, "request_id": "a", "position": 0, "model": "cats", "version": None,
                 "weights": None, "input_sha256": "0" * 64, "options_json": "{}", "predictions_json": "null",
                 "top_class": None, "confidence": None, "milliseconds": 1.0, "cached": False}
        with self.app.extensions["database"].begin() as connection:
            connection.execute(insert(history), [blank | row for row in rows])


@pytest.fixture
def client(recording):
    """A client whose key no other test uses."""
    return Client(recording, recording.extensions.setdefault("unused keys", list(KEYS)).pop())


@pytest.fixture
def admin(recording):
    return Client(recording, ADMIN)


# --- what is recorded ---

def test_a_prediction_is_recorded_as_it_was_answered(client, recording):
    before = time.time()
    answer, request_id = client.predict(top_k=3)
    found, = client.recorded(1)
    info = client.open("/info").json["model"]
    assert before <= found.pop("time") <= time.time()
    assert found.pop("milliseconds") > 0
    assert found == {
        "request_id": request_id, "position": 0, "model": "efficientnet_lite0", "version": None,
        "weights": info["weights"]["sha256"], "input_sha256": hashlib.sha256(PICTURE).hexdigest(),
        "class": answer.json["predictions"][0]["class"], "confidence": answer.json["predictions"][0]["confidence"],
        "cached": False, "options": {"top_k": 3, "frames": 1, "at": None}, "predictions": answer.json["predictions"]}
    assert client.open(f"/history/{request_id}").json["history"] == client.found()


def test_an_answer_from_the_cache_is_recorded_as_such(client):
    answers = [client.predict(top_k=7)[0].headers["X-Cache"] for _ in range(2)]
    assert answers[1] == "hit"
    assert [one["cached"] for one in client.recorded(2)] == [True, answers[0] == "hit"]


def test_each_answered_file_of_a_batch_is_recorded_with_its_position(client):
    files = [("files", ("a.jpg", PICTURE)), ("files", ("b.jpg", b"no picture")),
             ("files", ("c.png", encoded(photo("coffee").resize((320, 240)))))]
    body, content_type = encode_multipart_formdata(files)
    answer = client.post("/predict/batch", data=body, content_type=content_type, headers={"X-Request-ID": "a-batch"})
    assert answer.json["failed"] == 1
    client.recorded(2)
    found = sorted(client.open("/history/a-batch").json["history"], key=lambda one: one["position"])
    assert [one["position"] for one in found] == [0, 2]
    assert [one["predictions"] for one in found] == [answer.json["results"][i]["predictions"] for i in (0, 2)]


def test_failed_requests_are_no_predictions(client):
    assert client.predict(b"no picture")[0].status_code == 400
    assert client.predict(top_k=11)[0].status_code == 400
    texts = [base64.b64encode(one).decode() for one in (PICTURE, b"no picture")]
    assert infer(client, texts).status_code == 400  # although its first picture could be answered
    answer = infer(client, texts[:1] * 2)
    assert answer.status_code == 200, answer.text
    found = client.recorded(2)
    assert sorted((one["request_id"], one["position"]) for one in found) == [
        (answer.headers["X-Request-ID"], i) for i in (0, 1)]


def infer(client, texts):
    return client.post("/v2/models/efficientnet_lite0/infer", json={"inputs": [
        {"name": "image", "shape": [len(texts)], "datatype": "BYTES", "data": texts}]})


def test_a_model_without_a_cache_is_recorded_too(recording, app, client):
    plain = create_app(dataclasses.replace(recording.extensions["settings"], cache_url=None), app.extensions["model"])
    Client(plain, client.key).predict()
    body, content_type = encode_multipart_formdata([("files", ("a.jpg", PICTURE))])
    Client(plain, client.key).post("/predict/batch", data=body, content_type=content_type)
    assert [one["cached"] for one in client.recorded(2)] == [False, False]
    plain.extensions["at_exit"]()
    plain.extensions["database"].close()


# --- who sees it ---

def test_each_key_sees_its_own_and_an_admin_sees_all(client, admin, recording):
    other = Client(recording, recording.extensions["unused keys"].pop())
    _, request_id = client.predict()
    client.recorded(1)
    assert other.found() == []
    assert other.open(f"/history/{request_id}").status_code == 404
    assert other.open(f"/history/{request_id}").json["error"] == "NOT_FOUND"
    found = admin.open(f"/history/{request_id}").json["history"]
    assert [one["owner"] for one in found] == [client.owner]
    assert "owner" not in client.found()[0]
    assert "owner" in admin.open("/history?format=csv").text.splitlines()[0]
    assert recording.test_client().get("/history").status_code == 401


@pytest.mark.parametrize("request_id", ["unknown", "%00", "%20", "a" * 129])
def test_unknown_request_is_404(client, request_id):
    answer = client.open(f"/history/{request_id}")
    assert (answer.status_code, answer.json["error"]) == (404, "NOT_FOUND")


# --- searching ---

def test_pages_have_each_prediction_once_even_while_others_are_added(client):
    client.add(*({"time": 1000.0 + i // 3, "request_id": f"r{i}"} for i in range(20)))  # three at the same time
    seen, path = [], "/history?limit=6&model=cats"
    while path:
        answer = client.open(path)
        seen += [one["request_id"] for one in answer.json["history"]]
        link = answer.headers.get("Link")
        assert (link is None) == (answer.json["next"] is None)
        path = link and link.partition(">")[0][1:]
        client.add({"time": time.time(), "request_id": "new"})
    assert seen == [f"r{i}" for i in reversed(range(20))]


@pytest.mark.parametrize(("query", "expected"), [
    ({"model": "cats"}, "abcd"),
    ({"model": "dogs"}, "ef"),
    ({"model": "dogs@2"}, "f"),
    ({"model": "none"}, ""),
    ({"class": "tabby"}, "ac"),
    ({"class": "tab"}, ""),
    ({"min_confidence": "0.5"}, "bcd"),
    ({"max_confidence": "0.5"}, "ab"),
    ({"min_confidence": "0.5", "max_confidence": "6e-1", "class": "tabby"}, "c"),
    ({"since": "1000000002"}, "cdef"),
    ({"until": "1000000002"}, "ab"),
    ({"since": "2001-09-09T01:46:41Z", "until": "2001-09-09T03:46:43+02:00"}, "bc"),
    ({"since": "2001-09-09T01:46:45"}, "f"),
    ({"limit": "2"}, "ef"),
    ({}, "abcdef"),
])
def test_search(client, query, expected):
    client.add(*({"time": 1e9 + i, "request_id": "abcdef"[i], **row} for i, row in enumerate([
        {"top_class": "tabby", "confidence": 0.25}, {"top_class": "lynx", "confidence": 0.5},
        {"top_class": "tabby", "confidence": 0.6}, {"top_class": "lion", "confidence": 0.75},
        {"model": "dogs", "version": "1"}, {"model": "dogs", "version": "2"}])))
    assert "".join(sorted(one["request_id"] for one in client.found(**query))) == expected


@pytest.mark.parametrize(("query", "takes"), [
    ("limit=0", "an integer from 1 to 1000"), ("limit=1001", "an integer from 1 to 1000"),
    ("since=yesterday", "a time as Unix seconds or as ISO 8601"), ("until=1e999", "a time as Unix seconds"),
    ("min_confidence=high", "a number"), ("max_confidence=nan", "a number"), ("format=xml", "json or csv"),
    ("after=first", "the value of `next`"), ("after=MS4wIDk5OTk5OTk5OTk5OTk5OTk5OTk5", "the value of `next`"),
    ("model=%00", "text"), ("class=a%00b", "text"),
])
def test_bad_parameters_are_refused(client, query, takes):
    answer = client.open(f"/history?{query}")
    assert (answer.status_code, answer.json["error"]) == (400, "INVALID_PARAMETER")
    assert answer.json["message"].startswith(f"{query.partition('=')[0]} must be {takes}")


@pytest.mark.parametrize("path", ["/history", "/history/abc"])
def test_a_misspelt_filter_is_refused(client, path):
    answer = client.open(path + "?clas=zebra")
    assert (answer.status_code, answer.json["error"]) == (400, "INVALID_PARAMETER")
    assert answer.json["message"].startswith("clas is not a filter; there are model, class, since")


def test_csv_has_the_same_and_no_formulas(client):
    client.add({"time": 1e9, "request_id": "-r", "top_class": "=HYPERLINK(\"x\")", "confidence": 0.5, "cached": True,
                "version": "＝1", "predictions_json": '[{"class": "=a, \\u00e4\\nb"}]', "options_json": '{"top_k": 1}'})
    answers = [client.open("/history", headers={"Accept": "text/csv"}), client.open("/history?format=csv")]
    assert answers[0].text == answers[1].text
    assert answers[0].content_type == "text/csv; charset=utf-8"
    row, = csv.DictReader(io.StringIO(answers[0].text))
    assert row["time"] == "2001-09-09T01:46:40.000Z"
    assert (row["request_id"], row["class"]) == ("'-r", "'=HYPERLINK(\"x\")")
    assert (row["confidence"], row["cached"], row["options"]) == ("0.5", "true", '{"top_k": 1}')
    assert row["version"] == "'＝1"
    assert row["predictions"] == '[{"class": "=a, ä\\nb"}]'
    assert client.open("/history?format=json", headers={"Accept": "text/csv"}).is_json


def test_csv_pages_go_on_by_the_link(client):
    client.add({"time": 1.5, "request_id": "first"}, {"time": 2.5, "request_id": "second"})
    answer = client.open("/history?format=csv&limit=1")
    further = client.open(answer.headers["Link"].partition(">")[0][1:])
    assert "second" in answer.text
    assert re.fullmatch(next(one for one in client.open("/openapi.json").json["paths"]["/history"]["get"]["parameters"]
                             if one["name"] == "after")["schema"]["pattern"],
                        client.open("/history?limit=1").json["next"])
    assert "first" in further.text
    assert "Link" not in further.headers


# --- documentation ---

def test_the_document_describes_it(client):
    document = client.open("/openapi.json").json
    openapi_spec_validator.OpenAPIV31SpecValidator(document).validate()
    client.predict()
    client.recorded(1)
    schema = {"$ref": "#/components/schemas/History", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(client.open("/history").json)
    assert {"/history", "/history/{request_id}"} <= set(document["paths"])
    assert document["paths"]["/history"]["get"]["security"]
    assert {"/history", "/history/REQUEST_ID"} <= set(client.open("/", headers={"Accept": "*/*"}).json["endpoints"])


def test_without_history_there_is_no_trace_of_it(app):
    client = app.test_client()
    assert client.get("/history").status_code == 404
    assert "history" not in client.get("/openapi.json").text.lower()
    assert "/history" not in client.get("/").json["endpoints"]
