"""Batches: several calls that are admitted together, and share the slots fairly with single ones; and more slots for
models that predict inputs of several calls at once."""
import contextvars

import gevent
from gevent.lock import BoundedSemaphore

from app.server import counters


def run_batch(slots, calls):
    """Make the calls of one batch, each in its own greenlet, and return their values in order.

    A batch is admitted or refused as a whole: refused if the queue is full, or if earlier batches have as many
    unanswered inputs as there are slots and places in the queue. All batches together run one greenlet per slot at a
    time, so that single requests get their turn in between. Raises ServiceError OVERLOADED.
    """
    slots.check_room()
    if slots.batched >= slots.count + slots.max_queue:
        raise slots.overloaded()

    def in_lane(call):
        try:
            with slots.lanes:
                return call()
        finally:  # also if it is cut off while it waits
            slots.batched -= 1
    slots.batched += len(calls)
    greenlets = [gevent.spawn(contextvars.copy_context().run, in_lane, call) for call in calls]
    try:
        gevent.joinall(greenlets)
        return [greenlet.get() for greenlet in greenlets]
    finally:
        gevent.killall(greenlets, block=False)  # if the caller is cut off meanwhile


def grow(slots, count):
    """Have at least this many slots, as such a model collects its batches from the calls in slots."""
    slots.count = max(slots.count, count)
    slots.lanes = BoundedSemaphore(slots.count)
    counters.own.set(counters.key("slots"), slots.count)
