"""Settings are checked, frozen, and the same in code, .env.example and docs/settings.md."""
import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, need
from dotenv import dotenv_values

from app import config, optional_settings, setting_names
from app.config import SETTINGS, Settings, SettingsError
from app.handing_down import variables

EXAMPLE = ROOT / ".env.example"

# `make run` has other defaults for these: copying the file must not change them.
COMMENTED = re.compile(r"^# (?=(?:LOG_FORMAT|MODEL_FALLBACK)=)", re.M)
NAMES = [field.name.upper() for field in (*SETTINGS, *optional_settings.SETTINGS)]


def example():
    """The text of .env.example with all settings, and what it sets."""
    text, count = COMMENTED.subn("", EXAMPLE.read_text(encoding="utf-8"))
    assert count == 2
    return text, dotenv_values(stream=io.StringIO(text))


def test_example_file_has_every_setting_and_no_other():
    assert sorted(example()[1]) == sorted(NAMES)


def test_example_file_gives_the_defaults():
    values = example()[1]
    assert Settings.parse(values) == Settings()
    parts = config.read(optional_settings.SETTINGS, {name: text for name, text in values.items() if text})
    parts = optional_settings.OptionalSettings(**parts)
    assert dataclasses.replace(parts, data_dir=Path(os.path.relpath(parts.data_dir))) == \
        optional_settings.OptionalSettings()


def test_every_setting_of_the_example_file_has_a_sentence():
    text = example()[0]
    for name in NAMES:
        comment = re.search(rf"((?:^#.*\n)+)(?:[A-Z_]+=.*\n)?{name}=", text, re.M)
        assert comment, name
        assert comment[1].rstrip().endswith("."), name


def test_documentation_lists_every_setting_with_its_default():
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", text, re.M))
    assert sorted(rows) == sorted(NAMES)
    for name, default in example()[1].items():
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


def test_kubernetes_variable_for_a_service_called_worker_is_no_port():
    assert Settings.parse({"JOBS": "on", "WORKER_PORT": "tcp://10.0.0.7:80"}).optional.worker_port is None


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


@pytest.mark.parametrize(("env_file", "environment", "arguments", "log_format", "fallback"), [
    ("", {}, (), "text", "efficientnet_lite0"),
    ("LOG_FORMAT=json\nMODEL_FALLBACK=\n", {}, (), "json", None),
    ("MODEL_FALLBACK=resnet18\n", {}, (), "text", "resnet18"),
    ("MODEL_FALLBACK=resnet18\n", {"MODEL_FALLBACK": "", "LOG_FORMAT": "json"}, (), "json", None),
    ("", {}, ("MODEL_FALLBACK=",), "text", None),
    ("", {"LOG_FORMAT": ""}, (), "json", "efficientnet_lite0"),
])
def test_what_is_set_wins_over_the_defaults_of_make_run(tmp_path, env_file, environment, arguments, log_format,
                                                        fallback):
    for name in ("Makefile", "app"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".env").write_text(env_file)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/installed").touch()
    stand_in = tmp_path / ".venv/bin/gunicorn"  # reads the settings, as the real one does, and serves nothing
    stand_in.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, '.')\nfrom app.config import Settings\n"
                        "settings = Settings.load()\nprint(settings.log_format, settings.model_fallback)\n")
    stand_in.chmod(0o755)
    others = {k: v for k, v in os.environ.items() if k not in (*NAMES, "MAKEFLAGS", "MAKELEVEL", "SERVICE_DEFAULTS")}
    done = subprocess.run([need("make"), "run", *arguments], cwd=tmp_path, env=others | environment,
                          capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{log_format} {fallback}"


@pytest.mark.parametrize(("origin", "code"), [("argument", 2), ("environment", 0), ("same", 0)])
def test_another_python_than_that_of_the_environment_is_refused(tmp_path, origin, code):
    for name in ("Makefile", "app"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/installed").touch()
    for name, says in ((".venv/bin/python", "3.11"), (".venv/bin/gunicorn", "served"), ("another", "3.99")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    python = str(tmp_path / (".venv/bin/python" if origin == "same" else "another"))
    others = {k: v for k, v in os.environ.items() if k not in (*NAMES, "MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    done = subprocess.run([need("make"), "run", *[f"PYTHON={python}"] * (origin != "environment")], cwd=tmp_path,
                          env=others | ({"PYTHON": python} if origin == "environment" else {}), capture_output=True,
                          text=True, check=False)
    assert (done.returncode, "served" in done.stdout) == (code, not code)
    assert done.stderr.splitlines()[:1] == (
        [f".venv has Python 3.11: to use {python}, remove it first (rm -r .venv)"] if code else [])


def test_service_defaults_may_hold_white_space(monkeypatch, tmp_path):
    """As an image has them that is built with PREPROCESSING."""
    monkeypatch.setenv("SERVICE_DEFAULTS", "LABELS_PATH=/my labels.txt MODEL_PATH= PREPROCESSING=resize=256 crop=224 "
                                           "mean=0.5,0.5,0.5  LOG_FORMAT=text\tTOP_K=3")
    for name in ("LABELS_PATH", "MODEL_PATH", "PREPROCESSING", "LOG_FORMAT", "TOP_K"):
        monkeypatch.delenv(name, raising=False)
    settings = Settings.load(tmp_path / "none")
    assert settings.preprocessing == "resize=256 crop=224 mean=0.5,0.5,0.5"
    assert (str(settings.labels_path), settings.model_path) == ("/my labels.txt", None)
    assert (settings.log_format, settings.top_k) == ("text", 3)


@pytest.mark.parametrize(("text", "message"), [
    ("API_KEY=secret", "line 1 of .env: API_KEY is not a setting; did you mean API_KEYS?"),
    ("TOP_K=3\n\n# a comment\n\nMODLE_NAME=a", "line 5 of .env: MODLE_NAME is not a setting; did you mean MODEL_NAME?"),
    ("model_name=a", "line 1 of .env: model_name is not a setting; did you mean MODEL_NAME?"),
    ("JOB_TTL=5", "line 1 of .env: JOB_TTL is not a setting; did you mean JOBS_TTL?"),  # of an optional part
    ("OTEL_TRACE_EXPORTER=otlp", "line 1 of .env: OTEL_TRACE_EXPORTER is not a setting; did you mean "
                                 "OTEL_TRACES_EXPORTER?"),
    ("MY_OWN=5", "line 1 of .env: MY_OWN is not a setting, nor known to belong to another program: docs/settings.md "
                 "lists both; begin names of your own with X_"),
    ("MODELS=cats@1=resnet18\nCATS__1__TOPK=3", "line 2 of .env: CATS__1__TOPK is not a setting; did you mean "
                                                "CATS__1__TOP_K?"),
    ("CATS__TOP_K=3", "line 1 of .env: CATS__TOP_K is not a setting: no model in MODELS is called so"),
    ("MODELS=cats=resnet18,dogs=resnet18\nB__TOP_K=3",
     "line 2 of .env: B__TOP_K is not a setting: no model in MODELS is called so"),
    ("API_KEYS=a\nZm9vYmFyYg==", "line 2 of .env: this name is not a setting, nor known to belong to another program: "
                                 "docs/settings.md lists both; begin names of your own with X_"),  # a secret's rest
    ("export PORT=1\nPORT: 5000", "line 2 of .env cannot be parsed: write PORT=value"),
    ("API_KEYS", "line 1 of .env cannot be parsed: write API_KEYS=value"),
    ("API_KEYS=\"a, b\nPORT=1", "line 1 of .env cannot be parsed: write API_KEYS=value, with quotes around a value "
                               "with spaces or #"),
    ("API_KEYS=a\nZm9v+YmFy==", "line 2 of .env cannot be parsed: write NAME=value, with quotes around a value with "
                                "spaces or #"),  # perhaps the rest of a secret, which must not be shown
    ("# caf\xe9", "line 1 of .env is not text in UTF-8"),
])
def test_a_wrong_line_of_the_file_is_refused_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / ".env").write_bytes(text.encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as e:
        Settings.load()
    assert str(e.value) == message


def test_the_file_may_set_what_is_for_other_programs(tmp_path, monkeypatch):
    (tmp_path / "compose.override.yaml").write_text("services: {service: {image: '${REGISTRY}/service'}}\n")
    (tmp_path / ".env").write_text("\ufeff" + """# for all
        COMPOSE_PROFILES=jobs
        POSTGRES_PASSWORD='a b'
        REGISTRY=registry.example.org
        DISK=/disk
        MODEL_DIR=${DISK}/models
        export X_OWN=1
        PGSSLMODE=require
        GUNICORN_CMD_ARGS=--backlog=5
        no_proxy=localhost
        TZ=UTC
        OTEL_SERVICE_NAME=a
        MODELS=cats@2=resnet18
        CATS__2__TOP_K=2
        CATS__SPLIT=2
        """.replace("\n        ", "\r\n"), encoding="utf-8")
    for name in ("no_proxy", "TZ"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and it is gone again when the test ends
    settings = Settings.load(tmp_path / ".env")
    assert (settings.model_dir, settings.of_models) == (Path("/disk/models"), (
        ("CATS__2__TOP_K", "2"), ("CATS__SPLIT", "2")))
    assert (os.environ["no_proxy"], os.environ["TZ"]) == ("localhost", "UTC")  # libraries look for these there
    assert "POSTGRES_PASSWORD" not in os.environ


@pytest.mark.parametrize(("name", "meant"), [
    ("API_KEY", "API_KEYS"), ("MODLE_NAME", "MODEL_NAME"), ("TOPK", "TOP_K"), ("PORTS", "PORT"),
    ("LOGLEVEL", "LOG_LEVEL"), ("cache_url", "CACHE_URL"), ("CACHE_URI", "CACHE_URL"), ("DATABASE_UR", "DATABASE_URL"),
    ("WORKER", "WORKERS"), ("OTEL_TRACE_EXPORTER", "OTEL_TRACES_EXPORTER"), ("CATS__TOPK", "CATS__TOP_K"),
    ("CORS", "CORS_ORIGINS"), ("MODEL", "MODEL_NAME"), ("CAT__TOP_K", "CATS__TOP_K")])
def test_a_variable_that_is_nearly_a_setting_is_noticed(name, meant):
    assert setting_names.misspelt({"MODELS": "cats=resnet18", name: "1"}) == [
        f"{name} in the environment is not a setting; did you mean {meant}?"]


@pytest.mark.parametrize(("name", "meant"), [
    ("MODEL", "MODEL_NAME"), ("MODELNAME", "MODEL_NAME"), ("WORKER", "WORKERS"), ("GPU", "DEVICE"), ("TOPK", "TOP_K"),
    ("MAXSIZE", "MAX_FILE_SIZE"), ("MAX_SIZE", "MAX_FILE_SIZE"), ("LOGLEVEL", "LOG_LEVEL"), ("LOG", "LOG_LEVEL"),
    ("APIKEY", "API_KEYS"), ("KEY", "API_KEYS"), ("PORTS", "PORT"), ("TIMEOUT", "REQUEST_TIMEOUT"),
    ("CORS", "CORS_ORIGINS"), ("ORIGINS", "CORS_ORIGINS"), ("CORE", "CORES"), ("CACHE", "CACHE_URL"),
    ("RATE_LIMITS", "RATE_LIMIT"), ("LABELS", "LABELS_PATH"), ("WEIGHTS", "MODEL_PATH"),
    ("BATCH_SIZE", "MAX_BATCH_SIZE"), ("QUEUE", "MAX_QUEUE"), ("FALLBACK", "MODEL_FALLBACK"), ("DB_URL", None),
    ("DATABASE", "DATABASE_URL"), ("PRECISON", "PRECISION"), ("PROXIES", "TRUSTED_PROXIES"), ("JOB", "JOBS"),
    ("MODELS_DIR", "MODEL_DIR"), ("MY_OWN", None)])
def test_what_was_probably_meant(name, meant):
    assert setting_names.likeliest(name, NAMES) == meant


def test_a_variable_for_no_model_is_noticed():
    assert setting_names.misspelt({"MODELS": "cats=resnet18", "DOGS__TOP_K": "1", "AIRFLOW__CORE__X": "1"}) == [
        "DOGS__TOP_K in the environment is not used: no model in MODELS is called so"]
    assert setting_names.misspelt({"DOGS__TOP_K": "1"}) == []


def test_nothing_is_noticed_in_the_environments_of_shells_and_pods():
    links = {f"{service}_{what}": text for service in ("MODEL", "MODELS", "WORKERS", "JOBS", "HOST", "MAX_JOB", "DATA")
             for what, text in (("SERVICE_HOST", "10.0.0.7"), ("SERVICE_PORT", "80"), ("SERVICE_PORT_HTTP", "80"),
                                ("PORT", "tcp://10.0.0.7:80"), ("PORT_80_TCP", "tcp://10.0.0.7:80"),
                                ("PORT_80_TCP_ADDR", "10.0.0.7"), ("PORT_80_TCP_PORT", "80"))}
    shell = dict.fromkeys((
        "HOSTNAME", "HOSTTYPE", "HOME", "POST", "SORT", "PART", "TTY", "TERM", "SHELL", "SHLVL", "PATH", "PWD",
        "OLDPWD", "LANG", "LC_ALL", "LS_COLORS", "USER", "LOGNAME", "MAIL", "HISTSIZE", "HISTFILE", "EDITOR", "PAGER",
        "DISPLAY", "SSH_TTY", "XDG_RUNTIME_DIR", "INVOCATION_ID", "LISTEN_FDS", "JOURNAL_STREAM", "NOTIFY_SOCKET",
        "JOB_NAME", "BUILD_ID", "CI", "PYTHONPATH", "VIRTUAL_ENV", "http_proxy", "NO_PROXY", "K_SERVICE", "POD_IP",
        "NODE_NAME", "MODEL_ID", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "AWS_REGION",
        "DEBUG", "TOKEN", "OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "SERVICE_DEFAULTS"), "1")
    assert setting_names.misspelt({**links, **shell, **dict.fromkeys(NAMES, "1")}) == []


def test_a_models_name_that_is_nearly_right_is_recognised():
    with pytest.raises(SettingsError, match=r"in lower case.*, got 'EfficientNet-B0'; did you mean efficientnet_b0\?"):
        Settings.parse({"MODEL_NAME": "EfficientNet-B0"})
    with pytest.raises(SettingsError, match=r"^PRECISION must be one of .*, got 'fp322'; did you mean fp32\?"):
        Settings.parse({"PRECISION": "fp322"})


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
