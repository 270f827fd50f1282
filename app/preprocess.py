"""From an upright RGB picture to the model's input, with Pillow and NumPy alone.

The same arithmetic as torchvision.transforms._presets.ImageClassification on a PIL image: resize of the shorter side
with antialiasing, centre crop, /255, normalise.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps


@dataclass(frozen=True)
class Preprocessing:
    """resize: the shorter side in pixels; crop: side of the centre square; mean, std: per RGB channel, of 0..1."""
    resize: int
    crop: int
    interpolation: str = "bilinear"
    mean: tuple = (0.485, 0.456, 0.406)  # ImageNet's, as in torchvision
    std: tuple = (0.229, 0.224, 0.225)

    def __call__(self, image):
        """RGB PIL image of any size → float32 array (3, crop, crop), normalised."""
        pixels = np.asarray(self.resize_and_crop(image), dtype=np.uint8)  # (crop, crop, 3)
        scale = (1 / (255 * np.array(self.std))).astype(np.float32)
        shift = (np.array(self.mean) / np.array(self.std)).astype(np.float32)
        tensor = np.empty((3, self.crop, self.crop), np.float32)
        for channel in range(3):
            np.multiply(pixels[..., channel], scale[channel], out=tensor[channel])
            tensor[channel] -= shift[channel]
        return tensor

    def resize_and_crop(self, image):
        """RGB PIL image → the crop × crop PIL image that the model sees."""
        image = image.resize(resized_size(image.size, self.resize), getattr(Image, self.interpolation.upper()))
        return centre_crop(image, self.crop)


def resized_size(size, shorter_side):
    """(width, height) with the shorter one at shorter_side, the longer one truncated as torchvision does."""
    width, height = size
    if width <= height:
        return shorter_side, int(shorter_side * height / width)
    return int(shorter_side * width / height), shorter_side


def centre_crop(image, side):
    """The middle side × side square; what the picture lacks is black, one pixel more right and below if odd."""
    pad_x, pad_y = max(0, side - image.width), max(0, side - image.height)
    if pad_x or pad_y:
        image = ImageOps.expand(image, (pad_x // 2, pad_y // 2, (pad_x + 1) // 2, (pad_y + 1) // 2))
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
