"""Checkpoints of every accepted form load; each other one is refused in one line."""
import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from app.prepare import networks
from app.prepare.networks import WeightsError
from app.setting_formats import MODEL_NAMES


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return networks.torchvision().models.mobilenet_v2(num_classes=7).state_dict()


def forms(state):
    yield "bare.pt", state
    yield "state_dict.pth", {"state_dict": state, "epoch": 3}
    yield "model.pt", {"model": state, "config": {"lr": 0.1}}
    yield "parallel.pt", {"model_state_dict": {f"module.{k}": v for k, v in state.items()}}


@pytest.mark.parametrize("form", range(5))
def test_every_form_of_a_checkpoint_loads(state, form, tmp_path):
    if form == 4:
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    else:
        name, content = list(forms(state))[form]
        path = tmp_path / name
        torch.save(content, path)
    network = networks.load_classifier("mobilenet_v2", path, fine_tuned=True)
    assert network.labels == [f"class_{i}" for i in range(7)]
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("name", ["regnet_x_400mf", "mnasnet0_5"])
def test_architectures_with_ways_of_their_own(name, tmp_path):
    module = networks.torchvision().models.get_model(name, num_classes=7).eval()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    network, x = networks.load_classifier(name, tmp_path / "model.pt", fine_tuned=True), torch.randn(1, 3, 64, 64)
    assert torch.equal(network.module(x), module(x))


class Evil:
    def __reduce__(self):
        return print, ("code from the checkpoint ran",)


@pytest.mark.parametrize(("content", "message"), [
    (Evil(), "a pickled model would run code and is refused"),
    ([1, 2], "found a list"),
    ({"epoch": 3}, "found a dict with the keys epoch"),
    ({"fc.weight": torch.zeros(3, 3)}, "it has no classifier.1.weight"),
    ({"classifier.1.weight": torch.zeros(3, 1280)}, "missing (such as features.0.0.weight)"),
])
def test_other_contents_are_refused(content, message, tmp_path, capfd):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(WeightsError) as e:
        networks.load_classifier("mobilenet_v2", tmp_path / "model.pt", fine_tuned=True)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert "code from the checkpoint ran" not in "".join(capfd.readouterr())


def test_one_flipped_bit_is_noticed(checkpoint, tmp_path):
    data = bytearray(checkpoint("resnet18").read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(WeightsError, match=r"flipped\.pt is damaged: the checksum of .*data/\d+ in it does not match"):
        networks.load_classifier("resnet18", tmp_path / "flipped.pt", fine_tuned=True)


def test_weights_of_another_architecture_are_refused(checkpoint):
    with pytest.raises(WeightsError, match=r"does not fit resnet50: of its 320 .*, \d+ missing \(such as .* shape"):
        networks.load_classifier("resnet50", checkpoint("resnet18"), fine_tuned=True)


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_files_are_refused(checkpoint, tmp_path, damage, suffix):
    path = tmp_path / f"model.{suffix}"
    data = checkpoint("resnet18").read_bytes()
    path.write_bytes({"text": b"hello", "cut": data[:len(data) // 2], "empty": b""}[damage])
    with pytest.raises(WeightsError) as e:
        networks.load_classifier("resnet18", path, fine_tuned=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("text", "message"), [
    ("a\nb\n", "has 2 labels, but the model has 3 classes"),
    ('["a", "b", 3]', "must be a JSON list of strings"),
    ('["a", ', "looks like JSON but is not"),
])
def test_wrong_labels_are_refused(tmp_path, text, message):
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match=message):
        networks.read_labels(path, 3)


def test_labels_are_lines_or_json(tmp_path):
    path = tmp_path / "labels"
    path.write_text("Äpfel\n\n b \nc", encoding="utf-8")
    assert networks.read_labels(path, 3) == ["Äpfel", "b", "c"]
    path.write_text(json.dumps(["x", "y y"]), encoding="utf-8")
    assert networks.read_labels(path, 2) == ["x", "y y"]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "squeezenet1_0", "vit_b_32", "convnext_tiny"])
def test_heads_of_other_architectures_are_found(name, tmp_path):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):  # random weights of ninety million parameters would take seconds
        state = networks.torchvision().models.get_model(name, num_classes=4, **options).state_dict()
    torch.save({name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.items()}, tmp_path / "model.pt")
    network = networks.load_classifier(name, tmp_path / "model.pt", fine_tuned=True)
    crop = network.preprocessing.crop
    with torch.inference_mode():
        assert network.module(torch.zeros(1, 3, crop, crop)).shape == (1, 4)


def test_a_vision_transformer_for_larger_pictures_is_recognised(tmp_path):
    module = networks.torchvision().models.vit_b_32(image_size=96, num_classes=3)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    network = networks.load_classifier("vit_b_32", tmp_path / "model.pt", fine_tuned=True)
    assert (network.preprocessing.resize, network.preprocessing.crop) == (96, 96)
    picture = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(network.module(picture), module.eval()(picture))
    assert networks.rebuild(**network.arguments).image_size == 96


def test_a_std_of_0_is_refused():
    network = networks.load_classifier("efficientnet_lite0", networks.lite0_weights_path(), fine_tuned=False)
    assert networks.with_preprocessing(network, "std=0.5,1,2 crop=96").preprocessing.std == (0.5, 1, 2)
    with pytest.raises(WeightsError, match="a std below"):
        networks.with_preprocessing(network, "std=0.5,0.0,1")


def test_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(WeightsError, match=r"'resnet51' is unknown; did you mean resnet50\? .*resnet18"):
        networks.default_weights("resnet51")


def test_suggestions_for_model_names_know_all_of_them():
    models = networks.torchvision().models
    known = [*models.list_models(module=models), "efficientnet_lite0", "ocean"]
    assert sorted(MODEL_NAMES.split()) == sorted(known)


def test_a_matching_pair_of_torch_and_torchvision_is_left_alone():
    """Where the compiled operators load, nothing is declared in their place."""
    code = ("from app.prepare import networks; import torch; calls = []\n"
            "torch.library.define = lambda *a: calls.append(a)\n"
            "import sys, types; fake = types.ModuleType('torchvision'); sys.modules['torchvision'] = fake\n"
            "assert networks.torchvision() is fake and not calls")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchvisions_models_work_beside_this_torch():
    assert networks.torchvision().__version__.startswith(importlib.metadata.version("torchvision"))
    module = networks.torchvision().models.resnet18()
    assert module(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
