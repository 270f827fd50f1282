"""Several models in one service: MODELS, each model's own variables, and the shares of versions."""
import dataclasses

import pytest

from app import model_settings
from app.config import Settings, SettingsError
from app.handing_down import variables
from app.model_settings import each

MODELS = "resnet50,cats@1=mobilenet_v2,cats@2=mobilenet_v2,iris=examples.iris:Iris"
TWO_CATS = "cats@1,cats@2"


def test_without_models_there_is_one():
    settings = Settings.parse({"MODEL_NAME": "mobilenet_v2", "CATS__TOP_K": "3"})
    assert each(settings) == {"mobilenet_v2": settings}


@pytest.mark.parametrize(("model_name", "key"), [
    ("examples.iris:Iris", "iris"), ("my_package:VoiceClone2", "voice_clone2"), ("a:HTTPModel", "http_model")])
def test_a_class_is_called_by_its_name_in_snake_case(model_name, key):
    settings = Settings.parse({"MODEL_NAME": model_name})
    assert each(settings) == {key: settings}


def test_each_model_has_its_own_settings_where_they_differ():
    settings = Settings.parse({"MODELS": MODELS, "MODEL_NAME": "ocean", "TOP_K": "3", "PRECISION": "bf16", "PORT": "80",
                               "CATS__TOP_K": "4", "CATS__2__TOP_K": "6", "CATS__1__LABELS_PATH": "/l",
                               "IRIS__MODEL_PATH": "/iris.skops", "RESNET50__PRECISION": "int8"})
    found = each(settings)
    assert list(found) == ["resnet50", "cats@1", "cats@2", "iris"]
    assert [one.model_name for one in found.values()] == [
        "resnet50", "mobilenet_v2", "mobilenet_v2", "examples.iris:Iris"]
    assert [one.top_k for one in found.values()] == [3, 4, 6, 3]
    assert [one.precision for one in found.values()] == ["int8", "bf16", "bf16", "bf16"]
    assert [str(one.labels_path) for one in found.values()] == ["None", "/l", "None", "None"]
    assert str(found["iris"].model_path) == "/iris.skops"
    assert {one.port for one in found.values()} == {80}
    for key, one in found.items():  # each is like the settings of a service of its own
        assert one.models is None, key
        assert Settings.parse(variables(one)) == one


def test_a_dot_in_a_version_is_an_underscore_in_its_variables():
    settings = Settings.parse({"MODELS": "cats@1.0,cats@1.1", "CATS__1_1__TTA": "no"})
    assert [one.tta for one in each(settings).values()] == [True, False]


def test_one_model_may_have_the_common_path():
    assert str(each(Settings.parse({"MODELS": "cats=resnet18", "MODEL_PATH": "/m"}))["cats"].model_path) == "/m"


def test_all_of_it_survives_the_way_to_another_process(tmp_path, monkeypatch):
    settings = Settings.parse({"MODELS": MODELS, "CATS__2__MODEL_PATH": "a b/m.pt", "CATS__SPLIT": "50:50",
                               "SPLIT_HEADER": "X-User", "MODELS_MEMORY": "1GiB", "LOAD_MODELS": "first_use",
                               "NO_MODEL__TOP_K": "3"})
    assert Settings.parse(variables(settings)) == settings
    assert "NO_MODEL__TOP_K" not in variables(settings)
    (tmp_path / ".env").write_text("CATS__1__TOP_K=3\nIRIS__NONSENSE=3\n")  # edited since
    for variable, text in variables(settings).items():
        monkeypatch.setenv(variable, text)
    assert Settings.load(tmp_path / ".env") == settings
    assert model_settings.traffic(dataclasses.replace(settings, workers=3))["cats"]["split"] == [["1", 50], ["2", 50]]


@pytest.mark.parametrize(("variables", "message"), [
    ({"MODELS": "Cats"}, "MODELS must be comma-separated models, each NAME[@VERSION][=MODEL_NAME], got 'Cats'"),
    *[({"MODELS": text}, "MODELS must be comma-separated models") for text in (
        ",", "a__b", "a@", "a@B", "a=", "a=B", "a=b.c", "a=b:", "a=../b", "a@1@2", "a@" + "1" * 33, "a" * 65)],
    ({"MODELS": "a,b,a"}, "MODELS names a twice"),
    ({"MODELS": "a@1,a@1"}, "MODELS names a@1 twice"),
    ({"MODELS": "a,a@1"}, "MODELS names a with and without a version"),
    ({"MODELS": "a@1,b,a"}, "MODELS names a with and without a version"),
    ({"MODELS": "a@1.0,a@1_0"}, "MODELS: A__1_0__MODEL_PATH would be a setting of both a@1.0 and a@1_0"),
    ({"MODELS": "a@none"}, "MODELS: a version cannot be called none"),
    *[({"MODELS": "a,b", variable: text}, f"{variable} cannot be that of several models: write A__{variable}")
      for variable, text in (("MODEL_PATH", "m"), ("LABELS_PATH", "l"), ("PREPROCESSING", "crop=22"),
                             ("CALIBRATION_DIR", "."))],
    *[({"MODELS": TWO_CATS, variable: "1"}, f"{variable} is no setting of a model in MODELS")
      for variable in ("CATS__NAME", "CATS__PORT", "CATS__3__TOP_K", "CATS__", "CATS__MODEL_NAME", "CATS__1__SPLIT")],
    ({"MODELS": "cats", "CATS__SPLIT": "50:50"}, "CATS__SPLIT is no setting"),
    ({"MODELS": TWO_CATS, "CATS__2__TOP_K": "11"}, "CATS__2__TOP_K must be an integer from 1 to 10, got '11'"),
    *[({"MODELS": TWO_CATS + ",cats@3", "CATS__SPLIT": text}, "CATS__SPLIT must be one of its versions (1, 2, 3), or "
       f"percentages of two that add up to 100, such as 1:90,2:10, got '{text}'")
      for text in ("1:90,4:10", "1:90,2:11", "1:90", "4", "1:30,2:30,3:40", "1:50,1:50", "90:11", "1:-10,2:110",
                   "1:nan,2:1", "1:99.999,2:0.001", "1:९०,2:10", "90:5:5", ":")],
    ({"MODELS": "cats@1", "CATS__SPLIT": "90:10"}, "CATS__SPLIT must be one of its versions (1)"),
    ({"MODELS": TWO_CATS, "CATS__SHADOW": "3"}, "CATS__SHADOW must be 2 or none"),
    ({"MODELS": TWO_CATS, "CATS__SHADOW": "1"}, "CATS__SHADOW must be 2 or none"),
    ({"SPLIT_HEADER": "X User"}, "SPLIT_HEADER must be a header's name"),
    ({"MODEL_NAME": "iris:"}, "MODEL_NAME must be a model's name"),
    ({"MODEL_FALLBACK": "a:B"}, "MODEL_FALLBACK must be a model's name"),
    ({"LOAD_MODELS": "later"}, "LOAD_MODELS must be one of boot, first_use"),
])
def test_what_does_not_fit_is_refused_in_one_line(variables, message):
    with pytest.raises(SettingsError) as e:
        Settings.parse(variables)
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("text", "split"), [
    ("", [["1", 100]]), ("2", [["2", 100]]), ("90:10", [["1", 90], ["2", 10]]), ("1:90,2:10", [["1", 90], ["2", 10]]),
    ("3:10, 1:90", [["1", 90], ["3", 10]]), ("2:100,3:0", [["2", 100]]), ("2:99.5,3:0.5", [["2", 99.5], ["3", 0.5]])])
def test_shares_are_read_in_the_order_of_models(text, split):
    settings = Settings.parse({"MODELS": TWO_CATS + ",cats@3,dogs", "CATS__SPLIT": text})
    assert model_settings.traffic(settings) == {"cats": {"split": split, "shadow": None}}


def test_a_shadow_is_a_version_beside_those_that_answer():
    for split, shadow in (("1", "2"), ("90:10", "2"), ("90:10", "1")):
        settings = Settings.parse({"MODELS": TWO_CATS, "CATS__SPLIT": split, "CATS__SHADOW": shadow})
        assert model_settings.traffic(settings)["cats"]["shadow"] == shadow
