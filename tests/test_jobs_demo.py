"""`make jobs-demo`: what it shows, and that it leaves nothing behind."""
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, need

from deploy import jobs_demo

SERVERS = ("redis-server", "initdb", "postgres")

pytestmark = pytest.mark.slow  # make test-deploy


@pytest.fixture
def folder():
    """A folder for temporary files that the servers' user can reach, which it cannot those of pytest."""
    with tempfile.TemporaryDirectory(prefix="demo-") as path:
        Path(path).chmod(0o711)
        yield Path(path)


@pytest.fixture
def start_demo(folder, model_dir):
    """start_demo(*arguments, **variables): its process."""
    started = []

    def start(*arguments, **variables):
        need("curl")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "MODEL_DIR": str(model_dir),
                       "MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "API_KEYS": "for-another-service",
                       **variables}
        started.append(subprocess.Popen([sys.executable, ROOT / "deploy/jobs_demo.py", *arguments], env=environment,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        preexec_fn=listen_to_ctrl_c))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=300)


def listen_to_ctrl_c():
    """Shells have what they start in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def left_behind(folder):
    """Files in this folder for temporary files, and processes that work in it or know of it."""
    left = [str(path) for path in folder.rglob("*")]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # Redis overwrites its environment
            if str(folder) in os.readlink(path / "cwd") or str(folder).encode() in (path / "environ").read_bytes():
                left.append((path / "cmdline").read_text())
    return left


def assert_nothing_is_left(folder):
    """Processes that have been killed may still be ending."""
    until = time.monotonic() + 60
    while left := left_behind(folder):
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.mark.parametrize("arguments", [["--embedded"], []], ids=["embedded", "servers"])
def test_demo_shows_every_step(start_demo, folder, arguments):
    for program in [] if arguments else SERVERS:
        need(program)
    demo = start_demo(*arguments)
    out, errors = demo.communicate(timeout=1200)
    assert (demo.returncode, errors) == (0, ""), out + errors
    assert out.count('"state": "succeeded", "progress"') == 3
    assert out.count("$ curl -F") == 3
    assert '"queue": "long"' in out
    assert "received the callback job.succeeded; signature verified" in out
    assert 'chelsea.jpg: {"class": "tiger cat"' in out
    assert "README.md: INVALID_IMAGE" in out or "README.md: UNSUPPORTED_MEDIA_TYPE" in out
    table = out.partition("Accept: text/csv")[2]
    assert table.count(",efficientnet_lite0,") == 3  # the picture, that of the batch, the video
    assert ("$ redis-server" in out, "$ initdb" in out) == ((False, False) if arguments else (True, True))
    assert_nothing_is_left(folder)


def test_interrupted_demo_leaves_nothing_behind(start_demo, folder):
    for program in SERVERS:
        need(program)
    demo = start_demo()
    for line in demo.stdout:
        if line.startswith("$ make run"):
            break
    assert len(left_behind(folder)) > 3
    demo.send_signal(signal.SIGINT)
    out, errors = demo.communicate(timeout=300)
    assert (demo.returncode, errors) == (130, ""), out + errors
    assert_nothing_is_left(folder)


def test_interrupt_that_meets_the_start_of_a_program_leaves_it_to_be_stopped(tmp_path, monkeypatch):
    start = subprocess.Popen

    def interrupted(*arguments, **options):
        process = start(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return process
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    program = jobs_demo.Program(tmp_path, "sleep", ["sleep", "60"])
    with pytest.raises(KeyboardInterrupt):
        program.start(lambda: True)
    program.stop()
    assert program.process.returncode == -signal.SIGTERM


def test_demo_says_which_server_is_missing(start_demo, folder, tmp_path):
    (tmp_path / "curl").symlink_to(need("curl"))
    out, errors = start_demo(PATH=str(tmp_path)).communicate(timeout=300)
    assert errors == "error: redis-server is missing: apt install redis-server, or make jobs-demo ARGS=--embedded\n"
    assert "$" not in out
    assert_nothing_is_left(folder)


@pytest.mark.parametrize(("variables", "says"), [
    ({"PATH": "/nowhere"}, "error: curl is missing: apt install curl\n"),
    ({"MODEL_NAME": "no such model"}, "error: service does not start:\nerror: MODEL_NAME must be"),
], ids=["no curl", "no model"])
def test_failed_demo_says_why_and_leaves_nothing_behind(start_demo, folder, variables, says):
    demo = start_demo(*([] if "PATH" in variables else ["--embedded"]), **variables)
    _, errors = demo.communicate(timeout=300)
    assert demo.returncode == 1
    assert errors.startswith(says)
    assert "Traceback" not in errors
    assert_nothing_is_left(folder)
