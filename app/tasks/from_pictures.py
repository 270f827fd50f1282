"""Shared by the tasks on pictures and videos: from one file to one answer, decode → crop → preprocess → infer."""
import numpy as np

from app.media import pictures
from app.media.containers import Frame, is_video


class FromPictures:
    """A task whose input is a picture or the chosen frames of a video.

    Subclasses define how a frame is cropped, which views of it the network sees, and what its outputs mean.
    """
    kind = None        # the task's name, for /info
    options = ()       # those of options.ALL that it uses
    full_size = False  # whether pictures are decoded at full size, not at one that suffices for the network

    def __init__(self, manifest):
        self.labels, self.network = manifest.labels, manifest.network

    def cut(self, image, shot, options, deadline, stages):
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

    def metadata(self, shots, counted, scores, options, of_video):
        """Additional members of the answer's metadata. shots: of all frames; counted: of those that count."""
        return {}

    def answer(self, model, settings, data, options, deadline, stages, see=None):
        """The answer to one file's bytes: {"predictions": …, "metadata": …}.

        options: {name: value} of self.options; stages: counters.Stages, whose timings become part of the metadata; see:
        called with (frame's number, RGB PIL image) for each picture right before preprocessing. Raises ServiceError.
        """
        of_video = is_video(data)
        shots, counted, inputs, image_size = [], [], [], None
        for frame, size in self.read_frames(model, settings, data, of_video, options, deadline, stages):
            image_size = image_size or list(size)
            shots.append({"index": frame.index, "time_s": frame.time_s})
            image = self.cut(frame.image, shots[-1], options, deadline, stages)
            deadline.check("face")
            if image is None:
                continue
            counted.append(shots[-1])
            if see:
                see(frame.index, image)
            with stages("preprocess"):
                inputs += self.views(model.preprocessing(image, frame.box), options)
        if not inputs:
            raise self.nothing_counts()
        with stages("inference"):
            scores = self.scores(model.infer(np.stack(inputs), deadline))  # (frames that count × views, K)
        by_frame = scores.reshape(len(counted), -1, scores.shape[1]).mean(axis=1)
        for shot, scores_of_frame in zip(counted, by_frame, strict=True):
            shot["predictions"] = self.predictions(scores_of_frame, options)
        return {"predictions": self.predictions(by_frame.mean(axis=0), options),
                "metadata": {"media_type": "video" if of_video else "image", "model": model.name,
                             "device": model.device, "image_size": image_size,
                             **self.metadata(shots, counted, scores, options, of_video),
                             "inference_time": round(stages.timings_ms["inference"] / 1000, 6),
                             "timings_ms": stages.timings_ms}}

    def read_frames(self, model, settings, data, of_video, options, deadline, stages):
        """Yield (Frame, upright (width, height)) for a picture or for the chosen frames of a video."""
        if not of_video:
            with stages("decode"):
                picture = pictures.read_image(data, settings.max_image_pixels,
                                              None if self.full_size else model.preprocessing.resize)
            deadline.check("decode")
            yield Frame(0, 0.0, picture.image, picture.box), picture.size
            return
        from app.media import video  # only once there is a video
        frames = video.frames(data, settings, deadline, options["frames"], options["at"])
        try:
            while True:
                with stages("decode"):
                    frame = next(frames, None)
                if frame is None:
                    return
                yield frame, frame.image.size
        finally:
            frames.close()
