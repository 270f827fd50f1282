"""ModelRepository: several models, by name and version, in one process and with one pool of slots.

They are loaded at boot or on first use; under MODELS_MEMORY, the one that was used least recently makes room for
another. The first of MODELS is the default one, which always stays. Only services with MODELS set import this.
"""
import collections
import contextlib
import functools
import gc
import logging
import os
import threading
import time

import gevent
from gevent.event import AsyncResult, Event

from app import model_settings
from app.config import StartError
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.model_loader import Model, ModelLoader, no_such_model, rebuild
from app.server import counters, traffic
from app.server.counters import Stages
from app.tasks import Call, ModelError, Place, create
from app.tasks.options import INSIGHT

RETRY_LOAD_AFTER_S = 10   # a model that cannot be loaded
MOST_SHADOWED = 4         # answers that wait for their shadow; each keeps its file in memory
LOAD_ALONE_S = 30         # how long a model waits for another one that is being loaded
CLOSE_WITHIN_S = 5        # an unloaded model
SHADOW_WAITS_S = 2        # for idle slots
QUIET_S, LOOK_S = 0.02, 0.005  # how long all slots must have been idle, and how often to look

log = logging.getLogger(__name__)


class NotLoaded(Exception):
    """Raised by `find`, and handled by `when_loaded`: the model must be loaded first."""

    def __init__(self, key):
        super().__init__(key)
        self.key = key


class ModelRepository(ModelLoader):
    """A worker's models by key ("cats" or "cats@2"), and the slots that they share."""

    def __init__(self, settings, plan):
        super().__init__(settings, plan)
        self.each = model_settings.each(settings)  # {key: its Settings}
        self.versions = model_settings.versions(self.each)  # {name: versions}
        self.default = next(iter(self.each))
        self.default_name = self.default.partition("@")[0]
        self.area = traffic.own(settings)
        self.sources = {}                      # {key: Prepared}
        self.declared = {}                     # {key: Task}, which has not been started
        self.by_key = collections.OrderedDict()  # loaded Models, the one used last at the end
        self.sizes = {}                        # {key: bytes that the model took when it was last loaded}
        self.loads, self.failed_at = {}, {}    # {key: AsyncResult of a load}, {key: when it last failed}
        self.load_lock = threading.Lock()      # one at a time: its size is how much the process grows
        self.cores = threading.Semaphore(plan.slots)
        self.shadowed, self.shadowing, self.shadow_waits = collections.deque(), None, Event()
        self.loop = None

    # --- loading ---

    @property
    def state(self):
        state = super().state
        return "self_test_failed" if any(model.broken for model in self.models()) else state

    def models(self):
        with self.lock:
            loaded = dict(self.by_key)
        return [loaded[key] for key in self.each if key in loaded]

    def load(self, sources):
        """At boot, load the default model, and with LOAD_MODELS=boot the others; on a reload, those that are loaded,
        one after the other. Raises StartError: the models that it names stay as they were."""
        first = not self.by_key
        self.declared = {source.key: self.task_of(source) for source in sources}
        before, self.sources = self.sources, {source.key: source for source in sources}
        wanted = [key for key in self.each if key == self.default or key in self.by_key
                  or first and self.settings.load_models == "boot"]
        failure = None
        for key in wanted:
            try:
                self.load_one(key)
            except Exception as e:
                log.error("%s cannot be loaded: %s", key, e)
                self.sources[key] = before.get(key, self.sources[key])
                failure = failure or (e if isinstance(e, StartError) else ModelError(f"{key}: {e}"))
        if failure is not None:
            raise failure
        missing = [key for key in wanted if key not in self.by_key]
        if missing:
            log.warning("MODELS_MEMORY does not hold all models: %s will be loaded on first use",
                        ", ".join(missing))
        return self

    def task_of(self, source):
        return create(Place(source, self.each[source.key], self.plan, self.slots, rebuild))

    def load_one(self, key):
        """Load a model, or load it again, in a native thread. Raises StartError, or ServiceError OUT_OF_MEMORY."""
        name, _, version = key.partition("@")
        is_alone = self.load_lock.acquire(timeout=LOAD_ALONE_S)
        try:
            self.make_room(key)
            if self.settings.models_memory is not None:
                gc.collect()  # what is freed while the model loads would hide a part of its size
            grown = resident_bytes()
            model = Model(self.sources[key], self.each[key], self.plan, self.slots, name, version or None)
            if model.task.max_batch == 1:
                model.answer = functools.partial(self.within_cores, model.answer)
            files = files_bytes(self.sources[key])
            # Requests meanwhile take and free memory too: a bundle takes its files' size, at most three times.
            # Without files, what they freed may hide what the model took: its largest size counts until a reload.
            grown = resident_bytes() - grown
            with self.lock:
                before = self.by_key.get(key)
                known = self.sizes.get(key, 0) if before is None else 0
                self.sizes[key] = max(files, min(grown, 3 * files) if files else max(grown, known))
                self.by_key[key] = model
                self.by_key.move_to_end(key)
                if key == self.default:
                    self.current = model
            self.replaced(before, model)
            self.make_room(key, is_loaded=True)
        finally:
            if is_alone:
                self.load_lock.release()

    def within_cores(self, answer, data, options, call, *how):
        """Answer when few enough others do: a model that collects batches has more slots than there is work for."""
        if not self.cores.acquire(timeout=max(0, call.deadline.remaining())):
            raise DeadlineExceeded("queue")
        try:
            return answer(data, options, call, *how)
        finally:
            self.cores.release()

    def make_room(self, key, is_loaded=False):
        """Unload models until this one fits. Raises ServiceError OUT_OF_MEMORY if it never will."""
        limit = self.settings.models_memory
        if limit is None:
            return
        size = self.sizes.get(key, 0) or files_bytes(self.sources[key])
        while True:
            with self.lock:
                others = [one for one in self.by_key if one != key]
                free = [one for one in others if one != self.default]
                fits = size + sum(self.sizes[one] for one in others) <= limit
            if fits or is_loaded and not free:
                return
            if not free:
                raise ServiceError(503, "OUT_OF_MEMORY", f"The model {key} does not fit into the memory for models.",
                                   retry_after_s=60)
            self.unload(free[0])

    def unload(self, key):
        with self.lock:
            model = self.by_key.pop(key)
            model.retired = True
        log.info("model unloaded", extra={"model": key, "bytes": self.sizes[key]})
        counters.note_model(model, 0)
        closing = self.close_unused(model)
        del model
        if closing:  # so that the memory is free, and does not seem to be taken by the model that is loaded next
            closing.join(CLOSE_WITHIN_S)
            gc.collect()

    def when_loaded(self, call, deadline):
        """Make a call in a greenlet; if it needs a model that is not loaded, load that and make the call again. Raises
        what the call raises, and ServiceError MODEL_UNAVAILABLE."""
        self.start_shadowing()
        while True:
            try:
                return call()
            except NotLoaded as e:
                deadline.check("load")
                self.wait_for(e.key, deadline)

    def wait_for(self, key, deadline):
        """Wait until a model is loaded, in a place of the queue; the first who waits has it loaded."""
        if self.has_failed(key):
            raise unavailable(key)
        self.slots.check_room()
        result = self.loads.get(key)
        if result is None:
            result = self.loads[key] = AsyncResult()
            loop = gevent.get_hub().loop
            threading.Thread(target=self.load_for, args=(key, result, loop), name=f"load-{key}", daemon=True).start()
        self.slots.onlookers += 1
        try:
            with gevent.Timeout(max(0, deadline.remaining()), DeadlineExceeded("load")):
                error = result.get()
        finally:
            self.slots.onlookers -= 1
        if error is not None:
            raise error

    def has_failed(self, key):
        """Whether the model could not be loaded, and it is too early to try again."""
        return time.monotonic() < self.failed_at.get(key, -RETRY_LOAD_AFTER_S) + RETRY_LOAD_AFTER_S

    def load_for(self, key, result, loop):
        error = None
        try:
            self.load_one(key)
        except ServiceError as e:
            error = e
        except Exception as e:  # a model of one's own may raise anything
            log.error("%s cannot be loaded: %s", key, e)
            self.failed_at[key], error = time.monotonic(), unavailable(key)

        def done():
            self.loads.pop(key, None)
            result.set(error)
        loop.run_callback_threadsafe(done)

    # --- which model answers ---

    def key_of(self, name, client=None):
        """The key for what a request calls its model. client(): who asks. Raises ServiceError NOT_FOUND."""
        name = name or self.default_name
        if name in self.each:
            return name
        if name not in self.versions:
            raise no_such_model(name)
        split = self.area.read()[name]["split"]
        version = traffic.choose(name, split, client() if client and len(split) > 1 else "")
        return f"{name}@{version}"

    def find(self, name, client=None):
        key = self.key_of(name, client)
        model = self.by_key.get(key)
        if model is None:
            raise NotLoaded(key)
        self.by_key.move_to_end(key)
        return model

    def tasks(self, name):
        if name:
            self.key_of(name)
            keys = [key for key in self.each if name in (key, key.partition("@")[0])]
        else:
            keys = list(self.each)  # the body may name any of them
        return [self.declared[key] for key in keys]

    def info(self, name):
        try:
            return super().info(name)
        except NotLoaded as e:
            name, _, version = e.key.partition("@")
            task = self.declared[e.key]
            return {**task.declared(name, version), **(task.info() if self.sources[e.key].own else {}), "loaded": False}

    def states(self):
        """[{"name", "version", "default", "loaded", "share", "shadow", "memory_bytes"}] of all models."""
        shares, states = self.area.read(), []
        for key in self.each:
            name, _, version = key.partition("@")
            state = {"name": name, "default": name == self.default_name, "loaded": key in self.by_key}
            if version:
                split = dict(shares[name]["split"])
                state |= {"version": version, "share": split.get(version, 0),
                          "shadow": shares[name]["shadow"] == version}
            if model := self.by_key.get(key):
                state |= {"memory_bytes": self.sizes.get(key, 0), **model.instead}
            states.append(state)
        return states

    # --- the shadow ---

    def answered(self, model, data, options, answer):
        """Have the version that shadows this model's answer the same, later, on idle slots. From any thread."""
        shadow = model.version and self.area.read()[model.key.partition("@")[0]]["shadow"]
        if not shadow or shadow == model.version:
            return
        if len(self.shadowed) >= MOST_SHADOWED:
            count_shadow(model.name, shadow, "skipped")
            return
        self.shadowed.append((time.monotonic(), model, shadow, data, options, answer["predictions"]))
        self.loop.run_callback_threadsafe(self.shadow_waits.set)

    def start_shadowing(self):
        if self.shadowing is None:
            self.loop, self.shadowing = gevent.get_hub().loop, gevent.spawn(self.shadow_all)

    def shadow_all(self):
        while True:
            self.shadow_waits.wait()
            self.shadow_waits.clear()
            idle_since = None
            while self.shadowed:
                now, (since, model, version, *rest) = time.monotonic(), self.shadowed[0]
                idle_since = (idle_since or now) if self.is_idle() else None
                if now > since + SHADOW_WAITS_S:
                    self.shadowed.popleft()
                    count_shadow(model.name, version, "skipped")
                elif idle_since is None or now < idle_since + QUIET_S:
                    gevent.sleep(LOOK_S)
                else:
                    self.shadowed.popleft()
                    idle_since = None
                    count_shadow(model.name, version, self.outcome_of_shadow(model, version, *rest))

    def outcome_of_shadow(self, model, version, *asked):
        name = model.key.partition("@")[0]
        try:
            return self.shadow(model, f"{name}@{version}", *asked)
        except DeadlineExceeded:
            self.end_shadow(name, version)
        except Exception as e:
            log.info("the shadow %s@%s failed: %s", name, version, e)
        return "failed"

    def end_shadow(self, name, version):
        """Switch off, in all workers, a shadow that exceeded its deadline: it may hang, and hold a slot for good."""
        log.error("the shadow %s@%s exceeded its deadline and is switched off", name, version)

        def without(shares):
            return {**shares, name: {**shares[name], "shadow": None}}
        with contextlib.suppress(StartError):
            self.area.write(without)

    def is_idle(self):
        return not self.slots.running and not self.slots.waiting and not self.slots.batched

    def shadow(self, model, key, data, options, predictions):
        deadline, stages = Deadline(self.settings.request_timeout), Stages()

        def answer():
            with self.lease(key) as other:
                # Not to explain or embed, which is not compared, and which its network may be unable to do.
                mine = {one.name: one.default if one in INSIGHT else options.get(one.name, one.default_of(
                    other.settings)) for one in other.task.options}
                # Not Model.answer: a shadow that fails must not make this worker restart.
                found, _ = other.task.answer(data, mine, Call(deadline, stages))
            return "agree" if model.task.answer_kind().agree(predictions, found) else "disagree"
        return self.when_loaded(lambda: self.slots.run(answer, deadline, stages, admitted=True), deadline)


def count_shadow(name, version, outcome):
    counters.count("shadow_answers", name, version, outcome)


def unavailable(key):
    return ServiceError(503, "MODEL_UNAVAILABLE", f"The model {key} cannot be loaded now; the log says why.",
                        retry_after_s=RETRY_LOAD_AFTER_S)


def resident_bytes():
    """This process's resident memory."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def files_bytes(source):
    """The size of a bundle's files; 0 of a model of one's own."""
    if source.folder is None:
        return 0
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in source.folder.iterdir())
    return 0
