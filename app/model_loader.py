"""ModelLoader: the models that serve requests, loaded and checked once per worker, and replaced in place."""
import contextlib
import functools
import json
import logging
import threading
import time

import numpy as np

from app import engine, tasks
from app.config import StartError
from app.engine import bundle
from app.engine.preprocess import Preprocessing, self_test_input
from app.engine.slots import Slots
from app.errors import Deadline, ServiceError
from app.server import counters

log = logging.getLogger(__name__)

# How far a self-test output may be off from torch's at fp32 (int8: from the int8 network's at export), relative to the
# largest. Measured: fp32 1e-6; bf16 0.004 (ResNet-50) to 0.13 (EfficientNet-Lite0); two classes swapped 1.
SELF_TEST_TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3, "int8": 0.3}
SELF_TEST_TIMEOUT_S = 60
HUNG_AFTER_S = 10         # past the deadline, for an inference
SLOT_HUNG_AFTER_S = 30    # likewise for decoding and face detection, which rarely check the deadline


class ModelError(StartError):
    """A model that does not load or gives wrong answers; the message is one line."""


class Model:
    """A loaded bundle: name, task, labels, preprocessing, device, engine, infer()."""

    def __init__(self, source, settings, plan, is_alone):
        """source: a bundle.Prepared; is_alone(): whether nothing else needs the processor. Raises StartError."""
        started = time.monotonic()
        self.device, self.is_alone, self.fallback_reason = plan.device, is_alone, source.fallback_reason
        self.requested = settings.model_name
        self.manifest = bundle.read(source.folder)
        if self.manifest is None:
            raise ModelError(f"{source.folder} holds no model that this version can serve")
        self.name, self.labels = self.manifest.name, self.manifest.labels
        self.task = tasks.create(self.manifest)
        self.preprocessing = Preprocessing(**self.manifest.preprocessing)
        self.engine = engine.create(self.manifest, source.folder, plan.streams, settings, self.device, rebuild)
        self.users, self.retired, self.broken = 0, False, False
        try:
            self.self_test()
        except ModelError:
            self.engine.close()
            raise
        self.load_seconds = time.monotonic() - started

    def self_test(self):
        """Run a warm-up inference and compare its output with the torch network's. Raises ModelError."""
        expected = np.array([self.manifest.self_test["outputs"]], np.float32)
        try:
            outputs = np.concatenate([self.engine.infer(self_test_input(self.preprocessing),
                                                        Deadline(SELF_TEST_TIMEOUT_S), alone)
                                      for alone in (False, True)])  # (2, K)
            error = np.abs(outputs - expected).max() / np.abs(expected).max()
        except (ServiceError, RuntimeError, MemoryError) as e:
            self.broken = True
            raise ModelError(f"{self.name} fails its self-test: {str(e).splitlines()[0]}") from e
        if not error <= SELF_TEST_TOLERANCE[self.engine.precision]:
            self.broken = True
            raise ModelError(f"{self.name} fails its self-test: the outputs are off by {error:.2g} of the largest")

    def infer(self, batch, deadline):
        """float32 (N, 3, H, W), preprocessed → float32 (N, K), the network's outputs. Raises DeadlineExceeded,
        MemoryError; ModelError if the network fails and then fails its self-test too."""
        try:
            return self.engine.infer(batch, deadline, self.is_alone())
        except (ServiceError, MemoryError):
            raise
        except Exception:  # the network itself failed: does it still work?
            self.self_test()
            raise

    @functools.cached_property
    def identity(self):
        """All that determines the model's answers, as bytes."""
        manifest = self.manifest
        return json.dumps([manifest.name, manifest.task, manifest.labels, manifest.weights, manifest.network,
                           manifest.preprocessing, manifest.engine, manifest.versions, self.engine.precision,
                           self.device.partition(":")[0]], sort_keys=True).encode()

    def info(self):
        """The `model` object of GET /info."""
        size = self.preprocessing.crop
        return {"name": self.name, "task": self.task.kind, "device": self.device, "engine": self.manifest.engine,
                "precision": self.engine.precision, "framework": self.engine.framework, "input_size": [size, size],
                "preprocessing": self.manifest.preprocessing,
                "num_classes": len(self.labels), "total_parameters": self.manifest.total_parameters,
                "weights": {"source": self.manifest.weights["source"], "sha256": self.manifest.weights["sha256"]},
                "quantization": self.manifest.quantization,
                "fallback": {"requested": self.requested, "reason": self.fallback_reason}
                if self.fallback_reason else None, **self.task.info()}


class ModelLoader:
    """A worker's models by name, the current one of which serves requests, and the slots that they share."""

    def __init__(self, settings, plan):
        self.settings, self.plan = settings, plan
        self.slots = Slots(plan.slots, plan.queue)
        self.models, self.current = {}, None
        self.generation = 0  # of the published model that is current
        self.started = time.monotonic()
        self.lock = threading.Lock()  # guards who uses which model

    @property
    def state(self):
        """Why no prediction can be made: loading, self_test_failed; None if one can."""
        return "loading" if self.current is None else "self_test_failed" if self.current.broken else None

    @property
    def ready(self):
        return self.state is None

    def load(self, sources):
        """Load a bundle (a Prepared), self-test it and make it the current model; the previous one finishes what it has
        begun. Runs in any native thread. Raises StartError, and then changes nothing."""
        model, before = Model(sources[0], self.settings, self.plan, self.slots.is_alone), self.current
        with self.lock:
            self.current = model
            self.models = {model.name: model}
            if before is not None:
                before.retired = True
        counters.note_model(model, before)
        self.close_unused(before)
        if model.fallback_reason:
            log.warning("MODEL_FALLBACK is in use: serving %s instead of %s (%s)", model.name, self.settings.model_name,
                        model.fallback_reason)
        log.info("model ready", extra={"model": model.name, "device": model.device, "engine": model.manifest.engine,
                                       "precision": model.engine.precision, "seconds": round(model.load_seconds, 2),
                                       "weights": (model.manifest.weights["sha256"] or "")[:12]})
        return self

    @contextlib.contextmanager
    def lease(self):
        """The current Model, which stays usable until the end of the block even if another one is loaded meanwhile."""
        with self.lock:
            model = self.current
            model.users += 1
        try:
            yield model
        finally:
            with self.lock:
                model.users -= 1
            self.close_unused(model)

    def close_unused(self, model):
        """Free a retired model once it is unused, in a thread of its own, as this may take a while."""
        with self.lock:
            if model is None or not model.retired or model.users:
                return
            model.retired = False
        threading.Thread(target=model.engine.close, name="close-model").start()

    def needs_restart(self):
        """Why this process must be replaced, as a phrase for the log, or None."""
        if self.state == "self_test_failed":
            return "the model failed its self-test"
        if self.ready and self.current.engine.hung_seconds() > HUNG_AFTER_S:
            return f"an inference has been hanging for more than {HUNG_AFTER_S} s past its deadline"
        if self.slots.overdue_seconds() > SLOT_HUNG_AFTER_S:
            return f"a slot has been hanging for more than {SLOT_HUNG_AFTER_S} s past a deadline"
        return None


def rebuild(**arguments):
    """The torch module for a manifest's `network`, without weights."""
    from app.prepare import networks  # imports torch
    return networks.rebuild(**arguments)
