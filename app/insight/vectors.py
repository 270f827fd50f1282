"""Embeddings: the vector before a network's last layer."""
from app.errors import ServiceError
from app.tasks import insight
from app.tasks.from_pictures import FromPictures


def options_for(task, options):
    """The options with which `how` is called. Raises ServiceError INVALID_PARAMETER if the task has no embeddings."""
    if not isinstance(task, FromPictures):
        raise ServiceError(400, "INVALID_PARAMETER", "embedding is not possible with a model of one's own: only the "
                                                     "service's own networks have one.")
    wanted = {**options, "explain": False, "explain_class": None, "embedding": True}
    insight.check(task, wanted)
    return wanted


def how(task):
    """For Model.answer: the predictions are the embedding as float32 (F,)."""
    def answer(data, options, call):
        views = task.prepare(data, options, call)
        task.infer(views, options, call)
        return insight.embedding(task, views, options["normalize"]), {}
    return answer
