"""What a hostile video could do if it took over the decoder: nothing, tried from inside the process itself."""
import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from videos import numbered, write

from app.errors import Deadline
from app.media import sandbox, video

ESCAPES = Path(__file__).with_name("escapes.py")
FILES = {"read a file", "list a folder", "write a file", "remove a file", "read the service's environment",
         "run a program", "become a program"}
UNKNOWN = {"io_uring", "clone3", "x32"}  # as on a kernel that lacks them


@pytest.fixture
def attempt(tmp_path):
    """attempt(the sandbox's function to leave out): {attempt: "done" or the error}, and whether it was sandboxed."""
    victim = tmp_path / "victim"

    def run(without=""):
        victim.touch()
        with socket.create_server(("127.0.0.1", 0)) as server:
            ended = subprocess.run(
                [sys.executable, "-P", ESCAPES, without, victim, str(server.getsockname()[1])], env=video.environment(),
                stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        assert ended.stdout, ended.stderr.decode()
        assert victim.exists()
        return json.loads(ended.stdout)
    return run


@pytest.fixture
def seccomp():
    with open("/proc/self/status") as status:
        if "\nSeccomp:" not in status.read():
            pytest.skip("this kernel has no seccomp")
    if platform.machine() not in sandbox.ARCHITECTURES:
        pytest.skip(f"no filter is written for {platform.machine()}")


@pytest.fixture
def landlock():
    """The kernel's version of Landlock."""
    version = sandbox.call(sandbox.LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        pytest.skip("this kernel has no Landlock")
    return version


@pytest.mark.parametrize("without", ["", "forbid_files"])
def test_the_decoder_can_do_nothing_but_decode(attempt, seccomp, without):
    outcomes = attempt(without)
    assert outcomes.pop("sandboxed")
    assert outcomes.pop("thread") == "done"
    assert "maximum limit" in outcomes.pop("more memory")
    assert {outcomes.pop(name) for name in UNKNOWN} == {"ENOSYS"}
    assert len(outcomes) > 15
    assert {name for name, outcome in outcomes.items() if outcome != "EPERM"} == set()


def test_landlock_alone_denies_files_and_tcp(attempt, landlock):
    """The second layer, and the only one where no seccomp filter is written for the processor."""
    outcomes = attempt("forbid_calls")
    assert not outcomes["sandboxed"]
    assert {outcomes[name] for name in FILES} == {"EACCES"}
    if landlock >= 4:
        assert outcomes["TCP"] == "EACCES"
    if landlock >= 6:
        assert outcomes["signal the service"] == "EPERM"


@pytest.fixture
def decoder():
    """A decoder in the middle of a video."""
    data, decoder = write([numbered(i) for i in range(9)]), video.Decoder()
    task = {"size": len(data), "frames": 1, "cpu_seconds": 5, "max_pixels": 10**7, "max_seconds": 60}
    frames = decoder.decode(task, data, Deadline(10))
    assert next(frames).index == 4
    yield decoder
    assert list(frames) == []
    decoder.close()


def test_a_decoder_that_decodes_is_sandboxed(decoder, seccomp):
    with open(f"/proc/{decoder.process.pid}/status") as status:
        state = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
    assert (state["NoNewPrivs"], state["Seccomp"]) == ("1", "2")  # SECCOMP_MODE_FILTER


@pytest.fixture
def secrets(monkeypatch):
    for name in ("API_KEYS", "CACHE_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a-secret")


def test_a_decoder_knows_no_secret_of_the_service(secrets, decoder):
    environment = Path(f"/proc/{decoder.process.pid}/environ").read_bytes()
    assert b"OPENCV_FFMPEG_LOGLEVEL=" in environment
    assert b"a-secret" not in environment
    assert not {part.partition(b"=")[0].decode() for part in environment.split(b"\0") if part} & {"API_KEYS", "PATH"}


UNSANDBOXED = """
import sys
sys.stdin.buffer.readline()
sys.stdin.buffer.read(1)
print('{"done": true, "sandboxed": false}')
"""


def test_a_kernel_without_filters_is_reported_once(caplog):
    video.warn_of_no_sandbox.cache_clear()
    decoder = video.Decoder()
    decoder.close()
    for _ in range(2):
        decoder.process = subprocess.Popen([sys.executable, "-c", UNSANDBOXED], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE)
        assert list(decoder.decode({"size": 1}, b"x", Deadline(10))) == []
        decoder.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "sandbox is incomplete" in caplog.text
