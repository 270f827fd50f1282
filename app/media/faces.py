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
REACH = 1 + 2 * SIMILAR  # how much larger a window may be than a similar one, or than one that suppresses it
SLACK = 2          # pixels besides that, for rounding
ROOM = 0.1         # of the size, for the windows of a growing group
SETTLED = 1.1      # how much larger than the next windows a box must be, as it will shrink a little
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

    The same as the largest of detectMultiScale(grey, 1.1, 5, CASCADE_SCALE_IMAGE, (60, 60)). in_order: like one_by_one,
    but may make the calls ahead of time, in any thread.
    """
    search = Search(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY))
    with contextlib.closing(in_order(search.calls())) as searched:
        for _ in search.portions:
            if deadline:
                deadline.check("face")
            search.add(*next(searched))
            if search.is_final():
                break
    return search.box


class Search:
    """For the largest face in a grey picture, (H, W) uint8: from the largest windows down, until smaller ones cannot
    change the box any more, and as soon as there is a box, only where they can.

    OpenCV joins similar windows, and those similar to these, to a group; a box is the mean of a group of more than
    MIN_NEIGHBORS windows, unless the box of a larger group, in which it lies, suppresses it. So of the windows that are
    left, all smaller than the box, those matter that join a decisive group, directly or through others: one that has a
    window almost as large as the box; and those of a group in the box's place that might suppress it. If windows are
    found that lead to places which were left out, or if the box changes, `suffices` notices, and these are searched.
    """

    def __init__(self, grey):
        self.grey = grey
        self.sizes = window_sizes(min(grey.shape))
        self.portions = list(portions_of([size for size in self.sizes if size >= MIN_SIZE] or [MIN_SIZE], grey.shape))
        self.found, self.places = [], []  # by portion, see windows
        self.box = self.decisive = None  # (N, 4) the windows of all decisive groups, None if unknown

    def calls(self):
        """Yield the searches of all portions, to be made in any thread, each narrowed by what is known by then."""
        for smallest, largest in self.portions:
            yield functools.partial(self.windows, smallest, largest, self.place_for(largest))

    def windows(self, smallest, largest, place=None):
        """((N, 4) x, y, side, side of all windows of these sizes that the cascade classifies as a face, ungrouped; the
        place). place: where to search: ((H,) bool, which y; the largest x), everywhere by default.

        Rounding moves some slightly over the edge, where OpenCV clips them. It groups them at their original sizes,
        which are restored here. It scales the whole picture, and where it looks in a row depends on what is to the
        left, so the rest of the picture is not cut off but blank, which costs little.
        """
        grey = self.grey
        if place:
            rows, last = place
            margin = 2 * largest // CASCADE_SIDE + 3  # of scaling: it rounds the place, and mixes it with what is near
            seen = np.convolve(rows, np.ones(largest + 2 * margin))[margin:][:len(rows)] > 0
            grey = np.zeros_like(grey)
            grey[seen, :last + largest + margin] = self.grey[seen, :last + largest + margin]
        found = np.array(detector(grey.shape[1], grey.shape[0]).detectMultiScale(
            grey, SCALE_FACTOR, 0, cv2.CASCADE_SCALE_IMAGE, (smallest, smallest), (largest, largest)), int)
        found = found.reshape(-1, 4)
        if len(found):
            nearest = np.searchsorted(self.sizes, found[:, 2:].max(axis=1))
            found[:, 2:] = np.array(self.sizes)[np.minimum(nearest, len(self.sizes) - 1), None]
            if place:
                found = found[rows[found[:, 1]] & (found[:, 0] <= last)]
        return found, place

    def add(self, found, place):
        """What windows has found of the next portion."""
        self.found.append(found)
        self.places.append(place)
        if len(found):
            self.group()
        while missed := [i for i, place in enumerate(self.places) if place and not self.suffices(i)]:
            for i in missed:
                self.found[i], self.places[i] = self.windows(*self.portions[i])
            self.group()

    def group(self):
        raw, height, width = np.concatenate(self.found[::-1]), *self.grey.shape  # in OpenCV's order
        boxes = [clip(box, (width, height)) for box in cv2.groupRectangles(raw.tolist(), MIN_NEIGHBORS, SIMILAR)[0]]
        self.box = max(boxes, key=lambda box: box[2] * box[3], default=None)
        self.decisive = None
        if not boxes or len(raw) > MOST_RAW:
            return
        corners = np.column_stack([raw[:, :2], raw[:, :2] + raw[:, 2:]])  # (N, 4) x0, y0, x1, y1
        near = (np.abs(corners[:, None] - corners[None]).max(axis=2)
                <= SIMILAR * np.minimum(raw[:, None, 2], raw[None, :, 2]) + 1)
        decisive = is_in_reach(self.box[2], raw[:, 2])
        while (grown := near[decisive].any(axis=0) | decisive).sum() > decisive.sum():
            decisive = grown
        self.decisive = raw[decisive]

    def is_final(self):
        """Whether smaller windows than those of the portions so far can change nothing."""
        if len(self.found) == len(self.portions):
            return True
        largest = self.portions[len(self.found)][1]
        return self.decisive is not None and not is_in_reach(self.box[2], largest) and not is_in_reach(
            self.decisive[:, 2], largest).any()

    def place_for(self, largest):
        """Where windows of up to this size matter, with room for those that they lead to; None if anywhere."""
        if self.decisive is None or self.box[2] < SETTLED * largest:
            return None
        is_growing = self.decisive[:, 2].min() <= self.portions[len(self.found) - 1][1]
        return self.place_of(largest, ROOM * largest if is_growing else 0)

    def place_of(self, largest, room=0):
        """Where windows of up to this size would join a decisive group or might be one that suppresses the box; and so
        many pixels around."""
        joined = self.decisive[is_in_reach(self.decisive[:, 2], largest)]
        about = SIMILAR * np.minimum(joined[:, 2], largest) + 1 + room
        first = joined[:, 1] + np.maximum(0, joined[:, 2] - largest) - about
        spans, last = [*zip(first, joined[:, 1] + about, strict=True)], max(joined[:, 0] + about, default=0)
        if is_in_reach(self.box[2], largest):  # a group SIMILAR away has a window at most twice that away
            x, y, _, height = self.box
            about = 2 * SIMILAR * largest + SLACK + room
            spans.append((y + height - largest - about, y + about))
            last = max(last, x + about)
        rows = np.zeros(self.grey.shape[0], bool)
        for first, end in spans:
            rows[max(0, int(first)):max(0, int(end) + 2)] = True
        return rows, int(last) + 1

    def suffices(self, portion):
        """Whether all that matters was found in a portion's place, given what has been found since."""
        largest, (rows, last) = self.portions[portion][1], self.places[portion]
        if self.decisive is None or self.box[2] <= largest + SLACK:
            return False
        wanted, wanted_last = self.place_of(largest)
        return wanted_last <= last and not (wanted & ~rows).any()


def is_in_reach(size, other):
    """Whether a window of a size can be similar to one of another size or suppressed by it, if it is not smaller."""
    return size <= REACH * other + SLACK


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


def clip(box, size):
    x, y, w, h = map(int, box)
    return [x, y, min(w, size[0] - x), min(h, size[1] - y)]


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
