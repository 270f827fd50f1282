"""`python3 -m app prepare`, by hand or as the process in which the service prepares its models."""
import dataclasses
import importlib.util
import json
import logging.config
import os
import sys

from app import chosen_model, model_settings
from app.config import Settings, StartError
from app.engine import bundle
from app.engine.slots import Slots
from app.prepare import make, naming
from app.server import machine
from app.server.log_config import logging_config


def main(arguments):
    """Returns the exit code. Raises StartError."""
    outcome = sys.stdout
    if arguments.json:  # what a model of the user's prints must not be taken for it
        outcome = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    try:
        made = make_and_check(arguments)
    except StartError as e:
        if not arguments.json:
            raise
        print(json.dumps({"error": str(e)[:5000]}), file=outcome)
        code = 1
    else:
        print(json.dumps({"models": [done.as_json() for done in made]}) if arguments.json else
              "\n".join(line for done in made for line in lines_of(done)), file=outcome)
        code = 0
    if arguments.json:
        outcome.close()
        logging.shutdown()
        os._exit(code)  # threads that a model of the user's has left behind are not waited for
    return code


def lines_of(done):
    """What `prepare` prints about a model: its folder, and what was measured of its precisions."""
    if done.own:
        return [f"ready: {done.own}"]
    from app.prepare import precision
    quantization = bundle.read(done.folder).quantization
    return [*(precision.table(quantization) if quantization else []), f"ready: {done.folder.resolve()}"]


def make_and_check(arguments):
    if not any(importlib.util.find_spec(engine) for engine in ("openvino", "torch")):
        raise ModuleNotFoundError(name="openvino")  # of a Python that happens to have the few packages that come first
    if arguments.beside:
        from app.prepare import priority
        priority.give_way(machine.usable_cores())
    settings = Settings.load()  # without FALLBACK: whoever builds an image must learn that the model is not in it
    if not arguments.json:
        settings = dataclasses.replace(settings, log_format="text")
    logging.config.dictConfig(logging_config(settings))
    plan = machine.plan(settings)
    made = make(settings, plan.engine)
    for done in made:
        if done.fallback_reason and not arguments.json:
            chosen_model.say_fallback(done, settings)
        if done.own and not arguments.json:  # by hand; at a start the workers import it
            from app.tasks import own
            own.class_of(done.own)
    if arguments.check:
        from app.model_loader import Model
        for done, one in zip(made, model_settings.each(settings).values(), strict=True):
            with naming(done.key, settings):
                Model(done, one, plan, Slots(1, 1)).task.end()
    return made
