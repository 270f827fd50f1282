"""PRECISION=int8: calibrated with the user's pictures, its cost in accuracy measured, checked like other models."""
import dataclasses

import numpy as np
import pytest
from conftest import encoded, photo

from app import load_model
from app.config import Settings, StartError
from app.engine import bundle
from app.errors import Deadline
from app.model_loader import ModelError
from app.prepare import bundles

PHOTOS = ("chelsea", "coffee")


def write_pictures(folder, names=PHOTOS):
    """Each photograph and its quarters."""
    for name in names:
        image = photo(name).convert("RGB")
        w, h = image.size
        boxes = [(0, 0, w, h)] + [(x, y, x + w // 2, y + h // 2) for x in (0, w // 2) for y in (0, h // 2)]
        for i, box in enumerate(boxes):
            (folder / f"{name}{i}.png").write_bytes(encoded(image.crop(box).resize((256, 256))))
    return folder


@pytest.fixture(scope="module")
def int8(tmp_path_factory, model_dir):
    """int8(fresh=False, **variables): a ModelLoader with an int8 model, the one that is loaded already unless fresh;
    its pictures have a damaged one and a text among them."""
    pytest.importorskip("nncf")
    folder = write_pictures(tmp_path_factory.mktemp("pictures"))
    (folder / "notes.txt").write_text("not a picture")
    (folder / "damaged.jpg").write_bytes(encoded(photo("chelsea"), "JPEG")[:3000])

    loaded = []

    def load(fresh=False, **variables):
        if loaded and not fresh and not variables:
            return loaded[0]
        loaded.append(load_model(Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir),
                                                 "DEVICE": "cpu", "PRECISION": "int8", "CALIBRATION_DIR": str(folder),
                                                 **variables})))
        return loaded[-1]
    return load


def test_int8_answers_nearly_as_fp32_and_says_how_nearly(int8, app, capfd):
    model, fp32 = int8().current, app.extensions["model"].current
    agreement = model.info()["quantization"]["agreement"]
    assert agreement["pictures"] == 2
    assert 0 < agreement["mean_dp_top1"] <= agreement["max_dp"] < 0.6
    assert (model.task.engine.precision, fp32.info()["quantization"]) == ("int8", None)
    picture = model.task.preprocessing(photo("coffee").convert("RGB"))[None]  # espresso 0.95: far from any other class
    a, b = (each.task.scores(each.task.engine.infer(picture, Deadline(60), True))[0] for each in (model, fp32))
    assert a.argmax() == b.argmax()
    assert 1e-6 < np.abs(a - b).max() < 0.3
    said = capfd.readouterr().err
    assert "int8 against fp32 on 2 held-out pictures" in said
    assert said.count("not used for calibration") == 2


def test_int8_weights_take_a_quarter(int8, settings):
    folders = [bundles.find(dataclasses.replace(settings, precision=p), settings.model_name, "openvino")
               for p in ("fp32", "int8") if int8()]
    sizes = [(folder / "model.bin").stat().st_size for folder in folders]
    assert 0.2 < sizes[1] / sizes[0] < 0.3


def test_int8_is_made_once_for_the_same_pictures(int8, model_dir, tmp_path, capfd):
    made = (bundles.find(int8().settings, "efficientnet_lite0", "openvino") / "manifest.json").stat().st_mtime_ns
    capfd.readouterr()
    again = bundles.find(int8(fresh=True).settings, "efficientnet_lite0", "openvino")
    assert (again / "manifest.json").stat().st_mtime_ns == made
    assert "beside fp32" not in capfd.readouterr().err
    others = write_pictures(tmp_path, ("rocket", "coffee"))
    assert bundles.find(dataclasses.replace(int8().settings, calibration_dir=others), "efficientnet_lite0",
                       "openvino") is None
    baked_in = dataclasses.replace(int8().settings, calibration_dir=None)  # as in an image without the pictures
    assert bundles.find(baked_in, "efficientnet_lite0", "openvino") == again


def test_other_precisions_do_not_get_the_int8_network(int8, settings):
    int8()
    for precision in ("fp32", "bf16", "auto"):
        folder = bundles.find(dataclasses.replace(settings, precision=precision), settings.model_name, "openvino")
        assert bundle.read(folder).quantization is None


def test_a_wrong_int8_network_fails_its_self_test(int8):
    model = int8(fresh=True).current
    task, outputs = model.task, model.task.manifest.self_test["outputs"]
    task.manifest = dataclasses.replace(task.manifest, self_test={"outputs": outputs[1:] + outputs[:1]})
    with pytest.raises(ModelError, match="fails its self-test: the outputs are off"):
        model.self_test()


@pytest.mark.parametrize(("variables", "message"), [
    ({"CALIBRATION_DIR": ""}, "PRECISION is int8, which needs CALIBRATION_DIR, a folder of typical pictures"),
    ({"CALIBRATION_DIR": "/nowhere"}, "CALIBRATION_DIR /nowhere has 0 files; at least 10 pictures are needed"),
    ({"ENGINE": "torch"}, "PRECISION is int8, which needs ENGINE=openvino")])
def test_int8_is_refused_in_one_line_where_it_cannot_be_had(int8, tmp_path, variables, message):
    with pytest.raises(StartError, match=message) as e:
        int8(MODEL_DIR=str(tmp_path), **variables)
    assert "\n" not in str(e.value)
