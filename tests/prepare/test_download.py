"""Downloads from a real server: verified, retried, and never a broken file left in place."""
import hashlib
import http.server
import logging
import os
import threading

import pytest

from app import prepare
from app.config import Settings
from app.prepare import download
from app.prepare.download import DownloadError, fetch

CONTENT = os.urandom(1_000_000)
PREFIX = hashlib.sha256(CONTENT).hexdigest()[:8]


@pytest.fixture
def server():
    """A weights host on loopback: `answers` are used up one a request, the last one for ever."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            answers = self.server.answers
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, int):
                self.send_error(answer)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = 0, [CONTENT]
    server.url = f"http://127.0.0.1:{server.server_address[1]}/model-{PREFIX}.pth"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_file_is_fetched_once_with_progress(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "weights" / "model.pth"
    assert fetch(server.url, path, PREFIX).startswith(PREFIX)
    assert path.read_bytes() == CONTENT
    assert caplog.messages[0].startswith("model.pth: 0 of 1 MiB (")
    assert caplog.messages[-1] == "model.pth: 1 of 1 MiB (100 %)"
    fetch(server.url, path, PREFIX)
    assert server.requests == 1
    assert os.listdir(path.parent) == ["model.pth"]


@pytest.mark.parametrize("failure", [CONTENT[:5000], b"x" * len(CONTENT), 503])
def test_one_failure_is_retried(server, tmp_path, failure):
    server.answers = [failure, CONTENT]
    fetch(server.url, tmp_path / "model.pth", PREFIX)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT
    assert server.requests == 2


@pytest.mark.parametrize(("failure", "message"), [
    (CONTENT[:5000], "ended after 5000 of 1000000 bytes"), (b"x" * len(CONTENT), "SHA-256 begins with"),
    (503, "status 503"), (404, "status 404")])
def test_lasting_failure_leaves_nothing(server, tmp_path, failure, message):
    server.answers = [failure]
    with pytest.raises(DownloadError, match=message):
        fetch(server.url, tmp_path / "model.pth", PREFIX)
    assert os.listdir(tmp_path) == []
    assert server.requests == (1 if failure == 404 else download.ATTEMPTS)


def test_soon_after_a_failure_one_attempt_is_enough_and_finds_a_server_that_is_back(server, tmp_path, monkeypatch):
    settings = Settings.parse({"MODEL_NAME": "resnet18", "MODEL_DIR": str(tmp_path), "WEIGHTS_MIRROR": server.url})
    monkeypatch.setattr(prepare, "published", lambda settings, name: (f"/{name}-{PREFIX}.pth", "a test"))
    server.answers, asked = [503], []
    for _ in range(2):
        with pytest.raises(DownloadError, match="status 503"):
            prepare.weights_file(settings, "resnet18")
        asked.append(server.requests)
    os.utime(tmp_path / "weights/.resnet18-failed", (0, 0))  # long ago
    with pytest.raises(DownloadError):
        prepare.weights_file(settings, "resnet18")
    assert [*asked, server.requests] == [3, 4, 7]
    os.utime(tmp_path / "weights/.resnet18-failed")
    server.answers = [CONTENT]
    assert prepare.weights_file(settings, "resnet18")[0].read_bytes() == CONTENT
    assert os.listdir(tmp_path / "weights") == [f"resnet18-{PREFIX}.pth"]
    (tmp_path / "weights/.resnet18-failed").mkdir()  # which cannot be removed, as in a folder that is read-only
    assert prepare.weights_file(settings, "resnet18")[0].exists()


def test_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path / "model.pth").write_bytes(CONTENT[:-1] + b"x")
    fetch(server.url, tmp_path / "model.pth", PREFIX)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_host_that_is_not_there(tmp_path):
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        fetch("http://127.0.0.1:9/model.pth", tmp_path / "model.pth", PREFIX)
