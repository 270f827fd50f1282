"""ResNet-50 with torch: weights from MODEL_PATH, torchvision's own transforms, one thread."""
import os

import torch

try:
    import torchvision
except RuntimeError:  # torchvision's CUDA operators with a CPU build of torch: see app/prepare/networks.py
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision


class ResNet50:
    def __init__(self):
        torch.set_num_threads(1)  # one process per core: more threads would compete for them
        self.transforms = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
        self.module = torchvision.models.resnet50()
        self.module.load_state_dict(torch.load(os.environ["MODEL_PATH"], weights_only=True))
        self.module.eval()

    def preprocess(self, image):
        """A PIL image → float32 (1, 3, 224, 224)."""
        return self.transforms(image.convert("RGB"))[None]

    def predict(self, batch):
        """float32 (1, 3, 224, 224) → the top five classes."""
        with torch.inference_mode():
            probabilities, classes = self.module(batch)[0].softmax(0).topk(5)
        return [{"class_id": i, "confidence": p} for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]
