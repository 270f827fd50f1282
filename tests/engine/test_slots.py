"""Slots are native threads, their callers greenlets: order, bounds, deadlines, and what comes back to the caller."""
import contextvars
import gc
import threading
import time
import weakref

import gevent
import pytest

from app.engine.batches import run_batch
from app.engine.slots import SLACK_S, Slots, in_native_thread
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.server import counters
from app.server.counters import Stages

colour = contextvars.ContextVar("colour", default="none")


def wait_until(condition):
    with gevent.Timeout(10):
        while not condition():
            gevent.sleep(0.001)


def spawn(slots, call, seconds=10.0, **options):
    """A greenlet whose value is that of the call, or the ServiceError."""
    def run():
        try:
            return slots.run(call, Deadline(seconds), Stages(), **options)
        except ServiceError as e:
            return e
    return gevent.spawn(run)


def values(greenlets):
    gevent.joinall(greenlets, timeout=10)
    return [greenlet.get(block=False) for greenlet in greenlets]


@pytest.fixture
def busy():
    """busy(count, max_queue): Slots whose threads all hold a call until .gate is set; the calls are .holding."""
    made = []

    def make(count, max_queue, seconds=10.0):
        slots = Slots(count, max_queue)
        slots.gate = threading.Event()
        made.append(slots)
        slots.holding = [spawn(slots, lambda: slots.gate.wait(10), seconds) for _ in range(count)]
        wait_until(lambda: len(slots.running) == count)
        return slots
    yield make
    for slots in made:
        slots.gate.set()
        wait_until(lambda slots=slots: not slots.running)


def test_calls_run_first_come_first_served(busy):
    slots, order = busy(1, 8), []
    waiting = [spawn(slots, lambda i=i: order.append(i)) for i in range(5)]
    wait_until(lambda: len(slots.waiting) == 5)
    slots.gate.set()
    values(waiting)
    assert order == [0, 1, 2, 3, 4]
    wait_until(lambda: not slots.running)


def test_as_many_calls_as_slots_run_at_once():
    slots, barrier, names = Slots(3, 8), threading.Barrier(3), set()

    def call():
        names.add(threading.current_thread().name)
        barrier.wait(10)
    values([spawn(slots, call) for _ in range(3)])
    assert names == {"slot-0", "slot-1", "slot-2"}


def test_other_greenlets_go_on_while_a_call_runs():
    slots, enough = Slots(1, 0), threading.Event()
    calling = spawn(slots, lambda: enough.wait(10))
    for _ in range(10):
        gevent.sleep(0.01)
    assert not calling.ready()
    enough.set()
    assert values([calling]) == [True]


def test_beyond_the_queue_is_refused_at_once_with_retry_after(busy):
    slots = busy(1, 1)
    waiting = spawn(slots, lambda: "its turn came")
    wait_until(lambda: slots.waiting)
    assert slots.is_full()
    started = time.monotonic()
    with pytest.raises(ServiceError) as e:
        slots.run(lambda: None, Deadline(10), Stages())
    assert time.monotonic() - started < 5
    assert (e.value.status, e.value.code) == (503, "OVERLOADED")
    assert e.value.retry_after_s > 0
    admitted = spawn(slots, lambda: "part of a batch", admitted=True)
    wait_until(lambda: len(slots.waiting) == 2)
    slots.gate.set()
    assert values([waiting, admitted]) == ["its turn came", "part of a batch"]


def test_a_burst_before_any_thread_has_woken_keeps_to_the_queue():
    slots, gate = Slots(2, 3), threading.Event()
    burst = [spawn(slots, lambda: gate.wait(10)) for _ in range(20)]
    gevent.sleep(0)  # all have asked, and no thread has had Python's lock for long
    assert len(slots.running) + len(slots.waiting) == 5
    gate.set()
    outcomes = values(burst)
    assert outcomes[:5] == [True] * 5
    assert [outcome.code for outcome in outcomes[5:]] == ["OVERLOADED"] * 15


def test_onlookers_take_places_of_the_queue(busy):
    slots = busy(1, 2)
    slots.onlookers = 1
    slots.check_room()
    slots.onlookers = 2
    with pytest.raises(ServiceError, match="at its limit"):
        slots.check_room()


def test_waiting_ends_at_the_deadline_and_leaves_the_queue(busy, monkeypatch):
    monkeypatch.setattr("app.engine.slots.SLACK_S", 10)  # which what waits does not need
    slots, started = busy(1, 1), time.monotonic()
    with pytest.raises(DeadlineExceeded, match="during queue"):
        slots.run(lambda: None, Deadline(0.05), Stages())
    assert time.monotonic() - started < 5
    assert not slots.waiting
    slots.gate.set()
    values(slots.holding)
    assert slots.run(lambda: 1, Deadline(10), Stages()) == 1


def test_a_call_whose_time_is_over_never_runs(busy):
    """Its turn may come after that, before its caller has had time to leave the queue."""
    slots, called = busy(1, 1), []
    waiting = spawn(slots, lambda: called.append(1), 0.5)
    wait_until(lambda: slots.waiting)
    threading.Timer(0.6, slots.gate.set).start()
    time.sleep(0.8)  # holds up all greenlets
    (outcome,) = values([waiting])
    assert "during queue" in outcome.message
    assert called == []


def test_an_overrun_costs_its_caller_the_deadline_and_its_slot_comes_back(busy):
    started = time.monotonic()
    slots = busy(1, 1, seconds=0.7)
    assert slots.overdue_seconds() == 0
    (outcome,) = values(slots.holding)
    assert 0.7 <= time.monotonic() - started < 0.7 + SLACK_S + 5
    assert isinstance(outcome, DeadlineExceeded)
    assert "during work" in outcome.message
    assert len(slots.running) == 1  # the call goes on
    assert slots.overdue_seconds() > SLACK_S * 0.9
    next_one = spawn(slots, lambda: "the slot is back")
    slots.gate.set()
    assert values([next_one]) == ["the slot is back"]
    wait_until(lambda: not slots.running)
    assert slots.overdue_seconds() == 0


def test_a_call_that_notices_its_deadline_itself_says_what_it_was_in(monkeypatch):
    monkeypatch.setattr("app.engine.slots.SLACK_S", 10)  # as the thread may be held up
    deadline = Deadline(0.5)

    def call():
        while deadline.remaining() > 0:
            time.sleep(0.005)
        deadline.check("decode")
    with pytest.raises(DeadlineExceeded, match="during decode"):
        Slots(1, 1).run(call, deadline, Stages())


def test_who_is_not_waited_for_any_more_is_not_calculated(busy):
    slots, called = busy(1, 2), []
    gone = spawn(slots, lambda: called.append("gone"), is_wanted=lambda: False)
    there = spawn(slots, lambda: called.append("there"), is_wanted=lambda: True)
    wait_until(lambda: len(slots.waiting) == 2)
    slots.gate.set()
    outcome, _ = values([gone, there])
    assert (outcome.status, outcome.code) == (499, "CLIENT_CLOSED_REQUEST")
    assert called == ["there"]


def test_exceptions_reach_the_caller_and_the_slot_comes_back():
    def fail(exception):
        raise exception
    slots = Slots(1, 0)
    for exception in (KeyError("key"), MemoryError(), ServiceError(400, "INVALID_IMAGE", "no"), SystemExit(3)):
        with pytest.raises(type(exception)) as e:
            slots.run(lambda exception=exception: fail(exception), Deadline(10), Stages())
        assert e.value is exception
        wait_until(lambda: not slots.running)
    assert slots.run(lambda: 1, Deadline(10), Stages()) == 1


def test_what_a_late_call_worked_on_is_freed_although_nobody_takes_its_error():
    slots, gate, large = Slots(1, 0), threading.Event(), weakref.WeakSet()

    def late():
        one = Stages()  # such as a request's file
        large.add(one)
        gate.wait(10)
        raise ServiceError(400, "INVALID_IMAGE", f"no {one}")
    gc.disable()
    try:
        assert isinstance(spawn(slots, late, 0.5).get(), DeadlineExceeded)
        assert large
        gate.set()
        wait_until(lambda: not slots.running and not large)
    finally:
        gc.enable()


def test_a_caller_that_is_killed_leaves_the_queue(busy):
    slots, called = busy(1, 2), []
    waiting = spawn(slots, lambda: called.append(1))
    wait_until(lambda: slots.waiting)
    waiting.kill()
    assert not slots.waiting
    slots.gate.set()
    values(slots.holding)
    assert called == []


def test_context_variables_are_seen_in_native_threads():
    slots = Slots(1, 1)

    def ask(own):
        colour.set(own)
        gevent.sleep(0.01)
        return slots.run(colour.get, Deadline(10), Stages(), admitted=True), in_native_thread(colour.get)
    asking = [gevent.spawn(ask, own) for own in ("red", "green")]
    assert values(asking) == [("red", "red"), ("green", "green")]
    assert colour.get() == "none"


def test_time_in_the_queue_is_a_stage(busy):
    slots, stages, started = busy(1, 1), Stages(), time.monotonic()
    waiting = gevent.spawn(slots.run, lambda: None, Deadline(10), stages)
    gevent.sleep(0.2)
    slots.gate.set()
    values([waiting])
    assert 150 < stages.timings_ms["queue"] <= 1000 * (time.monotonic() - started)


def test_gauges_are_back_at_zero(busy):
    def gauge(name):
        return counters.own.read().get(name, [0.0])[0]
    before = {name: gauge(name) for name in ("queue_depth", "slots_in_use")}
    slots = busy(2, 3)
    waiting = [spawn(slots, lambda: None, seconds) for seconds in (10, 10, 0.05)]
    waiting[2].join(10)
    assert (gauge("slots_in_use"), gauge("queue_depth")) == (before["slots_in_use"] + 2, before["queue_depth"] + 2)
    slots.gate.set()
    values(waiting)
    wait_until(lambda: {name: gauge(name) for name in before} == before)


def test_a_batch_runs_in_order_between_single_requests():
    slots, order, begun, gate = Slots(1, 4), [], threading.Event(), threading.Event()

    def one(i):
        def call():
            if i == 1:
                begun.set()
                gate.wait(10)
            order.append(i)
            return i
        return slots.run(call, Deadline(10), Stages(), admitted=True)
    batch = gevent.spawn(run_batch, slots, [lambda i=i: one(i) for i in range(20)])
    wait_until(begun.is_set)
    single = spawn(slots, lambda: order.append("single"))
    wait_until(lambda: len(slots.waiting) == 1)
    gate.set()
    assert values([batch, single])[0] == list(range(20))
    assert [i for i in order if i != "single"] == list(range(20))
    assert order.index("single") < 18  # it was not made to wait for the whole batch
    assert slots.batched == 0


def test_batches_are_refused_as_a_whole(busy):
    slots = busy(1, 4)

    def one():
        return slots.run(lambda: 1, Deadline(10), Stages(), admitted=True)
    first = gevent.spawn(run_batch, slots, [one] * 5)
    wait_until(lambda: slots.waiting)
    assert (slots.batched, len(slots.waiting), slots.is_alone()) == (5, 1, False)  # as many at once as slots
    with pytest.raises(ServiceError) as e:
        run_batch(slots, [one])
    assert e.value.code == "OVERLOADED"
    slots.gate.set()
    assert values([first]) == [[1] * 5]
    assert slots.batched == 0
    full = busy(1, 0)
    with pytest.raises(ServiceError, match="at its limit"):
        run_batch(full, [one])
    assert full.batched == 0


def test_who_is_alone(busy):
    slots = busy(1, 2)
    assert slots.is_alone()
    waiting = spawn(slots, lambda: None)
    wait_until(lambda: slots.waiting)
    assert not slots.is_alone()
    slots.gate.set()
    values([waiting])
    wait_until(slots.is_alone)
