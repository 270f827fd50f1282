"""What a lone request costs without and with explain and embedding, one after the other in turn.

    python -m bench.insight [--before TREE] [--model NAME] [--rounds 500]

TREE: a checkout of another commit, such as one from before there was explain, whose service answers in turn too
(git worktree add TREE COMMIT). Prints milliseconds, and the processor time of the service.
"""
import argparse
import http.client
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import load, services

PICTURE = services.ROOT / "app/api/static/cat.jpg"
WARM_UP = 20  # rounds that are not counted
KINDS = {"plain": "/predict", "explain": "/predict?explain=true", "embedding": "/predict?embedding=true"}


class Tree:
    """The service of a checkout, and a connection that is kept."""

    def __init__(self, tree, model, folder):
        self.port, self.tree = services.free_port(), tree
        variables = {"HOST": "127.0.0.1", "PORT": str(self.port), "MODEL_NAME": model, "DEVICE": "cpu",
                     "MODEL_DIR": str(folder / "models"), "DRAIN_SECONDS": "0", "PYTHONPATH": str(tree)}
        folder.mkdir()
        self.log = folder / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "app:create_app()"], cwd=tree, stdout=log, stderr=log,
                start_new_session=True, env=services.environment(variables))
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def wait_ready(self):
        until = time.monotonic() + 600  # its weights may have to be downloaded
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                self.connection.close()
            time.sleep(0.2)
        raise RuntimeError(f"{self.tree} does not serve:\n{self.log.read_text()[-2000:]}")

    def ask(self, method, path, body=None):
        """(status, seconds)."""
        started = time.perf_counter()
        self.connection.request(method, path, body, {"Content-Type": "image/jpeg"} if body else {})
        response = self.connection.getresponse()
        response.read()
        return response.status, time.perf_counter() - started

    cpu_s, stop = services.Running.cpu_s, services.Running.stop


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=500, help="of one request of each kind (500)")
    arguments = parser.parse_args()
    picture = PICTURE.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        now, before = Tree(services.ROOT, arguments.model, Path(folder) / "now"), None
        try:
            if arguments.before:
                before = Tree(arguments.before.resolve(), arguments.model, Path(folder) / "before")
            asked = [("before", before, KINDS["plain"])] * bool(before) + [
                (kind, now, path) for kind, path in KINDS.items()]
            for tree in filter(None, (now, before)):
                tree.wait_ready()
            took, cpu = {name: [] for name, *_ in asked}, dict.fromkeys((name for name, *_ in asked), 0.0)
            for number in range(-WARM_UP, arguments.rounds):
                first = number % len(asked)
                turned = asked[first:] + asked[:first]
                for name, tree, path in turned:
                    used = tree.cpu_s()
                    status, seconds = tree.ask("POST", path, picture)
                    if status != 200:
                        raise RuntimeError(f"{name}: {status}")
                    if number >= 0:
                        took[name].append(seconds)
                        cpu[name] += tree.cpu_s() - used
        finally:
            for tree in filter(None, (now, before)):
                tree.connection.close()
                tree.stop()
    print(f"{arguments.model}, a lone request, {arguments.rounds} of each in turn, ms:")
    print(f"{'':10}{'p50':>8}{'p95':>8}{'mean':>8}{'CPU':>8}")
    for name, values in took.items():
        found = load.percentiles(values)
        print(f"{name:10}{1000 * statistics.median(values):8.2f}{found['p95']:8.2f}{found['mean']:8.2f}"
              f"{1000 * cpu[name] / arguments.rounds:8.2f}")


if __name__ == "__main__":
    main()
