"""What KServe's and Triton's clients ask a running service of a classifier, and what they are answered, as a table.

    python tests/open_inference/table.py http://127.0.0.1:5000
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import requests
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
CLIENTS = {"kserve": "kserve_client.py", "tritonclient": "triton_client.py"}
PYTHON = ROOT / ".venv-v2-clients/bin/python"
PICTURE = ROOT / "tests/images/chelsea.jpg"


def arrays(model, path):
    """Write two pictures of one size as uint8 (2, H, W, 3), and preprocessed as float32 (2, 3, crop, crop)."""
    from app.engine.preprocess import Preprocessing
    image = Image.open(PICTURE).convert("RGB").resize((320, 260))
    pixels = np.stack([np.asarray(one) for one in (image, image.rotate(90, expand=True).resize(image.size))])
    preprocessing = Preprocessing(**model["preprocessing"])
    np.savez(path, pixels=pixels, tensor=np.stack([preprocessing(Image.fromarray(one)) for one in pixels]))


def in_short(found):
    """An answer in a line."""
    if isinstance(found, dict) and "model" in found:
        return ", ".join(f"{name} {about(value)}" for name, value in found.items() if value and name != "model")
    if isinstance(found, list) and len(found) == 2 and str(found[0]).isdecimal():
        return f"{found[0]}: {str(found[1]).partition(chr(10))[0][:90]}"
    text = json.dumps(found, ensure_ascii=False)
    return about(found) if text.startswith("[[") else text[:110]


def about(value):
    if not isinstance(value, list):
        return value
    array = np.array(value)
    if array.dtype.kind == "f":
        return f"{list(array.shape)} (largest {array.max():.6g})"
    return f"{list(array.shape)} {array.ravel()[0][:40]}"


def main(url):
    model = requests.get(f"{url}/info", timeout=10).json()["model"]
    with tempfile.TemporaryDirectory() as folder:
        arrays(model, Path(folder) / "arrays.npz")
        for client, script in CLIENTS.items():
            done = subprocess.run([PYTHON, ROOT / "tests/open_inference" / script, url, model["name"], PICTURE,
                                   Path(folder) / "arrays.npz"], check=True, capture_output=True, text=True)
            for name, found in json.loads(done.stdout).items():
                print(f"{client:12} {name:15} {in_short(found)}")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
