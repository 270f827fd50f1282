import pytest

from app.suggestions import did_you_mean

OPTIONS = ("at", "frames", "method", "top_k", "tta", "use_tta")
SETTINGS = ("API_KEYS", "LOG_FORMAT", "MODEL_NAME", "MODELS", "PORT")


@pytest.mark.parametrize(("word", "known", "meant"), [
    ("topk", OPTIONS, "top_k"), ("Top-K", OPTIONS, "top_k"), ("frame", OPTIONS, "frames"),
    ("usetta", OPTIONS, "use_tta"), ("API_KEY", SETTINGS, "API_KEYS"), ("MODLE_NAME", SETTINGS, "MODEL_NAME"),
    ("log_format", SETTINGS, "LOG_FORMAT"),
    ("ResNet-50", ("resnet50", "resnet18"), "resnet50"), ("oen", ("one", "two"), "one")])
def test_a_misspelt_name_is_recognised(word, known, meant):
    assert did_you_mean(word, known) == f"; did you mean {meant}?"


@pytest.mark.parametrize("word", ["", "k", "threshold", "language", "__"])
def test_nothing_is_suggested_for_what_is_like_nothing(word):
    assert did_you_mean(word, OPTIONS) == ""
