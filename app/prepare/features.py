"""What a network knows before its head, as a second output: the last feature maps, or the vector that goes into the
head. Imports torch.

A class activation map needs feature maps that are pooled by their mean, and a linear head on these means (Zhou et al.,
Learning Deep Features for Discriminative Localization, 2016); for such networks it equals Grad-CAM (Selvaraju et al.,
2017). Whether a network is one of them is tried, not looked up: its maps are those whose means go into its head.
"""
import threading

import torch
from torch import nn

TOLERANCE = 1e-4  # of what is compared, relative to the largest value


class Tap:
    """Keeps, for each thread, what a module gets (after=False) or gives (after=True) whenever it runs."""

    def __init__(self, module, after, relu=False):
        self.local, self.relu = threading.local(), relu
        if after:
            self.hook = module.register_forward_hook(lambda module, inputs, output: self.keep(output))
        else:
            self.hook = module.register_forward_pre_hook(lambda module, inputs: self.keep(inputs[0]))

    def keep(self, tensor):
        self.local.tensor = nn.functional.relu(tensor) if self.relu else tensor

    def take(self):
        """What the current thread's last run left here."""
        tensor, self.local.tensor = self.local.tensor, None
        return tensor


class WithFeatures(nn.Module):
    """(N, 3, H, W) → (the module's outputs, what its Tap took)."""

    def __init__(self, module, tap):
        super().__init__()
        self.module, self.tap = module, tap

    def forward(self, x):
        return self.module(x), self.tap.take()


def tap(module, features):
    """The Tap on a module for a manifest's `features`; None if they say that there is nothing to take."""
    if features["kind"] == "maps":
        return Tap(module.get_submodule(features["module"]), True, features["relu"])
    return Tap(module.get_submodule(features["head"]), False) if features["kind"] == "vector" else None


def find(module, head, side):
    """(a manifest's `features`, the head's weights (K, F) float32 if they have maps, else None).

    module: in eval mode; head: the name of its last layer; side: of the pictures that it takes.
    """
    def none(reason):
        return {"kind": None, "size": 0, "reason": reason}, None
    linear = module.get_submodule(head)
    if not isinstance(linear, nn.Linear):
        return none("its last layer is not a linear one")
    found, hooks = {}, []

    def kept(name):
        def keep(layer, inputs, output):
            if (isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[1] == linear.in_features
                    and output.shape[2] * output.shape[3] > 1):
                found[name] = output.clone()  # a later layer may work in place
        return keep
    before_head = Tap(linear, False)
    for name, layer in module.named_modules():
        if name:
            hooks.append(layer.register_forward_hook(kept(name)))
    with torch.inference_mode():
        outputs = module(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
        vector = before_head.take()
        for hook in (*hooks, before_head.hook):
            hook.remove()
        if vector.dim() != 2:
            return none("its last layer does not take one vector per picture")
        features = {"kind": "vector", "size": vector.shape[1], "head": head, "reason":
                    "it does not end in global average pooling and a linear layer"}
        if not equal(outputs, linear(vector)):
            return {**features, "reason": "its outputs are not those of its last layer"}, None
        for name, maps in reversed(found.items()):
            for relu in (False, True):
                if equal((maps.relu() if relu else maps).mean((2, 3)), vector):
                    return {**features, "kind": "maps", "module": name, "relu": relu, "reason": None}, \
                        linear.weight.detach().float().numpy()
    return features, None


def equal(a, b):
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
