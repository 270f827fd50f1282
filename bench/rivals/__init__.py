"""Other ways to put the same model behind HTTP, each following the advice of its own documentation.

All accept the same upload (multipart, field `file`) on POST /predict and answer
{"predictions": [{"class_id": 207, "confidence": 0.85}, …]}: five of them, highest first. All decode every pixel, as the
examples in their documentation do; this service decodes a large JPEG at a reduced scale, and so could they, with
Pillow's Image.draft.
"""
import os


def resnet50():
    """The model in this process: with OpenVINO if OPENVINO_MODEL names a model.xml, else with torch. Each of its
    inferences takes one thread."""
    if os.environ.get("OPENVINO_MODEL"):
        from bench.rivals.resnet50_openvino import ResNet50
    else:
        from bench.rivals.resnet50_torch import ResNet50
    return ResNet50()
