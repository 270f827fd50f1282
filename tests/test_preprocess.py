"""Preprocessing equals torchvision's own transforms, on real photographs of odd sizes."""
import numpy as np
import pytest
from conftest import photo

from app.networks import default_weights, torchvision
from app.preprocess import Preprocessing


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
