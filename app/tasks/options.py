"""The options of a prediction, each declared once: validation, the OpenAPI document, the command line and the key of
the result cache derive from this.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.config import FACE_METHODS, MOST_FRAMES, YES_OR_NO
from app.errors import invalid_parameter

LATEST_S = 1_000_000


@dataclass(frozen=True)
class Option:
    """takes: the valid values in words; parse: text, or a file's bytes → value, raises ValueError (for a file with its
    size in words); schema: a JSON Schema; meaning: a sentence; setting: the name of the setting that holds the default,
    if one does; aliases: other names, tried in turn; is_file: whether the value is a file's bytes."""
    name: str
    takes: str
    parse: Callable
    schema: dict
    meaning: str = ""
    default: Any = None
    setting: str | None = None
    aliases: tuple = ()
    is_file: bool = False

    def default_of(self, settings):
        return getattr(settings, self.setting) if self.setting else self.default

    def value(self, option, settings):
        """The value from what the caller sent. option(name, is_file) → text or a file's bytes, or None. Raises
        ServiceError INVALID_PARAMETER."""
        for name in (self.name, *self.aliases):
            sent = option(name, self.is_file)
            if sent:
                try:
                    return self.parse(sent)
                except ValueError as e:
                    raise invalid_parameter(name, self.takes, f"a file of {e}" if self.is_file else sent[:40]) from e
        return self.default_of(settings)

    def info(self, settings):
        """The option as JSON types, for GET /info."""
        return {"name": self.name, "schema": self.schema, "default": self.default_of(settings), "takes": self.takes,
                "meaning": self.meaning, "is_file": self.is_file}


def integer(name, low, high, **more):
    def parse(text):
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)
    return Option(name, f"an integer from {low} to {high}", parse,
                  {"type": "integer", "minimum": low, "maximum": high}, **more)


def number(name, low, high, unit="", **more):
    def parse(text):
        if not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?", text) or not low <= float(text) <= high:
            raise ValueError
        return float(text)
    return Option(name, f"a number {unit}from {low} to {high}", parse,
                  {"type": "number", "minimum": low, "maximum": high}, **more)


def choice(name, choices, **more):
    if isinstance(choices, str):
        raise TypeError(f"the choices of {name} must be a tuple of texts")

    def parse(text):
        value = text.lower().replace(" ", "+")  # a + in a query means a space
        for one in choices:
            if value == one.lower().replace(" ", "+"):
                return one
        raise ValueError
    return Option(name, "one of " + ", ".join(choices), parse, {"type": "string", "enum": list(choices)}, **more)


def yes_or_no(name, **more):
    def parse(text):
        if text.lower() not in YES_OR_NO:
            raise ValueError
        return YES_OR_NO[text.lower()]
    return Option(name, "true or false", parse, {"enum": [True, False, 1, 0, *YES_OR_NO]}, **more)


TOP_K = integer("top_k", 1, 10, setting="top_k", meaning="How many classes a classifier returns.")
METHOD = choice("method", FACE_METHODS, setting="face_method",
                meaning="What ocean analyses: face (the largest one; an error if there is none), middle (the whole "
                        "picture), or face+middle (the face, or else the whole picture).")
TTA = yes_or_no("tta", setting="tta", aliases=("use_tta",),
                meaning="Whether ocean averages over the picture and its mirror image; use_tta is the same.")
FRAMES = integer("frames", 1, MOST_FRAMES, setting="video_frames",
                 meaning="Number of frames of a video to average over. The video is split into this many equal parts, "
                         "of which the middle frames are used.")
AT = number("at", 0, LATEST_S, unit="of seconds ",
            meaning="The second of a video whose frame is analysed, instead of `frames`.")
STREAM = yes_or_no("stream", default=False, meaning="Whether to answer with server-sent events: one for each frame "
                   "of a video, or for each file.")  # of the endpoint, not of a task

EXPLAIN = yes_or_no("explain", default=False, meaning="Whether to map what each part of a picture adds to a score.")
EXPLAIN_CLASS = Option("explain_class", "a class (name or class_id) or a trait", str, {"type": ["string", "integer"]},
                       "The class or trait to explain, instead of the best class or all traits.")
EMBEDDING = yes_or_no("embedding", default=False, meaning="Whether to return the vector before the last layer.")
NORMALIZE = yes_or_no("normalize", default=False, meaning="Whether to scale that vector to length 1.")

INSIGHT = (EXPLAIN, EXPLAIN_CLASS, EMBEDDING, NORMALIZE)
ALL = (TOP_K, METHOD, TTA, FRAMES, AT, *INSIGHT)


def read(option, task):
    """{name: value} of a task's options, from what the caller sent. option: see Option.value. Raises ServiceError
    INVALID_PARAMETER, which names the option, even for some that the task does not use."""
    used = {declared.name: declared.value(option, task.settings) for declared in task.options}
    for declared in task.checked_options:
        if declared.name not in used:
            declared.value(option, task.settings)
    if task.checked_options and any(used.get(one.name) for one in INSIGHT):
        from app.tasks import insight  # with the first of these
        insight.check(task, used)
    return used
