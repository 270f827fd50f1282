"""Resizing pictures that are many times as long as wide."""
import math

from PIL import Image

REACH = {Image.BILINEAR: 1, Image.BICUBIC: 2}  # a filter's radius, in pixels of the larger of the two pictures


def resize_middle(image, size, filter, crop):
    """image.resize(size), but only the part of the longer side that centre_crop keeps, as all of it may take
    gigabytes. Equal except for the rounding of single pixels."""
    axis = 0 if size[0] > size[1] else 1
    crop = min(crop, size[axis])
    scale = image.size[axis] / size[axis]
    start = round((size[axis] - crop) / 2) * scale
    first = max(0, math.floor(start - REACH[filter] * max(1, scale)))
    last = min(image.size[axis], math.ceil(start + (crop + REACH[filter]) * max(1, scale)))
    box, kept = [0, 0, *image.size], [*size]
    box[axis], box[axis + 2], kept[axis] = first, last, crop
    middle = image.crop(box)
    box = [0, 0, *middle.size]
    box[axis], box[axis + 2] = start - first, start - first + crop * scale
    if axis == 1 and scale < 1:  # Pillow's order: the cheaper one
        middle, box[2] = middle.resize((kept[0], middle.height), filter), kept[0]
    elif axis == 1:
        middle, box = middle.resize((middle.width, kept[1]), filter, box), None
    return middle.resize(kept, filter, box)
