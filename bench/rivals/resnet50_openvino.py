"""ResNet-50 with OpenVINO: the network that this service exported (OPENVINO_MODEL, a model.xml in fp32), set up as
OpenVINO's documentation recommends, and torchvision's transforms with Pillow, which is faster than torchvision's own.
"""
import os
import threading

import numpy as np
import openvino
from openvino.preprocess import PrePostProcessor
from PIL import Image

RESIZE, CROP = 232, 224  # as torchvision's ResNet50_Weights.DEFAULT has them
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class ResNet50:
    """Thread-safe; each thread has an inference request of its own."""

    def __init__(self, streams=1):
        """streams: single-threaded inferences at once."""
        core = openvino.Core()
        prepare = PrePostProcessor(core.read_model(os.environ["OPENVINO_MODEL"]))  # normalises within the network
        prepare.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        prepare.input().model().set_layout(openvino.Layout("NCHW"))
        prepare.input().preprocess().convert_element_type(openvino.Type.f32).mean(255 * MEAN).scale(255 * STD)
        self.compiled = core.compile_model(prepare.build(), "CPU", {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams,
            "ENABLE_CPU_PINNING": False,  # or several processes are pinned to the same core
            "INFERENCE_PRECISION_HINT": "f32"})  # else it is bf16 where the processor has it, with other answers
        self.own = threading.local()

    def preprocess(self, image):
        """A PIL image → uint8 (1, 224, 224, 3), resized and cropped; the network normalises."""
        image = image.convert("RGB")
        w, h = image.size
        size = (RESIZE, int(RESIZE * h / w)) if w <= h else (int(RESIZE * w / h), RESIZE)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((image.width - CROP) / 2), round((image.height - CROP) / 2)
        return np.asarray(image.crop((left, top, left + CROP, top + CROP)))[None]

    def predict(self, batch):
        """uint8 (1, 224, 224, 3) → the top five classes."""
        if not hasattr(self.own, "request"):
            self.own.request = self.compiled.create_infer_request()
        self.own.request.infer(batch, share_inputs=True)
        logits = self.own.request.get_output_tensor(0).data[0]  # (1000,)
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        best = probabilities.argsort()[:-6:-1]
        return [{"class_id": int(i), "confidence": float(probabilities[i])} for i in best]
