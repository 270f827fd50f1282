"""Mistakes in package.module:Class that can be seen without importing it, which may take long: a misspelt name, a
missing package, a syntax error. What importing it does beyond that is found by whoever imports it.
"""
import ast
import importlib
import os
import sys
import tokenize
import warnings
from pathlib import Path

from app.config import StartError
from app.suggestions import did_you_mean, nearest

BASE = Path(__file__).parent / "tasks/own.py"
BINDERS = {"globals", "locals", "vars", "exec", "setattr"}  # with these a module may bind any name


def check(name):
    """Raises StartError for a class that certainly cannot be imported."""
    module_name, _, class_name = name.partition(":")
    words, folders = module_name.split("."), None
    for i in range(len(words)):
        try:
            spec = spec_of(words[:i + 1], folders)
            inside = [*((spec and spec.submodule_search_locations) or [])]
        except KeyError:  # of a folder without __init__.py in another one: Python needs the outer one to be imported
            return
        if spec is None:
            where = f"in {os.getcwd()} or on Python's path" if folders is None else f"in {'.'.join(words[:i])}"
            raise refusal(name, f"there is no module {'.'.join(words[:i + 1])} {where}"
                                f"{another(words, i, class_name, folders)}")
        folders = inside
    if str(spec.origin).endswith(".py"):
        check_source(name, Path(spec.origin))


def check_source(name, path):
    """The same, for the source of the class's module."""
    try:
        module = parsed(path)
    except SyntaxError as e:
        raise refusal(name, f"importing it failed: {type(e).__name__}: {e.msg} ({path.name}, line {e.lineno})") from e
    except (OSError, ValueError):  # whoever imports it says so
        return
    for line, needed, names in imports(module):
        spec = spec_of([needed.partition(".")[0]], None)
        if spec is None:
            raise refusal(name, f"{path.name}, line {line}, imports {needed}, which is not installed for "
                                f"{sys.executable}{did_you_mean(needed, beside(None))}")
        if needed == "app.tasks.own":
            known = bindings(parsed(BASE))
            for one in names:
                if one not in known:
                    raise refusal(name, f"{path.name}, line {line}: app.tasks.own has no {one}"
                                        f"{did_you_mean(one, known)}")
        elif is_own(str(spec.origin)):
            break  # it may change where the others are looked for
    bound = bindings(module)
    if not bound & {name.partition(":")[2], "*", "__getattr__"}:
        raise missing(name, [node.name for node in module.body if isinstance(node, ast.ClassDef)])


def parsed(path):
    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever imports it shows them
        return ast.parse(file.read(), path.name)


def missing(name, classes):
    """The StartError for a class that its module lacks. classes: the names of those that it has."""
    module_name, _, class_name = name.partition(":")
    meant = nearest(class_name, classes) or (classes[0] if len(classes) == 1 else None)
    hint = f"; did you mean {module_name}:{meant}?" if meant else "; there are " * bool(classes) + ", ".join(classes)
    return refusal(name, f"{class_name} is not in {module_name}{hint}")


def refusal(name, why):
    return StartError(f"{name} cannot be served: {why}")


def another(words, i, class_name, folders):
    """The end of a message about the module words[:i + 1], which is not there: what was probably meant."""
    if words[i] == "py" and not folders:  # my_model.py:Faces
        meant = words[:i]
    else:
        meant = [*words[:i], nearest(words[i], beside(folders)), *words[i + 1:]]
    return f"; did you mean {'.'.join(meant)}:{class_name}?" if all(meant) else ""


def spec_of(words, folders):
    """The ModuleSpec of a module, without importing it, or None. folders: its package's; None: Python's path."""
    name = ".".join(words)
    if getattr(sys.modules.get(name), "__spec__", None):
        return sys.modules[name].__spec__
    importlib.invalidate_caches()
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, folders)
        except (AttributeError, ImportError, ValueError):  # a finder of an odd package
            continue
        if spec is not None:
            return spec
    return None


def is_own(path):
    return "site-packages" not in path and not path.startswith((sys.prefix, sys.base_prefix)) and os.sep in path


def beside(folders):
    """The names of the modules and packages in these folders; None: in those of Python's path with one's own."""
    found = set()
    for folder in map(Path, filter(is_own, map(os.path.abspath, sys.path)) if folders is None else folders):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.suffix == ".py" or path.is_dir() and any(path.glob("*.py")):
                found.add(path.stem)
    return found


def imports(module):
    """Yield (line, module, [names from it]) of the imports with which a module begins."""
    for node in module.body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name, []) for one in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module, [one.name for one in node.names if one.name != "*"]
        elif not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):  # a docstring
            break


def bindings(module):
    """The names that a module's statements bind or mention, outside of functions and classes, and globals of these;
    "*" stands for others."""
    found, left = set(), list(module.body)
    for node in ast.walk(module):
        found.update(node.names if isinstance(node, ast.Global) else ())
    while left:
        node = left.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Name):
            found.add("*" if node.id in BINDERS else node.id)
        else:
            left += ast.iter_child_nodes(node)
    return found
