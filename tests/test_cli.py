"""The command line gives the API's answers, for one file and for many; its exit code tells whether all went well."""
import base64
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, encoded, photo, post
from PIL import Image
from videos import pan_over, write

from app import __main__ as command_line
from app import cli, load_model


@pytest.fixture(scope="module")
def load_once():
    """load_model, whose answer for equal settings is kept: a program of its own loads it each time."""
    loaders = {}

    def load(settings):
        if repr(settings) not in loaders:
            loaders[repr(settings)] = load_model(settings)
        return loaders[repr(settings)]
    return load


@pytest.fixture
def run(command, ocean_settings, load_once, monkeypatch):
    """run(*arguments, **variables): `command` for ocean."""
    monkeypatch.setattr(cli, "load_model", load_once)
    return lambda *arguments, **variables: command(arguments, {
        "MODEL_NAME": "ocean", "MODEL_PATH": ocean_settings.model_path, "MODEL_DIR": ocean_settings.model_dir,
        **variables})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "deep").mkdir()
    (folder / "astronaut.png").write_bytes(encoded(photo("astronaut")))
    (folder / "deep/clip.mp4").write_bytes(write(pan_over(np.asarray(photo("astronaut")), 20, 360, 300)))
    (folder / "deep/coffee.JPG").write_bytes(encoded(photo("coffee"), "JPEG"))
    (folder / "notes.txt").write_text("no picture, and not named as one")
    return folder


def names(folder):
    return [str(folder / name) for name in ("astronaut.png", "deep/clip.mp4", "deep/coffee.JPG")]


def test_answers_of_a_folder_are_those_of_the_api(run, folder, ocean_app):
    code, out, _ = run("predict", folder, "--json", "--frames", "3", "--tta", "false")
    answers = [json.loads(line) for line in out.splitlines()]
    assert (code, [answer["file"] for answer in answers]) == (0, names(folder))
    for answer in answers:
        with open(answer["file"], "rb") as file:
            api = post(ocean_app.test_client(), file.read(), frames=3, tta="false").json
        assert answer["predictions"] == pytest.approx(api["predictions"], abs=2e-5)
        for member in ("face_detected", "method", "tta", "backbone", "media_type"):
            assert answer["metadata"][member] == api["metadata"][member]
        assert [f["face_box"] for f in answer["metadata"]["frames"]] == [
            f["face_box"] for f in api["metadata"]["frames"]]


def test_table_for_people(run, folder):
    code, out, _ = run("predict", folder)
    header, *rows = [line.split() for line in out.splitlines()]
    assert (code, header) == (0, ["file", "openness", "conscientiousness", "extraversion", "agreeableness",
                                  "neuroticism"])
    assert [row[0] for row in rows] == names(folder)
    assert all(-3 < float(value) < 3 for row in rows for value in row[1:])


def test_classifiers_too(run, folder, settings):
    code, out, _ = run("predict", folder / "deep/coffee.JPG", "--top-k", "2", MODEL_NAME="efficientnet_lite0",
                       MODEL_PATH="")
    assert code == 0
    assert "espresso 9" in out.splitlines()[1]
    assert out.count("%") == 2


def test_one_bad_file_is_reported_and_the_others_answered(run, folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xffhello")
    code, out, err = run("predict", tmp_path / "broken.jpg", folder / "astronaut.png", tmp_path / "missing.jpg")
    assert code == 1
    assert len(out.splitlines()) == 2
    assert "broken.jpg: INVALID_IMAGE: " in err
    assert "missing.jpg: MISSING_FILE: " in err
    assert "2 of 3 files failed" in err
    code, out, _ = run("predict", "--json", "--method", "face", folder / "deep/coffee.JPG")
    assert (code, json.loads(out)["error"]) == (1, "NO_FACE_FOUND")


def test_save_crop_shows_what_the_model_saw(run, folder, tmp_path):
    run("predict", folder, "--frames", "2", "--save-crop", tmp_path / "crops")
    crops = sorted(path.name.rpartition("files")[2][2:] for path in (tmp_path / "crops").iterdir())
    assert crops == ["astronaut.png-0.png", "deep_clip.mp4-15.png", "deep_clip.mp4-5.png", "deep_coffee.JPG-0.png"]
    (path,) = (tmp_path / "crops").glob("*astronaut.png-0.png")
    expected = photo("astronaut").crop((160, 49, 288, 177)).resize((268, 268), Image.Resampling.BILINEAR).crop(
        (6, 6, 262, 262))
    with Image.open(path) as crop:
        assert np.array_equal(np.asarray(crop), np.asarray(expected))


def test_save_overlay_shows_where_the_model_looked(run, folder, tmp_path):
    code, _, err = run("predict", folder / "deep/clip.mp4", "--frames", "2", "--explain-class", "openness",
                       "--save-overlay", tmp_path / "a")
    assert (code, err) == (0, "")
    names = sorted(path.name.rpartition("deep_")[2] for path in (tmp_path / "a").iterdir())
    assert names == ["clip.mp4-15-openness.png", "clip.mp4-5-openness.png"]
    code, out, err = run("predict", folder / "astronaut.png", "--save-overlay", tmp_path / "b", "--json",
                         MODEL_NAME="efficientnet_lite0", MODEL_PATH="")
    (path,) = (tmp_path / "b").iterdir()
    answer = json.loads(out)
    assert path.name.endswith("astronaut.png-" + answer["predictions"][0]["class"].replace(" ", "_") + ".png")
    with Image.open(io.BytesIO(base64.b64decode(answer["metadata"]["explanations"][0]["overlay"]))) as image:
        strength = np.asarray(image.convert("RGBA"))[..., 3]
    with Image.open(path) as image:
        changed = np.abs(np.asarray(image).astype(int) - np.asarray(photo("astronaut").convert("RGB"))).max(axis=2)
    assert changed[strength == 0].max() == 0
    assert changed[strength > 200].mean() > 30


def test_the_table_says_where_maps_and_embeddings_are(run, folder):
    lite0 = {"MODEL_NAME": "efficientnet_lite0", "MODEL_PATH": ""}
    for option in ("--explain", "--embedding"):
        code, out, err = run("predict", folder / "astronaut.png", option, "true", **lite0)
        assert (code, len(out.splitlines())) == (0, 2)
        assert err.startswith("note: this table shows no maps or embeddings; use --json, or --save-overlay DIR")
    assert run("predict", folder / "astronaut.png", **lite0)[2] == ""


def test_evaluate_offers_what_changes_a_prediction(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app", "evaluate", "--help"])
    with pytest.raises(SystemExit):
        command_line.main()
    out = capsys.readouterr().out
    assert "--top-k" in out
    assert "--report" in out
    assert not {word for word in ("--explain", "--explain-class", "--embedding", "--normalize") if word in out}


def test_evaluate_traits(run, folder, tmp_path):
    _, out, _ = run("predict", "--json", *names(folder)[::2])
    scores = np.array([list(json.loads(line)["predictions"].values()) for line in out.splitlines()])
    (tmp_path / "labels.csv").write_text(
        "clip,neuroticism,openness,agreeableness,extraversion,conscientiousness,age\n"
        "astronaut.png,0.5,0.1,0.4,0.3,0.2,30\ndeep/coffee.JPG,0.9,0.5,0.4,0.7,0.6,3\ngone.jpg,0,0,0,0,0,0\n")
    labels = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.7, 0.4, 0.9]])  # in the checkpoint's order
    code, out, err = run("evaluate", "--labels", tmp_path / "labels.csv", folder, "--json")
    result = json.loads(out)
    expected = 1 - np.abs(scores - labels).mean(0)
    assert list(result["one_minus_mae"].values()) == pytest.approx([*expected, expected.mean()])
    assert list(result["always_the_mean"].values()) == pytest.approx([0.8, 0.8, 0.8, 1, 0.8, 0.84])
    assert (code, result["files"], result["failed"]) == (1, 2, 1)
    assert "gone.jpg: MISSING_FILE" in err
    _, out, _ = run("evaluate", "--labels", tmp_path / "labels.csv", folder)
    assert f"mean               {expected.mean():7.4f}           0.8400" in out


def test_evaluate_classes(run, folder, tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\ndeep/coffee.JPG,espresso\ndeep/coffee.JPG,967\n"
                                         "deep/coffee.JPG,cup\ndeep/coffee.JPG,tabby\n")
    code, out, _ = run("evaluate", "--labels", tmp_path / "labels.csv", folder, "--json", "--top-k", "1",
                       MODEL_NAME="efficientnet_lite0", MODEL_PATH="")
    result = json.loads(out)
    assert (code, result["top_1"], result["files"]) == (0, 0.5, 4)
    assert result["top_5"] == 0.75


@pytest.mark.parametrize(("text", "message"), [
    ("file,openness\na.jpg,0.5\n", "line 2 of"), ("file,label\n", "has no labels"),
    ("a,b\n1\n", "line 2 of"), ("", "cannot be read as CSV")])
def test_wrong_labels_are_refused_in_one_line(run, folder, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    code, out, err = run("evaluate", "--labels", tmp_path / "labels.csv", folder)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--method", "nose"], "method must be one of face, middle, face+middle, got nose"),
    (["--frames", "99"], "frames must be an integer from 1 to 32, got 99")])
def test_bad_options_are_refused_in_one_line(run, folder, arguments, message):
    assert run("predict", folder, *arguments) == (1, "", f"error: {message}\n")


def test_empty_folder_and_missing_checkpoint(run, tmp_path):
    assert run("predict", tmp_path)[2].startswith("error: there is nothing to predict in ")
    code, _, err = run("predict", __file__, MODEL_PATH="")
    assert (code, err) == (1, "error: ocean needs MODEL_PATH, your own checkpoint: there are no published weights "
                              "for it\n")


@pytest.mark.parametrize(("command", "missing", "says"), [
    ("worker", "prometheus_client", "pip install -r requirements.txt -r app/jobs/requirements.txt"),
    ("worker", "celery", "make worker"), ("migrate", "sqlalchemy", "make worker")])
def test_a_python_without_the_packages_is_told_what_to_install(command, missing, says, tmp_path):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['app', {command!r}]; " \
           "runpy.run_module('app', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "HISTORY": "on"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {missing} is not installed for {sys.executable}: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_as_a_program(folder, ocean_settings):
    environment = {**os.environ, "MODEL_NAME": "ocean", "MODEL_PATH": str(ocean_settings.model_path), "DEVICE": "cpu",
                   "MODEL_DIR": str(ocean_settings.model_dir)}
    done = subprocess.run([sys.executable, "-m", "app", "predict", "--json", str(folder / "astronaut.png"), __file__],
                          cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["success", "error"]
