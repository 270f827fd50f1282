"""The commands of `python3 -m app`. What a command needs is imported when it runs."""
import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from app import command_options as options

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
    if unknown and (loader := options.with_own_model(commands.choices[arguments.command], arguments)):
        arguments, unknown = parser.parse_known_args(argv)
        arguments.loader = loader
    if unknown:
        from app.suggestions import did_you_mean
        command = commands.choices[arguments.command]
        known = re.findall(r"--[a-z][a-z-]*", command.format_usage())
        command.error(f"unrecognized arguments: {' '.join(unknown)}"
                      f"{did_you_mean(unknown[0].partition('=')[0], known)}")
    return arguments


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
    from app import prepare_command
    return prepare_command.main(arguments)


COMMANDS = {
    "predict": Command("predict files and folders, without a server", options.of_predict, run_answering,
                       ["photo.jpg", "photos/ --csv --output photos.csv", "clip.mp4 --frames 5 --json",
                        "photos/ --model resnet50 --top-k 1"]),
    "evaluate": Command("compare predictions with labels", options.of_evaluate, run_answering,
                        ["--labels labels.csv photos/", "--labels labels.csv photos/ --csv -o rows.csv",
                         "--labels labels.csv photos/ --report report.html",
                         "--labels labels.csv photos/ --calibrate"],
                        "Prints the top-1 and top-5 accuracy of a classifier, or 1 - MAE for each trait. Can\n"
                        "calibrate a classifier, and write a report."),
    "embed": Command("write the embeddings of files and folders to a file", options.of_embed, run_answering,
                     ["photos/ --out photos.npz"]),
    "similar": Command("find the files that are most like a picture", options.of_similar, run_answering,
                       ["cat.jpg photos/ --top 5", "cat.jpg photos.npz --json"],
                       "By the cosine similarity of their embeddings."),
    "prepare": Command("prepare the model before the service starts: download, convert", options.of_prepare,
                       run_prepare, ["", "--check"]),
    "health": Command("check whether the service at HOST and PORT is ready", options.of_health, run_health,
                      ["", "https://127.0.0.1:8443", "unix:/run/service.sock"],
                      "The exit code is 0 if it is. Never uses a proxy."),
    "smoke": Command("check a running service after a deployment", options.of_smoke, run_smoke,
                     ["http://127.0.0.1:5000", "https://example.org/vision --key KEY"],
                     "Asks for its health, a prediction whose answer is known, its metrics and more. The exit code is\n"
                     "0 if all is well. Never uses a proxy."),
    "reload": Command("reload the running service's model without downtime", options.of_reload, run_reload,
                      ["", "--port 5001"]),
    "traffic": Command("show or switch which version of a model answers", options.of_traffic, run_traffic,
                       ["", "cats 1:90,2:10", "cats --shadow 3"], "Without SPLIT and --shadow it shows what holds."),
    "worker": Command("run jobs (JOBS=on), on this machine or another one", options.of_none, run_worker, [""]),
    "migrate": Command("make or migrate the tables of jobs and history before the service starts", options.of_none,
                       run_migrate, [""]),
}
