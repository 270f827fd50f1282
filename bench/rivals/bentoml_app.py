"""BentoML: one worker per core, as its documentation advises for CPUs; a synchronous API, which each runs in a thread;
the picture as PIL.Image, as for its examples with pictures.

With OpenVINO, one worker with as many threads and streams took a seventh more processor time for an answer, and the
picture as pathlib.Path a tenth more.

    bentoml serve --host 127.0.0.1 --port 8000 bench.rivals.bentoml_app:Classifier
"""
import bentoml
from PIL import Image


@bentoml.service(workers="cpu_count", traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self):
        from bench.rivals import resnet50  # only in the workers: the supervisor does not need it
        self.model = resnet50()

    @bentoml.api
    def predict(self, file: Image.Image) -> dict:
        return {"predictions": self.model.predict(self.model.preprocess(file))}
