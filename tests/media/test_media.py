"""Pictures of every kind come out upright, RGB and whole; anything else is the client's 400 or 413."""
import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encoded, photo
from PIL import Image, ImageCms, ImageOps

from app.errors import ServiceError
from app.media.pictures import read_image

MAX_PIXELS = 1_000_000


def pixels(data, **options):
    image, _ = read_image(data, MAX_PIXELS, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def same(data, reference, tolerance=0):
    return np.abs(pixels(data) - np.asarray(reference.convert("RGB")).astype(int)).max() <= tolerance


@pytest.fixture(scope="module")
def cat():
    return photo("chelsea")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_every_format_is_read(cat, format):
    options = {"lossless": True} if format == "WEBP" else {}
    reference = cat.quantize(255) if format == "GIF" else cat
    assert same(encoded(reference, format, **options), reference)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr"])
def test_every_mode_equals_its_rgb_reference(cat, mode):
    picture = cat.convert(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert same(encoded(picture, format), picture.convert("RGB"), tolerance=1)


def test_cmyk_jpeg_equals_its_rgb_reference(cat):
    data = encoded(cat.convert("CMYK"), "JPEG", quality=95)
    assert same(data, Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(pixels(data) - np.asarray(cat).astype(int)).mean() < 6


def test_sixteen_bit_grey_is_scaled_not_saturated(cat):
    grey = np.asarray(cat.convert("L"))
    picture = Image.fromarray(grey.astype(np.uint16) * 257)
    assert picture.mode == "I;16"
    assert same(encoded(picture), Image.fromarray(grey), tolerance=1)


def test_floats_and_32_bit_integers_are_scaled(cat):
    grey = np.asarray(cat.convert("L"))
    assert same(encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"), Image.fromarray(grey), tolerance=1)
    assert same(encoded(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"), Image.fromarray(grey), tolerance=1)


def test_transparency_is_composited_over_white(cat):
    picture = cat.convert("RGBA")
    alpha = Image.new("L", cat.size, 0)
    alpha.paste(255, (0, 0, 200, 300))
    picture.putalpha(alpha)
    result = pixels(encoded(picture))
    assert (result[:, 200:] == 255).all()
    assert (result[:, :200] == np.asarray(cat)[:, :200]).all()


def test_transparent_palette_entry_is_white():
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([200, 0, 0, 0, 200, 0])
    picture.paste(1, (0, 0, 4, 8))
    result = pixels(encoded(picture, transparency=0))
    assert (result[:, 4:] == 255).all()
    assert (result[:, :4] == [0, 200, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(cat, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(cat, "PNG", exif=exif)
    image, size = read_image(data, MAX_PIXELS)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert size == image.size == upright.size
    assert (np.asarray(image) == np.asarray(upright)).all()


def test_damaged_exif_costs_only_the_orientation(cat):
    data = encoded(cat, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert same(data, cat)


def test_first_frame_of_an_animation(cat):
    data = encoded(cat.quantize(64), "GIF", save_all=True, append_images=[Image.new("P", cat.size)])
    assert same(data, cat.quantize(64))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_smaller_but_reported_whole(cat, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(cat.resize((1200, 800)).convert(mode), "JPEG", quality=95, exif=exif)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    # The smallest of 1/1, 1/2, 1/4, 1/8 that keeps more than twice shorter_side.
    for shorter_side, scale in ((90, 4), (100, 2), (190, 2), (250, 1)):
        image, size = read_image(data, MAX_PIXELS, shorter_side)
        assert size == whole.size
        reference = whole.reduce(scale)
        assert (image.mode, image.size) == ("RGB", reference.size)
        differences = np.abs(np.asarray(image).astype(int) - np.asarray(reference).astype(int))
        assert differences.mean() < 1


def refused(data):
    with pytest.raises(ServiceError) as e:
        read_image(data, MAX_PIXELS)
    return e.value.status, e.value.code


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"GIF89a", b"%PDF-1.7\n", bytes(5000),
                                  b"RIFF    WEBPVP8 "])
def test_what_is_no_picture_is_refused(data):
    assert refused(data) == (400, "INVALID_IMAGE")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_off_pictures_are_refused_wherever_they_end(cat, format):
    data = encoded(cat, format)
    for part in range(1, 64):
        assert refused(data[:len(data) * part // 64]) == (400, "INVALID_IMAGE"), part


def test_formats_that_are_not_listed_are_never_tried(cat):
    for format in ("PPM", "ICO", "EPS", "PCX", "TGA"):
        assert refused(encoded(cat.resize((64, 64)), format)) == (400, "INVALID_IMAGE")


def test_bomb_is_refused_by_its_header():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes(27001) * 9000)) + chunk(b"IEND", b"")
    assert len(bomb) < 300_000
    assert refused(bomb) == (413, "IMAGE_TOO_LARGE")


def test_colour_profile_does_not_disturb(cat):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert same(encoded(cat, icc_profile=profile), cat)
