"""Where a network looked, and the vector before its last layer: from its second output, without gradients. Imported
with the first request for them.

A class activation map weights the last feature maps with the head's weights for a class (Zhou et al., Learning Deep
Features for Discriminative Localization, 2016). With the division by the number of cells and without what is negative,
it is Grad-CAM (Selvaraju et al., 2017): how much each cell adds to the class's logit, or to the trait's score.
"""
import base64
import difflib
import io
import math

import numpy as np
from PIL import Image

from app.errors import ServiceError, invalid_parameter

LONGEST_SIDE = 512  # of an overlay, in pixels
MOST_LARGE, SMALL_SIDE = 8, 128  # with more maps in an answer than this, each overlay has this longest side
DIGITS = 6          # of the largest number in a map; the others have as many decimals
EMBEDDING_DIGITS = 7  # of each number in one
HEAT = [[68, 1, 84], [188, 55, 84], [237, 105, 37], [251, 180, 26], [252, 255, 164]]  # RGB, from weak to strong
PALETTE = np.stack([np.interp(np.arange(256), np.linspace(0, 255, len(HEAT)), channel) for channel in zip(
    *HEAT, strict=True)], axis=1).astype(np.uint8).tobytes()


def check(task, options):
    """Raises ServiceError INVALID_PARAMETER if the task's network cannot do what the options ask."""
    features = task.manifest.features
    for name, kinds in (("explain", ("maps",)), ("explain_class", ("maps",)), ("embedding", ("maps", "vector"))):
        if options.get(name) and features["kind"] not in kinds:
            raise ServiceError(400, "INVALID_PARAMETER", f"{name} is not possible with {task.name}: "
                                                         f"{features['reason']}.")
    if options.get("explain_class"):
        wanted(task, options)


def metadata(task, views, options, predictions, call):
    """Members of the answer's metadata for what the options ask; `explanations` of a video are in its frames. call: a
    tasks.Call, whose stage `explain` this is, if it draws maps."""
    members = {}
    if options.get("explain") or options.get("explain_class"):
        with call.stages("explain"):
            rows = wanted(task, options, predictions)
            longest_side = overlay_side(len(rows) * frames_asked(views, options))
            for shot, maps in zip(views.counted, frame_maps(task, views), strict=True):
                found = explanations(task, rows, maps, shot, views.image_size, longest_side)
                if views.of_video:
                    shot["explanations"] = found
                else:
                    members["explanations"] = found
    if options.get("embedding"):
        members["embedding"] = short(embedding(task, views, options.get("normalize"))).tolist()
    return members


def frames_asked(views, options):
    """How many frames the answer may have: known before the first one, which a stream sends on its own."""
    return options["frames"] if views.of_video and options.get("at") is None else 1


def overlay_side(maps):
    """The longest side of each overlay, in pixels, in an answer with this many maps."""
    return LONGEST_SIDE if maps <= MOST_LARGE else SMALL_SIDE


def embedding(task, views, normalize):
    """The vector before the last layer, averaged over frames and mirror images: float32 (F,), of length 1 if normalize.
    """
    vectors = views.features.mean(axis=(2, 3)) if views.features.ndim == 4 else views.features
    vector = vectors.mean(axis=0)
    return vector / max(np.linalg.norm(vector), np.finfo(np.float32).tiny) if normalize else vector


def frame_maps(task, views):
    """Feature maps of each frame, those of mirror images turned back: list of (views, F, h, w) float32."""
    maps = views.features.reshape(len(views.counted), -1, *views.features.shape[1:])
    return [np.stack([of_view[:, :, ::-1] if mirrored else of_view for mirrored, of_view in enumerate(of_frame)])
            for of_frame in maps]


def wanted(task, options, predictions=None):
    """The rows of the head to explain: that of explain_class, else, for a classifier, that of the best class in the
    answer, else all. Raises ServiceError."""
    name, labels = options.get("explain_class"), task.labels
    if name in labels:
        return [labels.index(name)]
    if name is not None and name.isdecimal() and len(name) < 10 and int(name) < len(labels):
        return [int(name)]
    if name is not None:
        takes = f"the name or class_id (0 to {len(labels) - 1}) of a class" if task.kind == "classification" else \
            "one of " + ", ".join(labels)
        near = difflib.get_close_matches(name[:40].lower(), lower := [label.lower() for label in labels], 1)
        meant = f"; did you mean {labels[lower.index(near[0])]}?" if near else ""
        raise invalid_parameter("explain_class", takes, name[:40] + meant)
    return [predictions[0]["class_id"]] if isinstance(predictions, list) else range(len(labels))


def explanations(task, rows, maps, shot, image_size, longest_side):
    """[{"class" and "class_id", or "trait"; "map": (h, w) floats of at least 0; "overlay": base64 of a PNG}] of one
    frame. rows: of the head; maps: the frame's feature maps (views, F, h, w); shot: its entry in the answer;
    longest_side: of the overlays, in pixels."""
    found = []
    for row in rows:
        label = {"class": task.labels[row], "class_id": row} if task.kind == "classification" else {
            "trait": task.labels[row]}
        heat = activation_map(maps, head(task)[row])
        found.append({**label, "map": rounded(heat).tolist(), "overlay": overlay(
            heat, image_size, shot.get("face_box"), task.preprocessing, longest_side)})
    return found


def short(vector):
    """Float32 (F,) as float64 with EMBEDDING_DIGITS digits each: in JSON, float32 as float64 has seventeen."""
    sizes = np.abs(np.where(vector == 0, 1, vector).astype(float))
    scale = 10.0 ** (EMBEDDING_DIGITS - 1 - np.floor(np.log10(sizes)))
    return np.rint(vector * scale) / scale


def rounded(heat):
    """A map, (h, w) float32 of at least 0, as float64 with DIGITS digits of its largest number."""
    largest = float(heat.max())
    return heat.astype(float).round(DIGITS - 1 - math.floor(math.log10(largest)) if largest > 0 else DIGITS)


def head(task):
    """The weights of the last layer, (K, F) float32, of which only what is read comes into memory."""
    if not hasattr(task, "head"):
        task.head = np.load(task.place.source.folder / "head.npy", mmap_mode="r")
    return task.head


def activation_map(maps, weights):
    """Feature maps (views, F, h, w) and weights (F,) → (h, w) float32, at least 0."""
    heat = np.einsum("vfhw,f->hw", maps, weights) / (maps.shape[0] * maps.shape[2] * maps.shape[3])
    return np.maximum(heat, 0)


def overlay(heat, image_size, face_box, preprocessing, longest_side=LONGEST_SIDE):
    """Base64 of a PNG to lay over the upright picture: the stronger, the brighter and the less transparent; transparent
    where the network saw nothing. heat: (h, w), at least 0; image_size: (width, height) of the picture;
    face_box: (x, y, width, height) of what was cut out of it, or None; longest_side: of the PNG."""
    strength = heat / max(heat.max(), np.finfo(np.float32).tiny)
    scale = min(1, longest_side / max(image_size))
    width, height = (max(1, round(side * scale)) for side in image_size)
    x, y, region_width, region_height = face_box or (0, 0, *image_size)
    side = min(region_width, region_height) * preprocessing.crop / preprocessing.resize  # of the square that it saw
    left, top = (scale * (x + (region_width - side) / 2), scale * (y + (region_height - side) / 2))
    side *= scale
    columns, from_column, to_column = visible(left, side, width, heat.shape[1])
    rows, from_row, to_row = visible(top, side, height, heat.shape[0])
    grey = Image.fromarray(strength.astype(np.float32)).resize(
        (columns.stop - columns.start, rows.stop - rows.start), Image.Resampling.BICUBIC,
        (from_column, from_row, to_column, to_row))
    indices = np.zeros((height, width), np.uint8)
    indices[rows, columns] = np.clip(np.rint(255 * np.asarray(grey)), 0, 255)
    image, buffer = Image.fromarray(indices), io.BytesIO()
    image.putpalette(PALETTE)
    image.save(buffer, "PNG", transparency=bytes(range(256)))
    return base64.b64encode(buffer.getvalue()).decode()


def visible(start, side, length, cells):
    """(slice of at least one of `length` pixels, first and last edge in cells of the map that they show), for a map of
    that many cells that covers the pixels from `start` for `side`, both with fractions."""
    first = min(max(0, round(start)), length - 1)
    last = min(max(first + 1, round(start + side)), length)
    edges = [min(max(0.0, (edge - start) * cells / side), cells) for edge in (first, last)]
    return slice(first, last), *(edges if edges[1] > edges[0] else (0, cells))
