"""Classification: the most probable classes of a picture, or averaged over a video's frames."""
import numpy as np

from app.engine.preprocess import softmax
from app.tasks.from_pictures import FromPictures
from app.tasks.options import AT, FRAMES, TOP_K


class Classify(FromPictures):
    kind = "classification"
    options = (TOP_K, FRAMES, AT)
    answers = "Classes"

    def scores(self, outputs):
        return softmax(outputs)

    def predictions(self, scores, options):
        """[{"class", "confidence", "class_id"}] of the top_k classes, highest first."""
        best = np.argsort(-scores, kind="stable")[:options["top_k"]]
        return [{"class": self.labels[i], "confidence": float(scores[i]), "class_id": int(i)} for i in best]

    def metadata(self, views, scores, options):
        return {"frames": views.shots} if views.of_video else {}

    def info(self):
        return {**super().info(), "labels": self.labels}
