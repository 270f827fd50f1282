"""What a network of lower precision costs in accuracy, and how fast it is. Imports OpenVINO."""
import os
import time

import numpy as np

from app.engine.preprocess import softmax

CORES = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())  # memory each
ROUNDS, ROUND_S = 5, 0.2
SAME = 1e-3  # of the largest output


def compiled(model, precision="fp32", streams=CORES):
    """An openvino.Model on the CPU. precision: of what is not int8 in it."""
    import openvino
    return openvino.Core().compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams, "ENABLE_CPU_PINNING": False})


def outputs(network, batch):
    """The first output of a compiled network for each of (N, 3, H, W): float32 (N, K). Without AsyncInferQueue: a
    thread that has made its last callback may wait for the GIL while the network is freed, which waits for the thread.
    """
    requests, found = [network.create_infer_request() for _ in range(min(CORES, len(batch)))], []
    for i in range(len(batch) + len(requests)):
        request = requests[i % len(requests)]
        if i >= len(requests):
            request.wait()
            found.append(request.get_output_tensor(0).data[0].copy())
        if i < len(batch):
            request.start_async({0: batch[i][None]})
    return np.stack(found)


def depends_on_streams(model, batch):
    """Whether a network answers otherwise with several streams than with one. OpenVINO 2026.4 made that of an int8
    ShuffleNet with some of its concatenations restored to fp32: outputs that were off by more than their spread."""
    one, several = (outputs(compiled(model, streams=streams), batch) for streams in (1, max(2, CORES)))
    return bool(np.abs(one - several).max() > SAME * np.abs(one).max())


def divergence(reference, other, classifies):
    """How far outputs (N, K) are from those of fp32, finer than the cost: the mean Kullback-Leibler divergence of
    classes, the mean change of scores."""
    if not classifies:
        return float(np.abs(reference - other).mean())
    p, q = (np.maximum(softmax(each), 1e-12) for each in (reference, other))
    return float((p * np.log(p / q)).sum(axis=1).mean())


def cost(reference, other, classifies):
    """{"cost": the share of top classes that change, "changed": their number, "mean_change", "max_change": of the best
    class's probability}; of a regression {"cost": the mean change of a score, "mean_change", "max_change"}."""
    if not classifies:
        changes = np.abs(reference - other)
        return {"cost": float(changes.mean()), "mean_change": float(changes.mean()), "max_change": float(changes.max())}
    rows, best = np.arange(len(reference)), reference.argmax(axis=1)
    changes = np.abs(softmax(reference) - softmax(other))[rows, best]
    changed = int((best != other.argmax(axis=1)).sum())
    return {"cost": changed / len(best), "changed": changed, "mean_change": float(changes.mean()),
            "max_change": float(changes.max())}


def speeds(models, one):
    """{name: images per second of one core's time} of {name: (openvino.Model, precision)}, measured in turn."""
    requests = {name: compiled(*each, streams=1).create_infer_request() for name, each in models.items()}
    found = {name: [] for name in models}
    for request in requests.values():
        request.infer({0: one[None]})
    for _ in range(ROUNDS):
        for name, request in requests.items():
            count, start = 0, time.process_time()
            while (taken := time.process_time() - start) < ROUND_S or count < 2:
                request.infer({0: one[None]})
                count += 1
            found[name].append(count / taken)
    return {name: float(np.median(each)) for name, each in found.items()}
