"""/metrics is right over all workers and all that happens to them, and costs next to nothing."""
import bisect
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from conftest import ROOT, encoded, need, post
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from urllib3 import encode_multipart_formdata

from app import create_app
from app.api import metrics
from app.config import Settings
from app.engine.slots import Slots
from app.server import counters, machine

CAT = (ROOT / "tests/images/chelsea.jpg").read_bytes()
WHITE = encoded(Image.new("RGB", (40, 40), "white"))


class Scrape:
    """The samples of one scrape: scrape("name", label="value") is the sum over those that match."""

    def __init__(self, text):
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name, **labels):
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    def labels(self, name, label):
        return sorted(s.labels[label] for s in self.samples if s.name == name)

    def counters(self):
        """{(name, labels): value} of all that may never go down."""
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in self.families
                for s in family.samples
                if family.type in ("counter", "histogram") and s.name != "process_cpu_seconds_total"}


def scrape(url):
    answer = requests.get(url + "/metrics", timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return Scrape(answer.text)


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_promtool_finds_nothing_to_improve(client):
    promtool = need("promtool")
    post(client, WHITE)
    checked = subprocess.run([promtool, "check", "metrics"], input=client.get("/metrics").data, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_openmetrics_is_spoken_to_who_asks_for_it(client):
    post(client, WHITE)
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert "model_server_requests" in {family.name for family in parse_openmetrics(answer.text)}


def test_requests_are_counted_by_endpoint_method_status_and_error(client):
    before = Scrape(client.get("/metrics").text)
    post(client, WHITE)
    post(client, b"not a picture")
    client.get("/predict")
    client.open("/predict", method="BREW")
    client.get("/no/such/path")
    after = Scrape(client.get("/metrics").text)
    for labels in ({"endpoint": "/predict", "method": "POST", "status": "200", "error": ""},
                   {"endpoint": "/predict", "method": "POST", "status": "400", "error": "INVALID_IMAGE"},
                   {"endpoint": "none", "method": "GET", "status": "405", "error": "METHOD_NOT_ALLOWED"},
                   {"endpoint": "none", "method": "other", "status": "405", "error": "METHOD_NOT_ALLOWED"},
                   {"endpoint": "none", "method": "GET", "status": "404", "error": "NOT_FOUND"}):
        name = "model_server_requests_total"
        assert after(name, **labels) - before(name, **labels) == 1, labels


def test_stages_and_requests_have_histograms_in_seconds(client):
    before = Scrape(client.get("/metrics").text)
    started = time.perf_counter()
    timings = post(client, CAT).json["metadata"]["timings_ms"]
    spent = time.perf_counter() - started
    after = Scrape(client.get("/metrics").text)
    assert {"read", "queue", "decode", "preprocess", "inference"} <= set(timings)
    for stage, ms in timings.items():
        name = "model_server_stage_duration_seconds"
        assert after(f"{name}_count", stage=stage) - before(f"{name}_count", stage=stage) == 1
        counted = after(f"{name}_sum", stage=stage) - before(f"{name}_sum", stage=stage)
        assert counted == pytest.approx(ms / 1000, abs=1e-3)
        assert after(f"{name}_bucket", stage=stage, le="+Inf") == after(f"{name}_count", stage=stage)
    name = "model_server_request_duration_seconds"
    total = after(f"{name}_sum", endpoint="/predict") - before(f"{name}_sum", endpoint="/predict")
    assert sum(timings.values()) / 1000 <= total + 1e-3 <= spent + 2e-3


def test_model_versions_and_process_are_described(client, app):
    Slots(3, max_queue=5)  # tells its size at once, not with the first prediction
    found = Scrape(client.get("/metrics").text)
    manifest = app.extensions["model"].current.task.manifest
    assert found("model_server_model_info", model="efficientnet_lite0", engine=manifest.engine, precision="fp32",
                 device="cpu", weights=manifest.weights["sha256"][:12]) == 1
    assert found("model_server_info") == 1
    assert (found("model_server_slots"), found("model_server_queue_limit")) == (3, 5)
    assert 0 < found("model_server_model_load_seconds") < 600
    assert found("process_resident_memory_bytes") > 50e6
    assert time.time() - 86400 < found("process_start_time_seconds") <= time.time() + 1


def test_files_of_a_batch_are_counted_by_what_became_of_each(client):
    before = Scrape(client.get("/metrics").text)
    files = [("files", ("a.png", WHITE)), ("files", ("b.png", b"no picture")), ("files", ("c.png", WHITE))]
    body, content_type = encode_multipart_formdata(files)
    assert client.post("/predict/batch", data=body, content_type=content_type).json["failed"] == 1
    after = Scrape(client.get("/metrics").text)
    name = "model_server_batch_files_total"
    assert after(name, error="") - before(name, error="") == 2
    assert after(name, error="INVALID_IMAGE") - before(name, error="INVALID_IMAGE") == 1
    requests_ = {"endpoint": "/predict/batch", "status": "200"}
    name = "model_server_requests_total"
    assert after(name, **requests_) - before(name, **requests_) == 1


def test_looks_into_the_cache_are_counted_where_there_is_one(app):
    client = create_app(Settings.parse({"CACHE_URL": "memory://"}), app.extensions["model"]).test_client()
    before = Scrape(client.get("/metrics").text)
    assert [post(client, WHITE).headers["X-Cache"] for _ in range(3)] == ["miss", "hit", "hit"]
    assert post(client, b"no picture").status_code == 400
    after = Scrape(client.get("/metrics").text)
    name = "model_server_cache_lookups_total"
    assert [after(name, result=r) - before(name, result=r) for r in ("hit", "miss")] == [2, 1]
    assert post(app.test_client(), WHITE).status_code == 200
    assert Scrape(client.get("/metrics").text)(name) == after(name)  # that one has no cache


def test_refusals_and_late_answers_are_counted(client):
    before = Scrape(client.get("/metrics").text)
    late = client.post("/predict", data=CAT, headers={"X-Request-Timeout": "0.0001", "Content-Type": "image/jpeg"})
    assert late.json["error"] == "DEADLINE_EXCEEDED"
    after = Scrape(client.get("/metrics").text)
    assert after("model_server_deadline_exceeded_total") - before("model_server_deadline_exceeded_total") == 1


def test_a_histograms_bounds_are_inclusive_and_cumulative():
    assert metrics.cumulative((1, 2), [3, 4, 5]) == [("1.0", 3), ("2.0", 7), ("+Inf", 12)]
    region = counters.private()
    for value in (0.5, 1, 1.5, 3):
        index = bisect.bisect_left((1, 2), value)
        region.observe("h", 4, index, value)
    assert region.read()["h"] == [2, 1, 1, 6]


def test_a_full_region_drops_new_series_and_keeps_the_old():
    region = counters.private()
    for i in range(20_000):
        region.add(f"series-{i}", 1)
    region.add("series-0", 1)
    read = region.read()
    assert read["series-0"] == [2]
    assert 5_000 < len(read) < 20_000
    assert set(map(tuple, read.values())) == {(2,), (1,)}
    assert len(region.places) == len(read)


def test_an_entry_that_a_kill_cut_off_is_overwritten():
    region = counters.private()
    region.add("requests", 1)
    end = region.integers[counters.END_AT]
    region.add("a long name that will be cut off", 7)
    region.integers[counters.END_AT] = end  # killed before the entry could be seen
    region.claim()
    region.add("overloaded", 1)
    assert region.read() == {"requests": [1], "overloaded": [1]}


def test_threads_lose_no_count():
    region = counters.private()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: [region.add(f"k{i % 3}", 1) for _ in range(5000)], range(12)))
    assert sum(v for [v] in region.read().values()) == 60_000


def test_counting_a_request_costs_far_below_a_third_of_a_millisecond():
    def one_request():
        counters.change("requests_in_progress", 1)
        stages = counters.Stages()
        for stage in ("read", "queue", "decode", "preprocess", "inference"):
            with stages(stage):
                pass
        for gauge in ("body_bytes", "queue_depth", "slots_in_use"):
            counters.change(gauge, 1)
            counters.change(gauge, -1)
        counters.observe("batch_size", 1)
        counters.count_answer("/predict", "POST", 200, "")
        counters.observe("request_duration_seconds", 0.02, "/predict")
        stages.count()
        counters.change("requests_in_progress", -1)
    fastest = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            one_request()
        fastest = min(fastest, (time.perf_counter() - started) / 100)
    assert fastest < 0.3e-3  # measured: 0.02 ms


@pytest.fixture
def two_workers(start_service):
    service = start_service(WORKERS="2").wait_ready()
    wait_until(lambda: scrape(service.url)("model_server_workers_ready") == 2, 60)
    return service


def test_sums_hold_over_workers_and_over_a_kill(two_workers):
    service = two_workers
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        statuses = [answer.status_code for answer in pool.map(lambda _: service.predict(WHITE), range(24))]
    assert statuses == [200] * 24
    before = scrape(service.url)
    predictions = {"endpoint": "/predict", "method": "POST", "status": "200"}
    assert before("model_server_requests_total", **predictions) == 24
    assert before("model_server_stage_duration_seconds_count", stage="inference") == 24
    assert before("model_server_batch_size_sum") == 24 + 2 * 2  # and the self-tests: each worker's has two
    assert before.labels("process_resident_memory_bytes", "worker") == ["1", "2", "master"]
    plan = machine.plan(Settings.parse({"WORKERS": "2", "DEVICE": "cpu"}))
    assert before("model_server_slots") == 2 * plan.slots
    assert before("model_server_queue_limit") == 2 * plan.queue

    for victim in service.workers():  # one after the other: in the end nobody is left of those who counted
        os.kill(victim, signal.SIGKILL)
        seen = before.counters()
        until = time.monotonic() + 60
        while victim in service.workers() or scrape(service.url)("model_server_workers_ready") < 2:
            now = scrape(service.url).counters()
            assert {name: (value, now.get(name)) for name, value in seen.items() if now.get(name, -1) < value} == {}
            seen = now
            assert time.monotonic() < until
            time.sleep(0.02)
    # Of a request that the other worker has just answered, it may still count the end.
    wait_until(lambda: scrape(service.url)("model_server_requests_in_progress") == 1, 30)
    after = scrape(service.url)
    assert after("model_server_requests_total", **predictions) == 24
    assert after("model_server_worker_exits_total") == 2
    assert after("model_server_slots") == before("model_server_slots")
    assert after.labels("process_resident_memory_bytes", "worker") == ["1", "2", "master"]
    assert service.predict(WHITE).status_code == 200
    assert scrape(service.url)("model_server_requests_total", **predictions) == 25


def test_gauges_of_a_killed_worker_do_not_stay(start_service):
    service = start_service(WORKERS="1").wait_ready()
    big = encoded(Image.new("RGB", (6000, 6000)))
    [worker] = service.workers()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        doomed = [pool.submit(service.predict, big) for _ in range(4)]
        wait_until(lambda: scrape(service.url)("model_server_slots_in_use") > 0, 30)
        os.kill(worker, signal.SIGKILL)
        concurrent.futures.wait(doomed)
    service.wait_ready()
    wait_until(lambda: scrape(service.url)("model_server_requests_in_progress") == 1, 30)
    found = scrape(service.url)
    assert found("model_server_slots_in_use") == found("model_server_queue_depth") == 0


def test_sums_hold_over_a_reload(two_workers):
    service = two_workers
    assert [service.predict(WHITE).status_code for _ in range(6)] == [200] * 6
    workers, before = service.workers(), scrape(service.url)
    done = subprocess.run([sys.executable, "-m", "app", "reload", "--pid", str(service.process.pid)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert service.workers() == workers  # the model was replaced, not they
    found = scrape(service.url)
    assert found("model_server_requests_total", endpoint="/predict", status="200") == 6
    assert found("model_server_stage_duration_seconds_count", stage="inference") == 6
    assert found("model_server_worker_exits_total") == 0
    for name in ("slots", "queue_limit", "workers_ready"):
        assert found(f"model_server_{name}") == before(f"model_server_{name}") > 0
    assert len(found.labels("model_server_model_load_seconds", "worker")) == 2
    assert found("model_server_model_info") == 1
    wait_until(lambda: scrape(service.url)("model_server_requests_in_progress") == 1, 30)
    assert service.predict(WHITE).status_code == 200
    assert scrape(service.url)("model_server_requests_total", endpoint="/predict", status="200") == 7


def test_counts_start_fresh_with_the_master_and_need_no_directory(start_service, tmp_path):
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "counter_1.db").touch()  # what breaks prometheus-client's own sums over processes
    service = start_service(PROMETHEUS_MULTIPROC_DIR=str(planted)).wait_ready()
    assert service.predict(WHITE).status_code == 200
    assert scrape(service.url)("model_server_requests_total", endpoint="/predict", status="200") == 1
    assert [path.name for path in planted.iterdir()] == ["counter_1.db"]
    service.stop()
    again = start_service(PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "missing")).wait_ready()
    assert scrape(again.url)("model_server_requests_total", endpoint="/predict") == 0


def test_full_shared_memory_stops_neither_predictions_nor_metrics(start_service, monkeypatch):
    """In a mount namespace of its own, where /dev/shm has 1 MiB, which then is filled."""
    unshare = need("unshare")
    private_shm = [unshare, "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*private_shm, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen([*private_shm, *command], **options))
    service = start_service(WORKERS="2")
    monkeypatch.undo()
    service.wait_ready()
    shm = Path(f"/proc/{service.process.pid}/root/dev/shm")
    with open(shm / "fill", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    for _ in range(8):
        assert service.predict(WHITE).status_code == 200
    os.kill(service.workers()[0], signal.SIGKILL)
    wait_until(lambda: scrape(service.url)("model_server_worker_exits_total") == 1, 30)
    assert service.predict(WHITE).status_code == 200
    assert scrape(service.url)("model_server_requests_total", endpoint="/predict", status="200") == 9


def test_counting_imports_nothing_large_into_the_master():
    code = ("import app.server.counters, sys; "
            "print({'flask', 'gevent', 'numpy', 'openvino', 'prometheus_client', 'torch'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout == b"set()\n"
