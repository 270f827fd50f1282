"""The dashboard and the alert rules ask for what /metrics has, in words that Prometheus understands."""
import json
import re
import subprocess

import pytest
import requests
from conftest import ROOT, encoded, need
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.api.openapi_answers import ERRORS
from app.jobs.metrics import OF_THE_SERVICE

ALERTS = ROOT / "deploy/alerts.yml"
DASHBOARD = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
GIVEN_BY_PROMETHEUS = {"instance", "job"}
WHITE = encoded(Image.new("RGB", (40, 40), "white"))


@pytest.fixture(scope="module")
def labels_of(service):
    """{name of a sample: its labels' names} of a service that has answered a prediction and a batch."""
    service.predict(WHITE)
    requests.post(service.url + "/predict/batch", files={"files": WHITE}, timeout=30)
    from app.api.metrics import MEASURES, PREFIX
    text = requests.get(service.url + "/metrics", timeout=30).text
    found = {sample.name: set(sample.labels) for family in text_string_to_metric_families(text)
             for sample in family.samples}
    others = {f"{PREFIX}cache_lookups_total": MEASURES["cache_lookups"],  # this service has no cache, and no jobs
              **{PREFIX + name: measure for name, measure in OF_THE_SERVICE.items()}}
    return {name: set(measure.labels) for name, measure in others.items()} | found


def selectors(expression):
    """(metric's name, its labels' names, its {…}) for each series that an expression asks for."""
    for name, braces in re.findall(r"\b((?:model_server|process)_\w+)(\{[^}]*\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", braces)), braces


@pytest.mark.parametrize("expression", [*QUERIES, ALERTS.read_text()])
def test_every_series_that_is_asked_for_exists(labels_of, expression):
    asked = list(selectors(expression))
    assert asked
    for name, labels, braces in asked:
        assert name in labels_of
        assert labels <= labels_of[name] | GIVEN_BY_PROMETHEUS, name
        for code in re.findall(r'error!?="([A-Z_]+)"', braces):
            assert any(code in codes for _, codes, _ in ERRORS.values()), code
    for group in re.findall(r"by \(([^)]*)\)", expression):
        known = set().union(GIVEN_BY_PROMETHEUS, *(labels_of[name] for name, _, _ in asked))
        assert set(group.split(", ")) <= known


def test_promtool_understands_rules_and_queries(tmp_path):
    promtool = need("promtool")
    rules = [{"record": f"query_{i}", "expr": query.replace("$__rate_interval", "1m")}
             for i, query in enumerate(QUERIES)]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    for path in (ALERTS, tmp_path / "queries.yml"):
        done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"SUCCESS: \d+ rules found", done.stdout)


def test_alerts_fire_in_trouble_and_only_then(tmp_path):
    promtool = need("promtool")
    cases = tmp_path / "alerts_test.yml"
    cases.write_text((ROOT / "tests/alerts_test.yml").read_text().replace("ALERTS]", f"{ALERTS}]"))
    done = subprocess.run([promtool, "test", "rules", cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested():
    tested = (ROOT / "tests/alerts_test.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    assert len(alerts) > 5
    assert [alert for alert in alerts if alert not in tested] == []


def test_panels_do_not_overlap():
    taken = [(x, y) for panel in DASHBOARD["panels"] for place in [panel["gridPos"]]
             for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
