"""`python -m app predict` and `evaluate`: the API's answers without a server."""
import base64
import csv
import dataclasses
import io
import json
import logging
import mimetypes
import re
import sys
from pathlib import Path

from gevent.pool import Pool
from PIL import Image
from tqdm import tqdm

from app import load_model
from app.api.uploads import Upload
from app.config import Settings, StartError
from app.errors import Deadline, ServiceError
from app.media import containers, pictures
from app.server.counters import Stages
from app.tasks import Call
from app.tasks import options as task_options

SUFFIXES = {"picture": pictures.EXTENSIONS, "video": containers.EXTENSIONS, "text": ("txt",), "json": ("json",),
            "audio": ("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac")}  # of the files that folders are searched for


class CommandError(StartError):
    """A command that cannot run as given; the message is one line."""


def load(arguments):
    """(loader, model, options) for a command. Raises StartError, or ServiceError for a bad option."""
    settings = dataclasses.replace(Settings.load(), workers=1, log_format="text")  # this process gets all cores
    loader = load_model(settings)
    model = loader.current

    def option(name, is_file=False):
        value = vars(arguments).get(f"option:{name}")
        try:
            return Path(value).read_bytes() if is_file and value else value
        except OSError as e:
            raise CommandError(f"{value} cannot be read: {e.strerror}") from e
    return loader, model, task_options.read(option, model.task)


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
            data = read_input(path, model.task, settings)
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
        except OSError as e:
            return ServiceError(400, "MISSING_FILE", f"The file cannot be read: {e.strerror}.")
        except Exception as e:  # of a model of one's own
            logging.getLogger(__name__).debug("%s", path, exc_info=e)
            return ServiceError(500, "INTERNAL_ERROR", f"{type(e).__name__}: {e}".splitlines()[0])
    progress = tqdm(Pool(loader.slots.count).imap(work, paths), total=len(paths), unit="file", leave=False,
                    disable=len(paths) < 2 or not sys.stderr.isatty())
    yield from zip(paths, progress, strict=True)


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
    """Yield files as they are, and all that the task takes below folders, sorted by path."""
    suffixes = {f".{suffix}" for kind in takes for suffix in SUFFIXES[kind]}
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        else:
            yield path


def predict(arguments):
    for folder in filter(None, (arguments.save_crop, arguments.save, arguments.save_overlay)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CommandError(f"{folder} cannot be made: {e.strerror}") from e
    loader, model, options = load(arguments)
    if arguments.save_overlay:
        if model.task.place.source.folder is None:
            raise CommandError("--save-overlay is for classifiers and ocean, not for models of your own")
        from app.tasks import insight
        options = {**options, "explain": True}
        insight.check(model.task, options)
    paths = list(find_files(arguments.paths, model.task.takes))
    if not paths:
        raise CommandError(f"there is nothing to predict in {', '.join(map(str, arguments.paths))}: {model.name} takes "
                           f"{' or '.join(model.task.takes)}")
    width = max(4, *(len(str(path)) for path in paths))
    if not arguments.json:
        print_row("file", width, model.task.answer_kind().columns())
        if any(options.get(one.name) and one in model.task.options for one in (
                task_options.EMBEDDING, *[task_options.EXPLAIN] * (not arguments.save_overlay))):
            print("note: this table shows no maps or embeddings; use --json, or --save-overlay DIR for pictures of the "
                  "maps", file=sys.stderr)
    failed = 0
    for path, answer in answers(loader, options, paths, arguments.save_crop, overlays=arguments.save_overlay):
        is_error = isinstance(answer, ServiceError)
        failed += is_error
        if not is_error and arguments.save:
            save_media(answer, arguments.save / path.name)
        if arguments.json:
            body = answer.body() if is_error else {"status": "success", **answer}
            tqdm.write(printable(json.dumps({"file": str(path), **body}, ensure_ascii=False)))
        elif is_error:
            tqdm.write(f"{path}: {answer.code}: {answer.message}", file=sys.stderr)
        else:
            print_row(path, width, model.task.answer_kind().row(answer["predictions"]))
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


def print_row(path, width, columns):
    tqdm.write(printable("  ".join([str(path).ljust(width), *columns])))


def printable(text):
    """Without halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def evaluate(arguments, observing=None):
    """observing(arguments, loader, options, labels): an Observer of app/insight/evaluation.py."""
    header, rows = read_csv(arguments.labels)
    loader, model, options = load(arguments)
    kind = model.task.answer_kind()
    options |= kind.evaluate_with
    expected = [kind.label(header, row, f"line {i} of {arguments.labels}") for i, row in enumerate(rows, 2)]
    paths, pairs = [arguments.folder / row[0] for row in rows], []
    observer = observing(arguments, loader, options, expected) if observing else None
    found = answers(loader, options, paths, how=observer and observer.how)
    for (path, answer), label in zip(found, expected, strict=True):
        if observer:
            observer.add(path, answer, label)
        if isinstance(answer, ServiceError):
            tqdm.write(f"{path}: {answer.code}: {answer.message}", file=sys.stderr)
        else:
            pairs.append((answer["predictions"], label))
    if not pairs:
        raise CommandError(f"none of the {len(paths)} files could be answered")
    measured = kind.measure(pairs)
    result = {"files": len(pairs), "failed": len(paths) - len(pairs), **measured}
    lines = observer.finish(result) if observer else []
    if arguments.json:
        print(json.dumps(result))
    else:
        print(*kind.lines(measured), *map(printable, lines), sep="\n")
        print(f"{result['files']} files" + (f", {result['failed']} more failed" if result["failed"] else ""))
    if observer and observer.error:
        print(f"error: {observer.error}", file=sys.stderr)
    return 1 if result["failed"] or observer and observer.error else 0


def read_csv(path):
    """(header, rows of the same length) of a CSV file. Raises CommandError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as e:
        raise CommandError(f"{path} cannot be read as CSV with a header") from e
    for i, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise CommandError(f"line {i} of {path} has {len(row)} columns, the header {len(header)}")
    if not rows or len(header) < 2:
        raise CommandError(f"{path} has no labels: expected a header, then a line for each file")
    return [name.strip().lower() for name in header], rows
