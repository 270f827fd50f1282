"""`evaluate --calibrate` and `--report`: what is remembered of each answer, and what becomes of it."""
import json
import tempfile
import time
from typing import NamedTuple

import numpy as np

from app import cli
from app.config import StartError
from app.engine.calibration import FILE
from app.errors import ServiceError
from app.insight import calibration, diagram
from app.insight.files import replacing

DIAGRAM = "calibration.png"  # beside calibration.json


class Seen(NamedTuple):
    """Of a classifier's answer: the true class's probability, the entropy in nats, and the margin between the best two.
    """
    of_label: float
    entropy: float
    margin: float


class Observer:
    """Sees each answer of an evaluation. Of a file it keeps some numbers; of pictures nothing, and the logits, if they
    are needed, in a temporary file: it has room for any number of files."""

    def __init__(self, arguments, loader, options, labels):
        """Raises StartError if the model has nothing to observe, or the results could not be written."""
        self.arguments, self.loader, self.options = arguments, loader, options
        self.model, self.task, self.started = loader.current, loader.current.task, time.time()
        asked = "--calibrate" if arguments.calibrate else "--report"
        if self.task.answers not in ("Classes", "Traits") or self.task.place.source.folder is None:
            raise cli.CommandError(f"{asked} is for classifiers{' and ocean' * (not arguments.calibrate)}, not for "
                                   "models of your own")
        if arguments.calibrate and self.task.answers != "Classes":
            raise cli.CommandError(f"--calibrate is for classifiers: {self.model.name} has no probabilities")
        self.folder = self.task.place.source.folder
        if arguments.calibrate:
            calibration.check_number(len(labels))
        for path in ([self.folder / FILE] if arguments.calibrate else []) + list(filter(None, [
                arguments.report])):
            with replacing(path, only_try=True):
                pass
        # (path, predictions, label, Seen); (path, a ServiceError without the traceback, which keeps the file's bytes)
        self.answered, self.failures = [], []
        self.counts, self.logits = [], None  # views per file; a file of (views, K) float32
        self.error = None  # a StartError, which the other results survive

    def how(self, data, options, call):
        """Of Model.answer: leaves what the answer was made from in its metadata."""
        views = self.task.prepare(data, options, call)
        self.task.infer(views, options, call)
        predictions, metadata = self.task.answer_of(views, options, call)
        scores = self.task.scores(views.outputs).mean(axis=0)  # (K,), as each frame has equally many views
        return predictions, {**metadata, "outputs": views.outputs, "scores": scores}

    def add(self, path, answer, label):
        if isinstance(answer, ServiceError):
            self.failures.append((path, ServiceError(answer.status, answer.code, answer.message)))
            return
        outputs, scores = (answer["metadata"].pop(name) for name in ("outputs", "scores"))
        self.answered.append((path, answer["predictions"], label,
                              seen(scores, label) if self.task.answers == "Classes" else None))
        if self.arguments.calibrate:
            self.logits = self.logits or tempfile.TemporaryFile()  # noqa: SIM115 - closed in finish
            self.logits.write(np.ascontiguousarray(outputs, np.float32).tobytes())
            self.counts.append(len(outputs))

    def finish(self, result):
        """Write what was asked for; add its numbers to the result. Returns lines to print. Raises StartError."""
        lines, fit = [], None
        if self.arguments.calibrate:
            try:
                fit = self.fit()
                result["calibration"] = self.calibrated(fit)
                lines += calibration_lines(fit)
                lines += self.store(fit, result["calibration"])
            except StartError as e:
                self.error = e
        if self.arguments.report:
            from app.insight import report
            html = report.render(self, result, fit)
            with replacing(self.arguments.report) as path:
                path.write_text(html, encoding="utf-8")
            lines.append(f"report: {self.arguments.report}")
        return lines

    def fit(self):
        labels = np.array([label for _, _, label, _ in self.answered])
        with self.logits:
            self.logits.flush()
            logits = np.memmap(self.logits, np.float32, "r").reshape(sum(self.counts), -1)
        return calibration.fit(logits, np.array(self.counts), labels)

    def calibrated(self, fit):
        """The content of calibration.json."""
        return {"temperature": round(fit.temperature, 6), "precision": self.task.engine.precision,
                "pictures": len(self.answered),
                "ece_before": round(fit.before.ece, 6), "ece_after": round(fit.after.ece, 6),
                "nll_before": round(fit.before.nll, 6), "nll_after": round(fit.after.nll, 6),
                "accuracy": round(float(fit.before.right.mean()), 6), "bins": calibration.BINS,
                "folds": calibration.FOLDS, "fold_temperatures": [round(t, 6) for t in fit.by_fold],
                "weights_sha256": self.task.manifest.weights["sha256"],
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}

    def store(self, fit, content):
        if not fit.helps:
            raise cli.CommandError(
                f"nothing is stored: T = {fit.temperature:.4f} does not help on files that it was not fitted on (NLL "
                f"{fit.before.nll:.4f} before, {fit.after.nll:.4f} after; ECE {fit.before.ece:.4f} before, "
                f"{fit.after.ece:.4f} after)")
        replaced = self.task.calibration and (f"replaces the temperature {self.task.calibration['temperature']:.4f} of "
                                              f"{self.task.calibration.get('created', 'an unknown date')}")
        with replacing(self.folder / DIAGRAM) as path:
            path.write_bytes(diagram.before_and_after(self.model.name, fit))
        with replacing(self.folder / FILE) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")
        return [f"stored: {self.folder / FILE}", *filter(None, [replaced]), f"diagram: {self.folder / DIAGRAM}",
                "a running service uses it after: python -m app reload",
                "to go back, remove the stored file and reload"]


def calibration_lines(fit):
    yield (f"temperature  {fit.temperature:.4f} (fitted on four fifths of the files: {min(fit.by_fold):.4f} to "
           f"{max(fit.by_fold):.4f})")
    yield "             before   after"
    yield f"ECE          {fit.before.ece:.4f}  {fit.after.ece:.4f}"
    yield f"NLL          {fit.before.nll:.4f}  {fit.after.nll:.4f}"
    yield "before: T = 1; after: each file is judged with a temperature that was fitted without it"
    if fit.ece_rises and fit.helps:
        yield "warning: the ECE rises although the NLL falls: look at the diagram before you use this temperature"


def seen(probabilities, label):
    *_, second, best = [0.0, *np.sort(probabilities)[-2:]]
    positive = probabilities[probabilities > 0]
    return Seen(float(probabilities[label]), float(-(positive * np.log(positive)).sum()), float(best - second))
