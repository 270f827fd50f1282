"""deploy/prometheus.yml, the alerts and the dashboard with a real Prometheus that scrapes the running service."""
import json
import time

import pytest
import requests
from conftest import ROOT, need
from servers import Server, find_program

pytestmark = pytest.mark.slow  # make test-deploy
DASHBOARD = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
CAT = (ROOT / "tests/images/chelsea.jpg").read_bytes()
CHOSEN = {"$__rate_interval": "1m", "$instance": ".*", "$job": "model-server"}
KEY = {"X-API-Key": "a-key"}


class Prometheus(Server):
    """Prometheus with the configuration of deploy/, which asks a service on another port, and more often."""

    def __init__(self, folder, target):
        super().__init__(folder)
        text = (ROOT / "deploy/prometheus.yml").read_text()
        assert "[service:5000]" in text
        assert "# authorization: {credentials: KEY}" in text
        text = text.replace("# authorization: {credentials: KEY}", "authorization: {credentials: a-key}")
        text = text.replace("[service:5000]", f"['{target}']").replace("10s", "1s")
        (self.folder / "prometheus.yml").write_text(text)
        (self.folder / "alerts.yml").write_text((ROOT / "deploy/alerts.yml").read_text())

    def command(self):
        return [find_program("prometheus"), f"--config.file={self.folder}/prometheus.yml",
                f"--storage.tsdb.path={self.folder}/data", f"--web.listen-address=127.0.0.1:{self.port}"]

    def get(self, path, **parameters):
        answer = requests.get(f"http://127.0.0.1:{self.port}/api/v1/{path}", params=parameters, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression):
        return self.get("query", query=expression)["result"]

    def firing(self):
        """The names of the alerts that fire, or will."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"]}

    def answers(self):
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).status_code == 200
        except requests.RequestException:
            return False


def wait(condition, what=None):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.2)


def test_the_dashboard_and_the_alerts_work_on_a_running_service(start_service, tmp_path):
    need("prometheus")
    service = start_service(CACHE_URL="memory://", API_KEYS="a-key", RATE_LIMIT="4/hour", JOBS="on",
                            DATA_DIR=str(tmp_path / "data")).wait_ready()
    prometheus = Prometheus(tmp_path, f"127.0.0.1:{service.port}").start()

    def send(path, **more):
        requests.post(service.url + path, timeout=30, **more)
    try:
        send("/predict", files={"file": CAT}, headers=KEY)
        wait(lambda: prometheus.query("model_server_info"))  # from which the dashboard knows jobs and instances
        send("/predict", files={"file": CAT}, headers=KEY)
        send("/predict", files={"file": b"no picture"}, headers=KEY)
        send("/predict/batch", files={"files": CAT}, headers=KEY)
        send("/predict", files={"file": CAT}, headers=KEY)  # more than RATE_LIMIT
        send("/predict", files={"file": CAT})
        asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
        for variable, value in CHOSEN.items():
            asked = [expression.replace(variable, value) for expression in asked]
        assert "$" not in "".join(asked)
        assert len(asked) > 10
        for expression in asked:
            wait(lambda expression=expression: prometheus.query(expression), expression)
        assert prometheus.get("label/job/values") == ["model-server"]
        wait(lambda: {rule["health"] for group in prometheus.get("rules")["groups"]
                      for rule in group["rules"]} == {"ok"})
        assert "ModelServerDown" not in prometheus.firing()
        service.kill()
        wait(lambda: "ModelServerDown" in prometheus.firing())
    finally:
        prometheus.stop()
