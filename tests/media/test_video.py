"""The frames that are asked for come out, exactly those; whatever else is sent gets its 4xx, and opens nothing."""
import io
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from conftest import encoded, photo, post
from PIL import Image
from videos import (
    NO_VIDEOS,
    motion_jpeg,
    number_on,
    numbered,
    opencv_frames,
    pan_over,
    saying_count,
    silence,
    turned,
    write,
)

from app import create_app
from app.config import Settings
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.media import video

COUNT = 200
UNEVEN_MS = [round(10 * i + i * i / 4) if i < 100 else 3500 + (i - 100) * 70 for i in range(COUNT)]
KINDS = {
    "mp4": {"bf": "3", "g": "50"},
    "one key frame": {"bf": "3", "g": "1000"},
    "all key frames": {"g": "1"},
    "uneven mp4": {"bf": "3", "g": "50", "at_ms": UNEVEN_MS},
    "uneven mkv": {"bf": "3", "g": "50", "at_ms": UNEVEN_MS, "format": "matroska"},
    "open groups": {"bf": "3", "g": "50", "x264-params": "open-gop=1", "format": "matroska"},
    "mov": {"codec": "mpeg4", "bf": "2", "g": "50", "format": "mov"},
    "uneven, all key frames": {"g": "1", "at_ms": UNEVEN_MS},
    "webm": {"codec": "libvpx", "g": "50", "deadline": "realtime", "format": "webm"},
    "avi, b-frames": {"codec": "mpeg4", "bf": "2", "g": "50", "format": "avi"},
    "avi, motion jpeg": {"codec": "mjpeg", "format": "avi"},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return write([numbered(i) for i in range(COUNT)], **KINDS[request.param])


@pytest.fixture(scope="module")
def short():
    return write([numbered(i) for i in range(9)])


def read(data, settings=None, **asked):
    return list(video.frames(data, settings or Settings(), Deadline(30), **asked))


def refused(data, settings=None, **asked):
    with pytest.raises(ServiceError) as e:
        read(data, settings, **asked)
    return e.value.status, e.value.code


def test_every_frame_is_the_one_that_playing_shows(kind):
    shown = opencv_frames(kind)
    assert [number_on(frame) for frame in shown] == list(range(COUNT))
    for asked in (1, 5, 31, 32):
        frames = read(kind, count=asked)
        expected = [int((i + 0.5) * COUNT / asked) for i in range(asked)]
        assert [frame.index for frame in frames] == expected
        assert [number_on(np.asarray(frame.image)) for frame in frames] == expected
        assert (np.asarray(frames[0].image) == shown[expected[0]]).all()


@pytest.mark.parametrize("name", ["uneven mp4", "uneven mkv"])
def test_at_is_the_frame_on_show_then(name):
    data = write([numbered(i) for i in range(COUNT)], **KINDS[name])
    for number in (0, 1, 18, 99, 100, 150, COUNT - 1):
        for after_ms in (0, 8):  # the frames are 10 ms apart and more
            (frame,) = read(data, at_s=(UNEVEN_MS[number] + after_ms) / 1000)
            assert (frame.index, number_on(np.asarray(frame.image))) == (number, number)
            assert frame.time_s == pytest.approx(UNEVEN_MS[number] / 1000, abs=1e-3)
    assert read(data, at_s=1e6)[0].index == COUNT - 1


def test_frames_that_are_never_shown_do_not_count():
    """VP8 has frames that others refer to only: the bit 0x10 of the first byte is not set (RFC 6386, 9.1)."""
    data = bytearray(write([numbered(i) for i in range(60)], **KINDS["webm"]))
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux() if packet.size]
    for i in range(3, 23):
        data[data.index(packets[i])] &= 0xEF
    shown = opencv_frames(bytes(data))
    assert len(shown) == 40
    for frame in read(bytes(data), count=7):
        assert (np.asarray(frame.image) == shown[frame.index]).all()
    assert [frame.index for frame in read(bytes(data), count=7)] == [int((i + 0.5) * 40 / 7) for i in range(7)]


def test_more_frames_than_there_are(short):
    assert [frame.index for frame in read(short, count=32)] == [int((i + 0.5) * 9 / 32) for i in range(32)]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_phone_videos_are_upright(short, degrees):
    (frame,) = read(turned(short, degrees))
    upright = np.rot90(read(short)[0].image, -degrees // 90)
    assert (np.asarray(frame.image) == upright).all()


def test_header_that_lies_about_the_count_does_no_harm():
    data = write([numbered(i) for i in range(60)], format="avi", codec="mjpeg")
    for lie in (1, 30, 1_000_000):
        assert [frame.index for frame in read(saying_count(data, lie), count=3)] == [10, 30, 50]


def test_damaged_frames_are_passed_over():
    pictures = [encoded(Image.fromarray(numbered(i)), "JPEG") for i in range(60)]
    (frame,) = read(motion_jpeg([bytes(900) if 26 < i < 32 else p for i, p in enumerate(pictures)], 160, 96))
    assert (frame.index, number_on(np.asarray(frame.image))) == (32, 32)
    (frame,) = read(motion_jpeg([bytes(900) if i > 26 else p for i, p in enumerate(pictures)], 160, 96))
    assert (frame.index, number_on(np.asarray(frame.image))) == (26, 26)


@pytest.mark.parametrize("format", ["mp4", "mp4, fast start", "matroska", "avi"])
def test_cut_off_videos_are_refused_wherever_they_end(format):
    options = {"movflags": "faststart"} if "," in format else {}
    data = write([numbered(i) for i in range(30)], format=format.partition(",")[0], codec="mpeg4", **options)
    assert read(data)
    for part in range(1, 64, 7):
        assert refused(data[:len(data) * part // 64]) == (400, "INVALID_VIDEO"), part


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
def test_what_follows_a_whole_video_does_no_harm(format):
    data = write([numbered(i) for i in range(9)], format=format, codec="mpeg4")
    for rest in (bytes(100), b"\xff" * 100):
        assert [frame.index for frame in read(data + rest)] == [4]


def test_a_matroska_header_of_unknown_length_does_no_harm():
    data = write([numbered(i) for i in range(9)], format="matroska")
    assert data[4] == 0xA3  # a length of one byte
    assert [frame.index for frame in read(data[:4] + b"\xff" + data[5:])] == [4]


def test_sound_without_a_picture_is_refused():
    assert refused(silence()) == (400, "INVALID_VIDEO")


@pytest.mark.parametrize("head", [b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\xff\0\0\0AVI LIST"])
def test_a_right_beginning_alone_is_refused(head):
    for rest in (b"", bytes(3000), os.urandom(3000)):
        assert refused(head + rest) == (400, "INVALID_VIDEO")


def test_too_long(short):
    settings = Settings.parse({"MAX_VIDEO_SECONDS": "2"})
    assert refused(write([numbered(0)] * 10, rate=4), settings) == (413, "VIDEO_TOO_LONG")
    assert read(short, settings)


def test_too_large_frames(short):
    settings = Settings.parse({"MAX_IMAGE_PIXELS": "10000"})
    assert refused(short, settings) == (413, "VIDEO_TOO_LARGE")


@pytest.mark.parametrize("size_it_says", [(10_000, 10_000), (160, 96)])
def test_huge_frames_stay_within_their_memory(size_it_says):
    picture = encoded(Image.new("RGB", (10_000, 10_000)), "JPEG")
    assert refused(motion_jpeg([picture] * 3, *size_it_says)) == (413, "VIDEO_TOO_LARGE")
    assert peak_mib() < 500


def peak_mib():
    """The most memory that the process that decodes has had."""
    decoder = video.decoders.take()
    video.decoders.give_back(decoder)
    with open(f"/proc/{decoder.process.pid}/status") as status:
        return int(dict(line.split(":", 1) for line in status)["VmHWM"].split()[0]) // 1024


@pytest.fixture(scope="module")
def endless():
    """100 000 frames in 100 seconds; without an index each is reached through all those before it."""
    return motion_jpeg([encoded(Image.fromarray(numbered(7)), "JPEG")] * 100_000, 160, 96, rate=1000)


@pytest.fixture
def decoder(short):
    """The Decoder that the next video gets."""
    read(short)
    decoder = video.decoders.take()
    video.decoders.give_back(decoder)
    return decoder


def test_a_hundred_thousand_frames_end_at_the_deadline(endless, short, decoder):
    with pytest.raises(DeadlineExceeded, match="during decode"):
        list(video.frames(endless, Settings(), Deadline(0.3), count=32))
    assert decoder.process.returncode == -signal.SIGKILL
    assert [frame.index for frame in read(short)] == [4]  # by a new process


def test_a_decoder_whose_video_ended_at_its_deadline_is_not_used_again(short):
    """The timer may have killed it already, and the next video would pass for a damaged one."""
    decoder, deadline = video.Decoder(), Deadline(10)
    task = {"size": len(short), "frames": 1, "cpu_seconds": 5, "max_pixels": 10**7, "max_seconds": 60}
    frames = decoder.decode(task, short, deadline)
    next(frames)
    deadline.at = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        next(frames)
    assert not decoder.is_idle
    decoder.close()


@pytest.mark.parametrize("said", ['{"index": 0, "time_', '{"index": 0, "time_s": 0.0, "shape": [2, 2, 3]}\n123', ""])
def test_a_decoder_that_is_killed_while_it_speaks(said):
    decoder = video.Decoder()
    decoder.close()
    decoder.process = subprocess.Popen([sys.executable, "-c", f"import time; print({said!r}, end='', flush=True); "
                                        "time.sleep(60)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with pytest.raises(DeadlineExceeded):
        list(decoder.decode({"size": 1}, b"x", Deadline(0.5)))
    decoder.close()


def test_a_caller_that_wants_no_more_frames_leaves_no_decoder_behind(endless, short, decoder):
    frames = video.frames(endless, Settings(), Deadline(30), count=32)
    next(frames)
    assert decoder.process.poll() is None
    frames.close()
    assert decoder.process.returncode == -signal.SIGKILL
    assert read(short)


def test_a_hundred_thousand_frames_end_at_the_limit_of_calculation(endless, short, monkeypatch):
    monkeypatch.setattr(video, "CPU_SECONDS", 0)
    assert refused(endless, count=32) == (400, "INVALID_VIDEO")
    assert read(short)


def test_a_decoder_that_dies_is_replaced(short):
    read(short)
    decoder = video.decoders.take()
    decoder.process.kill()
    decoder.process.wait()
    video.decoders.give_back(decoder)
    assert read(short)


@pytest.mark.parametrize("name", NO_VIDEOS)
def test_what_is_neither_picture_nor_video_starts_no_decoder(client, name, monkeypatch):
    monkeypatch.setattr(video, "decoders", None)
    response = post(client, NO_VIDEOS[name], "clip.mp4")
    assert (response.status_code, response.json["error"]) == (400, "INVALID_IMAGE")


@pytest.mark.parametrize("name", ["SDP", "HLS", "concat", "DASH", "another container"])
def test_the_decoder_itself_refuses_them_and_opens_nothing(name, short):
    """Behind the check of the first bytes: the demuxers' whitelist, and not one descriptor to be had."""
    data = NO_VIDEOS.get(name) or write([numbered(1)] * 5, format="mpegts")
    assert name in NO_VIDEOS or opencv_frames(data)
    task = {"frames": 1, "cpu_seconds": 5, "max_pixels": 10**7, "max_seconds": 60, "size": len(data)}
    decoder = video.decoders.take()
    with pytest.raises(ServiceError) as e:
        list(decoder.decode(task, data, Deadline(5)))
    assert e.value.code == "INVALID_VIDEO"
    opened = [os.readlink(f"/proc/{decoder.process.pid}/fd/{fd}") for fd in os.listdir(
        f"/proc/{decoder.process.pid}/fd")]
    assert sorted(path.partition(":")[0] for path in opened) == ["/dev/null"] * 3 + ["pipe"] * 2  # to us and from us
    with open(f"/proc/{decoder.process.pid}/limits") as limits:
        of = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert int(of["Max address space"]) < 2 * 2**30
    assert int(of["Max open files"]) <= max(map(int, os.listdir(f"/proc/{decoder.process.pid}/fd"))) + 1
    video.decoders.give_back(decoder)
    assert read(short)


def test_classifiers_answer_the_mean_over_the_frames(client):
    """With frames that do not change the answer of the whole is that of each; with others, their mean."""
    cat, coffee = (np.asarray(photo(name).convert("RGB").resize((320, 240))) for name in ("chelsea", "coffee"))
    data = write([cat] * 5 + [coffee] * 5, g="1")
    answer = post(client, data, "clip.mp4", frames=2, top_k=10).json
    assert [frame["index"] for frame in answer["metadata"]["frames"]] == [2, 7]
    assert (answer["metadata"]["media_type"], answer["metadata"]["image_size"]) == ("video", [320, 240])
    of_each = []
    for frame in (opencv_frames(data)[2], opencv_frames(data)[7]):
        of_each.append({p["class_id"]: p["confidence"] for p in post(
            client, encoded(Image.fromarray(frame)), top_k=10).json["predictions"]})
    for p in answer["predictions"][:2]:
        mean = sum(scores.get(p["class_id"], 0) for scores in of_each) / 2
        assert p["confidence"] == pytest.approx(mean, abs=2e-3)  # the other's share lies below its ten
    assert {p["class"] for p in answer["predictions"]} >= {"espresso"}


def test_sizes_of_files_and_videos_are_limited_apart(app, short):
    settings = Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MAX_FILE_SIZE": "1KiB", "MAX_VIDEO_SIZE": "1MiB"})
    client = create_app(settings, app.extensions["model"]).test_client()
    assert len(short) > 1024
    assert post(client, short).status_code == 200
    for data in (bytes(2000), short + bytes(2**20)):
        response = post(client, data)
        assert (response.status_code, response.json["error"]) == (413, "FILE_TOO_LARGE")


@pytest.mark.parametrize(("option", "value"), [("frames", "0"), ("frames", "33"), ("frames", "two"), ("at", "-1"),
                                               ("at", "nan"), ("at", "inf"), ("at", "1e9"), ("method", "nose"),
                                               ("tta", "maybe"), ("use_tta", "2")])
def test_bad_options_are_named_by_every_model(client, option, value):
    response = post(client, encoded(photo("chelsea")), **{option: value})
    assert (response.status_code, response.json["error"]) == (400, "INVALID_PARAMETER")
    assert response.json["message"].startswith(f"{option} must be ")


def test_pan_is_found_in_a_video_of_every_container(client):
    """Image or video is decided by content, whatever the name."""
    cat = np.asarray(photo("chelsea").convert("RGB"))
    for format, codec in (("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"),
                          ("avi", "mjpeg")):
        answer = post(client, write(pan_over(cat, 6), format=format, codec=codec), "picture.jpg").json
        assert answer["predictions"][0]["class"] in ("tiger cat", "Egyptian cat", "tabby"), format
