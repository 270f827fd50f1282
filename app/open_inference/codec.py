"""V2's requests and responses: JSON, with binary tensors after it. Knows tensors, but no models.

Nothing is allocated by a size that a request declares before its bytes have been counted. Numbers and long texts are
left out of the JSON that is parsed at once: numbers are parsed piece by piece, as each piece holds the GIL (of five
million at once, all other requests would wait for seconds), and texts one by one, so that only one is copied at a time.
"""
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.api import json_body
from app.errors import ServiceError

HEADER_LENGTH = "Inference-Header-Content-Length"
MOST_PARTS = 10_000
MOST_DIMENSIONS = 8
MOST_JSON = 2**20           # bytes besides the numbers and long texts in `data`
MOST_LISTS = 16             # of numbers
MOST_ID = 1000              # characters
LARGEST = 1e6               # of FP32: sums within a network stay finite; 16-bit pixels as they are go up to 65,535
LONG = 256                  # bytes of a text that is left out of the JSON
MOST_TEXT = 2**27           # bytes of a text in `data`
PIECE = 2**16               # bytes of numbers to parse at once, half a millisecond to two; of one number at most
LOOK = 2**18                # bytes to search at once
NUMBERS = b"0123456789+-.eE,[] \t\r\n"
BEGIN = re.compile(rb"[ \t\r\n]{0,4096}+:[ \t\r\n]{0,4096}+\[")
IN_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.S)
MISPLACED = re.compile(rb"[0-9.][ \t\r\n]*+\[|\][ \t\r\n]*+[0-9.+-]")
MARK = os.urandom(16).hex()  # a member's name: where the JSON had what is parsed later

SIZES = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "BF16": 2, "INT32": 4, "UINT32": 4,
         "FP32": 4, "INT64": 8, "UINT64": 8, "FP64": 8, "BYTES": None}
DTYPES = {"UINT8": np.uint8, "FP32": np.dtype("<f4")}


def invalid(message):
    return ServiceError(400, "INVALID_PARAMETER", message)


@dataclass
class Tensor:
    """An input. content: its bytes after the JSON as a memoryview, Numbers, or the JSON value of `data`,
    flat, with Text for long texts."""
    name: str
    shape: list
    datatype: str
    content: Any

    @property
    def is_binary(self):
        return isinstance(self.content, memoryview)

    def count(self):
        """The number of elements that the shape declares."""
        return math.prod(self.shape)

    def array(self, deadline):
        """The elements of a numeric tensor (UINT8, FP32) in its shape; check the shape first. Raises ServiceError if
        they are not exactly as many, not finite or out of range: that of the datatype, of FP32 ±LARGEST."""
        dtype = np.dtype(DTYPES[self.datatype])
        if self.is_binary:
            if len(self.content) != self.count() * dtype.itemsize:
                raise invalid(f"{self.name} of shape {self.shape} must have {self.count() * dtype.itemsize} bytes, got "
                              f"{len(self.content)}")
            return self.finite(np.frombuffer(self.content, dtype).reshape(self.shape))
        if not isinstance(self.content, Numbers):
            raise invalid(f'data of {self.name} must be a list of numbers, written as "data": […]')
        return self.finite(self.content.array(self, dtype, deadline).reshape(self.shape))

    def finite(self, array):
        if not (array.min(initial=0) >= -LARGEST and array.max(initial=0) <= LARGEST):  # nor is NaN
            raise invalid(f"{self.name} has numbers that are not finite, or beyond ±{LARGEST:,.0f}")
        return array

    def elements(self):
        """The elements of a BYTES tensor: memoryviews; or str of JSON, Text if long. Raises ServiceError."""
        if self.is_binary:
            return list(self.split())
        found = self.content if isinstance(self.content, list) else [None]
        if not all(isinstance(one, str | Text) for one in found):
            raise invalid(f"data of {self.name} must be a list of texts")
        if len(found) != self.count():
            raise invalid(f"{self.name} of shape {self.shape} must have {self.count()} elements, got {len(found)}")
        return found

    def split(self):
        """The elements of binary BYTES: each a length, as 4 bytes, and as many bytes."""
        at, left = 0, self.count()
        while left and at + 4 <= len(self.content):
            start = at + 4
            at = start + int.from_bytes(self.content[at:start], "little")
            if at > len(self.content):
                break
            yield self.content[start:at]
            left -= 1
        if left or at != len(self.content):
            raise invalid(f"{self.name} of shape {self.shape} must have {self.count()} elements, each with its length "
                          f"in 4 bytes before it; its {len(self.content)} bytes have more, fewer, or one that is cut "
                          "off")


@dataclass
class Text:
    """A text in JSON, not parsed yet: text[start:end], with its quotes."""
    text: bytes
    start: int
    end: int

    def value(self):
        """As str. Raises ServiceError."""
        try:
            if self.text.find(b"\\", self.start, self.end) >= 0:
                return json.loads(self.text[self.start:self.end], strict=False)
            return str(memoryview(self.text)[self.start + 1:self.end - 1], "utf-8")
        except ValueError as e:
            raise ServiceError(400, "INVALID_JSON", "The body is not valid JSON: a text cannot be decoded.") from e


@dataclass
class Numbers:
    """A list of numbers in JSON, flat or nested, not parsed yet: text[start:end], from the first bracket to the last.
    Of that, only pieces are ever copied or searched at once."""
    text: bytes
    start: int
    end: int

    def array(self, tensor, dtype, deadline):
        """(count,) dtype. Raises ServiceError."""
        if not self.fits(tensor, deadline):
            raise invalid(f"data of {tensor.name} must have the {tensor.count()} numbers of shape {tensor.shape}, "
                          "flat or nested in that shape")
        found, at = np.empty(tensor.count(), dtype), 0
        for piece in self.at_commas(tensor):
            deadline.check("read")
            values = self.parsed(piece)
            if values is None or at + len(values) > len(found):
                raise invalid(f"data of {tensor.name} has something else than numbers of {tensor.datatype}")
            if dtype.kind == "u" and not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
                raise invalid(f"data of {tensor.name} must be integers from 0 to 255")
            with np.errstate(over="ignore"):
                found[at:at + len(values)] = values
            at += len(values)
        if at != len(found):  # such as a number that is missing between two commas
            raise invalid(f"data of {tensor.name} has something else than numbers")
        return found

    def parsed(self, piece):
        """float64 of numbers between commas, or None. Integers as float: those of any size are numbers."""
        if (b"[" in piece or b"]" in piece) and MISPLACED.search(piece):
            return None
        try:
            return np.array(json.loads(b"[" + piece.translate(None, b"[]") + b"]", parse_int=float), np.float64)
        except ValueError:
            return None

    def fits(self, tensor, deadline):
        """Whether the brackets and commas are those of the shape, flat or nested."""
        lists = count(self.text, b"[", self.start, self.end)
        expected = b""
        for size in reversed([tensor.count()] if lists == 1 else tensor.shape):
            if not size or size * (len(expected) + 1) + 1 > self.end - self.start:  # never longer than the text
                return False
            expected = b"[" + (expected + b",") * (size - 1) + expected + b"]"
        at = 0
        for start in range(self.start, self.end, LOOK):
            deadline.check("read")
            found = self.text[start:min(start + LOOK, self.end)].translate(None, b"0123456789+-.eE \t\r\n")
            if expected[at:at + len(found)] != found:
                return False
            at += len(found)
        return at == len(expected)

    def at_commas(self, tensor):
        """The text in pieces, without the commas between them. Raises ServiceError."""
        start = self.start
        while start < self.end:
            end = self.text.rfind(b",", start, start + PIECE) if start + PIECE < self.end else self.end
            if end < 0:
                raise invalid(f"data of {tensor.name} has a number, or white space, of more than {PIECE} bytes")
            yield self.text[start:end]
            start = end + 1


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


def count(text, byte, start, end):
    return sum(text.count(byte, at, min(at + LOOK, end)) for at in range(start, end, LOOK))


def flat(value):
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack.extend(reversed(one))
        else:
            yield one


# --- requests ---

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
    inputs = tensors(members, later, memoryview(body)[end:], header_length is not None)
    return Request(identifier, inputs, outputs(members, is_binary), parameters, is_binary)


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
                raise ServiceError(413, "FILE_TOO_LARGE", f"A text in data has {end - quote} bytes; at most "
                                                          f"{most_text} are allowed.")
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
        other = text[at:min(at + LOOK, end)].translate(None, NUMBERS)[:1]
        if other:
            at = text.index(other, at)
            break
        at = min(at + LOOK, end)
    end = text.rfind(b"]", start, at) + 1
    return Numbers(text, start, end) if end and count(text, b"[", start, end) == count(text, b"]", start, end) else None


def end_of_text(text, start, length):
    """Behind the closing quote of the text that begins here; `length` if it has none."""
    at = start + 1
    quote = text.find(b'"', at, length)
    if quote >= 0 and text.find(b"\\", at, quote) < 0:
        return quote + 1
    while at < length:
        end = IN_TEXT.match(text, at, min(at + LOOK, length)).end()
        if text[end:end + 1] == b'"':
            return min(end + 1, length)
        if end == at:  # a backslash at the end
            break
        at = end
    return length


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


def tensors(members, later, binary, may_be_binary):
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


# --- responses ---

@dataclass
class Made:
    """A response. body: its bytes; header_length: of the JSON if binary data follows, else None."""
    body: bytes
    header_length: int | None


def response(members, made):
    """The Made response. members: of the JSON besides outputs; made: [(Output, array)] with float32 arrays, or nested
    lists of bytes as object arrays. Runs in a native thread: rows are encoded one by one."""
    pieces, binary = [json.dumps(members).encode()[:-1], b', "outputs": ['], []
    for number, (output, array) in enumerate(made):
        datatype = "BYTES" if array.dtype == object else "FP32"
        about = {"name": output.name, "datatype": datatype, "shape": list(array.shape)}
        pieces.append(b", " * (number > 0))
        if output.is_binary:
            content = b"".join(len(one).to_bytes(4, "little") + one for one in array.flat) if datatype == "BYTES" \
                else array.astype("<f4").tobytes()
            binary.append(content)
            pieces.append(json.dumps({**about, "parameters": {"binary_data_size": len(content)}}).encode())
            continue
        pieces += [json.dumps(about).encode()[:-1], b', "data": [']
        for at, row in enumerate(array.reshape(len(array), -1)):
            values = [one.decode() for one in row] if datatype == "BYTES" else row.tolist()
            pieces += [b", " * (at > 0), json.dumps(values).encode()[1:-1]]
        pieces.append(b"]}")
    pieces.append(b"]}")
    text = b"".join(pieces)
    return Made(b"".join([text, *binary]), len(text) if binary else None)
