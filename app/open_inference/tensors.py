"""The tensors of V2's requests, read from JSON or binary data. Nothing is allocated by a size that a request declares
before its bytes have been counted. Numbers in JSON are parsed piece by piece, as each piece holds the GIL: of five
million at once, all other requests would wait for seconds.
"""
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.api import long_texts
from app.api.long_texts import Text
from app.errors import ServiceError

LARGEST = 1e6               # of FP32: sums within a network stay finite; 16-bit pixels as they are go up to 65,535
PIECE = 2**16               # bytes of numbers to parse at once, half a millisecond to two; of one number at most
MISPLACED = re.compile(rb"[0-9.][ \t\r\n]*+\[|\][ \t\r\n]*+[0-9.+-]")

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
        for start in range(self.start, self.end, long_texts.LOOK):
            deadline.check("read")
            found = self.text[start:min(start + long_texts.LOOK, self.end)].translate(None, b"0123456789+-.eE \t\r\n")
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


def count(text, byte, start, end):
    return sum(text.count(byte, at, min(at + long_texts.LOOK, end)) for at in range(start, end, long_texts.LOOK))
