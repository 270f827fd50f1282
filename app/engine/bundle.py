"""A bundle: the folder with all that a worker needs to serve one model, created by `python -m app prepare`.

    MODEL_DIR/bundles/resnet50-11ad3fa6b2c5-openvino/
        manifest.json          the Manifest below, written last
        model.xml, model.bin   the network for OpenVINO (engine openvino), or
        model.pt               its state dict (engine torch)
        head.npy               the weights of its last layer, if it has feature maps: float32 (K, F)
        calibration.json       {"temperature": …}, made by `python -m app evaluate --calibrate`

Standard library only: the Gunicorn master reads bundles, and must import neither torch nor OpenVINO.
"""
import contextlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

FORMAT = 2  # incremented whenever older bundles would be misread


@dataclass(frozen=True)
class Prepared:
    """A model to serve: a bundle, or a class of the user's. fallback_reason: why MODEL_FALLBACK is served, else None;
    key: of model_settings.each; own: "package.module:Class", which has no folder, and a random token per publishing;
    calibration: of a classifier, see calibration.py, or None."""
    folder: Path | None
    fallback_reason: str | None = None
    key: str = ""
    own: str | None = None
    token: str = ""
    calibration: dict | None = None

    @classmethod
    def of(cls, published):
        """From as_json."""
        return cls(**published | {"folder": published["folder"] and Path(published["folder"])})

    def as_json(self):
        """For other processes, in another working directory."""
        made = vars(self) | {"folder": self.folder and str(self.folder.resolve())}
        return {name: value for name, value in made.items() if value is not None or name == "folder"}


@dataclass(frozen=True)
class Manifest:
    """What is in a bundle.

    network: arguments that rebuild the torch module; labels: class names, or the traits in the order of the outputs;
    weights: {"source": their origin, "sha256": of the weights file, "labels_sha256": of LABELS_PATH or None, "default":
    whether they are the published ones, not from MODEL_PATH; "preprocessing": PREPROCESSING or None}; self_test:
    {"outputs": of the torch network, or of the int8 one, for preprocess.self_test_input}; files: {file name: SHA-256};
    quantization: of PRECISION int8 and auto, {"asked", "chosen": one of the measured "precisions": {name: its costs and
    speed}, "limit", …, see prepare/precision.py}; features: the network's second output, {"kind": "maps" (N, F, h, w),
    "vector" (N, F) or None if it has none, "size": F, "reason": why there are no maps, and what prepare/features.py
    needs to find it again}.
    """
    name: str
    task: str
    engine: str
    network: dict
    labels: list
    preprocessing: dict
    total_parameters: int
    weights: dict
    versions: dict
    self_test: dict
    files: dict
    features: dict
    quantization: dict | None = None
    format: int = FORMAT


def installed_versions(*names):
    """{distribution: version} of the installed ones, without importing them."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def read(folder):
    """The Manifest in a folder; None if there is none that this version can read."""
    try:
        fields = json.loads((folder / "manifest.json").read_text())
        return Manifest(**fields) if fields.get("format") == FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
