"""Pictures that are not plain RGB: other modes of Pillow's, HEIF, and the formats that need limits of their own."""
import ctypes
import functools
import re
from pathlib import Path

import numpy as np
from PIL import Image

from app.errors import ServiceError
from app.media.pictures import invalid_image

MOST_RUN_LENGTH_PIXELS = 2_000_000  # Pillow decodes these in Python
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF tags; libtiff allocates memory for a whole tile
BITS = (8, 10, 12, 14, 16)  # of samples that cameras and scanners deliver in files of 16 or 32 bits
ROWS = 64                   # to convert at once: floating-point numbers take eight bytes
PNG_DEPTH_AT = 24           # where a PNG says how many bits a sample has


def heif_formats():
    """Register pillow-heif, and return its name among Pillow's formats. Raises ServiceError if it is not installed."""
    try:
        import pillow_heif
    except ImportError as e:
        raise ServiceError(415, "UNSUPPORTED_MEDIA_TYPE", "This service reads no HEIF pictures; send a JPEG.") from e
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return ("HEIF",)


def check_effort(image):
    """Raises ServiceError for a small BMP or TIFF that would take much time or memory to decode."""
    width, height = image.size
    if image.format == "BMP" and image.info.get("compression") in (1, 2) and width * height > MOST_RUN_LENGTH_PIXELS:
        raise ServiceError(413, "IMAGE_TOO_LARGE", f"The picture has {width} × {height} pixels; a run-length encoded "
                                                   f"BMP may have at most {MOST_RUN_LENGTH_PIXELS}.")
    if image.format == "TIFF":
        silence_libtiff()
        across, down = image.tag_v2.get(TILE_WIDTH, width), image.tag_v2.get(TILE_LENGTH, 1)
        if across * down > 4 * max(width * height, 2**18):
            raise invalid_image(f"it is a TIFF with tiles of {across} × {down} pixels")


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

    data: the file, which says how deep a PNG is: Pillow reduces 16-bit RGB to 8, but not its transparent colour.
    """
    transparent = image.info.get("transparency")
    if image.format == "PNG" and data[PNG_DEPTH_AT] == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = deep_to_rgb(image, transparent)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def deep_to_rgb(image, transparent):
    """A grey picture of 16 or 32 bits or of floating-point numbers → RGB, or RGBA if one value is transparent.

    Integers are scaled from the fewest of BITS that hold them all, numbers from 0..1, 0..255 or 0..65535. Pillow's own
    conversion would cut off at 255.
    """
    values = np.asarray(image)
    top = np.fmax.reduce(values, axis=None)  # ignores what is not a number
    if values.dtype.kind == "f":
        full_scale = 1 if top <= 1 else 255 if top <= 255 else 65535
    else:
        full_scale = 2 ** next((bits for bits in BITS if top < 2**bits), 16) - 1
    grey = np.empty(values.shape, np.uint8)
    for y in range(0, len(values), ROWS):
        rows = np.nan_to_num(values[y:y + ROWS], posinf=full_scale).clip(0, full_scale)
        grey[y:y + ROWS] = rows * (255 / full_scale) + 0.5
    rgb = Image.fromarray(grey).convert("RGB")
    if isinstance(transparent, int):
        rgb.putalpha(Image.fromarray((values != transparent) * np.uint8(255)))
    return rgb
