"""Slots, queue, deadlines and batches."""
import threading
import time

import numpy as np
import pytest

from app.errors import ServiceError
from app.scheduler import Batcher, Deadline, DeadlineExceeded, Scheduler


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


def test_slots_are_given_first_come_first_served():
    scheduler = Scheduler(1, 8)
    order = []

    def work(i):
        with scheduler.take_slot(Deadline(10)):
            order.append(i)
    with scheduler.take_slot(Deadline(10)):
        threads = []
        for i in range(5):
            threads.append(in_thread(work, i))
            wait_until(lambda i=i: len(scheduler.waiting) == i + 1)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]
    assert scheduler.running == 0


def test_beyond_the_queue_is_refused_at_once_with_retry_after():
    scheduler = Scheduler(1, 1)
    with scheduler.take_slot(Deadline(10)):
        waiting = in_thread(scheduler.acquire, Deadline(10))
        wait_until(lambda: scheduler.waiting)
        with pytest.raises(ServiceError) as e:
            scheduler.take_slot(Deadline(10))
        assert (e.value.status, e.value.code) == (503, "OVERLOADED")
        assert e.value.retry_after_s > 0
    waiting.join(10)
    assert scheduler.running == 1


def test_waiting_ends_at_the_deadline_and_leaves_the_queue():
    scheduler = Scheduler(1, 1)
    with scheduler.take_slot(Deadline(10)):
        with pytest.raises(DeadlineExceeded, match="during queue"):
            scheduler.take_slot(Deadline(0.05))
        assert not scheduler.waiting
    with scheduler.take_slot(Deadline(10)):
        pass


def test_slot_comes_back_after_an_error():
    scheduler = Scheduler(1, 0)
    for _ in range(3):
        with pytest.raises(KeyError), scheduler.take_slot(Deadline(10)):
            raise KeyError
    assert scheduler.running == 0


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
    hung = in_thread(batches.run, rows(1), Deadline(0.1))
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
