"""Real models, real pictures, and the service itself as real Gunicorn processes on a free port of loopback."""
import contextlib
import gc
import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pillow_heif
import pytest
import requests
import skimage
from PIL import Image
from s3_server import S3
from servers import Postgres, Redis, find_program, free_port
from urllib3 import encode_multipart_formdata

from app import __main__ as command_line
from app import create_app
from app.config import Settings
from app.prepare import make
from app.server import board, counters, machine, shared_memory

# Before torch is imported. With a thread per core, its threads would spend more time waiting for each other than they
# compute, as the tests' processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
PHOTOS = Path(skimage.__file__).parent / "data"


# What takes longest, or waits longest, begins first, so that no process is left alone with it at the end.
FIRST = ["server/test_reliability.py", "jobs/test_worker.py", "server/test_reload.py", "api/test_page.py",
         "test_clients.py", "test_cli.py", "server/test_start.py", "test_smoke.py",
         "history/test_history_service.py", "api/test_openapi.py", "tracing/test_tracing.py", "tasks/test_insight.py",
         "open_inference/test_clients_v2.py", "api/test_stream.py", "tasks/test_answers.py",
         "engine/test_engines.py", "jobs/test_api.py", "server/test_service.py", "data/test_database.py",
         "tasks/test_ocean.py", "jobs/test_results.py", "tasks/test_own.py", "media/test_media.py",
         "prepare/test_bundles.py", "prepare/test_quantize.py", "api/test_access.py", "api/test_metrics.py",
         "server/test_versions.py",
         "test_model_repository.py", "prepare/test_networks.py", "media/test_faces.py",
         "media/test_codecs.py", "test_bench_load.py", "prepare/test_download.py", "api/test_docs.py"]
SLOW = ["api/test_page_results.py", "examples/test_iris.py", "examples/test_speech.py"]


def pytest_ignore_collect(collection_path, config):
    """The files of slow tests are not even imported without them: scikit-learn alone takes each process seconds."""
    if config.option.markexpr == "not slow" and collection_path in [TESTS / name for name in SLOW]:
        return True
    return None


def pytest_collection_modifyitems(items):
    order = {TESTS / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(FIRST)))


gc.disable()  # until all modules of tests are imported, as nearly all that they make stays


def pytest_collection_finish():
    """What the tests' modules have imported stays: the service's own garbage collections, each of which would take half
    a second here, need not look through it."""
    gc.freeze()
    gc.enable()


def documentation():
    """README.md and docs/, one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))


def photo(name):
    """One of scikit-image's photographs as a PIL image in its own mode: astronaut, chelsea, coffee, rocket, camera."""
    with Image.open(next(PHOTOS.glob(f"{name}.*"))) as image:
        image.load()
        return image


# Of encoders that take several times as long by default.
FAST = {"PNG": {"compress_level": 1}, "AVIF": {"speed": 10}, "HEIF": {"enc_params": {"preset": "ultrafast"}}}


def encoded(image, format="PNG", **options):
    """A PIL image as a file's bytes. HEIF does not become known to Pillow by this: that is the service's own task."""
    buffer, options = io.BytesIO(), {**FAST.get(format, {}), **options}
    if format == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, **options)
    else:
        image.save(buffer, format, **options)
    return buffer.getvalue()


def need(program):
    """The path of a program beyond Python; skips the test where it is missing, fails it where REQUIRE_PROGRAMS is
    set."""
    path = find_program(program)
    if path is None and os.environ.get("REQUIRE_PROGRAMS"):
        pytest.fail(f"{program} is not installed, and REQUIRE_PROGRAMS is set")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """shared(name): a folder of this run, which pytest-xdist's processes have in common."""
    base = tmp_path_factory.getbasetemp()

    def folder(name):
        path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        path.mkdir(exist_ok=True)
        return path
    return folder


def save(state, path):
    """torch.save, in one step for other processes."""
    import torch
    own = path.with_suffix(f".{os.getpid()}")
    torch.save(state, own)
    own.replace(path)
    return path


@pytest.fixture(scope="session")
def model_dir(shared):
    """MODEL_DIR of this run: each model is exported once."""
    return shared("models")


def exported(settings):
    """The same settings, once their model is exported: by this process, as another one would have to import torch."""
    make(settings, machine.plan(settings).engine)
    return settings


@pytest.fixture(scope="session")
def checkpoint(shared):
    """checkpoint(name, num_classes=1000, seed=0): path of a seeded torchvision checkpoint, made once."""
    import torch

    from app.prepare.networks import torchvision
    folder = shared("checkpoints")

    def make(name, num_classes=1000, seed=0):
        path = folder / f"{name}-{num_classes}-{seed}.pt"
        if not path.exists():
            torch.manual_seed(seed)
            save(torchvision().models.get_model(name, num_classes=num_classes).state_dict(), path)
        return path
    return make


@pytest.fixture(scope="session")
def ocean_checkpoint(shared):
    """Path of an OCEAN checkpoint in its real format, seeded, with a ResNet-18 and traits in an order of its own."""
    import torch
    from torch import nn

    from app.prepare.networks import torchvision
    torch.manual_seed(3)
    backbone = torchvision().models.resnet18()
    backbone.fc = nn.Identity()
    network = nn.ModuleDict({"backbone": backbone, "head": nn.Sequential(nn.Dropout(0.3), nn.Linear(512, 5))})
    return save({"model": network.state_dict(), "config": {"BACKBONE": "resnet18", "IMG_SIZE": 256}, "label_cols": [
        "openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism"]},
                shared("checkpoints") / "ocean.pt")


@pytest.fixture(scope="session")
def ocean_settings(model_dir, ocean_checkpoint):
    return Settings.parse({"MODEL_NAME": "ocean", "MODEL_PATH": str(ocean_checkpoint), "MODEL_DIR": str(model_dir),
                           "DEVICE": "cpu"})


@pytest.fixture(scope="session")
def ocean_app(ocean_settings):
    return create_app(exported(ocean_settings))


@pytest.fixture(scope="session")
def settings(model_dir):
    """Settings of the model with real weights."""
    return Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir), "DEVICE": "cpu"})


@pytest.fixture(scope="session")
def app(settings):
    return create_app(exported(settings))


@pytest.fixture
def client(app):
    return app.test_client()


def post(client, data, filename="picture.jpg", path="/predict", **options):
    """POST a file's bytes as multipart, options as form fields; returns the response."""
    fields = {"file": (filename, data), **{k: str(v) for k, v in options.items()}}
    body, content_type = encode_multipart_formdata(fields)
    return client.post(path, data=body, content_type=content_type)


class Service:
    """The service as its users run it: Gunicorn with gunicorn.conf.py, on a free port, logging to a file."""

    def __init__(self, folder, variables, application="app:create_app()", python=sys.executable):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"service-{self.port}.log"
        environment = {k: v for k, v in os.environ.items()
                       if k.lower() not in Settings.__dataclass_fields__ and k != "OMP_NUM_THREADS"
                       and not k.startswith("OTEL_")}
        self.variables = variables
        environment |= {"HOST": "127.0.0.1", "PORT": str(self.port), "DRAIN_SECONDS": "0", **variables}
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen([python, "-m", "gunicorn", application], cwd=ROOT, stdout=log, stderr=log,
                                            start_new_session=True, env=environment)

    def wait_ready(self, timeout_s=300):
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log}"
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            time.sleep(0.02)
        raise AssertionError(f"not ready within {timeout_s} s:\n{self.log}")

    @property
    def log(self):
        return self.log_path.read_text()

    def workers(self):
        """Process ids of the live workers, oldest first."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def predict(self, data, filename="picture.jpg", timeout_s=60, **options):
        return requests.post(self.url + "/predict", files={"file": (filename, data)}, data=options, timeout=timeout_s)

    def stop(self, signal_number=signal.SIGTERM):
        """Stop it if it still runs; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.kill()
        return self.process.returncode

    def kill(self):
        """End it at once, with all that it has started; for when a test is over."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start_service(tmp_path, model_dir, app):
    """start_service(**variables): a Service that is stopped when the test ends; not yet waited for. application: what
    Gunicorn serves instead of the application as it is. Its default model is exported already: by this process, as
    another one would have to import torch."""
    services = []

    def start(application="app:create_app()", **variables):
        defaults = {"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": str(model_dir), "DEVICE": "cpu"}
        services.append(Service(tmp_path, {**defaults, **variables}, application))
        return services[-1]
    yield start
    for service in services:
        service.kill()


@pytest.fixture
def command(monkeypatch, capsys):
    """command(arguments, variables): (exit code, standard output, standard error) of `python -m app`, in this process.
    """
    def call(arguments, variables):
        for name, value in {"DEVICE": "cpu", **variables}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["app", *map(str, arguments)])
        code = command_line.main()
        return code, *capsys.readouterr()
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield call
    root.setLevel(level)  # what the command has set would hide the warnings of later tests
    root.handlers[:] = handlers


@pytest.fixture
def own_board(monkeypatch):
    """The Board of this process, which for one test is like a service's master."""
    for module, name in ((board, "own"), (counters, "own"), (counters, "regions")):
        monkeypatch.setattr(module, name, getattr(module, name))  # set back when the test ends
    shared_memory.create(1)
    return board.own


@pytest.fixture(scope="module")
def service(tmp_path_factory, settings, app):
    """One ready Service with the default settings for the tests of a module that leave it as it is."""
    running = Service(tmp_path_factory.mktemp("service"), {"MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu",
                                                           "MODEL_DIR": str(settings.model_dir)})
    yield running.wait_ready()
    running.kill()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A driver of Chromium, which all tests of this process share; each goes to a page of its own."""
    from pages import start_chromium
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, service):
    """A browser on the page of the service with the default settings, 1280 × 800."""
    from pages import on_page
    with on_page(chromium, service, "efficientnet_lite0") as browser:
        yield browser


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A running Redis of this test process; each test takes a database of its own: redis_server.database()."""
    need("redis-server")
    server = Redis(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory):
    """A running PostgreSQL of this test process; each test takes a database of its own: postgres_server.database()."""
    need("initdb")
    server = Postgres(tmp_path_factory.mktemp("postgres")).start()
    yield server
    server.remove()


@pytest.fixture(params=["embedded", "servers"])
def engines(request, tmp_path):
    """Variables of a service whose jobs and history are in files of this test's, or on servers."""
    variables = {"DATA_DIR": str(tmp_path / "data")}
    if request.param == "servers":
        variables |= {"DATABASE_URL": request.getfixturevalue("postgres_server").database(),
                      "JOBS_BROKER": request.getfixturevalue("redis_server").database()}
    return variables


@pytest.fixture
def start_worker(tmp_path, model_dir):
    """start_worker(**variables): a Worker that is stopped when the test ends; not yet waited for."""
    from job_workers import Worker
    workers = []

    def start(**variables):
        workers.append(Worker(tmp_path, {"MODEL_DIR": str(model_dir), "DEVICE": "cpu", "JOBS": "on", **variables}))
        return workers[-1]
    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A running S3 server of this test process; each test takes a bucket of its own: s3_server.bucket()."""
    server = S3(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.stop()
