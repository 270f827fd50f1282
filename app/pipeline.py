"""One file to one answer: decode → find the face → preprocess → predict. Used by the endpoints and by the command line
alike.
"""
import re
from dataclasses import dataclass

import numpy as np

from app import media, video
from app.config import FACE_METHODS, MOST_FRAMES, YES_OR_NO
from app.errors import invalid_parameter

LATEST_S = 1_000_000


@dataclass(frozen=True)
class Options:
    """What a caller may ask for; None for what the loaded model has no use for.

    top_k: how many classes; method: one of FACE_METHODS; tta: whether to average with the mirror image; of a video,
    frames: how many, or at: the second to look at.
    """
    top_k: int | None
    method: str | None
    tta: bool | None
    frames: int
    at: float | None


def options_from(option, settings, model):
    """Options from what the caller sent. option: name → text or None, as uploads.option_reader makes it.

    Raises ServiceError INVALID_PARAMETER, which names the option, also one that the model has no use for.
    """
    top_k = integer_option(option, "top_k", 1, 10, settings.top_k)
    method, tta = method_option(option, settings.face_method), tta_option(option, settings.tta)
    frames, at = integer_option(option, "frames", 1, MOST_FRAMES, settings.video_frames), seconds_option(option, "at")
    return Options(top_k, None, None, frames, at) if model.classifies else Options(None, method, tta, frames, at)


def integer_option(option, name, low, high, default):
    text = option(name)
    if text is None or text == "":
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise invalid_parameter(name, f"an integer from {low} to {high}", text[:40])
    return int(text)


def seconds_option(option, name):
    text = option(name)
    if text is None or text == "":
        return None
    if not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?", text) or not 0 <= float(text) <= LATEST_S:
        raise invalid_parameter(name, f"a number of seconds from 0 to {LATEST_S}", text[:40])
    return float(text)


def method_option(option, default):
    text = option("method")
    if text is None or text == "":
        return default
    method = text.lower().replace(" ", "+")  # what a + in a query says
    if method not in FACE_METHODS:
        raise invalid_parameter("method", "one of " + ", ".join(FACE_METHODS), text[:40])
    return method


def tta_option(option, default):
    for name in ("tta", "use_tta"):
        text = option(name)
        if text is not None and text != "":
            if text.lower() not in YES_OR_NO:
                raise invalid_parameter(name, "true or false", text[:40])
            return YES_OR_NO[text.lower()]
    return default


def answer(model, settings, data, options, deadline, stages, see=None):
    """The answer to one file's bytes: {"predictions": …, "metadata": …}.

    model: a loaded ModelLoader; stages: observability.Stages, whose timings become part of the metadata; see: called
    with (frame's number, RGB PIL image) of each picture just as it goes into the preprocessing.
    The caller holds a slot of model.scheduler. Raises ServiceError.
    """
    if not model.classifies:
        from app import faces  # imports OpenCV, which a classifier does without
    is_video = video.is_video(data)
    shots, inputs, image_size = [], [], None  # what metadata.frames says; (3, H, W) float32 each; of the first frame
    for frame, size in read_frames(model, settings, data, is_video, options, deadline, stages):
        image_size = image_size or list(size)
        shot, image = {"index": frame.index, "time_s": frame.time_s}, frame.image
        if not model.classifies:
            with stages("face"):
                box = faces.find_crop(image, options.method)
            deadline.check("face")
            shot |= {"face_box": box, "face_detected": box is not None}
            image = faces.cut_out(image, box) if box else image
        shots.append(shot)
        if options.method == "face" and box is None:
            continue  # such a frame does not count
        if see:
            see(frame.index, image)
        with stages("preprocess"):
            inputs.append(model.preprocessing(image))
            if options.tta:
                inputs.append(inputs[-1][:, :, ::-1])
    if not inputs:
        raise faces.no_face_found()
    with stages("inference"):
        scores = model.infer(np.stack(inputs), deadline)  # (frames that count × flips, K)
    counted = [shot for shot in shots if options.method != "face" or shot["face_detected"]]
    by_frame = scores.reshape(len(counted), -1, scores.shape[1]).mean(axis=1)
    for shot, scores_of_frame in zip(counted, by_frame, strict=True):
        shot["predictions"] = model.predictions(scores_of_frame, options.top_k)
    metadata = {"media_type": "video" if is_video else "image", "model": model.name, "device": model.device,
                "image_size": image_size}
    if not model.classifies:
        metadata |= {"backbone": model.manifest.network["backbone"], "method": options.method, "tta": options.tta,
                     "face_detected": all(shot["face_detected"] for shot in counted), "frames": shots,
                     "spread": model.predictions(scores.std(axis=0), None)}
    elif is_video:
        metadata["frames"] = shots
    return {"predictions": model.predictions(by_frame.mean(axis=0), options.top_k),
            "metadata": {**metadata, "inference_time": round(stages.timings_ms["inference"] / 1000, 6),
                         "timings_ms": stages.timings_ms}}


def read_frames(model, settings, data, is_video, options, deadline, stages):
    """Yield (video.Frame, (width, height) as a person sees it) of a picture or of the chosen frames of a video."""
    if not is_video:
        with stages("decode"):  # a face is searched, and a regression's score calculated, at the full size
            image, size = media.read_image(data, settings.max_image_pixels,
                                           model.preprocessing.resize if model.classifies else None)
        deadline.check("decode")
        yield video.Frame(0, 0.0, image), size
        return
    frames = video.frames(data, settings, deadline, options.frames, options.at)
    try:
        while True:
            with stages("decode"):
                frame = next(frames, None)
            if frame is None:
                return
            yield frame, frame.image.size
    finally:
        frames.close()
