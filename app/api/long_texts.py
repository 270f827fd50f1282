"""Long texts in JSON, such as files in base64: they stay where they are in the body, and are read in pieces, as a call
on all of one would hold the GIL. Imported with the first large JSON body.
"""
import codecs
import json
import os
import re
from dataclasses import dataclass

from app.errors import ServiceError

LONG = 256                  # bytes of a text that is left out of the JSON
LOOK = 2**18                # bytes to search or to read at once
BESIDES = 2**20             # bytes of JSON besides long texts: so many, and LONG for each name and value
IN_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.S)
WHOLE_ESCAPES = re.compile(rb'(?:[^\\]++|\\u[0-9A-Fa-f]{4}|\\[^u])*+', re.S)
MARK = os.urandom(16).hex()  # begins a text that stands for one that is left out


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
            return str(memoryview(self.text)[self.start + 1:self.end - 1], "utf-8", "surrogatepass")
        except ValueError as e:
            raise cannot_be_decoded() from e

    def pieces(self):
        """Yield it as bytes, at most LOOK at once. Raises ServiceError; ValueError for a text with escapes that is not
        ASCII."""
        at, end = self.start + 1, self.end - 1
        while at < end:
            piece, size = self.text[at:min(at + LOOK, end)], LOOK
            if b"\\" in piece:
                size = WHOLE_ESCAPES.match(piece).end()
                try:
                    piece = json.loads(b'"%b"' % piece[:size], strict=False).encode("ascii") if size else None
                except json.JSONDecodeError:
                    piece = None
                if piece is None:
                    raise cannot_be_decoded()
            yield piece
            at += size


def cannot_be_decoded():
    return ServiceError(400, "INVALID_JSON", "The body is not valid JSON: a text cannot be decoded.")


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


def in_utf8(text):
    """JSON in any of its encodings. Raises ValueError."""
    encoding = json.detect_encoding(text[:4])
    if encoding.startswith("utf-8"):
        return text
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    return b"".join(decoder.decode(text[at:at + LOOK], at + LOOK >= len(text)).encode("utf-8", "surrogatepass")
                    for at in range(0, len(text), LOOK))


def left_out(text, parts):
    """(JSON with little white space, [Text]): of JSON in UTF-8, with a mark for each long text. parts: how many lists,
    objects and members it has. Raises ValueError for what cannot be JSON, or has too much besides long texts."""
    kept, later, at, texts, left = [], [], 0, 0, BESIDES + (2 * LONG + 100) * parts
    while at < len(text) and left > 0:
        quote = text.find(b'"', at)
        quote = len(text) if quote < 0 else quote
        for start in range(at, quote, LOOK):
            # A point on either side, so that white space at the ends stays: it may part two numbers.
            kept.append(b" ".join((b"." + text[start:min(start + LOOK, quote)] + b".").split())[1:-1])
            left -= len(kept[-1])
            if left <= 0:
                raise ValueError
        at = end_of_text(text, quote, len(text))
        if at - quote > LONG:
            kept.append(b'"%s%d"' % (MARK.encode(), len(later)))
            later.append(Text(text, quote, at))
        else:
            kept.append(text[quote:at])
        left -= len(kept[-1])
        texts += 1
        if texts > 2 * parts + 2:  # a name and a value for each, at most
            raise ValueError
    if left <= 0:
        raise ValueError
    return b"".join(kept), later


def put_back(value, replace):
    """Replace, in lists and objects of JSON types, each value that is neither by replace(value)."""
    stack = [value]
    while stack:
        one = stack.pop()
        for key, inner in list(enumerate(one) if isinstance(one, list) else one.items()):
            if isinstance(inner, list | dict):
                stack.append(inner)
            else:
                one[key] = replace(inner)
    return value


def marked(value, later):
    """The Text that a value stands for, or the value."""
    return later[int(value[len(MARK):])] if isinstance(value, str) and value.startswith(MARK) else value


def whole(value):
    """The same JSON types, with str for Text. Raises ServiceError."""
    if isinstance(value, list | dict):
        return put_back(value, whole)
    return value.value() if isinstance(value, Text) else value
