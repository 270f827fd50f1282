"""The base of models of one's own: subclass OwnTask, and serve it with MODEL_NAME=package.module:Class.

    class Shout(OwnTask):
        takes = "text"

        def predict(self, batch):
            return [text.upper() for text in batch]

Each worker calls load once, and decode, predict and encode for each request. They run in native threads.
"""
import base64
import json
import logging
import os
import re
import shlex
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np

from app import own_class
from app.config import StartError
from app.engine.batcher import Batcher
from app.engine.batches import grow
from app.errors import Deadline, ServiceError
from app.media import containers, pictures
from app.model_settings import snake_case
from app.server.counters import Stages
from app.tasks import Call, ModelError, Task, own_modules
from app.tasks.declarations import FILES, file, mistake, text
from app.tasks.options import AT, FRAMES, choice, integer, number, yes_or_no
from app.tasks.own_answers import Media, plain
from app.tasks.own_calls import one_line, within
from app.tasks.own_inputs import example_of, is_audio

BODY_TYPES = {"picture": "image/jpeg", "video": "video/mp4", "audio": "audio/wav", "text": "text/plain",
              "json": "application/json"}
MOST_SLOTS = 64  # native threads, for tasks that collect batches
LOAD_WITHIN_S = 600
END_WITHIN_S = 5

__all__ = ["InvalidInput", "Media", "OwnTask", "choice", "file", "integer", "number", "text", "yes_or_no"]

log = logging.getLogger(__name__)


class InvalidInput(ValueError):
    """What `decode` raises for an input that it cannot use. The message goes on after the name of what was sent:
    "must be a list of 4 numbers" becomes 400 INVALID_PARAMETER "features must be a list of 4 numbers".

    name: of an option, if that is what cannot be used.
    """

    def __init__(self, message, name=None):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Failed:
    """In place of an output: why there is none."""
    error: BaseException


class Instances(list):
    """The inputs of one request: (value, where it was found)."""


class OwnTask(Task):
    """One model: what it takes, and how it answers.

    takes: "json", "text", "audio", "picture", "video" or ("picture", "video"). `decode` gets a JSON value, a str, the
        bytes of an audio file, an upright RGB PIL image, or, if it may be a video, a list of these
    field: the member of a JSON body that holds the input; None: all members but the options
    options: a tuple of what choice, file, integer, number, text and yes_or_no make
    example: an input (a file: its bytes or Path), for the self-test and the documentation
    media_types: what the Media that `encode` returns may be
    input_schema: a JSON Schema of the input, if it is JSON
    answer_schema: a JSON Schema of what `encode` returns
    max_batch: how many inputs, of concurrent requests too, `predict` gets at most
    batch_wait_ms: how long an incomplete batch waits for more
    threads: how many calls of `predict` may run at once; None: as many as the service calculates at once
    deterministic: whether equal inputs have equal answers, which the result cache may then keep
    self_test_within_s: how long the example may take at the start
    """
    example = None
    input_schema, answer_schema = {}, {}
    batch_wait_ms = 2
    threads = None
    self_test_within_s = 60

    # --- the four steps ---

    def load(self):
        """Get ready. self.settings has the settings (app.config.Settings), self.device is "cpu" or "cuda:0"."""

    def decode(self, value, options):
        """One input → what `predict` takes. Raises InvalidInput."""
        return value

    def predict(self, batch):
        """A list of what `decode` returned → a list with an output for each."""
        raise NotImplementedError

    def encode(self, output, options):
        """One output → JSON types (NumPy's are converted), or Media."""
        return output

    def seconds_left(self):
        """In `predict`, for models that take long: the time after which nobody waits for the answer."""
        at = self.batcher.due.get(threading.current_thread().name) if self.batcher else \
            self.due[threading.get_ident()].at if threading.get_ident() in self.due else None
        return float("inf") if at is None else at - time.monotonic()

    def close(self):
        """Free what `load` took, when the model is replaced."""

    # --- around them ---

    def __init__(self, place):
        super().__init__(place)
        self.name = self.kind = snake_case(type(self).__name__)
        self.token = place.source.token or os.urandom(8).hex()
        self.takes = (self.takes,) if isinstance(self.takes, str) else tuple(self.takes or ()) if isinstance(
            self.takes, tuple | list) else ()
        error = mistake(self, OwnTask)
        if error:
            raise ModelError(f"{place.source.own} cannot be served: {error}")
        self.is_file = self.takes[0] in FILES
        self.has_example = self.example is not None
        if self.takes == ("text",):
            self.field, self.example = self.field or "text", self.example or "Hello."
        if "video" in self.takes:
            own = [option.name for option in self.options]
            self.options = (*self.options, *(option for option in (FRAMES, AT) if option.name not in own))
        self.body_types, self.how_to_send = self.accepted()
        self.body_type = BODY_TYPES[self.takes[0]]
        self.batcher, self.due = None, {}  # {a thread: the Deadline of its request, which may come earlier meanwhile}

    def accepted(self):
        """(pattern of the Content-Types of raw bodies, how to send an input)."""
        if self.is_file:
            types = ["image" if kind == "picture" else kind for kind in self.takes]
            return re.compile(rf"({'|'.join(types)})/.+|application/octet-stream|"), (
                "send the file as multipart/form-data in the field 'file' (curl -F file=@NAME), as the raw body with "
                f"its {' or '.join(f'{one}/*' for one in types)} Content-Type, or in base64 as JSON: "
                '{"file": "BASE64"}')
        body = self.body = json.dumps({self.field: self.example} if self.field else self.example or {},
                                      ensure_ascii=False)
        if self.takes == ("json",):
            return re.compile("application/json"), f"send it as JSON, such as {body}"
        return re.compile("text/plain|application/x-www-form-urlencoded|"), (
            f"send it as JSON, such as {body}, as the form field '{self.field}', or as the raw body with Content-Type "
            "text/plain")

    def start(self):
        within(LOAD_WITHIN_S, self.load, f"{type(self).__name__}.load")
        slots = self.place.slots
        if self.max_batch > 1:
            grow(slots, min(MOST_SLOTS, 2 * self.max_batch))
        if self.max_batch > 1 or self.threads:
            threads = min(self.threads or self.place.plan.streams, slots.count)
            self.batcher = Batcher(self.predicted_together, threads, self.max_batch, self.batch_wait_ms / 1000)

    def self_test(self):
        """Answer the example. An own one must be answered; the default one may be refused, but nothing else."""
        options = {option.name: option.default_of(self.settings) for option in self.options}

        def test():
            data = example_of(self)
            if data is None:
                return
            call = Call(Deadline(self.self_test_within_s), Stages(), self.field or "the example")
            try:
                self.answer(data, options, call)
                if self.max_batch > 1:
                    self.predicted([self.decoded(self.value(data, options, call), options, call.field)] * 2)
            except ServiceError as e:
                if self.has_example or e.status >= 500:
                    raise
        within(self.self_test_within_s, test, f"{type(self).__name__}'s self-test")

    def answer(self, data, options, call):
        try:
            return self.answer_of(data, options, call)
        except BaseException as e:
            if isinstance(e, Exception):
                raise
            # Outside of a slot, SystemExit would end the process, and others a request without an answer.
            raise RuntimeError(f"{type(self).__name__} raised {type(e).__name__}") from e

    def answer_of(self, data, options, call):
        sent = data if isinstance(data, Instances) else [(data, call.field)]
        with call.stages("decode"):
            inputs = [self.decoded(self.value(one, options, call), options, field) for one, field in sent]
        with call.stages("inference"):
            outputs = self.batcher.run(inputs, call.deadline) if self.batcher else self.one_by_one(inputs, call)
        with call.stages("encode"):
            failed = next((output.error for output in outputs if isinstance(output, Failed)), None)
            if failed is not None:
                raise failed
            answers = [self.encoded(output, options) for output in outputs]
        return answers if isinstance(data, Instances) else answers[0], {}

    def value(self, data, options, call):
        """What `decode` gets of an upload."""
        if not self.is_file:
            return data
        if "audio" in self.takes and is_audio(data):
            return data
        if "video" in self.takes and containers.is_video(data):
            from app.media import video
            return [frame.image for frame in video.timed_frames(data, self.settings, call, options["frames"],
                                                                options["at"])]
        if "picture" not in self.takes:
            kind = self.takes[0]
            raise ServiceError(400, f"INVALID_{kind.upper()}", f"The file is no {kind} in a format that is known here.")
        picture = pictures.read_image(data, self.settings.max_image_pixels, None)
        if call.see:
            call.see(0, picture.image)
        return [picture.image] if "video" in self.takes else picture.image

    def decoded(self, value, options, field):
        try:
            return self.decode(value, options)
        except InvalidInput as e:
            raise ServiceError(400, "INVALID_PARAMETER", f"{e.name or field} {e}"[:1000]) from e

    def one_by_one(self, inputs, call):
        outputs, thread = [], threading.get_ident()
        self.due[thread] = call.deadline
        try:
            for one in inputs:
                call.deadline.check("inference")
                outputs += self.predicted([one])
        except Exception:
            call.deadline.check("inference")  # by then, to give up is no failure
            raise
        finally:
            del self.due[thread]
        return outputs

    def predicted_together(self, batch):
        """The outputs of several requests' inputs. If `predict` fails, each is predicted again on its own, so that one
        input's failure (Failed) is not that of the others."""
        if len(batch) == 1:
            return self.predicted(batch)
        try:
            return self.predicted(batch)
        except BaseException as e:
            log.warning("%s failed for a batch of %d: predicting them one by one", type(self).__name__, len(batch),
                        exc_info=e)
        return [self.predicted_alone(one) for one in batch]

    def predicted_alone(self, one):
        try:
            return self.predicted([one])[0]
        except BaseException as e:
            return Failed(e)

    def predicted(self, batch):
        """What `predict` returns, checked. Raises TypeError."""
        outputs = self.predict(batch)
        if not hasattr(outputs, "__len__") or isinstance(outputs, str | bytes | dict) or len(outputs) != len(batch):
            got = f"{len(outputs)}" if isinstance(outputs, list | tuple | np.ndarray) else type(outputs).__name__
            raise TypeError(f"{type(self).__name__}.predict must return a list of as many outputs as it gets inputs: "
                            f"expected {len(batch)}, got {got}")
        return list(outputs)

    def encoded(self, output, options):
        """What `encode` returns, checked, as JSON types. Raises TypeError, ValueError."""
        answer = self.encode(output, options)
        if isinstance(answer, Media):
            if answer.media_type not in self.media_types:
                raise ValueError(f"{type(self).__name__}.encode returned {answer.media_type}, which media_types lacks")
            return {"media_type": answer.media_type, "b64": base64.b64encode(answer.data).decode()}
        return plain(answer)

    def identity(self):
        return [self.place.source.own, self.token, str(own_modules.imported.get(type(self).__module__))]

    def curl_sample(self):
        """curl's arguments that send the example, if it is no file."""
        return f"-H 'Content-Type: application/json' -d {shlex.quote(self.body)}"

    def gauges(self):
        return "own", "", ""

    def info(self):
        example = None if self.is_file else self.example
        return {"description": str(type(self).__doc__ or "").strip().partition("\n")[0], "example": example,
                "engine": "own", "class": self.place.source.own, "max_batch": self.max_batch}

    def hung_seconds(self):
        if self.batcher:
            return self.batcher.overdue_seconds()
        return max(0.0, time.monotonic() - min((deadline.at for deadline in list(self.due.values())),
                                                default=float("inf")))

    def end(self):
        """Stop the threads, then `close`. A failure is logged; a `predict` that hangs is not waited for."""
        def stop():
            if self.batcher:
                self.batcher.close()
            self.close()
        try:
            within(END_WITHIN_S, stop, f"{type(self).__name__}.close")
        except StartError as e:
            log.warning("%s", e)


# --- from a name to a task ---

def create(place):
    """The task of a place whose source is a class of one's own. Raises StartError."""
    try:
        return class_of(place.source.own)(place)
    except Exception as e:
        raise e if isinstance(e, StartError) else ModelError(
            f"{place.source.own} cannot be served: {one_line(e)}") from e


def class_of(name):
    """The OwnTask in package.module:Class. Raises StartError."""
    module_name, _, class_name = name.partition(":")
    try:
        module = own_modules.import_fresh(module_name)
    except BaseException as e:  # SystemExit too: a module that cannot be imported must not end the process
        python = f" with {sys.executable}" if isinstance(e, ModuleNotFoundError) else ""  # maybe not where pip has been
        raise ModelError(f"{name} cannot be served: importing it{python} failed: {one_line(e)}") from e
    found = getattr(module, class_name, None)
    if found is None:
        raise own_class.missing(name, [key for key, one in vars(module).items() if is_task(one)])
    if not is_task(found):
        raise ModelError(f"{name} cannot be served: {class_name} is no subclass of app.tasks.own.OwnTask")
    return found


def is_task(found):
    return isinstance(found, type) and issubclass(found, OwnTask) and found is not OwnTask
