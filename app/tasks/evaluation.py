"""How `python -m app evaluate` compares answers with labels. Each class has `options`, {name: value} to evaluate with;
`label`, which reads a row of labels; `measure`; and `lines`, which show the result."""
import numpy as np

from app.config import StartError

TOP = 5  # for the top-5 accuracy


class LabelError(StartError):
    """A label that cannot be used; the message is one line."""


def column(header, row):
    """The text in the column `label`, else in the second one."""
    return row[header.index("label") if "label" in header else 1].strip()


class Accuracy:
    """Of classifiers: the share of files whose label is the top-1 class, or among the top five."""
    options = {"top_k": TOP}

    def label(self, task, header, row, where):
        """The class_id of a row's label: a class name or a class_id."""
        text = column(header, row)
        if text in task.labels:
            return task.labels.index(text)
        if text.isdecimal() and int(text) < len(task.labels):
            return int(text)
        raise LabelError(f"{where}: {text[:60]!r} is neither a class name nor a class_id of {task.name}")

    def measure(self, task, pairs):
        ranks = [[p["class_id"] for p in predictions] for predictions, _ in pairs]
        labels = [label for _, label in pairs]
        return {f"top_{k}": float(np.mean([label in rank[:k] for label, rank in zip(labels, ranks, strict=True)]))
                for k in (1, TOP)}

    def lines(self, result):
        yield f"top-1  {result['top_1']:.4f}"
        yield f"top-{TOP}  {result[f'top_{TOP}']:.4f}"


class Closeness:
    """Of regressions by name: 1 - mean absolute error, and the same for always predicting the mean label."""
    options = {}

    def label(self, task, header, row, where):
        """(K,) labels of the traits in the model's order, from the columns named after them."""
        try:
            return [float(row[header.index(trait.lower())]) for trait in task.labels]
        except ValueError as e:
            raise LabelError(f"{where}: expected the columns {', '.join(task.labels)} with numbers, found "
                             f"{', '.join(header[1:])} with {', '.join(row[1:])}"[:300]) from e

    def measure(self, task, pairs):
        predicted = np.array([[predictions[trait] for trait in task.labels] for predictions, _ in pairs])  # (N, K)
        labels = np.array([labels for _, labels in pairs])
        scores = 1 - np.abs(predicted - labels).mean(axis=0)
        constant = 1 - np.abs(labels - labels.mean(axis=0)).mean(axis=0)
        return {"one_minus_mae": {**dict(zip(task.labels, scores.tolist(), strict=True)), "mean": float(scores.mean())},
                "always_the_mean": {**dict(zip(task.labels, constant.tolist(), strict=True)),
                                    "mean": float(constant.mean())}}

    def lines(self, result):
        width = max(map(len, result["one_minus_mae"]))
        yield f"{'':{width}}  1 - MAE  always the mean"
        for trait, score in result["one_minus_mae"].items():
            yield f"{trait:{width}}  {score:7.4f}  {result['always_the_mean'][trait]:15.4f}"


class Equality:
    """Of any other model: the share of answers that equal their label; of numbers, the mean absolute error as well.

    An answer is compared by its member `class` or `label`, if it has one.
    """
    options = {}

    def label(self, task, header, row, where):
        return column(header, row)

    def measure(self, task, pairs):
        answers = [(value_of(predictions), label) for predictions, label in pairs]
        result = {"equal": float(np.mean([str(value) == label or number(value) == number(label) is not None
                                          for value, label in answers]))}
        numbers = [(number(value), number(label)) for value, label in answers]
        if all(None not in pair for pair in numbers):
            result["mean_absolute_error"] = float(np.mean([abs(value - label) for value, label in numbers]))
        return result

    def lines(self, result):
        yield f"equal  {result['equal']:.4f}"
        if "mean_absolute_error" in result:
            yield f"mean absolute error  {result['mean_absolute_error']:.4g}"


def value_of(predictions):
    if isinstance(predictions, dict):
        return next((predictions[name] for name in ("class", "label") if name in predictions), predictions)
    if isinstance(predictions, list) and predictions and isinstance(predictions[0], dict):
        return value_of(predictions[0])
    return predictions


def number(value):
    """As a float, or None."""
    try:
        return None if isinstance(value, bool | dict | list) else float(value)
    except (TypeError, ValueError):
        return None
