"""The page "A model of your own": its class and its commands are run, and answer as it says."""
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "examples/README.md").read_text()
MEASURED = re.compile(r'("(?:inference_time|read|queue|decode|inference|encode)":)[0-9.e-]+|[0-9a-f]{8}-[0-9a-f-]{27}')


def transcript():
    """[(command, what it prints)] of the page's first console block with answers."""
    (block,) = [block for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) if "smallest=5" in block]
    return [tuple(part.split("\n", 1)) for part in re.split(r"^\$ ", block, flags=re.M)[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The top level as a newcomer has it, with my_model.py."""
    folder = tmp_path_factory.mktemp("top")
    for name in ("app", ".venv", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "gunicorn.conf.py", folder)
    (folder / "my_model.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    return folder


def test_the_class_has_fifteen_lines_at_most(folder):
    assert len([line for line in (folder / "my_model.py").read_text().splitlines() if line.strip()]) <= 15


def test_commands_answer_as_printed(folder, start_service, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    service = start_service(MODEL_NAME="my_model:Faces").wait_ready()
    commands = transcript()
    assert len(commands) == 4
    for command, expected in commands:
        command = command.replace("http://127.0.0.1:5000", service.url).replace(".venv/bin/python", sys.executable)
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)
        assert MEASURED.sub(r"\1", done.stdout).strip() == MEASURED.sub(r"\1", expected).strip(), done.stderr
    assert f"curl -F file=@tests/images/chelsea.jpg {service.url}/predict" in service.log
