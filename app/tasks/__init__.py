"""Tasks: what a model takes, its options, and how it comes to its answers."""
import json
from dataclasses import dataclass
from typing import Any

from app.config import StartError


class ModelError(StartError):
    """A model that does not load or gives wrong answers; the message is one line."""


@dataclass(frozen=True)
class Place:
    """Where a task runs. source: its bundle.Prepared; settings: the model's; plan: config.Plan; slots: engine.Slots;
    rebuild: creates the torch module of a manifest."""
    source: Any
    settings: Any
    plan: Any
    slots: Any
    rebuild: Any


@dataclass(frozen=True)
class Call:
    """One request for an answer. stages: counters.Stages, which get the timings; field: where the input was found, for
    messages; see: called with (frame's number, RGB PIL image) for each picture right before preprocessing."""
    deadline: Any
    stages: Any
    field: str = "file"
    see: Any = None


class Task:
    """A model that loads itself and answers. from_pictures.py has those that run a bundle, own.py is the base of models
    of one's own. All methods run in native threads, `answer` in several at once."""
    name = kind = None  # of the model, and of what it does, in /info
    takes = ()         # what an input is: picture, video, audio, or any of these; or text; or json
    is_file = True     # whether it is a file's bytes
    body_types = None  # a pattern of the Content-Types that a raw body may have
    how_to_send = ""   # an input, in words
    options = ()       # options.Option
    checked_options = ()     # that it ignores, unless their values are bad
    field = example = None   # of text and JSON, see own.py
    media_types = ()         # what an answer may be besides JSON
    answer_schema = {}       # a JSON Schema of an answer's `predictions`

    def __init__(self, place):
        self.settings, self.place, self.device = place.settings, place, place.plan.device

    def start(self):
        """Get ready to answer. Raises StartError."""
        raise NotImplementedError

    def self_test(self):
        """Compare an answer with what is known. Raises ModelError, or what answering raises."""
        raise NotImplementedError

    def answer(self, data, options, call):
        """(predictions, members of the metadata) for one input: a file's bytes, text, or JSON types. options: {name:
        value} of self.options. Raises ServiceError, MemoryError."""
        raise NotImplementedError

    def agrees(self, predictions, others):
        """Whether two answers to the same request are the same in substance."""
        return predictions == others

    def identity(self):
        """All that determines the answers, as JSON types."""
        raise NotImplementedError

    def info(self):
        """Members of the `model` object of GET /info."""
        return {}

    def gauges(self):
        """(engine, precision, start of the weights' SHA-256) for the log and /metrics."""
        return type(self).__name__, "", ""

    def columns(self):
        """Titles of the columns in which `predict` on the command line shows answers."""
        return ["answer"]

    def row(self, predictions):
        """An answer's columns."""
        return [json.dumps(predictions, ensure_ascii=False)[:200]]

    def evaluation(self):
        """How `evaluate` compares answers with labels: a class of evaluation.py."""
        from app.tasks.evaluation import Equality
        return Equality

    def hung_seconds(self):
        """How long an inference has been running after everyone who waited for it has left."""
        return 0.0

    def end(self):
        """Free threads and memory; no answer may follow."""


def create(place):
    """The task of a place, not yet loaded. OpenCV is imported here, and only for tasks that detect faces. Raises
    StartError."""
    if place.source.own:
        from app.tasks import own
        return own.create(place)
    from app.engine import bundle
    manifest = bundle.read(place.source.folder)
    if manifest is None:
        raise ModelError(f"{place.source.folder} holds no model that this version can serve")
    if manifest.task == "classification":
        from app.tasks.classify import Classify
        return Classify(place, manifest)
    from app.tasks.big_five import BigFive
    return BigFive(place, manifest)
