"""The body of V2's requests: JSON, with binary tensors after it. Knows tensors, but no models.

Numbers and long texts are left out of the JSON that is parsed at once, which holds the GIL: numbers are parsed in
pieces, and texts one by one, so that only one is copied at a time.
"""
import os
import re
from dataclasses import dataclass

from app.api import json_body, long_texts
from app.api.long_texts import LONG, Text, end_of_text
from app.errors import ServiceError
from app.open_inference.tensors import SIZES, Numbers, Tensor, count, invalid
from app.sizes import too_many

HEADER_LENGTH = "Inference-Header-Content-Length"
MOST_PARTS = 10_000
MOST_DIMENSIONS = 8
MOST_JSON = 2**20           # bytes besides the numbers and long texts in `data`
MOST_LISTS = 16             # of numbers
MOST_ID = 1000              # characters
MOST_TEXT = 2**27           # bytes of a text in `data`
NUMBERS = b"0123456789+-.eE,[] \t\r\n"
BEGIN = re.compile(rb"[ \t\r\n]{0,4096}+:[ \t\r\n]{0,4096}+\[")
MARK = os.urandom(16).hex()  # a member's name: where the JSON had what is parsed later


@dataclass
class Output:
    """An output that is asked for. classification: how many classes, as texts, instead of the values; 0: the values."""
    name: str
    is_binary: bool
    classification: int = 0


@dataclass
class Request:
    """id: to be echoed, or None; outputs: None if the request names none; parameters: those of the request."""
    id: str | None
    inputs: list
    outputs: list | None
    parameters: dict
    is_binary: bool = False


def request(body, header_length, deadline, most_parts=MOST_PARTS, most_text=MOST_TEXT):
    """A received body as a Request; inputs are checked for what holds for all models. header_length: the header's text,
    or None; most_parts: lists, objects and members of the JSON besides the numbers of tensors; most_text: bytes of a
    text in `data`. Raises ServiceError."""
    end = len(body)
    if header_length is not None:
        if not re.fullmatch("[0-9]{1,12}", header_length) or int(header_length) > len(body):
            raise invalid(f"{HEADER_LENGTH} must be the length of the JSON in the body of {len(body)} bytes, got "
                          f"{header_length[:40]}")
        end = int(header_length)
    members, later = parse(body, end, deadline, most_parts, most_text)
    parameters = object_of(members, "parameters", "the request")
    identifier = members.get("id")
    if not isinstance(identifier, str | None) or len(identifier or "") > MOST_ID:
        raise invalid(f"id must be a text of at most {MOST_ID} characters")
    is_binary = parameters.get("binary_data_output", False)
    if not isinstance(is_binary, bool):
        raise invalid("binary_data_output must be true or false")
    binary = memoryview(body)[end:]
    return Request(identifier, inputs(members, later, binary, header_length is not None),
                   outputs(members, is_binary), parameters, is_binary)


def parse(text, length, deadline, most_parts, most_text):
    """(the JSON object in the first `length` bytes, [Numbers or Text]): lists of numbers in members `data`, and long
    texts in lists, are replaced by {MARK: their position}. Reads each byte a fixed number of times, from text to text.
    """
    kept, later, lists, texts, size, copied, at, name = [], [], 0, 0, 0, 0, 0, b""

    def leave_out(one):
        nonlocal copied, size
        kept.extend([text[copied:one.start], f'{{"{MARK}":{len(later)}}}'.encode()])
        size += sum(map(len, kept[-2:]))
        later.append(one)
        copied = one.end
    while at < length:
        deadline.check("read")
        quote = text.find(b'"', at, length)
        quote = length if quote < 0 else quote
        numbers = numbers_between(text, at, quote) if name == b'"data"' else None
        if numbers:
            lists += 1
            leave_out(numbers)
        end, texts = end_of_text(text, quote, length), texts + 1
        if texts > 2 * most_parts + 2:  # a name and a value for each, at most
            raise invalid(f"The JSON has more than {most_parts} lists, objects and members")
        is_left_out = end - quote > LONG and is_element(text, at, quote, end)
        if size + (quote if is_left_out else end) - copied > MOST_JSON or lists > MOST_LISTS:
            raise invalid(f'The JSON has more than {MOST_JSON} bytes besides numbers and texts in "data": […], or more '
                          f"than {MOST_LISTS} lists of numbers there")
        if is_left_out:
            if end - quote > most_text:
                raise ServiceError(413, "FILE_TOO_LARGE", f"A text in data has {too_many(end - quote, most_text)}.")
            leave_out(Text(text, quote, end))
        name, at = text[quote:min(end, quote + LONG)], end
    return json_body.parse(b"".join([*kept, text[copied:length]]), most_parts), later


def numbers_between(text, start, end):
    """The Numbers after a member's name; None if there is something else."""
    begin = BEGIN.match(text, start, end)
    if not begin:
        return None
    start = at = begin.end() - 1
    while at < end:
        other = text[at:min(at + long_texts.LOOK, end)].translate(None, NUMBERS)[:1]
        if other:
            at = text.index(other, at)
            break
        at = min(at + long_texts.LOOK, end)
    end = text.rfind(b"]", start, at) + 1
    return Numbers(text, start, end) if end and count(text, b"[", start, end) == count(text, b"]", start, end) else None


def is_element(text, since, start, end):
    """Whether the text in text[start:end] is in a list, by what is around it; only this after `since`."""
    return (text[max(since, start - LONG):start].rstrip()[-1:] in (b"[", b",")
            and text[end:end + LONG].lstrip()[:1] in (b",", b"]"))


def resolved(value, later):
    return later[value[MARK]] if isinstance(value, dict) and list(value) == [MARK] else value


def object_of(members, name, where):
    value = members.get(name)
    if not isinstance(value, dict | None):
        raise invalid(f"{name} of {where} must be an object")
    return value or {}


def listed(members, name):
    value = members.get(name)
    if not isinstance(value, list | None) or not all(isinstance(one, dict) for one in value or []):
        raise invalid(f"{name} must be a list of objects")
    names = [one.get("name") for one in value or []]
    if not all(isinstance(one, str) for one in names):
        raise invalid(f"each of {name} must have a name")
    if len(set(names)) < len(names):
        raise invalid(f"{name} has a name twice")
    return value


def inputs(members, later, binary, may_be_binary):
    found = listed(members, "inputs")
    if not found:
        raise invalid("inputs must be a list of at least one tensor: {\"name\": …, \"datatype\": …, \"shape\": […], "
                      "\"data\": […]}")
    made = []
    for one in found:
        name, shape, datatype = one["name"][:80], one.get("shape"), one.get("datatype")
        if not isinstance(datatype, str) or datatype not in SIZES:
            raise invalid(f"datatype of {name} must be one of {', '.join(SIZES)}")
        if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(
                isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in shape):
            raise invalid(f"shape of {name} must be a list of at most {MOST_DIMENSIONS} sizes of at least 0")
        parameters, data = object_of(one, "parameters", name), one.get("data")
        if any(parameter.startswith("shared_memory") for parameter in parameters):
            raise invalid(f"{name} is in shared memory, which this service does not read; send its data")
        size = parameters.get("binary_data_size")
        if (data is None) == (size is None):
            raise invalid(f"{name} must have either data or the parameter binary_data_size")
        if size is not None:
            if not may_be_binary:
                raise invalid(f"binary data needs the header {HEADER_LENGTH}, the length of the JSON before it")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary):
                raise invalid(f"binary_data_size of {name} must be an integer from 0 to the {len(binary)} bytes that "
                              "are left of the body")
            data, binary = binary[:size], binary[size:]
        else:
            data = [resolved(value, later) for value in flat(data)] if isinstance(data, list) else resolved(data, later)
        made.append(Tensor(name, shape, datatype, data))
    if len(binary):
        raise invalid(f"{len(binary)} bytes are left of the body after the JSON and all binary data")
    return made


def outputs(members, is_binary):
    found = listed(members, "outputs")
    if not found:
        return None
    made = []
    for one in found:
        name = one["name"][:80]
        parameters = object_of(one, "parameters", name)
        if any(parameter.startswith("shared_memory") for parameter in parameters):
            raise invalid(f"{name} cannot be put into shared memory")
        binary, classes = parameters.get("binary_data", is_binary), parameters.get("classification", 0)
        if not isinstance(binary, bool):
            raise invalid(f"binary_data of {name} must be true or false")
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
            raise invalid(f"classification of {name} must be a number of classes")
        made.append(Output(name, binary, classes))
    return made


def flat(value):
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack.extend(reversed(one))
        else:
            yield one
