"""What the answers of a task are: their JSON Schema, how a table shows them, whether two agree, and how `evaluate`
compares them with labels. Imported with the first use; see Task.answers."""
import json

import numpy as np

from app.config import StartError

TOP = 5  # for the top-5 accuracy
AGREE_WITHIN = 0.05  # of a trait: about what the mirror image or another frame of the same face changes


class LabelError(StartError):
    """A label that cannot be used; the message is one line."""


class UnknownClass(LabelError):
    """What was probably meant is only looked for if the message is shown: for each of many labels, that takes a while.
    """

    def __init__(self, where, text, task):
        self.where, self.text, self.task = where, text, task

    def __str__(self):
        from app.suggestions import did_you_mean
        return (f"{self.where}: {self.text!r} is neither a class name nor a class_id of {self.task.name}"
                f"{did_you_mean(self.text, self.task.labels)}")


def column(header, row):
    """The text in the column `label`, else in the second one."""
    return row[header.index("label") if "label" in header else 1].strip()


class Anything:
    """Answers of which nothing is known. An answer is compared with a label by its member `class` or `label`, if it has
    one; numbers are compared as such."""
    evaluate_with = {}  # {option: value} for `evaluate`

    def __init__(self, task):
        self.task, self.labels = task, getattr(task, "labels", None)

    def schema(self):
        """A JSON Schema of `predictions`."""
        return getattr(self.task, "answer_schema", {})

    def seen(self, image):
        """The PIL image that the model sees of the one that Call.see was told of."""
        return self.task.preprocessing.resize_and_crop(image) if hasattr(self.task, "preprocessing") else image

    def columns(self):
        """Titles of the columns of a table."""
        return ["answer"]

    def row(self, predictions):
        """An answer's columns."""
        return [json.dumps(predictions, ensure_ascii=False)[:200]]

    def csv_titles(self, options):
        """Titles of an answer's cells in CSV, for these options: of an object whose schema names its members, these."""
        properties = self.schema().get("properties") if isinstance(self.schema(), dict) else None
        return list(properties) if isinstance(properties, dict) and properties else ["answer"]

    def csv_cells(self, answer):
        """The cells, texts and numbers, of what Model.answer returned."""
        predictions, titles = answer["predictions"], self.csv_titles({})
        if titles != ["answer"] and isinstance(predictions, dict):
            return [cell(predictions.get(title)) for title in titles]
        return [cell(predictions)]

    def csv_label_titles(self):
        return ["label"]

    def csv_label_cells(self, label):
        return [label]

    def agree(self, predictions, others):
        """Whether two answers to the same request are the same in substance."""
        return predictions == others

    def label(self, header, row, where):
        """What `measure` takes, from a row of labels; where: that is, for messages. Raises LabelError."""
        return column(header, row)

    def measure(self, pairs):
        """{name: value} of [(predictions, label)]."""
        answers = [(value_of(predictions), label) for predictions, label in pairs]
        numbers = [(number(value), number(label)) for value, label in answers]
        result = {"equal": float(np.mean([str(value) == label or None not in pair and pair[0] == pair[1]
                                          for (value, label), pair in zip(answers, numbers, strict=True)]))}
        if not any(None in pair for pair in numbers):
            result["mean_absolute_error"] = float(np.mean([abs(value - label) for value, label in numbers]))
        return result

    def lines(self, result):
        """What `evaluate` prints of a result."""
        yield f"equal  {result['equal']:.4f}"
        if "mean_absolute_error" in result:
            yield f"mean absolute error  {result['mean_absolute_error']:.4g}"


class Classes(Anything):
    """[{"class", "class_id", "confidence"}] of a classifier, highest first."""
    evaluate_with = {"top_k": TOP}

    def schema(self):
        return {"type": "array", "description": "Highest first.", "minItems": 1, "maxItems": 10, "items": {
            "type": "object", "required": ["class", "class_id", "confidence"], "properties": {
                "class": {"type": "string"}, "class_id": {"type": "integer", "minimum": 0},
                "confidence": {"type": "number", "minimum": 0, "maximum": 1, "description": "Softmax probability."}}}}

    def columns(self):
        return ["classes"]

    def row(self, predictions):
        return [f"{p['class']} {p['confidence']:.1%}" for p in predictions]

    def csv_titles(self, options):
        most = min(options.get("top_k", TOP), len(self.labels))
        return ["class", "confidence", "class_id",
                *(f"{name}_{i}" for i in range(2, most + 1) for name in ("class", "confidence"))]

    def csv_cells(self, answer):
        best, *others = answer["predictions"]
        return [best["class"], round(best["confidence"], 6), best["class_id"],
                *(value for one in others for value in (one["class"], round(one["confidence"], 6)))]

    def csv_label_cells(self, label):
        return [self.labels[label]]

    def agree(self, predictions, others):
        return predictions[0]["class"] == others[0]["class"]

    def label(self, header, row, where):
        """The class_id of a class name or class_id."""
        text = column(header, row)
        if text in self.labels:
            return self.labels.index(text)
        if text.isdecimal() and int(text) < len(self.labels):
            return int(text)
        raise UnknownClass(where, text[:60], self.task)

    def measure(self, pairs):
        """The share of files whose label is the top-1 class, or among the top five."""
        ranks = [[p["class_id"] for p in predictions] for predictions, _ in pairs]
        labels = [label for _, label in pairs]
        return {f"top_{k}": float(np.mean([label in rank[:k] for label, rank in zip(labels, ranks, strict=True)]))
                for k in (1, TOP)}

    def lines(self, result):
        yield f"top-1  {result['top_1']:.4f}"
        yield f"top-{TOP}  {result[f'top_{TOP}']:.4f}"


class Traits(Anything):
    """{trait: score} of a regression."""

    def schema(self):
        return {"type": "object", "additionalProperties": {"type": "number"},
                "description": "The regression's raw score of each trait, about 0 to 1."}

    def columns(self):
        return self.labels

    def row(self, predictions):
        return [f"{predictions[trait]:.3f}".rjust(len(trait)) for trait in self.labels]

    def csv_titles(self, options):
        return [*self.labels, "face_detected"]

    def csv_cells(self, answer):
        return [*(round(answer["predictions"][trait], 6) for trait in self.labels),
                str(answer["metadata"].get("face_detected", "")).lower()]

    def csv_label_titles(self):
        return [f"{trait}_label" for trait in self.labels]

    def csv_label_cells(self, label):
        return label

    def agree(self, predictions, others):
        return all(abs(score - others.get(trait, float("inf"))) <= AGREE_WITHIN for trait, score in predictions.items())

    def label(self, header, row, where):
        """(K,) labels of the traits in the model's order, from the columns named after them."""
        try:
            return [float(row[header.index(trait.lower())]) for trait in self.labels]
        except ValueError as e:
            raise LabelError(f"{where}: expected the columns {', '.join(self.labels)} with numbers, found "
                             f"{', '.join(header[1:])} with {', '.join(row[1:])}"[:300]) from e

    def measure(self, pairs):
        """1 - mean absolute error per trait and on average, and the same for always predicting the mean label."""
        predicted = np.array([[predictions[trait] for trait in self.labels] for predictions, _ in pairs])  # (N, K)
        labels = np.array([labels for _, labels in pairs])
        scores = 1 - np.abs(predicted - labels).mean(axis=0)
        constant = 1 - np.abs(labels - labels.mean(axis=0)).mean(axis=0)
        return {"one_minus_mae": {**dict(zip(self.labels, scores.tolist(), strict=True)), "mean": float(scores.mean())},
                "always_the_mean": {**dict(zip(self.labels, constant.tolist(), strict=True)),
                                    "mean": float(constant.mean())}}

    def lines(self, result):
        width = max(map(len, result["one_minus_mae"]))
        yield f"{'':{width}}  1 - MAE  always the mean"
        for trait, score in result["one_minus_mae"].items():
            yield f"{trait:{width}}  {score:7.4f}  {result['always_the_mean'][trait]:15.4f}"


def value_of(predictions):
    if isinstance(predictions, dict):
        return next((predictions[name] for name in ("class", "label") if name in predictions), predictions)
    if isinstance(predictions, list) and predictions and isinstance(predictions[0], dict):
        return value_of(predictions[0])
    return predictions


def cell(value):
    """A cell of CSV: a number, or a text."""
    if value is None:
        return ""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else \
        json.dumps(value, ensure_ascii=False)


def number(value):
    """As a float, or None."""
    try:
        return None if isinstance(value, bool | dict | list) else float(value)
    except (TypeError, ValueError):
        return None
