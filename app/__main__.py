"""The command line: python -m app prepare | reload | predict | evaluate."""
import argparse
import json
import sys
from pathlib import Path

from app.config import FACE_METHODS, Settings, StartError

OPTIONS = {  # as the API has them; their values are checked where those of the API are
    "top_k": "how many classes",
    "method": "what ocean looks at: " + ", ".join(FACE_METHODS),
    "tta": "whether ocean averages with the mirror image: true or false",
    "frames": "how many frames of a video",
    "at": "the second of a video to look at",
}


def main():
    parser = argparse.ArgumentParser(prog="python -m app")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="get the model ready before the service starts: download, convert")
    prepare.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")
    reload = commands.add_parser("reload", help="let the running service load its model anew, without a gap")
    reload.add_argument("--pid", type=int, help="process id of the Gunicorn master, where several services run")
    roll = commands.add_parser("roll")  # what the master starts on SIGHUP
    roll.add_argument("--state", required=True)
    add_predict_and_evaluate(commands)
    arguments = parser.parse_args()
    return {"prepare": run_prepare, "reload": run_reload, "roll": run_roll, "predict": run_answering,
            "evaluate": run_answering}[arguments.command](arguments)


def add_predict_and_evaluate(commands):
    predict = commands.add_parser("predict", help="answer files and folders, without a server")
    predict.add_argument("paths", nargs="+", type=Path, metavar="FILE|FOLDER")
    predict.add_argument("--save-crop", type=Path, metavar="DIR", help="write the pictures that the model saw to DIR")
    evaluate = commands.add_parser("evaluate", help="compare the answers with labels",
                                   description="Prints 1 - MAE of each trait, or the top-1 and top-5 accuracy.")
    evaluate.add_argument("--labels", required=True, type=Path, metavar="CSV",
                          help="with a header; the file's path in FOLDER first, then a column for each trait by its "
                               "name, or one with the class by its name or class_id")
    evaluate.add_argument("folder", type=Path, metavar="FOLDER")
    for command in (predict, evaluate):
        command.add_argument("--json", action="store_true", help="print JSON, one line a file or result")
        for name, meaning in OPTIONS.items():
            command.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=meaning)


def run_answering(arguments):
    from app import cli
    from app.errors import ServiceError
    try:
        return {"predict": cli.predict, "evaluate": cli.evaluate}[arguments.command](arguments)
    except (StartError, ServiceError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def run_reload(arguments):
    from app.lifecycle import reload_and_wait
    try:
        worked, message = reload_and_wait(arguments.pid)
    except StartError as e:
        worked, message = False, str(e)
    print(message, file=sys.stdout if worked else sys.stderr)
    return 0 if worked else 1


def run_roll(arguments):
    import logging.config
    import os

    from app.lifecycle import roll
    from app.observability import logging_config
    try:
        settings = Settings.load()
    except StartError:  # roll() reports it
        settings = Settings()
    logging.config.dictConfig(logging_config(settings))
    return 0 if roll(arguments.state, master=os.getppid()) else 1


def run_prepare(arguments):
    from app.prepare import make
    try:
        done = make(Settings.load())
    except StartError as e:
        print(json.dumps({"error": str(e)}) if arguments.json else f"error: {e}",
              file=sys.stdout if arguments.json else sys.stderr)
        return 1
    answer = {"folder": str(done.folder.resolve()), "fallback_reason": done.fallback_reason}
    print(json.dumps(answer) if arguments.json else f"ready: {answer['folder']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
