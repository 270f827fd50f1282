"""The pictures that calibrate and judge a network of lower precision: files of CALIBRATION_DIR, or by default crops of
scikit-image's photographs. Three groups, none of whose files is in another one; but of the photographs, which are few,
those to choose layers by are other crops of those to measure on, never the same ones.
"""
import importlib.util
import itertools
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from app.errors import ServiceError
from app.media import faces, pictures
from app.prepare import bundles

# Enough for ranges to settle; to choose layers by; and to tell a cost of 0.01 from one of 0.02 (standard error 0.003).
COUNTS = {"calibration": 100, "choosing": 300, "held_out": 1000}
# motorcycle_left and motorcycle_right show the same scene, from two sides.
PHOTOGRAPHS = {"calibration": ("motorcycle_left", "motorcycle_right", "camera", "hubble_deep_field"),
               "choosing": ("astronaut", "chelsea", "coffee"),
               "held_out": ("astronaut", "chelsea", "coffee")}
SMALLEST_CROP = 0.4  # of the shorter side: less seldom shows anything
BRIGHTNESS = (0.7, 1.3)

log = logging.getLogger(__name__)


class Samples:
    """take(group, number of inputs, at most COUNTS[group]): float32 (3, crop, crop) each, always the same ones.

    about: {"source", "files": {group: the number of those that were taken last}}, for the manifest.
    """

    def __init__(self, network, settings):
        self.network, self.settings = network, settings
        if settings.calibration_dir is None:
            folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
            self.files = {group: [next(folder.glob(f"{name}.*")) for name in names]
                          for group, names in PHOTOGRAPHS.items()}
            source = "photographs of scikit-image " + bundles.installed_versions("scikit-image")["scikit-image"]
        else:
            files = self.readable(bundles.calibration_files(settings))
            self.files = {"calibration": files[::4], "choosing": files[1::4], "held_out": files[2::4] + files[3::4]}
            source = "CALIBRATION_DIR"
        self.about = {"source": source, "files": {group: len(files) for group, files in self.files.items()}}

    def readable(self, paths):
        """Those of the paths that are pictures, one of equal ones. Raises StartError if they are too few."""
        found = {}
        for path in paths:
            try:
                if path.stat().st_size > self.settings.max_file_size:
                    raise OSError("it is larger than MAX_FILE_SIZE")
                digest = bundles.sha256(path)
                if digest not in found:
                    self.read(path, self.network.preprocessing.resize)
                    found[digest] = path
            except (ServiceError, OSError) as e:
                log.warning("not used for calibration: %s: %s", path, e)
        bundles.check_number(self.settings, len(found))
        return list(found.values())

    def read(self, path, side=None):
        picture = pictures.read_image(path.read_bytes(), self.settings.max_image_pixels, side)
        return picture.image.convert("RGB")

    def take(self, group, wanted):
        """Evenly spread files as they are, each followed by as many crops of it as it takes."""
        files, needed = self.files[group], -(-wanted // self.views)
        number = min(len(files), needed)
        files = [files[i * len(files) // number] for i in range(number)]
        return itertools.islice((tensor for i, path in enumerate(files) for tensor in self.of(
            path, group, i, needed // number + (i < needed % number))), wanted)

    views = property(lambda self: 2 if self.network.task == "big_five_regression" else 1)

    def of(self, path, group, number, count):
        """Yield the inputs that the task makes of a picture and of crops of it, `count` pictures in all."""
        self.about["files"][group] = number + 1
        image, random = self.read(path), np.random.default_rng([list(COUNTS).index(group), number])
        is_elsewhere = group == "choosing" and path in self.files["held_out"]  # as it is
        for i in range(count):
            yield from self.seen(image if i == 0 and not is_elsewhere else crop(image, random))

    def seen(self, image):
        """What the network sees of a picture: [float32 (3, crop, crop)]."""
        if self.views == 1:
            return [self.network.preprocessing(image)]
        box = faces.find_crop(image, "face+middle")  # as tasks/big_five.py
        tensor = self.network.preprocessing(image if box is None else faces.cut_out(image, box))
        return [tensor, np.ascontiguousarray(tensor[:, :, ::-1])]


def crop(image, random):
    """A part of a picture, of a format from 1:1 to 4:3, perhaps mirrored, a little darker or brighter."""
    height = min(image.size) * random.uniform(SMALLEST_CROP, 1)
    width = min(image.width, height * random.uniform(1, 4 / 3))
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    left, top, right, bottom = (int(edge) for edge in (left, top, left + width, top + height))
    part = image.crop((left, top, max(left + 1, right), max(top + 1, bottom)))
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(part).enhance(random.uniform(*BRIGHTNESS))
