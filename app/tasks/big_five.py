"""The OCEAN model: apparent Big Five traits of the largest face in a picture, or averaged over a video's frames."""
import functools

from app.engine import pieces
from app.media import faces
from app.tasks.from_pictures import FromPictures, rounded
from app.tasks.options import AT, FRAMES, INSIGHT, METHOD, TTA


class BigFive(FromPictures):
    kind = "big_five_regression"
    options = (METHOD, TTA, FRAMES, AT, *INSIGHT)
    full_size = True  # as in the training of the checkpoints
    answers = "Traits"

    def cut(self, image, shot, options, call):
        in_order = functools.partial(pieces.in_order, self.place.slots, ending=pieces.Ending(call.deadline),
                                     is_guess=True)
        with call.stages("face"):
            box = faces.find_crop(image, options["method"], call.deadline, in_order)
        shot |= {"face_box": box, "face_detected": box is not None}
        if box is None:
            return None if options["method"] == "face" else image
        return faces.cut_out(image, box)

    def views(self, tensor, options):
        return [tensor, tensor[:, :, ::-1]] if options["tta"] else [tensor]

    def nothing_counts(self):
        return faces.no_face_found()

    def predictions(self, scores, options):
        """{trait: score}, the regression's raw outputs."""
        return {trait: rounded(score) for trait, score in zip(self.labels, scores, strict=True)}

    def metadata(self, views, scores, options):
        return {"backbone": self.network["backbone"], "method": options["method"], "tta": options["tta"],
                "face_detected": all(shot["face_detected"] for shot in views.counted), "frames": views.shots,
                "spread": self.predictions(scores.reshape(-1, scores.shape[-1]).std(axis=0), options)}

    def info(self):
        return {**super().info(), "backbone": self.network["backbone"], "traits": self.labels}
