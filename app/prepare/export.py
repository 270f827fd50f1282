"""Exports a loaded torch network to the files that an engine loads."""
import numpy as np
import torch

from app.config import StartError
from app.engine.preprocess import self_test_input
from app.prepare import bundles, features

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
        np.save(folder / "head.npy", head)
        further = ["head.npy"]
    if engine == "torch":
        torch.save(network.module.state_dict(), folder / "model.pt")
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
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return ["model.xml", "model.bin", *further], reference, quantization, found


def check(outputs, reference):
    """Raises StartError unless OpenVINO's network answers as torch's: what is measured is the difference from it."""
    error = np.abs(outputs - reference).max() / np.abs(reference).max()
    if not error <= TOLERANCE:
        raise StartError(f"OpenVINO does not calculate this network as torch does: the outputs are off by {error:.2g} "
                         "of the largest")
