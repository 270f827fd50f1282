"""Dynamic batching: concurrent requests are inferred together."""
import queue
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np

from app.errors import DeadlineExceeded
from app.server import counters


class Batcher:
    """Collects the inputs of several requests into batches, which a fixed pool of threads runs.

    An idle thread starts at once with what is there. While it is busy, requests queue up, and the next batch takes up
    to max_batch of their rows; if it is not full and began with more than one request, it waits up to wait_s for more.
    """

    def __init__(self, run, threads, max_batch, wait_s):
        self.call, self.max_batch, self.wait_s = run, max_batch, wait_s
        self.jobs = queue.SimpleQueue()  # (array (n, …) or list of n, Future, Deadline), or None to stop
        self.due = {}  # thread name → the last deadline in the batch that it is running
        self.threads = [threading.Thread(target=self.work, name=f"batcher-{i}", daemon=True) for i in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self, batch, deadline):
        """float32 (n, …) or a list of n inputs → their outputs. Raises DeadlineExceeded, or what the call raised."""
        futures = []
        for start in range(0, len(batch), self.max_batch):
            future = Future()
            futures.append(future)
            self.jobs.put((batch[start:start + self.max_batch], future, deadline))
        try:
            return joined([f.result(max(0, deadline.remaining())) for f in futures])
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
        counters.observe("batch_size", sum(len(rows) for rows, _, _ in batch))
        name = threading.current_thread().name
        self.due[name] = max(deadline.at for _, _, deadline in batch)
        try:
            outputs = self.call(joined([rows for rows, _, _ in batch]))
        except BaseException as e:  # whatever is raised is for the callers, not for this thread
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
        """How long the oldest batch has been running after everyone who waited for it has left."""
        return max(0.0, time.monotonic() - min(list(self.due.values()), default=float("inf")))

    def close(self):
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()


def joined(batches):
    """Arrays (n, …) or lists, one after the other."""
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], np.ndarray):
        return np.concatenate(batches)
    return [one for batch in batches for one in batch]
