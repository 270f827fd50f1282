"""`python3 -m app predict` and `evaluate`: the API's answers without a server."""
import base64
import contextlib
import csv
import dataclasses
import io
import json
import logging
import mimetypes
import os
import re
import sys
from pathlib import Path

from gevent import get_hub
from gevent.pool import Pool
from PIL import Image
from tqdm import tqdm

from app import chosen_model, load_model
from app.api.uploads import Upload
from app.config import StartError
from app.errors import Deadline, ServiceError
from app.media import containers, pictures
from app.output import CommandError, Output, shown
from app.server.counters import Stages
from app.tasks import Call
from app.tasks import options as task_options

SUFFIXES = {"picture": pictures.EXTENSIONS, "video": containers.EXTENSIONS, "text": ("txt",), "json": ("json",),
            "audio": ("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac")}  # of the files that folders are searched for
MOST_SHOWN = 20  # of the labels that cannot be used


def load(arguments):
    """(loader, model, options) for a command. Raises StartError, or ServiceError for a bad option."""
    loader = getattr(arguments, "loader", None) or load_chosen(arguments)
    model = loader.current

    def option(name, is_file=False):
        value = vars(arguments).get(f"option:{name}")
        try:
            return Path(value).read_bytes() if is_file and value else value
        except OSError as e:
            raise CommandError(f"{value} cannot be read: {e.strerror}") from e
    return loader, model, task_options.read(option, model.task)


def load_chosen(arguments):
    """The ModelLoader with the model of a command. Raises StartError."""
    settings = dataclasses.replace(chosen_model.load(), workers=1, log_format="text")  # this process gets all cores
    key, chosen = chosen_model.choose(settings, arguments.model)
    chosen_model.say_unused(settings, key, chosen)
    with only_errors_logged():  # that a fallback is in use is said here in fewer words
        loader = load_model(chosen)
    if loader.current.fallback_reason:
        chosen_model.say_fallback(loader.current, chosen)
    elif settings.models:  # as the API calls it
        loader.current.name, _, version = key.partition("@")
        loader.current.version = version or None
    return loader


@contextlib.contextmanager
def only_errors_logged():
    log = logging.getLogger("app.model_loader")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def answers(loader, options, paths, crops=None, how=None, overlays=None):
    """Yield (path, answer or ServiceError) in order, with a progress bar on a terminal.

    crops: folder for the pictures that the model sees; overlays: for those that show where it looked; how: of
    Model.answer.
    """
    model, settings = loader.current, loader.settings

    def work(path):
        def see(index, image):
            model.task.answer_kind().seen(image).save(crops / f"{flat_name(path)}-{index}.png")

        def answer():
            try:
                data = read_input(path, model.task, settings)
            except OSError as e:
                raise ServiceError(400, "MISSING_FILE", f"The file cannot be read: {e.strerror}.") from e
            found = model.answer(data, options, Call(deadline, stages, path.name, see if crops else None), how)
            if overlays:
                save_overlays(found, data, options, Call(deadline, stages, path.name), overlays / flat_name(path))
            return found

        def save_overlays(found, data, options, call, start):
            of_video = containers.is_video(data)
            shots = found["metadata"]["frames"] if of_video else [found["metadata"]]
            shown = {shot.get("index", 0): shot.get("explanations", ()) for shot in shots}
            for frame, _ in model.task.read_frames(data, of_video, options, call):
                for one in shown.get(frame.index, ()):
                    ending = re.sub(r"[^\w.]+", "_", one.get("class") or one["trait"])
                    blended(frame, one["overlay"]).save(f"{start}{f'-{frame.index}' * of_video}-{ending}.png")
        deadline, stages = Deadline(settings.request_timeout), Stages()
        try:
            return loader.slots.run(answer, deadline, stages, admitted=True)
        except ServiceError as e:
            return e
        except Exception as e:  # of a model of one's own, or of a crop that cannot be written
            logging.getLogger(__name__).debug("%s", path, exc_info=e)
            return ServiceError(500, "INTERNAL_ERROR", f"{type(e).__name__}: {e}".splitlines()[0])
    hub = get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)  # no stack trace
    with progress_bar(len(paths)) as bar:
        for path, answer in zip(paths, Pool(loader.slots.count).imap(work, paths), strict=True):
            bar.update()
            yield path, answer


def progress_bar(files):
    """A tqdm bar on standard error, if that is a terminal. Some terminals, such as serial ones, do not say how wide
    they are: tqdm would draw nothing there."""
    is_shown = files > 1 and sys.stderr.isatty()
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80 if is_shown else None
    return tqdm(total=files, unit="file", leave=False, disable=not is_shown, ncols=columns, nrows=20)


def flat_name(path):
    return "_".join(part for part in path.parts if part not in ("..", path.anchor))


def blended(frame, overlay):
    """An RGB picture of the overlay's size: a containers.Frame with the overlay, base64 of a PNG, on it."""
    with Image.open(io.BytesIO(base64.b64decode(overlay))) as image:
        heat = image.convert("RGBA")
    picture = frame.image.resize(heat.size, box=frame.box)
    picture.paste(heat, mask=heat)
    return picture


def read_input(path, task, settings):
    """What the task takes, from a file. Raises ServiceError, OSError."""
    data = path.read_bytes()
    if task.is_file:
        return Upload(data, path.name, path.name).read(settings)
    try:
        if "text" in task.takes:
            return data.decode("utf-8-sig").strip()
        value = json.loads(data)
    except ValueError as e:
        raise ServiceError(400, "INVALID_JSON", f"The file is no {task.takes[0]} in UTF-8.") from e
    return value[task.field] if isinstance(value, dict) and task.field in value else value


def find_files(paths, takes):
    """Yield files as they are, and all that the task takes below folders, sorted by path; folders below these that
    cannot be read, too: as files, they fail with the reason."""
    suffixes = {f".{suffix}" for kind in takes for suffix in SUFFIXES[kind]}
    for path in paths:
        if os.path.isdir(path):  # unlike Path.is_dir, it raises nothing
            found = []
            for folder, _, names in os.walk(path, onerror=lambda e, found=found: found.append(Path(e.filename))):
                files = [Path(folder, name) for name in names]
                found += [file for file in files if file.suffix.lower() in suffixes and may_be_file(file)]
            yield from sorted(found)
        else:
            yield path


def may_be_file(path):
    try:
        return path.is_file()
    except OSError:  # reading it will say why
        return True


def predict(arguments):
    for folder in filter(None, (arguments.save_crop, arguments.save, arguments.save_overlay)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CommandError(f"{folder} cannot be made: {e.strerror}") from e
    with Output(arguments) as output:
        loader, model, options = load(arguments)
        if arguments.save_overlay:
            if model.task.place.source.folder is None:
                raise CommandError("--save-overlay is for classifiers and ocean, not for models of your own")
            from app.tasks import insight
            options = {**options, "explain": True}
            insight.check(model.task, options)
        paths = list(find_files(arguments.paths, model.task.takes))
        if not paths:
            raise CommandError(f"there is nothing to predict in {', '.join(map(str, arguments.paths))}: {model.name} "
                               f"takes {' or '.join(model.task.takes)}")
        output.begin(model.task.answer_kind(), options, paths)
        if output.format != "json" and any(options.get(one.name) and one in model.task.options for one in (
                task_options.EMBEDDING, *[task_options.EXPLAIN] * (not arguments.save_overlay))):
            print("note: this table shows no maps or embeddings; use --json, or --save-overlay DIR for pictures of the "
                  "maps", file=sys.stderr)
        failed = 0
        for path, answer in answers(loader, options, paths, arguments.save_crop, overlays=arguments.save_overlay):
            failed += isinstance(answer, ServiceError)
            if arguments.save and not isinstance(answer, ServiceError):
                save_media(answer, arguments.save / path.name)
            output.add(path, answer)
    if failed and len(paths) > 1:
        print(f"{failed} of {len(paths)} files failed", file=sys.stderr)
    return 1 if failed else 0


def save_media(answer, path):
    """Write an answer that is media beside its input's name, and replace it by the path."""
    predictions = answer["predictions"]
    if isinstance(predictions, dict) and set(predictions) == {"media_type", "b64"}:
        subtype = predictions["media_type"].partition("/")[2].removeprefix("x-")
        path = path.with_name(path.name + (mimetypes.guess_extension(predictions["media_type"]) or f".{subtype}"))
        path.write_bytes(base64.b64decode(predictions["b64"]))
        answer["predictions"] = {"media_type": predictions["media_type"], "path": str(path)}


def evaluate(arguments, observing=None):
    """observing(arguments, loader, options, labels): an Observer of app/insight/evaluation.py."""
    header, rows = read_csv(arguments.labels)
    with Output(arguments) as output:
        loader, model, options = load(arguments)
        kind = model.task.answer_kind()
        options |= kind.evaluate_with
        labelled, unknown = read_labels(kind, header, rows, arguments.labels)
        paths = [arguments.folder / name for name, _ in labelled]
        labels, pairs = [label for _, label in labelled], []
        observer = observing(arguments, loader, options, labels) if observing else None
        if output.format == "csv":
            output.begin(kind, options, paths, has_labels=True)
        found = answers(loader, options, paths, how=observer and observer.how)
        for (path, answer), label in zip(found, labels, strict=True):
            if observer:
                observer.add(path, answer, label)
            if isinstance(answer, ServiceError):
                output.say(f"{path}: {answer.code}: {answer.message}")
            else:
                pairs.append((answer["predictions"], label))
            if output.format == "csv":
                output.add(path, answer, label)
        if not pairs:
            raise CommandError(f"none of the {len(paths)} files could be answered")
        measured = kind.measure(pairs)
        result = {"files": len(pairs), "failed": len(paths) - len(pairs), "unknown_labels": unknown, **measured}
        lines = observer.finish(result) if observer else []
        more = "".join(f", {number} more {what}" for number, what in (
            (result["failed"], "failed"), (unknown, "with unknown labels" if unknown > 1 else "with an unknown label"))
            if number)
        output.summary([json.dumps(result)] if output.format == "json" else
                       [*kind.lines(measured), *lines, f"{counted(len(pairs), 'file')}{more}"])
    if observer and observer.error:
        print(f"error: {observer.error}", file=sys.stderr)
    return 1 if result["failed"] or unknown or observer and observer.error else 0


def read_labels(kind, header, rows, csv_path):
    """([(path within the folder, label)], how many rows have a label that cannot be used); says which those are, on
    standard error. Raises CommandError if none can."""
    labelled, errors = [], []
    for line, row in rows:
        try:
            labelled.append((row[0], kind.label(header, row, f"line {line} of {csv_path}, {row[0]}")))
        except StartError as e:
            errors.append(e)
    if not labelled:
        raise CommandError(f"none of the {counted(len(rows), 'label')} can be used: {errors[0]}") from errors[0]
    for error in errors[:MOST_SHOWN]:
        print(shown(str(error)), file=sys.stderr)
    if len(errors) > MOST_SHOWN:
        print(f"and {len(errors) - MOST_SHOWN} more labels that cannot be used", file=sys.stderr)
    return labelled, len(errors)


def counted(number, what):
    return f"{number} {what}{'s' * (number != 1)}"


def read_csv(path):
    """(header, [(line, row)]), with rows of the same length, of a CSV file. Raises CommandError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            (_, header), *rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, ValueError, csv.Error) as e:
        raise CommandError(f"{path} cannot be read as CSV with a header") from e
    for line, row in rows:
        if len(row) != len(header):
            raise CommandError(f"line {line} of {path} has {len(row)} columns, the header {len(header)}")
    if not rows or len(header) < 2:
        raise CommandError(f"{path} has no labels: expected a header, then a line for each file")
    return [name.strip().lower() for name in header], rows
