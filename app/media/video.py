"""From a client's video to a few of its frames. FFmpeg runs in separate processes, which a bad file may crash."""
import atexit
import contextlib
import functools
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

from app.errors import ServiceError
from app.media.containers import EBML, Frame

MAX_FRAME_PIXELS = 4096 * 2304  # 4K, which the decoder's memory limit is made for
CPU_SECONDS = 10                # of decoding; a minute of 4K without a second key frame takes about that
MOST_BOXES = 100_000            # to look at, of an MP4; more than any recorder writes before moov and mdat
INHERITED = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")  # where Python and its packages are, if somewhere unusual

log = logging.getLogger(__name__)
SEGMENT = b"\x18\x53\x80\x67"  # of Matroska


def invalid_video(why):
    return ServiceError(400, "INVALID_VIDEO", f"The video cannot be used: {why}.")


def is_cut_off(data):
    """Whether the container claims to be longer than the data. Raises ServiceError for one of countless parts."""
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data) + 1  # without the padding of the last chunk
    if data[:4] == EBML:
        at = 4
        size, at = ebml_size(data, at)
        at += size or 0  # without a size it is none that FFmpeg accepts
        if data[at:at + 4] != SEGMENT:
            return False  # whatever it is, FFmpeg will judge it
        size, at = ebml_size(data, at + 4)
        return size is not None and at + size > len(data)
    at, missing, boxes = 0, {b"moov", b"mdat"}, 0
    while at + 8 <= len(data) and missing:  # some cameras append data that is not a box
        boxes += 1
        if boxes > MOST_BOXES:
            raise invalid_video(f"it has more than {MOST_BOXES} boxes before its content")
        missing.discard(data[at + 4:at + 8])
        size = int.from_bytes(data[at:at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8:at + 16], "big")
        if size == 0:  # to the end of the file
            return False
        if size < 8:
            return True
        at += size
    return at > len(data)


def ebml_size(data, at):
    """(size of an element, None if unknown; where its content starts), from the length field at `at`."""
    length = 9 - data[at].bit_length() if at < len(data) and data[at] else 1
    value = int.from_bytes(data[at:at + length], "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value, at + length


def frames(data, settings, deadline, count=1, at_s=None):
    """Yield the middle frame of each of `count` equal segments of a video, or the one at second `at_s`, as Frame.

    An unreadable frame is replaced by the nearest readable one. Raises ServiceError INVALID_VIDEO, VIDEO_TOO_LARGE,
    VIDEO_TOO_LONG; DeadlineExceeded.
    """
    if is_cut_off(data):
        raise invalid_video("it is cut off")
    task = {"size": len(data), **({"frames": count} if at_s is None else {"at": at_s}), "cpu_seconds": CPU_SECONDS,
            "max_pixels": min(MAX_FRAME_PIXELS, settings.max_image_pixels), "max_seconds": settings.max_video_seconds}
    decoder = decoders.take()
    try:
        yield from decoder.decode(task, data, deadline)
    except BaseException:  # including a caller that stops early: unfinished work ends with the process
        if not decoder.is_idle:
            decoder.close()
        raise
    finally:
        if decoder.is_idle:
            decoders.give_back(decoder)


def timed_frames(data, settings, call, count, at_s):
    """Yield what `frames` does, and add its time to the stage `decode` of a tasks.Call."""
    found = frames(data, settings, call.deadline, count, at_s)
    try:
        while True:
            with call.stages("decode"):
                frame = next(found, None)
            if frame is None:
                return
            yield frame
            del frame  # before the next is decoded
    finally:
        found.close()


def environment():
    """A decoder's environment variables: of the service's, which may be secret, INHERITED alone."""
    return {**{name: os.environ[name] for name in INHERITED if name in os.environ},
            "OPENCV_FFMPEG_LOGLEVEL": "-8", "OPENCV_LOG_LEVEL": "SILENT",
            "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@functools.cache
def warn_of_no_sandbox():
    log.warning("no seccomp filters on this kernel and processor: the video decoder's sandbox is incomplete")


class Decoder:
    """A process running video_decoder.py, for one video after another. It is killed at the video's deadline."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("video_decoder.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=2**20, env=environment())
        self.is_idle = True

    def decode(self, task, data, deadline):
        self.is_idle = False
        deadline.check("decode")
        timer = threading.Timer(deadline.remaining(), self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.write(data)
            self.process.stdin.flush()
            while "shape" in (answer := self.next_message()):
                height, width, channels = answer["shape"]
                pixels = bytearray(height * width * channels)
                if self.process.stdout.readinto(pixels) < len(pixels):
                    break
                image = Image.frombytes("RGB", (width, height), pixels)
                yield Frame(answer["index"], round(answer["time_s"], 6), image)
        except BrokenPipeError:
            answer = {}
        finally:
            timer.cancel()
        deadline.check("decode")  # if it has passed, the timer may have killed the process
        if not answer.keys() & {"done", "error"}:
            raise self.died()
        self.is_idle = True
        if "error" in answer:
            raise refusal(answer["error"], answer["message"])
        if not answer["sandboxed"]:
            warn_of_no_sandbox()

    def next_message(self):
        """The process's next message; {} if it has ended, even in the middle of a line."""
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else {}

    def died(self):
        """The error for a process that ended unexpectedly."""
        code = self.process.wait()
        return invalid_video(f"it takes more than {CPU_SECONDS} seconds to decode" if code == -signal.SIGXCPU
                             else "it is damaged, or takes too much memory to decode")

    def close(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # about data that was written but not read
            self.process.stdin.close()
        self.process.stdout.close()


def refusal(code, why):
    if code == "INVALID_VIDEO":
        return invalid_video(why)
    return ServiceError(413, code, f"The video is too {'large' if code == 'VIDEO_TOO_LARGE' else 'long'}: {why}.")


class Decoders:
    """The idle Decoders of this process. The first one is started for the first video; decoding takes a slot, so there
    are never more of them than slots."""

    def __init__(self):
        self.idle = queue.LifoQueue()
        atexit.register(self.close)

    def take(self):
        while True:
            try:
                decoder = self.idle.get_nowait()
            except queue.Empty:
                return Decoder()
            if decoder.process.poll() is None:
                return decoder
            decoder.close()

    def give_back(self, decoder):
        self.idle.put(decoder)

    def close(self):
        while not self.idle.empty():
            self.idle.get_nowait().close()


decoders = Decoders()
