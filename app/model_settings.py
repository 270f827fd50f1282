"""The Settings of each model, and what MODELS and the variables of its models say: NAME@VERSION=MODEL_NAME,
NAME__MODEL_PATH, NAME__SPLIT.

Of workers, only those of several models import it. Problems are ValueErrors, which config.py turns into SettingsErrors.
"""
import dataclasses
import re
from typing import NamedTuple

NEVER_COMMON = ("model_path", "labels_path", "preprocessing", "calibration_dir")  # these belong to one network
PERCENT = r"[0-9]{1,3}(?:\.[0-9]{1,2})?"
NONE = "none"  # instead of a shadow's version


class Entry(NamedTuple):
    """One of MODELS. version is None for a model without versions."""
    name: str
    version: str | None
    model_name: str

    @property
    def key(self):
        return self.name if self.version is None else f"{self.name}@{self.version}"

    def prefixes(self):
        """[(what variables begin with, whose settings they are)], the more special last: CATS__ and CATS__2__."""
        all_versions = (f"{self.name}__".upper(), self.name)
        if self.version is None:
            return [all_versions]
        return [all_versions, (f"{self.name}__{self.version.replace('.', '_')}__".upper(), self.key)]


def entries(models):
    """[Entry], in order, of what Settings.models lists. Raises ValueError."""
    found = {}
    for text in models:
        key, _, model_name = text.partition("=")
        name, _, version = key.partition("@")
        entry = Entry(name, version or None, model_name or name)
        if entry.key in found:
            raise ValueError(f"MODELS names {entry.key} twice")
        if version == NONE:
            raise ValueError(f"MODELS: a version cannot be called {NONE}, got {entry.key}")
        if any(other.name == name and None in (other.version, entry.version) for other in found.values()):
            raise ValueError(f"MODELS names {name} with and without a version: give each a version, such as {name}@1")
        found[entry.key] = entry
    return list(found.values())


def versions(keys):
    """{name: its versions, in order} of the keys that are NAME@VERSION."""
    found = {}
    for name, at, version in (key.partition("@") for key in keys):
        if at:
            found.setdefault(name, []).append(version)
    return found


def snake_case(name):
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def each(settings):
    """{key: the Settings of that model}, the default first. The key is NAME or NAME@VERSION of MODELS, else MODEL_NAME,
    or the name of the class in snake_case."""
    if not settings.models:
        return {snake_case(settings.model_name.rpartition(":")[2]): settings}
    fields = {field.name: field.metadata for field in dataclasses.fields(settings) if field.metadata}
    return {key: dataclasses.replace(settings, models=None, of_models=(), **{
                name: fields[name]["read"](variable, text) for name, (variable, text) in own.items()})
            for key, own in read(settings, [name for name, about in fields.items() if about["each"]]).items()}


def checked(settings, variables):
    """The Settings with `of_models`: of {variable: text}, what is said of the models in MODELS. Raises ValueError."""
    prefixes = tuple(f"{entry.name}__".upper() for entry in entries(settings.models))
    texts = tuple(sorted(pair for pair in variables.items() if pair[0].startswith(prefixes)))
    settings = dataclasses.replace(settings, of_models=texts)
    each(settings)
    return settings


def read(settings, names):
    """{key: {setting: (the variable that sets it, its text)}} of each model, in order. names: the settings that models
    may have of their own. Raises ValueError."""
    listed, texts, found, known = entries(settings.models), dict(settings.of_models), {}, {}
    for name in NEVER_COMMON if len(listed) > 1 else ():
        if getattr(settings, name) is not None:
            raise ValueError(f"{name.upper()} cannot be that of several models: write "
                             f"{listed[0].name.upper()}__{name.upper()}")
    for entry in listed:
        own = found[entry.key] = {"model_name": ("MODELS", entry.model_name)}
        for prefix, owner in entry.prefixes():
            for name in names:
                variable = prefix + name.upper()
                if known.setdefault(variable, owner) != owner:
                    raise ValueError(f"MODELS: {variable} would be a setting of both {known[variable]} and {owner}")
                if variable in texts:
                    own[name] = (variable, texts[variable])
    of_traffic = [f"{name}__{what}".upper() for name in versions(found) for what in ("split", "shadow")]
    for variable in texts:
        if variable not in known and variable not in of_traffic:
            raise ValueError(f"{variable} is no setting of a model in MODELS")
    traffic(settings)
    return found


def traffic(settings):
    """{name: {"split": [[version, percent], …], "shadow": version or None}} of the models that have versions, as they
    are at the start. Raises ValueError."""
    texts, found = dict(settings.of_models), {}
    for name, known in versions(entry.key for entry in entries(settings.models or ())).items():
        split, shadow = f"{name}__SPLIT".upper(), f"{name}__SHADOW".upper()
        of_split = parse_split(split, texts.get(split, known[0]), known)
        found[name] = {"split": of_split, "shadow": parse_shadow(shadow, texts.get(shadow, NONE), known, of_split)}
    return found


def parse_split(what, text, known):
    """[[version, percent], …], in the order of `known` and without those that get nothing, of a text such as 1:90,2:10,
    90:10 (of the first two) or 2 (which gets all). Raises ValueError, which calls the text `what`."""
    if text in known:
        return [[text, 100]]
    is_plain = re.fullmatch(f"{PERCENT}:{PERCENT}", text)
    pairs = list(zip(known, text.split(":"), strict=False)) if is_plain else \
        [part.strip().rpartition(":")[::2] for part in text.split(",")]
    hundredths = {version: round(100 * float(percent)) for version, percent in pairs
                  if version in known and re.fullmatch(PERCENT, percent)}
    if not len(pairs) == len(hundredths) == 2 or sum(hundredths.values()) != 100 * 100:
        raise ValueError(f"{what} must be one of its versions ({', '.join(known)}), or percentages of two that add up "
                         f"to 100, such as 1:90,2:10, got {text!r}")
    return [[version, whole(hundredths[version] / 100)] for version in known if hundredths.get(version)]


def whole(number):
    return int(number) if number == int(number) else number


def parse_shadow(what, text, known, split):
    """The version that answers too, unseen, or None. Raises ValueError, which calls the text `what`."""
    if text == NONE:
        return None
    if text not in known or split == [[text, 100]]:
        others = [version for version in known if split != [[version, 100]]]
        raise ValueError(f"{what} must be {' or '.join((*others, NONE))}, a version besides the one that answers all "
                         f"requests, got {text!r}")
    return text
