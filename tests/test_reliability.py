"""Bad weather: overload, deadlines, hung inferences, killed processes, slow and vanishing clients, reloads, stops."""
import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from conftest import ROOT, encoded, free_port, need
from hanging_model import copy_model_dir, replace_model
from PIL import Image
from traffic import CAT, Load, descriptors, health_status, open_request, wait_until

from app.worker import HEADERS_WITHIN_S

WHITE = encoded(Image.new("RGB", (300, 300), "white"))


def test_overload_is_refused_at_once_and_health_answers(start_service):
    service = start_service(MAX_QUEUE="2").wait_ready()
    with Load(service.url, 16) as load:
        health = []
        for _ in range(20):
            started = time.monotonic()
            health.append((requests.get(service.url + "/health", timeout=10).status_code, time.monotonic() - started))
            time.sleep(0.05)
    assert {status for status, _ in health} == {200}
    assert set(load.answers) == {(200, "tiger cat"), (503, "OVERLOADED")}
    assert not load.errors
    assert load.retry_after
    assert all(1 <= s <= 60 for s in load.retry_after)
    assert service.predict(CAT).status_code == 200


def test_clients_deadline_is_kept_and_checked(start_service):
    service = start_service().wait_ready()

    def post(timeout):
        return requests.post(service.url + "/predict", files={"file": CAT}, headers={"X-Request-Timeout": timeout})
    answer = post("0.0001")
    assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    for text in ("0", "-1", "abc", "nan", "inf"):
        assert (post(text).status_code, post(text).json()["error"]) == (400, "INVALID_PARAMETER")
    assert post("20").status_code == 200


def test_hung_inference_costs_one_client_its_deadline_and_the_slot_comes_back(start_service, model_dir, app, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    replace_model(tmp_path)
    service = start_service(MODEL_DIR=str(tmp_path), REQUEST_TIMEOUT="1.5").wait_ready()
    (worker,) = service.workers()
    started = time.monotonic()
    answer = service.predict(WHITE)
    assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    assert time.monotonic() - started < 3
    for _ in range(5):  # the other slot goes on
        assert service.predict(CAT).status_code == 200
    wait_until(lambda: service.workers() and service.workers() != [worker], 30, "the worker that hangs is not replaced")
    service.wait_ready()
    assert "an inference has been hanging" in service.log
    for _ in range(5):
        assert service.predict(CAT).status_code == 200


def test_killed_worker_is_replaced(start_service):
    service = start_service(WORKERS="2").wait_ready()
    wait_until(lambda: service.log.count("model ready") == 2, 30)
    first = service.workers()
    with Load(service.url, 4) as load:
        time.sleep(0.5)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: service.log.count("model ready") == 3, 10)
        time.sleep(0.5)
    assert len(load.errors) <= 4  # at most what the killed worker had open
    assert set(load.answers) == {(200, "tiger cat")}
    assert first[1] in service.workers()


def test_killed_master_takes_its_workers_along_and_can_be_started_again(start_service):
    service = start_service(WORKERS="2").wait_ready()
    workers = service.workers()
    (folder,) = Path("/dev/shm").glob(f"model-server-{service.process.pid}-*")
    service.process.kill()
    service.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5)
    again = start_service(PORT=str(service.port))
    again.port, again.url = service.port, service.url
    assert again.wait_ready().predict(CAT).status_code == 200
    assert not folder.exists()


def test_new_weights_are_reloaded_without_a_gap(start_service, checkpoint, tmp_path):
    path = tmp_path / "model.pt"
    shutil.copy(checkpoint("resnet18", seed=1), path)
    service = start_service(MODEL_NAME="resnet18", MODEL_PATH=str(path), WORKERS="2").wait_ready()
    wait_until(lambda: service.log.count("model ready") == 2, 30)
    workers, before = service.workers(), requests.get(service.url + "/info").json()["model"]["weights"]["sha256"]
    with Load(service.url, 2) as load:
        time.sleep(0.3)
        shutil.copy(checkpoint("resnet18", seed=2), tmp_path / "new.pt")
        os.replace(tmp_path / "new.pt", path)
        done = subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                              capture_output=True, text=True, timeout=120, check=False)
        time.sleep(0.3)
    assert done.returncode == 0, done.stderr
    assert "reloaded: 2 workers" in done.stdout
    wait_until(lambda: len(service.workers()) == 2, 10)
    assert not set(workers) & set(service.workers())
    assert requests.get(service.url + "/info").json()["model"]["weights"]["sha256"] != before
    assert not load.errors
    assert {status for status, _ in load.answers} == {200}


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_reload_of_a_bad_model_changes_nothing(start_service, checkpoint, tmp_path, damage):
    path = tmp_path / "model.pt"
    shutil.copy(checkpoint("resnet18", seed=1), path)
    service = start_service(MODEL_NAME="resnet18", MODEL_PATH=str(path)).wait_ready()
    workers = service.workers()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(checkpoint("resnet18", seed=2).read_bytes()[:10**6] if damage == "cut" else b"no weights")
    done = subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the old model goes on serving" in done.stderr
    assert "reload failed" in service.log
    wait_until(lambda: service.workers() == workers, 10)  # and nothing is left of the check's own process
    assert service.predict(CAT).status_code == 200
    os.kill(workers[0], signal.SIGKILL)  # a worker that is replaced now gets the old model too
    wait_until(lambda: service.log.count("model ready") == 2, 30)
    assert service.wait_ready().predict(CAT).status_code == 200


def test_a_reload_that_is_killed_is_told(start_service, tmp_path):
    service = start_service().wait_ready()
    workers = service.workers()
    (folder,) = Path("/dev/shm").glob(f"model-server-{service.process.pid}-*")
    command = subprocess.Popen([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (folder / "reloading.json").exists(), 10)
    os.kill(int((folder / "reloading.json").read_text()), signal.SIGKILL)
    assert "ended before it was through" in command.communicate(timeout=30)[1]
    assert command.returncode == 1
    assert service.workers() == workers
    assert service.predict(CAT).status_code == 200


def test_worker_that_cannot_load_does_not_take_the_others_along(start_service, model_dir, app, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    service = start_service(MODEL_DIR=str(tmp_path), WORKERS="2").wait_ready()
    wait_until(lambda: service.log.count("model ready") == 2, 30)
    killed, other = service.workers()
    shutil.rmtree(tmp_path / "bundles")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: "this worker cannot serve" in service.log, 15)
    time.sleep(3)
    assert service.process.poll() is None
    assert other in service.workers()
    for _ in range(3):
        assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282


def test_given_up_reload_ends_the_worker_without_a_model_not_the_one_that_serves(start_service, model_dir, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    service = start_service(MODEL_DIR=str(tmp_path)).wait_ready()
    (serving,) = service.workers()
    (folder,) = Path("/dev/shm").glob(f"model-server-{service.process.pid}-*")
    shutil.rmtree(tmp_path / "bundles")
    service.process.send_signal(signal.SIGTTIN)
    wait_until(lambda: "this worker cannot serve" in service.log, 15)
    (folder / "given-up").touch()
    service.process.send_signal(signal.SIGTTOU)
    wait_until(lambda: service.workers() == [serving], 15)
    time.sleep(1)
    assert service.workers() == [serving]
    assert service.predict(CAT).status_code == 200


def test_sigterm_drains_and_finishes_what_is_in_flight(start_service):
    service = start_service(DRAIN_SECONDS="1.5").wait_ready()
    with Load(service.url, 4) as load:
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: requests.get(service.url + "/health").status_code == 503, 1)
        assert requests.get(service.url + "/health").json()["reason"] == "draining"
        while service.process.poll() is None and service.predict(CAT).status_code == 200:
            load.stopping = time.monotonic() or True  # the load balancer has turned away
            time.sleep(0.1)
            if "Handling signal: term" in service.log.split("draining", 1)[-1]:
                break
    assert service.process.wait(20) == 0
    assert set(load.answers) == {(200, "tiger cat")}
    assert not load.errors


def test_health_is_never_200_before_the_model_answers(start_service):
    service = start_service()
    seen = set()
    wait_until(lambda: seen.add(health_status(service.url)) or 200 in seen, 30)
    assert seen <= {None, 503, 200}
    assert service.predict(CAT).status_code == 200


def test_slow_bodies_lose_their_threads_at_the_deadline(start_service):
    service = start_service(REQUEST_TIMEOUT="2", THREADS="24").wait_ready()
    dripping = [open_request(service.port) for _ in range(30)]
    with contextlib.suppress(OSError):
        for _ in range(30):
            for s in dripping:
                s.sendall(b"x")
            time.sleep(0.1)
    assert requests.get(service.url + "/health", timeout=3).status_code == 200
    wait_until(lambda: service.predict(CAT).status_code == 200, 10)
    answer = dripping[0].recv(4096)
    assert answer.split(b" ")[1] == b"504"
    assert b"DEADLINE_EXCEEDED" in answer
    for s in dripping:
        s.close()


def test_slow_headers_are_cut_off_together_even_where_they_outnumber_the_threads(start_service):
    """Until then predictions are refused, well-formed, and the probes are answered."""
    service = start_service(THREADS="18").wait_ready()
    started, refused = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        dripping = [stack.enter_context(open_request(service.port, b"GET / HTTP/1.1\r\nX: ")) for _ in range(60)]
        time.sleep(0.5)
        while time.monotonic() < started + 3 * HEADERS_WITHIN_S:
            for s in dripping:
                with contextlib.suppress(OSError):
                    s.sendall(b"x")
            assert requests.get(service.url + "/health", timeout=2).status_code == 200
            answer = service.predict(CAT)
            if answer.status_code == 200:
                break
            refused += 1
            assert (answer.status_code, answer.json()["error"]) == (503, "OVERLOADED")
            assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
            assert int(answer.headers["Retry-After"]) > 0
            time.sleep(0.1)
    assert time.monotonic() - started < HEADERS_WITHIN_S + 4
    assert refused
    metrics = requests.get(service.url + "/metrics").text
    assert re.search(r"overloaded_total(?:{[^}]*})? ([0-9]+)", metrics)[1] == str(refused)
    assert service.log.count('"error": "OVERLOADED"') == refused


def test_connections_that_say_nothing_hold_no_thread(start_service):
    service = start_service(THREADS="18").wait_ready()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(60)]
        assert service.predict(CAT, timeout_s=2).status_code == 200
        for s in silent:
            s.settimeout(HEADERS_WITHIN_S + 4)
            assert s.recv(1) == b""  # closed, not left for ever


def test_predictions_go_on_beside_a_thousand_connections(start_service):
    """Their descriptors have numbers that select() does not take."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 3000:
        pytest.skip("this user may not have 3000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, limit[1]))
    try:
        service = start_service(THREADS="300").wait_ready()
        with contextlib.ExitStack() as stack:
            for _ in range(1050):
                stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            assert service.predict(CAT).status_code == 200
            assert descriptors(service.workers()[0]) > 1050
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("size", [20_000, 400_000])
def test_refusal_of_an_unread_body_ends_the_connection_and_says_so(start_service, size):
    service = start_service(MAX_FILE_SIZE="10KiB", MAX_QUEUE="0").wait_ready()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)) as connection:
        for path, type in (("/nothing", "image/png"), ("/predict", "text/plain")):
            connection.request("POST", path, bytes(size), {"Content-Type": type})
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Connection")) == (404 if path == "/nothing" else 415, "close")
            assert json.loads(answer.read())["status"] == "error"
        connection.request("POST", "/predict", b"no picture", {"Content-Type": "image/png"})  # read whole
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Connection")) == (400, "keep-alive")


def test_refused_clients_that_stay_do_not_stop_the_worker(start_service):
    service = start_service().wait_ready()
    with contextlib.ExitStack() as stack:
        staying = [stack.enter_context(open_request(service.port, length=10**9)) for _ in range(10)]
        until, slowest = time.monotonic() + 8, 0
        while time.monotonic() < until:
            started = time.monotonic()
            assert health_status(service.url) == 200
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.1)
        assert slowest < 1.5
        for s in staying:
            assert s.recv(100).split(b" ")[1] == b"413"


def test_clients_that_leave_cost_nothing_lasting(start_service):
    service = start_service().wait_ready()
    service.predict(CAT)
    (worker,) = service.workers()
    before = descriptors(worker)
    for i in range(100):
        if i % 2:
            open_request(service.port).close()
        else:
            body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + CAT + b"\r\n--b--\r\n"
            s = open_request(service.port, length=len(body))
            s.sendall(body[5:])
            s.close()  # before the answer
    wait_until(lambda: descriptors(worker) <= before + 2, 20)
    assert service.predict(CAT).status_code == 200
    assert "Traceback" not in service.log


def test_those_who_left_the_queue_are_not_inferred(start_service):
    service = start_service(MAX_QUEUE="200").wait_ready()
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + CAT + b"\r\n--b--\r\n"
    for _ in range(60):
        s = open_request(service.port, length=len(body))
        s.sendall(body[5:])
        s.close()
    wait_until(lambda: service.log.count('"path": "/predict"') == 60, 30)
    statuses = [json.loads(line).get("status") for line in service.log.splitlines() if '"path": "/predict"' in line]
    assert statuses.count(499) > 40


def test_out_of_memory_is_a_503_and_passes(start_service):
    service = start_service().wait_ready()
    big = encoded(Image.new("RGB", (7000, 7000), "red"), "PNG")
    assert service.predict(CAT).status_code == 200
    (worker,) = service.workers()
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
    resource.prlimit(worker, resource.RLIMIT_AS, (pages * resource.getpagesize() + 60 * 2**20, resource.RLIM_INFINITY))
    answer = service.predict(big)
    assert (answer.status_code, answer.json()["error"]) == (503, "OUT_OF_MEMORY")
    assert int(answer.headers["Retry-After"]) >= 1
    assert service.predict(CAT).status_code == 200
    resource.prlimit(worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert service.predict(big).status_code == 200
    assert service.workers() == [worker]


@pytest.mark.parametrize("raw", [b"NONSENSE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                                 b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
                                 b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n"])
def test_gunicorns_own_errors_have_the_one_shape(service, raw):
    with socket.create_connection(("127.0.0.1", service.port)) as s:
        s.sendall(raw)
        s.settimeout(10)
        answer = b""
        while piece := s.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert 400 <= int(head.split(b" ")[1]) < 500
    assert sorted(json.loads(body)) == ["error", "message", "request_id", "status"]


def test_load_balancer_loses_nothing_while_one_instance_is_restarted(start_service, tmp_path):
    haproxy = need("haproxy")
    one, two = start_service(DRAIN_SECONDS="3").wait_ready(), start_service(DRAIN_SECONDS="3").wait_ready()
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(f"""
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
frontend in
    bind 127.0.0.1:{port}
    default_backend model
backend model
    balance roundrobin
    option httpchk GET /health
    http-check expect status 200
    default-server check inter 300ms fall 2 rise 2
    server one 127.0.0.1:{one.port}
    server two 127.0.0.1:{two.port}
""")
    proxy = subprocess.Popen([haproxy, "-f", str(tmp_path / "haproxy.cfg"), "-db"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: health_status(url) == 200, 10)
        with Load(url, 4) as load:
            time.sleep(1)
            assert one.stop() == 0
            time.sleep(0.5)
            again = start_service(PORT=str(one.port), DRAIN_SECONDS="0")
            again.port, again.url = one.port, one.url
            again.wait_ready()
            time.sleep(1.5)
        assert again.log.count('"path": "/predict"') > 0
    finally:
        proxy.kill()
        proxy.wait()
    assert not load.errors
    assert set(load.answers) == {(200, "tiger cat")}


@pytest.fixture
def nginx(tmp_path):
    """nginx(service): the URL of a real nginx with deploy/nginx.conf before that service."""
    program, processes = need("nginx"), []

    def start(service):
        port = free_port()
        site = (ROOT / "deploy/nginx.conf").read_text()
        for default, here in (("listen 8080", f"listen 127.0.0.1:{port}"), (":5000", f":{service.port}")):
            site = site.replace(default, here)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log; events {{}}\n"
            f"http {{ access_log off; client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;\n"
            f"fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;\n{site}}}\n")
        processes.append(subprocess.Popen([program, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]))
        wait_until(lambda: health_status(f"http://127.0.0.1:{port}") == 200, 10)
        return f"http://127.0.0.1:{port}"
    yield start
    for process in processes:
        process.terminate()
        process.wait(10)


def test_slow_clients_wait_in_the_documented_proxy(service, nginx):
    url = nginx(service)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))))
            client.sendall(head + CAT[:5000])
        for _ in range(5):
            answer = requests.post(url + "/predict", files={"file": CAT}, timeout=10)
            assert answer.json()["predictions"][0]["class"] == "tiger cat"
        in_progress = re.search(r"^model_server_requests_in_progress (\S+)$",
                                requests.get(service.url + "/metrics", timeout=10).text, re.M)
        assert in_progress[1] == "1.0"  # this scrape


def test_refusals_pass_through_the_documented_proxy(start_service, nginx):
    url = nginx(start_service(MAX_QUEUE="0").wait_ready())
    with Load(url, 8) as load:
        time.sleep(1)
    assert set(load.answers) == {(200, "tiger cat"), (503, "OVERLOADED")}
    assert load.retry_after
    assert not load.errors
