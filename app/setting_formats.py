"""Parsers of settings that are rarely set; see config.py."""
import contextlib
import re
import urllib.parse

UNITS = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "kib": 2**10, "m": 2**20, "mb": 2**20, "mib": 2**20,
         "g": 2**30, "gb": 2**30, "gib": 2**30}


def byte_size(text):
    match = re.fullmatch(r"(\d{1,15})\s*([a-z]*)", text.lower())
    if not match or match[2] not in UNITS or int(match[1]) == 0:
        raise ValueError("a number of bytes, or one followed by KiB, MiB or GiB")
    return int(match[1]) * UNITS[match[2]]


def store_url(text, *schemes):
    parts = urllib.parse.urlsplit(text)
    where = parts.path if parts.scheme == "unix" else parts.netloc
    if text != "memory://" and (parts.scheme not in schemes or not where):
        raise ValueError("memory:// or the URL of a Redis server such as redis://127.0.0.1:6379/0")
    return text


def rate_limit(text):
    import limits
    with contextlib.suppress(ValueError):
        if all(limit.amount for limit in limits.parse_many(text)):
            return text
    raise ValueError("a limit such as 60/minute, or several separated by ;")


def preprocessing(text):
    three = ",".join([r"[0-9](\.[0-9]{1,9})?"] * 3)
    pair = rf"(resize|crop)=[1-9][0-9]{{1,3}}|interpolation=(bilinear|bicubic)|(mean|std)={three}"
    names = [part.partition("=")[0] for part in text.split()]
    if not all(re.fullmatch(pair, part) for part in text.split()) or len(set(names)) < len(names):
        raise ValueError("pairs such as resize=256 crop=224 interpolation=bilinear mean=0.485,0.456,0.406 std=1,1,1")
    return text
