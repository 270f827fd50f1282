"""The whole answer equals torchvision called directly: same weights, its own transforms, on every kind of picture."""
import io

import numpy as np
import pytest
import torch
from conftest import encoded, exported, photo, post
from PIL import Image

from app import create_app
from app.config import Settings
from app.prepare import bundles
from app.prepare.networks import (
    LITE0_PREPROCESSING,
    EfficientNetLite0,
    default_weights,
    lite0_weights_path,
    torchvision,
)

TOLERANCE = 1e-4
# For what happens to a picture before its network and engine matter.
one_network = pytest.mark.parametrize("seeded", [("mobilenet_v2", "openvino")], ids="-".join, indirect=True)


@pytest.fixture(scope="module", params=[("resnet50", "openvino"), ("mobilenet_v2", "openvino"), ("resnet18", "torch")],
                ids="-".join)
def seeded(request, checkpoint, model_dir):
    """(test client, function from an RGB PIL image to torchvision's probabilities) for one seeded model."""
    name, engine = request.param
    path = checkpoint(name)
    app = create_app(exported(Settings.parse({"MODEL_NAME": name, "MODEL_PATH": str(path), "ENGINE": engine,
                                              "MODEL_DIR": str(model_dir), "DEVICE": "cpu"})))
    module = torchvision().models.get_model(name)
    module.load_state_dict(torch.load(path, weights_only=True))
    module.eval()
    preset = default_weights(name).transforms()

    def direct(image):
        with torch.inference_mode():
            return module(preset(image)[None]).softmax(1)[0].numpy()
    return app.test_client(), direct


def check(client, data, expected, k=10, tolerance=TOLERANCE):
    response = post(client, data, top_k=k)
    assert response.status_code == 200, response.json
    answer = response.json["predictions"]
    assert [p["confidence"] for p in answer] == sorted((p["confidence"] for p in answer), reverse=True)
    assert len(answer) == k
    for p in answer:
        assert p["confidence"] == pytest.approx(expected[p["class_id"]], abs=tolerance)
        assert p["confidence"] == float(f"{p['confidence']:.6g}")
    assert answer[0]["confidence"] == pytest.approx(expected.max(), abs=tolerance)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera"])
def test_probabilities_equal_torchvisions(seeded, name):
    client, direct = seeded
    check(client, encoded(photo(name)), direct(photo(name).convert("RGB")))


@one_network
@pytest.mark.parametrize("size", [(333, 517), (1021, 77), (640, 427)])
def test_odd_sizes_equal_torchvisions(seeded, size):
    client, direct = seeded
    image = photo("coffee").resize(size)
    check(client, encoded(image), direct(image))


@one_network
@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_equals_its_rgb_reference(seeded, kind):
    client, direct = seeded
    image = photo("astronaut")
    if kind == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        reference = photo("astronaut").convert("L").convert("RGB")
    else:
        image = image.convert(kind)
        reference = image.convert("RGB")
    check(client, encoded(image, "TIFF" if kind == "CMYK" else "PNG"), direct(reference))


@one_network
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_equal_the_upright_reference(seeded, orientation):
    client, direct = seeded
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera held that way would store the scene
    upright = photo("chelsea")
    stored = upright if turns[orientation] is None else upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    check(client, data, direct(upright))
    assert post(client, data).json["metadata"]["image_size"] == [451, 300]


def test_jpeg_equals_torchvision_on_the_same_decoder(seeded):
    client, direct = seeded
    data = encoded(photo("coffee"), "JPEG", quality=90)
    check(client, data, direct(Image.open(io.BytesIO(data)).convert("RGB")))


# Calculated with torch 2.13 from the published weights.
GOLDEN = {"chelsea": [("tiger cat", 0.395), ("Egyptian cat", 0.355)], "coffee": [("espresso", 0.95)],
          "camera": [("tripod", 0.94)], "rocket": [("missile", 0.27)]}


@pytest.mark.parametrize("name", GOLDEN)
def test_real_weights_give_their_golden_values(client, name):
    answer = post(client, encoded(photo(name))).json["predictions"]
    for got, (label, confidence) in zip(answer, GOLDEN[name], strict=False):
        assert got["class"] == label
        assert got["confidence"] == pytest.approx(confidence, abs=0.006)


@pytest.fixture(scope="module")
def lite0():
    """A function from an RGB PIL image to the probabilities of EfficientNet-Lite0 with its real weights, by torch."""
    module = EfficientNetLite0()
    module.load_state_dict(torch.load(lite0_weights_path(), weights_only=True))
    module.eval()

    def direct(image):
        with torch.inference_mode():
            return module(torch.from_numpy(LITE0_PREPROCESSING(image))[None]).softmax(1)[0].numpy()
    return direct


@pytest.mark.parametrize("name", GOLDEN)
def test_openvino_equals_torch_on_real_weights(client, lite0, name):
    check(client, encoded(photo(name)), lite0(photo(name).convert("RGB")))


@pytest.mark.parametrize("width", [1700, 3300])  # decoded at 1/2 and 1/4
@pytest.mark.parametrize("name", ["chelsea", "coffee", "astronaut"])
def test_large_jpeg_is_answered_as_if_decoded_at_full_size(client, lite0, name, width):
    data = encoded(photo(name).resize((width, width * 2 // 3)), "JPEG", quality=90)
    check(client, data, lite0(Image.open(io.BytesIO(data)).convert("RGB")), k=5, tolerance=0.04)  # 0.03 seen
    assert post(client, data).json["metadata"]["image_size"] == [width, width * 2 // 3]


def test_lite0_preprocessing_is_its_papers(client):
    image = photo("chelsea")
    x = np.asarray(image.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240)), np.float32)
    assert np.abs(LITE0_PREPROCESSING(image) - ((x - 127) / 128).transpose(2, 0, 1)).max() < 1e-5


def test_a_checkpoint_gets_the_preprocessing_of_its_training(checkpoint, model_dir):
    path = checkpoint("resnet18", num_classes=5, seed=4)
    module = torchvision().models.resnet18(num_classes=5)
    module.load_state_dict(torch.load(path, weights_only=True))
    transforms = torchvision().transforms
    preset = transforms.Compose([
        transforms.Resize(150, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(128), transforms.ToTensor(),
        transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))])
    image = photo("chelsea")
    with torch.inference_mode():
        expected = module.eval()(preset(image)[None]).softmax(1)[0].numpy()
    variables = {"MODEL_NAME": "resnet18", "MODEL_PATH": str(path), "MODEL_DIR": str(model_dir), "DEVICE": "cpu"}
    setting = "resize=150 crop=128 interpolation=bicubic mean=0.5,0.4,0.3 std=0.2,0.25,0.3"
    client = create_app(exported(Settings.parse({**variables, "PREPROCESSING": setting}))).test_client()
    check(client, encoded(image), expected, k=5)
    assert client.get("/info").json["model"]["input_size"] == [128, 128]
    for other, exists in ((setting, True), ("", False), ("resize=150", False)):
        folder = bundles.find(Settings.parse({**variables, "PREPROCESSING": other}), "resnet18", "openvino")
        assert (folder is not None) == exists, other


def test_a_fine_tuned_head_is_read_off_the_weights(checkpoint, model_dir, tmp_path):
    path = checkpoint("squeezenet1_1", num_classes=3)
    (tmp_path / "labels.txt").write_text("cat\ndog\nfish\n", encoding="utf-8")
    variables = {"MODEL_NAME": "squeezenet1_1", "MODEL_PATH": str(path), "MODEL_DIR": str(model_dir)}
    for labels, names in (({}, {"class_0", "class_1", "class_2"}),
                          ({"LABELS_PATH": str(tmp_path / "labels.txt")}, {"cat", "dog", "fish"})):
        client = create_app(exported(Settings.parse({**variables, **labels}))).test_client()
        answer = post(client, encoded(photo("coffee"))).json["predictions"]
        assert {p["class"] for p in answer} == names  # three, although five are asked for by default
        assert sum(p["confidence"] for p in answer) == pytest.approx(1, abs=1e-5)
