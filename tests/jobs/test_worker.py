"""Workers: what becomes of jobs whatever happens to the processes, over files and over servers."""
import contextlib
import json
import os
import signal
import time

import pytest
import requests
from conftest import Service, free_port
from job_workers import Jobs, Worker

from app.config import Settings, StartError
from app.jobs.worker import Supervisor, serve

TROUBLED = {"MODEL_NAME": "tests.jobs.troubled:Troubled"}


# Of what is the same over files and servers; test_store.py finds lost jobs and gives jobs back over both.
EMBEDDED = pytest.mark.parametrize("troubled", ["embedded"], indirect=True)


@pytest.fixture(scope="module", params=["embedded", "servers"])
def troubled(request, tmp_path_factory, model_dir):
    """(Jobs, Worker, Service) of the Troubled model for the tests of a module, over each of the engines."""
    folder = tmp_path_factory.mktemp("troubled")
    variables = {"JOBS": "on", "MODEL_NAME": "tests.jobs.troubled:Troubled", "MODEL_DIR": str(model_dir),
                 "DATA_DIR": str(folder / "data"), "JOB_TIMEOUT": "3", "MAX_BATCH_FILES": "64"}
    if request.param == "servers":
        variables |= {"DATABASE_URL": request.getfixturevalue("postgres_server").database(),
                      "JOBS_BROKER": request.getfixturevalue("redis_server").database()}
    worker, service = Worker(folder, variables), Service(folder, variables)
    yield Jobs(service.wait_ready()), worker.wait_ready(), service
    worker.stop()
    service.stop()


def test_job_is_run_with_progress_by_a_process_of_the_worker(troubled):
    jobs, worker, _ = troubled
    job = jobs.wait(jobs.accepted("wait 0.1"))
    assert job["state"] == "succeeded"
    assert job["result"]["status"] == "success"
    assert job["result"]["predictions"]["process"] in worker.nodes()
    assert job["progress"] == {"done": 1, "total": 1, "unit": "files"}
    assert job["created_at"] <= job["started_at"] <= job["ended_at"] < job["expires_at"]
    assert job["attempts"] == 1
    assert job["error"] is None


@EMBEDDED
@pytest.mark.parametrize(("order", "code"), [("refuse", "INVALID_PARAMETER"), ("fail", "INTERNAL_ERROR")])
def test_job_fails_as_the_prediction_would(troubled, order, code):
    jobs, _, service = troubled
    job = jobs.wait(jobs.accepted(order))
    expected = requests.post(service.url + "/predict", json={"text": order}, timeout=30).json()
    assert job["state"] == "failed"
    assert job["error"] == {"error": expected["error"], "message": expected["message"]}
    assert job["error"]["error"] == code
    assert job["result"] is None


@EMBEDDED
def test_a_result_that_is_too_large_is_not_kept(troubled):
    jobs, _, _ = troubled
    batch = {"json": {"instances": [{"text": f"much {20 * 2**20}"}] * 4}}
    for job_id in (jobs.accepted(f"much {65 * 2**20}"), jobs.accepted(**batch)):
        job = jobs.wait(job_id)
        assert (job["state"], job["error"]["error"], job["result"]) == ("failed", "RESULT_TOO_LARGE", None)
        assert "send fewer files" in job["error"]["message"]


@EMBEDDED
def test_model_that_gives_up_when_its_time_is_over_does_not_fail(troubled):
    """For predictions too: the deadline is the reason, whether the model or the service notices it first."""
    jobs, _, service = troubled
    assert jobs.wait(jobs.accepted("late"))["error"]["error"] == "DEADLINE_EXCEEDED"
    for _ in range(5):
        answer = requests.post(service.url + "/predict", json={"text": "late"}, timeout=30,
                               headers={"X-Request-Timeout": "0.1"})
        assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")


def test_job_whose_process_is_killed_is_run_again(troubled):
    jobs, worker, _ = troubled
    job_id = jobs.accepted("wait 1.5")
    jobs.wait(job_id, ["running"])
    time.sleep(0.3)
    for pid in worker.nodes():
        os.kill(pid, signal.SIGKILL)
    job = jobs.wait(job_id)
    assert job["state"] == "succeeded"
    assert job["attempts"] == 2


@EMBEDDED
def test_poison_job_fails_at_the_third_loss_and_takes_no_other_along(troubled):
    jobs, worker, _ = troubled
    poison = jobs.accepted("kill")
    others = [jobs.accepted("wait 0.05") for _ in range(10)]
    assert {jobs.wait(job_id)["state"] for job_id in others} == {"succeeded"}
    job = jobs.wait(poison)
    assert job["state"] == "failed"
    assert job["error"]["error"] == "WORKER_LOST"
    assert job["attempts"] == 3
    worker.wait_ready()
    assert jobs.wait(jobs.accepted("wait 0"))["state"] == "succeeded"


def test_running_job_is_cancelled(troubled):
    jobs, _, _ = troubled
    job_id = jobs.accepted("wait 2.5")
    jobs.wait(job_id, ["running"])
    assert jobs.cancel(job_id).status_code == 202
    job = jobs.wait(job_id)
    assert job["state"] == "cancelled"
    assert job["ended_at"] - job["started_at"] < 2.5
    assert job["progress"]["done"] == 0


@EMBEDDED
def test_job_that_hangs_fails_at_its_deadline_and_its_process_is_replaced(troubled):
    jobs, worker, _ = troubled
    before = set(worker.nodes())
    job = jobs.wait(jobs.accepted("hang"))
    assert job["state"] == "failed"
    assert job["error"]["error"] == "DEADLINE_EXCEEDED"
    until = time.monotonic() + 40
    while before <= set(worker.nodes()):
        assert time.monotonic() < until, worker.log
        time.sleep(0.1)
    worker.wait_ready()


def test_no_file_is_left_behind(troubled):
    jobs, _, service = troubled
    jobs.wait(jobs.accepted("wait 0"))
    jobs.wait(jobs.accepted("fail"))
    folder = os.path.join(service.variables["DATA_DIR"], "storage")
    until = time.monotonic() + 20
    while found := [file for _, _, files in os.walk(folder) for file in files]:
        assert time.monotonic() < until, found
        time.sleep(0.05)


@EMBEDDED
def test_metrics_count_jobs_by_queue_state_and_error(troubled):
    jobs, worker, _ = troubled
    jobs.wait(jobs.accepted("wait 0"))
    jobs.wait(jobs.accepted("refuse"))
    jobs.accepted("wait 2.9")
    until = time.monotonic() + 5
    while not all(line in (found := worker.metrics()) for line in (
            'jobs_total{error="",queue="short",state="succeeded"}',
            'jobs_total{error="INVALID_PARAMETER",queue="short",state="failed"}',
            'job_wait_seconds_bucket{le="+Inf",queue="short"}',
            'jobs_unfinished{queue="short",state="running"} 1.0')):
        assert time.monotonic() < until, found
        time.sleep(0.1)


@EMBEDDED
def test_worker_with_another_model_leaves_jobs_to_others_and_says_so(troubled, start_worker):
    jobs, worker, service = troubled
    other = start_worker(DATA_DIR=service.variables["DATA_DIR"], MODEL_NAME="tests.own_tasks:Sum", LONG_WORKERS="0")
    other.wait_ready()
    nodes = worker.wait_ready().nodes()
    for pid in nodes:
        os.kill(pid, signal.SIGSTOP)
    try:
        ids = [jobs.accepted("wait 0") for _ in range(4)]
        until = time.monotonic() + 30
        while "left to other workers" not in other.log:
            assert time.monotonic() < until, other.log
            time.sleep(0.05)
    finally:
        for pid in nodes:
            os.kill(pid, signal.SIGCONT)
    found = [jobs.wait(job_id) for job_id in ids]
    assert {(job["state"], job["attempts"]) for job in found} == {("succeeded", 1)}
    assert other.log.count("jobs for troubled are left to other workers: this one has sum") == 1
    assert other.stop() == 0


@EMBEDDED
def test_service_says_which_workers_are_there(troubled):
    """So that its clients and its operator need not ask the workers."""
    jobs, worker, service = troubled
    worker.wait_ready()
    until = time.monotonic() + 30
    while "warning" in jobs.get(job_id := jobs.accepted("wait 0.1")) or requests.get(
            service.url + "/jobs", timeout=30).json()["workers"] != 2:
        assert time.monotonic() < until
        jobs.wait(job_id)
        time.sleep(0.2)
    metrics = requests.get(service.url + "/metrics", timeout=30).text
    assert 'model_server_jobs_workers{queue="short"} 2.0' in metrics
    assert 'model_server_jobs_workers{queue="long"} 1.0' in metrics
    assert worker.stop() == 0  # they say so too
    until = time.monotonic() + 30
    while "warning" not in (job := jobs.submit("wait 0").json()):
        assert time.monotonic() < until
        jobs.cancel(job["id"])
        time.sleep(0.2)
    assert job["warning"] == "No worker is running that takes jobs for troubled from the queue short; the job waits " \
                             "until one does."
    assert jobs.get(job["id"])["warning"] == job["warning"]
    listed = requests.get(service.url + "/jobs?state=queued", timeout=30).json()
    assert (listed["workers"], listed["jobs"][0]["warning"]) == (0, job["warning"])
    metrics = requests.get(service.url + "/metrics", timeout=30).text
    assert 'model_server_jobs_unfinished{queue="short",state="queued"} 1.0' in metrics
    assert 'model_server_jobs_workers{queue="short"} 0.0' in metrics
    assert requests.get(service.url + "/health", timeout=30).status_code == 200
    worker.start()
    assert "warning" not in jobs.wait(job["id"])


def test_long_jobs_do_not_starve_short_ones(troubled):
    jobs, _, _ = troubled
    long = [jobs.accepted(json={"instances": ["wait 0.4"] * 10}) for _ in range(3)]
    jobs.wait(long[0], ["running"])
    short = jobs.wait(jobs.accepted("wait 0"))
    assert short["state"] == "succeeded"
    assert short["queue"] == "short"
    found = [jobs.get(job_id) for job_id in long]
    assert {job["queue"] for job in found} == {"long"}
    assert any(job["state"] == "queued" for job in found)
    found = [jobs.wait(job_id) for job_id in long]
    assert {job["state"] for job in found} == {"succeeded"}
    assert {job["progress"]["done"] for job in found} == {10}


@pytest.mark.parametrize("troubled", ["servers"], indirect=True)
def test_jobs_outlive_a_restart_of_the_broker_and_the_database(troubled, request):
    jobs, worker, service = troubled
    servers = [request.getfixturevalue(name) for name in ("redis_server", "postgres_server")]
    ids = [jobs.accepted("wait 0.3") for _ in range(8)]
    for server in servers:
        server.kill()
    answer = jobs.submit("wait 0")
    assert (answer.status_code, answer.json()["error"]) == (503, "JOBS_UNAVAILABLE")
    assert requests.post(service.url + "/predict", json={"text": "wait 0"}, timeout=30).status_code == 200
    for server in servers:
        server.start()
    until = time.monotonic() + 30
    while jobs.submit("wait 0").status_code != 202:
        assert time.monotonic() < until
        time.sleep(0.1)
    found = [jobs.wait(job_id) for job_id in ids]
    assert {job["state"] for job in found} == {"succeeded"}
    assert {job["attempts"] for job in found} == {1}


@EMBEDDED
def test_supervisor_that_is_killed_takes_its_processes_along_and_loses_no_job(troubled):
    jobs, worker, _ = troubled
    ids = [jobs.accepted("wait 0.2") for _ in range(8)]
    jobs.wait(ids[0], ["running", "succeeded"])
    nodes = worker.nodes()
    worker.stop(signal.SIGKILL)
    until = time.monotonic() + 30
    while any(map(is_running, nodes)):
        assert time.monotonic() < until
        time.sleep(0.02)
    worker.start()
    found = [jobs.wait(job_id) for job_id in ids]
    assert {job["state"] for job in found} == {"succeeded"}


@EMBEDDED
def test_stopping_worker_gives_back_what_it_cannot_end(troubled):
    jobs, worker, _ = troubled
    worker.wait_ready()
    job_id = jobs.accepted("wait 2.5")
    jobs.wait(job_id, ["running"])
    assert worker.stop() == 0
    assert jobs.get(job_id)["state"] == "queued"
    worker.start()
    assert jobs.wait(job_id)["state"] == "succeeded"
    assert jobs.get(job_id)["attempts"] == 2


@EMBEDDED
def test_a_reload_replaces_one_process_after_the_other(troubled):
    _, worker, _ = troubled
    worker.wait_ready()
    before = set(worker.nodes())
    worker.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 60
    while before & set(worker.nodes()) or len(worker.nodes()) < 2:
        assert time.monotonic() < until, worker.log
        assert worker.nodes(), worker.log
        time.sleep(0.05)
    worker.wait_ready()


def test_metrics_of_a_worker_need_a_key_where_the_service_does(tmp_path):
    settings = Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path), "API_KEYS": "key-of-ann,key-of-ben",
                               "ADMIN_KEYS": "key-of-admin", "DEVICE": "cpu"})
    port = free_port()
    serve("127.0.0.1", port, Supervisor(settings))

    def status(path, **headers):
        return requests.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=5).status_code
    for headers in ({}, {"X-API-Key": "key-of-an"}, {"Authorization": "Bearer key-of-annn"}, {"X-API-Key": ""},
                    {"Authorization": "Basic key-of-ann"}, {"X-API-Key": b"key-of-ann\xe9"}):
        assert status("/metrics", **headers) == 401
    for headers in ({"X-API-Key": "key-of-ben"}, {"Authorization": "bearer key-of-ann"},
                    {"Authorization": "Bearer key-of-admin"}):
        assert status("/metrics", **headers) == 200
    assert status("/live") == 200


def test_worker_whose_model_cannot_be_loaded_says_why(start_worker, tmp_path):
    worker = start_worker(DATA_DIR=str(tmp_path / "data"), MODEL_NAME="tests.jobs.nowhere:Nothing")
    assert worker.process.wait(60) == 1
    assert "tests.jobs.nowhere" in worker.log
    assert "Traceback" not in worker.log


def test_worker_with_nothing_to_do_says_why(command, tmp_path):
    settings = Settings.parse({**TROUBLED, "JOBS": "on", "DATA_DIR": str(tmp_path), "DEVICE": "cpu",
                               "SHORT_WORKERS": "0", "LONG_WORKERS": "0"})
    with pytest.raises(StartError, match="SHORT_WORKERS and LONG_WORKERS are both 0"):
        Supervisor(settings).run()
    why = "error: the worker runs jobs: set JOBS=on, as for the service"
    assert command(["worker"], {**TROUBLED, "JOBS": "", "LOG_FORMAT": "text"}) == (1, "", why + "\n")
    code, out, err = command(["worker"], {**TROUBLED, "JOBS": "", "LOG_FORMAT": "json"})
    assert (code, out, json.loads(err)["message"], json.loads(err)["level"]) == (1, "", why, "ERROR")


def is_running(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False

