"""Tasks: each turns a file and options into an answer, using a given model."""


def create(manifest):
    """The task of a bundle. Imports OpenCV here, along with the model, and only for tasks that detect faces."""
    if manifest.task == "classification":
        from app.tasks.classify import Classify
        return Classify(manifest)
    from app.tasks.big_five import BigFive
    return BigFive(manifest)
