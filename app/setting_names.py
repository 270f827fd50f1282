"""Which variables are settings and which belong to other programs: finds misspelt names in .env and the environment.

Imported once per start, by the process that reads .env; not by workers.
"""
import contextlib
import io
import os
import re
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from app import config, model_settings, optional_settings, setting_formats
from app.config import SettingsError
from app.suggestions import nearest

# What else a .env may hold, for docker compose and other programs that read the same file. docs/settings.md lists it.
OF_OTHERS = re.compile(
    r"(AWS|AZURE|BUILDKIT|CELERY|COMPOSE|CUDA|CUDNN|DOCKER|FLASK|GF|GOOGLE|GRAFANA|GUNICORN|HAPROXY|HF|KMP|LC|LD|MALLOC"
    r"|MKL|NCCL|NGINX|NVIDIA|OMP|ONEDNN|OPENBLAS|OPENCV|OPENVINO|OTEL|OV|PIP|POSTGRES|PROMETHEUS|PYTHON|PYTORCH|REDIS"
    r"|S3|SENTRY|SSL|TORCH|UV|X|XDG)_\w+|PG[A-Z]+|PYTHON[A-Z]+|\w+_NUM_THREADS|(?i:\w+_proxy)"
    r"|CURL_CA_BUNDLE|FORCE_COLOR|FORWARDED_ALLOW_IPS|GID|HOME|HOSTNAME|LANG|LANGUAGE|NO_COLOR|PATH|PGID|PUID"
    r"|REQUESTS_CA_BUNDLE|SHELL|SOURCE_DATE_EPOCH|TEMP|TERM|TMP|TMPDIR|TZ|UID|UMASK|USER|VIRTUAL_ENV|WEB_CONCURRENCY")
# Of these, what libraries in this process look for in the environment.
OF_LIBRARIES = re.compile(r"(?i:(http|https|all|no)_proxy)|\w+_NUM_THREADS|CUDA_VISIBLE_DEVICES|SSL_CERT_(FILE|DIR)"
                          r"|REQUESTS_CA_BUNDLE|TZ")
# What Kubernetes and docker --link set for a service called X: X_SERVICE_PORT, and X_PORT=tcp://….
OF_SERVICE_LINKS = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
LINK = re.compile(r"(tcp|udp|sctp)://")
# What other programs call these, without underscores.
CALLED_ELSEWHERE = {"MODEL": "MODEL_NAME", "WEIGHTS": "MODEL_PATH", "CHECKPOINT": "MODEL_PATH", "GPU": "DEVICE",
                    "CUDA": "DEVICE", "THREADS": "CORES", "ADDRESS": "HOST", "BIND": "HOST", "MAXSIZE": "MAX_FILE_SIZE",
                    "MAXUPLOADSIZE": "MAX_FILE_SIZE", "MAXCONTENTLENGTH": "MAX_FILE_SIZE"}
SHORT = 4  # letters of a name, one of which may well be another in a name that has nothing to do with it


def known(texts):
    """The names of all settings, those of the models in MODELS too. texts: {variable: text}."""
    names = [field.name.upper() for field in (*config.SETTINGS, *optional_settings.SETTINGS)] + [
        name for name in config.SWITCHES if name.startswith("OTEL_")]
    of_models = [field.name.upper() for field in config.SETTINGS if field.metadata["each"]] + ["SPLIT", "SHADOW"]
    with contextlib.suppress(ValueError):  # of MODELS, which Settings.parse refuses
        for entry in model_settings.entries(setting_formats.listed(texts.get("MODELS") or "", config.ENTRY, "")):
            names += [prefix + name for prefix, _ in entry.prefixes() for name in of_models]
    return names


def of_file(path, environment):
    """{variable: text} of a .env file. What libraries look for in the environment is put there. Raises SettingsError,
    which names the line, for one that cannot be parsed, or that sets neither a setting nor another program's variable.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise SettingsError(f"line {line} of {path} is not text in UTF-8") from e
    lines = [*parsed_lines(path, text)]
    texts = dotenv_values(stream=io.StringIO(text))
    names = known({**texts, **environment})
    for line, name in lines:
        if name in names or OF_OTHERS.fullmatch(name) and not slip(name, names) or name in referred_to(path, text):
            continue
        of_model = name.endswith(tuple(f"__{one}" for one in names))
        others = ": no model in MODELS is called so" if of_model else \
            ", nor known to belong to another program: docs/settings.md lists both; begin names of your own with X_"
        meant = likeliest(name, [one for one in names if "__" in one] if of_model else names)
        shown = printable(name) if meant or name == name.upper() else "this name"  # the rest of a secret may end with =
        raise SettingsError(f"line {line} of {path}: {shown} is not a setting"
                            f"{f'; did you mean {meant}?' if meant else others}")
    for name in filter(OF_LIBRARIES.fullmatch, texts):
        environment.setdefault(name, texts[name])
    return texts


def parsed_lines(path, text):
    """Yield (number, variable) of the lines that set one. Raises SettingsError, which shows no more of a line than a
    setting's name: the rest may be a part of a secret."""
    for binding in parse_stream(io.StringIO(text)):
        start = binding.original.string
        line = binding.original.line + start[:len(start) - len(start.lstrip())].count("\n")
        if binding.error or binding.key and (binding.value is None or not re.fullmatch(r"\w+", binding.key)):
            name = re.match(r"\s*(export\s+)?(\w*)", start)[2].upper()
            example = name if name in known({}) else "NAME"
            quoted = ", with quotes around a value with spaces or #" if "=" in start else ""
            raise SettingsError(f"line {line} of {path} cannot be parsed: write {example}=value{quoted}")
        if binding.key:
            yield line, binding.key


def referred_to(path, text):
    """The words of docker compose's files beside a .env, which it is for as well, and the names in its own ${…}."""
    folder, words = Path(path).absolute().parent, set(re.findall(r"\$\{(\w+)", text))
    for file in folder.glob("*compose*.y*ml"):
        with contextlib.suppress(OSError, ValueError):
            words.update(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    return words


def misspelt(environment):
    """Sentences about the variables of an environment that seem to be meant as settings and are none."""
    names, found = known(environment), []
    of_models = tuple(f"__{field.name.upper()}" for field in config.SETTINGS if field.metadata["each"])
    for name, text in environment.items():
        if name in names or OF_SERVICE_LINKS.fullmatch(name) or LINK.match(text):
            continue
        if slip(name, names):
            found.append(f"{printable(name)} in the environment is not a setting; did you mean "
                         f"{likeliest(name, names)}?")
        elif environment.get("MODELS") and name.endswith(of_models):
            found.append(f"{printable(name)} in the environment is not used: no model in MODELS is called so")
    return found


def slip(name, names):
    """Whether a name differs from a setting by one letter, a transposition, or its case and underscores."""
    return any(plain(name) == plain(one) or name in (one + "S", one.removesuffix("S")) or len(one) > SHORT and is_near(
        name.upper(), one) for one in names)


def likeliest(name, names):
    """The setting that somebody who wrote this name probably meant, or None."""
    word, parts = plain(name), {one: one.split("_") for one in names if "__" not in one}
    first = {one: ["".join(words[:i]) for i in range(1, len(words))] for one, words in parts.items()}
    last = {one: ["".join(words[i:]) for i in range(1, len(words))] for one, words in parts.items()}
    for fits in (lambda one: plain(one) == word, lambda one: one == CALLED_ELSEWHERE.get(word),
                 lambda one: plain(one) in (word + "S", word.removesuffix("S")),
                 lambda one: word in first.get(one, ()),
                 lambda one: len(one) > SHORT and is_near(word, plain(one)),
                 lambda one: word in last.get(one, ()) or word + "S" in last.get(one, ())):
        if found := next(filter(fits, names), None):
            return found
    return nearest(name, names)


def plain(name):
    return name.replace("_", "").upper()


def is_near(a, b):
    """Whether one edit makes a of b: a letter more, less or another, or two neighbours exchanged."""
    start = len(os.path.commonprefix([a, b]))
    a, b = a[start:], b[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or a[:2] == b[1::-1] and a[2:] == b[2:]


def printable(name):
    return ascii(name[:60])[1:-1]
