"""Which tensors a task takes and returns under V2, and the way between them and its inputs and answers."""
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from app.api import json_body, uploads, values
from app.api.long_texts import Text
from app.errors import ServiceError
from app.open_inference.request_body import Output
from app.open_inference.tensors import invalid
from app.tasks.from_pictures import FromPictures, Views

MESSAGES = {"BYTES": "[N] or [N, 1]", "UINT8": "[height, width, 3] or [N, height, width, 3]"}
PLATFORMS = {"torch": "pytorch", "own": "python"}


@dataclass(frozen=True)
class Item:
    """One input of a request, unread. content: a memoryview, str or Text of BYTES; (H, W, 3) uint8 RGB; or
    (3, crop, crop) float32, preprocessed. field: its name in messages."""
    datatype: str
    content: Any
    field: str

    def identity(self):
        """What tells it from other inputs, for the cache: its bytes do not say what they are."""
        return [self.datatype, *getattr(self.content, "shape", [])]


def of(task, settings):
    """The signature of a task."""
    return OfPictures(task, settings) if isinstance(task, FromPictures) else OfOwn(task, settings)


class Signature:
    """inputs, outputs: tensors as in V2's metadata; defaults: names of the outputs if a request names none."""

    def __init__(self, task, settings):
        self.task, self.settings = task, settings

    def platform(self):
        engine = self.task.manifest.engine if hasattr(self.task, "manifest") else "own"
        return PLATFORMS.get(engine, engine)

    def items(self, inputs, deadline):
        """[Item] of a request's tensors. Raises ServiceError."""
        known = {one["name"]: one["datatype"] for one in self.inputs}
        takes = " or ".join(f"{name} ({datatype})" for name, datatype in known.items())
        for tensor in inputs:
            if known.get(tensor.name) != tensor.datatype:
                raise invalid(f"There is no input {tensor.name} ({tensor.datatype}); send {takes}.")
        if len(inputs) > 1:
            raise invalid(f"A request may have one input, got {len(inputs)}; send {takes}.")
        tensor = inputs[0]
        self.check_shape(tensor)
        if tensor.datatype == "BYTES":
            contents = tensor.elements()
        else:
            contents = tensor.array(deadline)
            contents = contents if contents.ndim == 4 else contents[None]
        return [Item(tensor.datatype, content, f"{tensor.name}[{i}]" if len(contents) > 1 else tensor.name)
                for i, content in enumerate(contents)]

    def check_shape(self, tensor):
        shape = tensor.shape
        if not self.is_right(tensor.datatype, shape):
            raise invalid(f"shape of {tensor.name} must be {self.takes_shape(tensor.datatype)}, got {shape}")
        number = shape[0] if len(shape) != 3 else 1
        if number == 0:
            raise ServiceError(400, "MISSING_INPUT", f"No input provided: {tensor.name} has no elements.")
        if number > self.settings.max_batch_files:
            raise ServiceError(400, "TOO_MANY_FILES", f"A request may have at most {self.settings.max_batch_files} "
                               f"inputs, found {number}; send the others in a second one.")

    def is_right(self, datatype, shape):
        return len(shape) == 1 or len(shape) == 2 and shape[1] == 1

    def takes_shape(self, datatype):
        return MESSAGES[datatype]

    def wanted(self, outputs, is_binary, options):
        """[Output] of a request; raises ServiceError for one that there is not."""
        if outputs is None:
            return [Output(name, is_binary) for name in self.defaults]
        known = {one["name"]: one["datatype"] for one in self.outputs}
        for output in outputs:
            if output.name not in known:
                raise invalid(f"There is no output {output.name}; ask for some of {', '.join(known)}.")
            if output.classification and (known[output.name] != "FP32" or output.name == "embedding"):
                raise invalid(f"classification is not possible with {output.name}.")
        return outputs

    def options(self, chosen, outputs):
        """The options of the task for these outputs. Raises ServiceError."""
        return chosen

    def how(self, item):
        """Model.answer's `how` for an input, or None."""
        return None

    def data(self, item):
        """What the task takes, in a slot's thread. Raises ServiceError."""
        raise NotImplementedError

    def array(self, output, found):
        """An output's array of the answers to all inputs: (N, K) float32, or object with bytes."""
        if output.name == "predictions":
            return texts([json.dumps(one["predictions"], ensure_ascii=False) for one in found])
        rows = [one["metadata"]["tensors"][output.name] for one in found]
        if output.name == "labels":
            return texts(rows)
        array = np.array(rows, np.float32)
        return classes(array, output.classification, self.task.labels) if output.classification else array


class OfPictures(Signature):
    """image: encoded files; pixels: RGB; tensor: preprocessed. A request has one of them."""

    def __init__(self, task, settings):
        super().__init__(task, settings)
        labels, side, features = len(task.labels), task.preprocessing.crop, task.manifest.features
        self.is_classifier = task.kind == "classification"
        self.scores = ["probabilities", "logits"] if self.is_classifier else ["scores"]
        self.inputs = [tensor("image", "BYTES", -1), tensor("pixels", "UINT8", -1, -1, -1, 3),
                       tensor("tensor", "FP32", -1, 3, side, side)]
        self.outputs = [*(tensor(name, "FP32", -1, labels) for name in self.scores),
                        tensor("labels", "BYTES", -1, -1 if self.is_classifier else labels),
                        tensor("predictions", "BYTES", -1)]
        if features["kind"]:
            self.outputs.append(tensor("embedding", "FP32", -1, features["size"]))
        self.defaults = [self.scores[0], "labels"]

    def is_right(self, datatype, shape):
        if datatype == "FP32":
            return len(shape) == 4 and shape[1:] == self.inputs[2]["shape"][1:]
        if datatype == "UINT8":
            return len(shape) in (3, 4) and shape[-1] == 3 and min(shape[-3:]) > 0
        return super().is_right(datatype, shape)

    def takes_shape(self, datatype):
        return "[N, {}, {}, {}]".format(*self.inputs[2]["shape"][1:]) if datatype == "FP32" else MESSAGES[datatype]

    def check_shape(self, tensor):
        super().check_shape(tensor)
        most = self.settings.max_image_pixels
        if tensor.datatype == "UINT8" and tensor.shape[-3] * tensor.shape[-2] > most:
            raise ServiceError(413, "IMAGE_TOO_LARGE", f"The picture has {tensor.shape[-2]} × {tensor.shape[-3]} "
                                                       f"pixels; at most {most:,} are allowed.")

    def wanted(self, outputs, is_binary, options):
        found = super().wanted(outputs, is_binary, options)
        return [*found, Output("embedding", is_binary)] if outputs is None and options["embedding"] else found

    def options(self, chosen, outputs):
        if chosen["explain"] or chosen["explain_class"]:
            raise invalid("explain is not available here; send the picture to /predict.")
        return {**chosen, "embedding": any(output.name == "embedding" for output in outputs)}

    def data(self, item):
        if item.datatype == "BYTES":
            return read(item, self.settings)
        return Image.fromarray(item.content) if item.datatype == "UINT8" else item.content

    def how(self, item):
        task = self.task

        def answer(data, options, call):
            views = prepared(task, data, options) if item.datatype == "FP32" else task.prepare(data, options, call)
            task.infer(views, options, call)
            if item.datatype == "FP32" and not np.isfinite(views.outputs).all():
                raise invalid(f"{item.field} has numbers that are too large: the network's outputs are not finite")
            predictions, metadata = task.answer_of(views, options, call)
            tensors = {self.scores[0]: pooled(task.scores(views.outputs), views),
                       "labels": [one["class"] for one in predictions] if self.is_classifier else task.labels}
            if self.is_classifier:
                tensors["logits"] = pooled(views.outputs, views)
            if "embedding" in metadata:
                from app.tasks import insight
                tensors["embedding"] = insight.embedding(task, views, options.get("normalize")).tolist()  # not rounded
            return predictions, {"tensors": tensors}
        return answer


class OfOwn(Signature):
    """A model of one's own: BYTES in, its answer as JSON out."""

    def __init__(self, task, settings):
        super().__init__(task, settings)
        kind = task.takes[0]
        self.inputs = [tensor(task.field or {"picture": "image", "json": "input"}.get(kind, kind), "BYTES", -1)]
        self.outputs, self.defaults = [tensor("predictions", "BYTES", -1)], ["predictions"]

    def data(self, item):
        if self.task.is_file:
            return read(item, self.settings)
        content = content_of(item)
        return values.text_of(self.task, content, item.field) if self.task.takes == ("text",) else values.checked(
            self.task, json_of(content, item.field), item.field)


def read(item, settings):
    """The file in an element of BYTES. Raises ServiceError."""
    content = item.content
    if isinstance(content, memoryview):
        file = io.BytesIO()
        file.writelines(content[at:at + uploads.STEP] for at in range(0, len(content), uploads.STEP))
        content = file.getvalue()
    return uploads.Upload(content, None, item.field).read(settings)


def content_of(item):
    """An element of BYTES as str, if it was in JSON, or bytes. Raises ServiceError."""
    if isinstance(item.content, Text):
        return item.content.value()
    return item.content if isinstance(item.content, str) else bytes(item.content)


def tensor(name, datatype, *shape):
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def prepared(task, tensor, options):
    """Views of a preprocessed (3, crop, crop) float32, as of a picture in which no face was looked for."""
    shot = {"index": 0, "time_s": 0.0, "face_box": None, "face_detected": False}
    tensor = tensor.copy()  # of the body, which is read-only; engines read writable arrays in place
    return Views(task.views(tensor, options), [shot], [shot], list(tensor.shape[:0:-1]), False)


def pooled(outputs, views):
    """(views, K) → mean over mirror images, then over frames, as a list of K floats: as in the task's answer."""
    return outputs.reshape(len(views.counted), -1, outputs.shape[1]).mean(axis=1).mean(axis=0).tolist()


def texts(rows):
    """str, or lists of equally many, → an object array of bytes."""
    array = np.array(rows, object)
    array.flat = [one.encode(errors="replace") for one in array.flat]
    return array


def classes(array, most, labels):
    """(N, K) → (N, most) "value:index:label", the highest first, as object array of bytes."""
    best = np.argsort(-array, axis=1, kind="stable")[:, :most]
    return texts([[f"{row[i]:.8g}:{i}:{labels[i]}" for i in order] for row, order in zip(array, best, strict=True)])


def json_of(content, field):
    """JSON types of an element. Raises ServiceError."""
    text = content.encode(errors="replace") if isinstance(content, str) else content
    if sum(map(text.count, (b",", b"[", b"{"))) > uploads.MOST_VALUES:
        raise invalid(f"{field} has more than {uploads.MOST_VALUES} lists, objects and members")
    try:
        return json.loads(text, object_pairs_hook=json_body.unique_members, parse_constant=json_body.no_constant,
                          parse_float=json_body.finite)
    except (ValueError, RecursionError) as e:
        why = f": {e}" if isinstance(e, json_body.NotJSON) else ""
        raise invalid(f"{field} must be JSON{why}") from e
