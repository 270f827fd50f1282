"""The command line: python -m app prepare | reload | traffic | worker | migrate | health | predict | evaluate |
embed | similar."""
import argparse
import dataclasses
import json
import logging.config
import os
import sys
from pathlib import Path

from app import model_settings
from app.config import Settings, StartError
from app.tasks.options import ALL, AT, FRAMES, INSIGHT, METHOD, TTA


def main():
    parser = argparse.ArgumentParser(prog="python -m app")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="prepare the model before the service starts: download, convert")
    prepare.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")
    prepare.add_argument("--check", action="store_true", help="also load the model and check its output")
    prepare.add_argument("--beside", action="store_true",
                         help="give way to a service that runs on this machine: low priority, half of the cores")
    reload = commands.add_parser("reload", help="reload the running service's model without downtime")
    reload.add_argument("--pid", type=int, help="process ID of the Gunicorn master, if several services are running")
    traffic = commands.add_parser("traffic", help="show or switch which version of a model answers",
                                  description="Without SPLIT and --shadow it shows what holds.")
    traffic.add_argument("name", nargs="?", metavar="NAME", help="a model with versions, see MODELS")
    traffic.add_argument("split", nargs="?", metavar="SPLIT", help="such as 1:90,2:10, or the version that gets all")
    traffic.add_argument("--shadow", metavar="VERSION", help="the version that answers too, unseen, or none")
    traffic.add_argument("--pid", type=int, help="process ID of the Gunicorn master, if several services are running")
    commands.add_parser("worker", help="run jobs (JOBS=on), on this machine or another one")
    commands.add_parser("migrate", help="make or migrate the tables of jobs and history before the service starts")
    commands.add_parser("health", help="check whether the service at HOST and PORT is ready")
    add_predict_and_evaluate(commands)
    add_embed_and_similar(commands)
    arguments = parser.parse_args()
    return {"prepare": run_prepare, "reload": run_reload, "traffic": run_traffic, "worker": run_worker,
            "migrate": run_migrate, "health": run_health}.get(arguments.command, run_answering)(arguments)


def add_predict_and_evaluate(commands):
    predict = commands.add_parser("predict", help="predict files and folders without a server")
    predict.add_argument("paths", nargs="+", type=Path, metavar="FILE|FOLDER")
    predict.add_argument("--save", type=Path, metavar="DIR", help="save answers that are files, such as sound, to DIR")
    predict.add_argument("--save-crop", type=Path, metavar="DIR", help="save the pictures that the model sees to DIR")
    predict.add_argument("--save-overlay", type=Path, metavar="DIR",
                         help="save pictures that show where the model looked to DIR, as FILE-CLASS.png")
    evaluate = commands.add_parser("evaluate", help="compare predictions with labels",
                                   description="Prints the top-1 and top-5 accuracy of a classifier, or 1 - MAE for "
                                               "each trait. Can calibrate a classifier, and write a report.")
    evaluate.add_argument("--labels", required=True, type=Path, metavar="CSV",
                          help="with a header; first the path within FOLDER, then a column per trait, named after it, "
                               "or one column with the class name or class_id")
    evaluate.add_argument("folder", type=Path, metavar="FOLDER")
    evaluate.add_argument("--calibrate", action="store_true", help="for classifiers: fit a temperature with which "
                          "confidence is nearer to the share of right answers, and keep it with the model")
    evaluate.add_argument("--report", type=Path, metavar="FILE.html", help="write a report: accuracy, calibration, "
                          "confusions, the worst mistakes")
    for command in (predict, evaluate):
        command.add_argument("--json", action="store_true", help="print JSON, one line per file or result")
        for option in declared_options():
            if command is evaluate and option in INSIGHT:  # they change no prediction
                continue
            command.add_argument("--" + option.name.replace("_", "-"), dest=f"option:{option.name}",
                                 metavar="FILE" if option.is_file else "VALUE", help=option.meaning)


def add_embed_and_similar(commands):
    embed = commands.add_parser("embed", help="write the embeddings of files and folders to a file")
    embed.add_argument("paths", nargs="+", type=Path, metavar="FILE|FOLDER")
    embed.add_argument("--out", required=True, type=Path, metavar="FILE", help="to write, .npz or .parquet")
    embed.add_argument("--normalize", action="store_true", help="scale each embedding to length 1")
    similar = commands.add_parser("similar", help="find the files that are most like a picture",
                                  description="By the cosine similarity of their embeddings.")
    similar.add_argument("picture", type=Path, metavar="PICTURE", help="what the others are compared with")
    similar.add_argument("among", type=Path, metavar="FOLDER|FILE", help="a folder, or a file that embed has written")
    similar.add_argument("--top", type=int, default=10, metavar="N", help="how many, 10 by default")
    similar.add_argument("--json", action="store_true", help="print JSON, one line per file")
    for command in (embed, similar):
        for option in (METHOD, TTA, FRAMES, AT):
            command.add_argument("--" + option.name, dest=f"option:{option.name}", metavar="VALUE",
                                 help=option.meaning)


def declared_options():
    """The options of a model of one's own, else of all the others."""
    if not {"predict", "evaluate"} & set(sys.argv):  # the other commands need no code of the user's
        return ALL
    try:
        settings = next(iter(model_settings.each(Settings.load()).values()))
        if ":" in settings.model_name:
            from app.tasks import own
            return own.class_of(settings.model_name).options
    except StartError:
        pass  # the command says so
    return ALL


def run_answering(arguments):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for workers: each slot is one core
    from app import cli
    from app.errors import ServiceError
    try:
        if arguments.command in ("embed", "similar"):
            from app.insight import embeddings
            return getattr(embeddings, arguments.command)(arguments)
        if arguments.command == "evaluate" and (arguments.calibrate or arguments.report):
            from app.insight import evaluation
            return cli.evaluate(arguments, evaluation.Observer)
        return getattr(cli, arguments.command)(arguments)
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


def run_traffic(arguments):
    from app.server import traffic
    try:
        if arguments.shadow is not None and not arguments.name:
            raise StartError("--shadow needs the NAME of a model")
        lines = traffic.switch(arguments.name, arguments.split, arguments.shadow, arguments.pid) \
            if arguments.split or arguments.shadow is not None else traffic.show(arguments.name, arguments.pid)
    except StartError as e:
        print(e, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def run_worker(arguments):
    try:
        from app.jobs import worker
    except ModuleNotFoundError as e:
        return lacks(e)
    return worker.main()


def lacks(error):
    package = error.name.partition(".")[0]
    print(f"error: {package} is not installed for {sys.executable}: run make worker, or install what is missing with "
          "pip install -r requirements.txt -r app/jobs/requirements.txt", file=sys.stderr)
    return 1


def run_migrate(arguments):
    try:
        optional = Settings.load().optional
        if not optional or not (optional.jobs or optional.history):
            raise StartError("there is no database: JOBS and HISTORY are off")
        from sqlalchemy.exc import SQLAlchemyError

        from app.data.database import MIGRATE_WITHIN_S, Database
        from app.data.schema import REVISION
    except ModuleNotFoundError as e:
        return lacks(e)
    except StartError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    try:
        done = Database(optional.database).migrate(MIGRATE_WITHIN_S)
    except StartError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except (SQLAlchemyError, OSError) as e:
        print(f"error: {optional.database_variable}: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"the tables are now those of revision {REVISION}" if done else
          f"the tables are up to date (revision {REVISION})")
    return 0


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
    outcome = sys.stdout
    if arguments.json:  # what a model of the user's prints must not be taken for it
        outcome = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    try:
        made = make_and_check(arguments)
    except StartError as e:
        print(json.dumps({"error": str(e)[:5000]}) if arguments.json else f"error: {e}",
              file=outcome if arguments.json else sys.stderr)
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
    from app.prepare import make, naming
    from app.server.log_config import logging_config
    from app.server.machine import plan as plan_of
    from app.server.machine import usable_cores
    if arguments.beside:
        from app.prepare import priority
        priority.give_way(usable_cores())
    settings = Settings.load()
    if not arguments.json:
        settings = dataclasses.replace(settings, log_format="text")
    logging.config.dictConfig(logging_config(settings))
    plan = plan_of(settings)
    made = make(settings, plan.engine)
    for done in made:
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


if __name__ == "__main__":
    sys.exit(main())
