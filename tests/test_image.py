"""The image's parts, without a container: its locked packages, what converts its model, what is taken out of it."""
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import requests
import videos
from conftest import ROOT, Service, encoded, photo

sys.path.append(str(ROOT / "deploy"))
import lock
import slim

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PACKAGES = Path(sysconfig.get_path("purelib"))


def locked(name):
    """{package: version} of a lock, as on Linux and this Python."""
    text = (ROOT / f"deploy/locks/{name}.txt").read_text()
    found = re.findall(r"^([\w.-]+)==([^ ;]+)(?: ; (.*?))? \\\n    --hash=sha256:", text, re.M)
    assert len(found) == len(re.findall(r"^\w", text, re.M)), "each has a hash"
    return {package: version for package, version, marker in found
            if "sys_platform == 'win32'" not in marker and "python_full_version >=" not in marker}


@pytest.mark.parametrize("name", lock.wanted())
def test_locks_have_what_is_pinned(name):
    pins = dict(pin.split("==") for pin in lock.wanted()[name]) if name != "torch" else {}
    pins = {re.sub(r"\[.*\]", "", package).lower(): version for package, version in pins.items()}
    assert pins.items() <= locked(name).items(), "run make lock"


def test_locks_agree_with_each_other():
    everything = {}
    for name in lock.wanted():
        for package, version in locked(name).items():
            assert everything.setdefault(package, version) == version, f"{package}: run make lock"
    assert "torch" not in locked("torch")
    assert not any(package.startswith(("torch", "nvidia")) for package in locked("cpu") | locked("torch"))
    assert locked("gpu").keys() >= {"torch", "torchvision", "nvidia-cublas"}


@pytest.mark.slow  # make test-deploy
def test_the_model_is_converted_by_what_the_dockerfile_copies_for_it(tmp_path):
    [stage] = re.findall(r"^FROM scratch AS converter\n(.*?)\n\n", DOCKERFILE, re.M | re.S)
    for line in re.findall(r"^COPY (.*)", stage.replace("\\\n", ""), re.M):
        *sources, target = line.split()
        for source in [path for pattern in sources for path in ROOT.glob(pattern)]:
            if source.is_dir():
                shutil.copytree(source, tmp_path / target.strip("/"), dirs_exist_ok=True)
            else:
                (tmp_path / target.strip("/")).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, tmp_path / target.strip("/"))
    assert not (tmp_path / "app/api").exists()
    variables = {"PATH": os.environ["PATH"], "DEVICE": "cpu", "MODEL_NAME": "efficientnet_lite0"}
    made = subprocess.run([sys.executable, "-m", "app", "prepare"], cwd=tmp_path, env=variables, check=False,
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert list(tmp_path.glob("models/bundles/efficientnet_lite0-*-openvino/model.bin"))
    subprocess.run([sys.executable, "-c", "import app.prepare.precision, app.prepare.quantize, app.prepare.samples"],
                   cwd=tmp_path, check=True)  # for PRECISION=int8


@pytest.fixture(scope="module")
def slim_python(tmp_path_factory):
    """The interpreter of an environment that has the packages of the image `cpu`, and nothing else."""
    folder = tmp_path_factory.mktemp("slim")
    before, after = slimmed(folder, "cpu")
    assert after < 0.7 * before
    return folder / "bin/python"


def slimmed(folder, kind):
    """Makes an environment of the locked packages and slims it; returns its sizes in bytes before and after."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    target = next(folder.glob("lib/python3*/site-packages"))

    for package in locked("cpu").keys() - {"async-timeout"}:  # for Python 3.11.0 to 3.11.2
        for file in importlib.metadata.files(package):
            source = PACKAGES / file
            if ".." not in file.parts and source.is_file():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target / file)
                except OSError:  # on another file system
                    shutil.copy2(source, target / file)
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    done = subprocess.run([sys.executable, ROOT / "deploy/slim.py", folder, kind], check=False, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "x86_64" not in sysconfig.get_platform() or done.stderr == "", "a pattern finds nothing any more"
    return before, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def read_only_python(slim_python, tmp_path):
    """The same, in a place where /dev/shm and /tmp are read-only, if the tests run as root."""
    if os.geteuid():
        return slim_python
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec unshare --mount sh -c 'mount -t tmpfs -o ro none /dev/shm && "
                       f"mount --bind -o ro /tmp /tmp && exec {slim_python} \"$@\"' sh \"$@\"\n")
    program.chmod(0o755)
    return program


@pytest.mark.slow  # make test-deploy
def test_what_is_left_in_the_image_answers_the_same(read_only_python, service, tmp_path):
    slim = Service(tmp_path, service.variables, python=read_only_python)
    try:
        slim.wait_ready()
        versions = requests.get(f"{slim.url}/info", timeout=10).json()["versions"]
        assert "torch" not in versions
        cat = photo("chelsea")
        clip = videos.write([np.asarray(cat.resize((160, 96)))] * 10)
        formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF", "heic": "HEIF"}
        files = {suffix: encoded(cat, format) for suffix, format in formats.items()} | {"mp4": clip}
        for suffix, data in files.items():
            ours, theirs = (one.predict(data, f"cat.{suffix}", explain="true" if suffix == "jpg" else "false")
                            for one in (slim, service))
            assert ours.status_code == 200, f"{suffix}: {ours.text}"
            assert ours.json()["predictions"] == theirs.json()["predictions"], suffix
        tensor = {"inputs": [{"name": "tensor", "datatype": "FP32", "shape": [1, 3, 224, 224],
                              "data": [0.0] * (3 * 224 * 224)}]}
        paths = [f"{one.url}/v2/models/efficientnet_lite0/infer" for one in (slim, service)]
        ours, theirs = (requests.post(path, json=tensor, timeout=30) for path in paths)
        assert ours.status_code == theirs.status_code == 200, ours.text
        assert ours.json()["outputs"] == theirs.json()["outputs"]
        if os.geteuid() == 0:
            opened = [os.readlink(path) for path in Path(f"/proc/{slim.workers()[0]}/fd").iterdir()]
            assert any(path.startswith("/memfd:heartbeat") for path in opened)
        for path in ("/metrics", "/docs", "/openapi.json", "/"):
            assert requests.get(slim.url + path, timeout=10).status_code == 200
    finally:
        assert slim.stop() == 0


@pytest.mark.slow  # make test-deploy
def test_what_is_left_in_the_image_finds_faces(slim_python, tmp_path):
    photo("astronaut").save(tmp_path / "face.png")
    find = "import sys; from PIL import Image; from app.media import faces; " \
           "print(faces.largest_face(Image.open(sys.argv[1]).convert('RGB')))"
    ours, theirs = (subprocess.run([python, "-c", find, tmp_path / "face.png"], cwd=ROOT, check=True,
                                   capture_output=True, text=True).stdout for python in (slim_python, sys.executable))
    assert ours == theirs


def test_the_service_calls_nothing_of_opencv_that_aborts_in_the_image():
    """Of OpenCV, slim.py takes linear algebra and AVIF out: cv2.solve and cv2.imdecode, say, would end the process."""
    code = "".join(path.read_text() for path in ROOT.glob("app/**/*.py"))
    called = set(re.findall(r"\bcv2\.(\w+)", code)) - {"error", "data"}
    assert {name for name in called if not name.isupper()} <= {
        "CascadeClassifier", "VideoCapture", "cvtColor", "groupRectangles", "setNumThreads"}
    assert all(", cv2.CAP_FFMPEG, " in line for line in re.findall(r"cv2\.VideoCapture\(.*", code))
    assert not re.search(r"from cv2|import cv2 as", code)


@pytest.mark.slow  # make test-deploy
def test_classes_of_ones_own_find_all_of_opencv_in_the_image_full(tmp_path):
    before, after = slimmed(tmp_path / "full", "full")
    assert after < 0.9 * before
    code = "import sys, cv2, numpy as np; print(cv2.solve(2 * np.eye(2), np.ones((2, 1)))[0], " \
           "cv2.imdecode(np.fromfile(sys.argv[1], np.uint8), cv2.IMREAD_COLOR).shape)"
    done = subprocess.run([tmp_path / "full/bin/python", "-c", code, ROOT / "tests/images/chelsea.jpg"], check=False,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True (300, 451, 3)\n"), done.stderr


@pytest.mark.slow  # make test-deploy
def test_what_stands_in_for_a_library_throws_where_that_one_does(slim_python):
    [before], [after] = (folder.glob("pillow_heif.libs/libheif-*") for folder in (
        PACKAGES, next(slim_python.parent.parent.glob("lib/python3*/site-packages"))))
    had, has = ([name for _, _, name, section in slim.Elf(path).symbols() if not section] for path in (before, after))
    pairs = [(old, new) for old, new in zip(had, has, strict=True) if old != new]
    assert ("x265_cleanup", "heif_have_decoder_for_format") in pairs
    assert [new for old, new in pairs if "throw" in old] == [slim.THROWS[old] for old, _ in pairs if "throw" in old]


@pytest.mark.slow  # make test-deploy
def test_a_model_that_is_not_in_the_image_needs_torch(slim_python, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir(mode=0o500)
    made = subprocess.run([slim_python, "-m", "app", "prepare"], cwd=ROOT, check=False, capture_output=True, text=True,
                          env={"MODEL_DIR": str(folder), "MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu"})
    assert made.returncode == 1
    assert "needs torch" in made.stderr
    assert len(made.stderr.splitlines()) == 1


@pytest.mark.slow  # make test-deploy
def test_an_image_keeps_the_sha256_of_its_checkpoint(checkpoint, command, tmp_path):
    """deploy/convert.sh leaves it in place of the checkpoint, whose model is found by it."""
    path = tmp_path / "my.pt"
    shutil.copy(checkpoint("mobilenet_v2", num_classes=5), path)
    variables = {"MODEL_NAME": "mobilenet_v2", "MODEL_PATH": str(path), "MODEL_DIR": str(tmp_path / "models")}
    code, folder, _ = command(["prepare"], variables)
    assert code == 0
    note = subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout
    path.unlink()
    assert command(["prepare"], variables)[0] == 1
    path.with_name("my.pt.sha256").write_text(note)
    assert command(["prepare"], variables)[:2] == (0, folder)

