"""Blueprints whose code is imported with their first request: what is rarely used costs no memory until then."""
from flask import Blueprint
from werkzeug.utils import import_string


def blueprint(name, module, rules):
    """A Blueprint of views in a module. rules: [(rule, the view's name, *methods)], GET by default."""
    made, views = Blueprint(name, __name__), {}
    for rule, view, *methods in rules:
        lazy = views.setdefault(view, lambda where=f"{module}:{view}", **arguments: import_string(where)(**arguments))
        made.add_url_rule(rule, view, lazy, methods=methods or ["GET"])
    return made
