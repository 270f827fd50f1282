"""Who may run when: deadlines, slots with a bounded queue before them, and batching."""
import collections
import contextlib
import contextvars
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np

from app import metrics
from app.errors import ServiceError


class DeadlineExceeded(ServiceError):
    """The request's time is over. stage: what it was in: read, queue, decode, face, inference."""

    def __init__(self, stage):
        super().__init__(504, "DEADLINE_EXCEEDED", f"The time allowed for this request ran out (during {stage}).")


class Deadline:
    """The moment by which a request must be answered."""

    def __init__(self, seconds):
        self.at = time.monotonic() + seconds

    def remaining(self):
        """Seconds left; negative when it has passed."""
        return self.at - time.monotonic()

    def check(self, stage):
        if self.remaining() <= 0:
            raise DeadlineExceeded(stage)


class Scheduler:
    """`slots` requests run at once, first come first served; `max_queue` more wait; the rest is refused at once.

    A request that comes while the queue is full is refused before its body is read, and so is one that would take the
    last of the threads: `max_inside` bounds the requests that read, wait or run.
    """

    def __init__(self, slots, max_queue, max_inside=None):
        self.slots, self.max_queue = slots, max_queue
        self.max_inside = max_inside or slots + max_queue
        self.inside = self.running = 0
        self.waiting = collections.deque()  # an Event each, oldest first
        self.lock = threading.Lock()
        self.seconds_per_request = 0.05  # a running mean of the time in a slot
        self.lanes = ThreadPoolExecutor(slots, "batch")
        self.batched = 0  # files of batches that are not answered yet
        self.onlookers = 0  # requests that wait for what another one is computing, in places of the queue

    @contextlib.contextmanager
    def admission(self):
        """Around a whole request, before its body is read. Raises ServiceError OVERLOADED."""
        with self.lock:
            if self.inside >= self.max_inside or self.is_full():
                raise self.overloaded()
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1

    def take_slot(self, deadline, admitted=False):
        """Wait for a slot; returns a context manager that gives it back at its end. Raises ServiceError OVERLOADED at
        once when the queue is full, DeadlineExceeded when the time runs out.

        admitted: the caller is part of a batch that was let in already, and waits even where the queue is full."""
        self.acquire(deadline, admitted)
        return self.held_slot()

    def start_batch(self, calls):
        """Run the calls of one batch in order, as many at once as there are slots; returns a Future for each.

        A batch is let in or refused as a whole, like any request, and refused too while the batches before it have as
        many files under way as requests could run and wait. All batches share the same few threads, and each call
        queues for its slot anew, so that single requests get their turn in between. Raises ServiceError OVERLOADED.
        """
        with self.lock:
            if self.is_full() or self.batched >= self.slots + self.max_queue:
                raise self.overloaded()
            self.batched += len(calls)
        futures = [self.lanes.submit(contextvars.copy_context().run, call) for call in calls]
        for future in futures:
            future.add_done_callback(self.batched_one_done)
        return futures

    def batched_one_done(self, _):
        with self.lock:
            self.batched -= 1

    @contextlib.contextmanager
    def watching(self, admitted=False):
        """A place in the queue for a request that needs no slot, because another one computes what it wants. Raises
        ServiceError OVERLOADED when the queue is full and the caller is not `admitted` (see take_slot)."""
        with self.lock:
            if self.is_full() and not admitted:
                raise self.overloaded()
            self.onlookers += 1
        try:
            yield
        finally:
            with self.lock:
                self.onlookers -= 1

    def is_full(self):
        return self.running >= self.slots and len(self.waiting) + self.onlookers >= self.max_queue

    def is_alone(self):
        """Whether at most one request is here, and no batch: it may have the whole processor."""
        return self.inside <= 1 and not self.batched

    @contextlib.contextmanager
    def held_slot(self):
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds_per_request += 0.05 * (time.monotonic() - started - self.seconds_per_request)
            self.release()

    def acquire(self, deadline, admitted=False):
        with self.lock:
            if self.running < self.slots:
                self.running += 1
                return
            if self.is_full() and not admitted:
                raise self.overloaded()
            turn = threading.Event()
            self.waiting.append(turn)
        if turn.wait(max(0, deadline.remaining())):
            return
        with self.lock:
            if not turn.is_set():
                self.waiting.remove(turn)
                raise DeadlineExceeded("queue")
        self.release()  # the turn came just as the time ran out
        raise DeadlineExceeded("queue")

    def release(self):
        with self.lock:
            if self.waiting:
                self.waiting.popleft().set()  # the slot goes straight to the next one
            else:
                self.running -= 1

    def overloaded(self):
        """The refusal, with the time in which what is here now will be done."""
        seconds = self.seconds_per_request * (len(self.waiting) + self.running + self.batched) / self.slots
        return ServiceError(503, "OVERLOADED", "The service is at its limit; try again later.", retry_after_s=seconds)


class Batcher:
    """Collects what several requests want inferred into batches, run by a fixed pool of threads.

    An idle thread starts with what is there at once. While it is at work, requests gather, and the next batch takes up
    to max_batch rows of them; if it is not full and more than one request is under way, it waits wait_s for the others.
    """

    def __init__(self, run, threads, max_batch, wait_s):
        self.call, self.max_batch, self.wait_s = run, max_batch, wait_s
        self.jobs = queue.SimpleQueue()  # (array (n, …), Future, Deadline), or None to stop
        self.due = {}  # thread name → when the last deadline of the batch that it runs passes
        self.threads = [threading.Thread(target=self.work, name=f"batcher-{i}", daemon=True) for i in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self, batch, deadline):
        """float32 (n, …) → the rows' outputs. Raises DeadlineExceeded, or what the network raised."""
        futures = []
        for start in range(0, len(batch), self.max_batch):
            future = Future()
            futures.append(future)
            self.jobs.put((batch[start:start + self.max_batch], future, deadline))
        try:
            return np.concatenate([f.result(max(0, deadline.remaining())) for f in futures])
        except FutureTimeout:
            for future in futures:
                future.cancel()
            raise DeadlineExceeded("inference") from None

    def work(self):
        held = None  # a job that did not fit into the last batch
        while True:
            job = held or self.jobs.get()
            held = None
            batch, rows, wait_until = [], 0, time.monotonic() + self.wait_s
            crowded = not self.jobs.empty()
            while job is not None:
                rows_of_job = len(job[0])
                if batch and rows + rows_of_job > self.max_batch:
                    held = job
                    break
                if job[2].remaining() > 0 and job[1].set_running_or_notify_cancel():
                    batch.append(job)
                    rows += rows_of_job
                if rows >= self.max_batch:
                    break
                try:
                    job = self.jobs.get(timeout=max(0, wait_until - time.monotonic())) if crowded \
                        else self.jobs.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self.run_batch(batch)
            if job is None:
                return

    def run_batch(self, batch):
        metrics.observe("batch_size", sum(len(rows) for rows, _, _ in batch))
        name = threading.current_thread().name
        self.due[name] = max(deadline.at for _, _, deadline in batch)
        try:
            outputs = self.call(np.concatenate([rows for rows, _, _ in batch]) if len(batch) > 1 else batch[0][0])
        except Exception as e:  # whatever the network raised belongs to those who asked, not to this thread
            for _, future, _ in batch:
                future.set_exception(e)
            return
        finally:
            del self.due[name]
        start = 0
        for rows, future, _ in batch:
            future.set_result(outputs[start:start + len(rows)])
            start += len(rows)

    def overdue_seconds(self):
        """How long the oldest batch runs on after everyone who waited for it has left."""
        return max(0.0, time.monotonic() - min(list(self.due.values()), default=float("inf")))

    def close(self):
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
