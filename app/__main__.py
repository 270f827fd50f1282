"""The command line: python -m app prepare."""
import argparse
import json
import sys

from app.config import Settings, StartError


def main():
    parser = argparse.ArgumentParser(prog="python -m app")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="get the model ready before the service starts: download, convert")
    prepare.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")
    arguments = parser.parse_args()
    return {"prepare": run_prepare}[arguments.command](arguments)


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
