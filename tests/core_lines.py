"""How many lines a newcomer reads to know all that a worker with the default settings imports.

    python tests/core_lines.py [most]

Publishes a bundle as the master does; a second process then serves a picture from it as a worker does, and counts the
lines of the house's modules that were imported for that. Those that only the first process needs are the master's.
Fails if the worker imports anything of an optional part.
Ends with 1 where the worker's number is above `most`.
"""
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONAL = ("alembic", "aiohttp", "celery", "fsspec", "kombu", "opentelemetry", "psycopg", "redis", "s3fs",
            "sqlalchemy", "app.data", "app.history", "app.insight", "app.jobs", "app.open_inference", "app.outbound",
            "app.tracing",
            "app.optional_settings", "app.optional_parts")
os.environ |= {"DEVICE": "cpu", "MODEL_NAME": "efficientnet_lite0"}  # for resnet50 the same modules, without a download


def house():
    """{path: lines} of the imported modules of app/."""
    paths = {Path(module.__file__) for name, module in list(sys.modules.items())
             if name.partition(".")[0] == "app" and getattr(module, "__file__", None)}
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}


def master(most=None):
    subprocess.run([sys.executable, "-m", "app", "prepare"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    import app.prepare
    import app.server.lifecycle
    import app.server.log_config
    import app.server.machine
    import app.server.model_swap
    import app.server.refusals
    import app.server.start_checks
    import app.server.stopping
    import app.setting_names  # noqa: F401
    from app.config import Settings
    from app.engine.bundle import Prepared
    from app.server import board, shared_memory
    shared_memory.create(1)
    folder = next(Path(Settings.load().model_dir).glob("bundles/efficientnet_lite0-*-openvino"))
    board.own.publish([Prepared(folder)])
    board.own.write(plan={"engine": "openvino", "devices": ["cpu"], "workers": 1, "streams": 1, "slots": 2,
                          "queue": 16})

    memory = board.own.descriptor
    found = subprocess.run([sys.executable, __file__, "--worker", str(memory)], cwd=ROOT, check=True, pass_fds=[memory],
                           stdout=subprocess.PIPE)
    of_worker = json.loads(found.stdout)
    of_master = {path: lines for path, lines in house().items() if path not in of_worker}
    of_master["gunicorn.conf.py"] = len((ROOT / "gunicorn.conf.py").read_text().splitlines())
    for path, lines in sorted(of_worker.items()):
        print(f"{lines:6} {path}")
    print(f"{sum(of_worker.values())} lines that a worker with the default settings imports; "
          f"{sum(of_master.values())} more of the master ({', '.join(sorted(of_master))})")
    return most is not None and sum(of_worker.values()) > int(most)


def worker(memory):
    from app.server import board
    board.own = board.Board(memoryview(mmap.mmap(int(memory), 0)))
    import app.server.worker  # noqa: F401
    from app import create_app
    client = create_app().test_client()
    picture = (ROOT / "app/api/static/cat.jpg").open("rb")
    for answer in (client.post("/predict", data={"file": picture}), client.get("/health"), client.get("/info"),
                   client.get("/metrics"), client.get("/", headers={"Accept": "text/html"})):
        assert answer.status_code == 200, answer.text
    found = [name for name in OPTIONAL if name in sys.modules]
    assert not found, f"a worker with the default settings imports {', '.join(found)}"
    print(json.dumps(house()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    sys.exit(master(*sys.argv[1:]))
