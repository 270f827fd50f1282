"""Finds and crops the face in a picture, as in the training of the OCEAN checkpoints."""
import contextlib
import functools
import threading
from pathlib import Path

import cv2
import numpy as np

from app.errors import ServiceError

CASCADE = "haarcascade_frontalface_default.xml"
SCALE_FACTOR, MIN_NEIGHBORS, MIN_SIZE = 1.1, 5, 60
SIMILAR = 0.2      # distance within a group of rectangles, relative to the smaller side: detectMultiScale's GROUP_EPS
MARGIN = 1.35      # side of the crop, relative to the face's longer side
REACH = 1.45       # 1 + 2 · SIMILAR, plus rounding: how much larger a window may be than one near it
MOST_RAW = 1500    # ungrouped rectangles; more are not compared with each other
FEWEST_WINDOWS = 10_000  # to search at once, about 2 ms
CASCADE_SIDE = 24  # of its smallest window, in pixels
MOST_BUFFERED_PIXELS = 100_000_000

cv2.setNumThreads(1)  # a slot is one core
local = threading.local()


def detector(width=0, height=0):
    """This thread's cascade, as threads must not share one, for a picture of this size. Its buffers are as wide as the
    widest and as high as the highest picture so far; before they get too large, it is replaced."""
    widest, highest = getattr(local, "largest", (0, 0))
    local.largest = max(widest, width), max(highest, height)
    if not hasattr(local, "cascade") or local.largest[0] * local.largest[1] > MOST_BUFFERED_PIXELS:
        local.cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / CASCADE))
        local.largest = width, height
    return local.cascade


def no_face_found():
    return ServiceError(422, "NO_FACE_FOUND", "No face was found; send a picture with a face that looks at the camera, "
                                              "or method=face+middle or middle.")


def one_by_one(calls):
    """Yield the calls' values."""
    return (call() for call in calls)


def largest_face(image, deadline=None, in_order=one_by_one):
    """[x, y, width, height] of the largest face in an RGB PIL image, in pixels, or None. Raises DeadlineExceeded.

    The same as the largest of detectMultiScale(grey, 1.1, 5, CASCADE_SCALE_IMAGE, (60, 60)), but windows are searched
    from the largest size down, and small ones are skipped once a large face is certain. in_order: like one_by_one, but
    may make the calls ahead of time, in any thread.
    """
    grey = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY)  # (H, W)
    sizes = window_sizes(min(grey.shape))
    portions = list(portions_of([size for size in sizes if size >= MIN_SIZE] or [MIN_SIZE], grey.shape))
    raw = np.empty((0, 4), int)
    searches = in_order(functools.partial(windows, grey, smallest, largest, sizes) for smallest, largest in portions)
    with contextlib.closing(searches):
        for smallest, _ in portions:
            if deadline:
                deadline.check("face")
            raw = np.concatenate([next(searches), raw])
            boxes = [clip(box, image.size) for box in cv2.groupRectangles(raw.tolist(), MIN_NEIGHBORS, SIMILAR)[0]]
            if boxes:
                largest = max(boxes, key=lambda box: box[2] * box[3])
                if smallest == portions[-1][0] or is_final(largest, raw, smallest):
                    return largest
    return None


def portions_of(sizes, shape):
    """Yield (smallest, largest) of the ascending sizes, from the largest on: what is searched at once in an (H, W)."""
    largest, count = sizes[-1], 0
    for size in reversed(sizes):
        count += (shape[0] - size) * (shape[1] - size) * (CASCADE_SIDE / size) ** 2
        if count >= FEWEST_WINDOWS or size == sizes[0]:
            yield size, largest
            largest, count = size - 1, 0


def window_sizes(largest):
    """Sides, ascending, of the square windows that OpenCV searches in a picture whose shorter side is `largest`."""
    sizes, factor = [], 1.0
    while round(CASCADE_SIDE * factor) <= largest:
        sizes.append(round(CASCADE_SIDE * factor))
        factor *= SCALE_FACTOR
    return sizes


def windows(grey, smallest, largest, sizes):
    """(N, 4) x, y, side, side of all windows of these sizes that the cascade classifies as a face, ungrouped.

    Rounding moves some slightly over the edge, where OpenCV clips them. It groups them at their original sizes, which
    are restored here from `sizes`.
    """
    found = np.array(detector(grey.shape[1], grey.shape[0]).detectMultiScale(
        grey, SCALE_FACTOR, 0, cv2.CASCADE_SCALE_IMAGE, (smallest, smallest), (largest, largest)), int).reshape(-1, 4)
    if len(found):
        nearest = np.searchsorted(sizes, found[:, 2:].max(axis=1))
        found[:, 2:] = np.array(sizes)[np.minimum(nearest, len(sizes) - 1), None]
    return found


def clip(box, size):
    x, y, w, h = map(int, box)
    return [x, y, min(w, size[0] - x), min(h, size[1] - y)]


def is_final(box, raw, searched):
    """Whether windows smaller than `searched` can neither change the box, nor yield a larger one, nor suppress it.

    Windows with corners near each other form a group, so smaller windows can only join groups that have a window below
    REACH · searched. If all windows that are connected to such a window are far smaller than the box, so is every group
    that can still change.
    """
    if box[2] < REACH * searched or len(raw) > MOST_RAW:
        return False
    corners = np.column_stack([raw[:, :2], raw[:, :2] + raw[:, 2:]])  # (N, 4) x0, y0, x1, y1
    near = (np.abs(corners[:, None] - corners[None]).max(axis=2)
            <= SIMILAR * np.minimum(raw[:, None, 2], raw[None, :, 2]) + 1)
    open_ended = raw[:, 2] < REACH * searched
    while (grown := near[open_ended].any(axis=0) | open_ended).sum() > open_ended.sum():
        open_ended = grown
    return not open_ended.any() or REACH * raw[open_ended, 2].max() < box[2]


def crop_box(face, size):
    """[x, y, width, height] of the square around a face, clipped to a picture of `size` (width, height)."""
    x, y, w, h = face
    side = int(max(w, h) * MARGIN)
    x0, y0 = int(max(0, x + w / 2 - side / 2)), int(max(0, y + h / 2 - side / 2))
    x1, y1 = int(min(size[0], x0 + side)), int(min(size[1], y0 + side))
    return [x0, y0, x1 - x0, y1 - y0]


def find_crop(image, method, deadline=None, in_order=one_by_one):
    """The face_box of a picture by one of FACE_METHODS: a crop_box, or None for the whole picture or no face.
    in_order: see largest_face. Raises DeadlineExceeded."""
    face = None if method == "middle" else largest_face(image, deadline, in_order)
    return face and crop_box(face, image.size)


def cut_out(image, box):
    x, y, width, height = box
    return image.crop((x, y, x + width, y + height))
