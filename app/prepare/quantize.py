"""Makes int8 networks with NNCF, and restores their most sensitive layers to fp32 until they cost little enough.

Which layers are sensitive is measured, for each network anew: how far the outputs move if only this layer is int8. In
EfficientNet-Lite0 six of 63 cause most of the cost, the first convolution and some of the depthwise ones.
Imports OpenVINO and NNCF; runs once, before the workers.
"""
import contextlib
import io
import itertools
import logging
import math
import time

import numpy as np

from app.prepare import bundles, costs
from app.prepare.progress import OutOfTime

AIM = 0.7            # of the limit, on the pictures that layers are chosen by: others will cost a little more or less
MOST_RESTORED = 0.5  # of the layers
AT_ONCE = 16         # pictures, at least one per core
RANKED_BY = 24
RANKING_S = 400      # processor time
EXACT = 1e-3         # divergence of a network with all layers restored: rounding only
WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")


def quantize(model, calibrating, progress):
    """The int8 openvino.Model of an fp32 one with one input (1, 3, H, W). calibrating: [(3, H, W) float32]; progress:
    called with (a sentence, done, total)."""
    import nncf
    from nncf.quantization import advanced_parameters as advanced
    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level sets others' handlers, too
    attends = {op.get_type_name() for op in model.get_ordered_ops()} & {"Softmax", "ScaledDotProductAttention"}
    # Smoothing would move scales from activations to weights, which could then not be restored one by one.
    plain = advanced.AdvancedQuantizationParameters(
        overflow_fix=advanced.OverflowFix.FIRST_LAYER if bundles.has_vnni() else advanced.OverflowFix.ENABLE,
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(-1, -1))
    read = itertools.count(1)  # NNCF reads some of them again, for the biases

    def batch(one):
        progress("calibrating the int8 network", min(next(read), len(calibrating)), len(calibrating))
        return one[None]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(model, nncf.Dataset(calibrating, batch), subset_size=len(calibrating),
                             preset=nncf.QuantizationPreset.PERFORMANCE, advanced_parameters=plain,
                             model_type=nncf.ModelType.TRANSFORMER if attends else None)


def layers_of(model):
    """{name: operation} of those with an input that is rounded to 8 bits: convolutions, products, additions…"""
    return {op.get_friendly_name(): op for op in model.get_ordered_ops()
            if op.get_type_name() not in ("FakeQuantize", "Result")
            and any(is_rounded(op.input_value(i)) for i in range(op.get_input_size()))
            or op.get_type_name() in WEIGHTED and is_dequantized(op.input_value(1).get_node())}


def is_rounded(value):
    return value.get_node().get_type_name() == "FakeQuantize"


def is_dequantized(node):
    """Whether it makes weights of 8-bit ones: of Constant → Convert → Multiply, the last."""
    return node.get_type_name() == "Multiply" and node.input_value(0).get_node().get_type_name() in (
        "Convert", "Subtract")


def restored(int8, model, names):
    """A copy of the int8 network in which the layers of these names calculate as in the fp32 one."""
    from openvino import opset13
    copy, originals = int8.clone(), {op.get_friendly_name(): op for op in model.get_ordered_ops()}

    def restore_constant(op, i):
        original = originals.get(op.get_friendly_name())
        constant = original and original.input_value(i).get_node()
        if constant and constant.get_type_name() == "Constant":
            op.input(i).replace_source_output(opset13.constant(constant.data.copy()).output(0))
    for name, op in layers_of(copy).items():
        if name not in names:
            continue
        for i in range(op.get_input_size()):
            if is_rounded(op.input_value(i)):
                op.input(i).replace_source_output(op.input_value(i).get_node().input_value(0))
        if op.get_type_name() in WEIGHTED:
            restore_constant(op, 1)
            for target in op.output(0).get_target_inputs():  # NNCF has corrected the bias for int8
                if target.get_node().get_type_name() == "Add":
                    restore_constant(target.get_node(), 1)
    return copy


def within(int8, model, choosing, limit, classifies, progress):
    """(the int8 network with as few layers restored as keep the cost on some pictures within AIM · limit, or with
    MOST_RESTORED; names of the layers that are int8 in it; names of the restored ones). If the time is up, it is the
    best so far.

    choosing: [(3, H, W)]; progress: a Progress.
    """
    names, best, by_cost, high = list(layers_of(int8)), int8, [], 0

    def outputs(network, step, number, runs):
        network, found = costs.compiled(network), []
        for i in range(0, len(choosing), AT_ONCE):
            found.append(costs.outputs(network, choosing[i:i + AT_ONCE]))
            progress(step, number * len(choosing) + i + len(found[-1]), runs * len(choosing))
        return np.concatenate(found)

    def costs_little(found):
        return costs.cost(reference, found, classifies)["cost"] <= AIM * limit
    with contextlib.suppress(OutOfTime):
        reference = outputs(model, "comparing int8 with fp32", 0, 2)
        if costs_little(outputs(int8, "comparing int8 with fp32", 1, 2)):
            return int8, names, []
        by_cost = ranked(int8, model, names, choosing, reference, classifies, progress)
        low, high = 0, len(by_cost)  # the fewest are in (low, high]
        best = restored(int8, model, by_cost)
        number, runs = 0, math.ceil(math.log2(max(1, high)))
        while low + 1 < high:
            middle = (low + high) // 2
            network = restored(int8, model, by_cost[:middle])
            if costs_little(outputs(network, "choosing the layers to restore", number, runs)):
                high, best = middle, network
            else:
                low = middle
            number += 1
    chosen = by_cost[:high]
    return best, [name for name in names if name not in chosen], chosen


def ranked(int8, model, names, choosing, reference, classifies, progress):
    """The names of the most sensitive layers, at most MOST_RESTORED of all, by falling cost; those that OpenVINO cannot
    calculate at int8 among others at fp32 come first, those that RANKING_S was too short for last."""
    picked = np.linspace(0, len(choosing) - 1, min(RANKED_BY, len(choosing))).astype(int)
    inputs, reference = [choosing[i] for i in picked], reference[picked]

    def divergence(names):
        return costs.divergence(reference, costs.outputs(costs.compiled(restored(int8, model, names)), inputs),
                                classifies)
    if not divergence(names) < EXACT:
        return []  # a network in which removing the rounding does not restore fp32
    found, end = dict.fromkeys(names, 0.0), time.process_time() + RANKING_S
    for i, name in enumerate(names):
        if time.process_time() > end:
            break
        try:
            found[name] = divergence([other for other in names if other != name])
        except RuntimeError:  # OpenVINO cannot compile it
            found[name] = math.inf
        progress("measuring how sensitive each layer is", i + 1, len(names))
    return sorted(names, key=lambda name: -found[name])[:max(1, int(MOST_RESTORED * len(names)))]
