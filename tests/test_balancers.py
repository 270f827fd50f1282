"""deploy/nginx.conf and deploy/haproxy.cfg with the real programs in front of two instances: what is lost when one of
them stops or dies under load is what docs/operations.md says."""
import os
import re
import signal
import subprocess
import threading
import time

import pytest
import requests
import yaml
from conftest import ROOT, need
from servers import Server, find_program

pytestmark = pytest.mark.slow  # make test-deploy
CAT = (ROOT / "tests/images/chelsea.jpg").read_bytes()
CONNECTIONS = 4


class Balancer(Server):
    """A load balancer in front of the instances on these ports."""

    def __init__(self, folder, ports):
        super().__init__(folder)
        self.ports = ports

    def answers(self):
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False


class Nginx(Balancer):
    def command(self):
        """As compose.yaml has it: what its `sed` makes of deploy/nginx.conf, in front of these instances."""
        shell = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["proxy"]["command"][-1]
        site = subprocess.check_output(["sh", "-c", shell.split(" >")[0].replace(
            " /nginx.conf", f" {ROOT}/deploy/nginx.conf")], text=True)
        for name, port in zip(("service:5000", "replica:5000"), self.ports, strict=True):
            assert site.count(name) == 1
            site = site.replace(name, f"127.0.0.1:{port}")
        (self.folder / "site.conf").write_text(site.replace("listen 8080", f"listen 127.0.0.1:{self.port}"))
        folders = "".join(f"{name}_temp_path {self.folder}/{name};" for name in (
            "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;" if os.getuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"daemon off; pid {self.folder}/nginx.pid; error_log stderr; {user} events {{}}"
            f"http {{ access_log off; {folders} include {self.folder}/site.conf; }}")
        return [find_program("nginx") or "/usr/sbin/nginx", "-c", str(self.folder / "nginx.conf"), "-e", "stderr"]


class HAProxy(Balancer):
    def command(self):
        text = (ROOT / "deploy/haproxy.cfg").read_text().replace("# server instance2", "server instance2")
        text = text.replace("bind :8080", f"bind 127.0.0.1:{self.port}")
        for name, port in zip(("127.0.0.1:5000", "127.0.0.1:5001"), self.ports, strict=True):
            assert text.count(name) == 1
            text = text.replace(name, f"127.0.0.1:{port}")
        (self.folder / "haproxy.cfg").write_text(text)
        return [find_program("haproxy") or "/usr/sbin/haproxy", "-f", str(self.folder / "haproxy.cfg"), "-db"]


class Load:
    """Clients that send the same picture one after the other, each over a connection that it keeps."""

    def __init__(self, url):
        self.url, self.answers, self.is_over = url, [], threading.Event()
        self.threads = [threading.Thread(target=self.send) for _ in range(CONNECTIONS)]
        for thread in self.threads:
            thread.start()

    def send(self):
        with requests.Session() as session:
            while not self.is_over.is_set():
                try:
                    answer = session.post(self.url + "/predict", files={"file": CAT}, timeout=40)
                    self.answers.append((answer.status_code, answer.json().get("predictions", [{}])[0].get("class")))
                except requests.RequestException as e:
                    self.answers.append((0, repr(e)))

    def wait_for(self, more):
        """Wait until there are that many answers more."""
        most, until = len(self.answers) + more, time.monotonic() + 60
        while len(self.answers) < most:
            assert time.monotonic() < until
            time.sleep(0.02)

    def lost(self):
        """The answers so far that were no predictions."""
        return [answer for answer in self.answers if answer != (200, "tiger cat")]

    def stop(self):
        self.is_over.set()
        for thread in self.threads:
            thread.join(60)


@pytest.mark.parametrize("kind", [Nginx, HAProxy])
def test_an_instance_that_stops_loses_nothing_and_one_that_dies_what_it_was_answering(kind, start_service, tmp_path):
    need(kind.__name__.lower())
    variables = {"DRAIN_SECONDS": "3", "TRUSTED_PROXIES": "1", "WORKERS": "1"}
    instances = [start_service(**variables), start_service(**variables)]
    for instance in instances:
        instance.wait_ready()
    balancer = kind(tmp_path, [instance.port for instance in instances]).start()
    load = Load(f"http://127.0.0.1:{balancer.port}")
    try:
        load.wait_for(20)
        for instance in instances:  # has its share
            metrics = requests.get(instance.url + "/metrics", timeout=10).text
            assert re.search(r'requests_total\{[^}]*endpoint="/predict"[^}]*\} [1-9]', metrics)
        assert instances[0].stop(signal.SIGTERM) == 0
        load.wait_for(20)
        assert load.lost() == []
        again = start_service(**variables, PORT=str(instances[0].port))
        again.port, again.url = instances[0].port, instances[0].url
        again.wait_ready()
        load.wait_for(20)
        assert load.lost() == []
        instances[1].kill()
        load.wait_for(40)
        lost = load.lost()
        assert len(lost) <= (0 if kind is Nginx else CONNECTIONS), lost
        before = len(load.answers)
        load.wait_for(20)
        assert [answer for answer in load.answers[before:] if answer[0] != 200] == []
    finally:
        load.stop()
        balancer.stop()
