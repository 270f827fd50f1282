"""Those who call the service: Postman's collection and the documentation's examples, run against a running service."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, documentation, need

RUNNERS = {"console": "bash", "bash": "bash", "python": sys.executable, "javascript": "node"}


def test_postman_collection(service, tmp_path):
    report = tmp_path / "newman.json"
    done = subprocess.run(
        [need("newman"), "run", str(ROOT / "tests/postman_collection.json"), "--working-dir", str(ROOT / "tests"),
         "--env-var", f"base_url={service.url}", "--reporters", "cli,json", "--reporter-json-export", str(report)],
        capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    totals = json.loads(report.read_text())["run"]["stats"]
    requests = len(re.findall('"request": {', (ROOT / "tests/postman_collection.json").read_text()))
    assert totals["requests"] == {"total": requests, "pending": 0, "failed": 0}
    assert totals["assertions"]["failed"] == 0
    assert totals["assertions"]["total"] >= 3 * requests


def test_postman_collection_has_every_endpoint(app):
    text = (ROOT / "tests/postman_collection.json").read_text()
    paths = {rule.rule for rule in app.url_map.iter_rules() if not rule.arguments} - {"/docs"}
    assert [path for path in paths if f'"{{{{base_url}}}}{path}"' not in text] == []


def examples():
    """(language, code) of the documentation's fenced blocks that follow a line <!-- run -->."""
    return re.findall(r"^<!-- run -->\n```(\w+)\n(.*?)^```", documentation(), re.M | re.S)


def script_of(language, code, url):
    """The example as a file's text, speaking to url; of a console block the commands after its prompts."""
    if language == "console":
        code = "".join(line[2:] for line in code.splitlines(keepends=True) if line.startswith(("$ ", "> ")))
    return code.replace("http://127.0.0.1:5000", url)


@pytest.mark.parametrize("index", range(max(1, len(examples()))))
def test_example_of_the_documentation(index, service, tmp_path):
    """Each example runs in a folder that has the photo it speaks of, prints the cat, and complains about nothing."""
    if not examples():
        pytest.fail("the documentation has no block marked with <!-- run -->")
    language, code = examples()[index]
    (tmp_path / "tests/images").mkdir(parents=True)
    for name in ("cat.jpg", "photo.jpg", "tests/images/chelsea.jpg"):
        shutil.copy(ROOT / "tests/images/chelsea.jpg", tmp_path / name)
    need({"javascript": "node"}.get(language, "bash"))
    need("curl")
    script = tmp_path / ("example.mjs" if language == "javascript" else "example")
    text = script_of(language, code, service.url)
    assert service.url in text, "the example speaks to another address than http://127.0.0.1:5000"
    script.write_text(("set -euo pipefail\n" if RUNNERS[language] == "bash" else "") + text, encoding="utf-8")
    done = subprocess.run([RUNNERS[language], str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          check=False, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    assert "tiger cat" in done.stdout
    assert '"status":"error"' not in done.stdout.replace(": ", ":")


def test_readme_has_an_example_for_each_client():
    assert {"console", "python", "javascript"} <= {language for language, _ in examples()}
