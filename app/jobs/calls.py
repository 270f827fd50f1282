"""The blocking calls behind the views: to the storage, the database and the broker, each in a native thread."""
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import gevent

from app.data.background import Background, Threads
from app.data.database import had_no_connection, was_too_slow
from app.data.storage import Own
from app.errors import ServiceError
from app.jobs import presence
from app.jobs.answers import FINAL, job_body
from app.jobs.broker import Broker
from app.jobs.store import AWAY, Store, Uncertain, first_line, label

AT_ONCE = 8             # inputs of a job that are stored at once
REMOVALS = 2            # jobs whose inputs are removed at once
REMOVED_WITHIN_S = 60
ASK_AGAIN_S = 2         # which workers are there


class Jobs:
    """The way to the storage, the database and the broker. submitting, asking, listing, removing: run blocking calls;
    the long ones, with inputs, the quick ones, lists and the removal of inputs do not wait for each other.

    listings: Threads for lists."""

    def __init__(self, database, optional, listings):
        self.store = Named(Store(database, optional), optional.database_variable)
        self.storage = Named(Own(database, optional), "STORAGE_URL" if optional.storage_url else "DATA_DIR")
        self.broker = Named(Broker(optional), "JOBS_BROKER" if optional.jobs_broker else "DATA_DIR")
        message = "Jobs are not available now; try again later."
        self.submitting, self.asking, self.listing, self.removing = (
            Background("JOBS_UNAVAILABLE", message, threads) for threads in (None, None, listings, Threads(REMOVALS)))
        self.workers, self.heard_at = [], None

    def accept(self, row, contents, left):
        """(the job's row, the body of the answer as JSON text, whether it is new). row: see Store.add; contents:
        {storage key: bytes}; left: an Event that is set when nobody waits for this call any more. Raises ServiceError,
        OSError, and what the database raises; then there is no such job, and its inputs are being removed."""
        key = row["idempotency_key"]
        earlier = key and self.store.find_idempotent(row["owner"], key)
        if earlier and self.relies_on(earlier, row):
            return earlier, self.text(earlier), False
        is_kept = False
        try:
            self.store.check(row["owner"], row["input_bytes"])  # which also asks whether the database is there
            warning = self.warning(row)  # now: nothing may fail once the job is there
            self.keep(contents, left)
            check_wanted(left)
            added, is_kept = self.store.add(row)
            if not is_kept:  # another request with this key came first
                if not self.relies_on(added, row):  # and failed
                    raise OSError("a request with the same Idempotency-Key has just failed")
                return added, self.text(added), False
            try:
                check_wanted(left)
                self.broker.publish(row["id"], row["queue"])
            except (OSError, ServiceError):
                is_kept = not self.store.withdraw(row["id"])
                if not is_kept:
                    raise
            # Also if it could not be withdrawn: a repeat was told of it, or the database is away too. It will be run.
            return added, as_json({**job_body(added, []), **warning}), True
        except Away as e:
            is_kept = is_kept or e.is_uncertain  # it may be there, and a repeat of this request may get it
            raise
        finally:
            if not is_kept:  # not here: a slow removal does not mean that submitting does not work
                self.submitting.threads.pool.hub.loop.run_callback_threadsafe(self.remove_inputs_soon, row["id"])

    def relies_on(self, earlier, row):
        """Whether the answer can be the job of an earlier request, which then stays. Raises ServiceError if that was
        another one."""
        if earlier["fingerprint"] != row["fingerprint"]:
            raise ServiceError(422, "IDEMPOTENCY_KEY_REUSED", "This Idempotency-Key came with another request; send a "
                                                              "new key with each new job.")
        return self.store.rely_on(earlier["id"])

    def keep(self, contents, left):
        def put(item):
            check_wanted(left)
            self.storage.put(*item)
        if len(contents) < 2:
            for item in contents.items():
                put(item)
            return
        with ThreadPoolExecutor(min(AT_ONCE, len(contents))) as pool:
            for _ in pool.map(put, contents.items()):
                pass

    def found(self, job_id, owner):
        """(the row, the body of the answer as JSON text), or None."""
        row = self.store.get(job_id, owner)
        return row and (row, self.text(row))

    def cancelled(self, job_id, owner):
        """The same, after it was cancelled."""
        row = self.store.cancel(job_id, owner)
        return row and (row, self.text(row))

    def remove_inputs_soon(self, job_id):
        """In a greenlet of its own: whoever cancels a job does not wait for the storage."""
        gevent.spawn(self.remove_inputs, job_id)

    def remove_inputs(self, job_id):
        with suppress(ServiceError):  # what remains is swept up later
            self.removing.run(self.storage.delete_all, job_id, within_s=REMOVED_WITHIN_S)

    def listed(self, **asked):
        """[job object] without results."""
        return [self.body(row) for row in self.store.listed(**asked)]

    def body(self, row):
        has_webhook = row["callback_url"] and row["state"] in FINAL
        body = job_body(row, self.store.deliveries(row["id"]) if has_webhook else [])
        return body | (self.warning(row) if row["state"] == "queued" else {})

    def text(self, row):
        return as_json(self.body(row))

    def warning(self, row):
        """{"warning": why a queued job will wait} if no worker is there that could run it."""
        model = label(row["model"], row["version"])
        with suppress(*AWAY):  # then nobody knows
            if not any(row["queue"] in queues and model in models for queues, models in self.heard()):
                return {"warning": f"No worker is running that takes jobs for {model} from the queue "
                                   f"{row['queue']}; the job waits until one does."}
        return {}

    def heard(self):
        """[(queues, models)] of the workers that are there, as of lately."""
        now = time.monotonic()
        if self.heard_at is None or now > self.heard_at + ASK_AGAIN_S:
            self.workers, self.heard_at = presence.heard(self.store.database), now
        return self.workers


class Away(OSError):
    """A part that jobs need is away; the message begins with the variable that says where it is. is_uncertain:
    whether what was asked may have been done."""

    def __init__(self, message, is_uncertain=False):
        super().__init__(message)
        self.is_uncertain = is_uncertain


class Named:
    """The store, the storage or the broker, whose methods raise Away for what the outside part raises."""

    def __init__(self, part, variable):
        self.part, self.variable = part, variable

    def __getattr__(self, name):
        found = getattr(self.part, name)
        if not callable(found):
            return found

        def call(*arguments, **named):
            try:
                return found(*arguments, **named)
            except AWAY as e:
                if was_too_slow(e) or had_no_connection(e):  # it is there, but busy
                    raise
                raise Away(f"{self.variable}: {first_line(e)}", isinstance(e, Uncertain)) from e
        return call


def check_wanted(left):
    if left.is_set():
        raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "Nobody waits for this request any more.")


def as_json(body):
    return json.dumps(body, separators=(",", ":")) + "\n"
