"""POST /predict/batch: several files, one result for each, in order."""
import functools
from concurrent.futures import TimeoutError as FutureTimeout

from flask import Blueprint, current_app, g, jsonify

from app import metrics, pipeline, uploads
from app.errors import ServiceError, internal_error, out_of_memory
from app.observability import Stages
from app.predict import answer_or_cached, request_deadline
from app.scheduler import DeadlineExceeded

bp = Blueprint("batch", __name__)


@bp.post("/predict/batch")
def predict_batch():
    model, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = request_deadline(settings)
    with model.scheduler.admission():
        with g.stages("read"):
            files, option = uploads.read_batch(settings, deadline)
            options = pipeline.options_from(option, settings, model)
        with g.stages("files"):
            calls = [functools.partial(outcome, file, options, deadline) for file in files]
            outcomes = [finished(future, deadline) for future in model.scheduler.start_batch(calls)]
    for o in outcomes:
        metrics.count("batch_files", o.code if isinstance(o, ServiceError) else "")
    failures = [o for o in outcomes if isinstance(o, ServiceError)]
    results = [{"index": i, "filename": file.filename, **(o.body() if isinstance(o, ServiceError) else o)}
               for i, (file, o) in enumerate(zip(files, outcomes, strict=True))]
    body = {"count": len(results), "failed": len(failures), "results": results}
    if len(failures) == len(results):
        raise all_failed(failures, body)
    return jsonify({"status": "success", **body})


def outcome(file, options, deadline):
    """The result of one file, or the ServiceError that it ended with. Runs in a thread of the scheduler's, in a copy
    of the request's context."""
    stages = Stages()
    try:
        with stages("read"):
            data = file.read(current_app.extensions["settings"])
        answer, _ = answer_or_cached(data, options, deadline, stages, admitted=True)
        return {"status": "success", **answer}
    except ServiceError as e:
        return e
    except MemoryError as e:
        return out_of_memory(e)
    except Exception as e:  # a bug that one file meets is that file's alone
        return internal_error(e)


def finished(future, deadline):
    try:
        return future.result(max(0, deadline.remaining()))
    except FutureTimeout:
        future.cancel()
        return DeadlineExceeded("queue")


def all_failed(failures, body):
    """The error of a batch without a single answer; the service's own failure keeps its code, so that callers retry."""
    first = failures[0]
    if first.status >= 500 and all(f.code == first.code for f in failures):
        return ServiceError(first.status, first.code, first.message, first.retry_after_s, details=body)
    return ServiceError(422, "ALL_FAILED", f"None of the {len(failures)} files could be answered; each one's result "
                                           "says why.", details=body)
