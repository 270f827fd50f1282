"""Small valid files of every kind, and damaged copies of them."""
import base64
import json

import numpy as np
from conftest import encoded, photo
from PIL import Image
from urllib3 import encode_multipart_formdata

FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF"]


def mutated(data, order):
    """A file with one to eight changes: bits flipped, bytes removed, repeated, or overwritten with extremes."""
    data = bytearray(data)
    for _ in range(order.randint(1, 8)):
        at, length = order.randrange(len(data)), order.choice([1, 2, 4, 16, 256])
        kind = order.randrange(5)
        if kind == 0:
            data[at] ^= 1 << order.randrange(8)
        elif kind == 1:
            data[at:at + length] = order.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * length
        elif kind == 2 and len(data) > 2 * length:
            del data[at:at + length]
        elif kind == 3:
            data[at:at] = data[at:at + length]
        else:  # the header matters most
            data[order.randrange(min(64, len(data)))] = order.randrange(256)
    return bytes(data)


def pictures():
    """{name: a file of some 100 bytes to 5 kB}: every format, and the variants that other code decodes."""
    cat = photo("chelsea").resize((45, 30))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cat"
    exif.get_ifd(0x8769)[0x9286] = "a comment"
    grey, alpha, palette = cat.convert("L"), cat.convert("RGBA"), cat.quantize(16)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files = {name: encoded(cat, name) for name in FORMATS}
    return files | {
        "JPEG progressive": encoded(cat, "JPEG", progressive=True, exif=exif), "JPEG grey": encoded(grey, "JPEG"),
        "JPEG CMYK": encoded(cat.convert("CMYK"), "JPEG"), "JPEG in two": encoded(cat, "MPO", save_all=True,
                                                                                  append_images=[cat]),
        "PNG grey 16": encoded(sixteen), "PNG palette": encoded(palette, transparency=1, exif=exif),
        "PNG animated": encoded(cat, save_all=True, append_images=[cat.rotate(90)]),
        "WebP lossless": encoded(alpha, "WEBP", lossless=True, exif=exif),
        "WebP animated": encoded(cat, "WEBP", save_all=True, append_images=[cat.rotate(90)]),
        "GIF animated": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)], comment=b"a cat"),
        "BMP palette": encoded(palette, "BMP"), "BMP bits": encoded(cat.convert("1"), "BMP"),
        **{f"TIFF {name}": encoded(cat, "TIFF", compression=name)
           for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")},
        "TIFF bits": encoded(cat.convert("1"), "TIFF", compression="group4"), "TIFF float": encoded(
            Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF")}


def bodies():
    """[(Content-Type, body)]: what clients send to /predict and /predict/batch."""
    picture = encoded(photo("chelsea").resize((20, 14)), "JPEG", quality=10)
    text = base64.b64encode(picture).decode()
    forms = [{"file": ("a.jpg", picture), "top_k": "3"}, {"image": ("ä.png", b"", "image/png"), "tta": "no"},
             [("files", ("a.jpg", b"1")), ("files[]", ("b.jpg", b"2")), ("frames", "2")]]
    objects = [{"image": text, "top_k": 3}, {"file": f"data:image/jpeg;base64,{text}"}, {"image": {"b64": text}},
               {"instances": [{"image_bytes": {"b64": "AAAA"}}, "AA-_"], "signature_name": "\ud83d\ude00", "x": [1e9]}]
    return [*[encode_multipart_formdata(fields, boundary="b")[::-1] for fields in forms],
            *[("application/json", json.dumps(o).encode()) for o in objects], ("image/jpeg", picture)]
