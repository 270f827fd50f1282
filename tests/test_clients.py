"""Those who call the service: Postman's collection and the documentation's examples, run against a running service.
The answers that README.md and docs/api.md show are like the real ones."""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, need
from servers import free_port

MEASURED = {"inference_time", "timings_ms", "request_id"}  # differ from one answer to the next
BARE_PATH = "/usr/local/bin:/usr/bin:/bin"  # as of a fresh shell on Debian

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
    """(page, language, code, output or "") of the documentation's fenced blocks that follow a line <!-- run -->; the
    output is that of a block of text right after it."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    block = re.compile(r"^<!-- run -->\n```(\w+)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.M | re.S)
    return [(page.name, *found) for page in pages for found in block.findall(page.read_text(encoding="utf-8"))]



def script_of(language, code, url):
    """The example as a file's text, speaking to url; of a console block the commands after its prompts."""
    if language == "console":
        code = "".join(line[2:] for line in code.splitlines(keepends=True) if line.startswith(("$ ", "> ")))
    return code.replace("http://127.0.0.1:5000", url)


def runner_of(language, code):
    """The command that runs the example: the Python of the system, unless the example needs a package."""
    if language == "python":
        return [sys.executable] if "import requests" in code else ["python3", "-I"]
    return [need("node") if language == "javascript" else need("bash")]


@pytest.mark.parametrize(("page", "language", "code", "output"), examples(),
                         ids=[f"{page} {language}" for page, language, _, _ in examples()])
def test_example_of_the_documentation(page, language, code, output, service, settings, tmp_path):
    """Each example runs as printed where nothing is activated, in a folder that has the photo it speaks of. It prints
    the cat, and complains about nothing."""
    (tmp_path / "tests/images").mkdir(parents=True)
    for name in ("cat.jpg", "photo.jpg", "tests/images/chelsea.jpg"):
        shutil.copy(ROOT / "tests/images/chelsea.jpg", tmp_path / name)
    for name, target in (("app", ROOT / "app"), (".venv", sys.prefix)):
        (tmp_path / name).symlink_to(target)
    need("curl")
    script = tmp_path / ("example.mjs" if language == "javascript" else "example")
    text = script_of(language, code, service.url)
    assert service.url in text or " -m app " in text, "speaks to another address than 127.0.0.1:5000"
    script.write_text(("set -euo pipefail\n" if language == "console" else "") + text, encoding="utf-8")
    environment = {"PATH": BARE_PATH, "HOME": str(tmp_path), "LANG": "C.UTF-8", "DEVICE": "cpu",
                   "MODEL_NAME": settings.model_name, "MODEL_DIR": str(settings.model_dir)}
    done = subprocess.run([*runner_of(language, code), str(script)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tiger cat" in done.stdout
    assert '"status":"error"' not in done.stdout.replace(": ", ":")
    assert output in ("", done.stdout), f"{page} prints something else"


def test_readme_starts_and_stops_the_service(tmp_path, settings, app):
    """`make run PORT=8080` and Ctrl-C, with nothing activated, in a folder whose packages are installed already."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n$ make run\n" in text
    for path in ROOT.iterdir():
        if not path.name.startswith((".venv", ".env", ".git")) and path.name not in ("data", "models"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "installed":
            (tmp_path / ".venv" / path.name).symlink_to(path)
    (tmp_path / ".venv/installed").touch()
    environment = {"PATH": BARE_PATH, "HOME": str(tmp_path), "HOST": "127.0.0.1", "DEVICE": "cpu", "PIP_NO_INDEX": "1",
                   "MODEL_NAME": settings.model_name, "MODEL_DIR": str(settings.model_dir)}
    need("make")
    port = str(free_port())
    (command,) = re.findall(r"`(make run PORT=8080)`", text)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command.replace("8080", port).split(), cwd=tmp_path, stdout=log, stderr=log,
                                   env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while "serving" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.02)
        shown = subprocess.run([need("curl"), "-sF", f"file=@{ROOT}/tests/images/chelsea.jpg",
                                f"http://127.0.0.1:{port}/predict"], capture_output=True, text=True, timeout=60).stdout
        assert "tiger cat" in shown
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_documentation_has_an_example_for_each_client():
    assert {"console", "python", "javascript"} <= {language for _, language, _, _ in examples()}
    assert {"console", "python"} <= {language for page, language, _, _ in examples() if page == "README.md"}


def answers_shown(page):
    """(command, JSON) of a page's console blocks with one curl command that a block of JSON follows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pairs = re.findall(r"^```console\n\$ (curl [^\n]*)\n```\n+```json\n(.*?)^```", text, re.M | re.S)
    return [(command, json.loads(shown)) for command, shown in pairs if "chelsea.jpg" in command
            and "/jobs" not in command and "/history" not in command]


def assert_like(shown, real, place="answer"):
    """An answer is like the one that is shown, which may leave out what … stands for, and whose times differ."""
    if shown == "…":
        return
    if isinstance(shown, dict):
        assert shown.keys() - {"…"} <= real.keys(), place
        assert "…" in shown or shown.keys() == real.keys(), place
        for name in shown.keys() - {"…"} - MEASURED:
            assert_like(shown[name], real[name], f"{place}.{name}")
        if isinstance(shown.get("timings_ms"), dict):
            assert "…" in shown["timings_ms"] or shown["timings_ms"].keys() == real["timings_ms"].keys(), place
    elif isinstance(shown, list):
        is_cut = shown[-1:] == ["…"]
        assert len(real) >= len(shown) if is_cut else len(real) == len(shown), place
        for index, one in enumerate(shown[:-1] if is_cut else shown):
            assert_like(one, real[index], f"{place}[{index}]")
    elif isinstance(shown, float):
        assert real == pytest.approx(shown, abs=1e-3), place
    elif isinstance(shown, str) and shown.endswith("…"):
        assert real.startswith(shown[:-1]), place
    else:
        assert real == shown, place


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_answers_are_like_those_shown(page, service):
    examples_shown = answers_shown(page)
    assert examples_shown
    for command, shown in examples_shown:
        arguments = shlex.split(command.replace("http://127.0.0.1:5000", service.url))
        real = subprocess.run([need("curl"), "-s", *arguments[1:]], cwd=ROOT, capture_output=True, timeout=60,
                              check=True).stdout
        assert_like(shown, json.loads(real), page)


def test_the_api_page_shows_a_whole_answer():
    (whole,) = [shown for _, shown in answers_shown("docs/api.md") if "…" not in json.dumps(shown, ensure_ascii=False)]
    assert len(whole["predictions"]) == 5
