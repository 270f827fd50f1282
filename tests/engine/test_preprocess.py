"""Preprocessing equals torchvision's own transforms, on real photographs of odd sizes."""
import numpy as np
import pytest
from conftest import photo
from PIL import Image

from app.engine.preprocess import Preprocessing
from app.prepare.networks import default_weights, torchvision


def spec_of(preset):
    return Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation.value, tuple(preset.mean),
                         tuple(preset.std))


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v2", "efficientnet_b1", "vit_h_14", "inception_v3", "swin_t"])
def test_tensor_equals_torchvisions(name, model):
    preset = default_weights(model).transforms()
    image = photo(name).convert("RGB")
    assert np.abs(spec_of(preset)(image) - preset(image).numpy()).max() < 1e-5


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (233, 1999), (1, 1), (3, 700), (224, 224), (231, 232),
                                  (97, 61)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_tensor_equals_torchvisions_at_odd_sizes(size, interpolation):
    image = photo("coffee").resize(size)
    transforms = torchvision().transforms
    preset = transforms._presets.ImageClassification(
        crop_size=224, resize_size=232, interpolation=transforms.InterpolationMode(interpolation))
    assert np.abs(spec_of(preset)(image) - preset(image).numpy()).max() < 1e-5


def test_crop_larger_than_the_resized_picture_is_padded_as_in_torchvision():
    preset = torchvision().transforms._presets.ImageClassification(crop_size=260, resize_size=233)
    image = photo("chelsea")
    assert np.abs(spec_of(preset)(image) - preset(image).numpy()).max() < 1e-5


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (6000, 300), (300, 6001), (20000, 40), (700, 3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_of_long_and_thin_pictures_only_the_middle_is_calculated(size, interpolation, monkeypatch):
    image = photo("coffee").resize(size)
    preprocessing = Preprocessing(232, 224, interpolation)
    bounded = preprocessing(image)
    monkeypatch.setattr("app.engine.preprocess.MOST_RESIZED_PIXELS", 10**9)
    whole = preprocessing(image)
    assert np.abs(bounded - whole).max() < 1.01 / 255 / 0.224  # a level of 255
    assert (bounded != whole).mean() < 0.01


@pytest.mark.parametrize("size", [(50_000_000, 1), (1, 50_000_000), (1_000_000, 50)])
def test_the_thinnest_pictures_cost_no_memory(size):
    assert Preprocessing(232, 224)(Image.new("RGB", size, "white")).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(300, 300), (300, 310), (900, 20)])
def test_a_crop_larger_than_a_large_picture_is_padded(size):
    assert Preprocessing(2100, 2200)(Image.new("RGB", size)).shape == (3, 2200, 2200)
