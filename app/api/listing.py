"""Query parameters of lists: ranges of time, limits, and cursors for pages that stay right while entries are added.
Only optional parts import it."""
import base64
import binascii
import datetime
import re

from flask import request

from app.errors import ServiceError, invalid_parameter

LATEST_S = 1e11  # some 3,000 years from now


def text(name):
    """A parameter's value, or None if it is not sent or empty. Raises ServiceError if it is repeated."""
    values = request.args.getlist(name)
    if len(values) > 1:
        raise ServiceError(400, "INVALID_PARAMETER", f"{name} must be sent once, not {len(values)} times")
    return values[0] if values and values[0] else None


def only(*names):
    """Raises ServiceError for a query parameter with any other name: a filter that was misspelt would find all."""
    for name in request.args:
        if name not in names:
            raise ServiceError(400, "INVALID_PARAMETER", f"{ascii(name[:40])[1:-1]} is not a filter; there are "
                                                         f"{', '.join(names[:-1])} and {names[-1]}")


def limit(most, default):
    """`limit`: how many entries a page has. Raises ServiceError."""
    sent = text("limit")
    if sent is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", sent, re.A) or not 1 <= int(sent) <= most:
        raise invalid_parameter("limit", f"an integer from 1 to {most}", sent[:40])
    return int(sent)


def moment(name):
    """A time as Unix seconds, or None. ISO 8601 without an offset means UTC. Raises ServiceError."""
    sent = text(name)
    if sent is None:
        return None
    try:
        if re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?", sent):
            seconds = float(sent)
        else:
            at = datetime.datetime.fromisoformat(sent.replace(" ", "+"))  # a + in a query means a space
            seconds = (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).timestamp()
        if abs(seconds) > LATEST_S:
            raise ValueError
    except (ValueError, OverflowError) as e:
        raise invalid_parameter(name, "a time as Unix seconds or as ISO 8601, such as 2026-03-01T12:00:00Z",
                                sent[:40]) from e
    return seconds


def cursor(at, name):
    """An opaque text for the place in a list after the entry of this time (Unix seconds) and name (letters, digits)."""
    return base64.urlsafe_b64encode(f"{at!r} {name}".encode()).decode().rstrip("=")


def after(pattern):
    """(time, name) of the entry after which the page begins, by the parameter `after`, or None. pattern: of names.
    Raises ServiceError."""
    sent = text("after")
    if sent is None:
        return None
    try:
        if len(sent) > 200:
            raise ValueError
        place = base64.b64decode(sent.encode("ascii") + b"=" * (-len(sent) % 4), b"-_", validate=True).decode("ascii")
        at, _, name = place.partition(" ")
        if not re.fullmatch(r"[0-9]{1,12}\.[0-9]{1,17}", at) or not re.fullmatch(pattern, name):
            raise ValueError
    except (ValueError, binascii.Error) as e:
        raise invalid_parameter("after", "the value of `next` in a page before this one", sent[:40]) from e
    return float(at), name
