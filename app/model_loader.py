"""ModelLoader: the models that serve requests, loaded and checked once per worker, and replaced in place."""
import contextlib
import functools
import json
import logging
import threading
import time

from app import tasks
from app.config import StartError
from app.engine.slots import Slots
from app.errors import ServiceError
from app.server import counters
from app.tasks import ModelError, Place

log = logging.getLogger(__name__)

HUNG_AFTER_S = 10         # past the deadline, for an inference
SLOT_HUNG_AFTER_S = 30    # likewise for decoding and face detection, which rarely check the deadline
RETEST_AFTER_S = 10       # a model that fails is tested again, but not for each of its failures


class Model:
    """A task that has been loaded and tested, and the name under which it answers."""

    def __init__(self, source, settings, plan, slots, name=None, version=None):
        """source: a bundle.Prepared; slots: engine.Slots; name: if not the task's. Raises StartError."""
        started = time.monotonic()
        self.settings, self.key, self.version = settings, source.key, version
        self.fallback_reason = source.fallback_reason
        self.instead = {"fallback_for": settings.model_name} if self.fallback_reason else {}  # members of answers
        self.task = tasks.create(Place(source, settings, plan, slots, rebuild))
        self.name = self.task.name if name is None or self.fallback_reason else name
        self.label = f"{self.name}@{version}" if version else self.name
        self.users, self.retired, self.broken, self.tested = 0, False, False, 0.0
        try:
            self.task.start()
            self.self_test()
        except StartError:
            self.task.end()
            raise
        self.load_seconds = time.monotonic() - started

    def self_test(self):
        """Raises ModelError, and says so to supervisors, if the model no longer answers as it should."""
        try:
            self.task.self_test()
        except (ServiceError, RuntimeError, MemoryError, ModelError) as e:
            self.broken = True
            raise ModelError(f"{self.name} fails its self-test: {(str(e) or type(e).__name__).splitlines()[0]}") from e
        self.tested = time.monotonic()

    def answer(self, data, options, call, how=None):
        """The answer to one input: {"predictions": …, "metadata": …}. how: to answer, if not by the task's `answer`.
        Raises ServiceError, MemoryError; ModelError if the model fails and then fails its self-test too."""
        try:
            predictions, metadata = (how or self.task.answer)(data, options, call)
        except (ServiceError, MemoryError):
            raise
        except Exception:  # does the model still work?
            if time.monotonic() > self.tested + RETEST_AFTER_S:
                self.self_test()
            raise
        return {"predictions": predictions, "metadata": {
            "model": self.name, **({"version": self.version} if self.version else {}), "device": self.task.device,
            **metadata, "inference_time": round(call.stages.timings_ms["inference"] / 1000, 6),
            "timings_ms": call.stages.timings_ms}}

    @functools.cached_property
    def identity(self):
        """All that determines the model's answers, as bytes."""
        return json.dumps([self.name, self.version, self.task.identity()], sort_keys=True).encode()

    def info(self):
        """The `model` object of GET /info."""
        fallback = self.fallback_reason and {"requested": self.settings.model_name, "reason": self.fallback_reason}
        return {**self.task.declared(self.name, self.version), **self.task.info(), **self.instead, "fallback": fallback}


class ModelLoader:
    """A worker's model, and the slots that all requests share. With MODELS set, ModelRepository has several."""

    def __init__(self, settings, plan):
        self.settings, self.plan = settings, plan
        self.slots = Slots(plan.slots, plan.queue, plan.streams)
        self.current = None
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

    def models(self):
        """The models that are loaded, the default one first."""
        return [] if self.current is None else [self.current]

    def states(self):
        """What GET /models says of each model."""
        return [{"name": self.current.name, "default": True, "loaded": True, **self.current.instead}]

    def info(self, name):
        """The `model` object of GET /info."""
        with self.lease(name) as model:
            return model.info()

    def load(self, sources):
        """Load a model (a list of one Prepared), self-test it and make it the current one; the previous one finishes
        what it has begun. Runs in any native thread. Raises StartError, and then changes nothing."""
        model, before = Model(sources[0], self.settings, self.plan, self.slots), self.current
        self.current = model
        self.replaced(before, model)
        return self

    def replaced(self, before, model):
        """Note and log a new model; free the one that it replaces, if any, once that is unused."""
        if before is not None:
            counters.note_model(before, 0)
            with self.lock:
                before.retired = True
            self.close_unused(before)
        counters.note_model(model)
        engine, precision, weights = model.task.gauges()
        if model.fallback_reason:
            log.warning("MODEL_FALLBACK is in use: serving %s instead of %s (%s)", model.name,
                        model.settings.model_name, model.fallback_reason)
        log.info("model ready", extra={"model": model.label, "device": model.task.device, "engine": engine,
                                       "precision": precision, "seconds": round(model.load_seconds, 2),
                                       "weights": weights})

    def find(self, name, client=None):
        """The Model for a name that a request gives, or none. Raises ServiceError NOT_FOUND."""
        if name and name != self.current.name:
            raise no_such_model(name)
        return self.current

    def when_loaded(self, call, deadline):
        """Make a call that may raise what `lease` does for a model that must be loaded first: none here."""
        return call()

    def tasks(self, name):
        """The tasks that may answer a request with this name."""
        return [self.find(name).task]

    def answered(self, model, data, options, answer):
        """Called after each answer; ModelRepository passes it on to a shadow."""

    @contextlib.contextmanager
    def lease(self, name=None, client=None):
        """The Model for a request, which stays usable until the end of the block even if it is replaced meanwhile.
        name: what the request calls it; client(): who asks. Raises ServiceError."""
        with self.lock:
            model = self.find(name, client)
            model.users += 1
        try:
            yield model
        finally:
            with self.lock:
                model.users -= 1
            self.close_unused(model)

    def close_unused(self, model):
        """Free a retired model if it is unused, in a thread of its own, as this may take a while; returned, or None."""
        with self.lock:
            if not model.retired or model.users:
                return None
            model.retired = False
        thread = threading.Thread(target=model.task.end, name="close-model")
        thread.start()
        return thread

    def needs_restart(self):
        """Why this process must be replaced, as a phrase for the log, or None."""
        for model in self.models():
            if model.broken:
                return "the model failed its self-test"
            if model.task.hung_seconds() > HUNG_AFTER_S:
                return f"an inference has been hanging for more than {HUNG_AFTER_S} s past its deadline"
        if self.slots.overdue_seconds() > SLOT_HUNG_AFTER_S:
            return f"a slot has been hanging for more than {SLOT_HUNG_AFTER_S} s past a deadline"
        return None


def no_such_model(name):
    return ServiceError(404, "NOT_FOUND", f"There is no model {name[:80]}; GET /models lists the models.")


def rebuild(manifest):
    """(the torch module of a manifest, without its weights; the Tap on its feature maps, or None)."""
    from app.prepare import features, networks  # these import torch
    module = networks.skeleton(networks.rebuild, **manifest.network)
    return module, features.tap(module, manifest.features)
