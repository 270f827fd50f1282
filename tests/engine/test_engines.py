"""Both engines give the same answers, for batches too, and keep their deadlines."""
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, exported

from app import engine as engines
from app import load_model
from app.config import Settings
from app.engine import EngineError, openvino_engine
from app.errors import Deadline, DeadlineExceeded
from app.model_loader import ModelError
from app.prepare import prepared
from app.server import machine


@pytest.fixture(scope="module")
def loaded(checkpoint, model_dir):
    """load(engine): a ModelLoader with the same seeded network."""
    def load(engine, **variables):
        settings = Settings.parse({"MODEL_NAME": "resnet18", "MODEL_PATH": str(checkpoint("resnet18")),
                                   "MODEL_DIR": str(model_dir), "ENGINE": engine, "DEVICE": "cpu", **variables})
        return load_model(exported(settings))
    return load


def images(n):
    return np.random.default_rng(0).standard_normal((n, 3, 224, 224)).astype(np.float32)


def test_engines_agree_on_batches_of_any_size(loaded):
    openvino, torch = loaded("openvino").current.task, loaded("torch").current.task
    for n in (1, 2, 7):
        batch = images(n)
        a, b = openvino.engine.infer(batch, Deadline(60)), torch.engine.infer(batch, Deadline(60))
        assert a.shape == (n, 1000)
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
        assert np.abs(openvino.scores(a) - torch.scores(b)).max() < 1e-5
        assert np.abs(a[-1] - openvino.engine.infer(batch[-1:], Deadline(60))[0]).max() < 1e-6


def test_many_threads_get_their_own_answers(loaded):
    engine = loaded("openvino").current.task.engine
    batch = images(8)
    expected = engine.infer(batch, Deadline(60))
    answers = {}

    def work(i):
        answers[i] = [engine.infer(batch[i:i + 1], Deadline(60))[0] for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert all(np.abs(a - expected[i]).max() < 1e-6 for a in answers[i])


@pytest.fixture(scope="module")
def two_streams(loaded):
    """An engine as on a machine of two cores; resnet18's weights are small enough for a second copy."""
    loader = loaded("openvino", WORKERS="1")
    folder = prepared(loader.settings, "openvino")[0].folder
    return engines.create(loader.current.task.manifest, folder, 2, loader.settings, "cpu", None), folder


def test_a_lone_picture_gets_all_cores(two_streams, monkeypatch):
    engine, _ = two_streams
    picture = images(1)
    expected = engine.infer(picture, Deadline(60))
    everything, taken = engine.on_all_cores.qsize(), []
    original = engine.finish
    monkeypatch.setattr(engine, "finish", lambda *args: taken.append(
        (engine.on_all_cores.qsize(), engine.idle.qsize())) or original(*args))
    assert np.abs(engine.infer(picture, Deadline(60), alone=True) - expected).max() < 1e-4
    engine.infer(picture, Deadline(60))
    engine.infer(images(2), Deadline(60), alone=True)
    assert everything == 1
    assert taken == [(0, 2), (1, 1), (1, 0), (1, 0)]
    assert (engine.on_all_cores.qsize(), engine.idle.qsize()) == (1, 2)


def test_a_lone_picture_does_without_all_cores_while_another_hangs_there(two_streams):
    engine, _ = two_streams
    engine.infer(images(1), Deadline(60), alone=True)  # as the self-test has done
    hung = engine.on_all_cores.get()
    assert engine.infer(images(1), Deadline(60), alone=True).shape == (1, 1000)
    engine.overdue.append((hung, engine.on_all_cores, 0))
    engine.infer(images(1), Deadline(60), alone=True)
    assert (engine.on_all_cores.qsize(), engine.idle.qsize()) == (1, 2)


def mapped(is_meant):
    """(size, how much of it is resident), in kB, of this process's mappings whose line in smaps is_meant."""
    size = resident = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            counts = is_meant(line)
        elif counts and line.startswith("Size:"):
            size += int(line.split()[1])
        elif counts and line.startswith("Rss:"):
            resident += int(line.split()[1])
    return size, resident


def test_what_only_loading_needs_is_not_kept_in_memory(two_streams):
    engine, folder = two_streams
    expected = engine.infer(images(1), Deadline(60), alone=True)
    size, resident = mapped(lambda line: line.endswith(f" {folder / 'model.bin'}"))
    assert size > 40_000
    assert resident < size / 4

    def code():
        return mapped(lambda line: " r-xp " in line and "libopenvino_intel_cpu_plugin" in line)[1]
    before = code()
    openvino_engine.unload_pages(folder / "model.bin")
    assert code() < before / 4
    assert (engine.infer(images(1), Deadline(60), alone=True) == expected).all()


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_inference_past_its_deadline_gives_its_place_back(loaded, engine):
    loader = loaded(engine)
    model = loader.current.task
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            model.engine.infer(images(64), Deadline(0.02))
    assert model.engine.infer(images(1), Deadline(60)).shape == (1, 1000)
    if engine == "openvino":
        assert model.engine.idle.qsize() + len(model.engine.overdue) == machine.plan(loader.settings).streams


def test_bf16_agrees_with_fp32_as_far_as_it_can(loaded):
    from openvino import Core
    if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match="does not support bf16"):
            loaded("openvino", PRECISION="bf16")
        return
    a, b = (loaded("openvino", PRECISION=precision).current.task for precision in ("bf16", "fp32"))
    assert (a.engine.precision, b.engine.precision) == ("bf16", "fp32")
    a, b = (task.scores(task.engine.infer(images(2), Deadline(60))) for task in (a, b))
    assert 0 < np.abs(a - b).max() < 0.05


def test_self_test_notices_a_wrong_answer(loaded):
    loader = loaded("openvino")
    with loader.lease() as model:
        task, outputs = model.task, model.task.manifest.self_test["outputs"]
        task.manifest = dataclasses.replace(task.manifest, self_test={"outputs": outputs[1:] + outputs[:1]})
    with pytest.raises(ModelError, match="fails its self-test: the outputs are off"), loader.lease() as model:
        model.self_test()
    assert not loader.ready
    assert loader.state == "self_test_failed"
    assert loader.needs_restart() == "the model failed its self-test"


def test_first_inferences_from_many_threads_do_not_hang(app, settings):
    """With OpenVINO 2026.4 the first `infer` calls do, in every third process that starts with them."""
    code = ("import os, sys, threading\nfrom pathlib import Path\nimport numpy as np\nimport openvino\n"
            "from app.engine.openvino_engine import OpenVINOEngine\nfrom app.errors import Deadline\n"
            "sys.setswitchinterval(1e-6)\n"
            "def run():\n"
            "    engine, start, answers = OpenVINOEngine(Path(sys.argv[1]), 3, 'fp32'), threading.Barrier(3), []\n"
            "    def work():\n        start.wait()\n"
            "        answers.append(engine.infer(np.zeros((1, 3, 224, 224), np.float32), Deadline(60)))\n"
            "    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]\n"
            "    [thread.start() for thread in threads]\n    [thread.join(60) for thread in threads]\n"
            "    os._exit(len(answers) != 3)\n"
            "for _ in range(4):\n"  # each forked before it has used what it has imported
            "    children = [os.fork() or run() for _ in range(3)]\n"
            "    if any([os.waitpid(child, 0)[1] for child in children]):\n        sys.exit(1)")
    folder = str(prepared(settings, "openvino")[0].folder)
    process = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, start_new_session=True)
    try:
        assert process.wait(120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_request_that_cannot_start_is_not_lost(two_streams):
    engine, _ = two_streams
    expected = engine.infer(images(4), Deadline(60))
    for alone in (False, True, False, True):
        with pytest.raises(RuntimeError, match="(?i)shape"):
            engine.infer(np.zeros((1, 3, 7, 7), np.float32), Deadline(60), alone)
    assert (engine.idle.qsize(), engine.on_all_cores.qsize(), engine.overdue) == (2, 1, [])
    assert np.abs(engine.infer(images(4), Deadline(60)) - expected).max() < 1e-4


def test_overdue_requests_come_back_once(two_streams, monkeypatch):
    """Many threads at once overrun their deadlines, and take back each other's requests."""
    engine, _ = two_streams
    has_ended = openvino_engine.has_ended
    monkeypatch.setattr(openvino_engine, "has_ended", lambda request: has_ended(request) and not time.sleep(0.002))
    expected, wrong = engine.infer(images(2), Deadline(60)), []

    def overrun(number):
        for i in range(25):
            try:
                answer = engine.infer(images(2), Deadline(0.001 * (1 + (number + i) % 20)))
                if np.abs(answer - expected).max() > 1e-4:
                    wrong.append(answer)
            except DeadlineExceeded:
                engine.hung_seconds()
    threads = [threading.Thread(target=overrun, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until = time.monotonic() + 10
    while engine.hung_seconds() and time.monotonic() < until:
        time.sleep(0.01)
    assert (wrong, engine.overdue) == ([], [])
    requests = [engine.idle.get_nowait() for _ in range(engine.idle.qsize())]
    assert len(requests) == len(set(map(id, requests))) == 2
    for request in requests:
        engine.idle.put(request)


def test_openvinos_usage_reports_are_off():
    assert sys.modules.get("openvino_telemetry", "missing") is None
    assert "openvino_telemetry.main" not in sys.modules
