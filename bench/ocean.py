"""The OCEAN model: this service against the way its checkpoints are usually run (rivals/ocean_torch.py).

    python -m bench.ocean [rounds] [file.json]

Makes seeded checkpoints, a portrait and a clip, compares the answers, and measures both in turn: the service over HTTP,
the other way in this process, with one thread and with one per core in OpenCV and torch. Prints a table, and JSON or
writes it to the file.
"""
import contextlib
import fractions
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import av
import cv2
import numpy as np
import requests
import torch

from app.prepare.networks import torchvision
from bench.inputs import photo
from bench.rivals.ocean_torch import Ocean
from bench.services import ROOT, environment, free_port

BACKBONES = ("resnet18", "resnet50")
WIDTH, HEIGHT, SECONDS, RATE, FRAMES = 1280, 720, 15, 30, 10
TRAITS = ["extraversion", "neuroticism", "agreeableness", "conscientiousness", "openness"]
TOLERANCE = {"portrait": 1e-4, "clip": 0.01}  # of a clip, FFmpeg's colours differ by rounding
READY_WITHIN_S = 120


def checkpoint(folder, name):
    """Path of a seeded checkpoint in the usual format."""
    torch.manual_seed(0)
    backbone = torchvision().models.get_model(name)
    features, backbone.fc = backbone.fc.in_features, torch.nn.Identity()
    network = torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Sequential(
        torch.nn.Dropout(), torch.nn.Linear(features, len(TRAITS)))})
    torch.nn.init.normal_(network["head"][1].weight, 0, 0.02)
    path = folder / f"{name}.pt"
    torch.save({"model": network.state_dict(), "config": {"BACKBONE": name}, "label_cols": TRAITS}, path)
    return path


def portrait():
    """A JPEG file's bytes: 720p, a face 240 pixels wide."""
    buffer = io.BytesIO()
    photo("astronaut").resize((WIDTH, WIDTH)).crop((0, 0, WIDTH, HEIGHT)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def clip():
    """An MP4's bytes: 15 s of H.264 in 720p, a key frame every 2 s, a slow pan over the portrait, with sensor noise."""
    picture = np.asarray(photo("astronaut").resize((WIDTH + 160, WIDTH + 160)))
    noise = np.random.default_rng(0).normal(0, 4, (HEIGHT, WIDTH, 1))
    buffer, count = io.BytesIO(), SECONDS * RATE
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": str(2 * RATE), "preset": "veryfast"}
        for i in range(count):
            x, y = 160 * i // count, 60 * i // count
            frame = picture[y:y + HEIGHT, x:x + WIDTH] + np.roll(noise, 7 * i, axis=(0, 1))
            frame = av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, fractions.Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@contextlib.contextmanager
def service(folder, path, precision):
    """The URL of this service with the checkpoint; stopped at the end of the block. Raises RuntimeError."""
    port = free_port()
    log = folder / f"service-{port}.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "app:create_app()"], cwd=ROOT, stdout=output, stderr=output,
            env=environment({"HOST": "127.0.0.1", "PORT": str(port), "DRAIN_SECONDS": "0", "MODEL_NAME": "ocean",
                             "MODEL_PATH": str(path), "MODEL_DIR": str(folder), "PRECISION": precision,
                             "DEVICE": "cpu"}))
    try:
        until = time.monotonic() + READY_WITHIN_S
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=10).ok:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"not ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def timed(call, *arguments):
    """(milliseconds, the call's value)."""
    started = time.perf_counter()
    value = call(*arguments)
    return 1000 * (time.perf_counter() - started), value


def measure(rounds=10, precision="fp32"):
    """{backbone: {"portrait" and "clip": {"service_ms", "original_1_thread_ms", "original_all_threads_ms": medians over
    the rounds; "ratio": the better original to the service, the median of the rounds'; "stages_ms": of the service's
    last answer; "off": how far the scores are apart, at most}}}. Raises RuntimeError if they are too far."""
    cores = len(os.sched_getaffinity(0))
    inputs, result = {"portrait": portrait(), "clip": clip()}, {}
    with tempfile.TemporaryDirectory() as folder:
        for backbone in BACKBONES:
            path = checkpoint(Path(folder), backbone)
            with service(Path(folder), path, precision) as url, requests.Session() as session:
                result[backbone] = compared(session, url, Ocean(path), inputs, cores, rounds, precision)
    return result


def compared(session, url, original, inputs, cores, rounds, precision):
    def served(name, data):
        response = session.post(url + "/predict", files={"file": (name, data)}, data={"frames": FRAMES}, timeout=60)
        response.raise_for_status()
        return response.json()

    found = {}
    for name, data in inputs.items():
        call, *rest = (original.picture, data) if name == "portrait" else (original.video, data, FRAMES)
        times = {"service": [], "1_thread": [], "all_threads": []}
        for i in range(rounds + 1):  # the first one warms up
            ms, answer = timed(served, name, data)
            of_round = {"service": ms}
            for which, threads in (("1_thread", 1), ("all_threads", cores)):
                cv2.setNumThreads(threads)
                torch.set_num_threads(threads)
                of_round[which], scores = timed(call, *rest)
            if i:
                for which, ms in of_round.items():
                    times[which].append(ms)
        off = float(np.abs(np.array([answer["predictions"][trait] for trait in TRAITS]) - scores).max())
        if precision == "fp32" and off > TOLERANCE[name]:
            raise RuntimeError(f"{name}: the scores are {off:.2g} apart")
        ratios = [min(one, every) / ours for ours, one, every in zip(*times.values(), strict=True)]
        found[name] = {"service_ms": median(times["service"]), "original_1_thread_ms": median(times["1_thread"]),
                       "original_all_threads_ms": median(times["all_threads"]), "ratio": median(ratios),
                       "stages_ms": answer["metadata"]["timings_ms"], "off": off}
    return found


def table(result):
    """The result as Markdown."""
    yield "| | service | original, 1 thread | original, all threads | better original / service |"
    yield "|---|---|---|---|---|"
    for backbone, inputs in result.items():
        for name, row in inputs.items():
            yield (f"| {backbone}, {name} | {row['service_ms']:.0f} ms | {row['original_1_thread_ms']:.0f} ms | "
                   f"{row['original_all_threads_ms']:.0f} ms | {row['ratio']:.2f} |")


if __name__ == "__main__":
    measured = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    print("\n".join(table(measured)))
    text = json.dumps(measured, indent=1)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")
    else:
        print(text)
