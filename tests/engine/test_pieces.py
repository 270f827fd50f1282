"""Idle slots take pieces of a call, but no request waits for them, and nothing depends on them."""
import contextlib
import contextvars
import functools
import gc
import threading
import time
import weakref

import gevent
import pytest

from app.engine import pieces
from app.engine.slots import Slots
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.server.counters import Stages

colour = contextvars.ContextVar("colour", default="none")


def wait_until(condition):
    with gevent.Timeout(10):
        while not condition():
            gevent.sleep(0.001)


def run(slots, call, seconds=10.0):
    return slots.run(call, Deadline(seconds), Stages())


def all_of(slots, calls, seconds=10.0, **options):
    return list(pieces.in_order(slots, calls, pieces.Ending(Deadline(seconds)), **options))


def slot_name():
    return threading.current_thread().name


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_values_come_in_order_whoever_makes_the_calls(cores):
    slots = Slots(4, 0, cores)

    def one(i):
        time.sleep(0.002 * (i % 3))
        return i
    calls = [functools.partial(one, i) for i in range(30)]
    assert run(slots, lambda: all_of(slots, iter(calls))) == list(range(30))
    wait_until(lambda: not slots.helping and not slots.running)
    assert not slots.offers.pieces


def test_idle_slots_help_as_long_as_cores_are_idle():
    slots, meeting, names = Slots(4, 0, cores=3), threading.Barrier(3), set()

    def piece():
        names.add(slot_name())
        meeting.wait(10)  # three at once
        assert len(slots.running) + len(slots.helping) <= 3
        return True
    assert run(slots, lambda: all_of(slots, [piece] * 3)) == [True] * 3
    assert len(names) == 3


def test_without_idle_cores_nobody_helps():
    slots = Slots(3, 0, cores=2)
    gate, names = threading.Event(), []
    other = gevent.spawn(run, slots, lambda: gate.wait(10))
    wait_until(lambda: slots.running)
    run(slots, lambda: all_of(slots, [lambda: names.append(slot_name())] * 5))
    assert len(set(names)) == 1
    gate.set()
    other.join(10)


def test_waiting_requests_come_before_pieces():
    slots, gate, begun, order = Slots(2, 4, cores=2), threading.Event(), threading.Event(), []

    def piece(i):
        if i < 2:  # one here, one in the other slot
            begun.set()
            gate.wait(10)
        order.append(i)

    def offering():
        return all_of(slots, [functools.partial(piece, i) for i in range(6)])
    offered = gevent.spawn(run, slots, offering)
    wait_until(lambda: begun.is_set() and slots.helping)
    request = gevent.spawn(run, slots, lambda: order.append("request"))
    wait_until(lambda: slots.waiting)
    assert not slots.is_full()  # which helping slots do not change
    gate.set()
    gevent.joinall([offered, request], timeout=10)
    assert order.index("request") <= 4  # not at the end: the slot that helped took it after its piece
    assert set(order) == {"request", *range(6)}


def test_a_failure_ends_the_others():
    slots, ended = Slots(2, 0, cores=2), []

    def failing():
        time.sleep(0.05)
        raise ServiceError(400, "INVALID_VIDEO", "no")

    def offering():
        ending = pieces.Ending(Deadline(10))

        def long():
            while ending.remaining() > 0:
                time.sleep(0.001)
            ended.append(True)
        return list(pieces.in_order(slots, iter([failing, *[long] * 20]), ending))
    started = time.monotonic()
    with pytest.raises(ServiceError, match="no"):
        run(slots, offering)
    assert time.monotonic() - started < 5
    assert len(ended) <= 2
    wait_until(lambda: not slots.helping and not slots.running)
    assert not slots.offers.pieces


@pytest.mark.parametrize("cores", [1, 3])
def test_a_failure_of_the_iterable_comes_after_the_values_before_it(cores):
    slots, found = Slots(3, 0, cores), []

    def calls():
        for i in range(5):
            yield lambda i=i: time.sleep(0.01) or i
        raise ServiceError(400, "INVALID_VIDEO", "no")

    with pytest.raises(ServiceError, match="no"):
        run(slots, lambda: [found.append(i) for i in pieces.in_order(slots, calls(), pieces.Ending(Deadline(10)))])
    assert found == list(range(5))


class Large:
    """Stands for a frame's picture."""


def test_what_failed_pieces_worked_on_is_freed_at_once():
    slots, large = Slots(3, 0, cores=3), weakref.WeakSet()

    def fail(one):
        time.sleep(0.01)
        raise ServiceError(400, "INVALID_VIDEO", "no")

    def offering():
        def calls():
            for _ in range(9):
                one = Large()
                large.add(one)
                yield functools.partial(fail, one)
                del one
        return all_of(slots, calls())
    gc.disable()
    try:
        with contextlib.suppress(ServiceError):
            run(slots, offering)
        wait_until(lambda: not slots.running and not slots.helping)
        assert not large
    finally:
        gc.enable()


def test_a_piece_that_hangs_costs_the_caller_its_deadline_and_is_noticed():
    slots, gate = Slots(2, 0, cores=2), threading.Event()

    def hang_elsewhere():
        if slot_name() != offerer[0]:
            gate.wait(10)
        else:
            wait_until_native(lambda: slots.helping)

    offerer = []

    def offering():
        offerer.append(slot_name())
        return all_of(slots, [hang_elsewhere] * 3, 1)
    with pytest.raises(DeadlineExceeded):
        run(slots, offering, 1)
    assert slots.helping
    assert slots.overdue_seconds() > 0
    gate.set()
    wait_until(lambda: not slots.helping and not slots.running)
    assert slots.overdue_seconds() == 0


def test_the_iterable_is_read_no_further_than_needed():
    slots, read, most = Slots(4, 0, cores=4), [], []

    def calls():
        for i in range(20):
            read.append(i)
            yield lambda: time.sleep(0.002)

    def offering():
        for taken, _ in enumerate(pieces.in_order(slots, calls(), pieces.Ending(Deadline(10)), most=2)):
            most.append(len(read) - taken)
    run(slots, offering)
    assert len(read) == 20
    assert max(most) <= 3  # two of them besides the one that was just taken


def test_guesses_are_made_ahead_only_by_a_lone_call_and_are_not_waited_for(monkeypatch):
    slots, gate, names = Slots(2, 0, cores=2), threading.Event(), []

    def first():
        wait_until_native(lambda: slots.helping)
        return slot_name()

    def offering():
        found = pieces.in_order(slots, [first, lambda: gate.wait(10)], pieces.Ending(Deadline(10)), is_guess=True)
        names.append(next(found))
        found.close()
        return len(slots.helping)
    assert run(slots, offering) == 1
    gate.set()
    wait_until(lambda: not slots.helping)
    monkeypatch.setattr(slots, "is_alone", lambda: False)
    assert len(set(run(slots, lambda: all_of(slots, [slow] * 9, is_guess=True)))) == 1
    meeting = threading.Barrier(2)
    assert len(set(run(slots, lambda: all_of(slots, [lambda: meeting.wait(10) >= 0 and slot_name()] * 2)))) == 2


def slow():
    time.sleep(0.01)
    return slot_name()


def wait_until_native(condition):
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)


def test_pieces_see_the_context_variables_of_their_call():
    slots, meeting = Slots(2, 0, cores=2), threading.Barrier(2)

    def piece():
        meeting.wait(10)
        return colour.get(), slot_name()

    def ask():
        colour.set("red")
        return run(slots, lambda: all_of(slots, [piece] * 2))
    greenlet = gevent.spawn(ask)
    (one, here), (other, there) = greenlet.get(timeout=10)
    assert (one, other) == ("red", "red")
    assert here != there
