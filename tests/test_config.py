"""Settings are checked, frozen, and the same in code, .env.example and docs/settings.md."""
import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, need
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


def test_documentation_lists_every_setting_with_its_default():
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", text, re.M))
    assert sorted(rows) == sorted(NAMES)
    for name, default in dotenv_values(EXAMPLE).items():
        assert rows[name] == (f"`{default}`" if default else ""), name


@pytest.mark.parametrize(("variable", "text", "takes"), [
    ("PORT", "0", "an integer from 1 to 65535"),
    ("TTA", "maybe", "on or off"),
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


@pytest.mark.parametrize(("variable", "text", "message"), [
    ("JOBS", "maybe", "JOBS must be on or off, got 'maybe'"),
    *(("STORAGE_URL", text, f"STORAGE_URL must be a folder, or s3://bucket/prefix, got '{text}'")
      for text in ("s3:/bucket/in", "s3:bucket", "http://example.org/", "c:/in", "file:/in")),
    ("DATABASE_URL", "mysql://ann:secret@db/jobs", "DATABASE_URL must be postgresql://USER:PASSWORD@HOST/DATABASE or "
                                                   "sqlite:////PATH, got mysql://…"),
    ("DATABASE_URL", "ann:secret@db/jobs", "DATABASE_URL must be postgresql://USER:PASSWORD@HOST/DATABASE or "
                                           "sqlite:////PATH, got something else"),
])
def test_bad_value_of_an_optional_part_is_refused(variable, text, message):
    with pytest.raises(SettingsError) as e:
        Settings.parse({"JOBS": "on", variable: text})
    assert str(e.value) == message


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_database_urls_of_hosting_providers_are_understood(scheme):
    settings = Settings.parse({"JOBS": "on", "DATABASE_URL": f"{scheme}://ann:a:b@db/jobs?sslmode=require"})
    assert settings.optional.database == "postgresql+psycopg://ann:a:b@db/jobs?sslmode=require"
    assert Settings.parse(variables(settings)) == settings


def test_a_folder_with_a_colon_below_is_a_folder():
    assert Settings.parse({"JOBS": "on", "STORAGE_URL": "/in/a:b"}).optional.storage == "/in/a:b"


def test_credentials_in_the_file_reach_the_programs_for_s3(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("JOBS=on\nAWS_ACCESS_KEY_ID=of the file\nAWS_DEFAULT_REGION=there\n")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "here")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")  # and it is gone again when the test ends
    Settings.load(tmp_path / ".env")
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_DEFAULT_REGION"]) == ("of the file", "here")


@pytest.mark.parametrize(("text", "arguments", "installs"), [
    ("OTEL_EXPORTER_OTLP_ENDPOINT=http://a:4318\n", (), "tracing"), ("", ("OTEL_TRACES_EXPORTER=otlp",), "tracing"),
    ("OTEL_TRACES_EXPORTER=console\n", (), "tracing"), ("OTEL_TRACES_EXPORTER=none\n", (), False),
    ("", ("OTEL_TRACES_EXPORTER=none",), False), ("OTEL_SERVICE_NAME=a\n", (), False),
    (EXAMPLE.read_text(), (), False), ("JOBS=off\nHISTORY=no\nINPUT_URLS=\n", ("JOBS=off", "HISTORY=0"), False),
    ("JOBS=on\n", (), "jobs"), ("export HISTORY=\"True\"\n", (), "jobs"),
    ("INPUT_URLS=https://example.org/\n", (), "jobs"),
    ("", ("JOBS=on",), "jobs"), ("", ("HISTORY=1",), "jobs"), ("", ("INPUT_URLS=s3://bucket",), "jobs"),
    ("PRECISION=auto\n", (), "int8"), ("", ("PRECISION=int8",), "int8"), ("", ("CATS__2__PRECISION=int8",), "int8"),
    ("CATS__PRECISION=int8\n", (), "int8"), ("PRECISION=bf16\n", ("PRECISION=fp32",), False)])
def test_make_run_installs_optional_packages_only_if_a_part_is_on(tmp_path, text, arguments, installs):
    (tmp_path / ".env").write_text(text)
    for name in ("Makefile", "requirements.txt", "app"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {k: v for k, v in os.environ.items()
                   if k not in (*NAMES, "MAKEFLAGS", "MAKELEVEL") and not k.startswith("OTEL_")}
    done = subprocess.run([need("make"), "--dry-run", "run", *arguments], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=True)
    assert "-r requirements.txt" in done.stdout
    for part, file in (("jobs", "jobs/requirements"), ("tracing", "tracing/requirements"),
                       ("int8", "prepare/requirements-int8")):
        assert (f"app/{file}.txt" in done.stdout) == (part == installs)


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
