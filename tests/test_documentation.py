"""The documentation and the code say the same: links, endpoints, error codes, commands, names and figures."""
import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from app import create_app
from app.config import Settings
from app.history import recorder
from app.jobs import metrics as jobs_metrics
from app.server import counters
from bench import report

PAGES = sorted(ROOT / name for name in (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "bench/scale.md",
    *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
ALL = "\n".join(TEXTS.values())
FENCED = re.compile(r"^```\w*\n.*?^```$", re.M | re.S)


# --- links ---

def prose(text):
    """A page without its code, in which a bracket is no link and a # no heading."""
    return re.sub(r"`[^`\n]+`", lambda code: re.sub(r"[\[\]()]", " ", code[0]), FENCED.sub("", text))


def anchors(text):
    """The fragments of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        assert anchor not in found, f"two headings of one page have the anchor {anchor}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_links_of_a_page_lead_somewhere(page):
    text = prose(TEXTS[page])
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img src=\"([^\"]+)\"", text)
    broken = []
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (fragment and fragment not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_files_that_are_named_exist():
    is_path = re.compile(r"(app|bench|deploy|docs|examples|tests)(/[\w.-]+)*/([\w.-]+\.(py|js|md|conf|ya?ml|json))?")
    named = {name for name in code_of(ALL) if is_path.fullmatch(name)}
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_readme_leads_to_every_page_of_docs():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", TEXTS["README.md"]))
    assert linked == {page for page in TEXTS if page.startswith("docs/")}


# --- what the service has ---

@pytest.fixture(scope="module")
def everything(app, tmp_path_factory):
    """The application with all of its optional endpoints."""
    variables = {"JOBS": "on", "HISTORY": "on", "DATA_DIR": str(tmp_path_factory.mktemp("data"))}
    return create_app(Settings.parse(variables), app.extensions["model"])


def test_every_endpoint_is_documented(everything):
    pages = "\n".join(TEXTS[f"docs/{name}.md"] for name in ("api", "jobs", "open-inference"))
    paths = {re.sub(r"<\w+>", lambda name: name[0][1:-1].removeprefix("job_").upper(), rule.rule)
             for rule in everything.url_map.iter_rules() if "filename" not in rule.arguments}
    paths -= {"/docs/NAME"}  # Swagger UI's files
    assert len(paths) > 25
    assert [path for path in sorted(paths) if f"`{path}`" not in pages] == []


def error_codes():
    """What the code calls its errors: {code: a place that has it}. Found are calls and pairs that have a status next to
    a name in capitals, `Refused("…")`, `{"error": "…"}` and the lists of openapi_answers.py."""
    found = {}
    for path in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = []
            if isinstance(node, (ast.Call, ast.Tuple)):
                values = node.args if isinstance(node, ast.Call) else node.elts
                name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
                first = getattr(values[0], "value", None) if values else None
                if name != "Refused" and not (isinstance(first, int) and 400 <= first < 600):
                    values = []
            elif isinstance(node, ast.Dict):
                values = [value for key, value in zip(node.keys, node.values, strict=True)
                          if getattr(key, "value", None) == "error"]
            elif isinstance(node, ast.List) and path.name in ("openapi.py", "openapi_answers.py"):
                values = [one for one in node.elts if "_" in str(getattr(one, "value", ""))]
            for value in values:
                text = getattr(value, "value", None)
                if isinstance(text, str) and re.fullmatch(r"[A-Z_]{6,}", text):
                    found[text] = path.relative_to(ROOT).as_posix()
    return found


def test_every_error_code_is_documented():
    codes = error_codes()
    assert len(codes) > 30
    table = "\n".join(re.findall(r"^\| (?:\d|`[A-Z_]+`).*$", TEXTS["docs/api.md"] + TEXTS["docs/jobs.md"], re.M))
    assert {code: place for code, place in codes.items() if f"`{code}`" not in table} == {}


def test_every_documented_error_code_exists():
    cells = re.findall(r"^\| \d{3} \| (.*?) \|", TEXTS["docs/api.md"], re.M)
    documented = set(re.findall(r"`(\w+)`", " ".join(cells)))
    assert len(documented) > 30
    assert documented - set(error_codes()) == set()


def code_of(text):
    """A page's code: inline, and the commands of its console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text)) + [
        line[2:] for block in blocks for line in block.splitlines() if line.startswith(("$ ", "> "))]


def test_every_command_is_documented():
    shown = subprocess.run([sys.executable, "-m", "app", "--help"], cwd=ROOT, capture_output=True, text=True,
                           timeout=60, check=True).stdout
    commands = set(re.findall(r"^    (\w+)  ", shown, re.M))
    assert {"predict", "prepare", "reload"} <= commands
    named = {name for code in code_of(ALL) for name in re.findall(r"-m app ([a-z]+)", code)}
    assert named == commands


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for code in code_of(ALL) for target in re.findall(r"(?:^|\w=\S* |&& )make ([a-z][\w-]*)", code)}
    assert {"run", "test"} <= named
    assert named - targets == set()


def test_metrics_that_are_named_exist():
    named = set(re.findall(r"model_server_(\w+)", ALL))
    assert len(named) > 15
    measures = counters.MEASURES | recorder.MEASURES | jobs_metrics.OF_THE_SERVICE
    known = {name + "_total" if measure.kind == "counter" else name for name, measure in measures.items()}
    assert named - known == set()


def test_what_is_written_in_capitals_exists():
    """Settings, error codes and variables of the build, so that none outlives its removal; those of OpenTelemetry, S3,
    Kubernetes and Gunicorn aside."""
    folders = ("app", "bench", "deploy", "examples", "tests/fuzz", ".github")
    sources = [ROOT / name for name in ("Makefile", "Dockerfile", "compose.yaml", "gunicorn.conf.py", ".env.example")]
    sources += [path for folder in folders for path in (ROOT / folder).rglob("*")
                if path.suffix in (".py", ".yml", ".yaml", ".js", ".conf", ".service", ".cfg", ".json")]
    known = set(re.findall(r"[A-Za-z]+(?:_[A-Za-z]+)+", "\n".join(p.read_text(encoding="utf-8") for p in sources)))
    known = {name.upper() for name in known}
    named = {name for code in code_of(re.sub(r"\b(?:OTEL|AWS|SSL|GUNICORN)_\w*", "", prose(ALL)))
             for name in re.findall(r"(?<![\w*])[A-Z]+(?:_[A-Z]+)+\b(?!\*|=tcp:)", code)}
    assert len(named) > 50
    assert sorted(named - known) == []


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_readme_says_what_other_pages_say():
    """Its settings have their defaults, and its model is that of examples/README.md, which a test runs."""
    pattern = re.compile(r"\| (`[A-Z_]+`) \| (.*?) \|")
    said, known = (dict(pattern.match(row).groups() for row in rows(TEXTS[page]) if pattern.match(row))
                   for page in ("README.md", "docs/settings.md"))
    assert len(said) == 10
    assert said.items() <= known.items()
    model, original = (re.search(r"^```python\n(import cv2.*?)^```", TEXTS[page], re.M | re.S)[1]
                       for page in ("README.md", "examples/README.md"))
    assert model == original


def test_no_example_needs_a_newer_curl_than_debian_and_ubuntu_have():
    """--json came with 7.82; Ubuntu 22.04 has 7.81."""
    assert re.findall(r"curl[^\n]* --json.*", ALL) == []


# --- what was measured ---

def test_figures_are_those_of_the_benchmark():
    outcome = json.loads((ROOT / "bench/results.json").read_text())
    measured = {"| " + " | ".join(report.throughput_row(outcome, system)) + " |"
                for system in outcome["results"] if system != report.LIGHT}
    assert len(measured) > 10
    assert measured - set(rows(TEXTS["docs/performance.md"])) == set()
    of_readme = [row for row in rows(TEXTS["README.md"]) if re.search(r"\(\d\.\d\d\)", row)]
    assert len(of_readme) >= 4  # each without the last column
    assert set(of_readme) - {row.rpartition("|")[0].rpartition("|")[0] + "|" for row in measured} == set()


def test_readme_is_short():
    assert len(TEXTS["README.md"].split()) <= 1000
