"""stream=true of POST /predict: server-sent events over one connection, one for each frame of a video, or for each of
several inputs, as soon as it is answered. Imported with the first such request.
"""
import contextlib
import contextvars
import dataclasses
import functools
import itertools

import gevent
from flask import Response, current_app, g, json, request, stream_with_context
from gevent.queue import Empty, Queue

from app.api import requests, uploads
from app.api.batch import batch_of_files, outcome
from app.api.predict import client
from app.engine.batches import run_batch
from app.engine.slots import in_native_thread
from app.errors import ServiceError, internal_error, out_of_memory
from app.media.containers import is_video
from app.server import counters
from app.tasks import Call, options, videos
from app.tasks.from_pictures import FromPictures

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would collect the events
SILENT_S, SILENCE = 15, ":\n\n"  # after so long without an event, a comment: proxies end connections that seem idle
LIVE = ("multipart/x-mixed-replace", "video/x-motion-jpeg")  # Content-Types of bodies that are answered as they arrive


def body_limit(settings):
    """Let the current request hold several files; returns how many bytes they may have together."""
    request.max_form_parts = 2 * settings.max_batch_files + 64
    return uploads.batch_limit(settings)


def respond(name, option, deadline, is_there):
    """The Response to the current request, whose body has been received. option: of uploads.sent_options; is_there():
    whether the client is still connected, or None. Raises what happens before the first event."""
    kept = contextlib.ExitStack()
    events = events_of(kept, name, option, deadline, is_there)
    first = next(events)
    bodies = current_app.extensions["bodies"]
    size = int(request.environ["CONTENT_LENGTH"])  # of the body, which the caller is about to let go
    bodies.grow(kept.enter_context(bodies.one()), size)
    return started(first, events)


def is_live(settings):
    """Whether the current request's body is to be answered while it arrives. Raises ServiceError."""
    return request.mimetype in LIVE and options.STREAM.value(lambda name, _: request.args.get(name), settings)


def respond_live(name, deadline, is_there):
    """The same for such a body, which has not been received."""
    from app.api import live
    return live.respond(name, deadline, is_there)


def started(first, events):
    """The Response that sends these events, and is logged and counted at its end."""
    g.is_stream = True
    response = Response(stream_with_context(sent(first, events)), content_type="text/event-stream", headers=HEADERS)
    response.call_on_close(events.close)  # `sent` does, unless nobody has taken the first
    return response


def sent(first, events):
    status, size = 200, 0
    counters.change("requests_in_progress", 1)  # from here on, as the application has ended the request
    try:
        for one in itertools.chain([first], events):
            size += len(one)  # they are ASCII
            yield one
    except Exception as e:  # the status has been sent: what went wrong is an event
        error = e if isinstance(e, ServiceError) else out_of_memory(e) if isinstance(e, MemoryError) else \
            internal_error(e)
        status, g.error_code = error.status, error.code
        last = event("error", {**error.body(), "request_id": g.request_id})
        size += len(last)
        yield last
    except BaseException:  # the client has left, or is cut off
        status, g.error_code = 499, "CLIENT_CLOSED_REQUEST"
        raise
    finally:
        events.close()
        g.stream_status = status
        requests.ended(status, size)
        counters.change("requests_in_progress", -1)


def event(name, data):
    """A server-sent event as text. JSON in ASCII has no line breaks."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def events_of(kept, name, option, deadline, is_there):
    """Yield the events. kept: an ExitStack for what is needed until their end."""
    loader, settings = current_app.extensions["model"], current_app.extensions["settings"]

    def read(model):
        with g.stages("read"):
            files, chosen = batch_of_files(model.task, settings), options.read(option, model.task)
            if len(files) == 1:
                files = [dataclasses.replace(files[0], content=files[0].read(settings))]
            return files, chosen
    with kept:
        model = g.model = loader.when_loaded(
            lambda: kept.enter_context(loader.lease(name or option("model"), client)), deadline)
        files, chosen = in_native_thread(read, model)
        current_app.extensions["count_batch"](len(files))
        is_of_frames = len(files) == 1 and isinstance(model.task, FromPictures) and is_video(files[0].content)
        yield from (of_video if is_of_frames else of_files)(model, files, chosen, deadline, is_there)


def of_video(model, files, chosen, deadline, is_there):
    """A `frame` for each frame, as in metadata.frames of the answer, which is the `end`."""
    loader, cache, record = (current_app.extensions[name] for name in ("model", "cache", "record"))
    file, stages, loop, audience = files[0], g.stages, gevent.get_hub().loop, Audience(is_there)

    def work(put):
        def send(shot):
            audience.check()
            loop.run_callback_threadsafe(put, event("frame", shot))

        how = functools.partial(videos.answer, model.task, send=send)
        if hasattr(loader, "within_cores"):  # of several models
            how = functools.partial(loader.within_cores, how)

        def answer():
            return model.answer(file.content, chosen, Call(deadline, stages, file.field), how)

        def in_slot():
            return loader.slots.run(answer, deadline, stages, is_there)
        found, is_hit = cache.fetch(model, file.content, chosen, in_slot, deadline, stages) if cache else (
            in_slot(), None)
        if is_hit:
            for shot in found["metadata"]["frames"]:
                put(event("frame", shot))
        else:
            loader.answered(model, file.content, chosen, found)
        if record:
            record(model, file.content, chosen, found, is_hit)
        put(in_native_thread(event, "end", {
            "status": "success", "predictions": found["predictions"],
            "metadata": {"filename": file.filename, **found["metadata"]}}))
    with audience:
        yield from produced(work)


def of_files(model, files, chosen, deadline, is_there):
    """A `frame` or an `error` for each input, in the order of the answers, then an `end` that counts them. The error of
    the only one is raised."""
    slots, stages, audience, failed = current_app.extensions["model"].slots, g.stages, Audience(is_there), 0

    def work(put):
        def one(i):
            if not audience.has_gone():
                put((i, answered(model, files[i], chosen, deadline, i)))
        with stages("files"):
            run_batch(slots, [functools.partial(one, i) for i in range(len(files))])
        audience.check()
    with audience:
        for one in produced(work):
            if one is SILENCE:
                yield one
                continue
            i, found = one
            is_error = isinstance(found, ServiceError)
            counters.count("batch_files", found.code if is_error else "")
            if is_error and len(files) == 1:
                raise found
            failed += is_error
            yield event("error" if is_error else "frame", {
                "index": i, "filename": files[i].filename, **(found.body() if is_error else found)})
    yield event("end", {"status": "success", "count": len(files), "failed": failed})


def answered(model, file, chosen, deadline, i):
    """The result for a file, as in a batch, or its ServiceError."""
    call = functools.partial(outcome, model, file, chosen, deadline, i, None)
    traced = current_app.extensions.get("traced_file")
    return traced(i, call) if traced else call()


class Audience:
    """Whether anyone still waits for the events: until the end of the block, as long as the client is connected."""

    def __init__(self, is_there):
        self.is_there, self.is_over = is_there, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.is_over = True

    def has_gone(self):
        return self.is_over or bool(self.is_there) and not self.is_there()

    def check(self):
        """Raises ServiceError."""
        if self.has_gone():
            raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "The client disconnected before its turn came.")


def produced(work):
    """Yield what work(put) puts, which runs in a greenlet of its own: that never waits for who takes it, as how much it
    is depends on the request alone. After the first, also SILENCE. Raises what it raises."""
    queue, within_s = Queue(), None

    def run():
        try:
            work(queue.put)
            queue.put(None)
        except Exception as e:
            queue.put(e)
    greenlet = gevent.spawn(contextvars.copy_context().run, run)
    try:
        while True:
            try:
                item = queue.get(timeout=within_s)
            except Empty:
                item = SILENCE
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
            within_s = SILENT_S
    finally:
        greenlet.kill(block=False)
