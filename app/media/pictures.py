"""From a client's bytes to upright RGB pictures. Pure functions, no Flask."""
import io
import warnings
from typing import NamedTuple

from PIL import AvifImagePlugin, Image

from app.errors import ServiceError
from app.media.containers import HEIF_BRANDS

# Decoders for common uploads; Pillow's other ones are never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "heic", "heif", "gif", "bmp", "tif", "tiff")
ORIENTATION = 0x0112  # EXIF tag
MOST_READS = 100_000  # files of 30 megapixels take up to 1,500
MOST_SCANS = 64       # of a progressive JPEG, which usually has ten: each is a pass over the whole picture
LARGE_FILE = 2**17    # of a JPEG, in which counting them takes time
START_OF_SCAN = b"\xff\xda"  # within a scan FF is followed by 00

Image.MAX_IMAGE_PIXELS = None  # read_image has its own limit, which raises instead of warning
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a slot has one core
warnings.filterwarnings("ignore", module="PIL")  # about malformed files; Python would keep each different one for ever


class File(io.BytesIO):
    """A client's file. Raises ValueError if it consists of countless small parts, which Pillow looks at in Python."""
    reads = 0

    def read(self, size=-1):
        self.reads += 1
        if self.reads > MOST_READS:
            raise ValueError(f"more than {MOST_READS} reads")
        return super().read(size)


class Picture(NamedTuple):
    """image: upright RGB; size: full (width, height), also if it was decoded at a reduced scale; box: the part of a
    reduced image that shows the picture, (left, top, right, bottom) in fractions of pixels. None: all of it."""
    image: Image.Image
    size: tuple
    box: tuple | None = None


def invalid_image(why):
    return ServiceError(400, "INVALID_IMAGE", f"The file is not a picture that can be read: {why}.")


def read_image(data, max_pixels, shorter_side=None):
    """Decode a picture, upright by its EXIF orientation. Returns a Picture.

    data: bytes of a file in one of FORMATS or HEIF; of animations the first frame is read, transparency is put on
    white, colour profiles are ignored, as in torchvision. shorter_side: to which the caller will resize, in pixels; a
    much larger JPEG is decoded at 1/2, 1/4 or 1/8. Raises ServiceError INVALID_IMAGE, IMAGE_TOO_LARGE.
    """
    formats = FORMATS
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        from app.media import modes  # rarely needed
        formats = modes.heif_formats()
    try:
        image = Image.open(File(data), formats=formats)
        width, height = image.size
    except MemoryError:
        raise
    except Exception as e:  # Pillow's decoders raise many types of errors for bad bytes: all are the client's 400
        raise invalid_image(f"it is damaged, or neither a video nor {', '.join(FORMATS)} or HEIC") from e
    if width * height > max_pixels:
        raise ServiceError(413, "IMAGE_TOO_LARGE", f"The picture has {width} × {height} pixels; "
                                                   f"at most {max_pixels:,} are allowed.")
    is_jpeg, may_have_scans = image.format in ("JPEG", "MPO"), True
    if is_jpeg and len(data) > LARGE_FILE:
        from app.media import photographs
        may_have_scans = not photographs.has_one_scan(image, data)
    if image.format in ("BMP", "TIFF") or is_jpeg and may_have_scans and data.count(START_OF_SCAN) > MOST_SCANS:
        from app.media import modes
        modes.check_effort(image, data)
    try:
        if shorter_side and is_jpeg and min(width, height) > 2 * shorter_side:
            from app.media import photographs
            photographs.draft(image, shorter_side)
        image.decodermaxblock = len(data)  # one call, and no copy: it would be fed 64 kB at a time
        image.load()
        turned = orientation_of(image)
        if image.mode != "RGB" or "transparency" in image.info:
            from app.media import modes
            image = modes.to_rgb(image, data)
        if turned in range(2, 9):
            from app.media import photographs
            image = image.transpose(photographs.UPRIGHT[turned])
    except MemoryError:  # the service's fault, not the client's
        raise
    except Exception as e:
        raise invalid_image("it is damaged or cut off") from e
    size = (height, width) if turned in range(5, 9) else (width, height)
    if image.size == size:
        return Picture(image, size)
    from app.media import photographs
    return Picture(image, size, photographs.box_of(image.size, size, turned))


def orientation_of(image):
    """The EXIF orientation 1..8; 1 if there is none, or if the EXIF block is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a decodable picture with a damaged EXIF block only loses its orientation
        return 1
