"""Options that no model knows: a misspelt one must not be ignored. Imported with the first name that is not one of the
built-in models' options.
"""
from flask import current_app, request

from app.api import json_body
from app.api.uploads import BATCH_FIELDS, INSTANCES, KNOWN_NAMES
from app.errors import ServiceError
from app.tasks.options import STREAM

# What clients and gateways send besides; none of it changes an answer. Names that begin with _ are let through as well.
HARMLESS = {"filename", "callback_url",                               # of a file; of jobs
            "signature_name",                                         # TensorFlow Serving's
            "submit",                                                 # a form's button
            "access_token", "api_key", "apikey", "key", "subscription-key"}  # of gateways


def check(names):
    """Raises ServiceError for a name of the current request that neither a loaded model nor anything else here knows.
    Without any input it is silent: that this is missing is the first thing to say."""
    tasks = current_app.extensions["model"].tasks(None)
    options = {name for task in tasks for option in task.options for name in (option.name, *option.aliases)}
    unknown = {name for name in names - options - HARMLESS - of_input(tasks)
               if name and not name.startswith("_")}  # None: of a form's part without a name
    if unknown and has_input(tasks):
        from app.suggestions import did_you_mean
        name, known = min(unknown)[:40], sorted({*options, STREAM.name})
        of_jobs = ["callback_url"] if "jobs" in current_app.extensions else []
        meant = did_you_mean(name, [*known, *of_jobs, *KNOWN_NAMES]) or f"; there are {', '.join(known)}"
        raise ServiceError(400, "INVALID_PARAMETER", f"{ascii(name)[1:-1]} is not an option of any model{meant}")


def of_input(tasks):
    """The names that hold an input, or a part of one: a model may take all members of an object."""
    fields = {task.field for task in tasks if not task.is_file}
    members = json_body.members() if request.is_json and None in fields else {}
    return fields | (set() if INSTANCES in members else members.keys() - request.args.keys())


def has_input(tasks):
    fields = {*BATCH_FIELDS, INSTANCES, "url", *(task.field for task in tasks)}
    if request.is_json:
        return not fields.isdisjoint(json_body.members()) or any(not task.is_file and not task.field for task in tasks)
    return "form" not in request.mimetype or bool(request.files) or not fields.isdisjoint(request.form)
