"""Class activation maps equal Grad-CAM as torch's autograd calculates it, embeddings the vector before torch's head."""
import base64
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import encoded, exported, photo, post
from PIL import Image
from urllib3 import encode_multipart_formdata
from videos import pan_over, write

from app import create_app
from app.config import Settings, StartError
from app.engine import bundle
from app.engine.bundle import Prepared
from app.model_loader import ModelLoader
from app.prepare import features, networks, prepared
from app.prepare.networks import torchvision
from app.server import machine
from app.tasks import insight

CAT, FACE = photo("chelsea"), photo("astronaut")
TOLERANCE = 1e-3  # of the largest value in a map


@pytest.fixture(scope="module")
def served(checkpoint, model_dir):
    """served(name, **variables): a client of a service with a seeded torchvision network."""
    def serve(name, **variables):
        settings = Settings.parse({"MODEL_NAME": name, "MODEL_PATH": str(checkpoint(name)), "DEVICE": "cpu",
                                   "MODEL_DIR": str(model_dir), **variables})
        return create_app(exported(settings)).test_client()
    return serve


def preprocessed(image, weights):
    return weights.transforms()(image)[None]  # (1, 3, H, W)


def grad_cam(module, layer, x, output):
    """(Grad-CAM (h, w), the outputs (K,)) for one picture, by backpropagation; output: the class's number, None for the
    best one."""
    kept = []
    hook = layer.register_forward_hook(lambda layer, inputs, maps: kept.append(maps) or maps.retain_grad())
    outputs = module(x.requires_grad_())[0]
    hook.remove()
    outputs[outputs.argmax() if output is None else output].backward()
    maps, gradient = kept[0][0], kept[0].grad[0]
    return torch.relu((gradient.mean((1, 2))[:, None, None] * maps).sum(0)).detach().numpy(), outputs.detach()


def explanations(client, image, **options):
    answer = post(client, encoded(image), explain="true", **options)
    assert answer.status_code == 200, answer.text
    return answer.json["metadata"]["explanations"]


def close(found, expected):
    found = np.array(found)
    return found.shape == expected.shape and np.abs(found - expected).max() <= TOLERANCE * expected.max()


def seeded(name, path):
    module = torchvision().models.get_model(name, num_classes=1000)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_map_is_grad_cam(served, checkpoint, engine):
    client, module = served("resnet18", ENGINE=engine), seeded("resnet18", checkpoint("resnet18"))
    x = preprocessed(CAT, torchvision().models.ResNet18_Weights.DEFAULT)
    expected, outputs = grad_cam(module, module.layer4, x, None)
    found, = explanations(client, CAT)
    assert found["class_id"] == int(outputs.argmax())
    assert close(found["map"], expected)
    expected, _ = grad_cam(module, module.layer4, x, 7)
    found, = explanations(client, CAT, explain_class="7")
    assert (found["class"], found["class_id"]) == ("class_7", 7)
    assert close(found["map"], expected)
    by_name, = explanations(client, CAT, explain_class="class_7")
    assert by_name == found


def test_a_map_of_real_weights_is_grad_cam(client):
    module = networks.load_classifier("efficientnet_lite0", networks.lite0_weights_path(), False).module
    transforms = torchvision().transforms
    x = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
                            transforms.ToTensor(), transforms.Normalize(127 / 255, 128 / 255)])(CAT)[None]
    expected, _ = grad_cam(module, module._relu6, x, None)
    found, = explanations(client, CAT)
    assert (found["class"], found["class_id"]) == ("tiger cat", 282)
    assert close(found["map"], expected)


@pytest.mark.parametrize("tta", [False, True])
def test_each_trait_has_its_map(ocean_app, ocean_checkpoint, tta):
    module = networks.load_ocean(ocean_checkpoint).module
    transforms = torchvision().transforms
    prepare = transforms.Compose([transforms.Resize(268), transforms.CenterCrop(256), transforms.ToTensor(),
                                  transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    found = explanations(ocean_app.test_client(), FACE, method="middle", tta=tta)
    assert [one["trait"] for one in found] == ocean_app.extensions["model"].current.task.labels
    x = prepare(FACE.convert("RGB"))[None]
    for number, one in enumerate(found):
        # Of the mean of two scores, the maps are the mean of the two; what is negative goes after that.
        views = [(x, slice(None))] + [(x.flip(3), slice(None, None, -1))] * tta
        signed = []
        for view, turned in views:
            kept = []
            hook = module.backbone.layer4.register_forward_hook(lambda layer, inputs, maps, kept=kept: kept.append(maps)
                                                                or maps.retain_grad())
            module(view.clone().requires_grad_())[0, number].backward()
            hook.remove()
            weighted = (kept[0].grad[0].mean((1, 2))[:, None, None] * kept[0][0]).sum(0)
            signed.append(weighted.detach().numpy()[:, turned])
        assert close(one["map"], np.maximum(np.mean(signed, axis=0), 0))
    one, = explanations(ocean_app.test_client(), FACE, method="middle", tta=tta, explain_class="openness")
    assert one["map"] == found[0]["map"]


def overlay_of(explanation):
    """(H, W, 4) uint8, RGBA."""
    with Image.open(io.BytesIO(base64.b64decode(explanation["overlay"]))) as image:
        return np.asarray(image.convert("RGBA"))


def test_the_overlay_lies_where_the_network_looked(client):
    found, = explanations(client, CAT)
    pixels, heat = overlay_of(found), np.array(found["map"])
    assert pixels.shape[:2] == (300, 451)
    side = 300 * 224 / 256
    left, top = (451 - side) / 2, (300 - side) / 2
    outside = pixels[..., 3].astype(float)
    outside[round(top):round(top + side), round(left):round(left + side)] = 0
    assert outside.max() == 0
    y, x = np.unravel_index(pixels[..., 3].argmax(), pixels.shape[:2])
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert abs((y - top) / side * 7 - (row + 0.5)) < 0.75
    assert abs((x - left) / side * 7 - (column + 0.5)) < 0.75
    assert pixels[..., 3].max() > 240


def test_the_overlay_of_a_face_lies_in_its_box(ocean_app):
    answer = post(ocean_app.test_client(), encoded(FACE), explain="1", explain_class="neuroticism").json["metadata"]
    x, y, width, height = answer["frames"][0]["face_box"]
    pixels = overlay_of(answer["explanations"][0])
    assert pixels.shape[:2] == (512, 512)
    shown = np.argwhere(pixels[..., 3] > 0)
    assert (shown.min(axis=0) >= [y - 1, x - 1]).all()
    assert (shown.max(axis=0) <= [y + height, x + width]).all()


def test_an_upright_overlay_for_a_turned_picture(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = post(client, encoded(CAT.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif),
                 explain="yes").json["metadata"]
    assert found["image_size"] == [451, 300]
    assert overlay_of(found["explanations"][0]).shape[:2] == (300, 451)


@pytest.mark.parametrize("size", [(1, 300), (3000, 2), (1, 1), (5000, 700)])
def test_overlays_of_odd_sizes(client, size):
    found, = explanations(client, CAT.resize(size))
    pixels = overlay_of(found)
    scale = min(1, 512 / max(size))
    assert pixels.shape[:2] == tuple(max(1, round(side * scale)) for side in size[::-1])


def test_each_frame_of_a_video_has_its_map(client, ocean_app):
    clip = write(list(pan_over(np.asarray(FACE.convert("RGB")), 10)))
    answer = post(client, clip, explain="true", frames=2, embedding="true")
    assert answer.status_code == 200, answer.text
    metadata = answer.json["metadata"]
    assert "explanations" not in metadata
    shown = [frame["explanations"][0] for frame in metadata["frames"]]
    assert {one["class_id"] for one in shown} == {answer.json["predictions"][0]["class_id"]}
    assert shown[0]["map"] != shown[1]["map"]
    alone = [post(client, clip, at=frame["time_s"], embedding="true").json["metadata"]["embedding"]
             for frame in metadata["frames"]]
    assert np.allclose(np.mean(alone, axis=0), metadata["embedding"], atol=1e-5)
    answer = post(ocean_app.test_client(), clip, explain="true", frames=2, explain_class="openness").json
    assert [len(frame["explanations"]) for frame in answer["metadata"]["frames"]] == [1, 1]


def test_many_maps_have_small_overlays(ocean_app):
    clip, client = write(list(pan_over(np.asarray(FACE.convert("RGB")), 10))), ocean_app.test_client()

    def sides(**options):
        frames = post(client, clip, explain="true", method="middle", **options).json["metadata"]["frames"]
        return {max(overlay_of(one).shape) for frame in frames for one in frame["explanations"]}
    assert sides(frames=2) == {128}
    assert sides(frames=1) == sides(frames=9, at=0) == sides(frames=2, explain_class="openness")
    assert sides(frames=1) != {128}


def test_weak_maps_are_rounded_like_strong_ones():
    heat = np.array([[0.123456789, 0.2], [0, 0.05]], np.float32)
    assert insight.rounded(heat).tolist() == [[0.123457, 0.2], [0, 0.05]]
    assert insight.rounded(heat * np.float32(1e-9)) == pytest.approx(heat * 1e-9, abs=1e-15)
    assert not insight.rounded(np.zeros((2, 2), np.float32)).any()


def test_a_class_to_explain_is_enough(client):
    found, = post(client, encoded(CAT), explain_class="tabby").json["metadata"]["explanations"]
    assert found["class_id"] == 281


@pytest.mark.parametrize(("explain_class", "takes"), [
    ("Tabby", "of a class, got Tabby; did you mean tabby?"), ("x" * 60_000, "of a class, got " + 40 * "x"),
    ("dog and cat", "the name or class_id (0 to 999) of a class"), ("1000", "class_id (0 to 999)"),
    ("-1", "class_id (0 to 999)"), ("9" * 30, "class_id (0 to 999)"), ("1.5", "class_id"), ("²", "class_id")])
def test_a_class_that_there_is_not(client, explain_class, takes):
    answer = post(client, encoded(CAT), explain="true", explain_class=explain_class)
    assert (answer.status_code, answer.json["error"]) == (400, "INVALID_PARAMETER")
    assert answer.json["message"].startswith("explain_class must be ")
    assert takes in answer.json["message"]


@pytest.mark.parametrize(("path", "options"), [
    ("/predict/batch", {}), ("/predict", {"stream": "true"}), ("/embed", {})])
def test_a_class_that_there_is_not_is_no_mistake_of_each_file(client, path, options):
    body, content_type = encode_multipart_formdata([("files", ("a.png", encoded(CAT))), ("files", ("b.png", b"none")),
                                                    ("explain_class", "1000"), *options.items()])
    answer = client.post(path, data=body, content_type=content_type)
    assert (answer.status_code, answer.json["error"]) == (400, "INVALID_PARAMETER")
    assert "class_id (0 to 999)" in answer.json["message"]


def test_a_trait_that_there_is_not(ocean_app):
    answer = post(ocean_app.test_client(), encoded(FACE), explain="true", explain_class="kindness")
    assert (answer.status_code, answer.json["error"]) == (400, "INVALID_PARAMETER")
    assert "one of openness, conscientiousness" in answer.json["message"]


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_an_embedding_is_the_vector_before_the_head(served, checkpoint, engine):
    client, module = served("resnet18", ENGINE=engine), seeded("resnet18", checkpoint("resnet18"))
    module.fc = torch.nn.Identity()
    with torch.inference_mode():
        expected = module(preprocessed(CAT, torchvision().models.ResNet18_Weights.DEFAULT))[0].numpy()
    answer = post(client, encoded(CAT), embedding="true").json
    assert np.abs(np.array(answer["metadata"]["embedding"]) - expected).max() < 1e-4
    assert answer["predictions"] == post(client, encoded(CAT)).json["predictions"]
    answer = post(client, encoded(CAT), embedding="true", normalize="true").json["metadata"]["embedding"]
    assert np.abs(np.array(answer) - expected / np.linalg.norm(expected)).max() < 1e-4


def test_a_network_without_maps_has_an_embedding_and_says_why(served, checkpoint):
    client, module = served("mobilenet_v3_small"), seeded("mobilenet_v3_small", checkpoint("mobilenet_v3_small"))
    module.classifier[3] = torch.nn.Identity()
    with torch.inference_mode():
        expected = module(preprocessed(CAT, torchvision().models.MobileNet_V3_Small_Weights.DEFAULT))[0].numpy()
    found = post(client, encoded(CAT), embedding="1").json["metadata"]["embedding"]
    assert np.abs(np.array(found) - expected).max() < 1e-4
    answer = post(client, encoded(CAT), explain="true")
    assert (answer.status_code, answer.json["error"]) == (400, "INVALID_PARAMETER")
    assert answer.json["message"] == ("explain is not possible with mobilenet_v3_small: it does not end in global "
                                      "average pooling and a linear layer.")
    assert client.get("/info").json["model"]["features"]["kind"] == "vector"


class Pooled(torch.nn.Module):
    """Ends like DenseNet: a ReLU that is no module, and works in place."""

    def __init__(self, after=None):
        super().__init__()
        self.maps, self.head, self.after = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4), after

    def forward(self, x):
        maps = torch.nn.functional.relu(self.maps(x), inplace=True)
        outputs = self.head(maps.mean((2, 3)))
        return self.after(outputs) if self.after else outputs


def test_maps_before_an_activation_in_place_are_found():
    module = Pooled().eval()
    found, head = features.find(module, "head", 16)
    assert (found["kind"], found["module"], found["relu"], found["size"]) == ("maps", "maps", True, 8)
    assert np.array_equal(head, module.head.weight.detach().numpy())
    tap, x = features.tap(module, found), torch.randn(2, 3, 16, 16)
    outputs = module(x)
    assert torch.allclose(tap.take().mean((2, 3)) @ module.head.weight.T + module.head.bias, outputs, atol=1e-5)


@pytest.mark.parametrize(("module", "head", "kind", "reason"), [
    (Pooled(torch.nn.Sigmoid()), "head", "vector", "its outputs are not those of its last layer"),
    (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), "0", None,
     "its last layer is not a linear one"),
    (torch.nn.Sequential(torch.nn.Linear(16, 4)), "0", None, "its last layer does not take one vector per picture"),
    (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4)), "1", "vector",
     "it does not end in global average pooling and a linear layer")])
def test_networks_without_maps(module, head, kind, reason):
    found, weights = features.find(module.eval(), head, 16)
    assert (found["kind"], found["reason"], weights) == (kind, reason, None)


def test_how_sure_an_answer_is(client):
    found = post(client, encoded(CAT), top_k=10).json
    task = client.application.extensions["model"].current.task
    from app.errors import Deadline
    logits = torch.from_numpy(task.engine.infer(task.preprocessing(CAT.convert("RGB"))[None], Deadline(60))).double()
    expected = torch.distributions.Categorical(logits=logits)
    assert found["metadata"]["uncertainty"]["entropy"] == pytest.approx(expected.entropy().item(), rel=1e-5)
    first, second = (one["confidence"] for one in found["predictions"][:2])
    assert found["metadata"]["uncertainty"]["margin"] == pytest.approx(first - second, abs=1e-5)


@pytest.fixture
def own_bundle(settings, app, tmp_path):
    """(settings with a MODEL_DIR of the test's own, the folder of its only bundle)."""
    source = next(settings.model_dir.glob("bundles/efficientnet_lite0-*-openvino"))
    folder = tmp_path / "bundles" / source.name
    shutil.copytree(source, folder)
    return dataclasses.replace(settings, model_dir=tmp_path), folder


def calibrate(folder, **content):
    content = {"weights_sha256": bundle.read(folder).weights["sha256"], "folds": 5, **content}
    (folder / "calibration.json").write_text(json.dumps(content))


def test_a_calibrated_classifier_divides_its_logits(own_bundle, client):
    settings, folder = own_bundle
    calibrate(folder, temperature=2.5, pictures=40)
    other = create_app(settings).test_client()
    before, after = (post(one, encoded(CAT), top_k=10).json for one in (client, other))
    assert [p["class_id"] for p in before["predictions"]] == [p["class_id"] for p in after["predictions"]]
    ratios = [np.log(answer["predictions"][0]["confidence"] / answer["predictions"][5]["confidence"])
              for answer in (before, after)]
    assert ratios[0] / ratios[1] == pytest.approx(2.5, rel=1e-4)
    assert other.get("/info").json["model"]["calibration"] == {"temperature": 2.5, "pictures": 40}
    assert client.get("/info").json["model"]["calibration"] is None
    text = base64.b64encode(encoded(CAT)).decode()
    sent = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}],
            "outputs": [{"name": "logits"}, {"name": "probabilities"}]}
    outputs = [[np.array(output["data"]) for output in one.post(
        "/v2/models/efficientnet_lite0/infer", json=sent).json["outputs"]] for one in (client, other)]
    assert np.array_equal(outputs[0][0], outputs[1][0])  # the network's own
    powers = np.exp(outputs[1][0] / 2.5 - outputs[1][0].max() / 2.5)
    assert outputs[1][1] == pytest.approx(powers / powers.sum(), rel=1e-4, abs=1e-9)
    one, another = (one.application.extensions["model"].current.identity for one in (client, other))
    assert one != another


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"temperature": 0}', '{"temperature": "1"}',
                                  '{"temperature": NaN}', '{"temperature": 1e999}', '{"temperature": 1e-300}',
                                  '{"temperature": true}', '{"temperature": 2}',
                                  '{"temperature": 2, "weights_sha256": "0123"}'])
def test_a_damaged_calibration_stops_the_start(own_bundle, text):
    settings, folder = own_bundle
    (folder / "calibration.json").write_text(text)
    with pytest.raises(StartError, match="calibration.json cannot be used: .*; remove it, or calibrate again") as e:
        create_app(settings)
    assert "\n" not in str(e.value)


def test_a_calibration_is_served_once_it_is_published(own_bundle, client):
    """A worker that starts later serves what the others do."""
    settings, folder = own_bundle
    found, = prepared(settings, "openvino")
    calibrate(folder, temperature=2.5)
    assert found.calibration is None
    later, = prepared(settings, "openvino")
    assert later.calibration == {"temperature": 2.5}
    assert Prepared.of(later.as_json()) == later
    model = ModelLoader(settings, machine.plan(settings)).load([found]).current
    assert model.info()["calibration"] is None
    model.task.end()


def test_a_bundle_of_an_earlier_release_is_made_again(own_bundle):
    _, folder = own_bundle
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert bundle.read(folder) is None


def test_a_bundle_that_is_made_again_keeps_its_calibration(tmp_path):
    from app.prepare import bundles
    with bundles.writing(tmp_path, "one") as folder:
        (folder / "manifest.json").write_text("{}")
    (tmp_path / "bundles/one/calibration.json").write_text("{}")
    with bundles.writing(tmp_path, "one") as folder:
        (folder / "manifest.json").write_text("[]")
    assert {path.name for path in (tmp_path / "bundles/one").iterdir()} == {"manifest.json", "calibration.json"}
    assert (tmp_path / "bundles/one/manifest.json").read_text() == "[]"
