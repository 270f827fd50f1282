"""Bundles in MODEL_DIR: found by what they were made of, written whole, kept while they are used, then removed."""
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from app import prepare
from app.config import Settings, StartError
from app.engine import bundle
from app.engine.bundle import Prepared
from app.prepare import bundles, prepared

MANIFEST = bundle.Manifest(
    name="resnet18", task="classification", engine="openvino", network={}, labels=["a", "b"], preprocessing={},
    total_parameters=1, weights={"source": "a test", "sha256": "0", "default": True, "labels_sha256": None},
    versions={}, self_test={"outputs": [0, 1]}, files={},
    features={"kind": None, "size": 0, "reason": "a test"})


@pytest.fixture
def write(tmp_path):
    """write(folder_name, age, **fields): the folder of a bundle that is as many seconds old."""
    def make(folder_name, age, **fields):
        with bundles.writing(tmp_path, folder_name) as folder:
            bundles.save_manifest(folder, dataclasses.replace(MANIFEST, **fields))
        path = tmp_path / "bundles" / folder_name / "manifest.json"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
        return path.parent
    return make


def names(tmp_path):
    return sorted(os.listdir(tmp_path / "bundles"))


def test_of_each_model_and_engine_the_newest_are_kept(tmp_path, write):
    for i in range(bundles.KEPT + 3):
        write(f"model-{i}", age=i)
    write("another-model", age=100, name="resnet50")
    write("another-engine", age=100, engine="torch")
    write("int8", age=100, quantization={"asked": "int8"})
    bundles.prune(tmp_path)
    assert names(tmp_path) == ["another-engine", "another-model", "int8",
                               *(f"model-{i}" for i in range(bundles.KEPT))]


def test_what_broken_off_exports_left_behind_is_removed(tmp_path, write):
    write("model", age=0)
    (tmp_path / "bundles/.new-abc/deep").mkdir(parents=True)
    (tmp_path / "bundles/.new-abc/deep/model.bin").write_bytes(bytes(10))
    (tmp_path / "bundles/.new-def").mkdir()
    bundles.prune(tmp_path)
    assert names(tmp_path) == ["model"]


def test_a_bundle_that_another_process_holds_is_kept_until_that_ends(tmp_path, write):
    for i in range(bundles.KEPT):
        write(f"new-{i}", age=i)
    held = write("held", age=100)
    code = ("import sys\nfrom pathlib import Path\nfrom app.prepare.bundles import hold\n"
            "held = hold(Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=ROOT) as holder:
        assert holder.stdout.readline() == b"held\n"
        with bundles.hold(held):  # any number may
            pass
        bundles.prune(tmp_path)
        assert held.exists()
        holder.stdin.close()
        holder.wait(10)
    bundles.prune(tmp_path)
    assert names(tmp_path) == [f"new-{i}" for i in range(bundles.KEPT)]
    assert bundles.hold(held) is None


def test_a_bundle_appears_when_it_is_whole(tmp_path, write):
    write("model", age=0, labels=["old"])
    with contextlib.suppress(KeyError), bundles.writing(tmp_path, "model") as folder:
        bundles.save_manifest(folder, MANIFEST)
        raise KeyError
    assert (names(tmp_path), bundle.read(tmp_path / "bundles/model").labels) == (["model"], ["old"])
    with bundles.writing(tmp_path, "model") as folder:
        bundles.save_manifest(folder, MANIFEST)
        assert bundle.read(tmp_path / "bundles/model").labels == ["old"]
    assert (names(tmp_path), bundle.read(tmp_path / "bundles/model").labels) == (["model"], ["a", "b"])


def test_a_bundle_for_another_limit_inherits_the_temperature(tmp_path, write):
    for name, age in (("model-int8-a", 10), ("model-int8-b", 5), ("model", 0), ("model-auto-a", 0)):
        path = write(name, age=0) / "calibration.json"
        path.write_text(name)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    with bundles.writing(tmp_path, "model-int8-c", "model-int8-*") as folder:
        bundles.save_manifest(folder, MANIFEST)
    assert (tmp_path / "bundles/model-int8-c/calibration.json").read_text() == "model-int8-b"


def test_the_newest_bundle_that_fits_is_found(tmp_path, write):
    settings = Settings.parse({"MODEL_NAME": "resnet18", "MODEL_DIR": str(tmp_path)})
    assert bundles.find(settings, "resnet18", "openvino") is None
    write("old", age=10)
    new = write("new", age=5)
    write("of another version", age=0, versions={"torch": "0.0.1"})
    write("of weights of the user's", age=0, weights={**MANIFEST.weights, "default": False})
    write("of labels of the user's", age=0, weights={**MANIFEST.weights, "labels_sha256": "1"})
    write("of a later format", age=0, format=bundle.FORMAT + 1)
    assert bundles.find(settings, "resnet18", "openvino") == new
    assert bundles.find(settings, "resnet18", "torch") is None


@pytest.fixture
def elsewhere(checkpoint, tmp_path, monkeypatch):
    """Settings whose paths are relative to tmp_path, in a process that has gone to another folder since."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").symlink_to(checkpoint("mobilenet_v2", num_classes=3))
    (tmp_path / "labels.txt").write_text("cat\ndog\nfish\n", encoding="utf-8")
    settings = Settings.parse({"MODEL_NAME": "mobilenet_v2", "MODEL_PATH": "weights.pt", "LABELS_PATH": "labels.txt",
                               "MODEL_DIR": "models", "ENGINE": "torch", "DEVICE": "cpu"})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    return settings


def test_relative_paths_mean_the_same_from_another_folder(elsewhere, tmp_path):
    made, = prepared(elsewhere, "torch")
    assert made.folder.parent == tmp_path / "models/bundles"
    assert bundles.verify(made.folder).labels == ["cat", "dog", "fish"]
    assert prepared(elsewhere, "torch") == [made]
    assert os.listdir(tmp_path / "other") == []


def test_a_crop_that_the_network_cannot_take_stops_the_start_with_one_line(checkpoint, tmp_path):
    settings = Settings.parse({"MODEL_NAME": "squeezenet1_1", "MODEL_PATH": str(checkpoint("squeezenet1_1")),
                               "PREPROCESSING": "crop=10", "MODEL_DIR": str(tmp_path)})
    with pytest.raises(prepare.PrepareError, match=r"cannot be exported for pictures of 10 × 10 pixels: "):
        prepare.make(settings, "openvino")
    assert list(tmp_path.glob("bundles/*")) == []


@pytest.mark.parametrize(("variables", "message"), [
    ({"MODEL_NAME": "resnet51"}, "MODEL_NAME 'resnet51' is unknown"),
    ({"MODEL_PATH": "{cut}"}, "cannot be read as a checkpoint"),
    ({"MODEL_PATH": "{cut}", "MODEL_FALLBACK": "efficientnet_lite0"}, "cannot be read as a checkpoint"),
    ({"MODEL_PATH": "{other}"}, "does not fit resnet50"),
    ({"WEIGHTS_MIRROR": "http://127.0.0.1:9"}, "the weights of resnet50 are not available"),
])
def test_what_cannot_be_made_is_said_in_one_line(checkpoint, tmp_path, variables, message):
    other = checkpoint("squeezenet1_1")
    (tmp_path / "cut.pt").write_bytes(other.read_bytes()[:1_000_000])
    variables = {k: v.format(cut=tmp_path / "cut.pt", other=other) for k, v in variables.items()}
    settings = Settings.parse({"MODEL_NAME": "resnet50", "MODEL_DIR": str(tmp_path / "models"), **variables})
    with pytest.raises(StartError) as e:
        prepare.make(settings, "openvino")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert list(tmp_path.glob("models/bundles/*")) == []


@pytest.fixture
def three_models(elsewhere, tmp_path):
    """variables of three models: two versions of a network, and a class of one's own."""
    (tmp_path / "other.txt").write_text("ant\nbee\nfly\n", encoding="utf-8")
    return {"MODELS": "cats@1=mobilenet_v2,iris=app.tasks.own:OwnTask,cats@2=mobilenet_v2", "ENGINE": "torch",
            "MODEL_DIR": str(tmp_path / "models"), "CATS__MODEL_PATH": str(tmp_path / "weights.pt"), "DEVICE": "cpu",
            "CATS__1__LABELS_PATH": str(tmp_path / "labels.txt"), "CATS__2__LABELS_PATH": str(tmp_path / "other.txt")}


def test_all_that_is_missing_is_made_by_one_process_and_found_the_next_time(three_models, monkeypatch):
    processes, start_making = [], prepare.start_making
    monkeypatch.setattr(prepare, "start_making", lambda *a: processes.append(start_making(*a)) or processes[-1])
    settings = Settings.parse(three_models)
    made = prepared(settings, "torch")
    assert [one.key for one in made] == ["cats@1", "iris", "cats@2"]
    assert [bundles.verify(one.folder).labels for one in made if one.folder] == [["cat", "dog", "fish"],
                                                                                ["ant", "bee", "fly"]]
    assert (made[1].folder, made[1].own) == (None, "app.tasks.own:OwnTask")  # workers import it
    assert len(processes) == 1
    again = prepared(settings, "torch")
    assert [one.folder for one in again] == [one.folder for one in made]
    assert again[1].token != made[1].token
    assert len(processes) == 1
    shutil.rmtree(made[2].folder)
    assert [one.folder for one in prepared(settings, "torch")] == [one.folder for one in made]
    assert len(processes) == 2


def test_making_one_model_does_not_remove_another_of_the_same_service(three_models, monkeypatch):
    monkeypatch.setattr(bundles, "KEPT", 1)
    made = prepare.make(Settings.parse(three_models), "torch")
    assert [one.folder.exists() for one in made if one.folder] == [True, True]


@pytest.mark.parametrize(("text", "kept"), [(None, False), ("no checkpoint", True)])
def test_a_problem_of_one_of_several_models_names_it(three_models, tmp_path, text, kept):
    path = tmp_path / "broken.pt"
    if text:
        path.write_text(text)
    settings = Settings.parse(three_models | {"CATS__2__MODEL_PATH": str(path)})
    with pytest.raises(prepare.PrepareError, match=r"^cats@2: (MODEL_PATH )?\S*broken.pt (cannot|is not)"):
        prepared(settings, "torch")
    assert len(list(tmp_path.glob("models/bundles/*"))) == kept


def test_what_is_prepared_survives_the_way_to_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in (Prepared(tmp_path / "a", "why", "cats@1"), Prepared(None, None, "iris", "examples.iris:Iris", "0a")):
        assert Prepared.of(json.loads(json.dumps(one.as_json()))) == one
    assert Prepared.of(Prepared(Path("a")).as_json()).folder == tmp_path / "a"


@pytest.mark.parametrize(("end", "message"), [
    ("os.kill(os.getpid(), 9)", "ended prematurely, killed by signal 9, probably out of memory"),
    ("os.kill(os.getpid(), 15)", "ended prematurely, killed by signal 15"),
    ("os._exit(7)", "ended prematurely, with exit code 7")])
def test_a_preparing_process_that_dies_is_said_to_have(end, message):
    process = subprocess.Popen([sys.executable, "-c", f"import os; {end}"], stdout=subprocess.PIPE)
    with pytest.raises(prepare.PrepareError, match=f"^preparing the model {message}$"):
        prepare.outcome_of(process)


@pytest.mark.parametrize(("error", "message"), [
    (OSError(28, "No space left on device"), "MODEL_DIR .*: No space left on device$"),
    (MemoryError(), "needs more memory than there is$")])
def test_a_full_disk_or_memory_is_said_in_one_line(tmp_path, monkeypatch, error, message):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(bundles, "save_manifest", fail)
    settings = Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(tmp_path), "DEVICE": "cpu",
                               "ENGINE": "torch"})
    with pytest.raises(prepare.PrepareError, match=message):
        prepare.make(settings, "torch")
    assert list(tmp_path.glob("bundles/*")) == []  # hidden ones, too


def test_memory_that_torch_does_not_get_is_not_blamed_on_the_size_of_the_pictures(tmp_path, monkeypatch):
    from app.prepare import export
    def fail(*arguments):
        raise RuntimeError("Couldn't get TorchScript module by tracing.\nDefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(export, "export", fail)
    settings = Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(tmp_path), "DEVICE": "cpu"})
    with pytest.raises(prepare.PrepareError, match="needs more memory than there is$"):
        prepare.make(settings, "openvino")


def test_a_file_that_numpy_cannot_write_in_full_is_named(monkeypatch):
    from app.prepare import export
    monkeypatch.setattr(export, "FULL_BYTES", 2**62)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        export.save(lambda array, path: array.tofile(path), np.zeros(100_000), Path("/dev/full"))


def test_without_torch_a_missing_model_is_not_blamed_on_the_folder(model_dir, app):
    """As in an image without torch: the folder of the models may be read-only, and the name misspelt."""
    code = "import sys; sys.modules['torch'] = None; from app.__main__ import main; sys.exit(main())"
    for folder, meant in (("/proc/models", ""), (model_dir, "; did you mean efficientnet_lite0?")):
        done = subprocess.run([sys.executable, "-c", code, "prepare"], cwd=ROOT, capture_output=True, text=True,
                              check=False, env={**os.environ, "MODEL_DIR": str(folder), "DEVICE": "cpu",
                                                "MODEL_NAME": "efficientnet_lite1"})
        assert done.returncode == 1
        assert done.stderr == (f"error: efficientnet_lite1 is not ready in MODEL_DIR {folder}, and preparing it needs "
                               f"torch, which is not installed here: prepare it where torch is, such as in the image "
                               f"full, and mount that MODEL_DIR here (docs/operations.md){meant}\n")
