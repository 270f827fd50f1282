"""Classification: the most probable classes of a picture, or averaged over a video's frames."""
import numpy as np

from app.engine.preprocess import softmax
from app.tasks.from_pictures import FromPictures, rounded
from app.tasks.options import AT, FRAMES, INSIGHT, TOP_K


class Classify(FromPictures):
    kind = "classification"
    options = (TOP_K, FRAMES, AT, *INSIGHT)
    answers = "Classes"

    def __init__(self, place, manifest):
        super().__init__(place, manifest)
        self.calibration = place.source.calibration

    def scores(self, outputs):
        return softmax(outputs / self.calibration["temperature"] if self.calibration else outputs)

    def predictions(self, scores, options):
        """[{"class", "confidence", "class_id"}] of the top_k classes, highest first."""
        best = np.argsort(-scores, kind="stable")[:options["top_k"]]
        return [{"class": self.labels[i], "confidence": rounded(scores[i]), "class_id": int(i)} for i in best]

    def metadata(self, views, scores, options):
        mean = np.sort(scores.mean(axis=(0, 1)))
        some = mean[mean > 0]
        return {"uncertainty": {"entropy": rounded(abs((some * np.log(some)).sum())),  # in nats
                                "margin": rounded(mean[-1] - mean[-2:-1].sum())},
                **({"frames": views.shots} if views.of_video else {})}

    def identity(self):
        return [*super().identity(), self.calibration]

    def info(self):
        return {**super().info(), "labels": self.labels, "calibration": self.calibration}
