"""A misspelt package.module:Class, found without importing it, which may take long. What else is wrong with it is found
by whoever imports it.
"""
import importlib.util
import os
import pkgutil
import re
from pathlib import Path

from app.config import StartError
from app.setting_formats import MODEL_NAMES
from app.suggestions import did_you_mean, nearest

BINDS_ANY = r"import \*|\b(__getattr__|exec|globals|locals|setattr|vars)\b"  # with these a module may have any name


def check(name):
    """Raises StartError for a class that certainly cannot be imported."""
    module_name, _, class_name = name.partition(":")
    top, *inside = module_name.split(".")
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that no import has made, such as __main__
        return
    if spec is None:
        meant = did_you_mean(top, {module.name for module in pkgutil.iter_modules()})
        raise refusal(name, f"there is no module {top} in {os.getcwd()} or on Python's path{meant}")
    folders = spec.submodule_search_locations or ()
    if inside == ["py"] and not folders:  # my_model.py:Faces
        raise refusal(name, f"there is no module {module_name}; did you mean {top}:{class_name}?")
    sources = [Path(folder, *inside).with_suffix(".py") for folder in folders] if inside else [Path(str(spec.origin))]
    for source in sources:
        if source.suffix == ".py" and os.access(source, os.R_OK):
            text = source.read_text(errors="replace")
            if not re.search(rf"\b{class_name}\b|{BINDS_ANY}", text):
                raise missing(name, re.findall(r"^class (\w+)", text, re.MULTILINE))
            return


def check_architecture(name):
    """Raises StartError for an unknown one that is the user's module, without its class: to look for it among
    torchvision's takes a while."""
    source = Path(f"{name}.py")
    if name not in MODEL_NAMES.split() and os.access(source, os.R_OK):
        classes = re.findall(r"^class (\w+)\(.*OwnTask", source.read_text(errors="replace"), re.MULTILINE)
        meant = " or ".join(f"{name}:{one}" for one in classes or ["Class"])
        raise refusal(name, f"{source} is here, but its class is not named; did you mean {meant}?")


def missing(name, classes):
    """The StartError for a class that its module lacks. classes: the names of those that it has."""
    module_name, _, class_name = name.partition(":")
    meant = nearest(class_name, classes) or (classes[0] if len(classes) == 1 else None)
    hint = f"; did you mean {module_name}:{meant}?" if meant else "; there are " * bool(classes) + ", ".join(classes)
    return refusal(name, f"{class_name} is not in {module_name}{hint}")


def refusal(name, why):
    return StartError(f"{name} cannot be served: {why}")
