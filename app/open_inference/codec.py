"""V2's requests and responses: JSON, with binary tensors after it. Knows tensors, but no models.

Nothing is allocated by a size that a request declares before its bytes have been counted. Numbers in JSON are parsed
piece by piece, as each piece holds the GIL: of five million at once, all other requests would wait for seconds.
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
PIECE = 2**16               # bytes of numbers to parse at once: half a millisecond to two
LOOK = 2**18                # bytes to search at once
NUMBERS = b"0123456789+-.eE,[] \t\r\n"
DATA = re.compile(rb'(?<!\\)"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
MISPLACED = re.compile(rb"[0-9.][ \t\r\n]*+\[|\][ \t\r\n]*+[0-9.+-]")
MOST_BETWEEN = 100          # bytes that DATA or MISPLACED may take
MARK = os.urandom(16).hex()  # a member's name: where the JSON had numbers that are parsed later

SIZES = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "BF16": 2, "INT32": 4, "UINT32": 4,
         "FP32": 4, "INT64": 8, "UINT64": 8, "FP64": 8, "BYTES": None}
DTYPES = {"UINT8": np.uint8, "FP32": np.dtype("<f4")}


def invalid(message):
    return ServiceError(400, "INVALID_PARAMETER", message)


@dataclass
class Tensor:
    """An input. content: its bytes after the JSON as a memoryview, Numbers, or the JSON value of `data`."""
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
        they are not exactly as many, not finite or out of the datatype's range."""
        dtype = np.dtype(DTYPES[self.datatype])
        if self.is_binary:
            if len(self.content) != self.count() * dtype.itemsize:
                raise invalid(f"{self.name} of shape {self.shape} must have {self.count() * dtype.itemsize} bytes, got "
                              f"{len(self.content)}")
            return self.finite(np.frombuffer(self.content, dtype).reshape(self.shape))
        if not isinstance(self.content, Numbers):
            raise invalid(f"data of {self.name} must be a list of numbers")
        return self.finite(self.content.array(self, dtype, deadline).reshape(self.shape))

    def finite(self, array):
        if not np.isfinite(array).all():
            raise invalid(f"{self.name} has numbers that are not finite, or too large for {self.datatype}")
        return array

    def elements(self):
        """The elements of a BYTES tensor: memoryviews, or str of JSON. Raises ServiceError."""
        if self.is_binary:
            return list(self.split())
        found = list(flat(self.content)) if isinstance(self.content, list) else [None]
        if not all(isinstance(one, str) for one in found):
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
class Numbers:
    """A list of numbers in JSON, flat or nested, not parsed yet: text[start:end], from the first bracket to the last.
    Of that, only pieces are ever copied or searched at once."""
    text: bytes
    start: int
    end: int

    def array(self, tensor, dtype, deadline):
        """(count,) dtype. Raises ServiceError."""
        brackets = b"".join(piece.translate(None, b"0123456789+-.eE \t\r\n")
                            for piece in pieces(self.text, self.start, self.end))
        if not self.fits(brackets, tensor):
            raise invalid(f"data of {tensor.name} must have the {tensor.count()} numbers of shape {tensor.shape}, "
                          "flat or nested in that shape")
        found, at = np.empty(tensor.count(), dtype), 0
        for piece in self.at_commas():
            deadline.check("read")
            try:
                values = np.array(json.loads(b"[" + piece.translate(None, b"[]") + b"]"))
            except (ValueError, OverflowError) as e:
                raise invalid(f"data of {tensor.name} has something else than numbers") from e
            if not len(values):
                continue
            if values.dtype.kind not in "iuf" or at + len(values) > len(found):
                raise invalid(f"data of {tensor.name} has something else than numbers of {tensor.datatype}")
            if dtype.kind == "u" and not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
                raise invalid(f"data of {tensor.name} must be integers from 0 to 255")
            with np.errstate(over="ignore"):
                found[at:at + len(values)] = values
            at += len(values)
        if at != len(found):  # such as a number that is missing between two commas
            raise invalid(f"data of {tensor.name} has something else than numbers")
        return found

    def fits(self, brackets, tensor):
        count = tensor.count()
        if not count or len(brackets) < count + 1:
            return False
        if brackets.count(b"[") == 1:
            return len(brackets) == count + 1 and brackets.startswith(b"[") and brackets.endswith(b"]")
        expected = b""
        for size in reversed(tensor.shape):  # no longer than the text, whatever the shape says
            if size * (len(expected) + 1) + 1 > len(brackets):
                return False
            expected = b"[" + b",".join([expected] * size) + b"]"
        return expected == brackets and not any(
            MISPLACED.search(self.text, at, min(at + LOOK + MOST_BETWEEN, self.end))
            for at in range(self.start, self.end, LOOK))

    def at_commas(self):
        """The text in pieces, without the commas between them."""
        start = self.start
        while start < self.end:
            end = self.text.rfind(b",", start, start + PIECE) if start + PIECE < self.end else self.end
            if end < 0:  # white space, or nonsense
                end = self.text.find(b",", start, self.end)
            end = self.end if end < 0 else end
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


def pieces(text, start, end):
    return (text[at:min(at + LOOK, end)] for at in range(start, end, LOOK))


def flat(value):
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack.extend(reversed(one))
        else:
            yield one


# --- requests ---

def request(body, header_length, most_parts=MOST_PARTS):
    """A received body as a Request; inputs are checked for what holds for all models. header_length: the header's text,
    or None; most_parts: lists, objects and members of the JSON besides the numbers of tensors. Raises ServiceError."""
    end = len(body)
    if header_length is not None:
        if not re.fullmatch("[0-9]{1,12}", header_length) or int(header_length) > len(body):
            raise invalid(f"{HEADER_LENGTH} must be the length of the JSON in the body of {len(body)} bytes, got "
                          f"{header_length[:40]}")
        end = int(header_length)
    members, numbers = parse(body, end, most_parts)
    parameters = object_of(members, "parameters", "the request")
    identifier = members.get("id")
    if not isinstance(identifier, str | None):
        raise invalid("id must be a text")
    is_binary = parameters.get("binary_data_output", False)
    if not isinstance(is_binary, bool):
        raise invalid("binary_data_output must be true or false")
    inputs = tensors(members, numbers, memoryview(body)[end:], header_length is not None)
    return Request(identifier, inputs, outputs(members, is_binary), parameters, is_binary)


def parse(text, length, most_parts):
    """(the JSON object in the first `length` bytes, {number: Numbers}): lists of numbers in members `data` are replaced
    by {MARK: number}."""
    kept, numbers, copied, at = [], {}, 0, 0
    while True:
        found = None
        while found is None and at < length:
            found = DATA.search(text, at, min(at + LOOK + MOST_BETWEEN, length))
            at = found.end() if found else at + LOOK
        if found is None:
            break
        end = end_of_numbers(text, at, length)
        if end:
            kept += [text[copied:at], f'{{"{MARK}":{len(numbers)}}}'.encode()]
            numbers[len(numbers)] = Numbers(text, at, end)
            copied = at = end
    return json_body.parse(b"".join([*kept, text[copied:length]]), most_parts), numbers


def end_of_numbers(text, start, length):
    """Where a list of numbers ends that begins here; None if something else is in it."""
    at = start
    while at < length:
        other = text[at:min(at + LOOK, length)].translate(None, NUMBERS)[:1]
        if other:
            at = text.index(other, at)
            break
        at = min(at + LOOK, length)
    end = text.rfind(b"]", max(start, at - LOOK), at) + 1
    depth = sum(piece.count(b"[") - piece.count(b"]") for piece in pieces(text, start, end))
    return end if end and not depth else None


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


def tensors(members, numbers, binary, may_be_binary):
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
        elif isinstance(data, dict) and list(data) == [MARK] and data[MARK] in numbers:
            data = numbers[data[MARK]]
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
