"""The command line: python -m app prepare | reload | health | predict | evaluate."""
import argparse
import dataclasses
import json
import logging.config
import sys
from pathlib import Path

from app.config import Settings, StartError
from app.tasks.options import ALL


def main():
    parser = argparse.ArgumentParser(prog="python -m app")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="prepare the model before the service starts: download, convert")
    prepare.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")
    prepare.add_argument("--check", action="store_true", help="also load the model and check its output")
    reload = commands.add_parser("reload", help="reload the running service's model without downtime")
    reload.add_argument("--pid", type=int, help="process ID of the Gunicorn master, if several services are running")
    commands.add_parser("health", help="check whether the service at HOST and PORT is ready")
    add_predict_and_evaluate(commands)
    arguments = parser.parse_args()
    return {"prepare": run_prepare, "reload": run_reload, "health": run_health, "predict": run_answering,
            "evaluate": run_answering}[arguments.command](arguments)


def add_predict_and_evaluate(commands):
    predict = commands.add_parser("predict", help="predict files and folders without a server")
    predict.add_argument("paths", nargs="+", type=Path, metavar="FILE|FOLDER")
    predict.add_argument("--save", type=Path, metavar="DIR", help="save answers that are files, such as sound, to DIR")
    predict.add_argument("--save-crop", type=Path, metavar="DIR", help="save the pictures that the model sees to DIR")
    evaluate = commands.add_parser("evaluate", help="compare predictions with labels",
                                   description="Prints 1 - MAE per trait, or the top-1 and top-5 accuracy.")
    evaluate.add_argument("--labels", required=True, type=Path, metavar="CSV",
                          help="with a header; first the path within FOLDER, then a column per trait, named after it, "
                               "or one column with the class name or class_id")
    evaluate.add_argument("folder", type=Path, metavar="FOLDER")
    for command in (predict, evaluate):
        command.add_argument("--json", action="store_true", help="print JSON, one line per file or result")
        for option in declared_options():
            command.add_argument("--" + option.name.replace("_", "-"), metavar="VALUE", help=option.meaning)


def declared_options():
    """The options of a model of one's own, else of all the others."""
    try:
        name = Settings.load().model_name
        if ":" in name:
            from app.tasks import own
            return own.class_of(name).options
    except StartError:
        pass  # the command says so
    return ALL


def run_answering(arguments):
    from app import cli
    from app.errors import ServiceError
    try:
        return {"predict": cli.predict, "evaluate": cli.evaluate}[arguments.command](arguments)
    except (StartError, ServiceError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def run_reload(arguments):
    from app.server.lifecycle import reload_and_wait
    try:
        worked, message = reload_and_wait(arguments.pid)
    except StartError as e:
        worked, message = False, str(e)
    print(message, file=sys.stdout if worked else sys.stderr)
    return 0 if worked else 1


def run_health(arguments):
    """For HEALTHCHECK: 0 if the service on this machine is ready. Proxy settings are ignored."""
    import http.client
    try:
        settings = Settings.load()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        connection = http.client.HTTPConnection(host, settings.port, timeout=2.5)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        text, status = answer.read().decode(), answer.status
    except (StartError, OSError, http.client.HTTPException) as e:
        text, status = f"no answer: {e}", 0
    print(text.strip())
    return 0 if status == 200 else 1


def run_prepare(arguments):
    from app.prepare import make
    from app.server.logs import logging_config
    from app.server.machine import plan as plan_of
    try:
        settings = Settings.load()
        if not arguments.json:
            settings = dataclasses.replace(settings, log_format="text")
        logging.config.dictConfig(logging_config(settings))
        plan = plan_of(settings)
        done = make(settings, plan.engine)
        if arguments.check:
            from app.engine.slots import Slots
            from app.model_loader import Model
            Model(done, settings, plan, Slots(1, 1)).task.end()
    except StartError as e:
        print(json.dumps({"error": str(e)}) if arguments.json else f"error: {e}",
              file=sys.stdout if arguments.json else sys.stderr)
        return 1
    answer = {"folder": str(done.folder.resolve()), "fallback_reason": done.fallback_reason}
    print(json.dumps(answer) if arguments.json else f"ready: {answer['folder']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
