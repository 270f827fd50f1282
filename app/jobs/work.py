"""One job in a worker's process: from the database and the storage to its answer, through the same model, slots and
checks as a prediction."""
import contextlib
import contextvars
import hashlib
import json
import logging
import os
import threading
import time

import gevent
from gevent.pool import Pool

from app.api import batch
from app.engine.slots import Outcome, in_native_thread
from app.errors import Deadline, DeadlineExceeded, ServiceError, internal_error, out_of_memory
from app.jobs.store import AWAY, RENEW_EVERY_S, Lost, first_line, label, overdue_error
from app.server import counters, logs
from app.server.counters import Stages
from app.tasks import Call

TRY_AGAIN_S = 1                 # to write to a database that is away
PASS_ON_AFTER_S = 1             # a message that is for others
MOST_RESULT_BYTES = 64 * 2**20  # of a result as JSON

log = logging.getLogger(__name__)


class StorageAway(Exception):
    """The storage cannot be read now."""


class Cancelled(Exception):
    """The client has cancelled the job."""


class Attempt:
    """One attempt at a job: it keeps the lease, in a thread of its own, and notes the progress."""

    def __init__(self, store, row):
        self.store, self.row, self.done = store, row, 0
        self.deadline = Deadline(store.optional.job_timeout)
        self.stopped = None  # Cancelled or Lost, once the work should end
        self.greenlet, self.loop = None, gevent.get_hub().loop
        self.ended, self.lock = threading.Event(), threading.Lock()

    def __enter__(self):
        self.thread = threading.Thread(target=self.keep, name="lease", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def keep(self):
        while not self.ended.wait(RENEW_EVERY_S) and self.deadline.remaining() > 0:
            try:
                if self.store.renew(self.row["id"], self.row["attempt"], self.done):
                    self.stop(Cancelled)
            except Lost:
                self.stop(Lost)
            except AWAY as e:
                log.warning("the lease cannot be renewed now: %s", first_line(e))

    def make(self, call):
        """Make the call in a greenlet that stop() can end, although what it has in a slot may go on. Returns its value
        and raises its exception, or Cancelled or Lost."""
        self.greenlet = gevent.spawn(contextvars.copy_context().run, Outcome, call)
        self.greenlet.join()
        self.check()
        return self.greenlet.get().get()

    def stop(self, why):
        """From the lease's thread."""
        self.stopped = self.stopped or why
        self.deadline.at = min(self.deadline.at, time.monotonic())  # what is under way ends at its next check
        if self.greenlet:
            self.loop.run_callback_threadsafe(self.greenlet.kill, gevent.GreenletExit, False)

    def progress(self, *_):
        """One more file or frame is done."""
        with self.lock:
            self.done = min(self.done + 1, self.row["total"])

    def check(self):
        if self.stopped:
            raise self.stopped(self.row["id"])


class Work:
    """Runs jobs one at a time. loader: a ModelLoader; recorder: a history.Recorder, or None; spans: the module
    tracing.spans, or None."""

    def __init__(self, settings, loader, store, storage, broker, instance, recorder=None, spans=None):
        self.settings, self.loader, self.store, self.storage = settings, loader, store, storage
        self.broker, self.worker, self.recorder, self.spans = broker, f"{instance}/{os.getpid()}", recorder, spans
        self.is_idle, self.is_closed, self.messages, self.lock = True, False, 0, threading.Lock()
        self.has_passed_on = threading.Event()
        self.left = set()  # models of jobs that were left to others

    def models(self):
        """"NAME" or "NAME@VERSION" of each model that it has."""
        return list(self.loader.each) if self.settings.models else [self.loader.current.name]

    def close(self):
        """Begin no more jobs; a message that still comes is passed on, and then none is taken."""
        with self.lock:
            self.is_closed = True

    def run(self, job_id, queue):
        """A message has come: bring the job of its queue whose turn it is to its end. job_id: of the message, another
        one of which may have led to this job. Raises no errors."""
        with self.lock:
            self.is_idle, self.messages = self.is_closed, self.messages + 1
        if self.is_closed:
            self.pass_on(job_id, queue)
            self.has_passed_on.set()
            threading.Event().wait()  # for the end of this process
        try:
            self.run_next(job_id, queue)
        finally:
            self.is_idle = True

    def run_next(self, job_id, queue):
        models = self.models()
        try:
            row = self.store.claim(queue, models, self.worker)
            of_others = row is None and self.store.left_to_others(queue, models)
        except AWAY as e:  # the upkeep sends the message again
            log.error("a job cannot be claimed now: %s", first_line(e))
            return
        if of_others:
            if of_others not in self.left:
                log.error("jobs for %s are left to other workers: this one has %s; MODEL_NAME or MODELS must be "
                          "the service's", of_others, ", ".join(models))
                self.left.add(of_others)
            time.sleep(PASS_ON_AFTER_S)
            self.pass_on(job_id, queue)
        if row is None:
            return
        with self.spans.job(row) if self.spans else contextlib.nullcontext() as span:
            self.run_claimed(row, span)

    def pass_on(self, job_id, queue):
        with contextlib.suppress(OSError):  # then the upkeep sends it again
            self.broker.publish(job_id, queue)

    def run_claimed(self, row, span):
        job_id = row["id"]
        logs.request_id.set(row["request_id"])
        counters.observe("job_wait_seconds", max(0.0, row["started_at"] - row["created_at"]), row["queue"])
        try:
            with Attempt(self.store, row) as attempt:
                state, result, error = self.outcome(row, attempt)
                done = row["total"] if state == "succeeded" else attempt.done  # a video may have fewer frames
                trace = self.spans.carrier() if self.spans else None
                self.insist(lambda: self.store.finish(job_id, row["attempt"], state, done, result, error, trace))
        except Lost:
            log.warning("the job was given to another worker", extra={"job": job_id, "attempt": row["attempt"]})
            return
        except StorageAway as e:
            log.error("the storage is away: %s", e, extra={"job": job_id})
            self.insist(lambda: self.store.give_back(job_id, row["attempt"]))
            return
        finally:
            logs.request_id.set(None)
        if self.spans:
            self.spans.ended(span, state, error)
        self.note(row, state, error)
        try:
            self.storage.delete_all(job_id)
        except OSError as e:  # the upkeep removes it later
            log.warning("the job's files cannot be removed now: %s", first_line(e))

    def insist(self, write):
        """Write to the database, as often as it takes, but not if the job is lost. Raises Lost."""
        while True:
            try:
                return write()
            except AWAY as e:
                log.error("the database is away: %s", first_line(e))
                time.sleep(TRY_AGAIN_S)

    def note(self, row, state, error):
        seconds = time.time() - row["started_at"]
        counters.count("jobs", row["queue"], state, (error or {}).get("error", ""))
        counters.observe("job_duration_seconds", seconds, row["queue"])
        log.info("job", extra={"job": row["id"], "state": state, "queue": row["queue"], "model": row["model"],
                               "attempt": row["attempt"], "duration_ms": round(1000 * seconds, 2),
                               "waited_ms": round(1000 * (row["started_at"] - row["created_at"]), 2),
                               "request_id": row["request_id"], **({"error": error["error"]} if error else {})})

    def outcome(self, row, attempt):
        """(state, result, error). Raises Lost, StorageAway."""
        try:
            return "succeeded", self.answer(row, attempt), None
        except Cancelled:
            return "cancelled", None, None
        except (Lost, StorageAway):
            raise
        except DeadlineExceeded:
            return "failed", None, overdue_error(self.store.optional.job_timeout)
        except ServiceError as e:
            error = e
        except MemoryError as e:
            error = out_of_memory(e)
        except Exception as e:  # a bug costs one job
            error = internal_error(e)
        body = error.body()
        return "failed", {**body, **error.details} if error.details else None, {
            "error": body["error"], "message": body["message"]}

    def answer(self, row, attempt):
        """The body that /predict or /predict/batch would have answered, as JSON. Raises ServiceError, Cancelled, Lost.
        """
        name = label(row["model"], row["version"])

        def answers():
            with self.loader.lease(name) as model:
                options = self.options(row)
                answer = self.batch if row["is_batch"] else self.single
                return answer(row, attempt, model, options)
        return attempt.make(lambda: self.loader.when_loaded(answers, attempt.deadline))

    def single(self, row, attempt, model, options):
        about, = json.loads(row["inputs_json"])
        found = self.one(about, row, attempt, model, options)
        attempt.check()
        if row["unit"] == "files":
            attempt.progress()
        text = in_native_thread(json.dumps, {"status": "success", "predictions": found["predictions"], "metadata": {
            "filename": about["filename"], **found["metadata"]}})
        check_size(len(text))
        return text

    def batch(self, row, attempt, model, options):
        files = json.loads(row["inputs_json"])

        def outcome(about):
            try:
                return {"status": "success", **self.one(about, row, attempt, model, options)}
            except (DeadlineExceeded, Cancelled, Lost, StorageAway):
                raise
            except ServiceError as e:
                return e
            except MemoryError as e:
                return out_of_memory(e)
            except Exception as e:
                return internal_error(e)

        def counted(position, about):
            found = self.spans.traced_file(position, lambda: outcome(about)) if self.spans else outcome(about)
            attempt.check()
            attempt.progress()
            result, = batch.body_of([about["filename"]], [found])[0]["results"]
            return found if isinstance(found, ServiceError) else None, in_native_thread(
                json.dumps, {**result, "index": position})
        pool = Pool(self.loader.slots.count)
        texts, failures, size = [], [], 0
        try:
            for failure, text in pool.imap(in_copies(counted), *zip(*enumerate(files), strict=True)):
                texts.append(text)
                failures += filter(None, [failure])
                size += len(text)
                check_size(size)
        finally:
            pool.kill(block=False)
        counts = {"count": len(texts), "failed": len(failures)}
        if len(failures) == len(files):
            raise batch.all_failed(failures, {**counts, "results": [json.loads(text) for text in texts]})
        return f'{json.dumps({"status": "success", **counts})[:-1]}, "results": [{", ".join(texts)}]}}'

    def one(self, about, row, attempt, model, options):
        """The answer to one input, in a slot."""
        if "error" in about:
            raise ServiceError(400, about["error"]["error"], about["error"]["message"])
        attempt.check()
        stages = self.spans.Stages() if self.spans else Stages()
        see = attempt.progress if row["unit"] == "frames" else None

        def answer():
            with stages("read"):
                data = self.input(about)
            found = model.answer(data, options, Call(attempt.deadline, stages, about["field"], see))
            if self.recorder:
                self.recorder.of_job(model, data, options, found, row, files_position(row, about))
            return found
        try:
            return self.loader.slots.run(answer, attempt.deadline, stages, admitted=True)
        finally:
            stages.count()

    def input(self, about):
        """The input as the task takes it. Raises ServiceError, StorageAway."""
        data = self.read(about["key"], about["bytes"])
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ServiceError(500, "INPUT_LOST", "The job's input in the storage is damaged.")
        if about["kind"] == "file":
            return data
        value = json.loads(data)
        if about["kind"] == "json":
            return value
        from app.tasks.own import Instances
        return Instances(tuple(pair) for pair in value)

    def options(self, row):
        return {name: self.read(value["key"], None) if isinstance(value, dict) else value
                for name, value in json.loads(row["options_json"]).items()}

    def read(self, key, most):
        try:
            return self.storage.get(key, self.settings.optional.max_job_size if most is None else most)
        except FileNotFoundError as e:
            raise ServiceError(500, "INPUT_LOST", "The job's input is no longer in the storage.") from e
        except OSError as e:
            raise StorageAway(first_line(e)) from e


def check_size(length):
    """Raises ServiceError if a result of this many bytes is too large to be kept."""
    if length > MOST_RESULT_BYTES:
        raise ServiceError(413, "RESULT_TOO_LARGE", f"The result has more than {MOST_RESULT_BYTES // 2**20} MiB, the "
                           "most that is kept; send fewer files, ask for fewer frames, or choose one explain_class.")


def in_copies(call):
    """The same function for greenlets: each call runs in a copy of the present context, as they have none."""
    here = contextvars.copy_context()
    return lambda *arguments: here.copy().run(call, *arguments)


def files_position(row, about):
    """The place of a file in its batch, else 0; its key ends with it."""
    return int(about["key"].rpartition("/")[2]) if row["is_batch"] else 0
