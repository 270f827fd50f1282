"""The command line gives the API's answers, for one file and for many; its exit code tells whether all went well."""
import ast
import base64
import contextlib
import csv
import errno
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT, TESTS, encoded, photo, post
from PIL import Image
from videos import pan_over, write

from app import __main__ as command_line
from app import cli, load_model, output
from app.commands import parsed
from app.engine.bundle import installed_versions
from app.tasks import answers


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


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_for_each_file_and_a_column_for_its_error(run, folder, tmp_path):
    code, out, _ = run("predict", folder, tmp_path / "missing.jpg", "--csv", "--frames", "2")
    rows, answers = rows_of(out), [json.loads(line) for line in run("predict", folder, "--json", "--frames",
                                                                     "2")[1].splitlines()]
    assert (code, [row["file"] for row in rows]) == (1, [*names(folder), str(tmp_path / "missing.jpg")])
    for row, answer in zip(rows, answers, strict=False):
        assert {trait: float(row[trait]) for trait in answer["predictions"]} == pytest.approx(answer["predictions"],
                                                                                              abs=1e-5)
        assert (row["face_detected"], row["error"]) == (str(answer["metadata"]["face_detected"]).lower(), "")
    assert rows[-1]["error"].startswith("MISSING_FILE: The file cannot be read")
    assert {*rows[-1].values()} == {rows[-1]["file"], rows[-1]["error"], ""}


def test_csv_of_a_classifier_cannot_be_taken_for_formulas(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "=1+1;x.jpg").write_bytes(encoded(photo("coffee"), "JPEG"))

    code, out, _ = run("predict", "=1+1;x.jpg", "--csv", "--top-k", "2", MODEL_NAME="efficientnet_lite0", MODEL_PATH="")
    assert (code, out.splitlines()[0]) == (
        0, '"file","class","confidence","class_id","class_2","confidence_2","error"')
    row, = rows_of(out)
    assert (row["file"], row["class"], row["class_id"]) == ("./=1+1;x.jpg", "espresso", "967")
    assert (tmp_path / row["file"]).exists()
    assert 0.9 < float(row["confidence"]) < 1
    assert [output.safe_text(text) for text in ("=1", "+1", "-1", "@x", "a-b")] == ["'=1", "'+1", "'-1", "'@x", "a-b"]


def test_control_characters_of_names_do_not_reach_the_terminal(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lite0, name = {"MODEL_NAME": "efficientnet_lite0", "MODEL_PATH": "", "TOP_K": "1"}, "a\x1b[31m\n\u202e.jpg"
    (tmp_path / name).write_bytes(encoded(photo("coffee"), "JPEG"))
    code, out, err = run("predict", name, "b\x1b[2J.jpg", **lite0)
    assert (code, [line.split("  ")[0].strip() for line in out.splitlines()]) == (1, ["file", r"a\x1b[31m\n\u202e.jpg"])
    assert r"b\x1b[2J.jpg: MISSING_FILE: " in err
    assert "\x1b" not in out + err
    assert json.loads(run("predict", name, "--json", **lite0)[1])["file"] == name  # these are exact
    assert rows_of(run("predict", name, "--csv", **lite0)[1])[0]["file"] == name
    code, out, err = run("predict", "none\x1b", "-o", "no\x1b/x", **lite0)
    assert (code, err) == (1, "error: no\\x1b/x cannot be written: No such file or directory\n")


def test_output_goes_to_a_file_in_the_format_of_its_name(run, folder, tmp_path):
    picture, old = folder / "astronaut.png", tmp_path / "old.csv"
    old.write_text("an older, longer text\n" * 100)
    for name, first in (("a.jsonl", '{"file": '), ("a.txt", "file "), ("old.csv", '"file","openness"')):
        code, out, err = run("predict", picture, "--output", tmp_path / name)
        assert (code, out, err) == (0, "", "")
        assert (tmp_path / name).read_text().startswith(first)
        assert str(picture) in (tmp_path / name).read_text()
    assert len(old.read_text().splitlines()) == 2
    text = old.read_text()
    for name in ("old.csv", "new.csv"):  # a model that does not load changes no file, and leaves none
        assert run("predict", picture, "-o", tmp_path / name, MODEL_PATH="/nowhere.pt")[0] == 1
    assert (old.read_text(), (tmp_path / "new.csv").exists()) == (text, False)
    code, _, err = run("predict", picture, "-o", tmp_path / "none/a.csv")
    assert (code, err) == (1, f"error: {tmp_path / 'none/a.csv'} cannot be written: No such file or directory\n")


def test_model_is_one_of_models_or_another_architecture(run, folder, ocean_settings):
    lite0 = {"MODELS": "cats@2=efficientnet_lite0,faces=ocean", "FACES__MODEL_PATH": ocean_settings.model_path,
             "MODEL_PATH": "", "CATS__2__TOP_K": "1"}

    def metadata(*arguments, **variables):
        code, out, err = run("predict", folder / "astronaut.png", "--json", *arguments, **variables)
        assert code == 0, err
        answer = json.loads(out)
        return answer["metadata"]["model"], answer["metadata"].get("version"), len(answer["predictions"]), err
    assert metadata(**lite0) == ("cats", "2", 1, "")
    assert metadata("--model", "cats", **lite0) == ("cats", "2", 1, "")
    assert metadata("--model", "faces", **lite0) == ("faces", None, 5, "")
    assert metadata("--model", "efficientnet_lite0", **lite0) == ("efficientnet_lite0", None, 5, "")
    assert metadata("--model", "efficientnet_lite0", MODELS="", FACES__MODEL_PATH="", CATS__2__TOP_K="",
                    MODEL_PATH=ocean_settings.model_path) == ("efficientnet_lite0", None, 5, (
                        "note: MODEL_PATH belongs to MODEL_NAME ocean, and efficientnet_lite0 does without\n"))
    code, _, err = run("predict", folder, "--model", "Faces", **lite0)
    assert code == 1
    assert err.startswith("error: --model must be a model's name")
    assert err.endswith("; did you mean faces?\n")


def test_a_model_that_cannot_be_downloaded_has_the_fallback_of_make_run(run, folder, model_dir, tmp_path, app):
    (tmp_path / "weights").mkdir()
    (tmp_path / "bundles").symlink_to(model_dir / "bundles")
    (tmp_path / "weights/resnet50.json").write_text(json.dumps({  # or torchvision would be imported for the URL
        "url": "http://127.0.0.1:1/resnet50-11ad3fa6.pth", "source": "a test", "versions": installed_versions(
            "torchvision")}))
    offline = {"MODEL_NAME": "resnet50", "MODEL_PATH": "", "MODEL_DIR": tmp_path}
    code, out, err = run("predict", folder / "deep/coffee.JPG", **offline)
    assert (code, err) == (0, "note: MODEL_FALLBACK efficientnet_lite0 stands in for resnet50: http://127.0.0.1:1/"
                              "resnet50-11ad3fa6.pth cannot be downloaded: [Errno 111] Connection refused\n")
    assert "espresso" in out
    code, out, err = run("predict", folder / "deep/coffee.JPG", MODEL_FALLBACK="", **offline)
    assert (code, out) == (1, "")
    assert err.startswith("error: the weights of resnet50 are not available: ")


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


def test_labels_that_are_unknown_are_reported_and_counted(run, folder, tmp_path):
    lite0, labels = {"MODEL_NAME": "efficientnet_lite0", "MODEL_PATH": ""}, tmp_path / "labels.csv"
    labels.write_text("file,label\ndeep/coffee.JPG,esspresso\n\ndeep/coffee.JPG,espresso\nastronaut.png,1000\n")
    code, out, err = run("evaluate", "--labels", labels, folder, "-o", tmp_path / "rows.csv", **lite0)
    assert (code, out) == (1, "top-1  1.0000\ntop-5  1.0000\n1 file, 2 more with unknown labels\n")
    neither = "is neither a class name nor a class_id of efficientnet_lite0"
    assert err == (f"line 2 of {labels}, deep/coffee.JPG: 'esspresso' {neither}; did you mean espresso?\n"
                   f"line 5 of {labels}, astronaut.png: '1000' {neither}\n")
    row, = rows_of((tmp_path / "rows.csv").read_text())
    assert (row["label"], row["class"], row["class_id"]) == ("espresso", "espresso", "967")
    labels.write_text("file,label\ndeep/coffee.JPG,esspresso\nastronaut.png,1000\n")
    code, out, err = run("evaluate", "--labels", labels, folder, **lite0)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: none of the 2 labels can be used: line 2 of {labels}, deep/coffee.JPG: ")


def test_what_cannot_be_read_in_a_folder_is_not_left_out(tmp_path, monkeypatch):
    """A folder that cannot be opened, and one whose files can only be listed; the tests run as root, who may all."""
    for name in ("a.jpg", "b/c.jpg", "listed/d.jpg", "locked/e.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to("..")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    open_folder, look_at = os.scandir, type(tmp_path).is_file

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_folder(path)

    def is_file(path):
        if path.parent.name == "listed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return look_at(path)
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(type(tmp_path), "is_file", is_file)
    found = [str(path.relative_to(tmp_path)) for path in cli.find_files([tmp_path], ("picture",))]
    assert found == ["a.jpg", "b/c.jpg", "listed/d.jpg", "locked"]


def test_a_suggestion_is_only_looked_for_where_it_is_shown(monkeypatch, capsys):
    """Among 1,000 names, one takes 10 ms: those of 50,000 unknown labels took a quarter of an hour."""
    looked = []
    monkeypatch.setattr("app.suggestions.nearest", lambda word, known: looked.append(word))
    kind = answers.Classes(types.SimpleNamespace(labels=["cat", "dog"], name="net"))
    rows = [(i, ["a.jpg", "cat" if i == 50 else f"unknown {i}"]) for i in range(100)]
    labelled, unknown = cli.read_labels(kind, ["file", "label"], rows, "labels.csv")
    assert (labelled, unknown, len(looked)) == ([("a.jpg", 0)], 99, cli.MOST_SHOWN)
    assert capsys.readouterr().err.endswith("\nand 79 more labels that cannot be used\n")


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


def test_options_that_a_class_makes_when_it_is_loaded(run, tmp_path, capsys):
    (tmp_path / "hi.txt").write_text("hi")
    own = {"MODEL_NAME": "own_tasks:Voices", "MODEL_PATH": ""}
    code, out, _ = run("predict", "--voice", "ann", tmp_path / "hi.txt", "--times", "2", **own)
    assert (code, out.split()[-2:]) == (0, ['"ann:', 'hihi"'])
    assert run("predict", tmp_path / "hi.txt", "--voice", "bob", **own)[2] == (
        "error: voice must be one of joe, ann, got bob\n")
    with pytest.raises(SystemExit):
        run("predict", tmp_path / "hi.txt", "--vioce", "ann", **own)
    assert "unrecognized arguments: --vioce ann; did you mean --voice?" in capsys.readouterr().err


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


def test_an_old_python_is_told_so(tmp_path):
    main = ROOT / "app/__main__.py"
    ast.parse(main.read_text(), feature_version=(3, 8))
    code = "import runpy, sys; sys.version_info = (3, 9); sys.argv = ['app', 'predict', 'x']; " \
           "runpy.run_module('app', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sys.executable} is older than Python 3.11: run make run first")


@pytest.mark.parametrize(("arguments", "message"), [
    (["predct"], "; did you mean predict?"), (["predict", "a.jpg", "--frmaes", "3"], "; did you mean --frames?"),
    (["reload", "--prt=1"], "unrecognized arguments: --prt=1; did you mean --port?"),
    (["smoke", "localhost", "--timeout", "0"], "argument --timeout: invalid seconds value: '0'\n"),
    (["health", "--colour"], "unrecognized arguments: --colour\n"), (["predict", "a.jpg", "--csv", "--json"],
                                                                      "not allowed with argument --csv")])
def test_a_wrong_command_or_option_gets_a_suggestion(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_ranges_and_examples_that_hold(monkeypatch, capsys):
    commands = re.findall("^    ([a-z]+) ", help_of([], monkeypatch, capsys), re.MULTILINE)
    assert {*commands} == {"predict", "evaluate", "embed", "similar", "prepare", "health", "smoke", "reload", "traffic",
                           "worker", "migrate"}
    for command in commands:
        text = help_of([command], monkeypatch, capsys)
        examples = re.findall(rf"^  python3 -m app ({command}.*)$", text, re.MULTILINE)
        assert examples, command
        for example in examples:
            monkeypatch.setattr(sys, "argv", ["app", *example.split()])
            assert parsed(example.split()).command == command
        if command == "predict":
            assert "[an integer from 1 to 10; default 5]" in " ".join(text.split())
            assert "[an integer from 1 to 32; default 1]" in " ".join(text.split())


def help_of(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app", *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


DOCUMENTATION = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")


def documented():
    """[the words after `python3 -m app`] of each command in docs/command-line.md."""
    return [words.split() for words in re.findall(r"^\$ python3 -m app ([^#>\n]*)", DOCUMENTATION, re.MULTILINE)]


@pytest.fixture
def checkout(tmp_path):
    """A folder with app/, as in a fresh clone, and a Python that has no packages."""
    for name in ("app", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def python3(*arguments, **variables):
        return subprocess.run([tmp_path / "bare/bin/python3", "-m", "app", *arguments], cwd=tmp_path, text=True,
                              capture_output=True, check=False, timeout=120, env={**environment, **variables})
    return python3


def test_any_python_goes_on_in_the_virtual_environment(checkout, tmp_path, settings, app):
    example = documented()[0]
    done = checkout(*example)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: \w+ is not installed for {tmp_path}/bare/bin/python3: run make run first, or install "
                        r"what is missing with pip install -r requirements.txt\n", done.stderr)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    done = checkout(*example, MODEL_NAME="efficientnet_lite0", MODEL_DIR=str(settings.model_dir), DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"$ python3 -m app {' '.join(example)}\n{done.stdout}```" in DOCUMENTATION


def test_documented_commands_exist(monkeypatch):
    commands = documented()
    assert {words[0] for words in commands} >= {"predict", "evaluate", "embed", "similar", "prepare", "health", "smoke",
                                                "reload", "traffic"}
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["app", *words])
        assert parsed(words).command == words[0]


@pytest.fixture
def start(settings, app):
    """start(*arguments, variables={}): `python -m app` for the model with real weights, in a process group of its own.
    """
    started = []

    def start(*arguments, closing=None, **more):
        def before():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have what they start in the background ignore it
            if closing:
                os.close(closing)
        variables = more.pop("variables", {})
        started.append(subprocess.Popen(
            [sys.executable, "-m", "app", *map(str, arguments)], cwd=ROOT, start_new_session=True, **{
                "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}, text=True, preexec_fn=before, env={
                **os.environ, "MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(settings.model_dir), "DEVICE": "cpu",
                "PYTHONUNBUFFERED": "1", **variables}))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_predictions_in_one_line(start, tmp_path):
    (tmp_path / "0.mp4").write_bytes(write(pan_over(np.asarray(photo("astronaut")), 20, 360, 300)))
    for i in range(1, 2000):
        (tmp_path / f"{i}.jpg").symlink_to(TESTS / "images/chelsea.jpg")
    process = start("predict", tmp_path)
    for _ in range(3):
        assert process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does it
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_ctrl_c_ends_preparing_in_one_line(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mirror:  # says nothing
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights/resnet50.json").write_text(json.dumps({
            "url": "/resnet50-11ad3fa6.pth", "source": "a test", "versions": installed_versions("torchvision")}))
        mirror.settimeout(60)
        process = start("predict", TESTS / "images/chelsea.jpg", variables={
            "MODEL_NAME": "resnet50", "MODEL_DIR": str(tmp_path), "MODEL_PATH": "",
            "WEIGHTS_MIRROR": f"http://127.0.0.1:{mirror.getsockname()[1]}/a"})
        with mirror.accept()[0]:
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    logged, *rest = err.splitlines()
    assert "preparing resnet50: getting the weights" in logged
    assert rest == ["interrupted"]


def test_a_reader_that_leaves_ends_predictions_silently(start, tmp_path):
    for i in range(500):
        (tmp_path / f"{i}.jpg").symlink_to(TESTS / "images/chelsea.jpg")
    process = start("predict", tmp_path, "--csv")
    assert process.stdout.readline().startswith('"file"')
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (1, "")


def test_output_that_cannot_be_written_is_said_in_one_line(start):
    picture = TESTS / "images/chelsea.jpg"
    with open("/dev/full", "w") as full:
        running = [start("predict", picture, stdout=full, variables={"PYTHONUNBUFFERED": ""}),
                   start("predict", picture, "--output", "/dev/full")]
        for process in running:
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (1, "error: the output cannot be written: No space left on device\n")


def test_closed_streams_change_nothing(start, tmp_path):
    picture = str(TESTS / "images/chelsea.jpg")
    first = start("predict", picture, "--output", tmp_path / "a.csv", stdout=None, closing=1)
    second = start("predict", picture, "nothing.jpg", "--json", stderr=None, closing=2)
    out, _ = second.communicate(timeout=60)
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["success", "error"]
    assert (first.wait(60), second.returncode) == (0, 1)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_progress_is_shown_on_a_terminal_alone(start, tmp_path):
    pictures = [TESTS / "images/chelsea.jpg"] * 3
    ours, theirs = pty.openpty()  # of unknown size, as serial lines are
    process = start("predict", *pictures, "--json", stderr=theirs)
    os.close(theirs)
    out, seen = process.stdout.read(), b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert process.wait() == 0
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["success"] * 3
    assert "0/3" in seen.decode()
    assert "file/s" in seen.decode()
    process = start("predict", *pictures)
    out, err = process.communicate()
    assert (err, "file/s" in out) == ("", False)


def test_as_a_program(folder, ocean_settings):
    environment = {**os.environ, "MODEL_NAME": "ocean", "MODEL_PATH": str(ocean_settings.model_path), "DEVICE": "cpu",
                   "MODEL_DIR": str(ocean_settings.model_dir)}
    done = subprocess.run([sys.executable, "-m", "app", "predict", "--json", str(folder / "astronaut.png"), __file__],
                          cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["success", "error"]
