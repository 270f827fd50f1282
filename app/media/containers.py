"""Tells videos from pictures by their first bytes."""
import re
from dataclasses import dataclass

from PIL import Image

MEDIA_TYPE = re.compile(r"(image|video)/.+|application/octet-stream|")  # Content-Types of files
EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi")
MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # also of old QuickTime files
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
STILL_BRANDS = (b"avif", b"avis", *HEIF_BRANDS)  # pictures in the same container
EBML = b"\x1a\x45\xdf\xa3"


@dataclass(frozen=True)
class Frame:
    """index: number in display order, from 0; time_s: seconds from the start; image, box: see pictures.Picture."""
    index: int
    time_s: float
    image: Image.Image
    box: tuple | None = None


def is_video(data):
    """Whether a file's first bytes are those of an MP4, QuickTime, Matroska, WebM or AVI file."""
    return (data[4:8] in MP4_FIRST_BOXES and data[8:12] not in STILL_BRANDS or data[:4] == EBML
            or data[:4] == b"RIFF" and data[8:12] == b"AVI ")
