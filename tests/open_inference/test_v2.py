"""/v2: what is asked and answered, and that every mistake is a 400 in V2's shape."""
import base64
import gzip
import json
import zlib

import numpy as np
import pytest
import requests
from conftest import encoded, photo, post
from PIL import Image

from app import create_app
from app.config import Settings
from app.open_inference import compressed
from app.open_inference.request_body import HEADER_LENGTH

CAT = encoded(photo("chelsea"), "JPEG")
TEXT = base64.b64encode(CAT).decode()
INFER = "/v2/models/efficientnet_lite0/infer"


def image(*texts, name="image", shape=None, **more):
    texts = list(texts or [TEXT])
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)] if shape is None else shape, "data": texts, **more}


def infer(client, *inputs, path=INFER, headers=None, **members):
    return client.post(path, json={"inputs": inputs, **members}, headers=headers)


def infer_binary(client, tensor, data, path=INFER, **members):
    text = json.dumps({"inputs": [tensor], **members}).encode()
    return client.post(path, data=text + data, headers={HEADER_LENGTH: str(len(text))})


def output(answer, name):
    return next(one for one in answer.json["outputs"] if one["name"] == name)


def assert_error(answer, status, message):
    assert answer.status_code == status, answer.data[:500]
    assert list(answer.json) == ["error"]
    assert message in answer.json["error"]
    assert answer.headers["X-Request-ID"]


@pytest.fixture
def client_with(app):
    def make(**variables):
        return create_app(Settings.parse(variables), app.extensions["model"]).test_client()
    return make


# --- pictures ---

def test_pixels_are_answered_as_a_file_with_them(client):
    picture = photo("coffee").convert("RGB")
    expected = post(client, encoded(picture), top_k=3).json["predictions"]
    pixels = np.asarray(picture)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape),
              "parameters": {"binary_data_size": pixels.size}}
    answer = infer_binary(client, tensor, pixels.tobytes(), parameters={"top_k": 3},
                          outputs=[{"name": "predictions"}, {"name": "labels"}])
    assert json.loads(output(answer, "predictions")["data"][0]) == expected
    assert output(answer, "labels")["data"] == [one["class"] for one in expected]
    small = np.asarray(picture.resize((20, 30)))
    nested = {"name": "pixels", "datatype": "UINT8", "shape": [1, 30, 20, 3], "data": [small.tolist()]}
    flat = {**nested, "shape": [30, 20, 3], "data": small.ravel().tolist()}
    assert infer(client, nested).json == infer(client, flat).json


def test_batch_answers_each_in_order_and_fails_with_the_first_mistake(client):
    coffee = base64.b64encode(encoded(photo("coffee"))).decode()
    answer = infer(client, image(TEXT, coffee), parameters={"top_k": 1})
    assert output(answer, "labels")["data"] == ["tiger cat", "espresso"]
    assert output(answer, "probabilities")["shape"] == [2, 1000]
    assert_error(infer(client, image(TEXT, "aGVsbG8=", "@")), 400, "image[1]: The file is not a picture")


def test_ocean(ocean_app):
    client, picture = ocean_app.test_client(), photo("astronaut").convert("RGB")
    data = base64.b64encode(encoded(picture)).decode()
    expected = post(client, encoded(picture), method="middle").json["predictions"]
    answer = infer(client, image(data), path="/v2/models/ocean/infer", parameters={"method": "middle"})
    assert dict(zip(output(answer, "labels")["data"], output(answer, "scores")["data"], strict=True)) == pytest.approx(
        expected, rel=1e-5)  # which is rounded, the tensor is not
    task = ocean_app.extensions["model"].current.task
    tensor = task.preprocessing(picture)[None]
    answer = infer_binary(client, {"name": "tensor", "datatype": "FP32", "shape": list(tensor.shape),
                                   "parameters": {"binary_data_size": tensor.nbytes}}, tensor.tobytes(),
                          path="/v2/models/ocean/infer", outputs=[{"name": "predictions"}])
    assert json.loads(output(answer, "predictions")["data"][0]) == pytest.approx(expected, rel=1e-5)
    black = base64.b64encode(encoded(Image.new("RGB", (64, 64)))).decode()
    assert_error(infer(client, image(black), path="/v2/models/ocean/infer", parameters={"method": "face"}), 422,
                 "No face was found")


# --- models of one's own ---

def test_models_of_ones_own():
    app = create_app(Settings.parse({"MODELS": "sum=own_tasks:Sum,tone@1=own_tasks:Tone,members=own_tasks:Members",
                                     "LOAD_MODELS": "first_use", "DEVICE": "cpu"}))
    client = app.test_client()
    index = client.post("/v2/repository/index", data=b'{"ready": true}').json
    assert [one["name"] for one in index] == ["sum", "tone", "members"]  # as /ready says of each
    assert all(client.get(f"/v2/models/{one['name']}/ready").json["ready"] for one in index)
    for path in ("/v2/models/tone@1", "/v2/models/tone@1/ready", "/v2/models/tone@2/versions/1"):
        assert_error(client.get(path), 404, "A version goes into the path: /v2/models/tone/versions/1")
    metadata = client.get("/v2/models/tone").json
    assert (metadata["versions"], metadata["inputs"][0]["name"], metadata["platform"]) == (["1"], "text", "python")
    numbers = image("[1, 2]", "[3]", name="numbers")
    answer = infer(client, numbers, path="/v2/models/sum/infer", parameters={"times": 3})
    assert [json.loads(one)["sum"] for one in output(answer, "predictions")["data"]] == [9, 9]
    text = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}
    answer = infer_binary(client, text, b"\2\0\0\0la", path="/v2/models/tone/versions/1/infer")  # loads it first
    assert answer.json["model_version"] == "1"
    assert json.loads(output(answer, "predictions")["data"][0])["media_type"] == "audio/wav"
    answer = infer(client, image('{"b": 1}', name="input"), path="/v2/models/members/infer")
    assert output(answer, "predictions")["data"] == ['["b"]']
    for tensor, parameters, message in (
            (numbers, {"more": "aGk="}, "more is a file"), (numbers, {"times": 10}, "times must be"),
            (image("[1,", name="numbers"), {}, "numbers must be JSON"),
            (image("[NaN]", name="numbers"), {}, "NaN"),
            (image('"a"', name="numbers"), {}, "must be a list of numbers"),
            (image("[1]"), {}, "There is no input image"), (numbers, {"times": [1]}, "single value")):
        assert_error(infer(client, tensor, path="/v2/models/sum/infer", parameters=parameters), 400, message)
    assert_error(infer(client, numbers, path="/v2/models/tone/versions/2/infer"), 404, "no model tone@2")
    assert_error(infer_binary(client, text, b"\2\0\0\0\xff\xfe", path="/v2/models/tone/infer"), 400, "UTF-8")


# --- mistakes ---

@pytest.mark.parametrize(("inputs", "members", "message"), [
    ([image("@")], {}, "base64"), ([image("")], {}, "empty"), ([image("aGVsbG8=")], {}, "not a picture"),
    ([image(name="pixels")], {}, "There is no input pixels (BYTES)"), ([image(name="x")], {}, "no input x"),
    ([image(), {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 3], "data": [1, 2, 3]}], {}, "one input"),
    ([image(shape=[1, 2])], {}, "shape of image must be"), ([image(shape=[2])], {}, "must have 2 elements"),
    ([image(shape=[0])], {}, "no elements"), ([image(shape=[33])], {}, "at most 32"),
    ([image(shape=[2**62])], {}, "at most 32"), ([image(shape=[])], {}, "shape of image"),
    ([{"name": "pixels", "datatype": "UINT8", "shape": [0, 1, 3], "data": []}], {}, "shape of pixels"),
    ([{"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 4], "data": [1] * 4}], {}, "shape of pixels"),
    ([{"name": "pixels", "datatype": "FP32", "shape": [1, 1, 3], "data": [1] * 3}], {}, "no input pixels (FP32)"),
    ([{"name": "tensor", "datatype": "FP32", "shape": [3, 224, 224], "data": [1]}], {}, "shape of tensor"),
    ([{"name": "tensor", "datatype": "FP32", "shape": [1, 3, 224, 224], "data": [1]}], {}, "150528 numbers"),
    ([image()], {"outputs": [{"name": "scores"}]}, "There is no output scores"),
    ([image()], {"outputs": [{"name": "labels", "parameters": {"classification": 2}}]}, "classification is not"),
    ([image()], {"parameters": {"top_k": "x"}}, "top_k must be"),
    ([image()], {"parameters": {"explain": True}}, "explain is not available"),
    ([image()], {"parameters": {"topk": 3}}, "topk is not an option of efficientnet_lite0; did you mean top_k?"),
    ([image()], {"parameters": {"top_k": {}}}, "single value"), ([], {}, "inputs must be")])
def test_mistakes(client, inputs, members, message):
    assert_error(infer(client, *inputs, **members), 400, message)


def test_parameters_that_are_nobodys_are_ignored(client):
    answer = infer(client, image(), parameters={"sequence_id": 1, "sequence_start": True, "priority": 2, "timeout": 9,
                                                "tenant": "a", "top_k": 1})
    assert output(answer, "labels")["data"] == ["tiger cat"]


def test_a_model_that_cannot_be_loaded_is_not_ready_until_it_would_be_tried_again(monkeypatch):
    app = create_app(Settings.parse({"MODELS": "sum=own_tasks:Sum,tone@1=own_tasks:Tone", "LOAD_MODELS": "first_use",
                                     "DEVICE": "cpu"}))
    client, loader, text = app.test_client(), app.extensions["model"], image("la", name="text")
    monkeypatch.setattr(loader, "load_one", {}.__getitem__)
    assert client.get("/v2/models/tone/ready").status_code == 200
    assert_error(infer(client, text, path="/v2/models/tone/infer"), 503, "tone@1 cannot be loaded now")
    monkeypatch.undo()
    for path in ("/v2/models/tone/ready", "/v2/models/tone/versions/1/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json["ready"]) == (503, False)
    assert client.get("/v2/models/sum/ready").json["ready"]
    loader.failed_at["tone@1"] -= 10
    assert client.get("/v2/models/tone/ready").json["ready"]
    assert infer(client, text, path="/v2/models/tone/infer").status_code == 200


def test_larger_than_allowed(client):
    assert_error(infer(client, image("A" * 80 * 2**20)), 413, "A text in data has")
    pixels = {"name": "pixels", "datatype": "UINT8", "shape": [100_000, 100_000, 3], "data": [1]}
    assert_error(infer(client, pixels), 413, "at most 50,000,000")
    assert_error(client.post(INFER, content_length=2**31), 413, "larger than")
    assert_error(client.post(INFER, data=b"{}", headers={"Content-Encoding": "br"}), 415, "uncompressed, or as gzip")
    assert_error(client.post(INFER, data=b"{}", headers={"Content-Encoding": ""}), 400, "inputs")
    assert_error(client.post(INFER, data=b"x" * 9, headers={HEADER_LENGTH: "10"}), 400, HEADER_LENGTH)


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed(client, monkeypatch, encoding, compress):
    def ask(body, **headers):
        return client.post(INFER, data=body, headers={"Content-Encoding": encoding, **headers})
    text = json.dumps({"inputs": [image()], "parameters": {"top_k": 1}}).encode()
    monkeypatch.setattr(compressed, "STEP", 1000)
    for piece in (100, len(text), 2**20):
        monkeypatch.setattr(compressed, "PIECE", piece)
        assert output(ask(compress(text)), "labels")["data"] == ["tiger cat"]
    tensor = json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {
        "binary_data_size": len(CAT) + 4}}]}).encode()
    binary = compress(tensor + len(CAT).to_bytes(4, "little") + CAT)
    answer = ask(binary, **{HEADER_LENGTH: str(len(tensor))})  # as it is before, as Triton's client says it
    assert output(answer, "labels")["data"][0] == "tiger cat"
    whole = compress(text)
    for damaged in (whole[:-9], whole[:5000], b"", b"text", text, whole + b"x", whole + bytes(2000), 2 * whole):
        assert_error(ask(damaged), 400, f"not valid {encoding}")
    assert_error(ask(compress(bytes(150 * 2**20))), 413, "larger than")
    assert client.application.extensions["bodies"].total == 0


def test_huge_but_finite_numbers(ocean_app):
    """Of these, a network makes NaN or, where it limits what is inside, wrong scores."""
    tensor = np.full((1, 3, 256, 256), 3e38, "<f4")
    about = {"name": "tensor", "datatype": "FP32", "shape": [1, 3, 256, 256],
             "parameters": {"binary_data_size": tensor.nbytes}}
    answer = infer_binary(ocean_app.test_client(), about, tensor.tobytes(), path="/v2/models/ocean/infer")
    assert_error(answer, 400, "beyond ±1,000,000")


def test_paths_methods_and_models_that_there_are_not(client):
    assert_error(client.get("/v2/nothing"), 404, "nothing at this path")
    assert_error(client.get("/v2/"), 404, "nothing at this path")
    assert_error(client.get(INFER), 405, "This path takes POST, not GET.")
    assert_error(client.get("/v2/models/x"), 404, "no model x")
    assert_error(client.get("/v2/models/x/ready"), 404, "no model x")
    assert_error(infer(client, image(), path="/v2/models/efficientnet_lite0/versions/1/infer"), 404, "no model")
    assert_error(client.post("/v2/repository/index", data=b"["), 400, "JSON")
    assert client.get("/v2x").json["error"] == client.get("/nothing").json["error"] == "NOT_FOUND"


def test_index_of_those_that_are_ready(client):
    assert client.post("/v2/repository/index", data=b'{"ready": true}').json == client.get("/v2/repository/index").json


# --- what it shares with the own API ---

def test_off(client_with):
    client = client_with(OPEN_INFERENCE="off")
    assert client.get("/v2").json["error"] == "NOT_FOUND"
    assert "/v2" not in str(client.get("/openapi.json").json["paths"])
    assert "/v2" not in client.get("/").json["endpoints"]


def test_keys(client_with):
    client = client_with(API_KEYS="a-key-0123456789")
    assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
    for answer in (client.get("/v2"), client.post("/v2/repository/index"), client.get(INFER.removesuffix("/infer")),
                   infer(client, image())):
        assert_error(answer, 401, "needs a valid key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/v2", headers={"X-API-Key": "a-key-0123456789"}).status_code == 200


def test_rate_limit_counts_each_picture(client_with):
    client = client_with(RATE_LIMIT="5/hour")
    assert infer(client, image(TEXT, TEXT, TEXT)).status_code == 200
    answer = infer(client, image(TEXT, TEXT, TEXT))
    assert_error(answer, 429, "each file of a batch counts")
    assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/v2").status_code == 200


def test_rate_limit_does_not_count_the_index(client_with):
    client = client_with(RATE_LIMIT="1/hour")
    assert [client.post("/v2/repository/index").status_code for _ in range(3)] == [200] * 3
    assert infer(client, image()).status_code == 200


def test_deadline(client):
    assert_error(infer(client, image(), headers={"X-Request-Timeout": "0.000001"}), 504, "ran out")
    assert_error(infer(client, image(), headers={"X-Request-Timeout": "x"}), 400, "X-Request-Timeout")


def test_full_queue(app, monkeypatch):
    slots = app.extensions["model"].slots
    monkeypatch.setattr(slots, "onlookers", slots.count + slots.max_queue)
    answer = infer(app.test_client(), image())
    assert_error(answer, 503, "at its limit")
    assert int(answer.headers["Retry-After"]) > 0


def test_cache(app, monkeypatch):
    client = create_app(Settings.parse({"CACHE_URL": "memory://"}), app.extensions["model"]).test_client()
    outputs = [{"name": "probabilities"}, {"name": "embedding"}]
    first = infer(client, image(TEXT, TEXT), outputs=outputs)
    monkeypatch.setattr(app.extensions["model"].current.task.engine, "infer", None)  # would fail
    assert infer(client, image(), outputs=outputs).json["outputs"][0]["data"] == first.json["outputs"][0]["data"][:1000]


def test_metrics_by_rule(service):
    assert requests.post(service.url + INFER, json={"inputs": [image(TEXT, "@")]}, timeout=30).status_code == 400
    metrics = requests.get(service.url + "/metrics", timeout=10).text
    assert 'endpoint="/v2/models/<name>/infer"' in metrics
    assert requests.get(service.url + "/v2/health/ready", timeout=10).json() == {"ready": True}
