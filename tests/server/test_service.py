"""The service as its users run it: real Gunicorn processes, real sockets."""
import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
import requests
from conftest import ROOT, encoded, free_port, photo
from hanging_model import copy_model_dir
from servers import is_running
from traffic import wait_until

from app.engine.bundle import installed_versions
from app.server import shared_memory

CAT = (ROOT / "tests/images/chelsea.jpg").read_bytes()


def test_curls_upload_gets_the_right_answer(service):
    answer = service.predict(CAT, "chelsea.jpg")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["predictions"][0]["class"] == "tiger cat"


def test_bad_input_leaves_the_worker_alive_and_logs_no_crash(service):
    workers = service.workers()
    bad = [(b"text", "photo.jpg", 400, {}), (b"", "empty.jpg", 400, {}), (CAT[:9000], "cut.jpg", 400, {}),
           (CAT, "cat.jpg", 400, {"top_k": "abc"}), (bytes(11 * 2**20), "big.jpg", 413, {})]
    for data, filename, status, options in bad:
        answer = service.predict(data, filename, **options)
        assert (answer.status_code, answer.json()["status"]) == (status, "error")
    assert requests.get(service.url + "/nothing").json()["error"] == "NOT_FOUND"
    assert requests.delete(service.url + "/predict").json()["error"] == "METHOD_NOT_ALLOWED"
    assert service.predict(CAT).status_code == 200
    assert service.workers() == workers
    assert "Traceback" not in service.log
    assert '"level": "ERROR"' not in service.log


def test_one_log_line_a_request_with_its_id_and_stages(service):
    requests.post(service.url + "/predict", files={"file": CAT}, headers={"X-Request-ID": "my-id-1"})
    requests.get(service.url + "/nothing", headers={"X-Request-ID": "my-id-2"})
    until = time.monotonic() + 30
    while "my-id-2" not in service.log:
        assert time.monotonic() < until
        time.sleep(0.01)
    lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]
    (first,) = [line for line in lines if line.get("request_id") == "my-id-1"]
    assert (first["method"], first["path"], first["status"], first["level"]) == ("POST", "/predict", 200, "INFO")
    assert first["duration_ms"] >= first["timings_ms"]["inference"] > 0
    (second,) = [line for line in lines if line.get("request_id") == "my-id-2"]
    assert (second["status"], second["error"]) == (404, "NOT_FOUND")


def test_decoders_do_not_write_between_the_lines_of_the_log(service):
    good = encoded(photo("chelsea"), "TIFF", compression="tiff_lzw")
    (tags,), order = struct.unpack("<I", good[4:8]), random.Random(1)
    for i in range(60):
        damaged = bytearray(good)
        for _ in range(6):
            at = tags + order.randrange(150) if i % 2 else order.randrange(tags)
            damaged[at] = order.randrange(256)
        assert service.predict(bytes(damaged), "a.tif").status_code in (200, 400, 413)
    lines = service.log.splitlines()
    assert all(line.startswith("{") for line in lines), [line for line in lines if not line.startswith("{")]


def test_workers_use_openvino_and_never_load_torch(service):
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in service.workers())
    assert "libopenvino" in maps
    assert "libtorch" not in maps
    assert "libopenvino" not in Path(f"/proc/{service.process.pid}/maps").read_text()


def test_inference_has_the_priority_of_any_program(service):
    """At nice 19 one busy process on the core made an answer take a second."""
    (worker,) = service.workers()
    nice = {}
    for task in Path(f"/proc/{worker}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # such as a thread that frees memory and ends
            nice[task.name] = int(task.joinpath("stat").read_text().rpartition(")")[2].split()[16])
    assert len(nice) > 1
    assert set(nice.values()) == {os.nice(0)}


def test_health_command_asks_the_service_itself(service):
    def ask(**variables):
        return subprocess.run([sys.executable, "-m", "app", "health"], cwd=ROOT, capture_output=True, text=True,
                              check=False, env={**os.environ, "PORT": str(service.port), "HOST": "0.0.0.0",
                                                "http_proxy": "http://127.0.0.1:9", **variables})
    healthy = ask()
    assert healthy.returncode == 0
    assert json.loads(healthy.stdout)["status"] == "healthy"
    nobody = ask(PORT=str(free_port()))
    assert (nobody.returncode, nobody.stdout[:10]) == (1, "no answer ")


def test_uploads_are_not_written_to_disk(service):
    worker = service.workers()[0]
    big = encoded(photo("astronaut").resize((1500, 1500)), "PNG")
    assert len(big) > 500_000
    seen = set()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", service.port)) as s:
            head = (f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                    f"Content-Length: {len(big) + 100}\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; "
                    "filename=\"a.png\"\r\n\r\n")
            s.sendall(head.encode() + big[:-1000])
            time.sleep(0.1)
            for fd in Path(f"/proc/{worker}/fd").iterdir():
                try:
                    seen.add(str(fd.readlink()))
                except OSError:
                    continue
    assert not [path for path in seen if path.startswith("/tmp") and "/pytest-" not in path], seen


# As logged, a path that would write a line of its own, colour the terminal, or turn the direction of what follows.
FORGED = {"/a%0A2026-01-01%20CRITICAL%20forged": r"/a\n2026-01-01 CRITICAL forged", "/b%0D%0Aforged": r"/b\r\nforged",
          "/c%1B%5B2Jforged": r"/c\x1b[2Jforged", "/d%E2%80%AEforged": r"/d\u202eforged",
          "/e%C2%85forged": r"/e\x85forged", "/f%FFforged": None}


def logged(service, count):
    """The log's lines about requests, once there are as many."""
    until = time.monotonic() + 30
    while len(lines := [line for line in service.log_path.read_bytes().split(b"\n") if b"orged" in line]) < count:
        assert time.monotonic() < until, lines
        time.sleep(0.01)
    return lines


def ask_for_forged_paths(service):
    for path in FORGED:
        answer = requests.get(service.url + path, headers={"X-Request-ID": "forged id=1"}, timeout=30)
        assert answer.status_code == 404
        assert answer.headers["X-Request-ID"] != "forged id=1"


def test_text_logs(start_service):
    service = start_service(LOG_FORMAT="text").wait_ready()
    service.predict(CAT)
    ask_for_forged_paths(service)
    lines = logged(service, len(FORGED))
    line = [x for x in service.log.splitlines() if "path=/predict" in x][0]
    assert " INFO " in line
    assert "status=200" in line
    assert re.search(r" client=127\.0\.0\.1 bytes_in=\d{5} bytes_out=\d{3} .* decode=[0-9.]+ms ", line)
    assert len(lines) == len(FORGED)
    for line, escaped in zip(lines, FORGED.values(), strict=True):
        assert line.decode().isprintable()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO +request method=GET path=/", line.decode())
        assert not escaped or f"path={escaped} status=404" in line.decode()


def test_json_logs_hold_one_object_a_line_whatever_the_path(service):
    ask_for_forged_paths(service)
    lines = [json.loads(line) for line in logged(service, len(FORGED))]
    assert [line["path"] for line in lines][:5] == [urllib.parse.unquote(path) for path in FORGED][:5]
    assert {line["logger"] for line in lines} == {"app.request"}


NOISY = """
import ctypes, sys, warnings
from app.tasks.own import OwnTask

class Noisy(OwnTask):
    takes, field, example = "text", "text", "a"

    def load(self):
        warnings.warn("two\\nlines")

    def predict(self, batch):
        for one in batch:
            if one == "native":
                ctypes.CDLL(None).perror(b"of a library\\r\\n\\xff{}")
            elif one == "print":
                print("a line", file=sys.stderr)
            elif one == "flood":
                print(3_000_000 * "x", file=sys.stderr)  # more than the pipe holds
            elif one == "crash":
                ctypes.string_at(0)
        return batch
"""


def test_json_logs_are_json_from_the_first_line_to_the_last(start_service, tmp_path):
    (tmp_path / "own_model.py").write_text(NOISY)
    service = start_service(MODEL_NAME="own_model:Noisy", PYTHONPATH=str(tmp_path), PYTHONFAULTHANDLER="1",
                            TRUSTED_PROXIES="1").wait_ready()

    def lines():
        return [json.loads(line) for line in service.log.splitlines()]

    def wait_for(text):
        until = time.monotonic() + 30
        while not [line for line in lines() if text in line["message"]]:
            assert time.monotonic() < until, service.log
            time.sleep(0.05)

    def ask(text):
        return requests.post(service.url + "/predict", json={"text": text}, timeout=30, headers={
            "X-Forwarded-For": "192.0.2.1, 192.0.2.7", "X-Request-ID": f"of-{text}"})
    answers = {text: ask(text) for text in ("native", "print", "flood")}
    assert {answer.status_code for answer in answers.values()} == {200}
    wait_for("xxxxxxxx")  # the pipe is empty again
    with pytest.raises(requests.ConnectionError):
        ask("crash")
    wait_for("SIGSEGV")
    assert service.wait_ready().predict(b"").status_code == 400
    done = subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert service.stop() == 0
    found = {(line["logger"], line["level"], line["message"]) for line in lines()}
    assert {("stderr", "WARNING", "a line"), ("stderr", "ERROR", "Fatal Python error: Segmentation fault"),
            ("gunicorn.error", "INFO", "Shutting down: Master")} <= found
    assert [text for _, _, text in found if text.startswith("\\xff{}: ")]  # after a carriage return
    assert [text for name, _, text in found if name == "py.warnings" and "two\nlines" in text]
    assert max(len(text) for name, _, text in found if name == "stderr") == 2000
    (line,) = [line for line in lines() if line.get("request_id") == "of-print"]
    assert (line["client"], line["bytes_in"]) == ("192.0.2.7", len('{"text": "print"}'))
    assert line["bytes_out"] == len(answers["print"].content)


def test_several_workers_answer(start_service):
    service = start_service(WORKERS="2").wait_ready()
    until = time.monotonic() + 30
    while len(service.workers()) < 2 or service.log.count("model ready") < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    for _ in range(6):
        assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282


def test_sigterm_ends_it_with_exit_code_0_and_leaves_nothing(start_service):
    def in_memory():
        return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("PostgreSQL.")}
    before = in_memory()
    service = start_service().wait_ready()
    assert service.process.pid in shared_memory.services()
    assert service.stop(signal.SIGTERM) == 0
    assert service.process.pid not in shared_memory.services()
    wait_until(lambda: in_memory() <= before, 30)  # other processes of the tests use it, too, for a moment
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", service.port)) != 0


@pytest.mark.parametrize(("variables", "message"), [
    ({"MODEL_NAME": "resnet50", "MODEL_PATH": "/nowhere/model.pt"}, "MODEL_PATH /nowhere/model.pt cannot be read"),
    ({"MODEL_NAME": "resnet50", "MODEL_PATH": "{corrupt}", "MODEL_FALLBACK": "efficientnet_lite0"},
     "cannot be read as a checkpoint"),  # more of what a model cannot be made of: tests/prepare/test_bundles.py
    ({"TOP_K": "20"}, "TOP_K must be an integer from 1 to 10, got '20'"),
    ({"DEVICE": "cuda"}, "DEVICE is cuda, but there is no NVIDIA GPU"),
    ({"PRECISION": "fp16"}, "PRECISION is fp16, which is for GPUs"),
])
def test_a_start_that_cannot_succeed_says_why_in_one_line(start_service, tmp_path, variables, message):
    (tmp_path / "corrupt.pt").write_bytes(b"PK\3\4" + bytes(1000))
    service = start_service(**{k: v.format(corrupt=tmp_path / "corrupt.pt") for k, v in variables.items()})
    assert service.process.wait(60) != 0
    lines = [line for line in service.log.splitlines() if message in line]
    assert len(lines) == 1, service.log
    assert all(json.loads(line)["level"] for line in service.log.splitlines())
    assert "Traceback" not in service.log
    assert "model ready" not in service.log


def note_url(model_dir, file):
    """Put into a MODEL_DIR what it keeps of a network's weights: or torchvision would be imported for their URL."""
    (model_dir / "weights").mkdir(parents=True)
    (model_dir / "weights" / f"{file.partition('-')[0]}.json").write_text(json.dumps({
        "url": f"/{file}", "source": "a test", "versions": installed_versions("torchvision")}))


def test_fallback_answers_loudly_where_the_weights_cannot_be_had(start_service, model_dir, tmp_path):
    note_url(tmp_path, "resnet50-11ad3fa6.pth")
    (tmp_path / "bundles").symlink_to(model_dir / "bundles")
    service = start_service(MODEL_NAME="resnet50", MODEL_FALLBACK="efficientnet_lite0", MODEL_DIR=str(tmp_path),
                            WEIGHTS_MIRROR="http://127.0.0.1:9").wait_ready()
    assert service.predict(CAT).json()["metadata"]["model"] == "efficientnet_lite0"
    fallback = requests.get(service.url + "/info").json()["model"]["fallback"]
    assert fallback["requested"] == "resnet50"
    assert "cannot be downloaded" in fallback["reason"]
    assert requests.get(service.url + "/health").json()["fallback_for"] == "resnet50"
    assert "WARNING" in service.log
    (serving,) = [line for line in service.log.splitlines() if '"url"' in line]
    assert json.loads(serving)["message"] == \
        "serving efficientnet_lite0 instead of resnet50 (its weights could not be downloaded)"
    subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT, check=True,
                   capture_output=True)
    assert requests.get(service.url + "/info").json()["model"]["fallback_for"] == "resnet50"
    assert requests.get(service.url + "/models").json()["models"][0]["fallback_for"] == "resnet50"


def test_a_damaged_export_is_made_again(start_service, model_dir, app, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    (weights,) = tmp_path.glob("bundles/*/model.bin")
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    service = start_service(MODEL_DIR=str(tmp_path)).wait_ready()
    assert "is damaged" in service.log
    messages = [json.loads(line)["message"] for line in service.log.splitlines()]  # one JSON object a line, all of it
    assert sum(message.startswith("preparing efficientnet_lite0: ") for message in messages) == 3
    assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282


def test_ipv6_addresses_can_be_listened_on(start_service):
    service = start_service(HOST="::1")
    service.url = f"http://[::1]:{service.port}"
    assert service.wait_ready().predict(encoded(photo("coffee"))).status_code == 200


def test_env_file_that_is_edited_takes_effect_at_the_next_start_only(tmp_path):
    (tmp_path / ".env").write_text("TOP_K=3")
    code = f"""
import pathlib, runpy
runpy.run_path({str(ROOT / "gunicorn.conf.py")!r})
pathlib.Path(".env").write_text("TOP_K=4\\nTTA=false")
from app.config import Settings
settings = Settings.load()
print(settings.top_k, settings.tta, Settings.load().port)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DEVICE": "cpu"})
    assert done.stdout == "3 True 5000\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_weights_come_ends_it_and_the_download(number, start_service, tmp_path):
    note_url(tmp_path / "models", "resnet18-f37072fd.pth")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        service = start_service(MODEL_NAME="resnet18", MODEL_DIR=str(tmp_path / "models"),
                                WEIGHTS_MIRROR=f"http://127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = silent.accept()  # the download has begun, and gets nothing
        with connection:
            (preparing,) = service.workers()
            assert os.getpriority(os.PRIO_PROCESS, preparing) == os.nice(0)  # nobody is served yet
            service.process.send_signal(number)
            assert service.process.wait(30) != 0
            assert not is_running(preparing)
    assert "stopped before the model was ready" in service.log
    assert "Traceback" not in service.log


def test_no_answer_may_be_taken_for_another_type(service):
    answers = [requests.request(method, service.url + path, timeout=30, headers={"Accept": accept})
               for accept in ("*/*", "text/html")
               for method, path in (("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health"),
                                    ("GET", "/info"), ("GET", "/metrics"), ("GET", "/docs"),
                                    ("GET", "/docs/swagger-ui.css"),
                                    ("GET", "/openapi.json"), ("GET", "/static/page.js"), ("GET", "/static/cat.jpg"),
                                    ("OPTIONS", "/predict"), ("GET", "/predict"), ("GET", "/nowhere"),
                                    ("GET", "/static/../../config.py"), ("POST", "/predict"))]
    answers += [service.predict(CAT), service.predict(b"no picture"), service.predict(bytes(60_000_000))]
    assert {answer.status_code for answer in answers} == {200, 400, 404, 405, 413}
    assert [answer.url for answer in answers if answer.headers.get("X-Content-Type-Options") != "nosniff"] == []
