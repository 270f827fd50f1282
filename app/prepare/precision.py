"""PRECISION=int8 and PRECISION=auto: makes what is asked for, measures its cost on held-out pictures and its speed, and
chooses. The result is a manifest's `quantization`.
"""
import contextlib
import itertools
import logging
import math
import time

import numpy as np

from app.config import StartError
from app.prepare import bundles, costs
from app.prepare.progress import OutOfTime, Progress

INSTALL = "pip install -r app/prepare/requirements-int8.txt"
AT_ONCE = 16
FEW = 4
MEASURING = "measuring on held-out pictures"
CHOOSING_S, MEASURING_S = 600, 600  # processor time for which slow networks see fewer pictures,
FEWEST = 100                        # but at least so many, or the cost is not trusted
MAKING_S, TIME_S = 2400, 3600       # processor time, too, after which the int8 network is taken as it is by then, and
                                    # the measuring ends: less than an hour of an idle machine
EVALUATIONS = 10                    # of the pictures to choose layers by: without and with half, a quarter… restored

log = logging.getLogger(__name__)


class QuantizeError(StartError):
    """Why there is no int8 network; the message is one line."""


def check(settings, engine):
    """Raises StartError, before any slow step, if what PRECISION asks for cannot be made."""
    if settings.precision == "int8" and engine != "openvino":
        raise QuantizeError("PRECISION is int8, which needs ENGINE=openvino on a CPU")
    if settings.precision == "int8" and (packages := bundles.missing(settings)):
        raise QuantizeError(f"PRECISION is int8, which needs {' and '.join(packages)} to prepare the model: {INSTALL}")
    if settings.calibration_dir and engine == "openvino":
        bundles.calibration_files(settings)


def choose(model, network, settings):
    """(the openvino.Model to serve; the manifest's `quantization`).

    model: of a loaded Network, at fp32. Raises StartError.
    """
    progress = Progress()
    try:
        return chosen(model, network, settings, progress)
    finally:
        progress.close()


def chosen(model, network, settings, progress):
    import openvino
    start, name = time.process_time(), network.arguments["name"]
    native_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    absent, asked, limit = bundles.missing(settings), settings.precision, settings.accuracy_limit
    said = {"asked": asked, "limit": limit, "chosen": "fp32", "missing": absent, "pictures": None, "precisions": {},
            "processor": openvino.Core().get_property("CPU", "FULL_DEVICE_NAME"), "vnni": bundles.has_vnni(),
            "calibration": bundles.calibration_id(settings), "trusted": True, "time_up": None}
    if absent:
        log.warning("PRECISION=auto cannot try int8: %s; %s", not_installed(absent), INSTALL)
    tried = {"fp32": (model, "fp32")}
    if asked == "auto" and native_bf16 and "scikit-image" not in absent:
        tried["bf16"] = (model, "bf16")
    if len(tried) == 1 and absent:
        return model, said
    from app.prepare.samples import Samples
    progress("looking at the pictures", 0, 1)
    samples, classifies, layers = Samples(network, settings), network.task == "classification", {}
    if not absent:
        progress.end = start + MAKING_S
        try:
            int8, rounded, restored = make_int8(model, samples, limit, classifies, progress)
            if costs.depends_on_streams(int8, list(samples.take("held_out", FEW))):
                raise QuantizeError(f"OpenVINO calculates the int8 network of {name} otherwise with several streams "
                                    "than with one")
            tried["int8"], layers = (int8, "fp32"), {"int8_layers": len(rounded), "restored_layers": restored}
        except Exception as e:  # NNCF raises many types of errors for what it cannot quantize
            progress.close()  # or the log would go on in its line
            why = why_none(e, name, progress)
            if asked == "int8":
                raise QuantizeError(why) from e
            if isinstance(e, OutOfTime):
                said["time_up"] = why
            else:
                log.warning("PRECISION=auto goes on without int8, as %s", why)
        if "int8" in tried and progress.stopped:
            said["time_up"] = time_up(progress, f"{len(restored)} of {len(rounded) + len(restored)} layers are at fp32,"
                                                " which may be too few, more than needed, or others")
    progress.end = math.inf
    progress("measuring the speed", 0, 1)
    speeds = costs.speeds(tried, next(samples.take("held_out", 1)))
    count = affordable("held_out", MEASURING_S, sum(1 / speed for speed in speeds.values()))
    progress.end = max(start + TIME_S, time.process_time() + TIME_S - MAKING_S)
    measured, done = differences(tried, samples, count, classifies, progress)
    progress.close()
    if done < min(count, FEWEST):
        said["trusted"] = False
        said["time_up"] = "; ".join(filter(None, [said["time_up"], time_up(
            progress, f"{done} held-out pictures are too few to trust the cost")]))
    for one in tried:
        said["precisions"][one] = {**rounded_numbers(measured[one]), **(layers if one == "int8" else {}),
                                   "images_per_second": float(f"{speeds[one]:.3g}")}
    said["pictures"] = {**samples.about, "held_out": done}
    said["chosen"] = "int8" if asked == "int8" else bundles.fastest_within(said, limit)[0]
    log.info("%s: %s", name, sentence(said))
    if said["time_up"]:
        log.warning("%s: %s; PRECISION=%s serves %s", name, said["time_up"], asked, said["chosen"])
    if said["precisions"][said["chosen"]]["cost"] > limit:
        log.warning("%s: int8 costs %.4f, which is more than ACCURACY_LIMIT %g, with %d layers restored; it is served, "
                    "as PRECISION=int8 asks for it", name, said["precisions"]["int8"]["cost"],
                    limit, len(layers["restored_layers"]))
    return tried[said["chosen"]][0], said


def why_none(error, name, progress):
    """Why a network has no int8 one: the end of a message."""
    if isinstance(error, OutOfTime):
        return time_up(progress, f"{name} is too slow here for int8")
    if isinstance(error, QuantizeError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from src/")]
    return f"{name} cannot be quantized: {type(error).__name__}: {(lines or ['no reason given'])[0].strip()}"


def time_up(progress, consequence):
    limit = MAKING_S if progress.stopped != MEASURING else TIME_S
    return f"{limit / 60:g} minutes of processor time were used up while {progress.stopped}: {consequence}"


def make_int8(model, samples, limit, classifies, progress):
    """See quantize.within."""
    from app.prepare import quantize
    from app.prepare.samples import COUNTS
    calibrating = gathered(samples, "calibration", COUNTS["calibration"], progress)
    int8 = quantize.quantize(model, calibrating, progress)
    speed, = costs.speeds({"fp32": (model, "fp32")}, calibrating[0]).values()
    del calibrating
    choosing = gathered(samples, "choosing", affordable("choosing", CHOOSING_S, EVALUATIONS / speed), progress)
    return quantize.within(int8, model, choosing, limit, classifies, progress)


def affordable(group, processor_s, each_s):
    """How many inputs of a group there is time for, if each takes each_s of one core."""
    from app.prepare.samples import COUNTS
    return min(COUNTS[group], max(FEWEST, int(processor_s / each_s)))


def gathered(samples, group, number, progress):
    found = []
    for one in samples.take(group, number):
        found.append(one)
        progress(f"reading the pictures for {group}", len(found), number)
    return found


def differences(tried, samples, count, classifies, progress):
    """({precision: its costs.cost} on so many held-out inputs, or fewer if the time is up; their number). A few at a
    time, as all of them might not fit into memory."""
    networks, inputs = {name: costs.compiled(*each) for name, each in tried.items()}, samples.take("held_out", count)
    found, done = {name: [] for name in tried}, 0
    with contextlib.suppress(OutOfTime):
        while batch := list(itertools.islice(inputs, AT_ONCE)):
            for name, network in networks.items():
                found[name].append(costs.outputs(network, batch))
            done += len(batch)
            progress(MEASURING, done, count)
    found = {name: np.concatenate(each) for name, each in found.items()}
    return {name: costs.cost(found["fp32"], each, classifies) for name, each in found.items()}, done


def rounded_numbers(numbers):
    return {name: round(value, 5) for name, value in numbers.items()}


def sentence(said):
    """What the log says of a choice."""
    parts = []
    for name, one in said["precisions"].items():
        cost = f"changes {one['changed']} of {said['pictures']['held_out']} top classes" if "changed" in one else \
            f"changes a score by {one['cost']:.4f} on average"
        parts.append(f"{name} {one['images_per_second']:g} images/s" + (f", {cost}" if name != "fp32" else ""))
    return f"PRECISION={said['asked']} serves {said['chosen']} ({'; '.join(parts)}; ACCURACY_LIMIT {said['limit']:g})"


def not_installed(packages):
    return f"{' and '.join(packages)} {'is' if len(packages) == 1 else 'are'} not installed"


def table(said):
    """Lines for people: what was measured, and what was chosen."""
    if not said["precisions"]:
        return [f"precision: {said['chosen']}; nothing else could be tried, as {not_installed(said['missing'])}: "
                + INSTALL]
    classifies = "changed" in said["precisions"]["fp32"]
    what = "best probability" if classifies else "score"
    lines = [f"{'precision':<10}{'top-1 changed' if classifies else '':>15}{'mean change':>13}{'largest':>9}"
             f"{'images/s':>10}"]
    for name, one in said["precisions"].items():
        share = f"{one['changed']} ({100 * one['cost']:.1f} %)" if classifies else ""
        lines.append(f"{name:<10}{share:>15}{one['mean_change']:>13.4f}{one['max_change']:>9.3f}"
                     f"{one['images_per_second']:>10g}{'  chosen' if name == said['chosen'] else ''}"
                     + (f", {len(one['restored_layers'])} of "
                        f"{one['int8_layers'] + len(one['restored_layers'])} layers at fp32" if name == "int8" else ""))
    held, files = said["pictures"]["held_out"], said["pictures"]["files"]["held_out"]
    lines.append(f"changes of the {what} against fp32 on {held} held-out views of {files} files "
                 f"({said['pictures']['source']}); images/s on one core; ACCURACY_LIMIT {said['limit']:g}")
    return lines + ([said["time_up"]] if said.get("time_up") else [])

