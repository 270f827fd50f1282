"""Workers: what becomes of jobs whatever happens to the processes, over files and over servers."""
import json
import os
import signal
import sqlite3
import time

import pytest
import requests
from conftest import Service, free_port
from job_workers import Jobs, Worker
from servers import is_running, state_of

from app.config import Settings, StartError
from app.jobs.worker import Supervisor, serve

TROUBLED = {"MODEL_NAME": "tests.jobs.troubled:Troubled"}
LONG_S = 120  # for what only a machine that is very busy takes so long for


# Of what is the same over files and servers; test_store.py finds lost jobs and gives jobs back over both.
EMBEDDED = pytest.mark.parametrize("troubled", ["embedded"], indirect=True)


@pytest.fixture(scope="module", params=["embedded", "servers"])
def troubled(request, tmp_path_factory, model_dir):
    """(Jobs, Worker, Service) of the Troubled model for the tests of a module, over each of the engines."""
    folder = tmp_path_factory.mktemp("troubled")
    variables = {"JOBS": "on", "MODEL_NAME": "tests.jobs.troubled:Troubled", "MODEL_DIR": str(model_dir),
                 "DATA_DIR": str(folder / "data"), "MAX_BATCH_FILES": "64"}
    if request.param == "servers":
        variables |= {"DATABASE_URL": request.getfixturevalue("postgres_server").database(),
                      "JOBS_BROKER": request.getfixturevalue("redis_server").database()}
    worker, service = Worker(folder, variables), Service(folder, variables)
    yield Jobs(service.wait_ready()), worker.wait_ready(), service
    worker.stop()
    service.stop()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory, model_dir):
    """The same of jobs that may take three seconds."""
    folder = tmp_path_factory.mktemp("hasty")
    variables = {**TROUBLED, "JOBS": "on", "MODEL_DIR": str(model_dir), "DATA_DIR": str(folder / "data"),
                 "JOB_TIMEOUT": "3", "LONG_WORKERS": "0", "WORKERS": "1"}
    worker, service = Worker(folder, variables), Service(folder, variables)
    yield Jobs(service.wait_ready()), worker.wait_ready(), service
    worker.stop()
    service.stop()


class Gate:
    """What the model is told to wait for, so that a job is running for exactly as long as a test wants."""

    def __init__(self, folder):
        self.path = folder / "gate"
        self.order, self.begun = f"until {self.path}", folder / "gate.begun"

    def wait_begun(self):
        """Until the model has begun to wait."""
        wait_for(self.begun.exists)

    def open(self):
        self.path.touch()


@pytest.fixture
def gate(tmp_path):
    one = Gate(tmp_path)
    yield one
    one.open()


def wait_for(condition, about=lambda: ""):
    until = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < until, about()
        time.sleep(0.05)


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


def test_model_that_gives_up_when_its_time_is_over_does_not_fail(hasty):
    """For predictions too: the deadline is the reason, whether the model or the service notices it first."""
    jobs, _, service = hasty
    assert jobs.wait(jobs.accepted("late"))["error"]["error"] == "DEADLINE_EXCEEDED"
    for _ in range(5):
        answer = requests.post(service.url + "/predict", json={"text": "late"}, timeout=30,
                               headers={"X-Request-Timeout": "0.1"})
        assert (answer.status_code, answer.json()["error"]) == (504, "DEADLINE_EXCEEDED")


def test_job_whose_process_is_killed_is_run_again(troubled, gate):
    jobs, worker, _ = troubled
    job_id = jobs.accepted(gate.order)
    gate.wait_begun()
    for pid in worker.nodes():
        os.kill(pid, signal.SIGKILL)
    gate.open()
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


def test_running_job_is_cancelled(troubled, gate):
    jobs, _, _ = troubled
    job_id = jobs.accepted(gate.order)
    gate.wait_begun()
    assert jobs.cancel(job_id).status_code == 202
    job = jobs.wait(job_id)
    assert job["state"] == "cancelled"
    assert job["progress"]["done"] == 0


def test_job_that_hangs_fails_at_its_deadline_and_its_process_is_replaced(hasty):
    jobs, worker, _ = hasty
    before = set(worker.nodes())
    job = jobs.wait(jobs.accepted("hang"))
    assert job["state"] == "failed"
    assert job["error"]["error"] == "DEADLINE_EXCEEDED"
    wait_for(lambda: not any(map(is_running, before)), lambda: worker.log)
    worker.wait_ready()


def test_no_file_is_left_behind(troubled):
    jobs, _, service = troubled
    jobs.wait(jobs.accepted("wait 0"))
    jobs.wait(jobs.accepted("fail"))
    folder = os.path.join(service.variables["DATA_DIR"], "storage")
    wait_for(lambda: not [file for _, _, files in os.walk(folder) for file in files])


@EMBEDDED
def test_metrics_count_jobs_by_queue_state_and_error(troubled, gate):
    jobs, worker, _ = troubled
    jobs.wait(jobs.accepted("wait 0"))
    jobs.wait(jobs.accepted("refuse"))
    job_id = jobs.accepted(gate.order)
    gate.wait_begun()
    expected = ('jobs_total{error="",queue="short",state="succeeded"}',
                'jobs_total{error="INVALID_PARAMETER",queue="short",state="failed"}',
                'job_wait_seconds_bucket{le="+Inf",queue="short"}',
                'jobs_unfinished{queue="short",state="running"} 1.0')

    def said():
        found = worker.metrics()
        return all(line in found for line in expected)
    wait_for(said, worker.metrics)
    gate.open()
    assert jobs.wait(job_id)["state"] == "succeeded"


def stop_between_transactions(pids, data_folder):
    """SIGSTOP: in the middle of a transaction, they would keep all others from writing."""
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: {state_of(pid) for pid in pids} == {"T"})
        connection = sqlite3.connect(os.path.join(data_folder, "service.db"), timeout=5, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        finally:
            connection.close()


@EMBEDDED
def test_worker_with_another_model_leaves_jobs_to_others_and_says_so(troubled, start_worker):
    jobs, worker, service = troubled
    other = start_worker(DATA_DIR=service.variables["DATA_DIR"], MODEL_NAME="tests.own_tasks:Sum", LONG_WORKERS="0")
    other.wait_ready()
    nodes = worker.wait_ready().nodes()
    stop_between_transactions(nodes, service.variables["DATA_DIR"])
    try:
        ids = [jobs.accepted("wait 0") for _ in range(4)]
        wait_for(lambda: "left to other workers" in other.log, lambda: other.log)
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
    until = time.monotonic() + LONG_S
    while "warning" in jobs.get(job_id := jobs.accepted("wait 0.1")) or requests.get(
            service.url + "/jobs", timeout=30).json()["workers"] != 2:
        assert time.monotonic() < until
        jobs.wait(job_id)
        time.sleep(0.2)
    jobs.wait(job_id)
    metrics = requests.get(service.url + "/metrics", timeout=30).text
    assert 'model_server_jobs_workers{queue="short"} 2.0' in metrics
    assert 'model_server_jobs_workers{queue="long"} 1.0' in metrics
    assert worker.stop() == 0  # they say so too
    until = time.monotonic() + LONG_S
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


def test_long_jobs_do_not_starve_short_ones(troubled, gate):
    jobs, _, _ = troubled
    long = [jobs.accepted(json={"instances": [gate.order] * 10}) for _ in range(3)]
    gate.wait_begun()
    short = jobs.wait(jobs.accepted("wait 0"))
    assert short["state"] == "succeeded"
    assert short["queue"] == "short"
    found = [jobs.get(job_id) for job_id in long]
    assert {job["queue"] for job in found} == {"long"}
    assert any(job["state"] == "queued" for job in found)
    gate.open()
    found = [jobs.wait(job_id) for job_id in long]
    assert {job["state"] for job in found} == {"succeeded"}
    assert {job["progress"]["done"] for job in found} == {10}


@pytest.mark.parametrize("troubled", ["servers"], indirect=True)
def test_jobs_outlive_a_restart_of_the_broker_and_the_database(troubled, gate, request):
    jobs, worker, service = troubled
    servers = [request.getfixturevalue(name) for name in ("redis_server", "postgres_server")]
    worker.wait_ready()
    ids = [jobs.accepted(gate.order) for _ in range(8)]
    # Then none is being claimed: of one whose claim was not acknowledged, the attempt is lost.
    wait_for(lambda: [jobs.get(job_id)["state"] for job_id in ids].count("running") == len(worker.nodes()))
    for server in servers:
        server.kill()
    try:
        answer = jobs.submit("wait 0")
        assert (answer.status_code, answer.json()["error"]) == (503, "JOBS_UNAVAILABLE")
        assert requests.post(service.url + "/predict", json={"text": "wait 0"}, timeout=30).status_code == 200
    finally:
        for server in servers:
            server.start()
    wait_for(lambda: jobs.submit("wait 0").status_code == 202)
    gate.open()
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
    wait_for(lambda: not any(map(is_running, nodes)))
    worker.start()
    found = [jobs.wait(job_id) for job_id in ids]
    assert {job["state"] for job in found} == {"succeeded"}


@EMBEDDED
def test_stopping_worker_gives_back_what_it_cannot_end(troubled, gate):
    jobs, worker, _ = troubled
    worker.wait_ready()
    job_id = jobs.accepted(gate.order)
    gate.wait_begun()
    assert worker.stop() == 0
    assert jobs.get(job_id)["state"] == "queued"
    worker.start()
    gate.open()
    assert jobs.wait(job_id)["state"] == "succeeded"
    assert jobs.get(job_id)["attempts"] == 2


@EMBEDDED
def test_a_reload_replaces_one_process_after_the_other(troubled):
    _, worker, _ = troubled
    worker.wait_ready()
    before = seen = set(worker.nodes())
    worker.process.send_signal(signal.SIGHUP)

    def replaced():
        nonlocal seen
        nodes = set(worker.nodes())
        seen = seen | nodes
        assert any(map(is_running, seen)), worker.log
        return len(nodes) == 2 and not before & nodes
    wait_for(replaced, lambda: worker.log)
    worker.wait_ready()


def test_metrics_of_a_worker_need_a_key_where_the_service_does(tmp_path):
    settings = Settings.parse({"JOBS": "on", "DATA_DIR": str(tmp_path), "API_KEYS": "key-of-ann,key-of-ben",
                               "ADMIN_KEYS": "key-of-admin", "DEVICE": "cpu"})
    port = free_port()
    serve("127.0.0.1", port, Supervisor(settings))

    def status(path, **headers):
        return requests.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=60).status_code
    for headers in ({}, {"X-API-Key": "key-of-an"}, {"Authorization": "Bearer key-of-annn"}, {"X-API-Key": ""},
                    {"Authorization": "Basic key-of-ann"}, {"X-API-Key": b"key-of-ann\xe9"}):
        assert status("/metrics", **headers) == 401
    for headers in ({"X-API-Key": "key-of-ben"}, {"Authorization": "bearer key-of-ann"},
                    {"Authorization": "Bearer key-of-admin"}):
        assert status("/metrics", **headers) == 200
    assert status("/live") == 200


def test_worker_whose_model_cannot_be_loaded_says_why(start_worker, tmp_path):
    worker = start_worker(DATA_DIR=str(tmp_path / "data"), MODEL_NAME="tests.jobs.nowhere:Nothing")
    assert worker.process.wait(300) == 1
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

