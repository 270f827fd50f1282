"""The options of each command of `python3 -m app`, also those that a model declares."""
import argparse
import os
import re
import sys
from pathlib import Path


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
    from app.tasks.options import INSIGHT
    of_model(command)
    options, settings = declared_options()
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
    """(the options of the model that the command will use, its Settings); all there are and None if it cannot be had.
    """
    from app import chosen_model
    from app.config import StartError
    from app.tasks.options import ALL
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--model")
    try:
        _, settings = chosen_model.choose(chosen_model.load(), named.parse_known_args(sys.argv[2:])[0].model)
        if ":" in settings.model_name:
            from app.tasks import own
            return own.class_of(settings.model_name).options, settings
    except (StartError, SystemExit):  # the command says so
        return ALL, None
    return ALL, settings


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
