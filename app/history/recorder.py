"""Writes predictions to the history, later and in a thread of its own: recording one costs nothing but a place in the
queue. While the database is away, what fits is kept; the rest is dropped and counted.
"""
import collections
import hashlib
import json
import logging
import random
import sys
import threading
import time

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from app.config import StartError
from app.data.schema import history
from app.server import counters
from app.tasks import options as task_options

MOST = 10_000              # predictions that wait
MOST_BYTES = 64 * 2**20    # of their inputs, until these are hashed
JSON_BYTES = 2**16         # counted for an input that is JSON, whose size nobody knows
BATCH = 500                # rows written at once
EVERY_S = 0.5
AGAIN_S = 1                # after a failure
LOG_EVERY_S = 10
FLUSH_WITHIN_S = 2
HOUR_S, DAY_S = 3600, 86_400
AT_ONCE = 5000             # rows removed in one transaction
MOST_ANSWER, MOST_OPTION, MOST_CLASS = 4096, 1000, 255  # characters

MEASURES = {"history_dropped": counters.Measure("counter", "Predictions missing in the history, as the database did "
                                                           "not take them in time.")}

INSIGHT = {option.name for option in task_options.INSIGHT}  # recorded if they are on

log = logging.getLogger(__name__)
encoder = json.JSONEncoder()


class Recorder:
    """Starts its thread with the first prediction, or with `start`: not before a process forks."""

    def __init__(self, database, optional):
        self.database, self.days = database, optional.history_days
        self.waiting, self.waiting_bytes = collections.deque(), 0  # predictions as they were made
        self.rows, self.batch = collections.deque(), []            # of the table; those that are being written
        self.is_repeated = False  # whether this batch's last attempt failed, perhaps after it was committed
        self.lock, self.thread = threading.Lock(), None
        self.wakes, self.ended = threading.Event(), threading.Event()
        self.dropped, self.dropped_before, self.log_at = 0, 0, {}
        self.purge_at = time.monotonic() + random.uniform(10, HOUR_S)  # not in all processes at once
        counters.MEASURES.update(MEASURES)

    # --- from any thread or greenlet ---

    def record(self, model, data, options, answer, cached, position, request_id, owner):
        """Record an answered prediction. data, options, answer: as of Model.answer; position: of the file in its batch,
        else 0; owner: SHA-256 of the client's key, or ""."""
        size = sys.getsizeof(data) if isinstance(data, bytes | str) else JSON_BYTES
        milliseconds = round(sum(answer["metadata"]["timings_ms"].values()), 2)
        manifest = getattr(model.task, "manifest", None)
        row = {"time": time.time(), "owner": owner, "request_id": request_id, "position": position, "model": model.name,
               "version": model.version, "weights": manifest and manifest.weights["sha256"], "cached": bool(cached),
               "milliseconds": milliseconds}
        with self.lock:
            self.start()
            if len(self.waiting) + len(self.rows) + len(self.batch) >= MOST or self.waiting_bytes + size > MOST_BYTES:
                self.drop(1)
                return
            self.waiting.append((row, data, options, answer["predictions"], size))
            self.waiting_bytes += size
        self.wakes.set()

    def of_job(self, model, data, options, answer, job, position):
        """The same for an input of a job, by its row."""
        self.record(model, data, options, answer, False, position, job["request_id"], job["owner"])

    def start(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, name="history", daemon=True)
            self.thread.start()

    def stop(self, within_s=FLUSH_WITHIN_S):
        """Write what waits, for at most this long. Raises nothing."""
        self.ended.set()
        self.wakes.set()
        if self.thread:
            self.thread.join(within_s)
        left = len(self.waiting) + len(self.rows) + len(self.batch)
        if left:
            self.drop(left)
            log.error("history: %d predictions could not be written before the end", left)

    def drop(self, number):
        self.dropped += number
        counters.own.add(counters.key("history_dropped"), number)

    # --- in its own thread ---

    def work(self):
        is_last = False
        while not is_last:
            self.wakes.wait(max(0.0, self.purge_at - time.monotonic()))
            self.wakes.clear()
            is_last = self.ended.is_set()
            self.log_drops()
            if not self.write() and not is_last:
                self.wakes.set()
                self.ended.wait(AGAIN_S)
                continue
            if time.monotonic() > self.purge_at:
                self.purge()
            self.ended.wait(EVERY_S)

    def write(self):
        """Write all that waits; returns whether that worked."""
        while True:
            self.read_in()
            if not self.batch:
                with self.lock:
                    self.batch = [self.rows.popleft() for _ in range(min(BATCH, len(self.rows)))]
            if not self.batch:
                return True
            try:
                self.write_batch()
            except (DataError, IntegrityError, ValueError) as e:  # what is refused now would be refused again
                half = len(self.batch) // 2
                if half:  # the others need not suffer from it
                    self.rows.extendleft(reversed(self.batch[half:]))
                    self.batch = self.batch[:half]
                    continue
                self.log("has lost predictions", e)
                self.drop(1)
            except (SQLAlchemyError, StartError, OSError) as e:
                self.is_repeated = True
                self.log("cannot be written now", e)
                return False
            self.batch, self.is_repeated = [], False

    def read_in(self):
        """Inputs become hashes; their memory is free then."""
        while self.waiting:
            row, data, options, predictions, size = self.waiting[0]  # it counts until it is among the rows
            try:
                found = [row | described(data, options, predictions)]
            except Exception as e:  # a prediction that cannot be described must not end this thread
                self.log("has lost a prediction", e)
                self.drop(1)
                found = []
            with self.lock:
                self.waiting.popleft()
                self.waiting_bytes -= size
                self.rows.extend(found)
            del data, predictions

    def write_batch(self):
        with self.database.begin() as connection:
            if not (self.is_repeated and is_there(connection, self.batch[0])):
                connection.execute(insert(history), self.batch)

    def purge(self):
        """Remove some of the oldest rows; the next ones right afterwards, or in an hour if there are none."""
        self.purge_at = time.monotonic() + HOUR_S
        try:
            if purge_some(self.database, self.days) == AT_ONCE:
                self.purge_at = time.monotonic()
        except (SQLAlchemyError, StartError, OSError) as e:
            self.log("cannot be shortened now", e)

    def log(self, what, error):
        now = time.monotonic()
        if now > self.log_at.get(what, -LOG_EVERY_S) + LOG_EVERY_S:
            self.log_at[what] = now
            log.error("history: it %s: %s", what, f"{type(error).__name__}: {error}".splitlines()[0])

    def log_drops(self):
        new, now = self.dropped - self.dropped_before, time.monotonic()
        if new and now > self.log_at.get("drops", -LOG_EVERY_S) + LOG_EVERY_S:
            self.log_at["drops"], self.dropped_before = now, self.dropped
            log.error("history: %d predictions are missing, as too many were waiting", new)


def described(data, options, predictions):
    """The columns that take some time to make."""
    found = {"input_sha256": hashlib.sha256(as_bytes(data)).hexdigest(),
             "options_json": json.dumps({name: described_option(value) for name, value in options.items()
                                      if value or name not in INSIGHT}),
             "predictions_json": "null", "top_class": None, "confidence": None}
    best = predictions[0] if isinstance(predictions, list) and predictions else predictions
    if isinstance(best, dict) and isinstance(best.get("class"), str):
        found["top_class"] = best["class"].replace("\0", "").encode(errors="replace").decode()[:MOST_CLASS]
        if isinstance(best.get("confidence"), float | int):
            found["confidence"] = float(best["confidence"])
    found["predictions_json"] = short_json(predictions)
    return found


def as_bytes(data):
    """What an input's hash is of: a file's bytes, text in UTF-8, or JSON with sorted members and no spaces."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode(errors="surrogatepass")
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def described_option(value):
    """An option's value; of a file and of a long text, the hash."""
    if isinstance(value, bytes) or isinstance(value, str) and len(value) > MOST_OPTION:
        return {"sha256": hashlib.sha256(as_bytes(value)).hexdigest()}
    return value


def short_json(predictions):
    """As JSON in ASCII, or null if that is too long. Media is not even encoded."""
    if isinstance(predictions, dict) and set(predictions) == {"media_type", "b64"}:
        return "null"
    pieces, length = [], 0
    for piece in encoder.iterencode(predictions):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_ANSWER:
            return "null"
    return "".join(pieces)


def is_there(connection, row):
    """Whether the batch that begins with this row has been committed."""
    same = [history.c[name] == row[name] for name in ("request_id", "time", "position")]
    return connection.execute(select(history.c.id).where(*same).limit(1)).first() is not None


def purge(database, days):
    """Remove rows older than this; returns how many. Raises SQLAlchemyError, OSError."""
    removed = total = purge_some(database, days)
    while removed == AT_ONCE:
        removed = purge_some(database, days)
        total += removed
    return total


def purge_some(database, days):
    oldest = select(history.c.id).where(history.c.time < time.time() - days * DAY_S).order_by(history.c.time)
    with database.begin() as connection:
        return connection.execute(delete(history).where(history.c.id.in_(oldest.limit(AT_ONCE)))).rowcount
