"""compose.yaml: Compose accepts it, it speaks of things that exist, and its configuration runs a job."""
import os
import re
import secrets
import shutil
import subprocess

import pytest
import requests
import yaml
from conftest import ROOT, need
from job_workers import Jobs
from servers import Postgres, Redis, find_program

from app.config import Settings
from app.optional_settings import OptionalSettings

OURS = ("service", "replica", "worker")
PROFILES = ("proxy", "jobs", "monitoring")
SETTINGS = {name.upper() for name in (*Settings.__dataclass_fields__, *OptionalSettings.__dataclass_fields__)}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def composed(**variables):
    """compose.yaml as Compose reads it with these variables."""
    def inserted(node):
        if isinstance(node, dict):
            return {key: inserted(value) for key, value in node.items()}
        if isinstance(node, list):
            return [inserted(value) for value in node]
        return VARIABLE.sub(lambda m: variables.get(m[1]) or m[2] or "", node) if isinstance(node, str) else node
    made = inserted(yaml.safe_load((ROOT / "compose.yaml").read_text()))
    for service in made["services"].values():
        environment = service.get("environment", {})
        service["environment"] = {name: variables.get(name) if value is None else value
                                  for name, value in environment.items() if value is not None or name in variables}
    return made


@pytest.fixture
def compose(tmp_path):
    """compose(*arguments, **variables): what Compose prints."""
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True, check=False).returncode:
        command = [need("docker-compose")]
    (tmp_path / "empty").touch()

    def run(*arguments, **variables):
        done = subprocess.run([*command, "--file", ROOT / "compose.yaml", "--env-file", tmp_path / "empty", *arguments],
                              env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables},
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr
    return run


@pytest.mark.parametrize("profiles", [(), *((name,) for name in PROFILES), PROFILES], ids="+".join)
def test_compose_accepts_it_and_complains_of_nothing(compose, profiles):
    assert compose(*(word for name in profiles for word in ("--profile", name)), "config", "--quiet")[1] == ""


def test_compose_reads_it_as_these_tests_do(compose):
    variables = {"POSTGRES_PASSWORD": "a$ b", "JOBS": "on", "PORT": "8000"}
    theirs, ours = yaml.safe_load(compose(
        *(word for name in PROFILES for word in ("--profile", name)), "config", **variables)[0]), composed(**variables)
    assert theirs["services"].keys() == ours["services"].keys()
    for name, service in ours["services"].items():
        found = theirs["services"][name].get("environment", {})
        assert {k: v.replace("$$", "$") for k, v in found.items() if v is not None} == service["environment"]
        assert theirs["services"][name].get("command") == service.get("command")


def test_the_service_is_alone_unless_the_profile_is_asked_for():
    made = composed()
    assert [name for name, service in made["services"].items() if "profiles" not in service] == ["service"]
    assert {name for service in made["services"].values() for name in service.get("profiles", [])} == set(PROFILES)
    assert not composed()["services"]["service"]["environment"].keys() & {"JOBS", "HISTORY", "INPUT_URLS"}


def test_all_that_it_speaks_of_exists():
    made = composed()
    for name, service in made["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in made["volumes"], name
        assert set(service["networks"]) <= {"default", *made["networks"]}
        for other in service.get("depends_on", {}):
            assert "healthcheck" in made["services"][other]
            assert made["services"][other].get("profiles", service["profiles"]) == service["profiles"]
    for name in OURS:
        service = made["services"][name]
        build = service["build"]
        assert re.search(rf"^FROM .* AS {build['target']}$", DOCKERFILE, re.M)
        assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.M))
    named = yaml.safe_load((ROOT / "compose.yaml").read_text())["x-settings"]
    of_s3 = {name for name in named if name.startswith("AWS_")}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"} < of_s3
    assert set(named) - SETTINGS - of_s3 == {"PGPASSWORD"}
    assert {"STORAGE_URL", "INPUT_URLS", "PRIVATE_NETWORKS"} < set(named)
    assert set(made["services"]["worker"]["environment"]) - set(named) <= SETTINGS


def test_ours_cannot_write_but_where_they_must():
    for name in OURS:
        service = composed()["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["volumes"] == ["data:/app/data"]
        assert "/app/data" in DOCKERFILE
    services = composed()["services"]
    assert all(service["read_only"] for service in services.values())
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(ports) == {"service", "proxy", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for name in ("prometheus", "grafana") for port in ports[name])


def test_it_has_no_secret():
    assert "PASSWORD" not in re.sub(r"(\w*PASSWORD): \$\{POSTGRES_PASSWORD:-\}|POSTGRES_PASSWORD=\.\.\.", "",
                                    (ROOT / "compose.yaml").read_text())


@pytest.fixture
def servers(tmp_path):
    """Running Redis and PostgreSQL, as compose.yaml has them, and its password."""
    need("redis-server")
    need("initdb")
    password = secrets.token_hex(8)
    made = composed(POSTGRES_PASSWORD=password)["services"]

    class ComposedRedis(Redis):
        def command(self):
            program, *options = made["redis"]["command"]
            return [find_program(program), *options, "--port", str(self.port), "--dir", str(self.folder)]
    redis, postgres = ComposedRedis(tmp_path), Postgres(tmp_path)
    wanted = made["postgres"]["environment"]  # the image's entry point does the same with it
    rules = postgres.data / "pg_hba.conf"
    rules.write_text(f"host all {wanted['POSTGRES_USER']} 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    redis.start()
    postgres.start()
    postgres.execute(f"CREATE ROLE {wanted['POSTGRES_USER']} LOGIN PASSWORD '{wanted['POSTGRES_PASSWORD']}'")
    postgres.execute(f"CREATE DATABASE {wanted['POSTGRES_DB']} OWNER {wanted['POSTGRES_USER']}")
    yield redis, postgres, password
    redis.stop()
    postgres.remove()


@pytest.mark.slow  # make test-deploy
def test_its_configuration_runs_a_job(servers, start_service, start_worker, tmp_path):
    redis, postgres, password = servers
    made = composed(JOBS="on", HISTORY="on", POSTGRES_PASSWORD=password)["services"]

    def here(name):
        places = {"@postgres/": f"@127.0.0.1:{postgres.port}/", "//redis:6379/": f"//127.0.0.1:{redis.port}/"}
        variables = dict(made[name]["environment"])
        for place, local in places.items():
            variables = {k: v.replace(place, local) for k, v in variables.items()}
        return variables | {"DATA_DIR": str(tmp_path / "data"), "DRAIN_SECONDS": "0"}
    health = made["postgres"]["healthcheck"]["test"]
    assert subprocess.run([find_program(health[1]), *health[2:], "-p", str(postgres.port)], check=False,
                          capture_output=True).returncode == 0
    assert made["worker"]["command"] == ["python", "-m", "app", "worker"]  # which start_worker starts
    assert made["worker"]["environment"]["WORKER_PORT"] == "5000"  # where `python -m app health` asks by default
    worker = {name: value for name, value in here("worker").items() if name != "WORKER_PORT"}
    service = start_service(**here("service"))
    start_worker(MODEL_NAME="efficientnet_lite0", SHORT_WORKERS="0", **worker)  # the other process takes both queues
    jobs = Jobs(service.wait_ready())
    with open(ROOT / "tests/images/chelsea.jpg", "rb") as file:
        job = jobs.wait(jobs.accepted(files={"file": file}))
    assert job["state"] == "succeeded", job
    assert job["result"]["predictions"][0]["class"] == "tiger cat"
    assert requests.get(f"{service.url}/history", timeout=10).status_code == 200
