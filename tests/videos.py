"""Videos for the tests: some whose frames carry their number as bars, some that show a face, some that mean harm."""
import fractions
import io
import struct

import av
import cv2
import numpy as np

BITS = 10

# name → what is sent as clip.mp4 and is no video: some would make FFmpeg open a socket or another file
NO_VIDEOS = {
    "SDP": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n"
           b"a=rtpmap:96 H264/90000\r\n",
    "HLS": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "DASH": b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period><BaseURL>"
            b"http://127.0.0.1:9/</BaseURL></Period></MPD>",
    "sound": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x44\xac\0\0\x88\x58\1\0\2\0\x10\0data\0\0\0\0",
    "MPEG-TS": b"\x47\x40\x11\x10" + bytes(184) + b"\x47\x40\0\x10" + bytes(184),
}


def numbered(number, width=160, height=96):
    """RGB frame (H, W, 3) with `number` in black and white bars."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            frame[:, bit * width // BITS:(bit + 1) * width // BITS] = 255
    return frame


def number_on(frame):
    """The number that `numbered` wrote into an RGB frame."""
    width = frame.shape[1]
    return sum(1 << bit for bit in range(BITS) if frame[5:-5, int((bit + 0.5) * width / BITS)].mean() > 127)


def write(frames, format="mp4", codec="libx264", rate=30, at_ms=None, pix_fmt=None, **options):
    """The bytes of a video of RGB frames; at_ms: when each is shown, of a variable rate; options: the codec's."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.options = options
        stream.codec_context.time_base = fractions.Fraction(1, 1000 if at_ms else rate)
        for i, pixels in enumerate(frames):
            if i == 0:
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = at_ms[i] if at_ms else i, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def opencv_frames(data):
    """Every frame of a video as OpenCV shows them one after the other: RGB arrays (H, W, 3)."""
    capture, frames = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, []), []
    while True:
        is_read, frame = capture.read()
        if not is_read:
            return frames
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def turned(data, degrees):
    """The MP4 with a track header that says: turn by this much clockwise to show (ISO 14496-12, 8.3.2)."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrix = b"".join((value * one).to_bytes(4, "big", signed=True) for value, one in
                      ((a, 65536), (b, 65536), (0, 1), (c, 65536), (d, 65536), (0, 1), (0, 1), (0, 1), (1, 2**30)))
    at = data.index(b"tkhd") + 4 + 40  # version, flags, times, id, duration, layer, group, volume come first
    assert len(matrix) == 36
    return data[:at] + matrix + data[at + 36:]


def motion_jpeg(pictures, width, height, rate=30):
    """An AVI made by hand of JPEG files, one a frame, which says that they have this size; without an index."""
    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    main = struct.pack("<14I", 1_000_000 // rate, 0, 0, 0, len(pictures), 0, 1, 0, width, height, 0, 0, 0, 0)
    stream = struct.pack("<4s4s10I4h", b"vids", b"MJPG", 0, 0, 0, 1, rate, 0, len(pictures), 0, 0, 0, 0, 0, width,
                         height)
    picture = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", picture))
    frames = b"movi" + b"".join(chunk(b"00dc", picture) for picture in pictures)
    return chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + streams) + chunk(b"LIST", frames))


def saying_count(data, count):
    """The AVI with headers that say that it has `count` frames."""
    for name, offset in ((b"avih", 16), (b"strh", 32)):
        at = data.index(name) + 8 + offset
        data = data[:at] + struct.pack("<I", count) + data[at + 4:]
    return data


def pan_over(picture, count, width=320, height=240):
    """`count` RGB frames of a window that moves over an RGB picture (H, W, 3)."""
    for i in range(count):
        x = (picture.shape[1] - width) * i // max(1, count - 1)
        y = min(20, picture.shape[0] - height)
        yield np.ascontiguousarray(picture[y:y + height, x:x + width])


def silence():
    """An MP4 with sound and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for _ in range(20):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
