"""The OpenAPI document is valid, complete, and what the running service does; /docs shows it without the network."""
import os
import re
import subprocess
import sys

import openapi_spec_validator
import pytest
import requests
from conftest import ROOT, Service, exported

from app import create_app
from app.api.uploads import FILE_FIELDS
from app.config import Settings


@pytest.fixture(scope="module")
def small_service(tmp_path_factory):
    """A ready Service whose network sees 64 × 64 pixels: some thousand answers are asked for, and not what they say."""
    folder = tmp_path_factory.mktemp("small")
    variables = {"MODEL_NAME": "efficientnet_lite0", "PREPROCESSING": "resize=64 crop=64", "DEVICE": "cpu",
                 "MODEL_DIR": str(folder / "models")}
    exported(Settings.parse(variables))
    running = Service(folder, variables)
    yield running.wait_ready()
    running.kill()


@pytest.fixture(scope="module")
def document(app):
    return app.test_client().get("/openapi.json").json


def test_document_is_valid_openapi_3_1(document):
    assert document["openapi"] == "3.1.0"
    openapi_spec_validator.OpenAPIV31SpecValidator(document).validate()


def test_every_reference_leads_somewhere_and_every_response_has_its_id(document):
    for reference in re.findall(r"'\$ref': '#/([^']+)'", str(document)):
        target = document
        for name in reference.split("/"):
            target = target[name]
    responses = [r for operations in document["paths"].values() for operation in operations.values()
                 for r in operation["responses"].values() if "$ref" not in r]
    for response in [*responses, *document["components"]["responses"].values()]:
        assert "X-Request-ID" in response["headers"]


def test_document_has_every_path_and_method_and_no_other(app, document):
    served = {(rule.rule.replace("<", "{").replace(">", "}"), method.lower()) for rule in app.url_map.iter_rules()
              if not rule.arguments or rule.rule.startswith(("/models/", "/v2/models/"))
              for method in rule.methods - {"HEAD", "OPTIONS"}}
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == served


def test_document_has_every_error_code_of_the_code(document):
    source = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py") if "openapi" not in path.name
                     and path.parent.name not in ("jobs", "history", "outbound"))  # whose tests look there
    used = set(re.findall(r"\d{3}, \"([A-Z_]{5,})\"|(?:400|404|405|413|415|500): \(\"([A-Z_]+)\"", source))
    used = {a or b for a, b in used} - {"CLIENT_CLOSED_REQUEST"}  # for the log: that client is gone
    assert {"MISSING_FILE", "OVERLOADED", "NOT_FOUND", "ALL_FAILED"} <= used
    documented = str(document)
    assert [code for code in sorted(used) if code not in documented] == []


def test_document_says_where_a_key_is_needed_just_where_it_is(app):
    client = create_app(Settings.parse({"API_KEYS": "a-key"}), app.extensions["model"]).test_client()
    document = client.get("/openapi.json").json
    assert sorted(document["components"]["securitySchemes"]) == ["bearer", "header"]
    openapi_spec_validator.OpenAPIV31SpecValidator(document).validate()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            refused = client.open(path, method=method.upper()).status_code == 401
            assert bool(operation.get("security")) == refused, path
            assert ("401" in operation["responses"]) == refused, path


def test_without_keys_the_document_asks_for_none(document):
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert not any(operation.get("security") for operation in operations)


def test_document_has_every_form_and_field(document):
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert sorted(content) == ["application/json", "application/octet-stream", "image/*", "multipart/form-data",
                               "multipart/x-mixed-replace", "video/*", "video/x-motion-jpeg"]
    assert "video/x-motion-jpeg" in document["paths"]["/predict"]["put"]["requestBody"]["content"]
    assert "video/x-motion-jpeg" not in str(document["paths"]["/embed"])
    for name in FILE_FIELDS:
        assert name in str(content["multipart/form-data"])


def test_examples_of_the_document_work(client, document):
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert client.post("/predict", json=content["example"]).status_code == 200
    content = document["paths"]["/predict/batch"]["post"]["requestBody"]["content"]["application/json"]
    body = client.post("/predict/batch", json=content["example"]).json
    assert (body["count"], body["failed"]) == (2, 1)


def test_limits_of_the_document_are_the_settings(document, settings):
    schema = document["paths"]["/predict/batch"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["instances"]["maxItems"] == settings.max_batch_files


@pytest.mark.slow
def test_running_service_does_what_the_document_says(small_service, tmp_path):
    """schemathesis asks every view, with what the document allows and with what it does not; of those with several
    paths, the one without a model's name. No schema can say the shapes of V2's /infer."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests/schemathesis.toml"), "run",
         small_service.url + "/openapi.json", "--exclude-path-regex", r"^/v2/.*/infer$|^/models/\{name\}/|/versions/"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout


def test_every_get_answers_in_the_types_of_the_document(service, document):
    for path, operations in document["paths"].items():
        if "get" not in operations or "{" in path:
            continue
        for media_type in operations["get"]["responses"]["200"]["content"]:
            answer = requests.get(service.url + path, headers={"Accept": media_type}, timeout=10)
            assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (200, media_type), path


def test_docs_are_swagger_ui_from_installed_files(service):
    page = requests.get(service.url + "/docs", timeout=10)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "'unsafe-inline'" not in page.headers["Content-Security-Policy"].partition("script-src")[2].partition(";")[0]
    files = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert len(files) == 6
    for file in files:
        assert not re.match(r"[a-z]+:|//", file)
        assert requests.get(f"{service.url}/{file}", timeout=10).status_code == 200
    assert b"SwaggerUIBundle" in requests.get(service.url + "/docs/swagger-ui-bundle.js", timeout=10).content


@pytest.mark.parametrize("name", ["nothing.js", "..%2f__init__.py", "%2fetc%2fpasswd"])
def test_docs_serve_nothing_else(client, name):
    assert client.get(f"/docs/{name}").json["error"] == "NOT_FOUND"
