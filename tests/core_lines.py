"""How many lines a newcomer reads to know all that a worker with the default settings imports.

    python tests/core_lines.py [most]

Serves a picture as a worker does, from a bundle that the master has published, then counts the lines of the house's
modules that were imported for that, and those that only the master needs. Ends with 1 where the first number is above
`most`.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ |= {"DEVICE": "cpu", "MODEL_NAME": "efficientnet_lite0"}  # for resnet50 the same modules, without a download


def house():
    """{path: lines} of the imported modules of app/."""
    paths = {Path(module.__file__) for name, module in list(sys.modules.items())
             if name.partition(".")[0] == "app" and getattr(module, "__file__", None)}
    return {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in paths}


def main():
    sys.path.insert(0, str(ROOT))
    subprocess.run([sys.executable, "-m", "app", "prepare"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    from app.config import Settings
    from app.engine.bundle import Prepared
    from app.server import board, counters
    counters.share(board.create(counters.bytes_for(1)))
    folder = next(Path(Settings.load().model_dir).glob("bundles/efficientnet_lite0-*-openvino"))
    board.own.publish([Prepared(folder)])
    board.own.write(plan={"engine": "openvino", "devices": ["cpu"], "workers": 1, "streams": 1, "slots": 2,
                          "queue": 16})

    import app.server.worker
    from app import create_app
    client = create_app().test_client()
    picture = (ROOT / "app/api/static/cat.jpg").open("rb")
    for answer in (client.post("/predict", data={"file": picture}), client.get("/health"), client.get("/info"),
                   client.get("/metrics"), client.get("/", headers={"Accept": "text/html"})):
        assert answer.status_code == 200, answer.text
    worker = house()
    import app.prepare
    import app.server.lifecycle
    import app.server.machine  # noqa: F401
    master = {path: lines for path, lines in house().items() if path not in worker}
    master[Path("gunicorn.conf.py")] = len((ROOT / "gunicorn.conf.py").read_text().splitlines())
    for path, lines in sorted(worker.items()):
        print(f"{lines:6} {path}")
    print(f"{sum(worker.values())} lines that a worker with the default settings imports; "
          f"{sum(master.values())} more of the master ({', '.join(map(str, sorted(master)))})")
    sys.stdout.flush()
    os._exit(sum(worker.values()) > int(sys.argv[1]) if len(sys.argv) > 1 else 0)


if __name__ == "__main__":
    main()
