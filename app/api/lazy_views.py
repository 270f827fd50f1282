"""Blueprints whose code is imported with their first request: what is rarely asked costs the others nothing."""
from flask import Blueprint
from werkzeug.utils import import_string


def blueprint(name, module, rules):
    """A Blueprint of views in a module. rules: [(rule, the view's name, *methods)], GET by default."""
    made = Blueprint(name, __name__)

    def add(rule, view, *methods):
        def import_and_call(**arguments):
            return import_string(f"{module}:{view}")(**arguments)
        made.add_url_rule(rule, view, import_and_call, methods=methods or ("GET",))
    for rule in rules:
        add(*rule)
    return made
