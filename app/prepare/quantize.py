"""PRECISION=int8: quantizes the network's weights and activations to 8 bits, calibrated with the user's pictures, and
measures the cost in accuracy. Imports OpenVINO and NNCF; runs once, before the workers.
"""
import importlib.util
import logging

import numpy as np

from app.config import StartError
from app.engine.preprocess import softmax
from app.errors import ServiceError
from app.media import pictures
from app.prepare import bundles

log = logging.getLogger(__name__)

HELD_OUT = 5  # every fifth picture is for measuring, the others are for calibration


class QuantizeError(StartError):
    """Why there is no int8 network; the message is one line."""


def check(settings, engine):
    """Raises QuantizeError, before any slow step, if an int8 network cannot be made."""
    if engine != "openvino":
        raise QuantizeError("PRECISION is int8, which needs ENGINE=openvino on a CPU")
    if settings.calibration_dir is None:
        raise QuantizeError("PRECISION is int8, which needs CALIBRATION_DIR, a folder of typical pictures")
    if importlib.util.find_spec("nncf") is None:
        raise QuantizeError("PRECISION is int8, which needs NNCF to prepare the model: pip install nncf==3.4.0")


def quantized(model, preprocessing, settings):
    """(the int8 openvino.Model; how its probabilities on the held-out pictures differ from those of `model`: {pictures,
    top1_changes, max_dp, mean_dp_top1}).

    model: an fp32 openvino.Model of one (1, 3, H, W) input. Raises StartError.
    """
    import nncf
    nncf.set_log_level("ERROR")
    inputs = []
    for path in bundles.calibration_files(settings):
        try:
            picture = pictures.read_image(path.read_bytes(), settings.max_image_pixels, preprocessing.resize)
        except (ServiceError, OSError) as e:
            log.warning("not used for calibration: %s: %s", path, e)
            continue
        inputs.append(preprocessing(picture.image, picture.box)[None])
    held_out = inputs[::HELD_OUT]
    calibrating = [batch for i, batch in enumerate(inputs) if i % HELD_OUT]
    if len(inputs) < bundles.FEWEST_PICTURES:
        raise QuantizeError(f"CALIBRATION_DIR {settings.calibration_dir} has too few pictures that can be read")
    int8 = nncf.quantize(model, nncf.Dataset(calibrating), preset=nncf.QuantizationPreset.MIXED,
                         subset_size=len(calibrating))
    before, after = probabilities(model, held_out), probabilities(int8, held_out)
    best = before.argmax(axis=1)
    agreement = {"pictures": len(held_out), "top1_changes": int((best != after.argmax(axis=1)).sum()),
                 "max_dp": float(np.abs(before - after).max()),
                 "mean_dp_top1": float(np.abs(before - after)[np.arange(len(best)), best].mean())}
    log.info("int8 against fp32 on {pictures} held-out pictures: {top1_changes} top-1 changes; probabilities differ by "
             "at most {max_dp:.3f}, those of the best class by {mean_dp_top1:.3f} on average".format(**agreement))
    return int8, agreement


def outputs(model, batch):
    """An openvino.Model's outputs, with fp32 arithmetic around its int8 parts: float32 (N, K)."""
    import openvino
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(rows[None])[0] for rows in batch])


def probabilities(model, inputs):
    """[(1, 3, H, W)] → (N, K)."""
    return softmax(outputs(model, np.concatenate(inputs)))
