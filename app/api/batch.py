"""POST /predict/batch and /models/NAME/predict/batch: several inputs, one result for each, in order. Imported with the
first batch."""
import functools
import json

from flask import Response, current_app, g, request

from app.api import uploads
from app.api.predict import client, client_watch, request_deadline
from app.engine.batches import run_batch
from app.engine.slots import in_native_thread
from app.errors import ServiceError, internal_error, out_of_memory
from app.server import counters
from app.tasks import Call, options


def predict_batch(name=None):
    _, files, _, outcomes = answered(name)
    body, failures = body_of([file.filename for file in files], outcomes)
    if len(failures) == len(files):
        raise all_failed(failures, body)
    return Response(in_native_thread(text_of, {"status": "success", **body}), mimetype="application/json")


def answered(name, options_for=lambda task, chosen: chosen, how_for=lambda task: None):
    """(model, uploads, options, outcomes) of the current request. options_for(task, options): those to use
    instead of what was sent; how_for(task): of Model.answer. Raises ServiceError."""
    loader, settings = current_app.extensions["model"], current_app.extensions["settings"]
    deadline = request_deadline(settings)
    loader.slots.check_room()
    request.max_form_parts = 2 * settings.max_batch_files + 64

    def sent_options():
        with g.stages("read"):
            return uploads.sent_options()

    def read(option, model):
        with g.stages("read"):
            g.model = model
            return batch_of_files(model.task, settings), options_for(model.task, options.read(option, model.task))

    def answers():
        option = loader.slots.run(sent_options, deadline, g.stages, client_watch())
        with loader.lease(name or option("model"), client) as model:
            files, chosen = in_native_thread(read, option, model)
            current_app.extensions["count_batch"](len(files))
            with g.stages("files"):
                calls = [functools.partial(outcome, model, file, chosen, deadline, i, how_for(model.task))
                         for i, file in enumerate(files)]
                return model, files, chosen, run_batch(loader.slots, traced(calls))
    with uploads.received(uploads.batch_limit(settings), deadline, loader.tasks(name or request.args.get("model"))):
        found = loader.when_loaded(answers, deadline)
    for o in found[3]:
        counters.count("batch_files", o.code if isinstance(o, ServiceError) else "")
    return found


def traced(calls):
    """The same calls, each in a span of its own if tracing is on."""
    in_span = current_app.extensions.get("traced_file")
    return calls if in_span is None else [functools.partial(in_span, i, call) for i, call in enumerate(calls)]


def batch_of_files(task, settings):
    """All inputs of the received body, unchecked, in the body's order, after sent_options. Raises ServiceError."""
    if task.is_file:
        files = uploads.parse_body(uploads.BATCH_FIELDS, task)
    else:
        from app.api import values
        files = values.several(task)
    if len(files) > settings.max_batch_files:
        raise ServiceError(400, "TOO_MANY_FILES", f"A batch may have at most {settings.max_batch_files} files, "
                           f"found {len(files)}; send the others in a second batch.")
    return files


def body_of(filenames, outcomes):
    """(members of the answer, the ServiceErrors among the outcomes)."""
    failures = [o for o in outcomes if isinstance(o, ServiceError)]
    results = [{"index": i, "filename": filename, **(o.body() if isinstance(o, ServiceError) else o)}
               for i, (filename, o) in enumerate(zip(filenames, outcomes, strict=True))]
    return {"count": len(results), "failed": len(failures), "results": results}, failures


def text_of(body):
    """A body as JSON. Each result, which may have maps, is encoded by itself, as that holds the GIL."""
    encode = functools.partial(json.dumps, separators=(",", ":"))
    head = encode({name: value for name, value in body.items() if name != "results"})
    return f'{head[:-1]},"results":[{",".join(map(encode, body["results"]))}]}}\n'


def outcome(model, file, chosen, deadline, position, how):
    """The result for one file, or its ServiceError. Runs in its own greenlet, in a copy of the request's context."""
    loader, settings, cache, record = (current_app.extensions[name] for name in ("model", "settings", "cache",
                                                                                 "record"))
    stages, data, is_hit = type(g.stages)(), None, False

    def read():
        nonlocal data
        with stages("read"):
            data = file.read(settings)

    def answer_in_slot():
        if data is None:
            read()
        return model.answer(data, chosen, Call(deadline, stages, file.field), how)

    def in_slot():
        return loader.slots.run(answer_in_slot, deadline, stages, admitted=True)
    try:
        if cache is None:
            answer = in_slot()
        else:
            in_native_thread(read)
            answer, is_hit = cache.fetch(model, data, chosen, in_slot, deadline, stages, admitted=True)
        if record:
            record(model, data, chosen, answer, is_hit, position)
        return {"status": "success", **answer}
    except ServiceError as e:
        return e
    except MemoryError as e:
        return out_of_memory(e)
    except Exception as e:  # a bug that one file triggers does not affect the others
        return internal_error(e)
    finally:
        stages.count()


def all_failed(failures, body):
    """The error if every file failed; if the service itself was at fault, its code is kept so that callers retry."""
    first = failures[0]
    if first.status >= 500 and all(f.code == first.code for f in failures):
        return ServiceError(first.status, first.code, first.message, first.retry_after_s, details=body)
    message = (f"None of the {len(failures)} files could be answered; their results say why." if len(failures) > 1 else
               "The file could not be answered; its result says why.")
    return ServiceError(422, "ALL_FAILED", message, details=body)
