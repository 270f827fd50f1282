"""The process that decodes videos, to contain what FFmpeg does with an untrusted file. video.py starts it as a program
of its own, which imports OpenCV and, of the service, only the sandbox that it enters before it reads anything.

In a loop, it reads from standard input a line of JSON {"size", "frames" or "at", "max_pixels", "max_seconds",
"cpu_seconds"} and a file of `size` bytes. To standard output it writes, for each chosen frame in file order, a line of
JSON {"index", "time_s", "shape": [height, width, 3]} and the RGB bytes, then {"done": true, "sandboxed": whether the
kernel filters its system calls}; or, at any point, {"error": code, "message"}.
"""
import bisect
import contextlib
import io
import json
import os
import resource
import sys

import cv2

# FFmpeg's decoders of what cameras, phones and browsers record, the frequent ones first. Its hundred others are rarely
# used and rarely looked at by anyone but attackers.
CODECS = ("h264", "hevc", "vp9", "libdav1d", "vp8", "mpeg4", "mjpeg", "prores", "mpeg2video", "mpeg1video", "h263")
OPTIONS = "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi|protocol_whitelist;none"
MEMORY = 768 * 2**20    # bytes of address space besides OpenCV's own: enough for 4K H.264 with 16 reference frames
SEEK_AHEAD = 17         # OpenCV seeks to the last key frame before the 16th frame before the requested one
DAMAGED = 30            # consecutive damaged frames that are skipped
NOTHING_READ = -1.0     # no frame has such a time
HIDDEN_VP8 = 0x10       # show_frame bit of the first byte (RFC 6386, 9.1); if not set, the frame is for reference only


class Refused(Exception):
    """Why a file is refused: the service's error code and the reason in words."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


def serve(source, sink, sandboxed):
    while line := source.readline():
        task = json.loads(line)
        spent = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(spent.ru_utime + spent.ru_stime + task["cpu_seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))  # SIGXCPU ends the process
        data = source.read(task["size"])
        try:
            for index, time_s, image in chosen_frames(data, task):
                send(sink, {"index": index, "time_s": time_s, "shape": image.shape}, image.data)
            send(sink, {"done": True, "sandboxed": sandboxed})
        except Refused as e:
            send(sink, {"error": e.code, "message": e.message})
        except (cv2.error, MemoryError):
            send(sink, {"error": "INVALID_VIDEO", "message": "it is damaged, or takes too much memory to decode"})
        del data  # while idle it holds no upload


def send(sink, message, content=b""):
    sink.write(json.dumps(message).encode() + b"\n")
    sink.write(content)
    sink.flush()


def open_capture(data, codec, *options):
    """A VideoCapture that decodes with this one of CODECS, whatever the file says. Raises Refused."""
    # A whitelist alone restricts only what looks for the streams' properties; OpenCV opens its own decoder besides.
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"{OPTIONS}|codec_whitelist;{codec}|video_codec;{codec}"
    capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, [*options, cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise Refused("INVALID_VIDEO", "it is damaged, has no picture, or its codec is not one of H.264, HEVC, VP8, "
                                       "VP9, AV1, MPEG-1, MPEG-2, MPEG-4, H.263, ProRes and Motion JPEG")
    return capture


def open_any(data):
    """(a VideoCapture, its one of CODECS): the one that opens the file. Raises Refused."""
    for codec in CODECS[:-1]:
        with contextlib.suppress(Refused):
            return open_capture(data, codec), codec
    return open_capture(data, CODECS[-1]), CODECS[-1]


def chosen_frames(data, task):
    """Yield (index, time_s, HWC uint8 RGB) for each frame that the task asks for, an unreadable one replaced by the
    nearest readable one. Raises Refused."""
    reader = Reader(data, task["max_pixels"], task["max_seconds"])
    count = len(reader.times)
    if "at" in task:
        wanted = [max(0, bisect.bisect_right(reader.times, 1000 * task["at"] + 0.5) - 1)]  # the one shown at that time
    else:
        wanted = [(2 * i + 1) * count // (2 * task["frames"]) for i in range(task["frames"])]
    frame, at_end = None, False
    for index in wanted:
        if not at_end and (frame is None or index > frame[0]):
            found = reader.read(index)
            at_end = found is None
            frame = reader.last_before(index) if at_end else found
        yield frame


class Reader:
    """Frames of a video by their number in display order, read in ascending order.

    The file's packets are listed first, without decoding them, and sorted by time. This numbers the frames even if the
    frame rate varies or the header lies, and a frame's time identifies it wherever a seek lands. If times do not
    identify frames, they are counted from the start.
    """

    def __init__(self, data, max_pixels, max_seconds):
        self.data, self.max_pixels = data, max_pixels
        self.capture, self.codec = open_any(data)
        self.check_size(self.capture.get(cv2.CAP_PROP_FRAME_WIDTH) * self.capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        packets = list_packets(data, max_seconds, self.codec)  # (time in ms, is a key frame)
        self.position, self.time = -1, NOTHING_READ  # the frame that was grabbed last
        if not packets or not self.grab():
            raise Refused("INVALID_VIDEO", "it has no frame that can be decoded")
        first = self.capture.get(cv2.CAP_PROP_POS_MSEC)
        if data[:4] != b"RIFF":  # earlier frames are excluded by an edit list or lack their references
            packets = [packet for packet in packets if packet[0] >= first]
        self.times = [ms for ms, _ in packets]
        self.has_times = bool(packets) and first == packets[0][0] and len(set(self.times)) == len(packets)
        self.keys = [i for i, (_, is_key) in enumerate(packets) if is_key]

    def check_size(self, pixels):
        if pixels > self.max_pixels:
            raise Refused("VIDEO_TOO_LARGE", f"its frames have {pixels:,.0f} pixels, "
                                             f"at most {self.max_pixels:,} are taken")

    def grab(self):
        """Advance to the next undamaged frame; False at the end, or after too many damaged ones."""
        for _ in range(DAMAGED):
            self.position += 1
            if self.capture.grab():
                self.time = self.capture.get(cv2.CAP_PROP_POS_MSEC)
                return True
        return False

    def read(self, index):
        """(index, time_s, RGB) of the frame, or of the first readable one after it; None if there is none. index must
        not be below that of the frame read last."""
        self.approach(index)
        while (self.time < self.times[index] if self.has_times else self.position < index) and self.grab():
            pass
        while True:
            here = bisect.bisect_left(self.times, self.time) if self.has_times else self.position
            if here < index:
                return None
            is_read, image = self.capture.retrieve()  # HDR's first takes 2 s: FFmpeg prepares a mapping to sRGB
            if is_read:
                self.check_size(image.shape[0] * image.shape[1])
                return here, self.seconds(here), cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            if not self.grab():
                return None

    def seconds(self, index):
        return round(self.times[min(index, len(self.times) - 1)] / 1000, 3)

    def approach(self, index):
        """Seek to the last key frame from which the frame can be reached, if that is nearer than the current one."""
        if not self.has_times:
            return
        before = [key for key in self.keys if key + SEEK_AHEAD <= index]
        here = bisect.bisect_left(self.times, self.time)
        for key in reversed(before[-3:]):
            if key <= here:
                return
            rate = self.capture.get(cv2.CAP_PROP_FPS)
            self.capture.set(cv2.CAP_PROP_POS_FRAMES, int(self.times[key] * rate / 1000 + 0.999) + SEEK_AHEAD)
            self.time = self.capture.get(cv2.CAP_PROP_POS_MSEC)
            if self.time <= self.times[index]:
                return
        if self.time > self.times[index]:
            self.rewind()

    def rewind(self):
        self.capture = open_capture(self.data, self.codec)
        self.position, self.time = -1, NOTHING_READ

    def last_before(self, index):
        """The last readable frame before `index`, of a file that ends too early. Raises Refused."""
        self.rewind()
        last = None
        while self.grab():
            here = bisect.bisect_left(self.times, self.time) if self.has_times else self.position
            is_read, image = self.capture.retrieve()
            if is_read and here <= index:
                self.check_size(image.shape[0] * image.shape[1])
                last = here, self.seconds(here), image
        if last is None:
            raise Refused("INVALID_VIDEO", "it has no frame that can be decoded")
        return *last[:2], cv2.cvtColor(last[2], cv2.COLOR_BGR2RGB)


def list_packets(data, max_seconds, codec):
    """[(time in ms, is a key frame)] of the video's packets, sorted by time. Raises Refused."""
    capture, packets = open_capture(data, codec, cv2.CAP_PROP_FORMAT, -1), []
    while capture.grab():
        ms = capture.get(cv2.CAP_PROP_POS_MSEC)
        if ms > 1000 * max_seconds:
            raise Refused("VIDEO_TOO_LONG", f"it is longer than {max_seconds:g} seconds")
        if codec == "vp8" and not capture.retrieve()[1].ravel()[0] & HIDDEN_VP8:
            continue
        packets.append((ms, capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME) != 0))
    return sorted(packets)


def main():
    source, sink = (os.fdopen(os.dup(number), mode, 2**20) for number, mode in ((0, "rb"), (1, "wb")))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # what a library prints must not mix with the answers
        os.dup2(nowhere, number)
    os.close(nowhere)
    cv2.setNumThreads(1)
    sys.path.append(os.path.dirname(__file__))  # last, where it hides no other module
    import sandbox
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    sandbox.forbid_files()
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    files = sink.fileno() + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # not one more, where the kernel lacks the rest
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(source, sink, sandboxed=sandbox.forbid_calls())


if __name__ == "__main__":
    sys.exit(main())
