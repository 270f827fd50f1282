"""The command line: python -m app prepare | reload."""
import argparse
import json
import sys

from app.config import Settings, StartError


def main():
    parser = argparse.ArgumentParser(prog="python -m app")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="get the model ready before the service starts: download, convert")
    prepare.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")
    reload = commands.add_parser("reload", help="let the running service load its model anew, without a gap")
    reload.add_argument("--pid", type=int, help="process id of the Gunicorn master, where several services run")
    roll = commands.add_parser("roll")  # what the master starts on SIGHUP
    roll.add_argument("--state", required=True)
    arguments = parser.parse_args()
    return {"prepare": run_prepare, "reload": run_reload, "roll": run_roll}[arguments.command](arguments)


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
