"""Both engines give the same answers, for batches too, and keep their deadlines."""
import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from app import engines, machine
from app.config import Settings
from app.engines import EngineError
from app.model_loader import ModelError, ModelLoader
from app.scheduler import Deadline, DeadlineExceeded


@pytest.fixture(scope="module")
def loaded(checkpoint, model_dir):
    """load(engine): a ModelLoader of the same seeded network."""
    def load(engine, **variables):
        return ModelLoader(Settings.parse({"MODEL_NAME": "resnet18", "MODEL_PATH": str(checkpoint("resnet18")),
                                           "MODEL_DIR": str(model_dir), "ENGINE": engine, "DEVICE": "cpu",
                                           **variables})).load()
    return load


def images(n):
    return np.random.default_rng(0).standard_normal((n, 3, 224, 224)).astype(np.float32)


def test_engines_agree_on_batches_of_any_size(loaded):
    openvino, torch = loaded("openvino"), loaded("torch")
    for n in (1, 2, 7):
        batch = images(n)
        a, b = openvino.infer(batch, Deadline(60)), torch.infer(batch, Deadline(60))
        assert a.shape == (n, 1000)
        assert np.abs(a - b).max() < 1e-5
        assert np.abs(a[-1] - openvino.infer(batch[-1:], Deadline(60))[0]).max() < 1e-6


def test_many_threads_get_their_own_answers(loaded):
    model = loaded("openvino")
    batch = images(8)
    expected = model.infer(batch, Deadline(60))
    answers = {}

    def work(i):
        answers[i] = [model.infer(batch[i:i + 1], Deadline(60))[0] for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert all(np.abs(a - expected[i]).max() < 1e-6 for a in answers[i])


@pytest.fixture
def two_streams(loaded):
    """An engine as on a machine of two cores; resnet18's weights are small enough for a second copy."""
    model = loaded("openvino", WORKERS="1")
    plan = dataclasses.replace(machine.plan(model.settings), streams=2)
    folder = model.settings.model_dir / "bundles"
    (folder,) = folder.glob(f"{model.name}-{model.manifest.weights['sha256'][:12]}-openvino")
    return engines.create(model.manifest, folder, plan, model.settings, "cpu"), folder


def test_a_lone_picture_gets_all_cores(two_streams):
    engine, _ = two_streams
    picture = images(1)
    expected = engine.infer(picture, Deadline(60))
    everything, taken = engine.on_all_cores.qsize(), []
    original = engine.finish
    engine.finish = lambda *args: taken.append((engine.on_all_cores.qsize(), engine.idle.qsize())) or original(*args)
    assert np.abs(engine.infer(picture, Deadline(60), alone=True) - expected).max() < 1e-4
    engine.infer(picture, Deadline(60))
    engine.infer(images(2), Deadline(60), alone=True)
    assert everything == 1
    assert taken == [(0, 2), (1, 1), (1, 0), (1, 0)]
    assert (engine.on_all_cores.qsize(), engine.idle.qsize()) == (1, 2)


def test_a_lone_picture_does_without_all_cores_while_another_hangs_there(two_streams):
    engine, _ = two_streams
    hung = engine.on_all_cores.get()
    hung.infer({0: images(1)})
    assert engine.infer(images(1), Deadline(60), alone=True).shape == (1, 1000)
    engine.overdue.append((hung, engine.on_all_cores, 0))
    engine.infer(images(1), Deadline(60), alone=True)
    assert (engine.on_all_cores.qsize(), engine.idle.qsize()) == (1, 2)


def test_the_weights_file_is_not_kept_in_memory(two_streams):
    engine, folder = two_streams
    engine.infer(images(1), Deadline(60), alone=True)
    size = resident = 0
    of_the_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            of_the_file = line.endswith(f" {folder / 'model.bin'}")
        elif of_the_file and line.startswith("Size:"):
            size += int(line.split()[1])
        elif of_the_file and line.startswith("Rss:"):
            resident += int(line.split()[1])
    assert size > 40_000
    assert resident < size / 4


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_inference_past_its_deadline_gives_its_place_back(loaded, engine):
    model = loaded(engine)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            model.infer(images(64), Deadline(0.02))
    assert model.infer(images(1), Deadline(60)).shape == (1, 1000)
    if engine == "openvino":
        assert model.engine.idle.qsize() + len(model.engine.overdue) == machine.plan(model.settings).streams


def test_bf16_agrees_with_fp32_as_far_as_it_can(loaded):
    from openvino import Core
    if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match="does not calculate in bf16"):
            loaded("openvino", PRECISION="bf16")
        return
    a, b = loaded("openvino", PRECISION="bf16"), loaded("openvino")
    assert (a.engine.precision, b.engine.precision) == ("bf16", "fp32")
    assert np.abs(a.infer(images(2), Deadline(60)) - b.infer(images(2), Deadline(60))).max() < 0.05


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_fp16_is_for_gpus(loaded, engine):
    with pytest.raises(EngineError, match="PRECISION is fp16, which is for GPUs"):
        loaded(engine, PRECISION="fp16")


def test_self_test_notices_a_wrong_answer(loaded):
    model = loaded("openvino")
    outputs = model.manifest.self_test["outputs"]
    model.manifest = dataclasses.replace(model.manifest, self_test={"outputs": outputs[1:] + outputs[:1]})
    with pytest.raises(ModelError, match="answers its self-test wrongly"):
        model.self_test()
    assert not model.ready
    assert model.state == "self_test_failed"


def test_openvinos_usage_reports_are_off():
    import sys
    assert engines.sys.modules.get("openvino_telemetry", "missing") is None
    assert "openvino_telemetry.main" not in sys.modules
