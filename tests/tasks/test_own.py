"""Models of one's own: what a class declares, what it gets without a line of its own, and what its mistakes cost."""
import base64
import io
import itertools
import json
import os
import subprocess
import sys
import time
import wave
from pathlib import Path

import gevent
import numpy as np
import pytest
import requests
from conftest import ROOT, encoded, photo, post
from openapi_spec_validator import validate
from PIL import Image
from videos import numbered, write

from app import create_app, own_class
from app.config import Settings, StartError
from app.prepare import prepared

HEAD = """
import time
from pathlib import Path

import numpy as np

from app.tasks.own import InvalidInput, Media, OwnTask, choice, file, integer, number, text, yes_or_no
"""

TOTAL = '''
class Total(OwnTask):
    """Adds numbers up."""
    takes, field, example = "json", "numbers", [1, 2]
    options = (integer("times", 1, 10, default=1, meaning="How often."), yes_or_no("as_text", default=False))

    def decode(self, value, options):
        if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
            raise InvalidInput("must be a list of numbers")
        return np.array(value, float) * options["times"]

    def predict(self, batch):
        return [numbers.sum() for numbers in batch]

    def encode(self, output, options):
        return str(output) if options["as_text"] else output
'''

ECHO = '''
class Echo(OwnTask):
    takes, media_types = "text", ("text/x-echo",)
    options = (text("tail", 5, default=""), file("attached", 100), number("pitch", 0.5, 2, default=1))

    def decode(self, value, options):
        return f"{value}|{options['tail']}|{len(options['attached'] or b'')}|{options['pitch']}"

    def predict(self, batch):
        return batch

    def encode(self, output, options):
        return Media(output.encode(), "text/x-echo")
'''

numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source): the name of a new module with this source, which the process and its children can import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(source, head=HEAD):
        name = f"own_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(head + source)
        return name
    return make


@pytest.fixture
def serve(module):
    """serve(source, name, **variables): the application that serves a class of this source."""
    def make(source, name, **variables):
        return create_app(Settings.parse({"MODEL_NAME": f"{module(source)}:{name}", "DEVICE": "cpu", **variables}))
    return make


def error_of(response):
    return response.status_code, response.json["error"], response.json["message"]


# --- inputs ---

def test_json_in_json_out(serve):
    client = serve(TOTAL, "Total").test_client()
    answer = client.post("/predict", json={"numbers": [1, 2, 3.5]}).json
    assert (answer["status"], answer["predictions"]) == ("success", 6.5)
    assert answer["metadata"]["model"] == "total"
    assert {"read", "queue", "decode", "inference", "encode"} <= set(answer["metadata"]["timings_ms"])
    assert client.post("/predict", json={"numbers": [1], "times": 3}).json["predictions"] == 3
    assert client.post("/predict?times=4", json={"numbers": [1], "as_text": True}).json["predictions"] == "4.0"


@pytest.mark.parametrize(("body", "code", "message"), [
    ({"numbers": "12"}, "INVALID_PARAMETER", "numbers must be a list of numbers"),
    ({"numbers": [1], "times": 11}, "INVALID_PARAMETER", "times must be an integer from 1 to 10, got 11"),
    ({"numbers": [1], "time": 2}, "INVALID_PARAMETER", "time is not an option of any model; did you mean times?"),
    ({"numbers": [1], "unit": "m"}, "INVALID_PARAMETER",
     "unit is not an option of any model; there are as_text, stream, times"),
    ({"number": [1]}, "MISSING_INPUT", 'No input provided: send it as JSON, such as {"numbers": [1, 2]}.'),
    ({"numbers": [1], "times": [1]}, "INVALID_PARAMETER", "times must be a single value, got a list"),
    ({"instances": [[1], ["a"]]}, "INVALID_PARAMETER", "instances[1] must be a list of numbers"),
    ({"instances": []}, "MISSING_INPUT", 'No input provided: send it as JSON, such as {"numbers": [1, 2]}.'),
    ({"instances": [[1]] * 33}, "TOO_MANY_FILES", "A request may have at most 32 instances, found 33; send the others "
                                                  "in a second one."),
    ({}, "MISSING_INPUT", 'No input provided: send it as JSON, such as {"numbers": [1, 2]}.'),
    ({"numbers": None}, "MISSING_INPUT", 'No input provided: send it as JSON, such as {"numbers": [1, 2]}.'),
    ({"numbers": [1], "times": -3}, "INVALID_PARAMETER", "times must be an integer from 1 to 10, got -3"),
    ({"numbers": [float("nan")]}, "INVALID_JSON", "The body is not valid JSON: it has NaN, which JSON lacks."),
])
def test_bad_json_is_told_what_to_change(serve, body, code, message):
    response = serve(TOTAL, "Total").test_client().post("/predict", json=body)
    assert error_of(response) == (400, code, message)


def test_a_number_too_large_is_no_json(serve):
    client = serve(TOTAL, "Total").test_client()
    response = client.post("/predict", data='{"numbers": [1e999]}', content_type="application/json")
    assert error_of(response) == (400, "INVALID_JSON", "The body is not valid JSON: 1e999 is too large a number.")


def test_instances_are_answered_in_order(serve):
    client = serve(TOTAL, "Total").test_client()
    answer = client.post("/predict", json={"instances": [[1], [2, 3], {"numbers": [4]}], "times": 2}).json
    assert answer["predictions"] == [2, 10, 8]
    assert client.post("/predict", json={"numbers": [1], "top_k": 2, "method": "face"}).json["predictions"] == 1
    batch = client.post("/predict/batch", json={"instances": [[1], "x", [3]]}).json
    assert [one.get("predictions", one.get("message")) for one in batch["results"]] == [
        1, "instances[1] must be a list of numbers", 3]
    assert (batch["count"], batch["failed"]) == (3, 1)


def test_without_a_field_the_input_is_all_members_but_the_options(serve):
    client = serve('''
class Keys(OwnTask):
    takes, example = "json", {"a": 1}
    options = (integer("top_k", 1, 99, default=1),)  # not the classifiers'

    def predict(self, batch):
        return [sorted(value) for value in batch]
''', "Keys").test_client()
    answer = client.post("/predict", json={"b": 1, "a": 2, "top_k": 50, "model": "keys"}).json
    assert answer["predictions"] == ["a", "b"]
    for misspelt in (client.post("/predict?topk=2", json={"b": 1}),
                     client.post("/predict", json={"instances": [{}], "topk": 2})):
        assert error_of(misspelt) == (400, "INVALID_PARAMETER",
                                      "topk is not an option of any model; did you mean top_k?")
    assert client.post("/predict", json={"instances": [{"c": 1}, {}]}).json["predictions"] == [["c"], []]
    assert error_of(client.post("/predict", json={"instances": [{}, [1]]})) == (
        400, "INVALID_PARAMETER", "instances[1] must be an object, got a list")
    batch = client.post("/predict/batch", json={"instances": [{"c": 1}, [1], {}]}).json
    assert [one.get("predictions", one.get("message")) for one in batch["results"]] == [
        ["c"], "instances[1] must be an object, got a list", []]


@pytest.mark.parametrize("sent", [
    {"json": {"text": "héllo", "tail": "t"}}, {"data": {"text": "héllo", "tail": "t"}},
    {"data": {"text": "héllo", "tail": "t"}, "content_type": "multipart/form-data"},
    {"data": "héllo".encode(), "content_type": "text/plain; charset=utf-8", "query_string": {"tail": "t"}},
    {"data": {"text": (io.BytesIO("héllo".encode()), "a.txt"), "tail": "t"}}])
def test_text_in_any_form(serve, sent):
    response = serve(ECHO, "Echo").test_client().post("/predict", **sent)
    assert (response.status_code, response.text) == (200, "héllo|t|0|1")


@pytest.mark.parametrize(("sent", "status", "message"), [
    ({"json": {"text": 3}}, 400, "text must be text, got a number"),
    ({"json": {"text": "a \ud800"}}, 400, "text must be text in Unicode, got half of a surrogate pair"),
    ({"json": {"text": "a", "tail": "\ud800"}}, 400, "tail must be a text of at most 5 characters"),
    ({"json": {"text": "a", "instances": ["b"]}}, 400, "The object has text and instances; send one of them."),
    ({"json": {"text": ""}}, 400, "No input provided: "),
    ({"data": {"text": ["a", "b"]}}, 400, "text must be sent once, not 2 times"),
    ({"data": b"\xff", "content_type": "text/plain"}, 400, "the body must be text in UTF-8, got other bytes"),
    ({"json": {"text": "a", "tail": "123456"}}, 400, "tail must be a text of at most 5 characters, got 123456"),
    ({"json": {"text": "a", "pitch": "3"}}, 400, "pitch must be a number from 0.5 to 2, got 3"),
    ({"json": {"text": "a", "attached": "?"}}, 400, "attached must be base64"),
    ({"data": {"text": "a", "attached": "no file"}}, 400, "attached must be a file: with curl, -F attached=@file, got"),
    ({"data": {"text": "a", "attached": (io.BytesIO(bytes(101)), "a")}}, 400,
     "attached must be a file of at most 100 bytes, got a file of 101 bytes"),
    ({"data": b"a", "content_type": "image/png"}, 415, "Content-Type image/png is not accepted here: send it as JSON"),
])
def test_bad_text_and_options(serve, sent, status, message):
    response = serve(ECHO, "Echo").test_client().post("/predict", **sent)
    assert response.status_code == status
    assert response.json["message"].startswith(message)


def test_a_long_option_in_large_json_whose_name_other_models_have_for_files(serve):
    client = serve(ECHO.replace('"tail", 5', '"tail", 500').replace("tail", "data"), "Echo").test_client()
    body = {"text": "x" * 2**20, "data": "y" * 400}
    response = client.post("/predict", json=body)
    assert response.text == f"{body['text']}|{body['data']}|0|1"


def test_an_option_that_is_a_file(serve):
    client = serve(ECHO, "Echo").test_client()
    assert client.post("/predict", data={"text": "a", "attached": (io.BytesIO(b"123"), "x")}).text == "a||3|1"
    assert client.post("/predict", json={"text": "a", "attached": base64.b64encode(b"1234").decode()}).text == "a||4|1"


PICTURE = '''
class Corner(OwnTask):
    takes = "picture"

    def predict(self, batch):
        return [[image.mode, image.size, image.getpixel((0, 0))] for image in batch]

class Frames(Corner):
    takes = ("picture", "video")

    def predict(self, batch):
        return [[image.size for image in images] for images in batch]

class Seconds(OwnTask):
    takes = "audio"

    def predict(self, batch):
        import io, wave
        return [wave.open(io.BytesIO(data)).getnframes() / 16000 for data in batch]
'''


def test_pictures_arrive_upright_in_rgb(serve):
    client = serve(PICTURE, "Corner").test_client()
    picture = Image.new("LA", (30, 20), (0, 0))
    picture.putpixel((0, 19), (200, 255))  # lies at the top left once it is turned
    exif = Image.Exif()
    exif[0x112] = 6
    answer = post(client, encoded(picture, exif=exif)).json
    assert answer["predictions"] == ["RGB", [20, 30], [200, 200, 200]]
    assert error_of(post(client, b"no picture"))[:2] == (400, "INVALID_IMAGE")


def test_videos_arrive_as_frames(serve):
    client = serve(PICTURE, "Frames").test_client()
    clip = write([numbered(i) for i in range(10)])
    assert len(post(client, clip, frames=3).json["predictions"]) == 3
    assert len(post(client, encoded(photo("coffee"))).json["predictions"]) == 1
    assert error_of(post(client, clip, frames=99))[:2] == (400, "INVALID_PARAMETER")


def test_audio_arrives_as_bytes(serve):
    client = serve(PICTURE, "Seconds").test_client()
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(bytes(2 * 8000))
    assert post(client, file.getvalue()).json["predictions"] == 0.5
    raw = client.post("/predict", data=file.getvalue(), content_type="audio/wav")
    assert raw.json["predictions"] == 0.5
    assert error_of(post(client, encoded(photo("coffee"))))[:2] == (400, "INVALID_AUDIO")
    assert client.post("/predict", data=b"x", content_type="image/png").status_code == 415


# --- answers ---

def test_media_or_json_as_the_client_prefers(serve):
    client = serve(ECHO, "Echo").test_client()
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "text/x-echo, application/json;q=0.5"}):
        response = client.post("/predict", json={"text": "a"}, headers=accept)
        assert (response.content_type, response.data) == ("text/x-echo", b"a||0|1")
        assert response.headers["X-Model"] == "echo"
    as_json = client.post("/predict", json={"text": "a"}, headers={"Accept": "application/json"}).json
    assert base64.b64decode(as_json["predictions"]["b64"]) == b"a||0|1"
    assert as_json["predictions"]["media_type"] == "text/x-echo"


def test_numpys_types_become_json(serve):
    client = serve('''
class Kinds(OwnTask):
    takes, example = "json", 1

    def predict(self, batch):
        return [{"a": np.float32(0.5), "b": np.arange(3), 3: (np.bool_(True), None)} for _ in batch]
''', "Kinds").test_client()
    assert client.post("/predict", json={"x": 1}).json["predictions"] == {"a": 0.5, "b": [0, 1, 2], "3": [True, None]}


@pytest.mark.parametrize(("returned", "why"), [
    ("[1, 2, 3]", "must return a list of as many outputs as it gets inputs: expected 1, got 3"),
    ("7", "expected 1, got int"), ("'x'", "expected 1, got str"), ("iter(batch)", "got list_iterator"),
    ("[float('nan')]", "the answer has nan, which JSON lacks"), ("[{'a': [1, {2}]}]", "the answer['a'][1] has a set"),
    ("[Media(b'x', 'audio/wav')]", "encode returned audio/wav, which media_types lacks"),
    ("1 / 0", "ZeroDivisionError"), ("exit(3)", "RuntimeError: Wrong raised SystemExit"),
])
def test_a_mistake_costs_its_request_a_clear_error(serve, caplog, returned, why):
    """The example is answered, another input is not."""
    app = serve(f'''
class Wrong(OwnTask):
    takes, field, example = "json", "x", 0

    def predict(self, batch):
        return [0] if batch == [0] else {returned}
''', "Wrong")
    client = app.test_client()
    assert error_of(client.post("/predict", json={"x": 1})) == (
        500, "INTERNAL_ERROR", "The service failed; its log has the reason under the request ID.")
    assert why in caplog.text
    batch = client.post("/predict/batch", json={"instances": [1, 0]}).json
    assert [one.get("error", one.get("predictions")) for one in batch["results"]] == ["INTERNAL_ERROR", 0]
    assert client.post("/predict", json={"x": 0}).json["predictions"] == 0
    assert client.get("/health").status_code == 200


def test_a_model_that_no_longer_answers_its_example_is_unhealthy(serve, monkeypatch):
    app = serve('''
class Worn(OwnTask):
    takes, field, example = "json", "x", 0
    worn = False

    def predict(self, batch):
        if Worn.worn:
            raise RuntimeError("out of order")
        Worn.worn = batch == [1]
        return batch
''', "Worn")
    client, loader = app.test_client(), app.extensions["model"]
    loader.current.tested = 0
    assert client.post("/predict", json={"x": 1}).status_code == 200
    assert client.post("/predict", json={"x": 2}).status_code == 500
    assert (client.get("/health").status_code, client.get("/health").json["reason"]) == (503, "self_test_failed")
    assert loader.needs_restart() == "the model failed its self-test"


def test_predict_can_see_how_much_time_is_left(serve):
    for attributes in ("", "threads = 1"):
        client = serve(f'''
class Patient(OwnTask):
    takes, field, example = "json", "x", 0
    {attributes}

    def predict(self, batch):
        return [min(self.seconds_left(), 99) for _ in batch]
''', "Patient").test_client()
        answer = client.post("/predict", json={"x": 1}, headers={"X-Request-Timeout": "7"}).json
        assert 0 < answer["predictions"] < 7


# --- what it gets without a line of its own ---

def test_the_cache_knows_the_input_the_options_and_the_model(serve):
    client = serve(TOTAL, "Total", CACHE_URL="memory://").test_client()

    def cached(path="/predict", **body):
        response = client.post(path, json=body)
        assert response.status_code == 200
        return response.headers["X-Cache"], response.json["predictions"]
    assert cached(numbers=[1, 2]) == ("miss", 3)
    assert cached(numbers=[1, 2]) == ("hit", 3)
    assert cached(numbers=[2, 1]) == ("miss", 3)
    assert cached(numbers=[1, 2], times=2) == ("miss", 6)
    assert cached(instances=[[1], [2]]) == ("miss", [1, 2])
    assert cached(instances=[[1], [2]]) == ("hit", [1, 2])
    odd = client.post("/predict", json={"numbers": [[[1], "instances[0]"], [[2], "instances[1]"]]})
    assert error_of(odd) == (400, "INVALID_PARAMETER", "numbers must be a list of numbers")
    loader = client.application.extensions["model"]
    loader.load([type(loader.current.task.place.source)(None, own=loader.settings.model_name, token="another")])
    assert cached(numbers=[1, 2])[0] == "miss"


def test_the_cache_keeps_media_and_tells_files_apart(serve):
    client = serve(ECHO, "Echo", CACHE_URL="memory://").test_client()

    def sent(content):
        response = client.post("/predict", data={"text": "a", "attached": (io.BytesIO(content), "x")})
        return response.headers["X-Cache"], response.text
    assert sent(b"12") == ("miss", "a||2|1")
    assert sent(b"12") == ("hit", "a||2|1")
    assert sent(b"13") == ("miss", "a||2|1")


def test_what_is_not_deterministic_is_not_cached(serve):
    client = serve('''
class Dice(OwnTask):
    takes, field, example, deterministic, rolls = "json", "x", 0, False, 0

    def predict(self, batch):
        Dice.rolls += 1
        return [Dice.rolls for _ in batch]
''', "Dice", CACHE_URL="memory://").test_client()
    first, second = (client.post("/predict", json={"x": 1}) for _ in range(2))
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "miss")
    assert first.json["predictions"] != second.json["predictions"]


def test_inputs_of_concurrent_requests_are_predicted_together(serve):
    app = serve('''
class Batched(OwnTask):
    takes, field, example, max_batch, batch_wait_ms, threads = "json", "x", 0, 8, 50, 1
    sizes = []

    def predict(self, batch):
        Batched.sizes.append(len(batch))
        time.sleep(0.2)
        return [value * 10 for value in batch]
''', "Batched")
    task = app.extensions["model"].current.task
    task.sizes.clear()
    greenlets = [gevent.spawn(app.test_client().post, "/predict", json={"x": i}) for i in range(16)]
    assert [greenlet.get(timeout=20).json["predictions"] for greenlet in greenlets] == [10 * i for i in range(16)]
    assert sum(task.sizes) == 16
    assert max(task.sizes) > 3  # more than there are slots for a model that takes inputs one by one
    assert max(task.sizes) <= 8
    assert len(app.test_client().post("/predict", json={"instances": list(range(20))}).json["predictions"]) == 20
    assert max(task.sizes) <= 8


def test_an_input_that_fails_does_not_fail_the_others_of_its_batch(serve, caplog):
    app = serve('''
class Inverse(OwnTask):
    takes, field, example, max_batch, batch_wait_ms, threads = "json", "x", 1, 8, 50, 1
    sizes = []

    def predict(self, batch):
        Inverse.sizes.append(len(batch))
        time.sleep(0.2)
        return [1 / value for value in batch]
''', "Inverse")
    values = [1, 2, 0, 4, 5, 8, 10, 20]
    app.extensions["model"].current.task.sizes.clear()
    greenlets = [gevent.spawn(app.test_client().post, "/predict", json={"x": value}) for value in values]
    responses = [greenlet.get(timeout=20) for greenlet in greenlets]
    assert [response.status_code for response in responses] == [200, 200, 500, 200, 200, 200, 200, 200]
    assert [response.json.get("predictions") for response in responses] == [1, 0.5, None, 0.25, 0.2, 0.125, 0.1, 0.05]
    assert max(app.extensions["model"].current.task.sizes) > 3
    assert len(caplog.text.splitlines()) < 300
    batch = app.test_client().post("/predict/batch", json={"instances": values}).json
    assert (batch["count"], batch["failed"], batch["results"][2]["error"]) == (8, 1, "INTERNAL_ERROR")


def test_a_reload_takes_over_the_modules_beside_the_class(serve, tmp_path):
    (tmp_path / "beside_it.py").write_text("FACTOR = 2")
    app = serve("""
from beside_it import FACTOR

class Times(OwnTask):
    takes, field, example = "json", "x", 1

    def predict(self, batch):
        return [value * FACTOR for value in batch]
""", "Times", CACHE_URL="memory://")
    client, loader = app.test_client(), app.extensions["model"]
    assert client.post("/predict", json={"x": 3}).json["predictions"] == 6
    (tmp_path / "beside_it.py").write_text("FACTOR = 50")
    loader.load([loader.current.task.place.source])  # with the same token: the code alone tells the answers apart
    assert client.post("/predict", json={"x": 3}).json["predictions"] == 150


@pytest.mark.parametrize(("threads", "most"), [("1", {1}), ("None", {2, 3})])
def test_threads_limit_how_many_predict_at_once(serve, threads, most):
    app = serve(f'''
import threading

class Counted(OwnTask):
    takes, field, example, threads = "json", "x", 0, {threads}
    now, most, lock = 0, 0, threading.Lock()

    def predict(self, batch):
        with self.lock:
            Counted.now += 1
            Counted.most = max(Counted.most, Counted.now)
        until = time.monotonic() + {0.05 if threads == "1" else 10}
        while Counted.most < 2 and batch != [0] and time.monotonic() < until:
            time.sleep(0.005)
        with self.lock:
            Counted.now -= 1
        return batch
''', "Counted", WORKERS="1")
    if app.extensions["model"].slots.count < 2:
        pytest.skip("this machine has one core")
    greenlets = [gevent.spawn(app.test_client().post, "/predict", json={"x": i}) for i in range(1, 7)]
    assert all(greenlet.get(timeout=20).status_code == 200 for greenlet in greenlets)
    assert app.extensions["model"].current.task.most in (most if threads == "1" else range(2, 99))


def test_info_metrics_and_description(serve):
    client = serve(TOTAL, "Total").test_client()
    client.post("/predict", json={"numbers": [1]})
    model = client.get("/info").json["model"]
    assert (model["name"], model["takes"], model["field"], model["example"]) == ("total", ["json"], "numbers", [1, 2])
    assert model["description"] == "Adds numbers up."
    assert model["options"][0] == {"name": "times", "schema": {"type": "integer", "minimum": 1, "maximum": 10},
                                   "default": 1, "takes": "an integer from 1 to 10", "meaning": "How often.",
                                   "is_file": False}
    metrics = client.get("/metrics").text
    assert 'model_server_model_requests_total{error="",model="total",status="200",version=""} ' in metrics
    assert client.get("/models").json["models"] == [{"name": "total", "default": True, "loaded": True}]
    assert client.post("/models/total/predict", json={"numbers": [1]}).status_code == 200
    assert error_of(client.post("/models/none/predict", json={}))[:2] == (404, "NOT_FOUND")


@pytest.mark.parametrize(("source", "name"), [(TOTAL, "Total"), (ECHO, "Echo"), (PICTURE, "Corner"),
                                              (PICTURE, "Frames"), (PICTURE, "Seconds")])
def test_the_openapi_document_is_valid_and_has_the_options(serve, source, name):
    document = serve(source, name).test_client().get("/openapi.json").json
    validate(document)
    operation = document["paths"]["/predict"]["post"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    content = operation["requestBody"]["content"]
    if name == "Total":
        assert {"times", "as_text"} < names
        assert list(content) == ["application/json"]
        assert content["application/json"]["example"] == {"numbers": [1, 2]}
    if name == "Echo":
        assert {"tail", "pitch"} < names
        assert "attached" not in names
        assert "attached" in content["multipart/form-data"]["schema"]["properties"]
        assert "text/x-echo" in operation["responses"]["200"]["content"]
    if name == "Frames":
        assert {"frames", "at"} < names


# --- mistakes at the start ---

@pytest.mark.parametrize(("source", "name", "why"), [
    ("", "Missing", "Missing is not in own_"),
    ("Number = 3", "Number", "Number is no subclass of app.tasks.own.OwnTask"),
    ("1 / 1\nimport not_there as A", "A",
     f"importing it with {sys.executable} failed: ModuleNotFoundError: No module named 'not_there' (own_"),
    ("class A(OwnTask:", "A", "importing it failed: SyntaxError"),
    ("A = 1 / 0", "A", "importing it failed: ZeroDivisionError: division by zero (own_"),
    ("A = 1\nraise SystemExit('bye')", "A", "importing it failed: SystemExit: bye"),
    ("class A(OwnTask):\n    pass", "A", "takes must be one of picture, video, audio, text, json"),
    ("class A(OwnTask):\n    takes = ('text', 'json')", "A", "takes must be one of"),
    ("class A(OwnTask):\n    takes = 'text'", "A", "it has no method predict"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = ['x']\n    def predict(self, batch): ...", "A",
     "options must be a tuple of what choice, file"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (text('model'),)\n    def predict(self, batch): ...", "A",
     "options need distinct names"),
    ("class A(OwnTask):\n    takes, field = 'json', ['x']\n    def predict(self, batch): ...", "A",
     "field must be a text or None, got ['x']"),
    ("class A(OwnTask):\n    takes, media_types = 'text', 'audio/wav'\n    def predict(self, batch): ...", "A",
     "media_types must be a tuple such as (\"audio/wav\",), got 'audio/wav'"),
    ("class A(OwnTask):\n    takes, example = 'json', {1, 2}\n    def predict(self, batch): ...", "A",
     "A cannot be served: TypeError: Object of type set is not JSON serializable"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (text('text'),)\n    def predict(self, batch): ...", "A",
     "options need distinct names"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (text('top k'),)\n    def predict(self, batch): ...", "A",
     "the name of an option must have lower-case letters, digits and _, not 'top k'"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (integer('k', 1, 5, default=9),)\n"
     "    def predict(self, batch): ...", "A", "the default of k must be an integer from 1 to 5, got 9"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (choice('k', ('a', 'b'), default='c'),)\n"
     "    def predict(self, batch): ...", "A", "the default of k must be one of a, b, got 'c'"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (choice('k', 'ab'),)\n"
     "    def predict(self, batch): ...", "A",
     "TypeError: the choices of k must be a tuple of texts"),
    ("class A(OwnTask):\n    takes = 'text'\n    options = (number('k', 5, 1),)\n"
     "    def predict(self, batch): ...", "A",
     "k must be a number from 5 to 1: there is no such number"),
    ("class A(OwnTask):\n    takes = 'text'\n    max_batches = 4\n    def predict(self, batch): ...", "A",
     "it has an attribute max_batches: did you mean max_batch?"),
    ("class A(OwnTask):\n    takes = 'picture'\n    options = (text('image'),)\n"
     "    def predict(self, batch): ...", "A",
     "data, file, files, image, url and video are names of the input"),
    ("class A(OwnTask):\n    takes, max_batch = 'text', 4\n"
     "    def predict(self, batch):\n        return batch[:1]", "A",
     "expected 2, got 1"),
    ("class A(OwnTask):\n    takes = 'text'\n    max_batch = 0\n    def predict(self, batch): ...", "A",
     "max_batch must be an integer of at least 1"),
    ("class A(OwnTask):\n    takes = 'text'\n    def load(self):\n        open('/nowhere/x')\n"
     "    def predict(self, batch): ...", "A", "A.load failed: FileNotFoundError: [Errno 2] No such file"),
    ("class A(OwnTask):\n    takes = 'text'\n    def predict(self, batch):\n        return batch * 2", "A",
     "a fails its self-test: A's self-test failed: TypeError: A.predict must return a list of as many outputs as it "
     "gets inputs: expected 1, got 2"),
    ("class A(OwnTask):\n    takes = 'text'\n    def load(self):\n        raise SystemExit(3)\n"
     "    def predict(self, batch): ...", "A", "A.load failed: SystemExit: 3"),
    ("class A(OwnTask):\n    takes = 'text'\n    def load(self):\n        self.model = open('/nowhere/x')\n"
     "    def predict(self, batch): ...\n    def close(self):\n        self.model.close()", "A",
     "A.load failed: FileNotFoundError: [Errno 2] No such file"),
])
def test_a_mistake_stops_the_start_in_one_line(module, source, name, why):
    with pytest.raises(StartError) as e:
        create_app(Settings.parse({"MODEL_NAME": f"{module(source)}:{name}", "DEVICE": "cpu"}))
    assert why in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("source", "name", "why"), [
    ("class Total:\n    ...", "Totla", "Totla is not in own_classes; did you mean own_classes:Total?"),
    ("class A:\n    ...\nclass B:\n    ...", "Sum", "Sum is not in own_classes; there are A, B"),
    ("import none\nclass Total:\n    ...", "Total_", "did you mean own_classes:Total?")])
def test_a_misspelt_class_is_found_without_importing_it(tmp_path, monkeypatch, source, name, why):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_classes.py").write_text(source)
    with pytest.raises(StartError) as e:
        own_class.check(f"own_classes:{name}")
    assert str(e.value).startswith(f"own_classes:{name} cannot be served: ")
    assert why in str(e.value)
    assert "own_classes" not in sys.modules


@pytest.mark.parametrize(("name", "why"), [
    ("own_clases:A", f"no module own_clases in {os.getcwd()} or on Python's path; did you mean own_classes?"),
    ("own_classes.py:A", "there is no module own_classes.py; did you mean own_classes:A?"),
    ("own_packages.model:A", "no module own_packages in"),
    ("own_package.model:Modle", "Modle is not in own_package.model; did you mean own_package.model:Model?"),
    ("nothing_like_it:A", "there is no module nothing_like_it in")])
def test_a_misspelt_module_is_found(tmp_path, monkeypatch, name, why):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_classes.py").touch()
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/model.py").write_text("class Model: ...")
    with pytest.raises(StartError) as e:
        own_class.check(name)
    assert why in str(e.value)
    assert ("did you mean" in str(e.value)) == ("did you mean" in why)


@pytest.mark.parametrize(("source", "meant"), [
    ("class Total(OwnTask): ...\nclass Part: ...", "own_classes:Total"),
    ("class A(own.OwnTask): ...\nclass B(OwnTask): ...", "own_classes:A or own_classes:B"),
    ("import none", "own_classes:Class")])
def test_a_module_without_its_class_is_found_before_the_architectures_are_listed(tmp_path, monkeypatch, source, meant):
    monkeypatch.chdir(tmp_path)
    for name in ("own_classes", "resnet50"):
        (tmp_path / f"{name}.py").write_text(source)
    settings = Settings.parse({"MODEL_NAME": "own_classes", "MODEL_DIR": str(tmp_path)})
    with pytest.raises(StartError, match="^own_classes cannot be served: own_classes.py is here, but its class is not "
                                         rf"named; did you mean {meant}\?$"):
        prepared(settings, "openvino")
    own_class.check_architecture("resnet50")
    own_class.check_architecture("nothing_like_it")


@pytest.mark.parametrize("source", [
    "from own_others import *", "def __getattr__(name): ...", "globals()['To' + 'tal'] = 1", "import x as Total",
    "def broken(:\nTotal"])
def test_what_may_be_right_is_left_to_the_import(tmp_path, monkeypatch, source):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_classes.py").write_text(source)
    own_class.check("own_classes:Total")


def test_folders_need_no_init_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_folder/inner").mkdir(parents=True)
    (tmp_path / "own_folder/inner/model.py").write_text("class A: ...")
    own_class.check("own_folder.inner.model:A")


@pytest.mark.parametrize("threads", [None, 1])
def test_a_self_test_that_hangs_ends_the_start(module, monkeypatch, threads):
    monkeypatch.setattr("app.tasks.own.END_WITHIN_S", 0.1)
    source = (f"class A(OwnTask):\n    takes, self_test_within_s, threads = 'text', 1, {threads}\n"
              "    def predict(self, batch):\n        time.sleep(600)")
    with pytest.raises(StartError, match="self-test did not end within 1 s|ran out"):
        create_app(Settings.parse({"MODEL_NAME": f"{module(source)}:A", "DEVICE": "cpu"}))


def test_the_example_that_a_class_declares_must_be_answered(module):
    source = ("class A(OwnTask):\n    takes, field, example = 'json', 'x', 1\n    def decode(self, value, options):\n"
              "        raise InvalidInput('must be better')\n    def predict(self, batch): ...")
    with pytest.raises(StartError, match="self-test failed: ServiceError: x must be better"):
        create_app(Settings.parse({"MODEL_NAME": f"{module(source)}:A", "DEVICE": "cpu"}))


# --- as a service ---

SLOW = '''
class Slow(OwnTask):
    takes, field, example = "json", "x", 0

    def load(self):
        self.factor = int(Path(__file__).with_name("factor.txt").read_text())

    def predict(self, batch):
        if batch == [666]:
            time.sleep(60)
        if batch == [13]:
            import os
            os._exit(1)
        return [value * self.factor for value in batch]
'''


def test_a_service_of_ones_own_survives_its_model(start_service, module, tmp_path):
    """A hang costs its client a 504; a crash costs its connection; a reload takes over new weights and new code, or, if
    that is broken, nothing."""
    (tmp_path / "factor.txt").write_text("2")
    name = module(SLOW)
    service = start_service(MODEL_NAME=f"{name}:Slow", REQUEST_TIMEOUT="1", WORKERS="1").wait_ready()

    def ask(x):
        return requests.post(service.url + "/predict", json={"x": x}, timeout=20)
    assert ask(4).json()["predictions"] == 8
    hung = ask(666)
    assert (hung.status_code, hung.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    assert ask(5).json()["predictions"] == 10
    with pytest.raises(requests.ConnectionError):
        ask(13)
    service.wait_ready()
    assert ask(6).json()["predictions"] == 12

    def reload():
        return subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                              capture_output=True, text=True, timeout=60)
    service_file = tmp_path / f"{name}.py"
    (tmp_path / "factor.txt").write_text("3")
    assert "reloaded: 1 worker serves" in reload().stdout
    assert ask(4).json()["predictions"] == 12
    service_file.write_text(HEAD + SLOW.replace("value * self.factor", "value * self.factor + 1"))
    assert reload().returncode == 0
    assert {ask(4).json()["predictions"] for _ in range(8)} == {13}
    service_file.write_text(HEAD + SLOW.replace("self.factor = int(", "self.factor = broken("))
    failed = reload()
    assert failed.returncode == 1
    assert "Slow.load failed: NameError: name 'broken' is not defined" in failed.stderr
    assert ask(4).json()["predictions"] == 13


@pytest.mark.parametrize("attributes", ["", "threads = 1"])
def test_a_hang_is_noticed(serve, attributes, monkeypatch):
    app = serve(f'''
import threading

class Slow(OwnTask):
    takes, field, example = "json", "x", 0
    {attributes}
    gate = threading.Event()

    def predict(self, batch):
        return [self.gate.wait(600) if one else one for one in batch]
''', "Slow")
    loader, until = app.extensions["model"], time.monotonic() + 60
    while not loader.current.task.hung_seconds():  # on a busy machine, the time may be up before predict is called
        assert time.monotonic() < until
        response = app.test_client().post("/predict", json={"x": 2}, headers={"X-Request-Timeout": "0.2"})
        assert response.status_code == 504
    monkeypatch.setattr("app.model_loader.HUNG_AFTER_S", 600)
    assert loader.needs_restart() is None
    monkeypatch.setattr("app.model_loader.HUNG_AFTER_S", 0)
    assert loader.needs_restart().startswith("an inference has been hanging")
    loader.current.task.gate.set()
    assert app.test_client().post("/predict", json={"x": 0}).status_code == 200


def test_a_service_that_cannot_start_says_why_in_its_last_line(start_service, module):
    service = start_service(MODEL_NAME=f"{module('class A(OwnTask): takes = 3')}:A", LOG_FORMAT="text")
    assert service.process.wait(60) == 3
    assert "A cannot be served: takes must be one of picture, video, audio, text, json" in service.log
    assert "Traceback" not in service.log


# --- the command line ---

def run(*arguments, **variables):
    import os
    done = subprocess.run([sys.executable, "-m", "app", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=100, env={**os.environ, "DEVICE": "cpu", **variables})
    return done.returncode, done.stdout, done.stderr


def test_predict_and_evaluate_on_the_command_line(module, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for i, content in enumerate(([1, 2], {"numbers": [3, 4]}, "bad")):
        (files / f"{i}.json").write_text(json.dumps(content))
    name = f"{module(TOTAL)}:Total"
    code, out, err = run("predict", files, "--times", "2", MODEL_NAME=name)
    assert (code, out.splitlines()[1].split()[-1], out.splitlines()[2].split()[-1]) == (1, "6.0", "14.0")
    assert "2.json: INVALID_PARAMETER: 2.json must be a list of numbers" in err
    (tmp_path / "labels.csv").write_text("file,label\n0.json,3\n1.json,8\n")
    code, out, err = run("evaluate", "--labels", tmp_path / "labels.csv", files, MODEL_NAME=name)
    assert (code, out) == (0, "equal  0.5000\nmean absolute error  0.5\n2 files\n")
    code, out, err = run("predict", files, "--times", "x", MODEL_NAME=name)
    assert (code, err) == (1, "error: times must be an integer from 1 to 10, got x\n")


def test_media_are_saved(module, tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    (tmp_path / "attached").write_bytes(b"12345")
    code, out, err = run("predict", tmp_path / "a.txt", "--save", tmp_path / "out", "--attached", tmp_path / "attached",
                         "--json", MODEL_NAME=f"{module(ECHO)}:Echo")
    path = json.loads(out)["predictions"]["path"]
    assert (code, err, Path(path).read_text()) == (0, "", "hello||5|1")


def test_bundled_numbers_are_plain():
    from app.tasks.own_answers import plain
    assert plain({"a": np.array([[1, 2]]), "b": (1.5,)}) == {"a": [[1, 2]], "b": [1.5]}
