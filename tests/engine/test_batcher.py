"""Batches gather while others run, keep their deadlines, and fail alone."""
import threading
import time

import numpy as np
import pytest

from app.engine.batcher import Batcher
from app.errors import Deadline, DeadlineExceeded, ServiceError


def in_thread(call, *arguments):
    outcome = []

    def run():
        try:
            outcome.append(call(*arguments))
        except ServiceError as e:
            outcome.append(e)
    thread = threading.Thread(target=run, daemon=True)
    thread.outcome = outcome
    thread.start()
    return thread


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture
def batches():
    """A Batcher of one thread that doubles its rows; .seen: sizes of the batches; .gate holds a batch back."""
    gate, seen = threading.Event(), []

    def run(batch):
        seen.append(len(batch))
        gate.wait(10)
        if (batch < 0).any():
            raise ValueError("negative")
        return batch * 2
    batcher = Batcher(run, threads=1, max_batch=4, wait_s=0.01)
    batcher.gate, batcher.seen = gate, seen
    yield batcher
    gate.set()
    batcher.close()


def rows(*values):
    return np.array(values, np.float32)[:, None]


def test_requests_gather_while_a_batch_runs(batches):
    threads = [in_thread(batches.run, rows(0), Deadline(10))]
    wait_until(lambda: batches.seen)
    threads += [in_thread(batches.run, rows(i), Deadline(10)) for i in range(1, 7)]
    wait_until(lambda: batches.jobs.qsize() == 6)
    batches.gate.set()
    for i, thread in enumerate(threads):
        thread.join(10)
        assert thread.outcome[0].tolist() == [[2.0 * i]]
    assert batches.seen == [1, 4, 2]


def test_more_rows_than_a_batch_are_split(batches):
    batches.gate.set()
    assert batches.run(rows(*range(10)), Deadline(10))[:, 0].tolist() == [2.0 * i for i in range(10)]
    assert max(batches.seen) <= 4


def test_an_idle_batcher_does_not_wait():
    batcher = Batcher(lambda batch: batch, threads=1, max_batch=8, wait_s=30)
    assert batcher.run(rows(1), Deadline(10)).tolist() == [[1.0]]  # with the wait it would be a DeadlineExceeded
    batcher.close()


def test_hung_batch_costs_its_caller_the_deadline_and_expired_jobs_never_run(batches):
    hung = in_thread(batches.run, rows(1), Deadline(1))
    wait_until(lambda: batches.seen)
    expired = in_thread(batches.run, rows(2, 2), Deadline(0.1))
    for thread in (hung, expired):
        thread.join(10)
        assert isinstance(thread.outcome[0], DeadlineExceeded)
    batches.gate.set()
    assert batches.run(rows(3), Deadline(10)).tolist() == [[6.0]]
    assert batches.seen == [1, 1]


def test_a_failing_batch_fails_its_callers_only(batches):
    batches.gate.set()
    with pytest.raises(ValueError, match="negative"):
        batches.run(rows(-1), Deadline(10))
    assert batches.run(rows(1), Deadline(10)).tolist() == [[2.0]]
