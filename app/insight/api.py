"""POST /embed and /models/NAME/embed: the embeddings of 1 to MAX_BATCH_FILES pictures or videos."""
import json

from flask import Response

from app.api import batch
from app.engine.slots import in_native_thread
from app.errors import ServiceError
from app.insight import vectors
from app.tasks import insight


def embed(name=None):
    model, files, chosen, outcomes = batch.answered(name, options_for, how)
    return Response(in_native_thread(body_of, model, [file.filename for file in files], chosen, outcomes),
                    mimetype="application/json")


def options_for(task, options):
    return {**vectors.options_for(task, options), "path": "embed"}  # answers of /predict are cached apart


def how(task):
    """For Model.answer: the predictions are the embedding as the text of a JSON list."""
    calculate = vectors.how(task)

    def answer(data, options, call):
        vector, metadata = calculate(data, options, call)
        return json.dumps(insight.short(vector).tolist()), metadata
    return answer


def body_of(model, filenames, chosen, outcomes):
    """The answer as text: the embeddings are already, so that nothing long is encoded at once. Raises ServiceError."""
    results, failures = [], [o for o in outcomes if isinstance(o, ServiceError)]
    for i, (filename, o) in enumerate(zip(filenames, outcomes, strict=True)):
        head = {"index": i, "filename": filename}
        if isinstance(o, ServiceError):
            results.append(json.dumps(head | o.body()))
        else:
            results.append(json.dumps(head | {"status": "success"})[:-1] + f', "embedding": {o["predictions"]}}}')
    counts = {"count": len(results), "failed": len(failures)}
    if len(failures) == len(outcomes):
        raise batch.all_failed(failures, {**counts, "results": [json.loads(result) for result in results]})
    head = {"status": "success", "model": model.name, **({"version": model.version} if model.version else {}),
            "size": model.task.manifest.features["size"], "normalized": chosen["normalize"], **counts}
    return json.dumps(head)[:-1] + f', "results": [{", ".join(results)}]}}\n'
