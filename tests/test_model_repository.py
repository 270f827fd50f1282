"""Several models and versions in one worker: which one answers, when each is loaded and unloaded, and the shadow."""
import collections
import io
import os
import re
import subprocess
import sys
import threading
import time

import gevent
import pytest
import requests
from conftest import ROOT, encoded, photo

from app import create_app
from app.config import Settings, StartError
from app.engine.slots import Slots
from app.tasks import insight

MODULE = """
import threading
import time
from pathlib import Path

import numpy as np

from app.tasks.own import OwnTask

HERE = Path(__file__).parent


class Counts(OwnTask):
    '''Counts what it is asked, and how often it is loaded; its version says what it answers.'''
    takes, field, example = "json", "x", 0

    def load(self):
        with open(HERE / "loads.txt", "a") as file:
            file.write(f"{self.settings.top_k}\\n")
        until = time.monotonic() + 30
        while (HERE / "slow.txt").exists() and time.monotonic() < until:
            time.sleep(0.01)
        if (HERE / f"broken-{self.settings.top_k}.txt").exists():
            raise RuntimeError("no weights")

    def predict(self, batch):
        return [self.settings.top_k for _ in batch]  # a setting that a version has of its own


class Large(Counts):
    def load(self):
        super().load()
        self.weights = np.ones(40 * 2**20, np.uint8)


class SlowToClose(Large):
    def close(self):
        time.sleep(0.3)
        del self.weights


class Wide(Counts):
    max_batch = 16


class Crowd(Counts):
    now, most, lock = 0, 0, threading.Lock()

    def predict(self, batch):
        with Crowd.lock:
            Crowd.now += 1
            Crowd.most = max(Crowd.most, Crowd.now)
        time.sleep(0.05)
        with Crowd.lock:
            Crowd.now -= 1
        return batch


class Hangs(Counts):
    def predict(self, batch):
        if batch == [7]:
            time.sleep(3)
        return [1 for _ in batch]


class Fails(Counts):
    def predict(self, batch):
        if batch == [7]:
            raise RuntimeError("seven")
        return [1 for _ in batch]
"""
CAT = encoded(photo("chelsea"), "JPEG")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "several_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path
    sys.modules.pop("several_models", None)  # the next test has one in another folder


@pytest.fixture
def serve(folder, model_dir, monkeypatch):
    monkeypatch.setattr("app.model_repository.SHADOW_WAITS_S", 60)  # as a busy machine may keep the slots from idling

    def make(models, **variables):
        return create_app(Settings.parse({"MODELS": models, "DEVICE": "cpu", "MODEL_DIR": str(model_dir), **variables}))
    return make


VERSIONS = "counts@1=several_models:Counts,counts@2=several_models:Counts"
TWO = {"COUNTS__1__TOP_K": "1", "COUNTS__2__TOP_K": "2"}


def ask(client, path="/predict", x=0, user=None, **body):
    response = client.post(path, json={"x": x, **body}, headers={"X-User": user} if user else {})
    return response.json.get("predictions", response.json.get("error"))


def loads(folder):
    return (folder / "loads.txt").read_text().split()


def test_a_model_is_chosen_by_path_query_or_body(serve):
    client = serve("lite=efficientnet_lite0,counts=several_models:Counts").test_client()
    for response in (client.post("/predict", data={"file": (io.BytesIO(CAT), "cat.jpg")}),
                     client.post("/models/lite/predict", data=CAT, content_type="image/jpeg"),
                     client.post("/predict", data={"file": (io.BytesIO(CAT), "cat.jpg"), "model": "lite"})):
        assert response.json["predictions"][0]["class"] == "tiger cat"
        assert response.json["metadata"]["model"] == "lite"
        assert "version" not in response.json["metadata"]
    assert ask(client, "/models/counts/predict") == ask(client, "/predict?model=counts") == ask(client, model="counts")
    batch = client.post("/models/counts/predict/batch", json={"instances": [1, 2]}).json
    assert [result["predictions"] for result in batch["results"]] == [5, 5]
    for response in (client.post("/models/dogs/predict", json={"x": 1}),
                     client.post("/predict?model=dogs", json={"x": 1}),
                     client.post("/predict", json={"x": 1, "model": "dogs"}), client.get("/info?model=dogs")):
        assert (response.status_code, response.json["error"]) == (404, "NOT_FOUND")
        assert response.json["message"] == "There is no model dogs; GET /models lists the models."
    refused = client.post("/models/counts/predict", data=CAT, content_type="image/jpeg")
    assert (refused.status_code, refused.json["error"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert client.get("/info?model=counts").json["model"]["name"] == "counts"
    assert client.get("/info").json["model"]["name"] == client.get("/health").json["model"] == "lite"


def test_versions_share_the_requests_by_client(serve):
    client = serve(VERSIONS, **TWO, COUNTS__SPLIT="70:30", SPLIT_HEADER="X-User").test_client()
    answers = {user: ask(client, user=str(user)) for user in range(200)}
    assert 35 < list(answers.values()).count(2) < 90  # 60 on average
    assert all(ask(client, user=str(user)) == answers[user] for user in range(0, 200, 10))
    assert len({ask(client) for _ in range(20)}) == 1  # one address, one version
    assert [ask(client, f"/models/counts@{version}/predict") for version in (1, 2)] == [1, 2]
    metadata = client.post("/predict?model=counts@2", json={"x": 1}).json["metadata"]
    assert (metadata["model"], metadata["version"]) == ("counts", "2")
    shares = [(one["version"], one["share"]) for one in client.get("/models").json["models"]]
    assert shares == [("1", 70), ("2", 30)]
    text = client.get("/metrics").text
    total = sum(float(n) for n in re.findall(r'model_requests_total\{error="",model="counts".* (\S+)', text))
    assert total >= 243


def test_without_a_split_the_first_version_answers(serve):
    client = serve(VERSIONS, **TWO, SPLIT_HEADER="X-User").test_client()
    assert {ask(client, user=str(user)) for user in range(40)} == {1}


def test_a_model_is_loaded_once_with_its_first_request_while_others_wait(serve, folder):
    app = serve("lite=efficientnet_lite0,counts=several_models:Counts", LOAD_MODELS="first_use")
    client = app.test_client()
    assert not (folder / "loads.txt").exists()
    assert [one["loaded"] for one in client.get("/models").json["models"]] == [True, False]
    model = client.get("/info?model=counts").json["model"]
    assert (model["name"], model["takes"], model["loaded"]) == ("counts", ["json"], False)
    (folder / "slow.txt").touch()
    greenlets = [gevent.spawn(ask, app.test_client(), "/models/counts/predict") for _ in range(5)]
    greenlets.append(gevent.spawn(ask, app.test_client(), "/predict", model="counts"))
    gevent.sleep(0.2)
    assert client.post("/predict", data=CAT, content_type="image/jpeg").status_code == 200
    assert not any(greenlet.ready() for greenlet in greenlets)  # it was not held up
    hasty = client.post("/models/counts/predict", json={"x": 1}, headers={"X-Request-Timeout": "0.3"})
    assert (hasty.status_code, hasty.json["error"]) == (504, "DEADLINE_EXCEEDED")
    assert "(during load)" in hasty.json["message"]
    (folder / "slow.txt").unlink()
    assert [greenlet.get(timeout=20) for greenlet in greenlets] == [5] * 6
    assert len(loads(folder)) == 1
    assert app.extensions["model"].slots.onlookers == 0


def test_who_waits_for_a_model_stands_in_the_queue(serve, folder, monkeypatch):
    app = serve("lite=efficientnet_lite0,counts=several_models:Counts", LOAD_MODELS="first_use")
    monkeypatch.setattr(app.extensions["model"], "slots", Slots(1, max_queue=2))
    (folder / "slow.txt").touch()
    greenlets = [gevent.spawn(ask, app.test_client(), "/models/counts/predict") for _ in range(5)]
    wait_for(lambda: sum(greenlet.ready() for greenlet in greenlets) == 2)
    (folder / "slow.txt").unlink()
    assert sorted(map(str, (greenlet.get(timeout=20) for greenlet in greenlets))) == ["5", "5", "5", "OVERLOADED",
                                                                                      "OVERLOADED"]


def test_a_model_that_cannot_be_loaded_is_unavailable_and_not_tried_for_each_request(serve, folder, monkeypatch):
    app = serve("lite=efficientnet_lite0,counts=several_models:Counts", LOAD_MODELS="first_use")
    client = app.test_client()
    (folder / "broken-5.txt").touch()
    for _ in range(3):
        response = client.post("/models/counts/predict", json={"x": 1})
        assert (response.status_code, response.json["error"]) == (503, "MODEL_UNAVAILABLE")
        assert response.headers["Retry-After"] == "10"
    assert len(loads(folder)) == 1
    assert client.get("/health").status_code == 200
    (folder / "broken-5.txt").unlink()
    monkeypatch.setattr("app.model_repository.RETRY_LOAD_AFTER_S", 0)
    assert ask(client, "/models/counts/predict") == 5


ALONE = """
import re, time
from pathlib import Path
from app import create_app
from app.config import Settings

def serve(memory, of_m0, of_others, count):
    models = ",".join(f"m{i}=several_models:{of_others if i else of_m0}" for i in range(count))
    return create_app(Settings.parse({"MODELS": models, "DEVICE": "cpu", "LOAD_MODELS": "first_use",
                                      "MODELS_MEMORY": memory, **{f"M{i}__TOP_K": str(i + 1) for i in range(count)}}))

def ask(app, name):
    return app.test_client().post(f"/models/{name}/predict", json={"x": 0}).json["predictions"]

def the_one_used_least_recently_makes_room():
    app = serve("150MiB", "Large", "Large", 4)
    client, loader = app.test_client(), app.extensions["model"]
    def loaded():
        return [one["name"] for one in client.get("/models").json["models"] if one["loaded"]]
    assert loaded() == ["m0"]  # the default one, which stays
    assert ask(app, "m1") == 2
    assert loaded() == ["m0", "m1"]
    assert [ask(app, name) for name in ("m2", "m1", "m3")] == [3, 2, 4]
    assert loaded() == ["m0", "m1", "m3"]
    assert sum(one.get("memory_bytes", 0) for one in client.get("/models").json["models"]) < 150 * 2**20
    assert 30 * 2**20 < loader.sizes["m1"] < 60 * 2**20, loader.sizes
    assert ask(app, "m2") == 3
    assert Path("loads.txt").read_text().split() == ["1", "2", "3", "4", "3"]
    assert ask(app, "m0") == 1
    text = client.get("/metrics").text
    assert 'model_info{device="cpu",engine="own",model="m2"' in text
    assert 'model_info{device="cpu",engine="own",model="m1"' not in text

def one_in_use_is_unloaded_after_its_last_request():
    app, ended = serve("110MiB", "Large", "Large", 3), []
    loader = app.extensions["model"]
    ask(app, "m1")
    with loader.lease("m1") as model:
        model.task.end = lambda: ended.append(model)
        assert ask(app, "m2") == 3
        assert ended == []
        assert "m1" not in loader.by_key
    until = time.monotonic() + 30
    while ended != [model]:
        assert time.monotonic() < until
        time.sleep(0.01)

def memory_that_is_freed_meanwhile_hides_no_models_size():
    app = serve("70MiB", "Counts", "SlowToClose", 3)
    loader = app.extensions["model"]
    for name in ("m1", "m2", "m1", "m2"):
        ask(app, name)
        assert list(loader.by_key) == ["m0", name]
        assert loader.sizes[name] > 30 * 2**20, loader.sizes

CHECKS = (the_one_used_least_recently_makes_room, one_in_use_is_unloaded_after_its_last_request,
          memory_that_is_freed_meanwhile_hides_no_models_size)
for check in CHECKS:
    check()
print(len(CHECKS))
"""


def test_models_make_room_for_each_other(folder, tmp_path):
    """In a process of its own: here, what other tests leave behind is freed at any time."""
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True, timeout=120, env={
        **os.environ, "MODEL_DIR": str(tmp_path), "PYTHONPATH": f"{folder}:{ROOT}"})
    assert run.stdout == "3\n", run.stderr


def test_a_model_too_large_for_the_memory_is_refused(serve):
    app = serve("m0=several_models:Large,lite=efficientnet_lite0", LOAD_MODELS="first_use", MODELS_MEMORY="15MiB")
    response = app.test_client().post("/models/lite/predict", data=CAT, content_type="image/jpeg")
    assert (response.status_code, response.json["error"]) == (503, "OUT_OF_MEMORY")
    assert ask(app.test_client()) == 5


def shadows(client):
    return {result: float(count) for result, count in re.findall(
        r'shadow_answers_total\{model="\w+",result="(\w+)",version="2"\} (\S+)', client.get("/metrics").text)}


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        gevent.sleep(0.02)


def test_the_shadow_answers_too_unseen(serve):
    client = serve(VERSIONS, **TWO, COUNTS__SHADOW="2").test_client()
    before = collections.Counter(shadows(client))
    for _ in range(3):
        assert ask(client) == 1
        gevent.sleep(0.1)
    wait_for(lambda: shadows(client).get("disagree", 0) - before["disagree"] == 3)
    same = serve(VERSIONS, COUNTS__SHADOW="2").test_client()
    assert ask(same) == 5
    wait_for(lambda: shadows(client).get("agree", 0) - before["agree"] == 1)
    assert ask(same, "/models/counts@2/predict") == 5  # the shadow itself has none
    gevent.sleep(0.2)
    assert shadows(client).get("agree", 0) - before["agree"] == 1


def test_behind_a_cache_the_shadow_answers_what_is_calculated(serve):
    client = serve("counts@1=several_models:Counts,counts@2=several_models:Fails", **TWO, COUNTS__SHADOW="2",
                   CACHE_URL="memory://").test_client()
    before = collections.Counter(shadows(client))
    assert client.post("/v2/models/counts/infer", json={"inputs": [
        {"name": "x", "shape": [1], "datatype": "BYTES", "data": ["3"]}]}).status_code == 200
    assert [ask(client, x=x) for x in (4, 4, 7)] == [1, 1, 1]  # once from the cache; the shadow fails with the last
    wait_for(lambda: shadows(client).get("failed", 0) - before["failed"] == 1)
    assert shadows(client)["agree"] - before["agree"] == 2


def test_the_shadow_is_not_asked_to_explain(serve, monkeypatch):
    """Its network may be unable to, and maps are not compared."""
    client = serve("counts@1=efficientnet_lite0,counts@2=efficientnet_lite0", COUNTS__SHADOW="2").test_client()
    before, asked, metadata = collections.Counter(shadows(client)), [], insight.metadata
    monkeypatch.setattr(insight, "metadata", lambda task, *more: asked.append(task) or metadata(task, *more))
    answer = client.post("/predict?explain=true", data=CAT, content_type="image/jpeg").json
    assert answer["metadata"]["explanations"]
    wait_for(lambda: shadows(client).get("agree", 0) - before["agree"] == 1)
    assert len(asked) == 1


def test_a_shadow_that_fails_is_counted_and_not_noticed(serve):
    client = serve("counts@1=several_models:Counts,counts@2=several_models:Fails", COUNTS__SHADOW="2").test_client()
    before = collections.Counter(shadows(client))
    assert ask(client, x=7) == 5
    wait_for(lambda: shadows(client).get("failed", 0) - before["failed"] == 1)
    assert client.get("/health").status_code == 200


def test_a_shadow_that_hangs_is_switched_off(serve, caplog):
    client = serve("counts@1=several_models:Counts,counts@2=several_models:Hangs", COUNTS__SHADOW="2",
                   REQUEST_TIMEOUT="1.5").test_client()
    assert ask(client, x=7) == 5
    wait_for(lambda: not any(one["shadow"] for one in client.get("/models").json["models"]))
    assert "the shadow counts@2 exceeded its deadline and is switched off" in caplog.text
    assert ask(client, x=7) == 5


def test_a_model_with_large_batches_does_not_let_others_have_more_than_the_cores(serve):
    app = serve("crowd=several_models:Crowd,wide=several_models:Wide")
    loader = app.extensions["model"]
    assert loader.slots.count == 32
    greenlets = [gevent.spawn(ask, app.test_client(), "/predict", x=i) for i in range(24)]
    assert [greenlet.get(timeout=30) for greenlet in greenlets] == list(range(24))
    assert 1 <= loader.by_key["crowd"].task.most <= loader.plan.slots


def test_a_default_model_that_does_not_fit_stops_the_start_in_one_line(serve):
    with pytest.raises(StartError, match="lite: The model lite does not fit into the memory for models"):
        serve("lite=efficientnet_lite0,counts=several_models:Counts", MODELS_MEMORY="1MiB")


def test_the_shadow_takes_no_slot_while_there_is_work(serve, monkeypatch):
    monkeypatch.setattr("app.model_repository.SHADOW_WAITS_S", 0.2)
    app = serve(VERSIONS, **TWO, COUNTS__SHADOW="2", WORKERS="1")
    client, loader, gate = app.test_client(), app.extensions["model"], threading.Event()
    before = collections.Counter(shadows(client))
    ask(client)  # starts the slots
    wait_for(lambda: shadows(client).get("disagree", 0) - before["disagree"] == 1)
    from app.errors import Deadline
    from app.server.counters import Stages
    busy = gevent.spawn(loader.slots.run, gate.wait, Deadline(20), Stages())
    wait_for(lambda: loader.slots.running)
    assert ask(client) == 1
    wait_for(lambda: shadows(client).get("skipped", 0) - before["skipped"] == 1)
    gate.set()
    busy.get()
    assert shadows(client)["disagree"] - before["disagree"] == 1


def test_a_reload_takes_up_what_is_loaded_and_leaves_what_fails(serve, folder):
    app = serve("m0=several_models:Counts,m1=several_models:Counts,m2=several_models:Counts", LOAD_MODELS="first_use",
                M0__TOP_K="1", M1__TOP_K="2", M2__TOP_K="3")
    client, loader = app.test_client(), app.extensions["model"]
    ask(client, "/models/m1/predict")
    old = dict(loader.by_key)
    loader.load(list(loader.sources.values()))
    assert loads(folder) == ["1", "2", "1", "2"]
    assert loader.by_key["m0"] is not old["m0"]
    assert loader.current is loader.by_key["m0"]
    (folder / "broken-1.txt").touch()
    old = dict(loader.by_key)
    with pytest.raises(Exception, match="no weights"):
        loader.load(list(loader.sources.values()))
    assert loader.by_key["m0"] is old["m0"]
    assert loader.by_key["m1"] is not old["m1"]
    assert [ask(client), ask(client, "/models/m1/predict"), ask(client, "/models/m2/predict")] == [1, 2, 3]


def test_a_switch_under_load_drops_nothing(start_service, folder):
    """python -m app traffic changes the shares in all workers at once: no error, and soon only the other version."""
    service = start_service(MODELS=VERSIONS, **TWO, MODEL_NAME="", WORKERS="2", SPLIT_HEADER="X-User").wait_ready()
    seen, stop = [], threading.Event()

    def load(number):
        with requests.Session() as session:
            while not stop.is_set():
                asked = time.monotonic()
                response = session.post(service.url + "/predict", json={"x": 1}, headers={"X-User": str(number)})
                seen.append((asked, time.monotonic(), response.status_code, response.json().get("predictions")))

    def switch(*arguments):
        done = subprocess.run([sys.executable, "-m", "app", "traffic", "counts", *arguments, "--pid",
                               str(service.process.pid)], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: seen)
        switch("2")
        since = time.monotonic()
        wait_for(lambda: sum(asked > since for asked, *_ in seen) > 3)
        until = time.monotonic()
        switch("1")
        back = time.monotonic()
        wait_for(lambda: sum(asked > back for asked, *_ in seen) > 3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for _, _, status, _ in seen} == {200}
    assert {version for asked, answered, _, version in seen if since < asked and answered < until} == {2}
    assert {version for asked, *_, version in seen if asked > back} == {1}
