"""The bundles in MODEL_DIR: finding the one that fits the settings, writing a new one, removing unneeded ones."""
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from app.config import StartError
from app.engine.bundle import installed_versions, read

MEASURED = ("int8", "auto")  # of PRECISION: what they cost is measured
MOST_PICTURES = 2000  # of CALIBRATION_DIR, half of which are held out
FEWEST_PICTURES = 10
NOISE = 0.05          # of images per second, at least: what is no faster than that is not worth any cost
KEPT = 3             # bundles per model and engine, besides those that a service is using


class BundleError(StartError):
    """A bundle that does not match its manifest; the message is one line."""


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(folder):
    """Compare every file with its SHA-256. Returns the Manifest; raises BundleError."""
    manifest = read(folder)
    if manifest is None:
        raise BundleError(f"{folder} holds no model that this version can serve")
    for name, digest in manifest.files.items():
        try:
            if sha256(folder / name) != digest:
                raise BundleError(f"{folder / name} is damaged: its SHA-256 is not the one in manifest.json")
        except OSError as e:
            raise BundleError(f"{folder / name} cannot be read: {e.strerror}") from e
    return manifest


def users_sha256(variable, path):
    """The SHA-256 of the file that a setting names, None if it is unset. An image built with a checkpoint keeps in its
    place what sha256sum printed of it, in a file of that name with .sha256. Raises StartError."""
    note = path and path.with_name(path.name + ".sha256")
    try:
        if path and not path.exists() and note.exists():
            return note.read_text().split()[0]
        return sha256(path) if path else None
    except OSError as e:
        raise StartError(f"{variable} {path} cannot be read: {e.strerror}") from e


def calibration_files(settings):
    """At most MOST_PICTURES files of CALIBRATION_DIR that are called like pictures, evenly spread over their sorted
    paths; hidden files and folders, such as those of thumbnails, do not count. Raises StartError."""
    from app.media.pictures import EXTENSIONS  # with Pillow
    suffixes, paths = tuple(f".{one}" for one in EXTENSIONS), []
    for folder, folders, names in os.walk(settings.calibration_dir):  # there may be millions
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(folder, name) for name in names
                  if name.lower().endswith(suffixes) and not name.startswith(".")]
    paths.sort()
    files = [Path(path) for path in paths[::-(-len(paths) // MOST_PICTURES) or 1] if os.path.isfile(path)]
    check_number(settings, len(files))
    return files


def check_number(settings, number):
    if number < FEWEST_PICTURES:
        raise StartError(f"CALIBRATION_DIR {settings.calibration_dir} has {number} pictures that can be "
                         f"used; at least {FEWEST_PICTURES} are needed, and {MOST_PICTURES} are better")


def calibration_id(settings):
    """A hash of the names and sizes of the files in CALIBRATION_DIR; None if it is unset or absent, as in an image
    that has the bundle only. Raises StartError."""
    if settings.calibration_dir is None or not settings.calibration_dir.is_dir():
        return None
    try:
        about = [(str(path.relative_to(settings.calibration_dir)), path.stat().st_size)
                 for path in calibration_files(settings)]
    except OSError as e:
        raise StartError(f"CALIBRATION_DIR {settings.calibration_dir} cannot be read: {e.strerror}") from e
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def limit_id(settings):
    """A short hash of ACCURACY_LIMIT and CALIBRATION_DIR, for a folder's name."""
    return hashlib.sha256(json.dumps([settings.accuracy_limit, calibration_id(settings)]).encode()).hexdigest()[:6]


def missing(settings):
    """Names of the packages without which there is no int8 network."""
    wanted = {"nncf": "nncf", **({} if settings.calibration_dir else {"skimage": "scikit-image"})}
    return [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]


def has_vnni():
    """Whether this processor adds products of two 8-bit numbers without overflow. Others need 7 bits in the weights,
    which is less accurate: of 300 top classes of EfficientNet-Lite0, 39 were others without VNNI than with it if the
    weights had 8 bits, none if they had 7."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":  # does not use what the processor has
        return False
    with contextlib.suppress(OSError):
        return bool(re.search(r"\b(avx512_vnni|avx_vnni)\b", Path("/proc/cpuinfo").read_text()))
    return False


def fastest_within(quantization, limit):
    """The fastest of the measured precisions whose cost is within a limit, and those that are as fast, up to NOISE; the
    one that costs least comes first. Only fp32 if the costs are not trusted."""
    if not quantization.get("trusted", True):
        return ["fp32"]
    allowed = {name: one for name, one in quantization["precisions"].items() if one["cost"] <= limit}
    most = max((one["images_per_second"] for one in allowed.values()), default=0)
    fast = [name for name, one in allowed.items() if (1 + NOISE) * one["images_per_second"] >= most]
    return sorted(fast, key=lambda name: (allowed[name]["cost"], name != "fp32")) or ["fp32"]


def is_precision(manifest, settings, calibration):
    """Whether a bundle is what PRECISION, ACCURACY_LIMIT and CALIBRATION_DIR (a calibration_id) would make now."""
    found, asked, limit = manifest.quantization, settings.precision, settings.accuracy_limit
    if asked not in MEASURED or manifest.engine != "openvino":
        return found is None
    if found is None:  # fp32, unmeasured: an image without torch can make no other
        return asked == "auto" and importlib.util.find_spec("torch") is None
    if found.get("asked") != asked or calibration not in (None, found["calibration"]):
        return False
    if found["missing"] and not missing(settings) and importlib.util.find_spec("torch"):
        return False  # int8 can be tried by now
    if found["chosen"] == "int8" and found.get("vnni", True) and not has_vnni():
        return False  # it would answer otherwise here than when it was measured
    int8 = found["precisions"].get("int8")
    if limit > found["limit"] and int8 and int8["restored_layers"]:
        return False  # fewer restored layers would do
    if asked == "int8":
        return not limit < int8["cost"] <= found["limit"]  # restoring more layers might do
    return found["chosen"] in fastest_within(found, limit)


def find(settings, name, engine):
    """The newest bundle in MODEL_DIR for model `name` on this engine that fits MODEL_PATH, LABELS_PATH, PREPROCESSING
    and the installed libraries, or None; one whose costs are known goes first. Its files are not verified yet. Raises
    StartError if one is unreadable."""
    weights_sha256 = users_sha256("MODEL_PATH", settings.model_path)
    labels_sha256 = users_sha256("LABELS_PATH", settings.labels_path)
    calibration = calibration_id(settings) if settings.precision in MEASURED else None
    installed = installed_versions("openvino", "torch", "torchvision")
    folders = sorted((settings.model_dir / "bundles").glob("*/manifest.json"), key=os.path.getmtime, reverse=True)
    fitting = []
    for path in folders:
        manifest = read(path.parent)
        if (manifest and manifest.name == name and manifest.engine == engine
                and (manifest.weights["sha256"] == weights_sha256 if weights_sha256 else manifest.weights["default"])
                and manifest.weights["labels_sha256"] == labels_sha256
                and manifest.weights.get("preprocessing") == settings.preprocessing
                and is_precision(manifest, settings, calibration)
                and all(installed.get(k, v) == v for k, v in manifest.versions.items())):
            fitting.append(((manifest.quantization or {"trusted": False}).get("trusted", True), path.parent))
    return max(fitting, key=lambda each: each[0])[1] if fitting else None


@contextlib.contextmanager
def writing(model_dir, folder_name, pattern=None):
    """A temporary folder to fill, which becomes MODEL_DIR/bundles/<folder_name> in one step on success. It gets the
    newest calibration.json of the folders that match a pattern, by default of the one that it replaces."""
    root = model_dir / "bundles"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    folder.chmod(0o755)
    try:
        yield folder
        target = root / folder_name
        for path in sorted(root.glob(f"{pattern or folder_name}/calibration.json"), key=os.path.getmtime):
            shutil.copy(path, folder)  # of the same weights
        if target.exists():  # a damaged or outdated one: running workers keep the files they have open
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_manifest(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=1))


def prune(model_dir):
    """Remove what aborted exports left behind, and all but the newest KEPT bundles per model and engine, unless a
    service holds them (see hold). The caller holds MODEL_DIR's lock: nothing is being written."""
    root = model_dir / "bundles"
    for folder in root.glob(".new-*"):
        shutil.rmtree(folder, ignore_errors=True)
    newest = {}
    for path in sorted(root.glob("*/manifest.json"), key=os.path.getmtime, reverse=True):
        manifest = read(path.parent)
        kind = manifest and (manifest.name, manifest.engine, (manifest.quantization or {}).get("asked"))
        newest.setdefault(kind, []).append(path)
        if len(newest[kind]) > KEPT:
            with contextlib.suppress(OSError), open(path) as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)


def hold(folder):
    """Keep a bundle from being pruned until this process ends or closes the returned file; None if it is gone."""
    try:
        held = open(folder / "manifest.json")  # noqa: SIM115 - open on purpose
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None
    return held
