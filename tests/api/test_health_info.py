"""/health, /ready, /live, /info and /."""
import time

import pytest

from app import create_app
from app.model_loader import ModelLoader
from app.prepare.bundles import sha256
from app.prepare.networks import lite0_weights_path
from app.server import machine


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_ready_service_is_healthy(client, path):
    response = client.get(path)
    assert response.status_code == 200
    body = response.json
    assert sorted(body) == ["device", "model", "model_loaded", "status", "timestamp", "uptime_seconds", "version"]
    assert (body["status"], body["model"], body["device"], body["model_loaded"]) == (
        "healthy", "efficientnet_lite0", "cpu", True)
    assert abs(body["timestamp"] - time.time()) < 60
    assert body["uptime_seconds"] >= 0


def test_before_the_model_is_loaded_health_is_503(settings):
    client = create_app(settings, ModelLoader(settings, machine.plan(settings))).test_client()
    response = client.get("/health")
    assert response.status_code == 503
    assert (response.json["status"], response.json["reason"]) == ("unhealthy", "loading")
    assert response.json["model_loaded"] is False
    assert client.get("/live").status_code == 200


def test_live(client):
    assert client.get("/live").json["status"] == "alive"


def test_index_lists_the_endpoints_that_there_are(app, client):
    body = client.get("/").json
    assert body["status"] == "running"
    rules = {rule.rule for rule in app.url_map.iter_rules() if not rule.arguments}
    assert set(body["endpoints"]) == {rule for rule in rules if not rule.startswith("/v2/")}  # /v2 stands for them
    assert "/models/NAME/embed" in body["endpoints"]["/models"]
    assert "/v2/models/NAME/infer" in body["endpoints"]["/v2"]


def test_info_tells_what_answers(client):
    body = client.get("/info").json
    model = body["model"]
    assert body["status"] == "success"
    assert (model["name"], model["task"], model["engine"], model["precision"]) == (
        "efficientnet_lite0", "classification", "openvino", "fp32")
    assert model["input_size"] == [224, 224]
    assert model["preprocessing"] == {"resize": 256, "crop": 224, "interpolation": "bicubic", "mean": [127 / 255] * 3,
                                      "std": [128 / 255] * 3}
    assert model["num_classes"] == len(model["labels"]) == 1000
    assert model["total_parameters"] == 4652008
    assert model["weights"]["sha256"] == sha256(lite0_weights_path())
    assert body["config"]["max_file_size"] == 10 * 2**20
    assert "jpg" in body["config"]["allowed_extensions"]
    assert body["versions"]["torch"].startswith("2.13.0")


def test_no_path_of_the_machine_is_told(client, settings):
    text = client.get("/info").text + client.get("/health").text
    assert str(settings.model_dir) not in text
    assert "site-packages" not in text
