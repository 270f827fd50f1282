"""OCEAN's scores equal the same checkpoint called through torchvision's own transforms and OpenCV, written down here
once more without the service's code; every form of the checkpoint loads, every other is refused in one line."""
import base64
import dataclasses
import functools
import io
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, encoded, photo, post
from opencv_faces import all_faces
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from urllib3 import encode_multipart_formdata
from videos import opencv_frames, pan_over, write

from app import create_app
from app.config import Settings
from app.errors import Deadline, DeadlineExceeded
from app.prepare import PrepareError, make, networks
from app.prepare.networks import WeightsError, load_ocean, torchvision
from app.server.counters import Stages
from app.tasks import Call
from app.tasks.options import read

TOLERANCE = 1e-4
TRAITS = ["openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism"]


@pytest.fixture(scope="module")
def client(ocean_app):
    return ocean_app.test_client()


@pytest.fixture(scope="module")
def direct(ocean_checkpoint):
    """direct(frames, method, tta): (mean scores (5,), scores (frames × flips, 5), boxes) of RGB arrays (H, W, 3)."""
    state = torch.load(ocean_checkpoint, weights_only=True)["model"]
    backbone = torchvision().models.resnet18()
    backbone.fc = nn.Identity()
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    backbone.eval()
    transforms = torchvision().transforms
    prepare = transforms.Compose([transforms.Resize(268), transforms.CenterCrop(256), transforms.ToTensor(),
                                  transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def crop(pixels, method):
        boxes = all_faces(pixels) if method != "middle" else []
        if not boxes:
            return pixels, None
        x, y, w, h = max(boxes, key=lambda box: box[2] * box[3])
        side = int(max(w, h) * 1.35)
        x0, y0 = int(max(0, x + w / 2 - side / 2)), int(max(0, y + h / 2 - side / 2))
        x1, y1 = int(min(pixels.shape[1], x0 + side)), int(min(pixels.shape[0], y0 + side))
        return pixels[y0:y1, x0:x1], [x0, y0, x1 - x0, y1 - y0]

    def scores(frames, method="face+middle", tta=True):
        inputs, boxes = [], []
        for pixels in frames:
            cropped, box = crop(pixels, method)
            boxes.append(box)
            tensor = prepare(Image.fromarray(cropped))
            inputs += [tensor, tensor.flip(2)] if tta else [tensor]
        with torch.inference_mode():
            each = backbone(torch.stack(inputs)) @ state["head.1.weight"].T + state["head.1.bias"]
        return each.mean(0).numpy(), each.numpy(), boxes
    return scores


def check(response, expected, boxes):
    assert response.status_code == 200, response.json
    predictions, metadata = response.json["predictions"], response.json["metadata"]
    assert list(predictions) == TRAITS
    mean, each, _ = expected
    assert list(predictions.values()) == pytest.approx(mean, abs=TOLERANCE)
    assert list(metadata["spread"].values()) == pytest.approx(each.std(0), abs=TOLERANCE)
    assert [frame["face_box"] for frame in metadata["frames"]] == boxes
    assert [frame["face_detected"] for frame in metadata["frames"]] == [box is not None for box in boxes]
    for i, frame in enumerate(metadata["frames"]):
        of_frame = each.reshape(len(boxes), -1, 5)[i].mean(0)
        assert list(frame["predictions"].values()) == pytest.approx(of_frame, abs=TOLERANCE)


@pytest.mark.parametrize("tta", [True, False])
@pytest.mark.parametrize("method", ["face", "middle", "face+middle"])
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_picture_equals_the_direct_calculation(client, direct, name, method, tta):
    response = post(client, encoded(photo(name)), method=method, tta=str(tta).lower())
    if (name, method) == ("coffee", "face"):
        assert (response.status_code, response.json["error"]) == (422, "NO_FACE_FOUND")
        return
    expected = direct([np.asarray(photo(name))], method, tta)
    check(response, expected, expected[2])
    metadata = response.json["metadata"]
    assert metadata["face_detected"] == (name == "astronaut" and method != "middle")
    assert (metadata["method"], metadata["tta"], metadata["media_type"]) == (method, tta, "image")
    assert (metadata["model"], metadata["backbone"], metadata["image_size"]) == (
        "ocean", "resnet18", list(photo(name).size))
    assert set(metadata["timings_ms"]) == {"read", "queue", "decode", "face", "preprocess", "inference"}


def test_large_photograph_equals_the_direct_calculation(client, direct):
    """A JPEG is not decoded at a smaller scale here: the face is searched, and scored, in every pixel."""
    data = encoded(photo("astronaut").resize((1400, 1400)), "JPEG", quality=90)
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    for method in ("middle", "face"):
        expected = direct([pixels], method)
        check(post(client, data, method=method), expected, expected[2])


@pytest.fixture(scope="module")
def clip():
    """90 frames of a pan over the astronaut, at the end without her face."""
    return write(pan_over(np.asarray(photo("astronaut").resize((640, 640))), 90, 360, 300), bf="3", g="20")


@pytest.mark.parametrize("asked", [{}, {"frames": 5}, {"frames": 3, "tta": "false"}, {"at": 1.25},
                                   {"frames": 16, "tta": "false", "method": "middle"}])
def test_video_equals_the_direct_calculation(client, direct, clip, asked):
    shown, count = opencv_frames(clip), asked.get("frames", 1)
    indices = [int(1.25 * 30)] if "at" in asked else [int((i + 0.5) * 90 / count) for i in range(count)]
    expected = direct([shown[i] for i in indices], asked.get("method", "face+middle"), "tta" not in asked)
    response = post(client, clip, "clip.mp4", **asked)
    check(response, expected, expected[2])
    metadata = response.json["metadata"]
    assert [frame["index"] for frame in metadata["frames"]] == indices
    assert [frame["time_s"] for frame in metadata["frames"]] == pytest.approx([i / 30 for i in indices], abs=1e-3)
    assert (metadata["media_type"], metadata["image_size"]) == ("video", [360, 300])
    assert metadata["face_detected"] == all(box is not None for box in expected[2])


def test_frames_without_a_face_do_not_count_where_a_face_is_asked_for(client, direct):
    face, none = np.asarray(photo("astronaut").resize((300, 300))), np.zeros((300, 300, 3), np.uint8)
    data = write([face] * 4 + [none] * 4, g="1")
    response = post(client, data, frames=2, method="face")
    mean, _, boxes = direct([opencv_frames(data)[2]], "face")
    assert list(response.json["predictions"].values()) == pytest.approx(mean, abs=TOLERANCE)
    shots = response.json["metadata"]["frames"]
    assert [shot["face_box"] for shot in shots] == [boxes[0], None]
    assert "predictions" not in shots[1]
    assert post(client, write([none] * 4), method="face").json["error"] == "NO_FACE_FOUND"


@pytest.mark.parametrize(("sent", "method", "tta"), [
    ({"use_tta": "false"}, "face+middle", False), ({"tta": "0", "method": "FACE"}, "face", False),
    ({"tta": "", "method": ""}, "face+middle", True), ({"top_k": "3", "tta": "on"}, "face+middle", True)])
def test_forms_of_the_options(client, sent, method, tta):
    metadata = post(client, encoded(photo("astronaut")), **sent).json["metadata"]
    assert (metadata["method"], metadata["tta"]) == (method, tta)


def test_plus_in_a_query_and_values_in_json(client):
    data = encoded(photo("astronaut"))
    answer = client.post("/predict?method=face+middle&tta=false", data=data, content_type="image/png").json
    assert (answer["metadata"]["method"], answer["metadata"]["tta"]) == ("face+middle", False)
    answer = client.post("/predict", json={"image": base64.b64encode(data).decode(), "tta": False, "at": 0.5,
                                           "method": "middle"}).json
    assert (answer["metadata"]["method"], answer["metadata"]["tta"]) == ("middle", False)


def test_settings_are_the_defaults_of_the_options(ocean_settings, clip):
    settings = dataclasses.replace(ocean_settings, face_method="middle", tta=False, video_frames=3)
    metadata = post(create_app(settings).test_client(), clip).json["metadata"]
    assert (metadata["method"], metadata["tta"], len(metadata["frames"])) == ("middle", False, 3)


def test_batch_and_info(client):
    data = encoded(photo("astronaut"))
    body, content_type = encode_multipart_formdata([
        ("files", ("a.png", data)), ("files", ("b.png", encoded(photo("coffee")))), ("method", "face")])
    answer = client.post("/predict/batch", data=body, content_type=content_type).json
    assert [result.get("error") for result in answer["results"]] == [None, "NO_FACE_FOUND"]
    assert list(answer["results"][0]["predictions"]) == TRAITS
    model = client.get("/info").json["model"]
    assert (model["task"], model["traits"], model["backbone"]) == ("big_five_regression", TRAITS, "resnet18")
    assert model["input_size"] == [256, 256]


def test_answers_of_other_options_are_not_those_of_the_cache(ocean_app, ocean_settings, clip):
    settings = dataclasses.replace(ocean_settings, cache_url="memory://")
    client = create_app(settings, ocean_app.extensions["model"]).test_client()
    asked = [{}, {"tta": "false"}, {"method": "middle"}, {"frames": "2"}, {"at": "0.5"}]
    answers = [post(client, clip, **options).json["predictions"]["openness"] for options in asked]
    assert len(set(answers)) == len(asked)
    for options, answer in zip(asked, answers, strict=True):
        response = post(client, clip, **options)
        assert (response.headers["X-Cache"], response.json["predictions"]["openness"]) == ("hit", answer)


# ---- checkpoints ----

@functools.cache
def resnet18_state():
    torch.manual_seed(1)
    return networks.OceanNetwork(5, "resnet18").state_dict()


def saved(content, path):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def plain(state):
    """The same weights in the names of a plain torchvision ResNet."""
    return {k.removeprefix("backbone.").replace("head.1.", "fc."): v for k, v in state.items()}


FORMS = {
    "as trained.pt": lambda state: {"model": state, "label_cols": TRAITS, "config": {"BACKBONE": "resnet18"}},
    "no config.pt": lambda state: {"model": state},
    "bare.pth": lambda state: state,
    "state_dict.pt": lambda state: {"state_dict": state, "epoch": 7},
    "parallel.pt": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "plain.pt": plain,
    "plain, parallel.pt": lambda state: {"state_dict": {f"module.{k}": v for k, v in plain(state).items()}},
    "bare.safetensors": lambda state: state,
    "plain.safetensors": plain,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_loads(form, tmp_path):
    state = resnet18_state()
    loaded = load_ocean(saved(FORMS[form](state), tmp_path / form))
    assert loaded.labels == (TRAITS if form.startswith("as trained") else [
        "extraversion", "neuroticism", "agreeableness", "conscientiousness", "openness"])
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert (loaded.preprocessing.resize, loaded.preprocessing.crop) == (268, 256)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_backbone_is_read_off_the_weights(backbone, tmp_path):
    with torch.device("meta"):
        state = networks.OceanNetwork(5, backbone).state_dict()
    assert networks.backbone_of(state, tmp_path) == backbone
    assert networks.backbone_of(plain_to_ocean(plain(state)), tmp_path) == backbone


def plain_to_ocean(state):
    return {f"backbone.{k}": v for k, v in state.items()}


def cut(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: {"model": s, "config": {"BACKBONE": "resnet50"}}, "says that its backbone is resnet50, but its weights"),
    (lambda s: {"model": s, "label_cols": ["a", "b"]}, "has a head of 5 outputs, expected 2 (a, b)"),
    (lambda s: {"model": s, "label_cols": ["a"] * 5}, "not a list of distinct names"),
    (lambda s: {"model": s, "label_cols": "openness"}, "not a list of distinct names"),
    (lambda s: cut(s, "head.1.weight"), "found a dict with the keys backbone."),
    (lambda s: cut(s, "head.1.bias"), "1 missing (such as head.1.bias)"),
    (lambda s: cut(s, "backbone.layer4.1.conv2.weight"), "1 missing (such as backbone.layer4.1.conv2.weight)"),
    (lambda s: {**s, "head.2.weight": torch.zeros(1)}, "1 unexpected (such as head.2.weight)"),
    (lambda s: {k: v for k, v in s.items() if ".layer4." not in k}, "has a backbone of 2-2-2-0 blocks, expected one"),
    (lambda s: {**plain(s), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)},
     "has a head of 1000 outputs, expected 5"),
    (lambda s: {"features.0.weight": torch.zeros(3)}, "found a dict with the keys features.0.weight"),
    (lambda s: {"epoch": 3}, "holds no state dict"),
    (lambda s: nn.Linear(2, 2), "a pickled model would run code and is refused"),
])
def test_other_checkpoints_are_refused_in_one_line(change, message, tmp_path):
    path = saved(change(resnet18_state()), tmp_path / "other.pt")
    with pytest.raises(WeightsError) as e:
        load_ocean(path)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_ocean_without_a_checkpoint_does_not_start(tmp_path):
    with pytest.raises(PrepareError, match="ocean needs MODEL_PATH"):
        make(Settings.parse({"MODEL_NAME": "ocean", "MODEL_DIR": str(tmp_path)}), "openvino")


def test_a_worker_serves_ocean_without_torch(ocean_settings, ocean_app):
    code = ("import sys; from app import create_app; from app.config import Settings\n"
            f"create_app(Settings.parse({{'MODEL_NAME': 'ocean', 'MODEL_PATH': {str(ocean_settings.model_path)!r}, "
            f"'MODEL_DIR': {str(ocean_settings.model_dir)!r}, 'DEVICE': 'cpu'}}))\n"
            "assert 'cv2' in sys.modules and 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_search_for_a_face_ends_at_the_deadline(ocean_app, ocean_settings):
    loader = ocean_app.extensions["model"]
    noise = np.random.default_rng(0).integers(0, 255, (4000, 4000, 3), np.uint8)  # seven seconds for all sizes
    image, task = Image.fromarray(noise), loader.current.task  # decoded, which takes its time too
    chosen = read(lambda name, _: {"method": "face"}.get(name), task)
    started = time.thread_time()
    with pytest.raises(DeadlineExceeded, match="during face"):
        task.answer(image, chosen, Call(Deadline(1), Stages()))
    assert time.thread_time() - started < 4


def test_a_picture_upside_down_in_its_file_is_searched_upright(client, direct):
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(photo("astronaut").transpose(Image.Transpose.ROTATE_180), "PNG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 3
    expected = direct([np.asarray(photo("astronaut"))])
    check(post(client, data), expected, expected[2])
    assert expected[2][0] is not None
