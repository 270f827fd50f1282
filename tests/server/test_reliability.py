"""Bad weather: overload, deadlines, hung inferences, killed processes, slow and vanishing clients, stops."""
import contextlib
import fcntl
import http.client
import inspect
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gevent.socket
import pytest
import requests
from conftest import ROOT, Service, encoded, free_port, need
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader
from gunicorn.workers.ggevent import GeventWorker
from hanging_model import copy_model_dir, replace_model
from mutations import mutated, pictures
from PIL import Image
from servers import is_running
from traffic import CAT, Load, descriptors, health_status, open_request, wait_until, workers_ready
from werkzeug.middleware.proxy_fix import ProxyFix

from app.engine.bundle import Prepared
from app.server import board, counters, machine, refusals, worker
from app.server.worker import GUNICORN, HEADERS_WITHIN_S, Fair, Worker

# A model of one's own that starts in half the time, for tests in which it does not matter what is inferred.
LIGHT = {"MODEL_NAME": "tests.own_tasks:Long"}
WHITE = encoded(Image.new("RGB", (300, 300), "white"))


def is_answered(service):
    """Whether a service with LIGHT answers a prediction."""
    answer = requests.post(service.url + "/predict", json={"text": "a"}, timeout=30)
    return (answer.status_code, answer.json()["predictions"][:9]) == (200, "a" * 9)


def refusal_by_worker(url):
    """The answer to a POST that the worker itself refuses, as the queue is full; the application's have a Date."""
    for _ in range(500):
        answer = requests.post(url, json={}, timeout=10)
        if answer.status_code == 503 and "Date" not in answer.headers:
            return answer
    raise AssertionError(f"{url} was never refused by the worker")


def test_overload_is_refused_at_once_and_health_answers(start_service):
    service = start_service(MAX_QUEUE="2").wait_ready()
    with Load(service.url, 16) as load:
        health = []
        for _ in range(15):
            started = time.monotonic()
            health.append((requests.get(service.url + "/health", timeout=10).status_code, time.monotonic() - started))
            time.sleep(0.05)
        refused = {path: refusal_by_worker(service.url + path) for path in (
            "/embed", "/v2/models/efficientnet_lite0/infer", "/v2/models/efficientnet_lite0/versions/1/infer")}
    of_embed, *of_v2 = [answer.json() for answer in refused.values()]
    assert (of_embed["status"], of_embed["error"]) == ("error", "OVERLOADED")
    assert of_v2 == [{"error": "The service is at its limit; try again later."}] * 2
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused.values())
    metrics = requests.get(service.url + "/metrics", timeout=10).text
    for rule in ("/embed", "/v2/models/<name>/infer", "/v2/models/<name>/versions/<version>/infer"):
        assert re.search(rf'^model_server_requests_total{{endpoint="{rule}",[^}}]*503', metrics, re.M), rule
    assert {status for status, _ in health} == {200}
    assert set(load.answers) == {(200, "tiger cat"), (503, "OVERLOADED")}
    assert not load.errors
    assert load.retry_after
    assert all(1 <= s <= 60 for s in load.retry_after)
    assert service.predict(CAT).status_code == 200


@pytest.fixture(scope="module")
def silent(service):
    """Clients of `service` that connect and say nothing, or send their headers slowly: opened early, as it takes a
    while until they are to be cut off."""
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(dripping(service.port, 3, b"GET / HTTP/1.1\r\nX: "))
        yield slow + [stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(60)]


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory, app, model_dir):
    """(a ready Service with a certificate, a Session that trusts it, a client of it that never begins a handshake)."""
    need("openssl")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(folder / "key.pem"),
                    "-out", str(folder / "cert.pem")], check=True, capture_output=True)
    service = Service(folder, {"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir), "DEVICE": "cpu",
                               "GUNICORN_CMD_ARGS": f"--certfile {folder}/cert.pem --keyfile {folder}/key.pem"})
    service.url = service.url.replace("http:", "https:")
    with requests.Session() as session:
        session.trust_env = False  # its certificates would win
        session.verify = str(folder / "cert.pem")
        wait_until(lambda: "serving" in service.log, 60)
        with socket.create_connection(("127.0.0.1", service.port)) as waiting:
            yield service, session, waiting
    service.kill()


def test_clients_deadline_is_kept_and_checked(service, silent):
    def post(timeout):
        return requests.post(service.url + "/predict", files={"file": CAT}, headers={"X-Request-Timeout": timeout})
    answer = post("0.0001")
    assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    for text in ("0", "-1", "abc", "nan", "inf"):
        assert (post(text).status_code, post(text).json()["error"]) == (400, "INVALID_PARAMETER")
    assert post("20").status_code == 200


def test_tls_serves_many_requests_on_a_kept_connection(over_tls):
    service, session, _ = over_tls
    (worker,) = service.workers()
    for _ in range(20):
        answer = session.post(service.url + "/predict", files={"file": CAT}, timeout=30)
        assert answer.json()["predictions"][0]["class"] == "tiger cat"
    assert f'"url": "{service.url}"' in service.log
    assert service.workers() == [worker]


def test_hung_inference_costs_one_client_its_deadline_and_the_slot_comes_back(start_service, model_dir, app, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    replace_model(tmp_path)
    service = start_service("tests.hanging_model:create_impatient()", MODEL_DIR=str(tmp_path),
                            REQUEST_TIMEOUT="1.5").wait_ready()
    (worker,) = service.workers()
    answer = service.predict(WHITE)
    assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    for _ in range(5):  # the other slot goes on
        assert service.predict(CAT).status_code == 200
    wait_until(lambda: service.workers() and service.workers() != [worker], 60, "the worker that hangs is not replaced")
    service.wait_ready()
    assert "an inference has been hanging" in service.log
    for _ in range(5):
        assert service.predict(CAT).status_code == 200


def test_killed_worker_is_replaced(start_service):
    service = start_service(WORKERS="2").wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    first = service.workers()
    with Load(service.url, 4, pause_s=0.05) as load:
        time.sleep(0.5)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: service.log.count("model ready") == 3, 60)
        time.sleep(0.5)
    assert len(load.errors) <= 4  # at most what the killed worker had open
    assert set(load.answers) == {(200, "tiger cat")}
    assert first[1] in service.workers()


def test_killed_master_takes_its_workers_along_and_can_be_started_again(start_service):
    service = start_service(WORKERS="2", **LIGHT).wait_ready()
    workers = service.workers()
    service.process.kill()
    service.process.wait()
    wait_until(lambda: not any(map(is_running, workers)), 30)
    again = start_service(PORT=str(service.port), **LIGHT)
    again.port, again.url = service.port, service.url
    assert is_answered(again.wait_ready())


def test_everything_in_dev_shm_removed_costs_nothing(start_service):
    """Of all services that this test's user runs: files are unlinked, and those that hold them go on."""
    service = start_service(WORKERS="2", DRAIN_SECONDS="0.5", **LIGHT).wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    for pid in (service.process.pid, *service.workers()):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target.startswith(("/dev/shm/", "/tmp/")) and "/pytest-" not in target:
                    os.unlink(target)
    assert is_answered(service)
    os.kill(service.workers()[0], signal.SIGKILL)
    wait_until(lambda: service.log.count("model ready") == 3, 30, "a crashed worker is not replaced")
    assert is_answered(service)
    assert service.stop() == 0


def test_worker_that_cannot_load_does_not_take_the_others_along(start_service, model_dir, app, tmp_path):
    copy_model_dir(model_dir, tmp_path)
    service = start_service("tests.hanging_model:create_without_reserve()", MODEL_DIR=str(tmp_path),
                            WORKERS="2").wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    killed, other = service.workers()
    shutil.rmtree(tmp_path / "bundles")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: service.log.count("this worker cannot serve") > 1, 60)  # Gunicorn's master would end
    assert service.process.poll() is None
    assert other in service.workers()
    for _ in range(3):
        assert service.predict(CAT).json()["predictions"][0]["class_id"] == 282


def test_sigterm_drains_and_finishes_what_is_in_flight(start_service):
    service = start_service(DRAIN_SECONDS="8", FINISH_SECONDS="30").wait_ready()
    with Load(service.url, 4, pause_s=0.02) as load:
        wait_until(lambda: load.answers, 30)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: requests.get(service.url + "/health").status_code == 503, 8)
        assert requests.get(service.url + "/health").json()["reason"] == "draining"
        before = len(load.answers)
        wait_until(lambda: len(load.answers) > before + 4, 8)  # and then the load balancer turns away
    assert service.process.wait(60) == 0
    assert set(load.answers) == {(200, "tiger cat")}
    assert not load.errors


def test_health_is_never_200_before_the_model_answers(start_service):
    service = start_service()
    seen = set()
    wait_until(lambda: seen.add(health_status(service.url)) or 200 in seen, 30)
    assert seen <= {None, 503, 200}
    assert service.predict(CAT).status_code == 200


@contextlib.contextmanager
def dripping(port, count, head=b""):
    """Clients that send a byte every 100 ms, of their headers or, without `head`, of a body."""
    stopping = threading.Event()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(open_request(port, head)) for _ in range(count)]

        def drip():
            while not stopping.wait(0.1):
                for s in slow:
                    with contextlib.suppress(OSError):
                        s.send(b"x", socket.MSG_DONTWAIT)
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        yield slow
        stopping.set()
        thread.join()


@pytest.mark.parametrize("head", [b"", b"POST /predict HTTP/1.1\r\nX: ",
                                  b"GET /health HTTP/1.1\r\nContent-Length: 100000\r\n\r\n"],
                         ids=["bodies", "headers", "probes with bodies"])
def test_slow_clients_starve_nobody(service, head):
    with dripping(service.port, 100, head):
        time.sleep(0.3)
        for _ in range(10):
            assert requests.get(service.url + "/health", timeout=10).status_code == 200
            assert service.predict(CAT, timeout_s=10).json()["predictions"][0]["class"] == "tiger cat"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory, model_dir, app):
    """A ready Service that gives a request two seconds, for the tests that leave it as it is."""
    running = Service(tmp_path_factory.mktemp("impatient"), {"MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu",
                                                             "MODEL_DIR": str(model_dir), "REQUEST_TIMEOUT": "2"})
    yield running.wait_ready()
    running.kill()


def test_slow_bodies_are_told_at_the_deadline(impatient):
    with dripping(impatient.port, 3) as slow:
        for s in slow:
            s.settimeout(20)
            answer = b""
            while piece := s.recv(4096):
                answer += piece
            assert answer.split(b" ")[1] == b"504"
            assert b"DEADLINE_EXCEEDED" in answer
            assert b"during read" in answer


def test_a_client_that_never_reads_is_cut_off_and_costs_the_others_nothing(impatient):
    service = impatient
    (worker,) = service.workers()
    before = descriptors(worker)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            s = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            s.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                s.send(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        for _ in range(10):
            assert service.predict(CAT, timeout_s=10).status_code == 200
        wait_until(lambda: cut_off(service) == 60, 2 + 30, "they were not cut off")
        wait_until(lambda: descriptors(worker) <= before + 2, 30)


def cut_off(service):
    text = requests.get(service.url + "/metrics").text
    return float(re.search(r"^model_server_connections_cut_off_total (\S+)", text, re.M)[1])


def test_predictions_go_on_beside_a_thousand_connections(service):
    """Their descriptors have numbers that select() does not take."""
    (worker,) = service.workers()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 3000:
        pytest.skip("this user may not have 3000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, limit[1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1050):
                stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            started = time.monotonic()
            assert requests.get(service.url + "/health", timeout=20).status_code == 200
            assert service.predict(CAT).status_code == 200
            assert time.monotonic() - started < 20
            assert descriptors(worker) > 1050
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("data", [(b"", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n" * 200),
                                  (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
                                   b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 3000)],
                         ids=["pipelined requests", "tiny chunks"])
def test_a_client_that_always_has_more_keeps_nobody_from_the_loop(service, data):
    """Reads of gevent's that succeed do not switch greenlets."""
    code = "from greedy_client import attack; attack(%d, %r, %r)"  # faster than a thread of this process
    process = subprocess.Popen([sys.executable, "-c", code % (service.port, *data)], cwd=ROOT / "tests",
                               stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begun\n"
        time.sleep(0.5)
        for _ in range(8):
            assert requests.get(service.url + "/health", timeout=10).status_code == 200
    finally:
        process.kill()
        process.communicate()


def test_a_refusal_on_a_kept_connection_has_an_id_of_its_own(start_service):
    service = start_service(MAX_QUEUE="0", CORS_ORIGINS="https://example.org").wait_ready()
    with Load(service.url, 8), requests.Session() as session:
        for i in range(200):
            session.get(service.url + "/live", headers={"X-Request-ID": "before"})
            answer = session.post(service.url + "/predict", files={"file": CAT}, headers={"X-Request-ID": f"own-{i}"})
            assert answer.headers["X-Request-ID"] == f"own-{i}"
            if answer.status_code == 503:
                break
        assert answer.status_code == 503
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for _ in range(200):  # what a browser needs to read it
            answer = requests.post(service.url + "/predict", files={"file": CAT},
                                   headers={"Origin": "https://example.org"})
            assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
            if answer.status_code == 503:
                break
    lines = [json.loads(line) for line in service.log.splitlines() if f'"own-{i}"' in line]
    assert [line["status"] for line in lines] == [503]


@pytest.mark.parametrize("proxies", [0, 1, 2, 3])
@pytest.mark.parametrize("addresses", [[], [b"192.0.2.1"], [b"192.0.2.1, 192.0.2.2"], [b"192.0.2.1", b"192.0.2.2"],
                                       [b"192.0.2.1,192.0.2.2", b"192.0.2.3"]])
def test_the_client_of_a_refusal_is_the_applications(addresses, proxies):
    lines = b"".join(b"X-Forwarded-For: %b\r\n" % one for one in addresses)
    req = Request(Config(), IterUnreader([b"POST /predict HTTP/1.1\r\nHost: x\r\n%b\r\n" % lines]), ("192.0.2.9", 5))
    environ = wsgi.create(req, None, req.peer_addr, ("127.0.0.1", "5000"), Config())[1]
    ProxyFix(lambda environ, start: [], x_for=proxies)(environ, None)
    assert refusals.client_of(req, proxies) == environ["REMOTE_ADDR"]


def test_max_requests_do_not_wait_for_idle_connections(start_service):
    service = start_service(GUNICORN_CMD_ARGS="--max-requests 5", **LIGHT).wait_ready()
    before = service.workers()
    with requests.Session() as session:
        session.get(service.url + "/live")  # and the connection stays
        for _ in range(6):
            assert health_status(service.url) == 200
        wait_until(lambda: set(before).isdisjoint(service.workers()), 25, "the worker is not replaced")
        wait_until(lambda: health_status(service.url) == 200, 30)
    assert "Traceback" not in service.log


def test_the_board_survives_long_messages_and_a_writer_that_was_killed(own_board):
    own_board.publish([Prepared(Path("/a"), "é" * 5000)])
    for i in range(40):
        own_board.add_outcome(i, False, "😀" * 5000)  # 4 kB each
    assert own_board.read()["reloads"][-1]["covers"] == 39
    assert len(own_board.published()["models"][0]["fallback_reason"]) == 1000
    own_board.integers[board.SEQUENCE_AT] += 1  # in the middle of writing
    assert own_board.published()["models"][0]["folder"] == "/a"


def test_each_process_counts_in_a_region_of_its_own(own_board):
    assert [len(region.bytes) for region in counters.regions] == [counters.REGION_BYTES] * 2
    assert counters.regions[0].owner == os.getpid()
    assert counters.regions[1].owner == 0


def test_a_reader_of_the_log_that_stops_costs_lines_not_answers(model_dir, app):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "gunicorn", "app:create_app()"], cwd=ROOT, stderr=write, env={
        **os.environ, "MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir), "DEVICE": "cpu",
        "HOST": "127.0.0.1", "PORT": str(port), "DRAIN_SECONDS": "0"})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: health_status(url) == 200, 60)
        with requests.Session() as session:
            for _ in range(400):  # more than the pipe and what is kept
                session.get(url + "/" + "x" * 3000, timeout=20)
            tiff, order = pictures()["TIFF bits"], random.Random(0)
            for _ in range(40):  # about which libtiff and Pillow complain on standard error by themselves
                answer = session.post(url + "/predict", files={"file": mutated(tiff, order)}, timeout=20)
                assert answer.status_code in (200, 400, 413)
            metrics = session.get(url + "/metrics", timeout=20).text
        assert float(re.search(r"log_lines_dropped_total ([0-9.]+)$", metrics, re.M)[1]) > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


def asked(s, request):
    """Send a request on a connection; returns its answer's (status, Connection, body)."""
    s.sendall(request)
    answer = http.client.HTTPResponse(s)
    answer.begin()
    return answer.status, answer.headers["Connection"], answer.read()


def test_a_stop_answers_every_request_says_close_and_resets_nothing(start_service):
    """The uploads that drip would take REQUEST_TIMEOUT, which is 30 s."""
    service = start_service(DRAIN_SECONDS="4", FINISH_SECONDS="2", **LIGHT).wait_ready()
    ask, body = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n", json.dumps({"text": "a"}).encode()
    post = b"POST /predict%b HTTP/%b\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answers, failed = [], []

    def use(s):
        """Ask until an answer says that it is the last one."""
        try:
            while True:
                answers.append(asked(s, post % (b"", b"1.1", len(body)) + body)[:2])
                if answers[-1][1] == "close":
                    assert s.recv(1) == b""  # and no reset
                    return
        except (OSError, http.client.HTTPException, AssertionError) as e:
            failed.append(e)
    with contextlib.ExitStack() as stack:
        used, idle, late = [[stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 60))
                             for _ in range(count)] for count in (6, 3, 5)]
        threads = [threading.Thread(target=use, args=(s,)) for s in used]
        for s in (*idle, *late):
            assert asked(s, ask)[:2] == (200, "keep-alive")
        dripped = stack.enter_context(dripping(service.port, 3))
        late[0].sendall(post % (b"", b"1.1", len(body)) + body[:5])
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) > 20, 30)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: health_status(service.url) == 503, 30)
        assert asked(late[0], body[5:])[:2] == (200, "close")  # began before
        assert asked(late[1], ask.replace(b"/live", b"/health"))[:2] == (503, "close")
        assert asked(late[2], post % (b"", b"1.0", len(body)) + body)[:2] == (200, "close")
        assert asked(late[3], post % (b"?stream=true", b"1.1", len(body)) + body)[:2] == (200, "close")
        assert asked(late[4], b"no HTTP\r\n\r\n")[:2] == (400, "close")
        for thread in threads:
            thread.join(60)
        assert not failed
        assert set(answers) == {(200, "keep-alive"), (200, "close")}
        assert [s.recv(1) for s in (*idle, *late)] == [b""] * 8
        for s in dripped:
            s.settimeout(60)
            status, connection, text = asked(s, b"")
            assert (status, connection, json.loads(text)["error"]) == (503, "close", "SHUTTING_DOWN")
    assert service.process.wait(20) == 0


def test_idle_connections_do_not_hold_up_the_stop(start_service):
    service = start_service(**LIGHT).wait_ready()
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            session = stack.enter_context(requests.Session())
            assert session.get(service.url + "/live").status_code == 200
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
        started = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - started < 15


@pytest.mark.parametrize(("arguments", "line"), [
    ("-k sync", "-k/--worker-class cannot be chosen"), ("--threads 4", "--threads cannot be chosen"),
    ("--preload", "--preload cannot be chosen"), ("-w 0", "-w/--workers must be from 1 to 256, got 0"),
    ("-w 257", "-w/--workers must be from 1 to 256, got 257")])
def test_gunicorns_options_that_do_not_fit_are_refused_in_one_line(start_service, arguments, line):
    service = start_service(GUNICORN_CMD_ARGS=arguments)
    assert service.process.wait(60) != 0
    assert [text for text in service.log.splitlines() if "error: " in text and line in text], service.log
    assert "Traceback" not in service.log


def test_gunicorns_options_that_fit_are_taken_into_account(start_service):
    port = free_port()
    service = start_service(GUNICORN_CMD_ARGS=f"-w 2 -b 127.0.0.1:{port}")
    service.port, service.url = port, f"http://127.0.0.1:{port}"
    service.wait_ready()
    wait_until(lambda: workers_ready(service.url) == 2, 30)
    starting = next(json.loads(line) for line in service.log.splitlines() if '"starting"' in line)
    assert starting["workers"] == 2
    assert starting["streams"] == max(1, machine.usable_cores() // 2)
    wait_until(lambda: f'"url": "{service.url}"' in service.log, 30)  # which the first worker writes


def test_more_workers_than_planned_are_counted(start_service):
    service = start_service(**LIGHT).wait_ready()
    for workers in (2, 3):  # equal signals at once are one
        service.process.send_signal(signal.SIGTTIN)
        wait_until(lambda workers=workers: workers_ready(service.url) == workers, 30)


def test_the_headers_that_wait_for_a_body_are_overtaken_by_nothing(tmp_path):
    headers = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    (tmp_path / "file.json").write_bytes(b"{}")
    ours, its = gevent.socket.socketpair()
    with ours, its, (tmp_path / "file.json").open("rb") as file:
        its.settimeout(5)
        fair = Fair(ours)
        fair.sendall(headers)
        assert fair.held == headers
        fair.sendall(b"{}")
        assert its.recv(1000) == headers + b"{}"  # one system call
        fair.sendall(headers)
        fair.sendfile(file)
        found = its.recv(1000)
        assert found + (its.recv(2) if len(found) == len(headers) else b"") == headers + b"{}"
        fair.sendall(headers)  # of HEAD
        fair.sendall(b"")
        assert its.recv(1000) == headers


def test_a_client_that_always_has_more_data_gives_way_to_the_sockets_of_others(monkeypatch):
    """Each look at the clock is a millisecond later: a read takes time, but is no wait."""
    monkeypatch.setattr(worker, "time", types.SimpleNamespace(monotonic=itertools.count(step=0.001).__next__))
    (ours, its), (other, others) = gevent.socket.socketpair(), gevent.socket.socketpair()
    with ours, its, other, others:
        fair, reader, reads = Fair(ours), gevent.spawn(other.recv, 1), 0
        gevent.sleep(0.01)  # it waits now
        its.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while its.send(bytes(2**16)):
                pass
        others.sendall(b"x")
        while not reader.ready() and reads < 100:
            assert fair.recv(100)
            reads += 1
        assert reads < 20  # fifty times as many with gevent.sleep(0)


def test_what_of_gunicorn_is_overridden_is_there_in_the_installed_release():
    for of_gunicorn, names in GUNICORN.items():
        for name in names:
            assert hasattr(of_gunicorn, name), f"{of_gunicorn.__name__}.{name}"
    for name, overridden in vars(Worker).items():
        if not name.startswith("__") and hasattr(GeventWorker, name):
            assert name in GUNICORN[GeventWorker], f"{name} overrides Gunicorn's and is not listed"
            if callable(overridden) and not isinstance(overridden, contextlib._GeneratorContextManager):
                ours, its = inspect.signature(overridden), inspect.signature(getattr(GeventWorker, name))
                assert list(ours.parameters) == list(its.parameters), name


def test_refusal_of_an_unread_body_ends_the_connection_and_says_so(start_service):
    service = start_service(MAX_FILE_SIZE="10KiB", MAX_QUEUE="0").wait_ready()
    for size in (20_000, 400_000):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)) as connection:
            for path, type in (("/nothing", "image/png"), ("/predict", "text/plain")):
                connection.request("POST", path, bytes(size), {"Content-Type": type})
                answer = connection.getresponse()
                assert (answer.status, answer.getheader("Connection")) == (404 if path == "/nothing" else 415, "close")
                assert json.loads(answer.read())["status"] == "error"
            connection.request("POST", "/predict", b"no picture", {"Content-Type": "image/png"})  # read whole
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Connection")) == (400, "keep-alive")


def test_clients_that_first_send_all_of_a_large_body_get_their_refusals(service):
    def refused(body):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)) as connection:
            connection.request("POST", "/nothing", body)  # raises if the connection is closed meanwhile
            return connection.getresponse().status

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(refused, [bytes(3 * 10**7)] * 4)) == [404] * 4  # more than sockets hold


def test_refused_clients_that_stay_do_not_stop_the_worker(service):
    with contextlib.ExitStack() as stack:
        staying = [stack.enter_context(open_request(service.port, length=10**9)) for _ in range(10)]
        until, answered = time.monotonic() + 3, 0
        while time.monotonic() < until:
            assert health_status(service.url) == 200
            answered += 1
            time.sleep(0.1)
        assert answered > 2  # not one after each of those who stay
        for s in staying:
            assert s.recv(100).split(b" ")[1] == b"413"


def test_clients_that_leave_cost_nothing_lasting(service):
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
    assert b"\r\nX-Content-Type-Options: nosniff\r\n" in head + b"\r\n"
    assert sorted(json.loads(body)) == ["error", "message", "request_id", "status"]


def test_load_balancer_loses_nothing_while_one_instance_is_restarted(start_service, tmp_path):
    haproxy = need("haproxy")
    one, two = start_service(DRAIN_SECONDS="2").wait_ready(), start_service(DRAIN_SECONDS="2").wait_ready()
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
    timeout check 10s
    default-server check inter 300ms fall 2 rise 2
    server one 127.0.0.1:{one.port}
    server two 127.0.0.1:{two.port}
""")
    proxy = subprocess.Popen([haproxy, "-f", str(tmp_path / "haproxy.cfg"), "-db"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: health_status(url) == 200, 30)
        with Load(url, 3, pause_s=0.1) as load:
            wait_until(lambda: one.log.count('"path": "/predict"') > 3, 30)
            assert one.stop() == 0
            again = start_service(PORT=str(one.port), DRAIN_SECONDS="0")
            again.port, again.url = one.port, one.url
            again.wait_ready()
            wait_until(lambda: again.log.count('"path": "/predict"') > 3, 30, "it gets no requests")
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
        wait_until(lambda: health_status(f"http://127.0.0.1:{port}") == 200, 30)
        return f"http://127.0.0.1:{port}"
    yield start
    for process in processes:
        process.terminate()
        process.wait(60)


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
    expected = {(200, "tiger cat"), (503, "OVERLOADED")}
    with Load(url, 8) as load:
        wait_until(lambda: expected <= set(load.answers), 30)
    assert set(load.answers) == expected
    assert load.retry_after
    assert not load.errors


def are_closed(clients):
    """Whether the service ends these connections, and leaves none for ever."""
    for s in clients:
        s.settimeout(HEADERS_WITHIN_S + 20)
        with contextlib.suppress(ConnectionResetError):
            if s.recv(1):
                return False
    return True


def test_connections_that_say_nothing_and_slow_headers_are_closed(service, silent):
    assert service.predict(CAT, timeout_s=10).status_code == 200
    assert are_closed(silent)


def test_who_never_begins_a_handshake_is_closed(over_tls):
    assert are_closed(over_tls[2:])
