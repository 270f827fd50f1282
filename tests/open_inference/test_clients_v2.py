"""KServe's and Triton's own clients against the running service: what they are answered is what /predict and torch say.

They run in an environment of their own, which `make test` makes.
"""
import json
import os
import re
import subprocess

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, photo
from PIL import Image

from app.engine.preprocess import Preprocessing
from app.prepare.networks import EfficientNetLite0, lite0_weights_path

PYTHON = ROOT / ".venv-v2-clients/bin/python"
PICTURE = ROOT / "tests/images/chelsea.jpg"
MODEL = "efficientnet_lite0"


def run(arguments, folder=ROOT):
    if not PYTHON.exists():
        (pytest.fail if os.environ.get("REQUIRE_PROGRAMS") else pytest.skip)(f"make {PYTHON.parent.parent.name}"
                                                                            "/installed has not been run")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=600,
                          check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pixels():
    """Two photographs of one size, uint8 (2, H, W, 3) RGB."""
    return np.stack([np.asarray(photo(name).convert("RGB").resize((320, 260))) for name in ("chelsea", "coffee")])


@pytest.fixture(scope="module")
def tensor(pixels, app):
    """The same, preprocessed: float32 (2, 3, 224, 224)."""
    preprocessing = Preprocessing(**app.extensions["model"].current.task.manifest.preprocessing)
    return np.stack([preprocessing(Image.fromarray(one)) for one in pixels])


@pytest.fixture(scope="module")
def torchs(tensor):
    """torch's logits for these."""
    module = EfficientNetLite0().eval()
    module.load_state_dict(torch.load(lite0_weights_path(), weights_only=True))
    with torch.inference_mode():
        return module(torch.from_numpy(tensor)).numpy()


@pytest.fixture(scope="module")
def arrays(pixels, tensor, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "arrays.npz"
    np.savez(path, pixels=pixels, tensor=tensor)
    return path


@pytest.fixture(scope="module")
def kserve(service, arrays):
    return json.loads(run([ROOT / "tests/open_inference/kserve_client.py", service.url, MODEL, PICTURE, arrays]))


@pytest.fixture(scope="module")
def triton(service, arrays):
    return json.loads(run([ROOT / "tests/open_inference/triton_client.py", service.url, MODEL, PICTURE, arrays]))


@pytest.fixture(scope="module")
def predicted(service):
    """{class_id: confidence} of the best ten by /predict."""
    answer = service.predict(PICTURE.read_bytes(), top_k=10).json()
    return {one["class_id"]: one["confidence"] for one in answer["predictions"]}


@pytest.fixture(params=["kserve", "triton"])
def client(request):
    return request.getfixturevalue(request.param)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def assert_as_predicted(rows, predicted):
    for row in rows:
        assert np.argsort(row)[::-1][:10].tolist() == list(predicted)
        assert np.array(row)[list(predicted)] == pytest.approx(list(predicted.values()), rel=1e-5)


def test_health_and_readiness(client):
    assert (client["live"], client["ready"], client["model_ready"], client["other_ready"]) == (True, True, True, False)


def test_probabilities_are_those_of_predict(client, predicted):
    for name in ("defaults", "mixed"):
        assert_as_predicted(client[name]["probabilities"], predicted)
    for rows in client["together"]:
        assert_as_predicted(rows, predicted)
    assert client["defaults"]["id"] == "seven"
    assert client["defaults"]["model"] == MODEL
    assert np.ravel(client["defaults"]["labels"]).tolist() == ["tiger cat", "Egyptian cat"]


def test_kserves_binary_and_json_agree(kserve, predicted):
    assert_as_predicted(kserve["file"]["probabilities"], predicted)
    assert softmax(np.array(kserve["mixed"]["logits"])) == pytest.approx(np.array(kserve["mixed"]["probabilities"]),
                                                                         rel=1e-4)
    assert kserve["mixed"]["labels"] == ["tiger cat", "Egyptian cat", "tabby"]


def test_tritons_binary_and_json_agree(triton, predicted):
    assert_as_predicted(triton["text"]["probabilities"], predicted)
    for name in ("batch", "gzip", "deflate"):
        assert_as_predicted(triton[name]["probabilities"], predicted)
    assert len(triton["batch"]["probabilities"]) == len(triton["batch"]["labels"]) == 3
    assert np.array(triton["mixed"]["embedding"]).shape == (1, 1280)
    best = json.loads(triton["mixed"]["predictions"][0])[0]
    assert (best["class"], best["confidence"]) == ("tiger cat", predicted[best["class_id"]])


def test_classification(client, predicted):
    values = np.ravel(client["classes"]["probabilities"]).tolist()
    assert [one.split(":")[2] for one in values] == ["tiger cat", "Egyptian cat", "tabby"]
    assert [int(one.split(":")[1]) for one in values] == list(predicted)[:3]
    assert [float(one.split(":")[0]) for one in values] == pytest.approx(list(predicted.values())[:3], rel=1e-5)


def test_classification_of_logits_is_of_that_output_alone(triton):
    assert [[one.split(":")[2] for one in row] for row in triton["classes"]["logits"]] == [["tiger cat",
                                                                                            "Egyptian cat"]]


def test_tensors_are_answered_as_torch_does(client, torchs):
    assert client["tensor"]["logits"] == pytest.approx(torchs, abs=1e-4)


def test_pictures_of_one_size_are_answered_as_torch_does(client, torchs):
    assert client["pixels"]["probabilities"] == pytest.approx(softmax(torchs), abs=1e-5)


def test_tritons_tensors_as_json_and_one_picture(triton, torchs):
    assert triton["tensor_as_json"]["logits"] == triton["tensor"]["logits"]
    assert triton["one_picture"]["probabilities"][0] == pytest.approx(softmax(torchs)[0], abs=1e-5)
    assert np.array(triton["pixels"]["embedding"]) == pytest.approx(np.array(triton["tensor"]["embedding"]), abs=1e-4)


def test_triton_is_told_what_there_is(triton):
    assert set(triton["server"]["extensions"]) == {"classification", "binary_tensor_data"}
    assert {one["name"]: (one["datatype"], one["shape"]) for one in triton["metadata"]["inputs"]} == {
        "image": ("BYTES", [-1]), "pixels": ("UINT8", [-1, -1, -1, 3]), "tensor": ("FP32", [-1, 3, 224, 224])}
    assert [one["name"] for one in triton["metadata"]["outputs"]] == ["probabilities", "logits", "labels",
                                                                      "predictions", "embedding"]
    assert triton["index"] == [{"name": MODEL, "state": "READY", "reason": ""}]


def test_errors_are_the_clients_exceptions(client):
    for name, message in (("unknown_output", "There is no output nothing"), ("no_picture", "not a picture"),
                          ("wrong_shape", "shape of tensor must be [N, 3, 224, 224], got [2, 3, 9, 224]")):
        status, text = client[name]
        assert str(status) == "400"
        assert message in text


def test_tritons_further_errors(triton):
    assert triton["wrong_option"] == ["400", "top_k must be an integer from 1 to 10, got 99"]
    assert triton["unknown_model"] == ["404", "There is no model other; GET /models lists the models."]
    for name in ("load", "statistics", "all_statistics", "config", "trace", "log", "shared_memory", "cuda_memory"):
        status, message = triton[name]
        assert (status, message.endswith(" of Triton is not supported here.")) == ("404", True), name


def examples():
    """The documentation's programs that follow a line <!-- run with the clients -->."""
    text = (ROOT / "docs/open-inference.md").read_text(encoding="utf-8")
    return re.findall(r"^<!-- run with the clients -->\n```python\n(.*?)^```", text, re.M | re.S)


def test_documentation_has_an_example_of_each_client():
    assert len(examples()) == 2
    assert ["kserve" in one for one in examples()] == [False, True]


@pytest.mark.parametrize("index", range(2))
def test_documentation_example(index, service, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(PICTURE.read_bytes())
    code = examples()[index]
    assert "127.0.0.1:5000" in code
    (tmp_path / "example.py").write_text(code.replace("127.0.0.1:5000", service.url.removeprefix("http://")))
    assert "tiger cat" in run(["example.py"], tmp_path)


def test_every_answer_and_error_has_its_request_id(service):
    for path in ("/v2", "/v2/models/other", "/v2/nothing"):
        answer = requests.get(service.url + path, headers={"X-Request-ID": "mine"}, timeout=10)
        assert answer.headers["X-Request-ID"] == "mine"
