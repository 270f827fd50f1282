"""The commands of `python3 -m app` and their options. What a command needs is imported when it runs."""
import argparse
import dataclasses
import importlib.util
import json
import logging.config
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROG = "python3 -m app"


class Command(NamedTuple):
    """add_options(its parser); run(arguments) returns the exit code, raises StartError or ServiceError; examples: what
    follows the command's name."""
    help: str
    add_options: Callable
    run: Callable
    examples: list
    description: str | None = None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            from app.suggestions import did_you_mean
            message += did_you_mean(found[1], re.findall(r"[\w+]+", found[2]))
        super().error(message)


def main():
    """Run the command of sys.argv. Returns the exit code."""
    arguments = parsed(sys.argv[1:])
    from app.config import StartError
    from app.errors import ServiceError
    try:
        return COMMANDS[arguments.command].run(arguments)
    except (StartError, ServiceError) as e:
        lines = str(e).split("\n")  # of several services, one for each
        if not all(map(str.isprintable, lines)):
            from app.output import shown
            lines = map(shown, lines)
        print("error:", "\n".join(lines), file=sys.stderr)
        return 1


def parsed(argv):
    parser = Parser(prog=PROG, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog=f"{PROG} COMMAND --help shows the options of a command, and examples.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, about in COMMANDS.items():
        command = commands.add_parser(
            name, help=about.help, description=about.description or f"{about.help[0].upper()}{about.help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n".join(["examples:", *(f"  {PROG} {name} {example}".rstrip() for example in about.examples)]))
        if name in argv:  # the others need neither the packages nor code of the user's
            about.add_options(command)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and (loader := with_own_model(commands.choices[arguments.command], arguments)):
        arguments, unknown = parser.parse_known_args(argv)
        arguments.loader = loader
    if unknown:
        from app.suggestions import did_you_mean
        command = commands.choices[arguments.command]
        known = re.findall(r"--[a-z][a-z-]*", command.format_usage())
        command.error(f"unrecognized arguments: {' '.join(unknown)}"
                      f"{did_you_mean(unknown[0].partition('=')[0], known)}")
    return arguments


def with_own_model(command, arguments):
    """Where an option is unknown, it may be one that a class of the user's makes when it is loaded: a ModelLoader that
    has done so, with such options added to the command; else None."""
    from app import chosen_model
    from app.config import StartError
    if arguments.command not in ("predict", "evaluate"):
        return None
    try:
        settings = chosen_model.choose(chosen_model.load(), arguments.model)[1]
        if ":" not in settings.model_name:
            return None
        from app import cli
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        loader = cli.load_chosen(arguments)
    except StartError:  # the command says so
        return None
    known = re.findall(r"--[a-z][a-z-]*", command.format_usage())
    add_declared(command, [option for option in loader.current.task.options
                           if "--" + option.name.replace("_", "-") not in known], settings)
    return loader


# --- the options of each command ---

def of_prepare(command):
    command.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")
    command.add_argument("--check", action="store_true", help="also load the model and check its output")
    command.add_argument("--beside", action="store_true",
                         help="give way to a service that runs on this machine: low priority, half of the cores")


def of_reload(command):
    command.add_argument("--port", type=int, help="the service's port, if several are running")
    command.add_argument("--pid", type=int, help="or the process ID of its Gunicorn master")


def of_traffic(command):
    command.add_argument("name", nargs="?", metavar="NAME", help="a model with versions, see MODELS")
    command.add_argument("split", nargs="?", metavar="SPLIT", help="such as 1:90,2:10, or the version that gets all")
    command.add_argument("--shadow", metavar="VERSION", help="the version that answers too, unseen, or none")
    of_reload(command)


def of_none(command):
    """It has no options."""


def of_health(command):
    command.add_argument("url", nargs="?", metavar="URL", help="http://HOST:PORT, https://HOST:PORT or unix:PATH; "
                         "by default that of HOST and PORT")


def of_smoke(command):
    command.add_argument("url", metavar="URL", help="where the service is, such as https://example.org/vision")
    command.add_argument("--key", metavar="KEY", help="one of the service's API_KEYS")
    command.add_argument("--timeout", type=seconds, default=30, metavar="SECONDS",
                         help="for each request: above 0, at most 3600 (default 30)")


def seconds(text):
    if not 0 < float(text) <= 3600:
        raise ValueError
    return float(text)


def of_predict(command):
    of_files(command)
    of_output(command)
    command.add_argument("--save", type=Path, metavar="DIR", help="save answers that are files, such as sound, to DIR")
    command.add_argument("--save-crop", type=Path, metavar="DIR", help="save the pictures that the model sees to DIR")
    command.add_argument("--save-overlay", type=Path, metavar="DIR",
                         help="save pictures that show where the model looked to DIR, as FILE-CLASS.png")
    of_prediction(command)


def of_evaluate(command):
    command.add_argument("--labels", required=True, type=Path, metavar="CSV",
                         help="with a header; first the path within FOLDER, then a column per trait, named after it, "
                              "or one column with the class name or class_id")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="where the files are")
    of_output(command)
    command.add_argument("--calibrate", action="store_true", help="for classifiers: fit a temperature with which "
                         "confidence is nearer to the share of right answers, and keep it with the model")
    command.add_argument("--report", type=Path, metavar="FILE.html", help="write a report: accuracy, calibration, "
                         "confusions, the worst mistakes")
    of_prediction(command, is_evaluation=True)


def of_embed(command):
    from app.tasks.options import AT, FRAMES, METHOD, TTA
    of_files(command)
    command.add_argument("--out", "--output", required=True, type=Path, metavar="FILE",
                         help="to write, .npz or .parquet")
    command.add_argument("--normalize", action="store_true", help="scale each embedding to length 1")
    of_model(command)
    add_declared(command, (METHOD, TTA, FRAMES, AT))


def of_similar(command):
    from app.tasks.options import AT, FRAMES, METHOD, TTA
    command.add_argument("picture", type=Path, metavar="PICTURE", help="what the others are compared with")
    command.add_argument("among", type=Path, metavar="FOLDER|FILE", help="a folder, or a file that embed has written")
    command.add_argument("--top", type=int, default=10, metavar="N", help="how many: 1 or more (default 10)")
    command.add_argument("--json", action="store_true", help="print JSON, one line per file")
    of_model(command)
    add_declared(command, (METHOD, TTA, FRAMES, AT))


def of_files(command):
    command.add_argument("paths", nargs="+", type=Path, metavar="FILE|FOLDER",
                         help="folders are searched for what the model takes")


def of_output(command):
    formats = command.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON, one line per file or result")
    formats.add_argument("--csv", action="store_true", help="print CSV, one row per file")
    command.add_argument("--output", "-o", type=Path, metavar="FILE",
                         help="write to FILE; one that ends in .csv, .json or .jsonl gets that format")


def of_model(command):
    command.add_argument("--model", metavar="NAME", help="one of MODELS, as NAME or NAME@VERSION, or another "
                         "architecture such as resnet50 or efficientnet_lite0")


def of_prediction(command, is_evaluation=False):
    from app.tasks.options import ALL, INSIGHT
    of_model(command)
    options, settings = declared_options() or (ALL, None)
    add_declared(command, [option for option in options if not (is_evaluation and option in INSIGHT)], settings)


def add_declared(command, options, settings=None):
    for option in options:
        default = settings and option.default_of(settings)
        takes = option.takes + (f"; default {shown(default)}" if default not in (None, "") else "")
        metavar = "FILE" if option.is_file else "N" if option.schema.get("type") in ("integer", "number") else "VALUE"
        command.add_argument("--" + option.name.replace("_", "-"), dest=f"option:{option.name}", metavar=metavar,
                             help=f"{option.meaning} [{takes}]".strip().replace("%", "%%"))


def shown(value):
    return str(value).lower() if isinstance(value, bool) else value


def declared_options():
    """(the options of a model, its Settings), for a model of one's own; None for all others, or if none can be had."""
    from app import chosen_model
    from app.config import StartError
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--model")
    try:
        _, settings = chosen_model.choose(chosen_model.load(), named.parse_known_args(sys.argv[2:])[0].model)
        if ":" in settings.model_name:
            from app.tasks import own
            return own.class_of(settings.model_name).options, settings
    except (StartError, SystemExit):  # the command says so
        return None
    from app.tasks.options import ALL
    return ALL, settings


# --- the commands ---

def run_health(arguments):
    from app import healthcheck
    return healthcheck.main(arguments.url)


def run_smoke(arguments):
    from app import smoke
    return smoke.main(arguments.url, arguments.key, arguments.timeout)


def run_reload(arguments):
    from app.server.lifecycle import reload_and_wait
    worked, message = reload_and_wait(arguments.pid, arguments.port)
    print(message, file=sys.stdout if worked else sys.stderr)
    return 0 if worked else 1


def run_traffic(arguments):
    from app.config import StartError
    from app.server import traffic
    service = arguments.pid, arguments.port
    if arguments.shadow is not None and not arguments.name:
        raise StartError("--shadow needs the NAME of a model")
    print("\n".join(traffic.switch(arguments.name, arguments.split, arguments.shadow, *service)
                    if arguments.split or arguments.shadow is not None else traffic.show(arguments.name, *service)))
    return 0


def run_worker(arguments):
    from app.jobs import worker
    return worker.main()


def run_migrate(arguments):
    from app.config import Settings, StartError
    optional = Settings.load().optional
    if not optional or not (optional.jobs or optional.history):
        raise StartError("there is no database: JOBS and HISTORY are off")
    from sqlalchemy.exc import SQLAlchemyError

    from app.data.database import MIGRATE_WITHIN_S, Database
    from app.data.schema import REVISION
    try:
        done = Database(optional.database).migrate(MIGRATE_WITHIN_S)
    except (SQLAlchemyError, OSError) as e:
        raise StartError(f"{optional.database_variable}: {str(e).splitlines()[0]}") from e
    print(f"the tables are now those of revision {REVISION}" if done else
          f"the tables are up to date (revision {REVISION})")
    return 0


def run_answering(arguments):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for workers: each slot is one core
    from app import cli
    if arguments.command in ("embed", "similar"):
        from app.insight import embeddings
        return getattr(embeddings, arguments.command)(arguments)
    if arguments.command == "evaluate" and (arguments.calibrate or arguments.report):
        from app.insight import evaluation
        return cli.evaluate(arguments, evaluation.Observer)
    return getattr(cli, arguments.command)(arguments)


def run_prepare(arguments):
    from app.config import StartError
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
    from app.engine import bundle
    from app.prepare import precision
    quantization = bundle.read(done.folder).quantization
    return [*(precision.table(quantization) if quantization else []), f"ready: {done.folder.resolve()}"]


def make_and_check(arguments):
    if not any(importlib.util.find_spec(engine) for engine in ("openvino", "torch")):
        raise ModuleNotFoundError(name="openvino")  # of a Python that happens to have the few packages that come first
    from app import chosen_model, model_settings
    from app.config import Settings
    from app.prepare import make, naming
    from app.server.log_config import logging_config
    from app.server.machine import plan as plan_of
    from app.server.machine import usable_cores
    if arguments.beside:
        from app.prepare import priority
        priority.give_way(usable_cores())
    settings = Settings.load()  # without FALLBACK: whoever builds an image must learn that the model is not in it
    if not arguments.json:
        settings = dataclasses.replace(settings, log_format="text")
    logging.config.dictConfig(logging_config(settings))
    plan = plan_of(settings)
    made = make(settings, plan.engine)
    for done in made:
        if done.fallback_reason and not arguments.json:
            chosen_model.say_fallback(done, settings)
        if done.own and not arguments.json:  # by hand; at a start the workers import it
            from app.tasks import own
            own.class_of(done.own)
    if arguments.check:
        from app.engine.slots import Slots
        from app.model_loader import Model
        for done, one in zip(made, model_settings.each(settings).values(), strict=True):
            with naming(done.key, settings):
                Model(done, one, plan, Slots(1, 1)).task.end()
    return made


COMMANDS = {
    "predict": Command("predict files and folders, without a server", of_predict, run_answering,
                       ["photo.jpg", "photos/ --csv --output photos.csv", "clip.mp4 --frames 5 --json",
                        "photos/ --model resnet50 --top-k 1"]),
    "evaluate": Command("compare predictions with labels", of_evaluate, run_answering,
                        ["--labels labels.csv photos/", "--labels labels.csv photos/ --csv -o rows.csv",
                         "--labels labels.csv photos/ --report report.html",
                         "--labels labels.csv photos/ --calibrate"],
                        "Prints the top-1 and top-5 accuracy of a classifier, or 1 - MAE for each trait. Can\n"
                        "calibrate a classifier, and write a report."),
    "embed": Command("write the embeddings of files and folders to a file", of_embed, run_answering,
                     ["photos/ --out photos.npz"]),
    "similar": Command("find the files that are most like a picture", of_similar, run_answering,
                       ["cat.jpg photos/ --top 5", "cat.jpg photos.npz --json"],
                       "By the cosine similarity of their embeddings."),
    "prepare": Command("prepare the model before the service starts: download, convert", of_prepare, run_prepare,
                       ["", "--check"]),
    "health": Command("check whether the service at HOST and PORT is ready", of_health, run_health,
                      ["", "https://127.0.0.1:8443", "unix:/run/service.sock"],
                      "The exit code is 0 if it is. Never uses a proxy."),
    "smoke": Command("check a running service after a deployment", of_smoke, run_smoke,
                     ["http://127.0.0.1:5000", "https://example.org/vision --key KEY"],
                     "Asks for its health, a prediction whose answer is known, its metrics and more. The exit code is\n"
                     "0 if all is well. Never uses a proxy."),
    "reload": Command("reload the running service's model without downtime", of_reload, run_reload,
                      ["", "--port 5001"]),
    "traffic": Command("show or switch which version of a model answers", of_traffic, run_traffic,
                       ["", "cats 1:90,2:10", "cats --shadow 3"], "Without SPLIT and --shadow it shows what holds."),
    "worker": Command("run jobs (JOBS=on), on this machine or another one", of_none, run_worker, [""]),
    "migrate": Command("make or migrate the tables of jobs and history before the service starts", of_none,
                       run_migrate, [""]),
}
