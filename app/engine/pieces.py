"""Pieces: parts of a call in a slot that idle slots take over. Imported with the first call that has some.

Nothing depends on this help. Whoever offers pieces makes all that nobody has taken, and waits only for those that are
under way. A slot takes a piece if no request waits and a core is idle, and looks for requests again after each one.
"""
import collections
import contextvars
import threading
import time

from app.engine.slots import SLACK_S, Outcome
from app.errors import Deadline, DeadlineExceeded


class Ending(Deadline):
    """A call's deadline for its pieces, which can be told to end earlier."""

    def __init__(self, deadline):
        self.of_call, self.end = deadline, float("inf")

    @property
    def at(self):
        return min(self.of_call.at, self.end)

    def now(self):
        self.end = min(self.end, time.monotonic())


class Piece:
    """One call, in a copy of the context of whoever offers it."""

    def __init__(self, call, deadline):
        self.call, self.deadline, self.context = call, deadline, contextvars.copy_context()
        self.begun, self.outcome, self.ended = False, None, threading.Event()

    def run(self):
        self.outcome = Outcome(self.context.run, self.call)
        self.call = self.context = None
        self.ended.set()


class Offers:
    """The pieces that nobody has begun, oldest first."""

    def __init__(self, slots):
        self.slots, self.pieces = slots, collections.deque()

    def idle_cores(self):
        """How many cores no request occupies; pieces may."""
        return 0 if self.slots.waiting else max(0, self.slots.cores - len(self.slots.running))

    def help(self, number):
        """Make the oldest piece in this slot, if a core is idle; returns whether. The caller holds slots.changed, which
        is released meanwhile."""
        helping, changed = self.slots.helping, self.slots.changed
        if not self.pieces or len(helping) >= self.idle_cores():
            return False
        piece = helping[number] = self.pieces.popleft()
        piece.begun = True
        changed.release()
        try:
            piece.run()
        finally:
            del piece
            changed.acquire()
            del helping[number]
        return True

    def add(self, piece):
        with self.slots.changed:
            self.pieces.append(piece)
            if len(self.slots.helping) < self.idle_cores():
                self.slots.changed.notify()

    def withdraw(self, piece):
        """Take it back; returns False if it was begun."""
        with self.slots.changed:
            if piece.begun:
                return False
            self.pieces.remove(piece)
            piece.begun = True
            return True


def offers_of(slots):
    with slots.changed:
        slots.offers = slots.offers or Offers(slots)
        return slots.offers


def in_order(slots, calls, ending, most=None, is_guess=False):
    """Yield the values of the calls of an iterable in order, each made here or in an idle slot. Raises what they raise;
    DeadlineExceeded.

    The iterable may wait for what the calls need; it is read, in this thread, no further ahead than there are cores
    for, nor than `most` calls. ending: an Ending for the calls, which ends with the generator. That waits for the calls
    under way, unless is_guess: then their values may turn out to be unneeded, and they need nothing that their caller
    frees. So guesses are made ahead only while requests come one at a time.
    """
    if is_guess and not slots.is_alone():
        yield from (call() for call in calls)
        return
    offers, calls, has_more = offers_of(slots), iter(calls), True
    most = min(most or slots.cores + 1, slots.cores + 1)
    ahead, unbegun = collections.deque(), collections.deque()  # not yet yielded; the last of them, some of them begun
    try:
        while ahead or has_more:
            while unbegun and unbegun[0].begun:
                unbegun.popleft()
            if ahead and ahead[0].ended.is_set():
                yield ahead.popleft().outcome.get()
            elif has_more and len(ahead) < most and len(unbegun) <= offers.idle_cores():
                found = Outcome(next, calls, None)
                has_more = found.result is not None
                if has_more or found.error is not None:  # which is raised after the values of the calls before
                    piece = Piece(found.result or found.get, ending)
                    ahead.append(piece)
                    unbegun.append(piece)
                    offers.add(piece)
                    del piece
            elif unbegun:
                piece = unbegun.popleft()
                if offers.withdraw(piece):
                    piece.run()
                del piece
            elif not ahead[0].ended.wait(max(0, ending.remaining()) + SLACK_S):
                raise DeadlineExceeded("work")
    finally:
        ending.now()
        for piece in ahead:
            if not offers.withdraw(piece) and not is_guess:
                piece.ended.wait()
                piece.outcome.error = None  # nobody gets it, see Outcome.get
