"""Blueprints whose code is imported with their first request: what is rarely asked costs the others nothing."""
import functools

from flask import Blueprint
from werkzeug.utils import import_string


def blueprint(name, module, rules):
    """A Blueprint of views in a module. rules: [(rule, the view's name, *methods)], GET by default."""
    made, views = Blueprint(name, __name__), {}
    for rule, view, *methods in rules:
        called = views.setdefault(view, functools.partial(call, f"{module}:{view}"))
        made.add_url_rule(rule, view, called, methods=methods or ["GET"])
    return made


def call(view, **arguments):
    return import_string(view)(**arguments)
