"""Settings are checked, frozen, and the same in code, .env.example and README."""
import dataclasses
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT
from dotenv import dotenv_values

from app import config, optional_settings
from app.config import SETTINGS, Settings, SettingsError
from app.handing_down import variables

EXAMPLE = ROOT / ".env.example"
NAMES = [field.name.upper() for field in (*SETTINGS, *optional_settings.SETTINGS)]


def test_example_file_has_every_setting_and_no_other():
    assert sorted(dotenv_values(EXAMPLE)) == sorted(NAMES)


def test_example_file_gives_the_defaults():
    values = dotenv_values(EXAMPLE)
    assert Settings.parse(values) == Settings()
    parts = config.read(optional_settings.SETTINGS, {name: text for name, text in values.items() if text})
    parts = optional_settings.OptionalSettings(**parts)
    assert dataclasses.replace(parts, data_dir=Path(os.path.relpath(parts.data_dir))) == \
        optional_settings.OptionalSettings()


def test_every_setting_of_the_example_file_has_a_sentence():
    text = EXAMPLE.read_text(encoding="utf-8")
    for name in NAMES:
        comment = re.search(rf"((?:^#.*\n)+)(?:[A-Z_]+=.*\n)?{name}=", text, re.M)
        assert comment, name
        assert comment[1].rstrip().endswith("."), name


def test_readme_lists_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    assert sorted(rows) == sorted(NAMES)
    for name, default in dotenv_values(EXAMPLE).items():
        assert rows[name] == (f"`{default}`" if default else ""), name


@pytest.mark.parametrize(("variable", "text", "takes"), [
    ("PORT", "0", "an integer from 1 to 65535"),
    ("PORT", "five", "an integer from 1 to 65535"),
    ("TOP_K", "11", "an integer from 1 to 10"),
    ("DEVICE", "gpu", "auto, cpu, cuda or cuda:N"),
    ("ENGINE", "onnx", "one of auto, openvino, torch"),
    ("PRECISION", "int4", "one of fp32, bf16, fp16, int8, auto"),
    ("MAX_FILE_SIZE", "10 parsecs", "a number of bytes"),
    ("MAX_FILE_SIZE", "0", "a number of bytes"),
    ("REQUEST_TIMEOUT", "nan", "a number of seconds from 0.1 to 3600"),
    ("REQUEST_TIMEOUT", "-1", "a number of seconds from 0.1 to 3600"),
    ("MODEL_NAME", "../etc/passwd", "a model's name"),
    ("RATE_LIMIT", "0/minute", "a limit such as 60/minute"),
    ("LOG_LEVEL", "loud", "one of debug, info"),
    *[("PREPROCESSING", text, "pairs such as resize=256") for text in (
        "256", "resize=0", "resize=256 resize=256", "crop=२२४",
        "resize=99999", "crop=22.5", "size=30", "interpolation=nearest", "mean=1", "mean=a,b,c",
        "mean=nan,0,0", "std=1,1")],
])
def test_bad_value_is_refused_in_one_line(variable, text, takes):
    with pytest.raises(SettingsError) as e:
        Settings.parse({variable: text})
    assert str(e.value).startswith(f"{variable} must be {takes}")
    assert str(e.value).endswith(f"got {text!r}")


def test_values_are_parsed():
    settings = Settings.parse({"MAX_FILE_SIZE": "5 MiB", "DEVICE": "CUDA:1", "LOG_LEVEL": "Debug", "WORKERS": " 3 "})
    assert (settings.max_file_size, settings.device, settings.log_level, settings.workers) == (
        5 * 2**20, "cuda:1", "DEBUG", 3)


def test_empty_value_means_the_default():
    assert Settings.parse({"PORT": "", "MODEL_PATH": " "}) == Settings()


def test_environment_wins_over_the_file(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("PORT=7000\nTOP_K=3\n")
    monkeypatch.setenv("PORT", "7001")
    settings = Settings.load(tmp_path / ".env")
    assert (settings.port, settings.top_k) == (7001, 3)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1


def test_settings_survive_the_way_to_another_process():
    values = {"MODEL_PATH": "a b/model.pt", "WORKERS": "2", "REQUEST_TIMEOUT": "1.5", "MAX_FILE_SIZE": "3MiB",
              "API_KEYS": "one, two", "CORS_ORIGINS": "https://a.example,https://b.example", "LOG_LEVEL": "debug"}
    settings = Settings.parse(values)
    assert settings.api_keys == ("one", "two")
    assert Settings.parse(variables(settings)) == settings
    assert Settings.parse(variables(Settings())) == Settings()
