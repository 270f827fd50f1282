"""The OCEAN model as its checkpoints are usually run: OpenCV searches each frame for faces of all sizes, torchvision
prepares it, torch scores it and its mirror image in one batch, one frame after the other.
"""
import tempfile

import cv2
import numpy as np
import torch
from PIL import Image

from app.prepare.networks import torchvision

MARGIN = 1.35  # side of the crop, relative to the face's longer side


class Ocean:
    def __init__(self, checkpoint):
        """checkpoint: path of {"model", "config", "label_cols"} with a ResNet under `backbone.` and `head.`."""
        saved = torch.load(checkpoint, weights_only=True)
        backbone = torchvision().models.get_model(saved["config"]["BACKBONE"])
        features, backbone.fc = backbone.fc.in_features, torch.nn.Identity()
        head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(features, len(saved["label_cols"])))
        self.network = torch.nn.ModuleDict({"backbone": backbone, "head": head}).eval()
        self.network.load_state_dict(saved["model"])
        transforms = torchvision().transforms
        self.prepare = transforms.Compose([
            transforms.Resize(int(256 * 1.05)), transforms.CenterCrop(256), transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
        self.cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")

    def picture(self, data):
        """(5,) scores of a picture, a file's bytes."""
        return self.score(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))

    def video(self, data, count):
        """(5,) mean scores of the middle frames of `count` equal segments of a video."""
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(data)
            file.flush()
            capture, scores = cv2.VideoCapture(file.name), []
            total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            for i in range(count):
                capture.set(cv2.CAP_PROP_POS_FRAMES, (2 * i + 1) * total // (2 * count))
                scores.append(self.score(capture.read()[1]))
            capture.release()
        return np.mean(scores, axis=0)

    def score(self, frame):
        """(5,) scores of a frame, (H, W, 3) uint8 BGR."""
        boxes = self.cascade.detectMultiScale(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), scaleFactor=1.1, minNeighbors=5,
                                              minSize=(60, 60), flags=cv2.CASCADE_SCALE_IMAGE)
        if len(boxes):
            x, y, w, h = max(boxes, key=lambda box: box[2] * box[3])
            side = int(max(w, h) * MARGIN)
            left, top = int(max(0, x + w / 2 - side / 2)), int(max(0, y + h / 2 - side / 2))
            frame = frame[top:top + side, left:left + side]
        tensor = self.prepare(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
        with torch.inference_mode():
            outputs = self.network["head"](self.network["backbone"](torch.stack([tensor, tensor.flip(2)])))
        return outputs.mean(dim=0).numpy()
