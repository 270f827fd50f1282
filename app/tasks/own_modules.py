"""Modules of the user's: imported again where their files have changed, so that a reload serves new code."""
import hashlib
import importlib
import os
import sys
from pathlib import Path

imported = {}  # {module's name: SHA-256 of its file when it was imported}


def import_fresh(name):
    """Import a module, again if its file has changed since: a reload serves new code."""
    before = sys.modules.get(name)
    if before is not None and name in imported and imported[name] != digest_of(before):
        for one in beside(before):
            del sys.modules[one]
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    imported[name] = digest_of(module)
    return module


def beside(module):
    """The names of a module and of the imported ones in its folder and below, but for installed ones and the
    service's."""
    folder = f"{Path(module.__file__).parent}{os.sep}"
    return [name for name, one in list(sys.modules.items())
            if name.partition(".")[0] not in ("app", "__main__")
            and (getattr(one, "__file__", None) or "").startswith(folder) and "site-packages" not in one.__file__]


def digest_of(module):
    """A hash of the files of the modules `beside` this one."""
    try:
        files = sorted({sys.modules[name].__file__ for name in beside(module)})
        return hashlib.sha256(b"".join(hashlib.sha256(Path(file).read_bytes()).digest() for file in files)).hexdigest()
    except (OSError, TypeError, AttributeError, KeyError):
        return None
