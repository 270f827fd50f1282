"""Checks 20 and 21: videos that demand large resources, and files that pretend to be videos."""
import json
import os
from pathlib import Path

import pytest
from clients import ask_all, multipart
from conftest import encoded
from PIL import Image
from videos import NO_VIDEOS, motion_jpeg, numbered, saying_count, write

CEILING_MB = 1500  # of a decoding process: what OpenCV itself maps, plus 768 MiB
CPU_SECONDS, SLACK_S = 10, 5  # the limit for decoding a video; processes have to start, and share two cores


def post(key, data):
    return key, "POST", "/predict?frames=8", *multipart(data)


def decoders(worker):
    """Process IDs of a worker's video decoders, including idle ones."""
    tasks = Path(f"/proc/{worker}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def bombs():
    """{name: a small video that demands large resources}."""
    huge = encoded(Image.new("RGB", (10_000, 10_000)), "JPEG")
    small, tiny = (encoded(picture, "JPEG", quality=10) for picture in (Image.fromarray(numbered(7)),
                                                                        Image.new("L", (16, 16))))
    honest = write([numbered(i) for i in range(60)], format="avi", codec="mjpeg")
    return {"10000 × 10000": motion_jpeg([huge] * 3, 10_000, 10_000), "the same, said to be 160 × 96": motion_jpeg(
        [huge] * 3, 160, 96), "small, said to be 10000 × 10000": motion_jpeg([small] * 3, 10_000, 10_000),
            "100 000 frames": motion_jpeg([tiny] * 100_000, 16, 16, rate=1000),
            "said to have 1 frame": saying_count(honest, 1), "said to have a million": saying_count(honest, 10**6)}


@pytest.mark.check(20, "video bombs: huge frame, 100 000 frames, lying headers",
                   "200 or 4xx in time; memory within its limit")
def test_video_bombs(service, record_property):
    (worker,) = service.workers()
    most_mb = 0
    for name, data in bombs().items():
        ((_, status, body, seconds),) = ask_all(service.port, [post(name, data)], connections=1)
        record_property(name, f"{status} {json.loads(body).get('error', '')} {seconds:.2f} s".replace("  ", " "))
        assert status == 200 or 400 <= status < 500, name
        assert seconds < CPU_SECONDS + SLACK_S, name
        for pid in decoders(worker):
            peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
            most_mb = max(most_mb, int(peak.split()[1]) * 1024 / 1e6)
    record_property("a decoder's memory MB at most", round(most_mb))
    assert 0 < most_mb < CEILING_MB
    assert service.workers() == [worker]
    assert "Traceback" not in service.log


def sockets(pids):
    """{(process, socket)} of the sockets that these processes have open."""
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:"):
                found.add((pid, target))
    return found


@pytest.mark.check(21, "SDP, HLS, concat, DASH, MPEG-TS or audio sent as a \"video\"", "4xx < 200 ms; no socket opened")
def test_what_pretends_to_be_a_video(service, record_property):
    (worker,) = service.workers()
    (warm,) = ask_all(service.port, [post("real", write([numbered(1)] * 5))], connections=1)  # starts a decoder
    assert warm[1] == 200
    before = decoders(worker)
    opened = sockets(before)
    listening = Path("/proc/net/udp").read_text().count("\n")
    box = b"\0\0\0\x18ftypisom\0\0\0\0isomiso2"  # an MP4's first box, so that the check of the first bytes passes
    asked = NO_VIDEOS | {f"MP4 box, then {name}": box + data for name, data in NO_VIDEOS.items()}
    answers = ask_all(service.port, (post(name, data) for name, data in asked.items()), connections=1)
    record_property("files", len(answers))
    record_property("statuses", ", ".join(sorted({str(status) for _, status, _, _ in answers})))
    record_property("slowest ms", round(1000 * max(seconds for *_, seconds in answers)))
    assert [name for name, status, _, seconds in answers if status is None or not 400 <= status < 500
            or seconds >= 0.2] == []
    assert decoders(worker) == before
    assert sockets(before) == opened
    assert Path("/proc/net/udp").read_text().count("\n") == listening
