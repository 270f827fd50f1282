"""`python -m app predict` and `evaluate`: the API's answers without a server."""
import csv
import dataclasses
import json
import sys

import numpy as np
from gevent.pool import Pool
from tqdm import tqdm

from app import load_model
from app.api.uploads import Upload
from app.config import Settings, StartError
from app.errors import Deadline, ServiceError
from app.media import containers, pictures
from app.server.counters import Stages
from app.tasks import options as task_options
from app.tasks.options import TOP_K

SUFFIXES = {f".{extension}" for extension in (*pictures.EXTENSIONS, *containers.EXTENSIONS)}
TOP = 5  # for the top-5 accuracy


class CommandError(StartError):
    """A command that cannot run as given; the message is one line."""


def load(arguments):
    """(loader, model, options) for a command. Raises StartError, or ServiceError for a bad option."""
    settings = dataclasses.replace(Settings.load(), workers=1, log_format="text")  # this process gets all cores
    loader = load_model(settings)
    model = loader.current
    return loader, model, task_options.read(vars(arguments).get, loader.settings, model.task.options)


def answers(loader, options, paths, crops=None):
    """Yield (path, answer or ServiceError) in order, with a progress bar on a terminal.

    crops: folder for the pictures that the model sees.
    """
    model, settings = loader.current, loader.settings

    def work(path):
        def see(index, image):
            name = "_".join(part for part in path.parts if part not in ("..", path.anchor))
            model.preprocessing.resize_and_crop(image).save(crops / f"{name}-{index}.png")

        def answer():
            data = Upload(path.read_bytes(), path.name, path.name).read(settings)
            return model.task.answer(model, settings, data, options, deadline, stages, see if crops else None)
        deadline, stages = Deadline(settings.request_timeout), Stages()
        try:
            return loader.slots.run(answer, deadline, stages, admitted=True)
        except ServiceError as e:
            return e
        except OSError as e:
            return ServiceError(400, "MISSING_FILE", f"The file cannot be read: {e.strerror}.")
    progress = tqdm(Pool(loader.slots.count).imap(work, paths), total=len(paths), unit="file", leave=False,
                    disable=len(paths) < 2 or not sys.stderr.isatty())
    yield from zip(paths, progress, strict=True)


def find_files(paths):
    """Yield files as they are, and all pictures and videos below folders, sorted by path."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            yield path


def predict(arguments):
    paths = list(find_files(arguments.paths))
    if not paths:
        raise CommandError("there are no pictures or videos in " + ", ".join(map(str, arguments.paths)))
    try:
        if arguments.save_crop:
            arguments.save_crop.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CommandError(f"{arguments.save_crop} cannot be made: {e.strerror}") from e
    loader, model, options = load(arguments)
    classifies = TOP_K in model.task.options
    width = max(4, *(len(str(path)) for path in paths))
    if not arguments.json:
        print_row("file", width, ["classes"] if classifies else model.labels)
    failed = 0
    for path, answer in answers(loader, options, paths, arguments.save_crop):
        is_error = isinstance(answer, ServiceError)
        failed += is_error
        if arguments.json:
            body = answer.body() if is_error else {"status": "success", **answer}
            tqdm.write(json.dumps({"file": str(path), **body}, ensure_ascii=False))
        elif is_error:
            tqdm.write(f"{path}: {answer.code}: {answer.message}", file=sys.stderr)
        elif classifies:
            print_row(path, width, [f"{p['class']} {p['confidence']:.1%}" for p in answer["predictions"]])
        else:
            print_row(path, width, [f"{answer['predictions'][trait]:.3f}".rjust(len(trait)) for trait in model.labels])
    if failed and len(paths) > 1:
        print(f"{failed} of {len(paths)} files failed", file=sys.stderr)
    return 1 if failed else 0


def print_row(path, width, columns):
    tqdm.write("  ".join([str(path).ljust(width), *columns]))


def evaluate(arguments):
    header, rows = read_csv(arguments.labels)
    loader, model, options = load(arguments)
    classifies = TOP_K in model.task.options
    read_labels, measure = (class_labels, accuracy) if classifies else (trait_labels, closeness)
    if classifies:
        options["top_k"] = TOP
    expected = [read_labels(model, header, row, f"line {i} of {arguments.labels}") for i, row in enumerate(rows, 2)]
    paths, pairs = [arguments.folder / row[0] for row in rows], []
    for (path, answer), labels in zip(answers(loader, options, paths), expected, strict=True):
        if isinstance(answer, ServiceError):
            tqdm.write(f"{path}: {answer.code}: {answer.message}", file=sys.stderr)
        else:
            pairs.append((answer["predictions"], labels))
    if not pairs:
        raise CommandError(f"none of the {len(paths)} files could be answered")
    result = {"files": len(pairs), "failed": len(paths) - len(pairs), **measure(model, pairs)}
    if arguments.json:
        print(json.dumps(result))
    else:
        print_result(result)
    return 1 if result["failed"] else 0


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


def trait_labels(model, header, row, where):
    """(K,) labels of the traits in the model's order, from the columns named after them. Raises CommandError."""
    try:
        return [float(row[header.index(trait.lower())]) for trait in model.labels]
    except ValueError as e:
        raise CommandError(f"{where}: expected the columns {', '.join(model.labels)} with numbers, found "
                           f"{', '.join(header[1:])} with {', '.join(row[1:])}"[:300]) from e


def closeness(model, pairs):
    """1 - mean absolute error per trait and on average, and the same for always predicting the mean label."""
    predicted = np.array([[predictions[trait] for trait in model.labels] for predictions, _ in pairs])  # (N, K)
    labels = np.array([labels for _, labels in pairs])
    scores = 1 - np.abs(predicted - labels).mean(axis=0)
    constant = 1 - np.abs(labels - labels.mean(axis=0)).mean(axis=0)
    return {"one_minus_mae": {**dict(zip(model.labels, scores.tolist(), strict=True)), "mean": float(scores.mean())},
            "always_the_mean": {**dict(zip(model.labels, constant.tolist(), strict=True)),
                                "mean": float(constant.mean())}}


def class_labels(model, header, row, where):
    """The class_id of a row's label, in the column `label` or else the second one. Raises CommandError."""
    text = row[header.index("label") if "label" in header else 1].strip()
    if text in model.labels:
        return model.labels.index(text)
    if text.isdecimal() and int(text) < len(model.labels):
        return int(text)
    raise CommandError(f"{where}: {text[:60]!r} is neither a class name nor a class_id of {model.name}")


def accuracy(model, pairs):
    """Share of files whose label is the top-1 class, or among the top five."""
    ranks = [[p["class_id"] for p in predictions] for predictions, _ in pairs]
    labels = [label for _, label in pairs]
    return {f"top_{k}": float(np.mean([label in rank[:k] for label, rank in zip(labels, ranks, strict=True)]))
            for k in (1, TOP)}


def print_result(result):
    if "top_1" in result:
        print(f"top-1  {result['top_1']:.4f}\ntop-{TOP}  {result[f'top_{TOP}']:.4f}")
    else:
        width = max(map(len, result["one_minus_mae"]))
        print(f"{'':{width}}  1 - MAE  always the mean")
        for trait, score in result["one_minus_mae"].items():
            print(f"{trait:{width}}  {score:7.4f}  {result['always_the_mean'][trait]:15.4f}")
    print(f"{result['files']} files" + (f", {result['failed']} more failed" if result["failed"] else ""))
