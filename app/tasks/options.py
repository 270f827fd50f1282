"""The options of a prediction, each declared once: validation, the OpenAPI document, the command line and the key of
the result cache derive from this.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

from app.config import FACE_METHODS, MOST_FRAMES, YES_OR_NO
from app.errors import invalid_parameter

LATEST_S = 1_000_000


@dataclass(frozen=True)
class Option:
    """takes: the valid values in words; parse: text → value, raises ValueError; schema: a JSON Schema; meaning: a
    sentence; setting: its name if one holds the default, else None; aliases: other names, tried in turn."""
    name: str
    takes: str
    parse: Callable
    schema: dict
    meaning: str
    setting: str | None = None
    aliases: tuple = ()

    def default(self, settings):
        return getattr(settings, self.setting) if self.setting else None

    def value(self, option, settings):
        """The value from what the caller sent. option: name → text, or None. Raises ServiceError INVALID_PARAMETER."""
        for name in (self.name, *self.aliases):
            text = option(name)
            if text is not None and text != "":
                try:
                    return self.parse(text)
                except ValueError as e:
                    raise invalid_parameter(name, self.takes, text[:40]) from e
        return self.default(settings)


def integer(name, low, high, **more):
    def parse(text):
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)
    return Option(name, f"an integer from {low} to {high}", parse,
                  {"type": "integer", "minimum": low, "maximum": high}, **more)


def seconds(name, **more):
    def parse(text):
        if not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?", text) or not 0 <= float(text) <= LATEST_S:
            raise ValueError
        return float(text)
    return Option(name, f"a number of seconds from 0 to {LATEST_S}", parse,
                  {"type": "number", "minimum": 0, "maximum": LATEST_S}, **more)


def choice(name, choices, **more):
    def parse(text):
        value = text.lower().replace(" ", "+")  # a + in a query means a space
        if value not in choices:
            raise ValueError
        return value
    return Option(name, "one of " + ", ".join(choices), parse, {"type": "string", "enum": list(choices)}, **more)


def yes_or_no(name, **more):
    def parse(text):
        if text.lower() not in YES_OR_NO:
            raise ValueError
        return YES_OR_NO[text.lower()]
    return Option(name, "true or false", parse, {"enum": [True, False, 1, 0, *YES_OR_NO]}, **more)


TOP_K = integer("top_k", 1, 10, setting="top_k", meaning="How many classes a classifier returns.")
METHOD = choice("method", FACE_METHODS, setting="face_method",
                meaning="What ocean analyses: the largest face, or 422; the whole picture; or the face or, if there "
                        "is none, the whole picture.")
TTA = yes_or_no("tta", setting="tta", aliases=("use_tta",),
                meaning="Whether ocean averages over the picture and its mirror image; use_tta is the same.")
FRAMES = integer("frames", 1, MOST_FRAMES, setting="video_frames",
                 meaning="How many frames of a video the answer averages: the middle one of each of that many equal "
                         "segments.")
AT = seconds("at", meaning="The second of a video whose frame is analysed, instead of `frames`.")

ALL = (TOP_K, METHOD, TTA, FRAMES, AT)


def read(option, settings, used):
    """{name: value} of the options in `used`, from what the caller sent. option: name → text, or None.

    Raises ServiceError INVALID_PARAMETER, which names the option, even one that the model does not use.
    """
    values = {declared.name: declared.value(option, settings) for declared in ALL}
    return {declared.name: values[declared.name] for declared in used}
