"""Pictures of every kind come out upright, RGB and whole; anything else is the client's 400 or 413."""
import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encoded, photo
from PIL import Image, ImageCms, ImageOps

from app.engine.preprocess import Preprocessing
from app.errors import ServiceError
from app.media import photographs
from app.media.pictures import read_image

MAX_PIXELS = 1_000_000


def pixels(data, **options):
    image = read_image(data, MAX_PIXELS, **options).image
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(width, height, depth, colour_type, rows, transparent=b"", interlaced=0):
    """A PNG as bytes. rows: each with its filter's byte; transparent: the content of tRNS."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *([(b"tRNS", transparent)] if transparent else []), (b"IDAT", zlib.compress(rows)),
              (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks)


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


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}])
@pytest.mark.parametrize("format", ["JPEG", "MPO", "AVIF", "HEIF"])
def test_lossy_formats_are_read(cat, format, options):
    if format == "MPO":
        options = {**options, "save_all": True, "append_images": [Image.new("RGB", (40, 40))]}
    assert np.abs(pixels(encoded(cat, format, quality=95, **options)) - np.asarray(cat)).mean() < 3


def test_transparent_avif_and_heif_are_put_on_white(cat):
    half = cat.convert("RGBA")
    half.paste((0, 0, 0, 0), (200, 0, 451, 300))
    for format in ("AVIF", "HEIF"):
        result = pixels(encoded(half, format, quality=95))
        assert (result[:, 210:] > 250).all(), format
        assert np.abs(result[:, :190] - np.asarray(cat)[:, :190]).mean() < 3, format


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_first_frame_of_animations_and_of_several_pages(cat, format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "AVIF" else {}
    data = encoded(cat, format, save_all=True, append_images=[Image.new("RGB", cat.size)] * 3, **options)
    assert np.abs(pixels(data) - np.asarray(cat)).mean() < (3 if format == "AVIF" else 0.01)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (10000, 2), (2, 10000), (3, 3)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_tiny_and_extreme_shapes(format, size):
    colour = Image.new("RGB", size, (200, 100, 50))
    tensor = Preprocessing(256, 224)(read_image(encoded(colour, format), MAX_PIXELS, 256).image)
    flat = Preprocessing(256, 224)(Image.new("RGB", (300, 300), (200, 100, 50)))
    assert np.abs(tensor - flat).max() < (0.1 if format in ("JPEG", "WEBP", "AVIF") else 0.02)


def test_interlaced_and_one_bit(cat):
    grey = cat.convert("L")
    assert same(encoded(grey.convert("1"), "TIFF", compression="group4"), grey.convert("1"))
    assert same(encoded(cat, "GIF", interlace=True), Image.open(io.BytesIO(encoded(cat, "GIF", interlace=False))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr"])
def test_every_mode_equals_its_rgb_reference(cat, mode):
    picture = cat.convert(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert same(encoded(picture, format), picture.convert("RGB"), tolerance=1)


def test_cmyk_jpeg_equals_its_rgb_reference(cat):
    data = encoded(cat.convert("CMYK"), "JPEG", quality=95)
    assert same(data, Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(pixels(data) - np.asarray(cat).astype(int)).mean() < 6


def test_cmyk_is_read_as_inverted_with_and_without_adobes_marker(cat):
    """Adobe stores it inverted, and Pillow, so torchvision too, takes all CMYK as Adobe's."""
    data = encoded(cat.convert("CMYK"), "JPEG", quality=95)
    at = data.index(b"\xff\xee")
    unmarked = data[:at] + data[at + 2 + int.from_bytes(data[at + 2:at + 4], "big"):]
    assert np.abs(pixels(unmarked) - np.asarray(cat).astype(int)).mean() < 6


def test_an_interlaced_png_is_read(cat):
    picture = np.asarray(cat)[:13, :21]
    passes = [picture[y::dy, x::dx] for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
                                                         (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))]  # Adam7
    rows = b"".join(b"\0" + row.tobytes() for one in passes for row in one)
    data = png(21, 13, 8, 2, rows, interlaced=1)
    assert (pixels(data) == picture).all()


def test_sixteen_bit_grey_is_scaled_not_saturated(cat):
    grey = np.asarray(cat.convert("L"))
    picture = Image.fromarray(grey.astype(np.uint16) * 257)
    assert picture.mode == "I;16"
    assert same(encoded(picture), Image.fromarray(grey), tolerance=1)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_samples_of_fewer_bits_in_deep_files_are_scaled(cat, bits):
    grey = np.asarray(cat.convert("L"))
    grey = (255 * (grey.astype(float) - grey.min()) / (grey.max() - grey.min())).astype(np.uint8)
    deep = (grey * ((2**bits - 1) / 255)).astype(np.uint16)
    assert same(encoded(Image.fromarray(deep)), Image.fromarray(grey), tolerance=1)
    for kind in (np.uint16, np.int32):
        assert same(encoded(Image.fromarray(deep.astype(kind)), "TIFF"), Image.fromarray(grey), tolerance=1)


def test_a_deep_pictures_transparent_colour_is_compared_at_its_depth():
    grey = png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0x8000, 0x8001, 0, 0xffff), struct.pack(">H", 0x8000))
    assert pixels(grey)[0, :, 0].tolist() == [255, 128, 0, 255]  # 0x8000 alone is transparent
    colours = struct.pack(">6H", 0x1234, 0x5678, 0x9abc, 0x0012, 0x0034, 0x0056)
    assert pixels(png(2, 1, 16, 2, b"\0" + colours, colours[:6])).tolist() == [[[255] * 3, [0] * 3]]


def test_deep_pictures_that_are_not_numbers():
    values = np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf, -1]], np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0, 255, 0, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_in_which_zero_is_white(cat, dtype):
    grey = np.asarray(cat.convert("L"))
    values = (grey * {np.uint8: 1.0, np.uint16: 257.0, np.float32: 1 / 255}[dtype]).astype(dtype)
    data = bytearray(encoded(Image.fromarray(values), "TIFF"))
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8:at + 10] = b"\0\0"
    assert same(bytes(data), Image.fromarray(255 - grey), tolerance=1)


@pytest.mark.parametrize("depth", [2, 4])
def test_transparent_grey_of_few_bits_is_white(depth):
    data = png(8 // depth, 1, depth, 0, bytes([0, 0b00011011 if depth == 2 else 0x17]), b"\0\1")
    assert pixels(data)[0, :, 0].tolist() == ([0, 255, 170, 255] if depth == 2 else [255, 119])


def test_an_avif_of_a_general_brand_is_read(cat):
    data = encoded(cat, "AVIF", quality=95)
    for brand in (b"mif1", b"msf1"):
        assert np.abs(pixels(data[:8] + brand + data[12:]) - np.asarray(cat)).mean() < 3


def test_what_phones_append_to_a_jpeg_does_not_count_as_scans(cat):
    noise = np.random.default_rng(1).bytes(6_000_000)
    assert noise.count(b"\xff\xda") > 64
    for data in (encoded(cat, "JPEG", progressive=True), encoded(cat, "MPO", save_all=True, append_images=[cat])):
        assert same(data + b"\0\0\0\x18ftypmp42" + noise, Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("between", [b"", b"\xff\xfe\0\6\xff\xd9ab", b"\xff\xff\xff", b"\xff\xd0"])
def test_scans_are_counted_whatever_is_between_them(cat, between):
    data = encoded(cat, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert same(data[:-2] + (between + scan) * 3 + data[-2:], Image.open(io.BytesIO(data)), tolerance=255)
    assert refused(data[:-2] + (between + scan) * 70 + data[-2:]) == (400, "INVALID_IMAGE")
    assert refused(data[:at] + b"\xff\xfe\0\2" * 1001 + scan * 70 + data[-2:]) == (400, "INVALID_IMAGE")


def test_a_jpeg_has_one_scan_if_the_first_has_all_channels_and_it_is_not_progressive(cat):
    def has_one_scan(data):
        return photographs.has_one_scan(Image.open(io.BytesIO(data)), data)
    usual = encoded(cat, "JPEG")
    assert all(map(has_one_scan, (usual, encoded(cat.convert("L"), "JPEG"), encoded(cat.convert("CMYK"), "JPEG"))))
    first = usual.index(b"\xff\xda")
    of_one_channel = usual[:first] + b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    assert not any(map(has_one_scan, (encoded(cat, "JPEG", progressive=True), of_one_channel + usual[first + 14:])))
    assert refused(of_one_channel + (usual[first + 14:-2] + usual[first:first + 14]) * 70) == (400, "INVALID_IMAGE")


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


def turned(picture, orientation, format, **options):
    """A file whose stored picture an EXIF orientation turns into `picture`."""
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose, inverse
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture if back is None else picture.transpose(Image.Transpose(back))
    return encoded(stored, format, exif=exif.tobytes() if format == "HEIF" else exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_exif_orientation_is_applied(cat, format, orientation):
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "HEIF": {"quality": 95},
                "AVIF": {"quality": 95}}.get(format, {})
    image, size, _ = read_image(turned(cat, orientation, format, **lossless), MAX_PIXELS)
    assert size == image.size == cat.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(cat)).mean() < (3 if format in ("JPEG", "AVIF", "HEIF")
                                                                             else 0.01)


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
        image, size, _ = read_image(data, MAX_PIXELS, shorter_side)
        assert size == whole.size
        reference = whole.reduce(scale)
        assert (image.mode, image.size) == ("RGB", reference.size)
        differences = np.abs(np.asarray(image).astype(int) - np.asarray(reference).astype(int))
        assert differences.mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(3007, 2000), (2001, 3003), (2049, 1537)])
def test_large_jpegs_of_odd_size_are_preprocessed_as_if_decoded_whole(cat, size, orientation):
    """libjpeg rounds the sides of a reduced picture up, by which everything would move by a part of a pixel."""
    data = turned(cat.resize(size), orientation, "JPEG", quality=90)
    reduced, whole = (read_image(data, 10**7, side) for side in (256, None))
    assert (reduced.image.width < whole.image.width, reduced.size) == (True, size)
    difference = np.abs(Preprocessing(256, 224)(reduced.image, reduced.box) - Preprocessing(256, 224)(whole.image))
    assert difference.max() < 0.12  # of a range of 4.4; without the box 0.7 to 1.8
    assert difference.mean() < 0.006


def test_an_mpo_is_decoded_smaller_too(cat):
    data = encoded(cat.resize((1200, 800)), "MPO", save_all=True, append_images=[cat])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert read_image(data, MAX_PIXELS, 90).image.size == (300, 200)


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
