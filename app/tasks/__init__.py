"""What is answered: a task turns a file and options into an answer, with a model that it gets."""


def create(manifest):
    """The task of a bundle. OpenCV is imported here, with the model, and only where faces are searched."""
    if manifest.task == "classification":
        from app.tasks.classify import Classify
        return Classify(manifest)
    from app.tasks.big_five import BigFive
    return BigFive(manifest)
