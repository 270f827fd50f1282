"""The limit: the service's own decoding, preprocessing and inference in a plain loop, one process per core, no HTTP.

    python -m bench.limit < specification.json > result.json

Specification (JSON object): variables of the service; processes; phases, each [name, files, expected, tolerance,
working processes, warm_s, seconds]. Result: {name: {throughput, latency_ms, wrong}}.
"""
import json
import multiprocessing
import sys
import time
from pathlib import Path

from app import load_model
from app.config import Settings
from app.errors import Deadline
from app.media import pictures
from bench.load import percentiles


def work(number, spec, barrier, results):
    # as many workers as processes: each plans for one core
    settings = Settings.parse({**spec["variables"], "WORKERS": str(spec["processes"])})
    model = load_model(settings).current.task
    for name, files, expected, tolerance, at_work, warm_s, seconds in spec["phases"]:
        contents = [Path(file).read_bytes() for file in files]
        barrier.wait()
        latencies, wrong = [], 0
        if number < at_work:
            started = time.perf_counter()
            count_from, i = started + warm_s, number
            while (begun := time.perf_counter()) < count_from + seconds:
                right_class, right_probability = expected[i % len(contents)]
                picture = pictures.read_image(contents[i % len(contents)], settings.max_image_pixels,
                                              model.preprocessing.resize)
                tensor = model.preprocessing(picture.image, picture.box)
                outputs = model.engine.infer(tensor[None], Deadline(settings.request_timeout))
                scores = model.scores(outputs)[0]
                if begun >= count_from:
                    latencies.append(time.perf_counter() - begun)
                    best = scores.argmax()
                    off = abs(scores[best] - right_probability)
                    wrong += bool(best != right_class or tolerance is not None and off > tolerance)
                i += 1
        barrier.wait()
        results.put((name, latencies, wrong))


def run(spec):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(spec["processes"]), context.Queue()
    workers = [context.Process(target=work, args=(i, spec, barrier, results), daemon=True)  # none outlives a failure
               for i in range(spec["processes"])]
    for worker in workers:
        worker.start()
    loops = {phase[0]: [] for phase in spec["phases"]}
    wrong = dict.fromkeys(loops, 0)
    for _ in range(len(workers) * len(loops)):
        name, latencies, wrong_here = results.get(timeout=120)
        wrong[name] += wrong_here
        if latencies:
            loops[name].append(latencies)
    for worker in workers:
        worker.join()
    return {name: {"throughput": sum(len(latencies) / sum(latencies) for latencies in each), "wrong": wrong[name],
                   "latency_ms": percentiles([s for latencies in each for s in latencies])}
            for name, each in loops.items()}


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
