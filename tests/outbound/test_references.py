"""Inputs by reference, at the service as its users run it."""
import base64
import collections
import json
import logging
import os
import socket
import threading
import time

import pytest
import requests
from conftest import Service, encoded, photo
from hostile_server import HostileServer, ok, repeatedly
from openapi_spec_validator import validate

from app import create_app
from app.config import Settings
from app.outbound import references

CAT = encoded(photo("chelsea"))
SMALL = encoded(photo("chelsea").resize((64, 64)))
OPTIONS = {"top_k": 1}


@pytest.fixture(scope="module")
def origin():
    one = HostileServer({"/cat.png": ok(CAT), "/empty.png": ok(b""), "/text.png": ok(b"not a picture"),
                         "/a/my%20cat.png": ok(CAT), "/gone.png": b"HTTP/1.1 404 Not Found\r\n\r\n",
                         "/moved.png": b"HTTP/1.1 301 Moved\r\nLocation: /cat.png\r\n\r\n",
                         "/endless.png": repeatedly(b"HTTP/1.1 200 OK\r\n\r\n", bytes(2**16)),
                         "/slow.png": repeatedly(b"HTTP/1.1 200 OK\r\n\r\n", b"a", 0.05)})
    yield one
    one.close()


@pytest.fixture(scope="module")
def bucket(s3_server):
    name = s3_server.bucket()
    for key, data in {"in/cat.png": CAT, "in/my cat.png": CAT, "in/large.png": bytes(3 * 2**20 + 1),
                      "other/cat.png": CAT}.items():
        requests.put(f"{s3_server.url}/{name}/{key}", data=data, timeout=10).raise_for_status()
    return name


@pytest.fixture(scope="module")
def referring(tmp_path_factory, settings, app, origin, bucket, s3_server):
    """A ready Service that fetches from origin and from bucket/in/."""
    folder = tmp_path_factory.mktemp("referring")
    running = Service(folder, {
        "MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "MODEL_DIR": str(settings.model_dir), "WORKERS": "1",
        "INPUT_URLS": f"{origin.url}/, s3://{bucket}/in/", "PRIVATE_NETWORKS": "127.0.0.0/8", "MAX_FILE_SIZE": "3MiB",
        "MAX_VIDEO_SIZE": "3MiB", "MAX_BODY_MEMORY": "4MiB", "MAX_QUEUE": "20", "REQUEST_TIMEOUT": "600",
        "MAX_BATCH_FILES": "12",
        "DATA_DIR": str(folder), **s3_server.variables})
    yield running.wait_ready()
    running.stop()


def post(service, body, path="/predict", **headers):
    return requests.post(service.url + path, json={**OPTIONS, **body}, headers=headers, timeout=700)


def gauge(service, name):
    lines = requests.get(service.url + "/metrics", timeout=10).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"model_server_{name} "))


def wait_until_zero(service, *names):
    """What belongs to a request may be given back just after its answer."""
    until = time.monotonic() + 120
    while any(found := [gauge(service, name) for name in names]):
        assert time.monotonic() < until, found
        time.sleep(0.05)


def test_the_answer_is_that_of_the_same_file_sent(referring, origin):
    sent = referring.predict(CAT, "cat.png", top_k=1).json()
    fetched = post(referring, {"url": origin.url + "/cat.png"})
    assert fetched.status_code == 200, fetched.text
    assert fetched.json()["predictions"] == sent["predictions"]
    assert fetched.json()["metadata"]["filename"] == "cat.png"


@pytest.mark.parametrize("form", ["image", "file", "instances", "named path"])
def test_a_url_may_stand_wherever_base64_may(referring, origin, form):
    one = {"url": origin.url + "/a/my%20cat.png"}
    body = {"instances": [one]} if form == "instances" else one if form == "named path" else {form: one}
    path = "/models/efficientnet_lite0/predict" if form == "named path" else "/predict"
    answer = post(referring, body, path)
    assert answer.status_code == 200, answer.text
    assert answer.json()["metadata"]["filename"] == "my cat.png"


def test_objects_in_s3(referring, bucket):
    for name in ("cat.png", "my cat.png"):
        answer = post(referring, {"url": f"s3://{bucket}/in/{name}"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["metadata"]["filename"] == name
    for key, status, code in (
            ("in/none.png", 422, "INPUT_NOT_FETCHED"), ("in/large.png", 413, "FILE_TOO_LARGE"),
            ("other/cat.png", 400, "URL_NOT_ALLOWED"), ("in/../other/cat.png", 400, "URL_NOT_ALLOWED")):
        answer = post(referring, {"url": f"s3://{bucket}/{key}"})
        assert (answer.status_code, answer.json()["error"]) == (status, code), answer.text


@pytest.mark.parametrize(("path", "status", "code", "says"), [
    ("/gone.png", 422, "INPUT_NOT_FETCHED", "its server answered 404"),
    ("/moved.png", 422, "INPUT_NOT_FETCHED", "redirect (301), which is not followed"),
    ("/endless.png", 413, "FILE_TOO_LARGE", "more than 3.1 MB"),
    ("/empty.png", 400, "EMPTY_FILE", "The file sent as url is empty"),
    ("/text.png", 400, "INVALID_IMAGE", ""),
    ("/../cat.png", 400, "URL_NOT_ALLOWED", "not an absolute http, https or s3 URL without .."),
])
def test_what_cannot_be_fetched_or_is_no_picture(referring, origin, path, status, code, says):
    answer = post(referring, {"url": origin.url + path})
    body = answer.json()
    assert (answer.status_code, body["error"]) == (status, code), answer.text
    assert says in body["message"]
    assert body["request_id"]
    assert "127.0.0.1" not in body["message"]


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:22/", "http://example.org/cat.png", "http://169.254.169.254/latest/meta-data/", "http://localhost/",
    "file:///etc/passwd", "s3://another/in/cat.png", "data:image/png;base64,AAAA", "", "\u0000", "http://[::1", "//x",
    "a" * 9000,
])
def test_other_urls_are_not_asked_for(referring, origin, url):
    before = len(origin.requests)
    for body in ({"url": url}, {"instances": [{"url": url}]}):
        answer = post(referring, body)
        assert (answer.status_code, answer.json()["error"]) == (400, "URL_NOT_ALLOWED"), answer.text
    assert len(origin.requests) == before


@pytest.mark.parametrize(("url", "why"), [
    ("https://example.com/cat.png", "it does not begin with an entry of INPUT_URLS"),
    ("http://10.0.0.1/cat.png", "its address is private, and PRIVATE_NETWORKS does not list it"),
    ("http://a.localhost/cat.png", "its address is private, and PRIVATE_NETWORKS does not list it"),
    ("cat.png", "it is not an absolute http, https or s3 URL without .., // in its path or a user name"),
    ("http://ann@example.org/cat.png", "it is not an absolute http, https or s3 URL without .., // in its path or a "
                                       "user name"),
    # Of a name, nobody is told whether it stands for a private address.
    ("http://inside.example.org/cat.png", "INPUT_URLS says which ones are, and private addresses only are with "
                                          "PRIVATE_NETWORKS")])
def test_who_names_a_url_that_is_not_allowed_is_told_why(app, client, monkeypatch, url, why):
    prefixes = "http://10.0.0.1/, http://*.example.org/, http://a.localhost/"
    monkeypatch.setitem(app.extensions, "fetch", references.References(Settings.parse({"INPUT_URLS": prefixes})).fetch)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80))])
    answer = client.post("/predict", json={"url": url})
    assert (answer.status_code, answer.json["error"]) == (400, "URL_NOT_ALLOWED")
    assert answer.json["message"] == f"The URL is not allowed: {why}."


def test_without_credentials_for_s3_the_client_and_the_log_are_told(app, client, monkeypatch, tmp_path, caplog):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(app.extensions, "fetch", references.References(Settings.parse({
        "INPUT_URLS": "s3://bucket/"})).fetch)
    answer = client.post("/predict", json={"url": "s3://bucket/cat.png"})
    assert (answer.status_code, answer.json["error"]) == (422, "INPUT_NOT_FETCHED")
    assert answer.json["message"] == "The input cannot be fetched: the service has no credentials for S3."
    assert "AWS_ACCESS_KEY_ID" in caplog.text


def test_libraries_for_s3_log_no_more_than_warnings():
    from app.outbound import s3  # noqa: F401
    assert {logging.getLogger(name).level for name in ("botocore", "aiobotocore", "s3fs")} == {logging.WARNING}


def test_who_sends_no_file_or_a_url_in_its_place_is_told_how_to_send_one(referring):
    answer = post(referring, {})
    assert answer.json()["error"] == "MISSING_FILE"
    assert '{"url": "URL"}' in answer.json()["message"]
    answer = post(referring, {"image": "http://example.org/cat.png"})
    assert answer.json()["error"] == "INVALID_PARAMETER"
    assert 'to send a URL, use {"url": "URL"}' in answer.json()["message"]


@pytest.mark.parametrize("url", [5, ["http://example.org/"], {"url": "x"}, True])
def test_what_is_no_url_is_a_bad_parameter(referring, url):
    answer = post(referring, {"url": url})
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_PARAMETER"), answer.text


def test_a_url_beside_a_file_is_one_too_many(referring, origin):
    before = len(origin.requests)
    answer = post(referring, {"url": origin.url + "/cat.png", "image": "AAAA"})
    assert (answer.status_code, answer.json()["error"]) == (400, "TOO_MANY_FILES")
    answer = post(referring, {"instances": [{"url": origin.url + "/cat.png"}, {"url": origin.url + "/a/cat.png"}]})
    assert (answer.status_code, answer.json()["error"]) == (400, "TOO_MANY_FILES")
    answer = post(referring, {"instances": [{"url": origin.url + "/cat.png"}] * 13}, "/predict/batch")
    assert (answer.status_code, answer.json()["error"]) == (400, "TOO_MANY_FILES")
    assert len(origin.requests) == before + 1  # the first of these bodies looks like one with a single file


def test_in_a_batch_a_bad_url_spoils_only_its_own_result(referring, origin, bucket):
    urls = ["/cat.png", "/gone.png", "/endless.png", "/slow.png", "/cat.png", "/text.png"]
    body = {"instances": [*({"url": origin.url + url} for url in urls), {"url": f"s3://{bucket}/in/cat.png"},
                          {"url": "http://example.org/"}, {"url": f"s3://{bucket}/in/none.png"},
                          {"b64": base64.b64encode(SMALL).decode()}]}
    for timeout_s in (4, 20, 100):  # what the others need on a machine that is very busy
        before = [request for request in origin.requests if b"/cat.png" in request]
        answer = post(referring, body, "/predict/batch", **{"X-Request-Timeout": str(timeout_s)})
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        if [one.get("error") for one in results].count("DEADLINE_EXCEEDED") == 1:
            break
    assert [one.get("error") for one in results] == [
        None, "INPUT_NOT_FETCHED", "FILE_TOO_LARGE", "DEADLINE_EXCEEDED", None, "INVALID_IMAGE", None,
        "URL_NOT_ALLOWED", "INPUT_NOT_FETCHED", None]
    assert [one["filename"] for one in results][:5] == ["cat.png", "gone.png", "endless.png", "slow.png", "cat.png"]
    assert results[0]["predictions"] == results[4]["predictions"] == results[6]["predictions"]
    after = [request for request in origin.requests if b"/cat.png" in request]
    assert len(after) == len(before) + 1  # the same URL twice is fetched once


def test_slow_origins_starve_nobody(referring, origin):
    answers, hanging, enough = [], threading.Semaphore(0), threading.Event()

    def drip(connection, closed):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        hanging.release()
        while not enough.wait(0.2):
            connection.sendall(b"a")
    origin.answers["/hanging.png"] = drip
    threads = [threading.Thread(target=lambda: answers.append(post(referring, {"url": origin.url + "/hanging.png"})))
               for _ in range(50)]  # more than there are places in the queue
    for thread in threads:
        thread.start()
        assert hanging.acquire(timeout=120)  # one after the other: all at once would be more than the queue takes
    for _ in range(5):
        assert referring.predict(CAT).status_code == 200
        assert post(referring, {"url": origin.url + "/cat.png"}).status_code == 200
    wait_until_zero(referring, "slots_in_use", "queue_depth")
    assert not answers
    enough.set()
    for thread in threads:
        thread.join(120)
    found = collections.Counter(answer.json()["error"] for answer in answers)
    assert found["INPUT_NOT_FETCHED"] + found["OVERLOADED"] == 50, found  # all at once are more than the queue holds
    assert found["INPUT_NOT_FETCHED"] >= 20
    wait_until_zero(referring, "body_bytes")


def test_a_slow_origin_costs_a_client_its_deadline(referring, origin):
    answer = post(referring, {"url": origin.url + "/slow.png"}, **{"X-Request-Timeout": "2"})
    assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    assert "during fetch" in answer.json()["message"]


def test_what_is_fetched_counts_among_the_bodies(referring, origin):
    """Of several inputs that arrive at once, the largest is refused when the memory for bodies is gone."""
    answers, all_there = [], threading.Barrier(3)

    def grow(connection, closed):
        all_there.wait(120)
        repeatedly(b"HTTP/1.1 200 OK\r\n\r\n", bytes(2**15), 0.005)(connection, closed)
    origin.answers["/growing.png"] = grow
    threads = [threading.Thread(target=lambda: answers.append(post(referring, {"url": origin.url + "/growing.png"})))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted((answer.status_code, answer.json()["error"]) for answer in answers) == [
        (413, "FILE_TOO_LARGE"), (503, "OVERLOADED"), (503, "OVERLOADED")]
    wait_until_zero(referring, "body_bytes")


def test_urls_are_found_in_large_bodies_and_however_they_are_written(referring, origin):
    url = origin.url + "/cat.png"
    for body in (json.dumps({"url": url, "_more": "a" * 2**20}).encode(),
                 json.dumps({"instances": [{"url": url}], "_more": "a" * 2**18}).encode(),
                 rb'{"\u0075rl": "%s"}' % url.encode(), json.dumps({"url": url}).encode("utf-16")):
        answer = requests.post(referring.url + "/predict", data=body, headers={"Content-Type": "application/json"},
                               timeout=60)
        assert answer.status_code == 200, answer.text
    answer = requests.post(referring.url + "/predict/batch", timeout=60, json={
        "instances": [{"b64": base64.b64encode(CAT).decode()}, {"url": url}]})
    first, second = answer.json()["results"]
    assert first["predictions"] == second["predictions"]


def test_the_api_description_has_them(referring):
    document = requests.get(referring.url + "/openapi.json", timeout=10).json()
    validate(document)
    schema = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert ["url"] in [one.get("required") for one in schema["anyOf"]]


# --- without a server ---

def test_more_fetches_than_a_process_makes_at_once_are_refused(app, client, origin, monkeypatch):
    settings = Settings.parse({"INPUT_URLS": origin.url + "/", "PRIVATE_NETWORKS": "127.0.0.0/8"})
    monkeypatch.setitem(app.extensions, "fetch", references.References(settings).fetch)
    urls = {"instances": [{"url": origin.url + "/cat.png"}, {"url": origin.url + "/cat.png?again"}]}
    origin.answers["/cat.png?again"] = ok(CAT)
    monkeypatch.setattr(references, "MOST_FETCHES", 1)
    answer = client.post("/predict/batch", json=urls)
    assert (answer.status_code, answer.json["error"]) == (503, "OVERLOADED")
    assert answer.headers["Retry-After"]
    for _ in range(2):  # the place is free again
        assert client.post("/predict", json={"url": origin.url + "/cat.png"}).status_code == 200



def test_without_input_urls_inputs_by_url_are_off(client):
    for body in ({"url": "http://example.org/cat.png"}, {"instances": [{"url": "http://example.org/cat.png"}]}):
        answer = client.post("/predict", json=body)
        assert (answer.status_code, answer.json["error"]) == (400, "MISSING_FILE")
        assert "inputs by URL are off" in answer.json["message"]


def test_a_model_of_text_or_json_gets_its_urls_as_they_are(tmp_path, monkeypatch, origin, model_dir):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "url_lengths.py").write_text(
        "from app.tasks.own import OwnTask\n\n\nclass Lengths(OwnTask):\n    takes = 'json'\n\n"
        "    def predict(self, batch):\n        return [len(one['url']) for one in batch]\n")
    app = create_app(Settings.parse({"MODEL_NAME": "url_lengths:Lengths", "MODEL_DIR": str(model_dir), "DEVICE": "cpu",
                                     "INPUT_URLS": origin.url + "/", "DATA_DIR": str(tmp_path)}))
    before = len(origin.requests)
    answer = app.test_client().post("/predict", json={"url": origin.url + "/cat.png"})
    assert answer.status_code == 200, answer.text
    assert len(origin.requests) == before


OF_TEXT = """
from app.tasks.own import OwnTask, file


class Sizes(OwnTask):
    takes = "text"
    options = (file("voice", aliases=("speaker",)), file("noise"))
    example = "text"

    def predict(self, batch):
        return batch

    def encode(self, text, options):
        return " ".join([text, *(str(options[name] and len(options[name])) for name in ("voice", "noise"))])
"""


def test_options_that_are_files_may_be_urls(tmp_path, monkeypatch, origin, model_dir):
    """Also of a model whose input is text, to which a URL is text."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "voices.py").write_text(OF_TEXT)
    app = create_app(Settings.parse({"MODEL_NAME": "voices:Sizes", "MODEL_DIR": str(model_dir), "DEVICE": "cpu",
                                     "INPUT_URLS": origin.url + "/", "PRIVATE_NETWORKS": "127.0.0.0/8",
                                     "DATA_DIR": str(tmp_path)}))
    client, url = app.test_client(), {"url": origin.url + "/cat.png"}
    for members, expected in (({"voice": url}, f"{len(CAT)} None"), ({"speaker": url}, f"{len(CAT)} None"),
                              ({"voice": {"b64": "AAAA"}, "noise": url}, f"3 {len(CAT)}"),
                              ({"voice": url, "noise": url}, f"{len(CAT)} {len(CAT)}")):
        answer = client.post("/predict", json={"text": "a", **members})
        assert answer.status_code == 200, answer.text
        assert answer.json["predictions"] == f"a {expected}"
    for path, status, code in (("/gone.png", 422, "INPUT_NOT_FETCHED"), ("/../x", 400, "URL_NOT_ALLOWED"),
                               ("/endless.png", 413, "FILE_TOO_LARGE")):
        answer = client.post("/predict", json={"text": "a", "voice": {"url": origin.url + path}})
        assert (answer.status_code, answer.json["error"]) == (status, code), answer.text
