"""Checks 16 to 19 and 22: deliberately broken files and requests, and pictures in every form."""
import json
import random
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from clients import ask, ask_all, multipart
from conftest import encoded, photo
from mutations import FORMATS, mutated
from PIL import Image


def post(key, data):
    return key, "POST", "/predict", *multipart(data)


@pytest.mark.check(16, "2000 mutated files per image format (quick: 200)", "only 200 and 4xx; no worker dies")
def test_mutated_files(service, quick, record_property):
    workers, order = service.workers(), random.Random(0)
    files = {name: encoded(photo("chelsea").resize((90, 60)), name) for name in FORMATS}
    count = 200 if quick else 2000
    answers = ask_all(service.port, (post(name, mutated(files[name], order)) for name in FORMATS for _ in range(count)))
    statuses = {name: {} for name in FORMATS}
    for name, status, _, _ in answers:
        statuses[name][status] = statuses[name].get(status, 0) + 1
    for name, seen in statuses.items():
        record_property(name, " ".join(f"{status}: {number}" for status, number in sorted(seen.items(), key=str)))
    record_property("slowest s", round(max(seconds for *_, seconds in answers), 2))
    assert len(answers) == count * len(FORMATS)
    assert all(status == 200 or status is not None and 400 <= status < 500 for _, status, _, _ in answers)
    assert service.workers() == workers
    assert "Traceback" not in service.log


@pytest.mark.check(17, "files truncated at each 1/64 of their length", "400 in < 1 s")
def test_truncated_files(service, record_property):
    files = {name: encoded(photo("chelsea"), name) for name in FORMATS}
    answers = ask_all(service.port, (post(name, data[:len(data) * part // 64])
                                     for name, data in files.items() for part in range(64)))
    record_property("files", len(answers))
    record_property("statuses", ", ".join(sorted({str(status) for _, status, _, _ in answers})))
    record_property("slowest ms", round(1000 * max(seconds for *_, seconds in answers)))
    assert {status for _, status, _, _ in answers} == {400}
    assert max(seconds for *_, seconds in answers) < 1


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(
        chunks) + png_chunk(b"IEND", b"")


def bombs():
    """{name: a small file that demands large resources}."""
    rows = png_chunk(b"IDAT", zlib.compress(bytes(3 * 9000 + 1) * 9000, 9))
    huge = bytearray(encoded(Image.new("RGB", (16, 16)), "BMP"))
    huge[18:26] = struct.pack("<ii", 60_000, 60_000)
    tiff = bytearray(encoded(Image.new("RGB", (16, 16)), "TIFF"))
    directory = struct.unpack_from("<I", tiff, 4)[0]
    for entry in range(struct.unpack_from("<H", tiff, directory)[0]):
        at = directory + 2 + 12 * entry
        if struct.unpack_from("<H", tiff, at)[0] in (256, 257):  # width and height
            tiff[at + 2:at + 12] = struct.pack("<HII", 4, 1, 60_000)
    gif = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    jpeg = encoded(Image.new("RGB", (16, 16)), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    webp = bytearray(encoded(Image.new("RGB", (16, 16)), "WEBP"))
    webp[26:30] = struct.pack("<HH", 16383, 16383)
    return {"PNG 9000 × 9000": png(9000, 9000, rows), "PNG 2³¹ × 2³¹": png(2**31 - 1, 2**31 - 1, rows),
            "PNG text of 64 MB": png(16, 16, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9))),
            "PNG profile of 64 MB": png(16, 16, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26), 9))),
            "JPEG 65535 × 65535": jpeg[:at] + b"\xff\xff\xff\xff" + jpeg[at + 4:], "GIF 65535 × 65535": bytes(gif),
            "BMP 60000 × 60000": bytes(huge), "TIFF 60000 × 60000": bytes(tiff),
            "WebP 16383 × 16383": bytes(webp)}


def memory_mb(pid, field):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


@pytest.mark.check(18, "image bombs", "4xx < 200 ms; memory + < 50 MB")
def test_bombs(service, record_property):
    (worker,) = service.workers()
    prepared = {name: multipart(data) for name, data in bombs().items()}
    ask(service.port, "POST", "/predict", *multipart(b"no picture"))
    before = memory_mb(worker, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # resets the peak
    answers = []
    for name, (headers, body) in prepared.items():
        started = time.monotonic()
        status, _ = ask(service.port, "POST", "/predict", headers, body)
        answers.append((name, status, 1000 * (time.monotonic() - started)))
    more = memory_mb(worker, "VmHWM") - before
    slowest = max(answers, key=lambda answer: answer[2])
    record_property("bombs", len(answers))
    record_property("statuses", ", ".join(sorted({str(status) for _, status, _ in answers})))
    record_property("slowest", f"{slowest[0]}, {slowest[2]:.0f} ms")
    record_property("memory + MB", round(more, 1))
    assert [answer for answer in answers if not 400 <= answer[1] < 500 or answer[2] >= 200] == []
    assert more < 50
    assert service.workers() == [worker]


def forms():
    """{name: a picture of a coffee in that form of file}; if read correctly, each one is an espresso."""
    picture = photo("coffee").convert("RGB")
    turned = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_270}  # how a picture with this EXIF orientation is stored
    found = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = picture.transpose(turned[orientation]) if orientation > 1 else picture
        found[f"EXIF {orientation}"] = encoded(stored, "JPEG", quality=95, exif=exif)
    grey, alpha = picture.convert("L"), picture.convert("RGBA")
    alpha.putalpha(Image.new("L", picture.size, 254))
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    other = [Image.new("P", picture.size)]
    return found | {"CMYK": encoded(picture.convert("CMYK"), "JPEG", quality=95), "grey": encoded(grey),
                    "16 bit": encoded(sixteen), "palette": encoded(picture.quantize(256)), "alpha": encoded(alpha),
                    "animated": encoded(picture.quantize(256), "GIF", save_all=True, append_images=other)}


@pytest.mark.check(19, "eight EXIF orientations, CMYK, grey, 16 bit, palette, alpha, animated",
                   "top-1 equals the RGB reference")
def test_forms_of_pictures(service, golden, record_property):
    files = forms()
    wanted = golden["expected"][1][0]  # for the coffee
    answers = ask_all(service.port, (post(name, data) for name, data in files.items()))
    best = {name: json.loads(body)["predictions"][0] for name, status, body, _ in answers if status == 200}
    wrong = [name for name in files if name not in best or best[name]["class_id"] != wanted]
    record_property("forms", len(answers))
    record_property("wrong", ", ".join(wrong) or 0)
    off = max(abs(best[name]["confidence"] - best["EXIF 1"]["confidence"]) for name in best if name.startswith("EXIF"))
    record_property("orientations differ by", round(off, 4))
    assert len(answers) == 14
    assert not wrong
    assert off < 0.02  # a coffee upside down is an espresso too, but less so


def answer_to(port, pieces):
    """Status of the answer to raw bytes, or None if the connection ends without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        try:
            for piece in pieces:
                s.sendall(piece)
        except OSError:  # closed already: an answer may be there
            pass
        try:
            return int(s.recv(65536).split(b" ")[1])
        except (OSError, IndexError):
            return None


@pytest.mark.check(22, "oversized and oversized chunked bodies, 10 000 parts, bad boundary",
                   "413 or 400, or the connection closed; no 5xx")
def test_oversize_and_malformed(service, record_property):
    workers, mb = service.workers(), bytes(2**20)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\n%s\r\n"
    form = b"multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n1\r\n'
    parts = b"".join(part % i for i in range(10_000)) + b"--b--"
    text = b'--c\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n1\r\n--c--\r\n'
    length = b"Content-Length: %d\r\n"
    chunk = b"100000\r\n" + mb + b"\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n"
    asked = {"oversize": [head % (b"image/png", length % (40 * 2**20)), *[mb] * 40],
             "oversize form": [head % (form, length % (40 * 2**20)), *[mb] * 40],
             "chunked oversize": [head % (b"image/png", chunked), *[chunk] * 40, b"0\r\n\r\n"],
             "10 000 parts": [head % (form, length % len(parts)), parts],
             "bad boundary": [head % (form, length % len(text)), text],
             "no boundary": [head % (b"multipart/form-data", length % len(text)), text],
             "two lengths": [head % (b"image/png", length % 3 + length % 5), b"12345"],
             "negative length": [head % (b"image/png", length % -1), b"12345"]}
    for name, pieces in asked.items():
        status = answer_to(service.port, pieces)
        record_property(name, status or "closed")
        assert status in (400, 413, None), name
    assert service.workers() == workers
    assert "Traceback" not in service.log
