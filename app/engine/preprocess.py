"""From an upright RGB picture to the model's input, with Pillow and NumPy only; also the self-test input and softmax.

The same arithmetic as torchvision.transforms._presets.ImageClassification on a PIL image: resize the shorter side with
antialiasing, centre crop, /255, normalise.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MOST_RESIZED_PIXELS = 4_000_000  # 16 MB; only pictures more than fifty times as long as wide exceed it


@dataclass(frozen=True)
class Preprocessing:
    """resize: the shorter side in pixels; crop: side of the centre square; mean, std: per RGB channel, of 0..1."""
    resize: int
    crop: int
    interpolation: str = "bilinear"
    mean: tuple = (0.485, 0.456, 0.406)  # ImageNet's, as in torchvision
    std: tuple = (0.229, 0.224, 0.225)

    def __call__(self, image, box=None):
        """RGB PIL image of any size, or its part box → float32 array (3, crop, crop), normalised."""
        pixels = np.asarray(self.resize_and_crop(image, box), dtype=np.uint8)  # (crop, crop, 3)
        scale = (1 / (255 * np.array(self.std))).astype(np.float32)
        shift = (np.array(self.mean) / np.array(self.std)).astype(np.float32)
        tensor = np.empty((3, self.crop, self.crop), np.float32)
        for channel in range(3):
            np.multiply(pixels[..., channel], scale[channel], out=tensor[channel])
            tensor[channel] -= shift[channel]
        return tensor

    def resize_and_crop(self, image, box=None):
        """RGB PIL image, or its part (left, top, right, bottom) → the crop × crop PIL image that the model sees."""
        left, top, right, bottom = box or (0, 0, *image.size)
        size = resized_size((right - left, bottom - top), self.resize)
        filter = getattr(Image, self.interpolation.upper())
        if size[0] * size[1] > MOST_RESIZED_PIXELS:
            from app.engine.elongated import resize_middle
            return centre_crop(resize_middle(image, size, filter, self.crop), self.crop)
        return centre_crop(image.resize(size, filter, box), self.crop)


def resized_size(size, shorter_side):
    """(width, height) with the shorter one set to shorter_side and the longer one truncated, as in torchvision."""
    width, height = size
    if width <= height:
        return shorter_side, int(shorter_side * height / width)
    return int(shorter_side * width / height), shorter_side


def centre_crop(image, side):
    """The central side × side square, padded with black; odd padding puts one more pixel at the right and bottom."""
    pad_x, pad_y = max(0, side - image.width), max(0, side - image.height)
    if pad_x or pad_y:
        image = ImageOps.expand(image, (pad_x // 2, pad_y // 2, (pad_x + 1) // 2, (pad_y + 1) // 2))
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def self_test_input(preprocessing):
    """A smooth coloured pattern as the model's input: float32 (1, 3, crop, crop), the same on every machine."""
    y, x = np.mgrid[0:preprocessing.crop, 0:preprocessing.crop].astype(np.float32) / preprocessing.crop
    return np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(9 * x * y)])[None].astype(np.float32)


def softmax(logits):
    """(N, K) → (N, K) float64 probabilities."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
