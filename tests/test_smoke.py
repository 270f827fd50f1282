"""The commands that ask a running service: smoke, health, and reload where several run."""
import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from conftest import ROOT, Service
from own_tasks import Length, Sum
from servers import free_port

from app import create_app, healthcheck, smoke
from app.config import Settings

NAMES = ["health", "info", "predict", "again", "error", "metrics", "docs", "v2"]


def run(*arguments, **variables):
    """(exit code, standard output, standard error) of `python -m app`, whatever proxies the environment names."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOST", "PORT")}
    done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=variables.pop("cwd", ROOT), text=True,
                          capture_output=True, timeout=60, check=False, env={
                              **environment, "http_proxy": "http://127.0.0.1:1", "PYTHONPATH": str(ROOT), **variables})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def smoked(command):
    """smoked(url, …): (exit code, {check: (result, what it says)}, last line), in this process."""
    def call(*arguments):
        code, out, _ = command(["smoke", *arguments], {})
        *lines, last = out.splitlines()
        found = [re.fullmatch(r"(ok|FAILED|skipped) +(\w+) +\d+ ms  (.+)", line).groups() for line in lines]
        return code, {name: (result, said) for result, name, said in found}, last
    call.command = command
    return call


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        """Standard error is for the tests."""


@contextlib.contextmanager
def served(app):
    """The URL of an application, served by a thread."""
    with make_server("127.0.0.1", 0, app, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_smoke_of_a_service_that_is_well(service, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = subprocess.run(["make", "-s", "smoke", f"URL={service.url}/", f"PYTHON={tmp_path}/bare/bin/python3"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
                          env={"PATH": os.environ["PATH"], "http_proxy": "http://127.0.0.1:1"})  # without packages
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in NAMES]
    assert "tiger cat 0.388, as expected" in lines[2]
    assert re.fullmatch(r"8 ok, 0 FAILED, \d+ ms in all", last)


@pytest.mark.parametrize(("cls", "says"), [(Sum, "ok"), (Length, "ok")])
def test_smoke_of_models_of_ones_own(cls, says, smoked):
    settings = Settings.parse({"MODEL_NAME": f"own_tasks:{cls.__name__}", "DEVICE": "cpu"})
    with served(create_app(settings)) as url:
        code, found, last = smoked(url)
    assert (code, {result for result, _ in found.values()}) == (0, {"ok"}), found
    assert list(found) == NAMES
    assert found["predict"][1] == "a model of one's own has answered"


def test_smoke_asks_each_of_several_models(model_dir, app, smoked):
    settings = Settings.parse({"MODELS": "lite@1=efficientnet_lite0,lite@2=own_tasks:Length,sum=own_tasks:Sum",
                               "DEVICE": "cpu", "MODEL_DIR": str(model_dir)})
    with served(create_app(settings)) as url:
        code, out, _ = smoked.command(["smoke", url], {})
    *lines, last = out.splitlines()
    assert (code, {line.split()[0] for line in lines}, len(lines)) == (0, {"ok"}, 23), out
    for name in ("lite@1", "lite@2", "sum"):
        assert [line.split()[1] for line in lines if f" ms  {name}: " in line] == [*smoke.OF_MODEL]
    assert last.startswith("23 ok, 0 FAILED, ")


def test_smoke_of_ocean_behind_keys(ocean_settings, ocean_app, smoked):
    settings = dataclasses.replace(ocean_settings, api_keys=("secret",))
    with served(create_app(settings, ocean_app.extensions["model"])) as url:
        code, found, last = smoked(url, "--key", "secret")
        assert {name: result for name, (result, _) in found.items() if name != "predict"} == {
            name: "ok" for name in NAMES if name != "predict"}
        # The tests' checkpoint was not trained: its scores may be anything.
        assert re.match(r"openness -?\d|scores out of 0 to 1: \{\"openness\"", found["predict"][1])
        for arguments, says in (([], "401: the service needs a key: --key KEY, or make smoke KEY=…"),
                                (["--key", "wrong"], "401: this key is not valid")):
            code, found, last = smoked(url, *arguments)
            assert (code, list(found), found["info"]) == (1, ["health", "info"], ("FAILED", says))
            assert last.startswith("1 ok, 1 FAILED, 6 not tried, ")


@pytest.mark.parametrize(("answer", "says"), [
    (b"HTTP/1.0 404 No\r\nContent-Type: text/html\r\n\r\n", "/health answers 404 text/html: this is not the URL"),
    (b"HTTP/1.0 301 Moved\r\nLocation: https://example.org/\r\n\r\n", "it redirects to https://example.org/: use that"),
    (b"SSH-2.0-OpenSSH\r\n", "it speaks no HTTP (BadStatusLine): is this https?"),
    (b"", "it speaks no HTTP (RemoteDisconnected)"), (None, "connection refused")])
def test_smoke_of_something_else(answer, says, smoked):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if answer is None:
            server.close()
        else:
            threading.Thread(target=serve, daemon=True).start()
        code, found, last = smoked(url)
    assert (code, list(found), found["health"][0]) == (1, ["health"], "FAILED")
    assert says in found["health"][1]
    assert last.startswith("0 ok, 1 FAILED, 7 not tried, ")


def test_smoke_says_what_is_wrong_with_the_url(service, command, smoked):
    assert "TLS fails (WRONG_VERSION_NUMBER): is it http?" in smoked(
        service.url.replace("http", "https"))[1]["health"][1]
    assert "there is no such host" in smoked("http://nowhere.invalid")[1]["health"][1]
    assert "this is not the URL of the service" in smoked(service.url + "/docs")[1]["health"][1]
    for url, key, why in ((f"{service.url}/a b", "x", "write its path with %20 and the like"),
                          (service.url, "sec\nret", "this key cannot be sent: ")):
        code, out, err = command(["smoke", url, "--key", key], {})
        assert (code, out, why in err, "ret" in err) == (1, "", True, False)
    assert "is no host: " in smoked("http://exämple..org")[1]["health"][1]
    assert command(["smoke", "ftp://x"], {}) == (1, "", "error: ftp://x is no URL such as http://127.0.0.1:5000\n")


INFO = {"num_classes": 1000, "weights": {"source": "torchvision"}}
CAT = [{"class": "tabby", "class_id": 281, "confidence": 0.9}, {"class": "x", "class_id": 1, "confidence": 0.1}]


@pytest.mark.parametrize(("model", "predictions", "says"), [
    (INFO, [{"class": "goldfish", "class_id": 1, "confidence": 0.9}], "the picture of a cat is called goldfish 0.900"),
    (INFO, CAT[::-1], "confidences that cannot be"), (INFO, [{**CAT[0], "confidence": 1.1}], "confidences that cannot"),
    ({**INFO, "traits": ["a"]}, {"a": 1.2}, "scores out of 0 to 1"), ({**INFO, "traits": ["b"]}, {"a": 0.5}, "scores"),
    ({**INFO, "traits": ["a"]}, {"a": 0.5}, "no face was found")])
def test_smoke_knows_the_answer(model, predictions, says):
    with pytest.raises(smoke.Failed, match=says):
        smoke.judge(model, {"predictions": predictions, "metadata": {"face_detected": False, "method": "face+middle"}})


def test_smoke_knows_a_right_answer():
    assert smoke.judge(INFO, {"predictions": CAT}) == "tabby 0.900, as expected"
    own = {"num_classes": 1000, "weights": {"source": "MODEL_PATH (cats.pt)"}}
    assert smoke.judge(own, {"predictions": CAT[1:]}) == "x 0.100"
    assert smoke.same({"a": [1, 0.5, "x"]}, {"a": [1, 0.5004, "x"]})
    assert not smoke.same({"a": [1, 0.5, "x"]}, {"a": [1, 0.51, "x"]})


# --- health ---

def test_health_is_that_of_the_settings_and_no_proxy_is_used(service, tmp_path):
    code, out, err = run("health", PORT=str(service.port))
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["status"] == "healthy"
    (tmp_path / ".env").write_text(f"HOST=127.0.0.1\nPORT={service.port}\nMODEL_NAEM=wrong\n")
    assert run("health", cwd=tmp_path)[0] == 0
    assert run("health", service.url)[0] == 0
    assert run("health", cwd=tmp_path, PORT="1") == (1, "no answer from http://127.0.0.1:1: Connection refused\n", "")
    for host, named in (("::", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1")):  # not what Linux alone can reach
        assert run("health", HOST=host, PORT="1")[1].startswith(f"no answer from http://{named}:1: ")
    assert run("health", PORT="x") == (1, "no answer from http://127.0.0.1:x: expected http://HOST:PORT, "
                                          "https://HOST:PORT or unix:PATH\n", "")


@pytest.mark.parametrize("body", [b"<html>It works!</html>", b'{"status": "ok"}', b'{"status": "healthy"}', b""])
def test_health_of_another_program(body):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        text, code = healthcheck.ask(url)
        thread.join()
    assert (code, text) == (1, f"what answers at {url} is not this service: {body.decode() or 'HTTP/1.1 200 OK'}")


def test_health_of_a_service_whose_answer_never_ends():
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                while True:  # until the client leaves
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    time.sleep(0.1)
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert run("health", url) == (1, f"no answer from {url}: timed out\n", "")
        thread.join()


@pytest.mark.parametrize("kind", ["IPv6", "unix"])
def test_health_at_other_kinds_of_address(kind, tmp_path):
    family, address = (socket.AF_INET6, ("::1", 0)) if kind == "IPv6" else (socket.AF_UNIX, str(tmp_path / "socket"))
    with socket.socket(family) as server:
        server.bind(address)
        server.listen()

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"status":\n "unhealthy"}\n')
        thread = threading.Thread(target=serve)
        thread.start()
        done = run("health", HOST="::", PORT=str(server.getsockname()[1])) if kind == "IPv6" else \
            run("health", f"unix:{address}")
        thread.join()
    assert done == (1, '{"status": "unhealthy"}\n', "")


def test_health_imports_next_to_nothing():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "app", "health"], cwd=ROOT, text=True,
                          capture_output=True, check=False, env={**os.environ, "HOST": "127.0.0.1", "PORT": "1"})
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "app.healthcheck" in imported
    assert not imported & {"argparse", "dotenv", "logging", "http.client", "dataclasses", "flask", "numpy", "openvino",
                           "app.config"}


# --- several services ---

def test_reload_among_several_services(service, tmp_path, settings):
    port = free_port()
    other = Service(tmp_path, {"MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "MODEL_DIR": str(
        settings.model_dir), "WORKERS": "1"})
    try:
        other.wait_ready()
        code, out, err = run("reload")
        first, *lines = err.splitlines()
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: \d+ services run here: choose one with --port or --pid", first)
        for one in (service, other):
            assert f"  --port {one.port}  --pid {one.process.pid:<7}  efficientnet_lite0" in lines
        code, out, err = run("reload", "--port", str(other.port))
        assert (code, err) == (0, "")
        assert out.startswith("reloaded: 1 worker serves efficientnet_lite0-")
        assert "reload" in other.log
        assert "reload" not in service.log
        code, out, err = run("traffic", "--port", str(port))
        assert (code, out) == (1, "")
        assert err.startswith(f"error: no running service with port {port} was found, only:\n  --port ")
    finally:
        other.stop()
