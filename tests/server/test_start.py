"""What is checked before a model is prepared, by real Gunicorn processes."""
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import requests
from conftest import ROOT, Settings, free_port, need
from gunicorn.config import Config

from app.config import StartError
from app.server import start_checks

TAKEN = "error: port {taken} is taken on 127.0.0.1: stop the program that listens there, or choose another PORT"
EXEC = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *sys.argv[2:]])"""


def environment(**variables):
    others = {k: v for k, v in os.environ.items() if k.lower() not in Settings.__dataclass_fields__}
    return {**others, "DEVICE": "cpu", "HOST": "127.0.0.1", "PORT": str(free_port()), "PYTHONPATH": str(ROOT),
            "DRAIN_SECONDS": "0", **variables}


@pytest.fixture(scope="module")
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(("variables", "env_file", "message"), [
    ({"PORT": "{taken}"}, "", TAKEN),
    ({"GUNICORN_CMD_ARGS": "--bind=127.0.0.1:{taken}"}, "", TAKEN),
    ({"HOST": "192.0.2.1"}, "",
     "error: HOST 192.0.2.1 is not an address of this machine; 0.0.0.0 stands for all that it has"),
    ({"GUNICORN_CMD_ARGS": "--bind=unix:/nowhere/s"}, "",
     "error: unix:/nowhere/s cannot be listened on: /nowhere is no folder that can be written"),
    ({"GUNICORN_CMD_ARGS": "--certfile=/nowhere.pem"}, "", "error: --certfile /nowhere.pem cannot be read"),
    ({"GUNICORN_CMD_ARGS": "--certfile=gunicorn.conf.py"}, "",
     "error: --certfile gunicorn.conf.py holds no certificate in PEM format"),
    ({"GUNICORN_CMD_ARGS": "--bind=fd://77"}, "",
     "error: descriptor 77 cannot be listened on: it is closed; whoever starts the service must leave it open"),
    ({"MODELS": "a=resnet18,b=examples.iris:Irsi"}, "",
     "error: examples.iris:Irsi cannot be served: Irsi is not in examples.iris; did you mean examples.iris:Iris?"),
    ({"PRECISION": "fp16"}, "", "error: PRECISION is fp16, which is for GPUs; a CPU takes fp32, bf16, int8 or auto"),
    ({"PRECISION": "int8", "ENGINE": "torch"}, "", "error: PRECISION is int8, which needs ENGINE=openvino on a CPU"),
    ({"JOBS": "on", "DATA_DIR": "/proc/nowhere"}, "",
     "error: DATA_DIR /proc/nowhere cannot be written: No such file or directory"),
    ({"MODEL_NAME": "ResNet18"}, "",
     "error: MODEL_NAME must be a model's name in lower case, such as resnet50, or your class as package.module:Class, "
     "got 'ResNet18'; did you mean resnet18?"),
    ({}, "TOP_K=3\nAPI_KEY=secret\n", "error: line 2 of .env: API_KEY is not a setting; did you mean API_KEYS?"),
])
def test_what_can_only_fail_is_refused_before_a_model_is_prepared(tmp_path, taken, variables, env_file, message):
    for name in ("app", "gunicorn.conf.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".env").write_text(env_file)
    variables = {"MODEL_NAME": "resnet18", "MODEL_DIR": str(tmp_path / "models"),
                 **{name: text.format(taken=taken) for name, text in variables.items()}}
    done = subprocess.run([sys.executable, "-m", "gunicorn", "app:create_app()"], cwd=tmp_path, timeout=60,
                          env=environment(LOG_FORMAT="text", **variables), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == message.format(taken=taken) + "\n"
    assert not (tmp_path / "models").exists()


def test_certificates_that_no_worker_could_use_are_refused(tmp_path, monkeypatch):
    need("openssl")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout",
                        f"{name}.key", "-out", f"{name}.pem"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", "a.key", "-out", "closed.key"],
                   check=True, capture_output=True)
    (tmp_path / "both.pem").write_text((tmp_path / "a.pem").read_text() + (tmp_path / "a.key").read_text())
    for options, message in (
            ({"certfile": "a.pem", "keyfile": "a.key", "ca_certs": "b.pem"}, None), ({"certfile": "both.pem"}, None),
            ({"certfile": "a.pem", "keyfile": "b.key"}, "--keyfile b.key does not fit --certfile a.pem"),
            ({"certfile": "a.pem", "keyfile": "closed.key"}, "--keyfile closed.key holds no key in PEM format that can "
                                                             "be read without a password"),
            ({"certfile": "a.pem"}, "--certfile a.pem, without --keyfile, holds no key in PEM format that can be read "
                                    "without a password"),
            ({"keyfile": "a.key"}, "--keyfile needs --certfile"),
            ({"certfile": "both.pem", "ca_certs": "a.key"}, "--ca-certs a.key holds no certificate in PEM format"),
            ({"certfile": "both.pem", "ciphers": "none"}, "--ciphers none names none that are available")):
        cfg = Config()
        for name, value in options.items():
            cfg.set(name, value)
        with pytest.raises(StartError, match=f"^{re.escape(message)}$") if message else contextlib.nullcontext():
            start_checks.check_certificates(cfg)


@pytest.mark.parametrize("option", [("--chdir", str(ROOT)), ("--preload",)])
def test_gunicorn_without_its_configuration_does_not_serve(tmp_path, option):
    done = subprocess.run([sys.executable, "-m", "gunicorn", *option, "app:create_app()"], cwd=tmp_path, timeout=60,
                          env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: Gunicorn has not read gunicorn.conf.py, without which this service cannot run: start it "
                      f"in {start_checks.ROOT} (--chdir comes too late for that)"]
    assert done.stderr.count("Booting worker") == option.count("--chdir")


def test_an_inherited_socket_is_not_taken_for_another_programs(tmp_path, model_dir, app):
    """As systemd starts it; and what is odd in the environment is only warned of."""
    log_path = tmp_path / "log"
    variables = {"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir), "CORES": "1", "API_KEY": "secret",
                 "WORKERS_PORT": "tcp://10.0.0.7:80"}
    with socket.create_server(("127.0.0.1", 0)) as server, open(log_path, "w") as log:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", EXEC, str(server.fileno()), "app:create_app()"], cwd=ROOT,
            env=environment(PORT=str(server.getsockname()[1]), **variables), pass_fds=[server.fileno()], stderr=log)
    try:
        until = time.monotonic() + 60
        while '"message": "serving"' not in log_path.read_text():
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < until, log_path.read_text()
            time.sleep(0.05)
        assert requests.get(url + "/health", timeout=30).status_code == 200
    finally:
        process.terminate()
        process.wait(60)
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert [line["message"] for line in lines if line["level"] == "WARNING"] == [
        "API_KEY in the environment is not a setting; did you mean API_KEYS?"]
    (starting,) = [line for line in lines if line["message"] == "starting"]
    assert (starting["cores"], starting["workers"], starting["streams"]) == (1, 1, 1)
