"""Pictures that are not plain RGB: other modes of Pillow's, HEIF, and the formats that need limits of their own."""
import ctypes
import functools
import re
from pathlib import Path

import numpy as np
from PIL import Image

from app.errors import ServiceError
from app.media.pictures import MOST_SCANS, START_OF_SCAN, invalid_image

MOST_RUN_LENGTH_PIXELS = 2_000_000  # Pillow decodes these in Python
MOST_SEGMENTS = 1000  # of a JPEG; a progressive one has some 30
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # those that begin a segment, and the end
END_OF_IMAGE = b"\xff\xd9"
PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 262, 322, 323  # TIFF tags; libtiff allocates memory for a whole tile
BITS = (8, 10, 12, 14, 16)  # of samples that cameras and scanners deliver in files of 16 or 32 bits
STRIP_PIXELS = 2**18        # to convert at once
PNG_DEPTH_AT = 24           # where a PNG says how many bits a sample has


def heif_formats():
    """Register pillow-heif, and return the formats that share its brands. Raises ServiceError without it."""
    try:
        import pillow_heif
    except ImportError as e:
        raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", "This service reads no HEIF pictures; send a JPEG.") from e
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return "AVIF", "HEIF"  # some brands mean either


def check_effort(image, data):
    """Raises ServiceError for a small file that would take much time or memory to decode."""
    width, height = image.size
    if image.format in ("JPEG", "MPO") and scans_of(data) > MOST_SCANS:
        raise invalid_image(f"it is a JPEG of more than {MOST_SCANS} scans")
    if image.format == "BMP" and image.info.get("compression") in (1, 2) and width * height > MOST_RUN_LENGTH_PIXELS:
        raise ServiceError(413, "IMAGE_TOO_LARGE", f"The picture has {width} × {height} pixels; a run-length encoded "
                                                   f"BMP may have at most {MOST_RUN_LENGTH_PIXELS:,}.")
    if image.format == "TIFF":
        silence_libtiff()
        across, down = image.tag_v2.get(TILE_WIDTH, width), image.tag_v2.get(TILE_LENGTH, 1)
        if across * down > 4 * max(width * height, 2**18):
            raise invalid_image(f"it is a TIFF with tiles of {across} × {down} pixels")


def scans_of(data):
    """How many scans the first picture in a JPEG's bytes has; many segments between them count as many scans. Phones
    append videos and further pictures, whose bytes may look like scans."""
    at, scans = 2, 0
    for _ in range(MOST_SEGMENTS):
        marker = MARKER.search(data, at)
        if marker is None or marker[0] == END_OF_IMAGE:
            return scans
        scans += marker[0] == START_OF_SCAN
        at = marker.end() + int.from_bytes(data[marker.end():marker.end() + 2], "big")
    return MOST_SCANS + 1


@functools.cache
def silence_libtiff():
    """Keep libtiff from writing to standard error, between the lines of the log; Pillow raises the same errors."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return
    for path in set(re.findall(r"/\S*libtiff[^/\s]*\.so\S*", maps)):
        ctypes.CDLL(path).TIFFSetErrorHandler(None)


def to_rgb(image, data):
    """Any of Pillow's modes → RGB: 16 and 32 bit scaled to 8, transparency composited over white.

    data: the file, which says how deep a PNG is: Pillow changes the samples to 8 bits, but not the transparent colour.
    """
    transparent, depth = image.info.get("transparency"), data[PNG_DEPTH_AT] if image.format == "PNG" else 8
    if depth == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if depth in (2, 4) and image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return deep_to_rgb(image, transparent)
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for box in strips(image):
        part = image.crop(box).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box)
    return rgb


def strips(image):
    """Boxes that cover an image, each as wide as it: what is converted in strips takes memory but once."""
    rows = max(1, STRIP_PIXELS // image.width)
    return [(0, y, image.width, min(y + rows, image.height)) for y in range(0, image.height, rows)]


def deep_to_rgb(image, transparent):
    """A grey picture of 16 or 32 bits or of floating-point numbers → RGB.

    Integers are scaled from the fewest of BITS that hold them all, numbers from 0..1, 0..255 or 0..65535. Pillow's own
    conversion would cut off at 255. transparent: the value that becomes white, if there is one.
    """
    top, grey = 0, Image.new("L", image.size)
    for box in strips(image):
        values = np.asarray(image.crop(box))
        top = max(top, values.max(where=np.isfinite(values), initial=0))
    if image.mode == "F":
        full_scale = 1 if top <= 1 else 255 if top <= 255 else 65535
    else:
        full_scale = 2 ** next((bits for bits in BITS if top < 2**bits), 16) - 1
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0  # Pillow minds it for 8 bits alone
    for box in strips(image):
        values = np.asarray(image.crop(box))
        scaled = np.nan_to_num(values, posinf=full_scale).clip(0, full_scale) * (255 / full_scale)
        scaled = (255 - scaled if white_is_zero else scaled) + 0.5
        scaled = scaled.astype(np.uint8)
        if isinstance(transparent, int):
            scaled[values == transparent] = 255
        grey.paste(Image.fromarray(scaled), box)
    return grey.convert("RGB")
