"""One file to one answer: decode → preprocess → predict. Used by the endpoints and by the command line alike."""
import re
from dataclasses import dataclass

from app import media
from app.errors import invalid_parameter


@dataclass(frozen=True)
class Options:
    """What a caller may ask for. top_k: how many classes."""
    top_k: int


def options_from(option, settings, model):
    """Options from what the caller sent. option: name → text or None, as uploads.option_reader makes it.

    Raises ServiceError INVALID_PARAMETER, which names the option.
    """
    return Options(top_k=integer_option(option, "top_k", 1, 10, settings.top_k))


def integer_option(option, name, low, high, default):
    text = option(name)
    if text is None or text == "":
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise invalid_parameter(name, f"an integer from {low} to {high}", text[:40])
    return int(text)


def answer(model, settings, data, options, deadline, stages):
    """The answer to one file's bytes: {"predictions": …, "metadata": …}.

    model: a loaded ModelLoader; stages: observability.Stages, whose timings become part of the metadata.
    The caller holds a slot of model.scheduler. Raises ServiceError.
    """
    with stages("decode"):
        image, image_size = media.read_image(data, settings.max_image_pixels, model.preprocessing.resize)
        deadline.check("decode")
    with stages("preprocess"):
        batch = model.preprocessing(image)[None]  # (1, 3, H, W)
    with stages("inference"):
        scores = model.infer(batch, deadline)[0]
    return {"predictions": model.top_k(scores, options.top_k),
            "metadata": {"model": model.name, "device": model.device, "image_size": list(image_size),
                         "inference_time": round(stages.timings_ms["inference"] / 1000, 6),
                         "timings_ms": stages.timings_ms}}
