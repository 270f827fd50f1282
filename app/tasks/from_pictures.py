"""Shared by the tasks that run a bundle's network on pictures and videos: decode → crop → preprocess → infer."""
from dataclasses import dataclass

import numpy as np

from app import engine
from app.engine.preprocess import Preprocessing, self_test_input
from app.errors import Deadline
from app.media import containers, pictures
from app.media.containers import Frame, is_video
from app.tasks import ModelError, Task
from app.tasks.options import ALL

# How far a self-test output may be off from torch's at fp32 (int8: from the int8 network's at export), relative to the
# largest. Measured: fp32 1e-6; bf16 0.004 (ResNet-50) to 0.13 (EfficientNet-Lite0); two classes swapped 1.
SELF_TEST_TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3, "int8": 0.3}
SELF_TEST_TIMEOUT_S = 60


def rounded(number):
    """With six digits; what a network calculates has no more that mean anything."""
    return float(f"{float(number):.6g}")  # NumPy formats its own numbers slowly


def needs_features(options):
    return any(options.get(name) for name in ("explain", "explain_class", "embedding"))


@dataclass
class Views:
    """What the network sees of one file: inputs, (3, H, W) float32 each, all views of the first frame that counts, then
    of the next; what the answer says of it: an entry for each of its frames, and for each that counts; and what the
    network makes of it: outputs (N, K) float32 and, if they are wanted, features (N, F, h, w) or (N, F)."""
    inputs: list
    shots: list
    counted: list
    image_size: list | None
    of_video: bool
    outputs: np.ndarray | None = None
    features: np.ndarray | None = None


class FromPictures(Task):
    """A task whose input is a picture or the chosen frames of a video. Subclasses define how a frame is cropped (cut),
    which views of it the network sees, and what its outputs mean (scores, predictions, metadata)."""
    takes = ("picture", "video")
    body_types = containers.MEDIA_TYPE
    how_to_send = ("send the file as multipart/form-data in the field 'file' (curl -F file=@NAME), as the raw body "
                   "with its image/* or video/* Content-Type, or in base64 as JSON: {\"image\": \"BASE64\"}")
    checked_options = ALL
    full_size = False      # whether pictures are decoded at full size, not at one that suffices for the network

    def __init__(self, place, manifest):
        super().__init__(place)
        self.manifest, self.name, self.labels, self.network = manifest, manifest.name, manifest.labels, manifest.network
        self.preprocessing, self.engine = Preprocessing(**manifest.preprocessing), None

    def start(self):
        self.engine = engine.create(self.manifest, self.place.source.folder, self.place.plan.streams, self.settings,
                                    self.device, self.place.rebuild)

    def self_test(self):
        """Run a warm-up inference and compare its output with the torch network's."""
        expected = np.array([self.manifest.self_test["outputs"]], np.float32)
        outputs = np.concatenate([self.engine.infer(self_test_input(self.preprocessing), Deadline(SELF_TEST_TIMEOUT_S),
                                                    alone) for alone in (False, True)])  # (2, K)
        error = np.abs(outputs - expected).max() / np.abs(expected).max()
        if not error <= SELF_TEST_TOLERANCE[self.engine.precision]:
            raise ModelError(f"the outputs are off by {error:.2g} of the largest")

    def cut(self, image, shot, options, call):
        """The RGB PIL image to analyse; None if this frame does not count. shot: the frame's entry in the answer."""
        return image

    def views(self, tensor, options):
        """[(3, H, W) float32] that the network sees of one preprocessed picture."""
        return [tensor]

    def nothing_counts(self):
        """The ServiceError if no frame counts."""
        raise NotImplementedError

    def scores(self, outputs):
        """(N, K) float32 outputs of the network → (N, K) scores, which can be averaged."""
        return outputs

    def predictions(self, scores, options):
        """(K,) scores in the form that answers use."""
        raise NotImplementedError

    def metadata(self, views, scores, options):
        """Additional members of the answer's metadata. scores: (frames that count, views, K)."""
        return {}

    def answer(self, data, options, call):
        if isinstance(data, bytes) and is_video(data):
            from app.tasks import videos  # with the first one
            return videos.answer(self, data, options, call)
        views = self.prepare(data, options, call)
        self.infer(views, options, call)
        return self.answer_of(views, options, call)

    def infer(self, views, options, call, alone=None):
        """Run the network on the views' inputs. alone: whether on all cores; by default if no other call is there."""
        features, alone = needs_features(options), self.place.slots.is_alone() if alone is None else alone
        with call.stages("inference"):
            batch = np.stack(views.inputs) if len(views.inputs) > 1 else views.inputs[0][None]  # one is not copied
            found = self.engine.infer(batch, call.deadline, alone, features)
        views.outputs, views.features = found if features else (found, None)

    def answer_of(self, views, options, call):
        """(predictions, members of the metadata) for what the network has made of the views."""
        scores = self.scores(views.outputs).reshape(len(views.counted), -1, views.outputs.shape[1])
        by_frame = scores.mean(axis=1)
        for shot, scores_of_frame in zip(views.counted, by_frame, strict=True):
            shot["predictions"] = self.predictions(scores_of_frame, options)
        predictions = shot["predictions"] if len(by_frame) == 1 else self.predictions(by_frame.mean(axis=0), options)
        metadata = {"media_type": "video" if views.of_video else "image", "image_size": views.image_size,
                    **self.metadata(views, scores, options)}
        if views.features is not None:
            from app.tasks import insight
            metadata |= insight.metadata(self, views, options, predictions, call)
        return predictions, metadata

    def prepare(self, data, options, call):
        """A file's bytes, or an upright RGB PIL image → Views."""
        if isinstance(data, bytes) and is_video(data):
            from app.tasks import videos
            return videos.prepare(self, data, options, call)
        views = Views([], [], [], None, False)
        for frame, size in self.read_frames(data, False, options, call):
            self.look_at(views, frame, size, options, call)
        if not views.inputs:
            raise self.nothing_counts()
        return views

    def look_at(self, views, frame, size, options, call):
        """Add a Frame of an upright (width, height) to the Views."""
        views.image_size = views.image_size or list(size)
        shot = {"index": frame.index, "time_s": frame.time_s}
        views.shots.append(shot)
        image = self.cut(frame.image, shot, options, call)
        call.deadline.check("face")
        if image is None:
            return
        views.counted.append(shot)
        if call.see:
            call.see(frame.index, image)
        with call.stages("preprocess"):
            views.inputs += self.views(self.preprocessing(image, frame.box), options)

    def read_frames(self, data, of_video, options, call):
        """Yield (Frame, upright (width, height)) for a picture or for the chosen frames of a video."""
        if not isinstance(data, bytes):
            yield Frame(0, 0.0, data), data.size
            return
        if not of_video:
            with call.stages("decode"):
                picture = pictures.read_image(data, self.settings.max_image_pixels,
                                              None if self.full_size else self.preprocessing.resize)
            call.deadline.check("decode")
            yield Frame(0, 0.0, picture.image, picture.box), picture.size
            return
        from app.media import video  # only once there is a video
        for frame in video.timed_frames(data, self.settings, call, options["frames"], options["at"]):
            yield frame, frame.image.size

    def identity(self):
        manifest = self.manifest
        return [manifest.name, manifest.task, manifest.labels, manifest.weights, manifest.network,
                manifest.preprocessing, manifest.engine, manifest.versions, self.engine.precision,
                self.device.partition(":")[0], manifest.quantization and manifest.files]  # each int8 network is another

    def gauges(self):
        return self.manifest.engine, self.engine.precision, (self.manifest.weights["sha256"] or "")[:12]

    def info(self):
        manifest, size = self.manifest, self.preprocessing.crop
        return {"engine": manifest.engine, "precision": self.engine.precision, "framework": self.engine.framework,
                "input_size": [size, size], "preprocessing": manifest.preprocessing, "num_classes": len(self.labels),
                "total_parameters": manifest.total_parameters,
                "weights": {"source": manifest.weights["source"], "sha256": manifest.weights["sha256"]},
                "quantization": manifest.quantization and {**manifest.quantization,
                                                           "limit": self.settings.accuracy_limit},
                "features": {name: manifest.features[name] for name in ("kind", "size", "reason")}}

    def hung_seconds(self):
        return self.engine.hung_seconds()

    def end(self):
        if self.engine:
            self.engine.close()
