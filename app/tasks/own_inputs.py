"""What inputs of models of one's own are: texts, sounds, and examples for the self-test."""
import io
import wave
from pathlib import Path

import numpy as np
from PIL import Image


def is_unicode(text):
    """Whether a str can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_audio(data):
    """Whether a file's first bytes are those of WAV, FLAC, Ogg, MP3, AAC or M4A."""
    return (data[:4] == b"RIFF" and data[8:12] == b"WAVE" or data[:4] in (b"fLaC", b"OggS") or data[:3] == b"ID3"
            or data[:1] == b"\xff" and data[1:2] >= b"\xe0" or data[4:11] == b"ftypM4A")


def example_of(task):
    """An input for the self-test: the task's own, else a grey ramp, or a second of 440 Hz; None for a video or JSON."""
    if isinstance(task.example, Path):
        return task.example.read_bytes()
    if task.example is not None or not task.is_file:
        return task.example
    file = io.BytesIO()
    if "picture" in task.takes:
        Image.linear_gradient("L").convert("RGB").save(file, "PNG")
        return file.getvalue()
    if "audio" in task.takes:
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(16_000)
            out.writeframes((8000 * np.sin(440 * 2 * np.pi * np.arange(16_000) / 16_000)).astype("<i2").tobytes())
        return file.getvalue()
    return None
