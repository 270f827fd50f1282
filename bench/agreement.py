"""How much bf16 answers differ from fp32 with real weights: EfficientNet-Lite0 on scikit-image's photographs.

    python -m bench.agreement MODEL_DIR

Each photograph is used whole and as its four quarters. Prints JSON: {pictures, top1_changes, max_dp, mean_dp_top1}.
"""
import json
import sys

import numpy as np

from app import load_model
from app.config import Settings
from app.errors import Deadline
from bench.inputs import photo

PHOTOS = ["astronaut", "camera", "chelsea", "coffee", "rocket", "coins", "motorcycle_left", "hubble_deep_field",
          "retina", "horse", "moon", "clock_motion"]


def pictures():
    for name in PHOTOS:
        image = photo(name)
        w, h = image.size
        yield image
        yield from (image.crop((x, y, x + w // 2, y + h // 2)) for x in (0, w // 2) for y in (0, h // 2))


def compare(model_dir):
    probabilities = {}
    for precision in ("fp32", "bf16"):
        model = load_model(Settings.parse({"MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": model_dir,
                                           "DEVICE": "cpu", "PRECISION": precision})).current.task
        probabilities[precision] = model.scores(np.concatenate([  # (pictures, 1000)
            model.engine.infer(model.preprocessing(image)[None], Deadline(60)) for image in pictures()]))
    fp32, bf16 = probabilities["fp32"], probabilities["bf16"]
    best = fp32.argmax(1)
    rows = np.arange(len(fp32))
    return {"pictures": len(fp32), "top1_changes": int((best != bf16.argmax(1)).sum()),
            "max_dp": float(abs(fp32 - bf16).max()), "mean_dp_top1": float(abs(fp32 - bf16)[rows, best].mean())}


if __name__ == "__main__":
    json.dump(compare(sys.argv[1]), sys.stdout)
