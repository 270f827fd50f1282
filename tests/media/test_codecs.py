"""Videos of the codecs and colours that cameras and phones record come out right; others get a 400."""
import io

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from conftest import post
from videos import number_on, numbered, opencv_frames, write

from app.config import Settings
from app.errors import Deadline
from app.media import video

TAKEN = [("libx264", "mp4"), ("libx264", "avi"), ("libx265", "mp4"), ("libx265", "matroska"), ("libvpx-vp9", "webm"),
         ("libvpx-vp9", "mp4"), ("libsvtav1", "mp4"), ("libsvtav1", "webm"), ("libvpx", "webm"), ("mpeg4", "3gp"),
         ("mpeg4", "avi"), ("mpeg2video", "mp4"), ("mpeg1video", "matroska"), ("mjpeg", "mov"), ("prores_ks", "mov"),
         ("h263", "3gp")]
REFUSED = [("flv", "avi"), ("cinepak", "avi"), ("cinepak", "mov"), ("qtrle", "mov"),
           ("rawvideo", "avi"), ("ffv1", "matroska"), ("huffyuv", "avi"), ("msmpeg4", "avi"),
           ("wmv2", "avi"), ("png", "mov"), ("png", "mp4")]  # a PNG in MP4 has MPEG-4's four letters, mp4v
PIXELS = {"cinepak": "rgb24", "qtrle": "rgb24", "png": "rgb24", "huffyuv": "yuv422p", "prores_ks": "yuv422p10le"}
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12"}}


def read(data, **asked):
    return list(video.frames(data, Settings(), Deadline(30), **asked))


@pytest.mark.parametrize(("codec", "format"), TAKEN)
def test_frames_of_every_codec_taken(codec, format):
    data = write([numbered(i, 176, 144) for i in range(30)], format, codec, pix_fmt=PIXELS.get(codec),
                 **QUIET.get(codec, {}))
    assert [number_on(np.asarray(frame.image)) for frame in read(data, count=3)] == [5, 15, 25]


@pytest.mark.parametrize(("codec", "format"), REFUSED)
def test_other_codecs_are_refused(client, codec, format):
    data = write([numbered(i) for i in range(5)], format, codec, pix_fmt=PIXELS.get(codec))
    assert len(opencv_frames(data)) == 5  # it is whole, and FFmpeg can decode it
    response = post(client, data, "clip")
    assert (response.status_code, response.json["error"]) == (400, "INVALID_VIDEO")
    assert "its codec is not one of H.264, HEVC," in response.json["message"]


PATCHES = np.array([(255, 255, 255), (128, 128, 128), (0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200),
                    (200, 200, 30), (224, 172, 140)])
RED_AND_BLUE = {Colorspace.ITU709: (0.2126, 0.0722), Colorspace.ITU601: (0.299, 0.114),
                Colorspace.BT2020: (0.2627, 0.0593)}  # their shares of luma, from the three recommendations


def patches(codec, matrix=Colorspace.ITU709, primaries=ColorPrimaries.BT709, transfer=ColorTrc.BT709, bits=8,
            full_range=False, signal=PATCHES / 255):
    """An MP4 of five equal frames with eight patches beside each other, 32 pixels wide, whose R'G'B' of that colour
    space is signal, (8, 3) of 0..1."""
    r, g, b = signal.T
    red, blue = RED_AND_BLUE[matrix]
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = np.stack([(b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)])
    unit = 2 ** (bits - 8)
    y, chroma = (y * (256 * unit - 1), chroma * (256 * unit - 1) + 128 * unit) if full_range else (
        (16 + 219 * y) * unit, (128 + 224 * chroma) * unit)
    planes = [np.tile(np.repeat(plane, width), (height, 1)) for plane, width, height in
              ((y, 32, 64), (chroma[0], 16, 32), (chroma[1], 16, 32))]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=10)
        stream.options = QUIET.get(codec, {})
        stream.width, stream.height = 256, 64
        stream.pix_fmt = "yuv420p10le" if bits == 10 else "yuv420p"
        tags = {"colorspace": matrix, "color_primaries": primaries, "color_trc": transfer,
                "color_range": ColorRange.JPEG if full_range else ColorRange.MPEG}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i in range(5):
            frame = av.VideoFrame(256, 64, stream.pix_fmt)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                pixels = np.rint(values).astype(np.uint16 if bits == 10 else np.uint8)
                rows[:, :plane.width * pixels.itemsize] = pixels.view(np.uint8)
                plane.update(rows)
            for name, value in tags.items():
                setattr(frame, name, value)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def decoded(data):
    """The colours of PATCHES in the first frame."""
    (frame,) = read(data, at_s=0)
    return np.asarray(frame.image).astype(int)[32, 16::32]


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1"])
@pytest.mark.parametrize("variant", [{}, {"bits": 10}, {"full_range": True}, {
    "matrix": Colorspace.ITU601, "primaries": ColorPrimaries.SMPTE170M, "transfer": ColorTrc.SMPTE170M}], ids=str)
def test_colours_are_right_within_four_of_255(codec, variant):
    assert np.abs(decoded(patches(codec, **variant)) - PATCHES).max() <= 4


# linear RGB of BT.709 to that of Display P3 (SMPTE EG 432-1, D65) and of BT.2020 (BT.2087), and BT.2100's curves
TO_P3 = np.array([(0.8225, 0.1774, 0), (0.0332, 0.9669, 0), (0.0171, 0.0724, 0.9108)])
TO_BT2020 = np.array([(0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956)])
WHITE = 203  # cd/m² of white on paper in HDR (BT.2408)


def perceptual_quantizer(light):
    """PQ's signal for linear RGB, (8, 3), 1 being WHITE."""
    power = (light * WHITE / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hybrid_log_gamma(light):
    """HLG's signal for linear RGB, (8, 3), 1 being WHITE on a display of 1000 cd/m²."""
    shown = light * WHITE / 1000
    luminance = shown @ (0.2627, 0.6780, 0.0593)
    scene = shown * np.where(luminance > 0, luminance, 1)[:, None] ** (1 / 1.2 - 1)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene),
                    0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073)


LIGHT = (PATCHES / 255) ** 2.4  # of an SDR display (BT.1886)
HDR = {"matrix": Colorspace.BT2020, "primaries": ColorPrimaries.BT2020}
WIDE = {"Display P3": {"primaries": ColorPrimaries.SMPTE432, "signal": (LIGHT @ TO_P3.T) ** (1 / 2.4)},
        "PQ": {**HDR, "transfer": ColorTrc.SMPTE2084, "signal": perceptual_quantizer(LIGHT @ TO_BT2020.T)},
        "HLG": {**HDR, "transfer": ColorTrc.ARIB_STD_B67, "signal": hybrid_log_gamma(LIGHT @ TO_BT2020.T)}}


@pytest.mark.parametrize("name", WIDE)
def test_wide_and_hdr_colours_are_mapped_to_srgb(name):
    """FFmpeg's mapping moves saturated colours, by at most 30 of 255; greys and skin stay."""
    error = np.abs(decoded(patches("libx265", bits=10, **WIDE[name])) - PATCHES).max(axis=1)
    assert error[:3].max() <= 4
    assert error[-1] <= 8
    assert error.max() <= 30
