"""What the classes of models of one's own may declare: mistakes are found before anything is loaded."""
import difflib
import re

from app.sizes import apart, words
from app.tasks.options import Option
from app.tasks.own_inputs import is_unicode

FILES = ("picture", "video", "audio")
KINDS = (*FILES, "text", "json")
ATTRIBUTES = ("takes", "field", "options", "example", "media_types", "input_schema", "answer_schema", "max_batch",
              "batch_wait_ms", "threads", "deterministic", "self_test_within_s", "load", "decode", "predict", "encode",
              "close")


def mistake(task, base):
    """What is wrong with the attributes of a task's class, as a phrase, or None. base: OwnTask, its base class."""
    if not task.takes or not set(task.takes) <= set(KINDS) or len(task.takes) > 1 and not set(task.takes) <= set(
            FILES):
        return f"takes must be one of {', '.join(KINDS)}, or several of the first three, got {type(task).takes!r}"
    if type(task).predict is base.predict or not callable(task.predict):
        return "it has no method predict"
    if not all(isinstance(schema, dict) for schema in (task.input_schema, task.answer_schema)):
        return "input_schema and answer_schema must be JSON Schemas, as dicts"
    if not isinstance(task.field, str | None):
        return f"field must be a text or None, got {task.field!r}"
    if not isinstance(task.media_types, tuple):
        return f"media_types must be a tuple such as (\"audio/wav\",), got {task.media_types!r}"
    if not isinstance(task.options, tuple) or not all(isinstance(option, Option) for option in task.options):
        return "options must be a tuple of what choice, file, integer, number, text and yes_or_no make"
    for name in vars(type(task)):
        meant = difflib.get_close_matches(name, ATTRIBUTES, 1, 0.85)
        if meant and name not in dir(base):
            return f"it has an attribute {name}: did you mean {meant[0]}?"
    if task.takes == ("text",) and not isinstance(task.example, str | None):
        return f"example must be a text, got {task.example!r}"
    names = [option.name for option in task.options]
    odd = [name for name in names if not re.fullmatch("[a-z][a-z0-9_]{0,39}", str(name))]
    if odd:
        return f"the name of an option must have lower-case letters, digits and _, not {odd[0]!r}"
    for option in task.options:
        if option.schema.get("minimum", 0) > option.schema.get("maximum", float("inf")):
            return f"{option.name} must be {option.takes}: there is no such number"
        if option.default is not None and not has_valid_default(option):
            return f"the default of {option.name} must be {option.takes}, got {option.default!r}"
    if set(task.takes) <= set(FILES) and {"data", "file", "files", "image", "url", "video"} & set(names):
        return "data, file, files, image, url and video are names of the input: an option needs another one"
    if {"calibrate", "help", "json", "labels", "report", "save", "save_crop", "save_overlay"} & set(names):
        return "calibrate, help, json, labels, report, save, save_crop and save_overlay are taken: choose another name"
    field = task.field or ("text" if task.takes == ("text",) else None)
    if len(set(names)) < len(names) or {"model", "instances", "stream", field} & set(names):
        return "options need distinct names, other than model, instances, stream and the field"
    for name, least in (("max_batch", 1), ("batch_wait_ms", 0), ("threads", 1),
                        ("self_test_within_s", 1)):
        value = getattr(task, name)
        if not (isinstance(value, int) and value >= least or name == "threads" and value is None):
            return f"{name} must be an integer of at least {least}"
    return None


def has_valid_default(option):
    try:
        return not option.is_file and option.parse(str(option.default)) == option.default
    except ValueError:
        return False


# --- further options ---

def text(name, most=1000, **more):
    def parse(text):
        if len(text) > most or not is_unicode(text):
            raise ValueError
        return text
    return Option(name, f"a text of at most {most} characters", parse, {"type": "string", "maxLength": most}, **more)


def file(name, most_bytes=10 * 2**20, **more):
    """A file besides the input: a form's part of that name, or base64 in JSON. The value is its bytes, or None."""
    def parse(data):
        if len(data) > most_bytes:
            raise ValueError(apart(len(data), most_bytes)[0])
        return data
    return Option(name, f"a file of at most {words(most_bytes)}", parse, {"type": "string", "format": "binary"},
                  is_file=True, **more)
