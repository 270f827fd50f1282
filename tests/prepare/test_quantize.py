"""PRECISION=int8 and auto: their cost is measured on other pictures than they were calibrated with, and kept within
ACCURACY_LIMIT; they are served without what made them."""
import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, encoded, photo, post
from PIL import Image

from app import create_app, load_model
from app.config import Settings, StartError
from app.engine import bundle
from app.engine.preprocess import Preprocessing
from app.errors import Deadline
from app.model_loader import ModelError
from app.prepare import bundles, costs, find, make, networks, precision, quantize, samples
from app.prepare.progress import OutOfTime, Progress

PHOTOS = ("chelsea", "coffee")


@pytest.fixture(scope="module", autouse=True)
def few():
    """Few pictures, and only a glance at the speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "COUNTS", {"calibration": 6, "choosing": 6, "held_out": 24})
        patch.setattr(quantize, "RANKED_BY", 2)
        patch.setattr(costs, "ROUNDS", 1)
        patch.setattr(costs, "ROUND_S", 0.01)
        yield


def write_pictures(folder, names=PHOTOS):
    """Each photograph and its quarters."""
    for name in names:
        image = photo(name).convert("RGB")
        w, h = image.size
        boxes = [(0, 0, w, h)] + [(x, y, x + w // 2, y + h // 2) for x in (0, w // 2) for y in (0, h // 2)]
        for i, box in enumerate(boxes):
            (folder / f"{name}{i}.png").write_bytes(encoded(image.crop(box).resize((256, 256))))
    return folder


def made(settings):
    """The manifest of what is made in this process, which has few pictures."""
    done, = make(settings, "openvino")
    return bundle.read(done.folder)


@pytest.fixture(scope="module")
def int8_settings(tmp_path_factory, settings):
    """Of an int8 model that is made; its pictures have a damaged one and a text among them."""
    pytest.importorskip("nncf")
    folder = write_pictures(tmp_path_factory.mktemp("pictures"))
    (folder / "notes.txt").write_text("not a picture")
    (folder / "damaged.jpg").write_bytes(encoded(photo("chelsea"), "JPEG")[:3000])
    found = dataclasses.replace(settings, precision="int8", calibration_dir=folder, accuracy_limit=1.0)
    made(found)
    return found


@pytest.fixture(scope="module")
def int8(int8_settings):
    return load_model(int8_settings)


def test_int8_answers_nearly_as_fp32_and_says_how_nearly(int8, app):
    model, fp32 = int8.current, app.extensions["model"].current
    said = model.info()["quantization"]
    assert (said["asked"], said["chosen"], said["limit"]) == ("int8", "int8", 1.0)
    assert said["pictures"] == {"source": "CALIBRATION_DIR", "held_out": 24,
                                "files": {"calibration": 3, "choosing": 3, "held_out": 4}}
    of_int8 = said["precisions"]["int8"]
    assert of_int8["cost"] == pytest.approx(of_int8["changed"] / 24, abs=1e-5)
    assert 0 < of_int8["mean_change"] <= of_int8["max_change"] < 0.6
    assert of_int8["images_per_second"] > 0
    assert (model.task.engine.precision, fp32.info()["quantization"]) == ("int8", None)
    picture = model.task.preprocessing(photo("coffee").convert("RGB"))[None]  # espresso 0.95: far from any other class
    a, b = (each.task.scores(each.task.engine.infer(picture, Deadline(60), True))[0] for each in (model, fp32))
    assert a.argmax() == b.argmax()
    assert 1e-6 < np.abs(a - b).max() < 0.3


def test_int8_weights_take_a_quarter(int8_settings, app, settings):
    folders = [bundles.find(each, settings.model_name, "openvino") for each in (settings, int8_settings)]
    sizes = [(folder / "model.bin").stat().st_size for folder in folders]
    assert 0.2 < sizes[1] / sizes[0] < 0.3


def test_int8_is_made_once_for_the_same_pictures(int8_settings, tmp_path):
    def found(**changed):
        return bundles.find(dataclasses.replace(int8_settings, **changed), "efficientnet_lite0", "openvino")
    assert found().name.startswith("efficientnet_lite0-579344248a93-openvino-int8-")
    assert found(calibration_dir=write_pictures(tmp_path, ("rocket", "coffee"))) is None
    assert found(calibration_dir=None) == found(calibration_dir=tmp_path / "none") == found()  # baked into an image


def test_a_calibration_dir_that_does_not_exist_is_said(int8_settings, tmp_path, caplog):
    missing = dataclasses.replace(int8_settings, calibration_dir=tmp_path / "none")
    assert find(missing, "openvino", "").folder
    assert f"CALIBRATION_DIR {tmp_path}/none does not exist" in caplog.text
    caplog.clear()
    assert find(int8_settings, "openvino", "").folder
    assert not caplog.text


def test_other_precisions_do_not_get_the_int8_network(int8_settings, app):
    for other in ("fp32", "bf16", "auto"):
        folder = bundles.find(dataclasses.replace(int8_settings, precision=other), "efficientnet_lite0", "openvino")
        assert folder is None if other == "auto" else bundle.read(folder).quantization is None


def test_a_wrong_int8_network_fails_its_self_test(int8_settings):
    model = load_model(int8_settings).current
    task, outputs = model.task, model.task.manifest.self_test["outputs"]
    task.manifest = dataclasses.replace(task.manifest, self_test={"outputs": outputs[1:] + outputs[:1]})
    with pytest.raises(ModelError, match="fails its self-test: the outputs are off"):
        model.self_test()


def test_answers_of_another_int8_network_are_not_taken_for_this_ones(int8_settings, int8, app):
    def identity(loader, digest):
        task = copy.copy(loader.current.task)
        task.manifest = dataclasses.replace(task.manifest, files=task.manifest.files | {"model.bin": digest})
        return task.identity()
    assert identity(int8, "0") != identity(int8, "1")
    fp32 = app.extensions["model"]
    assert identity(fp32, "0") == identity(fp32, "1")  # another export of the same


def test_int8_explains_and_embeds(int8, int8_settings, client):
    answers = [post(each, encoded(photo("chelsea")), explain=True, embedding=True).json["metadata"]
               for each in (create_app(int8_settings, int8).test_client(), client)]
    assert all(answer["explanations"] for answer in answers)
    a, b = (np.array(answer["embedding"]) for answer in answers)
    assert a.shape == (1280,)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9


SERVE = """
import sys
for name in ("torch", "torchvision", "nncf", "skimage"):
    sys.modules[name] = None
from app import load_model
from app.config import Settings
print(load_model(Settings.load("")).current.info()["precision"])
"""


def test_an_int8_network_is_served_without_what_made_it(int8_settings):
    done = subprocess.run([sys.executable, "-c", SERVE], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env={
        **os.environ, "MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(int8_settings.model_dir), "DEVICE": "cpu",
        "PRECISION": "int8", "CALIBRATION_DIR": "/absent", "ACCURACY_LIMIT": "1"})
    assert done.stdout == "int8\n"


@pytest.mark.parametrize(("variables", "message"), [
    ({"CALIBRATION_DIR": "/nowhere"}, "CALIBRATION_DIR /nowhere has 0 pictures that can be used; at least 10 are"),
    ({"ENGINE": "torch"}, "PRECISION is int8, which needs ENGINE=openvino"),
    ({"without": "nncf"}, "PRECISION is int8, which needs nncf to prepare the model: pip install -r app/prepare/"),
    ({"without": "skimage"}, "PRECISION is int8, which needs scikit-image to prepare the model: pip install -r ")])
def test_int8_is_refused_in_one_line_where_it_cannot_be_had(tmp_path, monkeypatch, variables, message):
    if hidden := variables.pop("without", None):
        monkeypatch.setitem(sys.modules, hidden, None)
    variables = {"MODEL_NAME": "efficientnet_lite0", "PRECISION": "int8", "MODEL_DIR": str(tmp_path), **variables}
    settings = Settings.parse(variables)
    with pytest.raises(StartError, match=message) as e:
        make(settings, settings.engine.replace("auto", "openvino"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("of_users", [False, True])
def test_what_is_measured_on_was_neither_calibrated_with_nor_chosen_by(settings, tmp_path, of_users):
    network = networks.Network(None, "classification", {}, [], networks.LITE0_PREPROCESSING, "")
    if of_users:
        settings = dataclasses.replace(settings, calibration_dir=write_pictures(tmp_path))
    found = samples.Samples(network, settings)
    groups = [set(found.files[group]) for group in samples.COUNTS]
    assert all(groups)
    assert not groups[0] & (groups[1] | groups[2])
    assert not of_users or not groups[1] & groups[2]  # of the photographs, other crops
    taken = {group: [one.tobytes() for one in found.take(group, number)] for group, number in samples.COUNTS.items()}
    assert {group: len(each) for group, each in taken.items()} == samples.COUNTS
    assert len(set(itertools.chain(*taken.values()))) == sum(samples.COUNTS.values())
    assert [one.tobytes() for one in found.take("choosing", 6)] == taken["choosing"]  # the same again


def test_fewer_pictures_than_files_are_spread_over_them(settings, tmp_path):
    folder = write_pictures(tmp_path, ("chelsea", "coffee", "rocket", "camera"))
    network = networks.Network(None, "classification", {}, [], networks.LITE0_PREPROCESSING, "")
    found = samples.Samples(network, dataclasses.replace(settings, calibration_dir=folder))
    seen, found.read = [], lambda path, read=found.read: seen.append(path) or read(path)
    assert len(found.files["held_out"]) == 10
    assert len(list(found.take("held_out", 5))) == 5
    assert seen == found.files["held_out"][::2]
    assert found.about["files"]["held_out"] == 5


def test_of_a_folder_only_pictures_count_and_each_once(settings, tmp_path, caplog):
    folder = write_pictures(tmp_path)
    for path in list(folder.glob("*.png")):
        path.with_suffix(".json").write_text("{}")
    (folder / ".thumbnails").mkdir()
    (folder / "below").mkdir()
    (folder / "below/again").symlink_to(folder)
    picture = (folder / "chelsea0.png").read_bytes()
    for name in (".thumbnails/chelsea0.png", ".chelsea0.png", "below/a copy.PNG"):
        (folder / name).write_bytes(picture)
    os.mkfifo(folder / "pipe.png")
    (folder / "huge.png").write_bytes(picture + bytes(settings.max_file_size))
    settings = dataclasses.replace(settings, calibration_dir=folder)
    files = bundles.calibration_files(settings)
    assert {path.name for path in files} == {f"{name}{i}.png" for name in PHOTOS for i in range(5)} | {
        "a copy.PNG", "huge.png"}
    network = networks.Network(None, "classification", {}, [], networks.LITE0_PREPROCESSING, "")
    used = [path for group in samples.Samples(network, settings).files.values() for path in group]
    assert len(used) == 10
    assert len({path.read_bytes() for path in used}) == 10
    assert [r.message for r in caplog.records] == [
        f"not used for calibration: {folder}/huge.png: it is larger than MAX_FILE_SIZE"]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_a_tiny_picture_has_crops(size):
    random = np.random.default_rng(0)
    for _ in range(20):
        part = samples.crop(Image.new("RGB", size), random)
        assert 1 <= min(part.size) <= max(part.size) <= max(size)


@pytest.fixture(scope="module")
def tiny():
    """An openvino.Model for pictures of 16 × 16 pixels, with ten layers that can be int8."""
    pytest.importorskip("nncf")
    import openvino
    from openvino import opset13 as ops
    random = np.random.default_rng(0)
    x = pictures = ops.parameter([1, 3, 16, 16], np.float32)
    for channels in (3, *[8] * 7):
        weights = random.normal(0, (2 / 9 / channels) ** 0.5, (8, channels, 3, 3)).astype(np.float32)
        x = ops.relu(ops.convolution(x, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1]))
    head = ops.constant(random.normal(size=(8, 4)).astype(np.float32))
    return openvino.Model([ops.matmul(ops.reduce_mean(x, [2, 3]), head, False, False)], [pictures])


@pytest.fixture(scope="module")
def tiny_inputs():
    return [*np.random.default_rng(0).random((6, 3, 16, 16), np.float32)]


@pytest.fixture(scope="module")
def tiny_int8(tiny, tiny_inputs):
    return quantize.quantize(tiny, tiny_inputs, lambda *progress: None)


def ended(*progress):
    raise OutOfTime


TINY = networks.Network(None, "classification", {"name": "tiny"}, [], Preprocessing(16, 16), "")


def test_auto_goes_on_without_int8_when_the_time_for_it_is_used_up(tiny, settings, monkeypatch, caplog):
    monkeypatch.setattr(precision, "MAKING_S", -60)
    auto = dataclasses.replace(settings, precision="auto", accuracy_limit=1.0)
    said = precision.choose(tiny, TINY, auto)[1]
    assert "int8" not in said["precisions"]
    assert said["trusted"]
    assert said["time_up"] == ("-1 minutes of processor time were used up while reading the pictures for calibration: "
                               "tiny is too slow here for int8")
    assert precision.table(said)[-1] == said["time_up"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"tiny: {said['time_up']}; PRECISION=auto serves {said['chosen']}"]
    with pytest.raises(StartError, match="^-1 minutes .* tiny is too slow here for int8$"):
        precision.choose(tiny, TINY, dataclasses.replace(auto, precision="int8"))


def test_a_cost_is_not_trusted_if_there_was_no_time_for_enough_pictures(tiny, settings, monkeypatch, caplog):
    monkeypatch.setattr(precision, "TIME_S", 0)
    monkeypatch.setattr(precision, "MAKING_S", 10 ** 6)
    model, said = precision.choose(tiny, TINY, dataclasses.replace(settings, precision="int8", accuracy_limit=1.0))
    assert said["pictures"]["held_out"] == precision.AT_ONCE
    assert said["pictures"]["files"]["held_out"] == 2  # of three, which are looked at one after the other
    assert (said["chosen"], said["trusted"], bundles.fastest_within(said, 1)) == ("int8", False, ["fp32"])
    assert caplog.records[-1].message.endswith("used up while measuring on held-out pictures: 16 held-out pictures "
                                               "are too few to trust the cost; PRECISION=int8 serves int8")


@pytest.mark.parametrize(("step", "cost", "restored"), [
    ("comparing int8 with fp32", 1, 0), ("measuring how sensitive each layer is", 1, 0),
    ("choosing the layers to restore", 1, 5), ("choosing the layers to restore", 0, 2)])
def test_when_the_time_is_used_up_the_best_so_far_is_taken(tiny, tiny_int8, tiny_inputs, monkeypatch, step, cost,
                                                            restored):
    seen, measured = [], itertools.chain([1], itertools.repeat(cost))
    monkeypatch.setattr(costs, "cost", lambda *a: {"cost": next(measured)})

    def progress(now, done, total):
        assert done <= total
        seen.append(now)
        if now == step and seen.count(now) > 1 - cost:  # after the first network that costs little
            raise OutOfTime
    model, rounded, at_fp32 = quantize.within(tiny_int8, tiny, tiny_inputs, 0.01, True, progress)
    assert (len(rounded) + len(at_fp32), len(at_fp32)) == (10, restored)
    assert len(quantize.layers_of(model)) == 10 - restored


def test_a_layer_that_openvino_cannot_calculate_at_int8_is_restored_first(tiny, tiny_int8, tiny_inputs, monkeypatch):
    """As oneDNN limited to AVX2 cannot multiply fp32 by int8."""
    compiled, failing = costs.compiled, [*quantize.layers_of(tiny_int8)][-1]

    def limited(model, *arguments):
        if [*quantize.layers_of(model)] == [failing]:
            raise RuntimeError("could not create a primitive descriptor")
        return compiled(model, *arguments)
    monkeypatch.setattr(costs, "compiled", limited)
    restored = quantize.within(tiny_int8, tiny, tiny_inputs, 0, False, lambda *progress: None)[2]
    assert restored[0] == failing
    assert len(restored) == 5


def test_why_a_network_cannot_be_quantized_leaves_out_where_openvino_says_so():
    error = RuntimeError("Exception from src/inference/src/cpp/core.cpp:117:\n"
                         "Exception from src/inference/src/dev/plugin.cpp:54:\ncould not create a primitive\n\n")
    assert precision.why_none(error, "resnet50", Progress()) == (
        "resnet50 cannot be quantized: RuntimeError: could not create a primitive")


def test_nncf_lets_pass_that_the_time_is_used_up(tiny, tiny_inputs):
    with pytest.raises(OutOfTime):
        quantize.quantize(tiny, tiny_inputs, ended)


def test_progress_is_shown_on_a_terminal_that_does_not_say_how_wide_it_is(monkeypatch):
    shown, terminal = os.openpty()
    with open(shown, "rb", 0) as shown, open(terminal, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress()
        progress("looking", 1, 2)
        progress.close()
        os.set_blocking(shown.fileno(), False)
        assert b"looking: " in (shown.read(10_000) or b"")


@pytest.mark.slow
def test_ocean_restores_layers_so_that_the_scores_change_less(ocean_settings, monkeypatch):
    pytest.importorskip("nncf")
    found = made(dataclasses.replace(ocean_settings, precision="int8", accuracy_limit=1.0)).quantization["precisions"]
    limit = found["int8"]["mean_change"] * 0.95
    monkeypatch.setattr(quantize, "AIM", 0)  # as many as may be: six pictures to choose by are too few for a limit
    assert not found["int8"]["restored_layers"]
    strict = dataclasses.replace(ocean_settings, precision="int8", accuracy_limit=limit)
    assert bundles.find(strict, "ocean", "openvino") is None  # it would cost too much
    said = made(strict).quantization
    assert said["precisions"]["int8"]["restored_layers"]
    assert 0 < said["precisions"]["int8"]["cost"] < limit
    assert said["precisions"]["fp32"] | {"images_per_second": 0} == {
        "cost": 0, "mean_change": 0, "max_change": 0, "images_per_second": 0}
    assert "changes a score by" in precision.sentence(said)
    assert load_model(strict).current.info()["precision"] == "int8"
    # The one for another limit is still there: two models of a service may differ in nothing else.
    still = bundles.find(dataclasses.replace(strict, accuracy_limit=1.0), "ocean", "openvino")
    assert not bundle.read(still).quantization["precisions"]["int8"]["restored_layers"]


@pytest.mark.slow
def test_all_layers_restored_is_fp32_again(app, settings):
    pytest.importorskip("nncf")
    import openvino
    fp32 = openvino.Core().read_model(bundles.find(settings, settings.model_name, "openvino") / "model.xml")
    one = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    int8 = quantize.quantize(fp32, [*one], lambda *progress: None)
    layers = quantize.layers_of(int8)
    a, b, c = (costs.outputs(costs.compiled(model), one)
               for model in (fp32, int8, quantize.restored(int8, fp32, layers)))
    assert np.abs(a - c).max() < 1e-3 < np.abs(a - b).max()


@pytest.mark.slow
def test_a_limit_of_nothing_leads_auto_to_fp32(settings, monkeypatch):
    pytest.importorskip("nncf")
    monkeypatch.setattr(quantize, "RANKING_S", 0)
    monkeypatch.setattr(costs, "cost", lambda *a, cost=costs.cost: {**cost(*a), "cost": float((a[0] != a[1]).any())})
    auto = dataclasses.replace(settings, precision="auto", accuracy_limit=0.0)
    said = made(auto).quantization
    assert (said["asked"], said["chosen"]) == ("auto", "fp32")
    assert {"fp32", "int8"} <= set(said["precisions"])
    model = load_model(auto).current
    assert (model.info()["precision"], model.info()["quantization"]["limit"]) == ("fp32", 0)
    assert any(line.endswith("chosen") and line.startswith("fp32") for line in precision.table(said))


@pytest.fixture
def ocean_alone(ocean_settings, tmp_path):
    """With a MODEL_DIR of its own: what another test makes with PRECISION=auto, perhaps beside it, may fit too."""
    return dataclasses.replace(ocean_settings, model_dir=tmp_path / "models")


@pytest.mark.slow
def test_auto_without_nncf_says_what_to_install_and_goes_on(ocean_alone, monkeypatch, caplog):
    auto = dataclasses.replace(ocean_alone, precision="auto", accuracy_limit=1.0)
    monkeypatch.setitem(sys.modules, "nncf", None)
    caplog.set_level("WARNING")
    said = made(auto).quantization
    assert said["missing"] == ["nncf"]
    assert said["chosen"] in ("fp32", "bf16")
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "PRECISION=auto cannot try int8: nncf is not installed; pip install -r app/prepare/requirements-int8.txt"]
    assert bundles.find(auto, "ocean", "openvino")
    monkeypatch.delitem(sys.modules, "nncf")
    if pytest.importorskip("nncf"):
        assert bundles.find(auto, "ocean", "openvino") is None  # it can be tried by now


@pytest.mark.slow
def test_auto_goes_on_where_nncf_fails(ocean_alone, monkeypatch, caplog):
    nncf = pytest.importorskip("nncf")

    def fail(*arguments, **options):
        raise nncf.InternalError("no such operation")
    monkeypatch.setattr(nncf, "quantize", fail)
    auto = dataclasses.replace(ocean_alone, precision="auto", accuracy_limit=0.5)
    caplog.set_level("WARNING")
    said = made(auto).quantization
    assert "int8" not in said["precisions"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "PRECISION=auto goes on without int8, as ocean cannot be quantized: InternalError: no such operation"]
    with pytest.raises(StartError, match="^ocean cannot be quantized: InternalError: no such operation$"):
        make(dataclasses.replace(auto, precision="int8", accuracy_limit=1e-9), "openvino")


def test_a_network_that_openvino_converts_wrongly_is_not_measured():
    from app.prepare import export
    right = np.array([0.5, -2.0, 1.0], np.float32)
    export.check(right + 1e-4, right)
    for wrong in (right[::-1], right + 0.1, right * np.nan):
        with pytest.raises(StartError, match="does not calculate this network as torch does"):
            export.check(wrong, right)


def test_an_image_without_torch_serves_auto_from_the_unmeasured_fp32_bundle(settings, app, monkeypatch):
    auto = dataclasses.replace(settings, precision="auto", accuracy_limit=0.5)
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = bundles.find(auto, "efficientnet_lite0", "openvino")
    assert bundle.read(folder).quantization is None
    assert load_model(auto).current.info()["precision"] == "fp32"


def test_a_network_that_depends_on_the_number_of_streams_is_noticed(app, settings, monkeypatch):
    import openvino
    fp32 = openvino.Core().read_model(bundles.find(settings, settings.model_name, "openvino") / "model.xml")
    batch = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    assert not costs.depends_on_streams(fp32, batch)
    monkeypatch.setattr(costs, "compiled", lambda model, streams, compiled=costs.compiled: compiled(
        model, "fp32" if streams == 1 else "bf16", streams))
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert costs.depends_on_streams(fp32, batch)


@pytest.mark.parametrize(("asked", "there", "meant"), [("int8", True, True), ("auto", True, True),
                                                       ("int8", False, False)])
def test_an_image_without_torch_says_that_its_int8_is_for_vnni(tmp_path, monkeypatch, asked, there, meant):
    manifest = bundle.Manifest(*["efficientnet_lite0", "classification", "openvino"], *[{}] * 9, quantization={
        **SAID, "asked": asked, "vnni": there, "chosen": "int8"})
    folder = tmp_path / "bundles/one"
    folder.mkdir(parents=True)
    bundles.save_manifest(folder, dataclasses.replace(manifest, weights={"default": False, "labels_sha256": None}))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(bundles, "has_vnni", lambda: False)
    with pytest.raises(StartError) as e:
        make(Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(tmp_path), "PRECISION": asked}),
             "openvino")
    assert ("was made on a processor with VNNI" in str(e.value)) is meant


SAID = {"asked": "auto", "limit": 0.01, "chosen": "bf16", "missing": [], "calibration": None, "precisions": {
    "fp32": {"cost": 0, "images_per_second": 10}, "bf16": {"cost": 0.008, "images_per_second": 20},
    "int8": {"cost": 0.03, "images_per_second": 30, "restored_layers": []}}}


@pytest.mark.parametrize(("asked", "limit", "restored", "fits"), [
    ("auto", 0.01, [], True), ("auto", 0.009, [], True), ("auto", 0.001, [], False), ("auto", 0.02, [], True),
    ("auto", 0.03, [], False), ("auto", 0.02, ["a"], False),
    ("int8", 0.01, ["a"], True), ("int8", 0.005, ["a"], True),  # more than MOST_RESTORED would be needed
    ("int8", 0.02, ["a"], False), ("int8", 0.02, [], True), ("fp32", 0.01, [], False)])
def test_a_limit_that_changes_the_choice_has_the_bundle_made_again(settings, asked, limit, restored, fits):
    said = json.loads(json.dumps({**SAID, "asked": "auto" if asked == "fp32" else asked}))
    said["precisions"]["int8"]["restored_layers"] = restored
    manifest = bundle.Manifest(*[None] * 12, quantization=said)
    manifest = dataclasses.replace(manifest, engine="openvino")
    now = dataclasses.replace(settings, precision=asked, accuracy_limit=limit)
    assert bundles.is_precision(manifest, now, None) is fits


def test_costs_that_are_trusted_go_before_newer_ones_that_are_not(settings, tmp_path):
    manifest = bundle.Manifest(*["efficientnet_lite0", "classification", "openvino"], *[{}] * 9)
    manifest = dataclasses.replace(manifest, weights={"default": True, "labels_sha256": None})
    not_trusted = {**SAID, "chosen": "fp32", "trusted": False}
    for age, (name, said) in enumerate((("not trusted", not_trusted), ("known", SAID))):
        folder = tmp_path / "bundles" / name
        folder.mkdir(parents=True)
        bundles.save_manifest(folder, dataclasses.replace(manifest, quantization=said))
        os.utime(folder / "manifest.json", (0, -age))
    auto = dataclasses.replace(settings, precision="auto", accuracy_limit=0.01, model_dir=tmp_path)
    assert bundles.find(auto, "efficientnet_lite0", "openvino").name == "known"


@pytest.mark.parametrize(("there", "here", "chosen", "fits"), [
    (True, False, "int8", False), (True, False, "bf16", True), (False, False, "int8", True),
    (False, True, "int8", True), (True, True, "int8", True)])
def test_int8_of_a_processor_with_vnni_is_made_again_without(settings, monkeypatch, there, here, chosen, fits):
    monkeypatch.setattr(bundles, "has_vnni", lambda: here)
    manifest = bundle.Manifest(*[None] * 12, quantization={**SAID, "vnni": there, "chosen": chosen})
    auto = dataclasses.replace(settings, precision="auto", accuracy_limit=0.03 if chosen == "int8" else 0.01)
    manifest.quantization["limit"] = auto.accuracy_limit
    assert bundles.is_precision(dataclasses.replace(manifest, engine="openvino"), auto, None) is fits


@pytest.mark.parametrize(("limit", "chosen"), [(0, "fp32"), (0.008, "bf16"), (0.02, "bf16"), (0.03, "int8")])
def test_the_fastest_within_the_limit_is_chosen(limit, chosen):
    assert bundles.fastest_within(SAID, limit) == [chosen]


@pytest.mark.parametrize(("bf16", "int8", "chosen"), [
    (20, 30, "int8"), (20, 20.9, "bf16"), (20, 19.1, "bf16"), (10.2, 10.4, "fp32"), (9, 10.6, "int8")])
def test_what_is_no_faster_is_not_worth_its_cost(bf16, int8, chosen):
    said = json.loads(json.dumps(SAID))
    said["precisions"]["bf16"]["images_per_second"], said["precisions"]["int8"]["images_per_second"] = bf16, int8
    assert bundles.fastest_within(said, 1)[0] == chosen


@pytest.mark.parametrize(("speed", "limit", "fits"), [
    (20.5, 0.01, True), (20.5, 0.008, False), (18, 0.01, False)])
def test_what_an_earlier_version_chose_is_kept_if_it_is_as_fast(settings, speed, limit, fits):
    """It took the fastest one; bf16 is nearly as fast and costs less."""
    said = json.loads(json.dumps({**SAID, "chosen": "int8"}))
    said["precisions"]["int8"] |= {"cost": 0.009, "images_per_second": speed}
    assert bundles.fastest_within(said, 0.01)[0] == "bf16"
    manifest = dataclasses.replace(bundle.Manifest(*[None] * 12, quantization=said), engine="openvino")
    auto = dataclasses.replace(settings, precision="auto", accuracy_limit=limit)
    assert bundles.is_precision(manifest, auto, None) is fits


def test_costs_by_hand():
    a = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]))
    b = np.log(np.array([[0.6, 0.3, 0.1], [0.3, 0.45, 0.25]]))
    assert costs.cost(a, b, True) == pytest.approx({"cost": 0.5, "changed": 1, "mean_change": 0.1, "max_change": 0.1})
    assert costs.cost(a, b, False)["cost"] == pytest.approx(np.abs(a - b).mean())
    by_hand = (0.7 * np.log(7 / 6) + 0.2 * np.log(2 / 3) + 0.4 * np.log(4 / 3) + 0.35 * np.log(35 / 45)) / 2
    assert costs.divergence(a, b, True) == pytest.approx(by_hand)
