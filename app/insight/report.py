"""The report of an evaluation: one HTML file that needs no other."""
import base64
import collections
import datetime
import io
import math
from pathlib import Path

import jinja2
import numpy as np

from app.api.uploads import Upload
from app.config import VERSION
from app.errors import Deadline, ServiceError
from app.insight import calibration, diagram
from app.media.containers import is_video
from app.server.counters import Stages
from app.tasks import Call

MOST_PICTURES = 18     # of each kind of mistake
MOST_OF_CLASS = 3      # of these, of the same true class
FEWEST_FILES = 10      # for an interval
MOST_CONFUSIONS = 15
MOST_IN_HEAT_MAP = 25  # classes
MOST_POINTS = 1500     # of a scatter plot
MOST_FAILURES = 50
THUMBNAIL = 176        # pixels of the longer side
PLOT = 220             # side of a scatter plot
MARGIN = 8             # within its frame
UNSEEN = ("explain", "explain_class", "embedding", "normalize")  # options that change no prediction
TEMPLATES = Path(__file__).parent / "templates"


def render(observer, result, fit):
    """The report as HTML. observer: evaluation.Observer; result: what evaluate prints; fit: calibration.Fit or None."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    content = of_classes(observer, result, fit) if observer.task.answers == "Classes" else of_traits(observer, result)
    html = environment.get_template("report.html").render(
        **content, model=observer.model, result=result, facts=facts(observer, result),
        failures=observer.failures[:MOST_FAILURES], failed=len(observer.failures),
        reasons=collections.Counter(e.code for _, e in observer.failures).most_common())
    return html.encode(errors="replace").decode()


def facts(observer, result):
    """[(name, value)] of the table that says what was measured."""
    model, manifest = observer.model, observer.task.manifest
    info = model.info()
    return [("Model", model.label + (f" (in place of {model.settings.model_name}: {model.fallback_reason})"
                                     if model.fallback_reason else "")),
            ("Weights", f"{manifest.weights['source']}, SHA-256 {manifest.weights['sha256']}"),
            ("Runs on", f"{info['engine']}, {info['device']}, {info['precision']}"),
            ("Input", f"{info['input_size'][0]} × {info['input_size'][1]}, resized to "
                      f"{info['preprocessing']['resize']}, {info['preprocessing']['interpolation']}"),
            ("Temperature", temperature(info, observer.arguments.calibrate))
            if observer.task.answers == "Classes" else ("Backbone", info["backbone"]),
            ("Options", ", ".join(
                f"{name}={str(value).lower() if isinstance(value, bool) else value}"
                for name, value in observer.options.items() if value is not None and name not in UNSEEN)),
            ("Labels", observer.arguments.labels), ("Folder", observer.arguments.folder),
            ("Files", f"{result['files']} answered, {result['failed']} failed"),
            ("Begun", f"{datetime.datetime.fromtimestamp(observer.started, datetime.UTC):%Y-%m-%d %H:%M} UTC"),
            ("Service", VERSION)]


def temperature(info, is_calibrated):
    found = (info["calibration"] or {}).get("temperature", "none")
    return f"{found}, before this calibration" if is_calibrated else found


def interval(of_files, low, high):
    """(low, high), or None if there are too few files for it to mean anything."""
    return (low, high) if of_files >= FEWEST_FILES else None


# --- classifiers ---

def of_classes(observer, result, fit):
    names = observer.task.labels
    labels = np.array([label for _, _, label, _ in observer.answered])
    best = np.array([predictions[0]["class_id"] for _, predictions, _, _ in observer.answered])
    confidence = np.array([min(1.0, predictions[0]["confidence"]) for _, predictions, _, _ in observer.answered])
    of_label = np.array([seen.of_label for *_, seen in observer.answered])
    entropy = np.array([seen.entropy for *_, seen in observer.answered])
    margin = np.array([seen.margin for *_, seen in observer.answered])
    right, count = best == labels, len(labels)
    served = calibration.Judged(confidence, right, -np.log(np.maximum(of_label, 1e-300)))
    accuracies = [(f"Top-{k}", result[f"top_{k}"], interval(count, *wilson(result[f"top_{k}"], count)))
                  for k in (1, 5)]

    def pictures(values, chosen):
        order = np.argsort(values, kind="stable")
        return [picture(observer, i, names[labels[i]], [
            (p["class"], p["confidence"], p["class_id"] == labels[i]) for p in observer.answered[i][1][:3]],
            f"{names[labels[i]]} was given {100 * of_label[i]:.1f} %; entropy {entropy[i]:.2f}, margin {margin[i]:.2f}")
            for i in few_of_each(order[chosen[order]].tolist(), labels.tolist())]
    galleries = [(title, f"{meaning} At most {MOST_OF_CLASS} of each class.", found) for title, meaning, found in (
        ("Worst mistakes", "The true class was given the lowest probability.", pictures(of_label, ~right)),
        ("Most confident mistakes", "Wrong answers with the highest confidence.", pictures(-confidence, ~right)),
        ("Least confident correct answers", "Right answers with the lowest confidence.", pictures(confidence, right)))]

    def plots(palette):
        return data_url(diagram.reliability_png([("as served", served.bins, served.ece, served.nll)],
                                                observer.model.name, palette)
                        if fit is None else diagram.before_and_after(observer.model.name, fit, palette), "png")
    pairs = collections.Counter(zip(labels[~right].tolist(), best[~right].tolist(), strict=True))
    totals = collections.Counter(labels.tolist())
    return {"kind": "classes", "accuracies": accuracies, "served": served, "fit": fit,
            "plots": plots(diagram.LIGHT), "plots_in_dark": plots(diagram.DARK),
            "galleries": galleries, "scatters": [], "traits": [],
            "confusions": [(names[true], names[said], n, n / totals[true])
                           for (true, said), n in pairs.most_common(MOST_CONFUSIONS)], "confusion_kinds": len(pairs),
            "heat_map": heat_map(names, labels, best),
            "sureness": [(name, median(values[right]), median(values[~right])) for name, values in (
                ("Confidence", confidence), ("Margin between the best two", margin), ("Entropy in nats", entropy))]}


def few_of_each(order, labels):
    """The first MOST_PICTURES of the files in `order`, MOST_OF_CLASS of the same true class."""
    chosen, totals = [], collections.Counter()
    for i in order:
        if len(chosen) < MOST_PICTURES and totals[labels[i]] < MOST_OF_CLASS:
            totals[labels[i]] += 1
            chosen.append(i)
    return chosen


def median(values):
    return f"{np.median(values):.3f}" if len(values) else "–"


def wilson(share, count, z=1.96):
    """The 95 % confidence interval of a share of `count` files (Wilson's score interval): (low, high)."""
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def heat_map(names, labels, best):
    """Rows of the confusion matrix, (class, [(how many, share of the row, said class)]), None for too many classes."""
    classes = sorted(set(labels.tolist()) | set(best.tolist()))
    if not 1 < len(classes) <= MOST_IN_HEAT_MAP:
        return None
    place = {class_id: i for i, class_id in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), int)
    np.add.at(matrix, ([place[i] for i in labels.tolist()], [place[i] for i in best.tolist()]), 1)
    return {"classes": [names[i] for i in classes],
            "rows": [(names[i], [(int(n), n / max(1, row.sum())) for n in row])
                     for i, row in zip(classes, matrix, strict=True)]}


# --- traits ---

def of_traits(observer, result):
    traits = observer.task.labels
    predicted = np.array([[predictions[trait] for trait in traits] for _, predictions, _, _ in observer.answered])
    labels = np.array([label for _, _, label, _ in observer.answered])
    errors = np.abs(predicted - labels)  # (N, K)
    one, mean = result["one_minus_mae"], result["always_the_mean"]
    rows = []
    for i, trait in enumerate(traits):
        both_vary = len(labels) > 1 and predicted[:, i].std() > 0 and labels[:, i].std() > 0
        half = half_interval(errors[:, i])
        rows.append((trait, one[trait], half, mean[trait],
                     f"{np.corrcoef(predicted[:, i], labels[:, i])[0, 1]:.2f}" if both_vary else "–"))
    rows.append(("mean", one["mean"], half_interval(errors.mean(axis=1)), mean["mean"], ""))
    worst = np.argsort(-errors.mean(axis=1), kind="stable")[:MOST_PICTURES]
    galleries = [("Worst pictures", "The largest mean absolute errors over all traits.", [
        picture(observer, i, None, [(f"{trait}: predicted {predicted[i, k]:.2f}, labelled {labels[i, k]:.2f}",
                                     errors[i, k], False) for k, trait in enumerate(traits)],
                f"mean absolute error {errors[i].mean():.3f}", is_share=False) for i in worst])]
    return {"kind": "traits", "traits": rows, "galleries": galleries,
            "scatters": [scatter(trait, labels[:, i], predicted[:, i]) for i, trait in enumerate(traits)]}


def half_interval(errors):
    """Half the width of the 95 % confidence interval of the mean of (N,) errors; None for too few files."""
    return 1.96 * errors.std() / math.sqrt(len(errors)) if len(errors) >= FEWEST_FILES else None


def scatter(trait, labels, predicted):
    """A plot of predicted against labelled scores: axes from low to high, points in the plot's pixels."""
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), MOST_POINTS)).astype(int))
    low, high = (float(bound(np.concatenate([labels, predicted]))) for bound in (np.min, np.max))
    low, high = math.floor(10 * low) / 10, max(math.ceil(10 * high) / 10, math.floor(10 * low) / 10 + 0.1)
    scale = (PLOT - 2 * MARGIN) / (high - low)
    return {"trait": trait, "low": low, "high": high, "side": PLOT, "margin": MARGIN, "shown": len(chosen), "points": [
        (round(MARGIN + (labels[i] - low) * scale, 1), round(PLOT - MARGIN - (predicted[i] - low) * scale, 1))
        for i in chosen]}


# --- pictures ---

def picture(observer, index, true, said, note, is_share=True):
    """An entry of a gallery. said: [(text, value for its bar, whether it is right)]."""
    path = observer.answered[index][0]
    return {"path": str(path), "thumbnail": thumbnail(observer, path), "label": true, "note": note, "said": said,
            "is_share": is_share}


def thumbnail(observer, path):
    """A data: URL of a small JPEG of a picture, or of a video's first frame; None if it cannot be read any more."""
    task, settings = observer.task, observer.loader.settings
    deadline, stages = Deadline(settings.request_timeout), Stages()

    def first_frame():
        data = Upload(path.read_bytes(), path.name, path.name).read(settings)
        frames = task.read_frames(data, is_video(data), observer.options, Call(deadline, stages, path.name))
        return next(iter(frames))[0].image
    try:
        image = observer.loader.slots.run(first_frame, deadline, stages, admitted=True)
    except (ServiceError, OSError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return data_url(buffer.getvalue(), "jpeg")


def data_url(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
