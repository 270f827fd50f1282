"""Tasks: what a model takes, its options, and how it comes to its answers."""
from dataclasses import dataclass
from typing import Any

from app.config import StartError


class ModelError(StartError):
    """A model that does not load or gives wrong answers; the message is one line."""


@dataclass(frozen=True)
class Place:
    """Where a task runs. source: its bundle.Prepared; settings: the model's; plan: config.Plan; slots: engine.Slots;
    rebuild: creates the torch module of a manifest, see model_loader.py."""
    source: Any
    settings: Any
    plan: Any
    slots: Any
    rebuild: Any


@dataclass(frozen=True)
class Call:
    """One request for an answer. stages: counters.Stages, which get the timings; field: where the input was found, for
    messages; see: called with (frame's number, RGB PIL image) right before preprocessing, in any order and thread."""
    deadline: Any
    stages: Any
    field: str = "file"
    see: Any = None


class Task:
    """A model that loads itself and answers. from_pictures.py has those that run a bundle, own.py is the base of models
    of one's own. All methods run in native threads, `answer` in several at once. Each task has

    start(): get ready to answer; raises StartError
    self_test(): compare an answer with what is known; raises ModelError, or what answering raises
    answer(data, options, call): (predictions, members of the metadata) for one input: a file's bytes, text, or JSON
        types; options: {name: value} of self.options; raises ServiceError, MemoryError
    identity(): all that determines its answers, as JSON types
    info(): members of the `model` object of GET /info
    gauges(): (engine, precision, start of the weights' SHA-256) for the log and /metrics
    hung_seconds(): how long an inference has been running after everyone who waited for it has left
    end(): free threads and memory; no answer may follow
    """
    name = kind = None    # of the model, and of what it does, in /info
    takes = ()            # what an input is: picture, video, audio, or any of these; or text; or json
    is_file = True        # whether it is a file's bytes
    field = None          # the member of a JSON body that holds it, if it is no file
    body_types = None     # a pattern of the Content-Types that a raw body may have
    body_type = "image/jpeg"  # one of these, as an example
    how_to_send = ""      # an input, in words
    options = ()          # options.Option
    max_batch = 1         # inputs of different requests that are predicted together
    checked_options = ()  # those of other tasks, which it ignores but whose values are checked
    media_types = ()      # what an answer may be besides JSON
    deterministic = True  # whether equal inputs have equal answers, which may then be cached
    answers = "Anything"  # the class of answers.py for its answers

    def __init__(self, place):
        self.settings, self.place, self.device = place.settings, place, place.plan.device

    def declared(self, name, version):
        """The members of GET /info's `model` that are known before it is loaded."""
        return {"name": name, **({"version": version} if version else {}), "task": self.kind, "takes": self.takes,
                "field": self.field, "media_types": self.media_types, "device": self.device,
                "options": [option.info(self.settings) for option in self.options]}

    def answer_kind(self):
        from app.tasks import answers
        return getattr(answers, self.answers)(self)


def create(place):
    """The task of a place, not yet started. OpenCV is imported here, and only for tasks that detect faces. Raises
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
