"""The files of deploy/ are accepted by the programs that read them, and agree with the service and with each other."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, documentation, need

from app.api.metrics import MEASURES, PREFIX
from app.config import Settings
from app.optional_settings import OptionalSettings

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "image-classifier-service.service"
SETTINGS = {name.upper() for name in (*Settings.__dataclass_fields__, *OptionalSettings.__dataclass_fields__)}
DEFAULTS = Settings.parse({})
LONGEST_STOP_S = DEFAULTS.drain_seconds + DEFAULTS.finish_seconds
DOCKER_KILLS_AFTER_S = 10
KUBERNETES = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
              if one["metadata"]["name"] == "model-server"}
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]


def output(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


# --- systemd ---

def unit(name):
    """The last value of a unit's option."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.M)[-1]


@pytest.fixture
def installed_unit(tmp_path):
    """The unit as it would be where this environment is."""
    text = UNIT.read_text().replace("/opt/image-classifier-service/.venv/bin/gunicorn",
                                    f"{Path(sys.executable).parent}/gunicorn")
    (tmp_path / UNIT.name).write_text(text.replace("/opt/image-classifier-service", str(ROOT)))
    return tmp_path / UNIT.name


def test_systemd_accepts_the_unit(installed_unit):
    code, said = output(need("systemd-analyze"), "verify", installed_unit)
    assert [line for line in said.splitlines() if UNIT.name in line] == []
    assert code == 0, said


def test_the_unit_is_as_closed_as_the_documentation_says(installed_unit):
    _, said = output(need("systemd-analyze"), "security", "--offline=true", "--no-pager", installed_unit)
    level = float(re.search(r"exposure level for .*: ([0-9.]+) OK", said)[1])
    documented = float(re.search(r"exposure level is ([0-9.]+)", documentation())[1])
    assert level <= documented


def test_the_unit_leaves_the_service_time_to_stop_and_a_place_for_its_models():
    assert int(unit("TimeoutStopSec")) > LONGEST_STOP_S
    assert unit("ExecReload") == "/bin/kill -HUP $MAINPID"
    variables = dict(variable.split("=") for variable in unit("Environment").split())
    assert set(variables) <= SETTINGS
    assert {value.split("/")[:2] == ["%S", unit("StateDirectory")] for value in variables.values()} == {True}


# --- Docker ---

def test_docker_and_compose_need_no_option_to_let_the_service_stop():
    assert LONGEST_STOP_S < DOCKER_KILLS_AFTER_S
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    worker = services["worker"]  # whose jobs have longer
    for name in ("service", "replica"):
        assert "DRAIN_SECONDS" not in services[name]["environment"]
        assert int(services[name].get("stop_grace_period", "10s")[:-1]) > LONGEST_STOP_S
    assert int(worker["stop_grace_period"][:-1]) > int(worker["environment"]["DRAIN_SECONDS"])


# --- Kubernetes ---

def test_kubernetes_asks_for_paths_and_settings_that_exist(client):
    container = POD["containers"][0]
    for probe, path in (("startup", "/health"), ("readiness", "/health"), ("liveness", "/live")):
        assert container[f"{probe}Probe"]["httpGet"]["path"] == path
        assert client.get(path).status_code == 200
    assert container["ports"][0]["containerPort"] == DEFAULTS.port
    assert set(KUBERNETES["ConfigMap"]["data"]) | set(KUBERNETES["Secret"]["stringData"]) <= SETTINGS
    Settings.parse(KUBERNETES["ConfigMap"]["data"] | KUBERNETES["Secret"]["stringData"])


def test_kubernetes_waits_until_the_service_has_stopped():
    drain_s, finish_s = (float(KUBERNETES["ConfigMap"]["data"][name]) for name in ("DRAIN_SECONDS", "FINISH_SECONDS"))
    assert POD["terminationGracePeriodSeconds"] > drain_s + finish_s
    assert finish_s > DEFAULTS.request_timeout
    readiness = POD["containers"][0]["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < drain_s


def test_kubernetes_runs_it_as_the_image_does():
    user, group = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M).groups()
    assert (str(POD["securityContext"]["runAsUser"]), str(POD["securityContext"]["runAsGroup"])) == (user, group)


def test_the_autoscaler_asks_for_a_gauge_of_metrics():
    name = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert MEASURES[name.removeprefix(PREFIX)].kind == "gauge"
    rules = next(one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
                 if one["metadata"]["name"].endswith("adapter-rules"))["data"]["config.yaml"]
    rule, = yaml.safe_load(rules)["rules"]
    assert rule["name"]["matches"] == name
    assert name in rule["seriesQuery"]
    assert name in rule["metricsQuery"]


# --- load balancers, Prometheus, Grafana ---

def test_haproxy_accepts_its_configuration():
    code, said = output(need("haproxy"), "-c", "-f", DEPLOY / "haproxy.cfg")
    assert code == 0, said
    assert "WARNING" not in said


def test_load_balancers_wait_longer_than_the_service():
    haproxy = dict(re.findall(r"^ +timeout (\S+) +(\d+)s", (DEPLOY / "haproxy.cfg").read_text(), re.M))
    assert min(int(haproxy["server"]), int(haproxy["client"])) > DEFAULTS.request_timeout
    assert int(haproxy["http-keep-alive"]) < 75
    nginx = dict(re.findall(r"^ +(\w+) (\d+)[sm];", (DEPLOY / "nginx.conf").read_text(), re.M))
    assert int(nginx["proxy_read_timeout"]) > DEFAULTS.request_timeout
    assert int(nginx["client_max_body_size"]) * 2**20 > max(DEFAULTS.max_video_size, 8 * DEFAULTS.max_file_size)


def test_prometheus_accepts_its_configuration_with_the_alerts_beside_it(tmp_path):
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(DEPLOY / name, tmp_path)
    code, said = output(need("promtool"), "check", "config", tmp_path / "prometheus.yml")
    assert code == 0, said
    assert re.search(r"SUCCESS: 1 rule files found", said)


def test_grafana_finds_its_data_and_its_dashboard():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    source, = yaml.safe_load((DEPLOY / "grafana-datasource.yml").read_text())["datasources"]
    provider, = yaml.safe_load((DEPLOY / "grafana-dashboards.yml").read_text())["providers"]
    assert source["url"].removeprefix("http://").split(":")[0] in services
    assert mounted["./deploy/grafana-dashboard.json"].startswith(provider["options"]["path"] + "/")
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted.values()
    for name, place in mounted.items():
        assert not name.startswith("./") or (ROOT / name).exists(), name
        if name.startswith("./deploy/grafana-da") and name.endswith(".yml"):
            assert place.startswith("/etc/grafana/provisioning/")
    jobs = re.findall(r'job="([^"]+)"', (DEPLOY / "alerts.yml").read_text())
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert set(jobs) == {one["job_name"] for one in prometheus["scrape_configs"]}
