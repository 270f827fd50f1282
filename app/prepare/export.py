"""Exports a loaded torch network to the files that an engine loads."""
import errno
import os
import shutil

import numpy as np
import torch

from app.config import StartError
from app.engine.preprocess import self_test_input
from app.prepare import bundles, features

FULL_BYTES = 16 * 2**20  # a disk with less than that left is full
TOLERANCE = 1e-3  # of OpenVINO's fp32, relative to the largest output; measured: 1e-6


def export(network, engine, folder, settings):
    """Write a loaded Network into a bundle's folder for this engine.

    Returns (file names, the network's outputs for self_test_input, the manifest's `quantization`, its `features`).
    Raises StartError.
    """
    test_input = self_test_input(network.preprocessing)
    with torch.inference_mode():
        reference = network.module(torch.from_numpy(test_input))[0].tolist()
    crop = network.preprocessing.crop
    found, head = features.find(network.module, network.head, crop)
    further = []
    if head is not None:
        save(lambda array, path: np.save(path, array), head, folder / "head.npy")
        further = ["head.npy"]
    if engine == "torch":
        save(torch.save, network.module.state_dict(), folder / "model.pt")
        return ["model.pt", *further], reference, None, found
    import openvino
    tap = features.tap(network.module, found)
    module = network.module if tap is None else features.WithFeatures(network.module, tap)
    with torch.inference_mode():
        model = openvino.convert_model(module, example_input=torch.zeros(1, 3, crop, crop), input=[1, 3, crop, crop])
    quantization = None
    if settings.precision in bundles.MEASURED:
        from app.prepare import costs, precision
        check(costs.outputs(costs.compiled(model), test_input)[0], np.array(reference))
        model, quantization = precision.choose(model, network, settings)
        if quantization["chosen"] == "int8":  # the self-test cannot compare it with torch's
            reference = costs.outputs(costs.compiled(model), test_input)[0].tolist()
    save(openvino.save_model, model, folder / "model.xml", compress_to_fp16=False)
    return ["model.xml", "model.bin", *further], reference, quantization, found


def save(writer, model, path, **options):
    """writer(model, path). Raises an OSError that names the file and says if the disk is full, where torch and OpenVINO
    only say that a stream has failed, and NumPy how many numbers were written."""
    try:
        writer(model, path, **options)
    except (RuntimeError, OSError) as e:
        why = str(e).strip().splitlines()[0]
        is_full = shutil.disk_usage(path.parent).free < FULL_BYTES
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC) if is_full else why, str(path)) from e


def check(outputs, reference):
    """Raises StartError unless OpenVINO's network answers as torch's: what is measured is the difference from it."""
    error = np.abs(outputs - reference).max() / np.abs(reference).max()
    if not error <= TOLERANCE:
        raise StartError(f"OpenVINO does not calculate this network as torch does: the outputs are off by {error:.2g} "
                         "of the largest")
