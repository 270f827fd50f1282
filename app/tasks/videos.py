"""Answers to videos: the frames are decoded, cropped and inferred side by side as far as slots are idle. Imported with
the first video."""
import contextlib
import dataclasses
import functools
import itertools
import threading
import time

import numpy as np

from app.engine import pieces
from app.tasks.from_pictures import Views

MOST_PIXELS = 32_000_000  # of frames in memory at once: three of 4K; it takes 4 bytes per pixel


class Overlapping:
    """counters.Stages of a call whose frames may be in one at once: its time is that in which at least one frame was.
    """

    def __init__(self, stages):
        self.stages, self.inside, self.lock = stages, {}, threading.Lock()  # {stage: (frames, since when)}
        self.errors = {}  # {stage: the first error since then}

    @contextlib.contextmanager
    def __call__(self, stage):
        with self.lock:
            count, since = self.inside.get(stage, (0, 0))
            self.inside[stage] = count + 1, since if count else time.perf_counter()
        try:
            yield
        except BaseException as e:
            self.errors.setdefault(stage, e)
            raise
        finally:
            with self.lock:
                count, since = self.inside[stage]
                self.inside[stage] = count - 1, since
                if count == 1:
                    self.stages.add(stage, time.perf_counter() - since, self.errors.pop(stage, None))


def answer(task, data, options, call, send=None):
    """What task.answer returns for a video. send(its entry in the answer) is called for each frame, in order, as soon
    as it is answered, and may raise."""
    infers = send is not None or task.device == "cpu"  # batches are what makes a GPU fast
    views = prepare(task, data, options, call, infers, send)
    if not infers:
        task.infer(views, options, call)
    return task.answer_of(views, options, call)


def prepare(task, data, options, call, infers=False, send=None):
    """The Views of a video's frames; infers: with outputs."""
    views, outputs, features = Views([], [], [], None, True), [], []
    with contextlib.closing(of_frames(task, data, options, call, infers, send is not None)) as found:
        for one in found:
            views.inputs += one.inputs
            views.shots += one.shots
            views.counted += one.counted
            views.image_size = views.image_size or one.image_size
            if one.outputs is not None:
                outputs.append(one.outputs)
                features.append(one.features)
            if send:
                send(one.shots[0])
    if not views.counted:
        raise task.nothing_counts()
    if infers:
        views.outputs = np.concatenate(outputs)
        views.features = None if features[0] is None else np.concatenate(features)
    return views


def of_frames(task, data, options, call, infers, completes):
    """Yield the Views of each frame, in order; infers: with outputs; completes: with predictions in its entry."""
    slots, ending = task.place.slots, pieces.Ending(call.deadline)
    of_frame = dataclasses.replace(call, deadline=ending, stages=Overlapping(call.stages))

    def work(frame, size, is_only):
        one = Views([], [], [], None, True)
        task.look_at(one, frame, size, options, of_frame)
        if infers and one.counted:
            task.infer(one, options, of_frame, is_only and slots.is_alone())
            one.inputs = []
            if completes:
                task.answer_of(one, options, of_frame)
        return one
    with contextlib.closing(task.read_frames(data, True, options, call)) as frames:
        first = next(frames)
        is_only = options["frames"] == 1 or options["at"] is not None
        calls = map(lambda found: functools.partial(work, *found, is_only),
                    itertools.chain(iter([first]), frames))  # iter lets go of it, a list would not
        most = max(1, MOST_PIXELS // (first[1][0] * first[1][1]))
        del first
        yield from pieces.in_order(slots, calls, ending, most)
