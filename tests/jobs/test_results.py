"""What jobs answer: the same as /predict and /predict/batch, from the same inputs and options."""
import base64
import hashlib
import json
import os
import re
import signal
import time

import pytest
import requests
from conftest import Service, encoded, photo
from job_workers import Jobs, Worker
from videos import numbered, write

from app.config import Settings
from app.data.database import Database
from app.data.schema import jobs as table
from app.data.storage import Own
from app.jobs.broker import Broker
from app.jobs.store import Store

LONG_S = 120  # for what only a machine that is very busy takes so long for


@pytest.fixture(scope="module")
def variables(tmp_path_factory, model_dir):
    return {"JOBS": "on", "HISTORY": "on", "MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir),
            "DEVICE": "cpu", "DATA_DIR": str(tmp_path_factory.mktemp("data"))}


@pytest.fixture(scope="module")
def jobs(variables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    worker, service = Worker(folder, variables), Service(folder, variables)
    yield Jobs(service.wait_ready())
    worker.stop()
    service.stop()


def same(job, answer):
    """Whether a job's result is this answer of /predict or /predict/batch, but for timings."""
    def without_timings(body):
        if isinstance(body, dict):
            return {k: without_timings(v) for k, v in body.items() if k not in ("timings_ms", "inference_time")}
        return [without_timings(one) for one in body] if isinstance(body, list) else body
    assert job["state"] == "succeeded", job["error"]
    return without_timings(job["result"]) == without_timings(answer.json())


FORMS = {
    "form": lambda data: {"files": {"file": ("cat.png", data)}, "data": {"top_k": "2"}},
    "raw": lambda data: {"data": data, "headers": {"Content-Type": "image/png"}, "params": {"top_k": "2"}},
    "json": lambda data: {"json": {"image": base64.b64encode(data).decode(), "top_k": 2}},
    "instances": lambda data: {"json": {"instances": [{"b64": base64.b64encode(data).decode()}]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_job_answers_as_predict_does(jobs, form):
    data = encoded(photo("chelsea"))
    expected = requests.post(jobs.url + "/predict", timeout=30, **FORMS[form](data))
    assert expected.status_code == 200
    assert same(jobs.wait(jobs.accepted(**FORMS[form](data))), expected)


def test_jobs_stand_in_the_history_too(jobs):
    answer = jobs.submit(**FORMS["form"](encoded(photo("coffee"))))
    job, until = jobs.wait(answer.json()["id"]), time.monotonic() + LONG_S
    while not (found := requests.get(f"{jobs.url}/history/{answer.headers['X-Request-ID']}", timeout=10)).ok:
        assert time.monotonic() < until
        time.sleep(0.1)
    record, = found.json()["history"]
    assert record["predictions"] == job["result"]["predictions"]
    assert record["input_sha256"] == hashlib.sha256(encoded(photo("coffee"))).hexdigest()


def test_job_of_several_files_answers_as_a_batch_does(jobs):
    files = [("files", ("a.png", encoded(photo("chelsea")))), ("files", ("b.txt", b"no picture")), ("files", ("", b"")),
             ("files", ("c.png", encoded(photo("rocket")))), ("files", ("empty.png", b""))]
    expected = requests.post(jobs.url + "/predict/batch", files=files, timeout=30)
    job = jobs.wait(jobs.accepted(files=files))
    assert expected.json()["failed"] == 2
    assert same(job, expected)
    assert job["progress"] == {"done": 4, "total": 4, "unit": "files"}


def test_job_of_a_batch_that_fails_as_a_whole_has_the_results(jobs):
    files = [("files", ("a.txt", b"no")), ("files", ("b.txt", b"nor this"))]
    expected = requests.post(jobs.url + "/predict/batch", files=files, timeout=30).json()
    job = jobs.wait(jobs.accepted(files=files))
    assert job["state"] == "failed"
    assert job["error"] == {"error": "ALL_FAILED", "message": expected["message"]}
    assert job["result"]["results"] == expected["results"]


def test_job_of_a_video_counts_frames(jobs):
    video = write([numbered(number) for number in range(30)])
    arguments = {"files": {"file": ("clip.mp4", video)}, "data": {"frames": "3"}}
    expected = requests.post(jobs.url + "/predict", timeout=30, **arguments)
    job = jobs.wait(jobs.accepted(**arguments))
    assert same(job, expected)
    assert job["queue"] == "long"
    assert job["progress"] == {"done": 3, "total": 3, "unit": "frames"}


def test_inputs_lie_in_s3_until_the_job_has_ended_and_its_result_until_its_time_is_over(
        s3_server, redis_server, postgres_server, variables, start_service, start_worker):
    bucket = s3_server.bucket()
    servers = {**variables, **s3_server.variables, "STORAGE_URL": f"s3://{bucket}/inputs", "SHORT_WORKERS": "0",
               "MODEL_NAME": "tests.jobs.troubled:Troubled", "HISTORY": "off",
               "DATABASE_URL": postgres_server.database(), "JOBS_BROKER": redis_server.database()}
    service, worker = start_service(**servers), start_worker(**servers)
    jobs = Jobs(service.wait_ready())
    worker.wait_ready()
    worker.process.send_signal(signal.SIGSTOP)
    for pid in worker.nodes():
        os.kill(pid, signal.SIGSTOP)
    job_id = jobs.accepted("wait 0")
    with requests.get(f"{s3_server.url}/{bucket}", timeout=10) as listing:
        assert re.search(f"<Key>inputs/jobs-[0-9a-f]{{32}}/{job_id}/0</Key>", listing.text)
    worker.process.send_signal(signal.SIGCONT)
    for pid in worker.nodes():
        os.kill(pid, signal.SIGCONT)
    assert jobs.wait(job_id)["state"] == "succeeded"
    until = time.monotonic() + LONG_S
    while job_id in requests.get(f"{s3_server.url}/{bucket}", timeout=10).text:
        assert time.monotonic() < until
        time.sleep(0.1)
    database = Database(servers["DATABASE_URL"])
    with database.begin() as connection:
        connection.execute(table.update().values(expires_at=1.0))
    database.close()
    until = time.monotonic() + LONG_S
    while (status := requests.get(f"{jobs.url}/jobs/{job_id}", timeout=60).status_code) == 200:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert status == 404


def test_job_is_run_by_the_version_that_was_asked_for(start_service, start_worker, tmp_path):
    several = {"MODELS": "sum@1=tests.own_tasks:Sum,sum@2=tests.own_tasks:Sum", "LOAD_MODELS": "first_use",
               "JOBS": "on", "MODEL_NAME": "", "DATA_DIR": str(tmp_path / "data"), "LONG_WORKERS": "0"}
    service, worker = start_service(**several), start_worker(**several)
    jobs = Jobs(service.wait_ready())
    worker.wait_ready()
    answer = requests.post(service.url + "/models/sum@2/jobs", json={"numbers": [1, 2]}, timeout=30)
    expected = requests.post(service.url + "/models/sum@2/predict", json={"numbers": [1, 2]}, timeout=30)
    assert same(jobs.wait(answer.json()["id"]), expected)


def test_input_that_is_gone_fails_the_job(jobs, variables):
    """Whoever removes files from the storage is told, and the worker goes on."""
    settings = Settings.parse(variables)
    database = Database(settings.optional.database)
    earlier = jobs.accepted(**FORMS["form"](encoded(photo("coffee"))))
    assert jobs.wait(earlier)["state"] == "succeeded"
    with database.read() as connection:
        row = dict(connection.execute(table.select().where(table.c.id == earlier)).mappings().one())
    columns = ("owner", "queue", "request_id", "model", "version", "options_json", "input_bytes", "fingerprint")
    job_id = "0" * 32
    about = {"key": f"{job_id}/0", "filename": None, "field": "file", "bytes": 3, "sha256": "", "kind": "file"}
    Store(database, settings.optional).add({
        **{name: row[name] for name in columns}, "id": job_id, "is_batch": False, "inputs_json": json.dumps([about]),
        "idempotency_key": None, "callback_url": None, "total": 1, "unit": "files"})
    Broker(settings.optional).publish(job_id, row["queue"])
    job = jobs.wait(job_id)
    assert job["state"] == "failed"
    assert job["error"]["error"] == "INPUT_LOST"
    own, until = Own(database, settings.optional), time.monotonic() + LONG_S
    while found := own.prefixes(0):  # those of jobs that have just ended, too
        assert time.monotonic() < until, found
        time.sleep(0.1)
    database.close()
