"""ModelLoader: which model answers, loaded and checked once a worker, and asked for predictions."""
import importlib
import logging
import time

import numpy as np

from app import bundle, engines, state
from app.config import StartError
from app.errors import ServiceError
from app.machine import SPARE_THREADS, plan
from app.prepare import prepared
from app.preprocess import Preprocessing
from app.scheduler import Deadline, Scheduler

log = logging.getLogger(__name__)

# How far an output of the self-test may be from torch's at fp32 (int8: from the int8 network's when it was made), as a
# share of the largest. Measured: fp32 1e-6; bf16 0.004 (ResNet-50) to 0.13 (EfficientNet-Lite0); two classes swapped 1.
SELF_TEST_TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3, "int8": 0.3}
SELF_TEST_TIMEOUT_S = 60
HUNG_AFTER_S = 10


class ModelError(StartError):
    """A model that does not load or answers wrongly; one line."""


class ModelLoader:
    """One model of one worker. After load(): name, task, labels, preprocessing, device, scheduler and predict()."""

    def __init__(self, settings):
        self.settings, self.device = settings, settings.device
        self.state = "loading"  # why not ready: loading, self_test_failed; None when ready
        self.started = time.monotonic()

    @property
    def ready(self):
        return self.state is None

    def load(self, source=None):
        """Find or make the bundle (or take `source`, a Prepared), load it, and check the answer to a known input.
        Raises StartError."""
        machine = plan(self.settings)
        self.device = machine.device
        source = source or state.served() or prepared(self.settings)
        self.fallback_reason = source.fallback_reason
        self.manifest = bundle.read(source.folder)
        if self.manifest is None:
            raise ModelError(f"{source.folder} has no manifest")
        self.name, self.task, self.labels = self.manifest.name, self.manifest.task, self.manifest.labels
        self.classifies = self.task == "classification"
        if not self.classifies:
            importlib.import_module("app.faces")  # with OpenCV: now, not with the first request
        self.preprocessing = Preprocessing(**self.manifest.preprocessing)
        self.engine = engines.create(self.manifest, source.folder, machine, self.settings, self.device)
        self.scheduler = Scheduler(machine.slots, machine.queue, max(1, machine.threads - SPARE_THREADS))
        self.self_test()
        self.load_seconds = time.monotonic() - self.started
        self.state = None
        if self.fallback_reason:
            log.warning("MODEL_FALLBACK answers: %s is served, not %s (%s)", self.name, self.settings.model_name,
                        self.fallback_reason)
        log.info("model ready", extra={"model": self.name, "device": self.device, "engine": self.manifest.engine,
                                       "precision": self.engine.precision, "seconds": round(self.load_seconds, 2)})
        return self

    def self_test(self):
        """The warm-up inference, compared with what the torch network answered. Raises ModelError."""
        expected = np.array([self.manifest.self_test["outputs"]], np.float32)
        try:
            outputs = np.concatenate([self.engine.infer(engines.self_test_input(self.preprocessing),
                                                        Deadline(SELF_TEST_TIMEOUT_S), alone)
                                      for alone in (False, True)])  # (2, K)
            error = np.abs(outputs - expected).max() / np.abs(expected).max()
        except (ServiceError, RuntimeError, MemoryError) as e:
            self.state = "self_test_failed"
            raise ModelError(f"{self.name} fails its self-test: {str(e).splitlines()[0]}") from e
        if not error <= SELF_TEST_TOLERANCE[self.engine.precision]:
            self.state = "self_test_failed"
            raise ModelError(f"{self.name} answers its self-test wrongly: off by {error:.2g} of the largest output")

    def scores(self, outputs):
        """(N, K) float32 outputs of the network → (N, K): softmax probabilities of a classifier, a regression's as they
        are."""
        return softmax(outputs) if self.classifies else outputs

    def infer(self, batch, deadline):
        """float32 (N, 3, H, W), preprocessed → scores (N, K). Raises DeadlineExceeded, MemoryError."""
        try:
            outputs = self.engine.infer(batch, deadline, self.scheduler.is_alone())
        except (ServiceError, MemoryError):
            raise
        except Exception:  # the network itself failed: is it still right?
            self.self_test()
            raise
        return self.scores(outputs)

    def needs_restart(self):
        """Why this process can no longer be trusted with the model, in words for the log, or None."""
        if self.state == "self_test_failed":
            return "the model failed its self-test"
        if self.ready and self.engine.hung_seconds() > HUNG_AFTER_S:
            return f"an inference has been hanging for more than {HUNG_AFTER_S} s past its deadline"
        return None

    def predictions(self, scores, k):
        """(K,) scores as an answer has them: a classifier's k best as [{"class", "confidence", "class_id"}], highest
        first; a regression's as {trait: score}."""
        if not self.classifies:
            return {trait: float(score) for trait, score in zip(self.labels, scores, strict=True)}
        best = np.argsort(-scores, kind="stable")[:k]
        return [{"class": self.labels[i], "confidence": float(scores[i]), "class_id": int(i)} for i in best]

    def info(self):
        """The `model` object of GET /info."""
        size = self.preprocessing.crop
        return {"name": self.name, "task": self.task, "device": self.device, "engine": self.manifest.engine,
                "precision": self.engine.precision, "framework": self.engine.framework, "input_size": [size, size],
                "num_classes": len(self.labels), "total_parameters": self.manifest.total_parameters,
                "weights": {"source": self.manifest.weights["source"], "sha256": self.manifest.weights["sha256"]},
                "quantization": self.manifest.quantization,
                "fallback": {"requested": self.settings.model_name, "reason": self.fallback_reason}
                if self.fallback_reason else None,
                **({} if self.classifies else {"backbone": self.manifest.network["backbone"]}),
                "labels" if self.classifies else "traits": self.labels}


def softmax(logits):
    """(N, K) → (N, K) float64 probabilities."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
