"""The example Iris: scikit-learn's own answers over HTTP and on the command line."""
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import skops.io
from conftest import ROOT, Service, need
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from app import load_model
from app.config import Settings, StartError

pytestmark = pytest.mark.slow  # make test-examples

FLOWERS, SPECIES = load_iris(return_X_y=True)  # (150, 4) in cm, (150,) 0..2
FLOWERS, SPECIES = FLOWERS.tolist(), load_iris().target_names[SPECIES]
SETOSA, VIRGINICA = FLOWERS[0], FLOWERS[-1]
MODEL = {"MODEL_NAME": "examples.iris:Iris", "DEVICE": "cpu"}


def run_module(*arguments, **variables):
    return subprocess.run([sys.executable, "-W", "error", "-m", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, env={**os.environ, **MODEL, **variables})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The file that `python -m examples.iris` writes."""
    path = tmp_path_factory.mktemp("iris") / "new/iris.skops"
    done = run_module("examples.iris", MODEL_PATH=str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return path


@pytest.fixture(scope="module")
def expected(model_path):
    """(150, 3) probabilities, by scikit-learn called directly."""
    return skops.io.load(model_path).predict_proba(FLOWERS)


@pytest.fixture(scope="module")
def iris(tmp_path_factory, model_path):
    running = Service(tmp_path_factory.mktemp("service"), {**MODEL, "MODEL_PATH": str(model_path),
                                                          "MAX_BATCH_FILES": "150"})
    yield running.wait_ready()
    running.kill()


def post(service, text, path="/predict"):
    """POST JSON, as text because requests refuses to write what Python alone takes for a number, such as NaN."""
    return requests.post(service.url + path, data=text, headers={"Content-Type": "application/json"}, timeout=60)


def probabilities(predictions):
    """(N, 3), after a check that each class is the most probable one."""
    for prediction in predictions:
        assert list(prediction) == ["class", "probabilities"]
        assert list(prediction["probabilities"]) == ["setosa", "versicolor", "virginica"]
        assert prediction["class"] == max(prediction["probabilities"], key=prediction["probabilities"].get)
    return np.array([list(prediction["probabilities"].values()) for prediction in predictions])


def test_training_writes_the_model_that_scikit_learn_trains(model_path, expected):
    assert skops.io.get_untrusted_types(file=model_path) == []
    again = LogisticRegression(max_iter=1000).fit(FLOWERS, SPECIES)
    np.testing.assert_allclose(expected, again.predict_proba(FLOWERS), atol=1e-6)
    assert (again.predict(FLOWERS) == SPECIES).mean() > 0.97


def test_training_and_serving_agree_on_the_default_path(tmp_path, start_service):
    done = run_module("examples.iris", MODEL_DIR=str(tmp_path / "models"), MODEL_PATH="")
    assert done.stdout == f"{tmp_path}/models/iris.skops: accuracy 0.973 in 5-fold cross-validation\n"
    service = start_service(**MODEL, MODEL_DIR=str(tmp_path / "models")).wait_ready()
    assert post(service, json.dumps({"features": SETOSA})).json()["predictions"]["class"] == "setosa"


def test_every_flower_gets_scikit_learns_answer(iris, expected):
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda flower: post(iris, json.dumps({"features": flower})), FLOWERS))
    assert {answer.status_code for answer in answers} == {200}
    np.testing.assert_allclose(probabilities([answer.json()["predictions"] for answer in answers]), expected,
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 150])
def test_instances_are_answered_in_order(iris, expected, count):
    answer = post(iris, json.dumps({"instances": FLOWERS[:count]}))
    assert answer.status_code == 200
    np.testing.assert_allclose(probabilities(answer.json()["predictions"]), expected[:count], rtol=0, atol=1e-12)


def test_instances_may_name_their_field(iris, expected):
    answer = post(iris, json.dumps({"instances": [{"features": SETOSA}, VIRGINICA]}))
    np.testing.assert_allclose(probabilities(answer.json()["predictions"]), expected[[0, -1]], rtol=0, atol=1e-12)


def test_answer_has_the_usual_form(iris):
    answer = post(iris, json.dumps({"features": [6, 3, 5, 2]})).json()  # whole numbers are numbers too
    assert answer["status"] == "success"
    assert answer["predictions"]["class"] == "virginica"
    assert (answer["metadata"]["model"], answer["metadata"]["device"]) == ("iris", "cpu")


FOUR = "must be a list of 4 numbers from 0 to 100, got "
BAD = {
    "[5.1, 3.5, 1.4]": FOUR + "[5.1, 3.5, 1.4]",
    "[5.1, 3.5, 1.4, 0.2, 7]": FOUR + "[5.1, 3.5, 1.4, 0.2, 7]",
    "[]": FOUR + "[]",
    '[5.1, 3.5, 1.4, "0.2"]': FOUR + "[5.1, 3.5, 1.4, '0.2']",
    "[5.1, 3.5, 1.4, true]": FOUR + "[5.1, 3.5, 1.4, True]",
    "[5.1, 3.5, 1.4, null]": FOUR + "[5.1, 3.5, 1.4, None]",
    f"[5.1, 3.5, 1.4, 1{'0' * 400}]": FOUR + "[5.1, 3.5, 1.4, 10000000000",
    "[5.1, 3.5, 1.4, -0.2]": FOUR + "[5.1, 3.5, 1.4, -0.2]",
    "[5.1, 3.5, 1.4, 100.1]": FOUR + "[5.1, 3.5, 1.4, 100.1]",
    "[[5.1, 3.5, 1.4, 0.2]]": FOUR + "[[5.1, 3.5, 1.4, 0.2]]",
    "[5.1, 3.5, 1.4, [0.2]]": FOUR + "[5.1, 3.5, 1.4, [0.2]]",
    '"5.1, 3.5, 1.4, 0.2"': FOUR + "'5.1, 3.5, 1.4, 0.2'",
    '"5134"': FOUR + "'5134'",
    "5.1": FOUR + "5.1",
    "true": FOUR + "True",
    '{"a": 1, "b": 2, "c": 3, "d": 4}': FOUR + "{'a': 1, 'b': 2, 'c': 3, 'd': 4}",
}


@pytest.mark.parametrize("value", BAD)
def test_bad_features(iris, value):
    answer = post(iris, f'{{"features": {value}}}')
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_PARAMETER")
    assert answer.json()["message"].startswith("features " + BAD[value])
    assert len(answer.json()["message"]) < 200


@pytest.mark.parametrize("value", BAD)
def test_bad_instance(iris, value):
    answer = post(iris, f'{{"instances": [{SETOSA}, {value}, {VIRGINICA}]}}')
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_PARAMETER")
    assert answer.json()["message"].startswith("instances[1] " + BAD[value])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_json_has_no_number_for(iris, number):
    answer = post(iris, f'{{"features": [5.1, 3.5, 1.4, {number}]}}')
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_JSON")


def test_readme_shows_the_real_output(iris):
    section = (ROOT / "examples/README.md").read_text(encoding="utf-8").partition("## Iris")[2].partition("\n## ")[0]
    examples = re.findall(r"```console\n\$ (curl [^\n]*)\n```\n```json\n(.*?)```", section, re.S)
    assert len(examples) == 2
    for command, shown in examples:
        command = command.replace("curl", need("curl") + " -s").replace("http://127.0.0.1:5000", iris.url)
        real = json.loads(subprocess.run(command, shell=True, check=True, capture_output=True).stdout)
        shown = json.loads(shown)
        if "predictions" in shown:
            np.testing.assert_allclose(*[probabilities([answer.pop("predictions")]) for answer in (real, shown)],
                                       rtol=1e-6)
            for answer in (real, shown):
                del answer["metadata"]["inference_time"]
                answer["metadata"]["timings_ms"] = list(answer["metadata"]["timings_ms"])
        assert real | {"request_id": "…"} == shown | {"request_id": "…"}
    lines = len((ROOT / "examples/iris.py").read_text().splitlines())
    assert f"[iris.py](iris.py) ({lines} lines)" in section


def test_batch_gives_each_flower_its_own_result(iris, expected):
    body = post(iris, f'{{"instances": [{SETOSA}, [1, 2], {VIRGINICA}]}}', path="/predict/batch").json()
    first, bad, last = body["results"]
    assert (body["count"], body["failed"]) == (3, 1)
    np.testing.assert_allclose(probabilities([first["predictions"], last["predictions"]]), expected[[0, -1]],
                               rtol=0, atol=1e-12)
    assert (bad["error"], bad["message"]) == ("INVALID_PARAMETER", "instances[1] " + FOUR + "[1, 2]")


def flower_files(folder):
    """Write each tenth flower to a file, and labels.csv; returns its rows (file, species)."""
    rows = [(f"{i:03}.json", SPECIES[i]) for i in range(0, 150, 10)]
    for name, _ in rows:
        (folder / name).write_text(json.dumps(FLOWERS[int(name[:3])]))
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    return rows


def test_command_line_predicts_files(tmp_path, model_path, expected):
    rows = flower_files(tmp_path)
    (tmp_path / "200.json").write_text('{"features": [6, 3, 5, NaN]}')
    done = run_module("app", "predict", tmp_path, "--json", MODEL_PATH=str(model_path))
    *answers, bad = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["file"] for answer in answers] == [str(tmp_path / name) for name, _ in rows]
    np.testing.assert_allclose(probabilities([answer["predictions"] for answer in answers]), expected[::10],
                               rtol=0, atol=1e-12)
    assert (done.returncode, bad["error"]) == (1, "INVALID_PARAMETER")
    assert bad["message"].endswith(FOUR + "[6, 3, 5, nan]")


def test_command_line_evaluates_labels(tmp_path, model_path):
    rows = flower_files(tmp_path)
    right = sum(skops.io.load(model_path).predict(FLOWERS[::10]) == [label for _, label in rows])
    with open(tmp_path / "labels.csv", "a") as file:
        file.write("000.json,virginica\n")  # which is not true
    done = run_module("app", "evaluate", "--labels", tmp_path / "labels.csv", tmp_path, MODEL_PATH=str(model_path))
    assert (done.returncode, done.stdout) == (0, f"equal  {right / 16:.4f}\n16 files\n")


def cut_off(path, good):
    path.write_bytes(good[:len(good) // 2])


def flipped_bit(path, good):
    at = good.index(b"NUMPY") + 200
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])


def code_in_it(path, good):
    skops.io.dump(make_pipeline(FunctionTransformer(flipped_bit), LogisticRegression()), path)


DAMAGED = " is not a model that skops can load: "
BAD_FILES = {
    "missing": (lambda path, good: None, " does not exist: python -m examples.iris trains the model and writes it"),
    "folder": (lambda path, good: path.mkdir(), DAMAGED),
    "empty": (lambda path, good: path.write_bytes(b""), DAMAGED + "File is not a zip file"),
    "text": (lambda path, good: path.write_text("5.1,3.5,1.4,0.2\n"), DAMAGED + "File is not a zip file"),
    "cut off": (cut_off, DAMAGED + "File is not a zip file"),
    "flipped bit": (flipped_bit, DAMAGED + "Bad CRC-32"),
    "code": (code_in_it, DAMAGED + "Untrusted types found in the file: ['test_iris.flipped_bit']"),
    "forest": (lambda path, good: skops.io.dump(RandomForestClassifier(2).fit(FLOWERS, SPECIES), path),
               DAMAGED + "Untrusted types found in the file: ['sklearn.tree._tree.Tree']."),
    "no estimator": (lambda path, good: skops.io.dump([1, 2], path), " holds a list of 0 features"),
    "regression": (lambda path, good: skops.io.dump(LinearRegression().fit(FLOWERS, np.arange(150)), path),
                   " holds a LinearRegression of 4 features, expected a LogisticRegression of 4"),
    "not trained": (lambda path, good: skops.io.dump(LogisticRegression(), path),
                    " holds a LogisticRegression of 0 features, expected a LogisticRegression of 4"),
    "two features": (lambda path, good: skops.io.dump(
        LogisticRegression().fit(np.array(FLOWERS)[:, :2], SPECIES), path), " holds a LogisticRegression of 2 feat"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_model_file_is_refused_with_one_line(tmp_path, model_path, kind):
    write, message = BAD_FILES[kind]
    path = tmp_path / "bad.skops"
    write(path, model_path.read_bytes())
    with pytest.raises(StartError) as failed:
        load_model(Settings.parse({**MODEL, "MODEL_PATH": str(path)}))
    assert str(failed.value).startswith(f"{path}{message}")
    assert "\n" not in str(failed.value)


def test_bad_model_file_stops_the_start(start_service, tmp_path):
    service = start_service(**MODEL, MODEL_PATH=str(tmp_path / "new.skops"))
    assert service.process.wait(300) != 0
    assert service.log.count(f"{tmp_path}/new.skops does not exist: python -m examples.iris trains the model") == 1
    assert "Traceback" not in service.log
