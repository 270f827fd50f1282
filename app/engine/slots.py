"""Who may calculate when: native threads, one for each slot, with a bounded queue before them.

The callers are greenlets, which wait for the answer without holding up anyone else; in a program without a server the
caller is its only greenlet. What runs in a slot runs in a native thread, with native locks.
"""
import collections
import contextvars
import functools
import threading
import time

import gevent
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from app.errors import DeadlineExceeded, ServiceError
from app.server import counters

SLACK_S = 0.25  # for the work itself to notice its deadline, and say what it was in


class Outcome:
    """What a call ended with in the thread that makes this, for another thread."""

    def __init__(self, call, *arguments):
        self.result = self.error = None
        try:
            self.result = call(*arguments)
        except BaseException as e:  # whatever it was belongs to the caller, not to this thread
            self.error = e

    def get(self):
        """The call's value, or what it raised; once. Nothing holds the error any more then: its stack trace holds the
        frames, and with them the request's file, until the next garbage collection."""
        error, self.error = self.error, None
        if error is None:
            return self.result
        try:
            raise error
        finally:
            del error


class Job:
    """A call, from its place in the queue to its end. All but the caller's own part runs in the slot's thread."""

    def __init__(self, call, deadline, stages, is_wanted):
        self.call, self.deadline, self.stages, self.is_wanted = call, deadline, stages, is_wanted
        self.context = contextvars.copy_context()
        self.queued = time.monotonic()
        self.started = None
        self.outcome, self.loop = AsyncResult(), gevent.get_hub().loop

    def run(self):
        """Call. Returns a function that hands the outcome to the caller's loop."""
        self.stages.add("queue", self.started - self.queued)
        outcome = Outcome(self.call_if_wanted)
        self.call = self.context = None
        return functools.partial(self.loop.run_callback_threadsafe, self.outcome.set, outcome)

    def call_if_wanted(self):
        if self.deadline.remaining() <= 0:
            raise DeadlineExceeded("queue")
        if self.is_wanted is not None and not self.is_wanted():
            raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "The client left before its turn came.")
        return self.context.run(self.call)


class Slots:
    """`count` calls run at once, first come first served; `max_queue` more wait; the rest is refused at once."""

    def __init__(self, count, max_queue):
        self.count, self.max_queue = count, max_queue
        self.waiting, self.running = collections.deque(), {}  # Jobs; {thread's number: Job}
        self.changed = threading.Condition()  # around both
        self.threads = []
        self.seconds_per_job = 0.05  # a running mean of the time in a slot
        self.onlookers = 0  # requests that wait for what another one calculates, in places of the queue
        self.batched = 0    # files of batches that are not answered yet
        self.lanes = BoundedSemaphore(count)
        counters.own.set(counters.key("slots"), count)
        counters.own.set(counters.key("queue_limit"), max_queue)

    def start(self):
        """The threads, which a process that forks must not have yet."""
        with self.changed:
            if not self.threads:
                for number in range(self.count):
                    self.threads.append(threading.Thread(target=self.work, args=(number,), name=f"slot-{number}",
                                                         daemon=True))
                    self.threads[-1].start()

    def work(self, number):
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                job = self.running[number] = self.waiting.popleft()
                job.started = time.monotonic()
            counters.change("queue_depth", -1)
            counters.change("slots_in_use", 1)
            deliver = job.run()
            with self.changed:  # before the outcome is known: who asks again because of it finds room
                del self.running[number]
                self.seconds_per_job += 0.05 * (time.monotonic() - job.started - self.seconds_per_job)
            counters.change("slots_in_use", -1)
            deliver()
            del job, deliver

    def run(self, call, deadline, stages, is_wanted=None, admitted=False):
        """call()'s value, from a slot's thread.

        stages: counters.Stages, to which the time in the queue is added; is_wanted: asked just before the call, whether
        anyone still waits for it; admitted: the caller is part of a batch that was let in, and waits even where the
        queue is full. Raises ServiceError OVERLOADED at once when the queue is full; DeadlineExceeded when the time is
        over, also where the call goes on; what the call raises.
        """
        self.start()
        job = Job(call, deadline, stages, is_wanted)
        with self.changed:
            if not admitted:
                self.check_room()
            self.waiting.append(job)
            self.changed.notify()
        counters.change("queue_depth", 1)
        try:
            job.outcome.wait(max(0, deadline.remaining()))
            if job.started and not job.outcome.ready():
                job.outcome.wait(SLACK_S)
            if not job.outcome.ready():
                raise DeadlineExceeded("work" if job.started else "queue")
            return job.outcome.get().get()
        finally:
            with self.changed:
                left = job in self.waiting
                if left:
                    self.waiting.remove(job)
            if left:
                counters.change("queue_depth", -1)
                stages.add("queue", time.monotonic() - job.queued)

    def run_batch(self, calls):
        """The values of the calls of one batch, in order; each is called in a greenlet of its own.

        A batch is let in or refused as a whole, like any request, and refused too while the batches before it have as
        many files under way as requests could run and wait. All batches share as many greenlets as there are slots, so
        that single requests get their turn in between. Raises ServiceError OVERLOADED.
        """
        self.check_room()
        if self.batched >= self.count + self.max_queue:
            raise self.overloaded()

        def in_lane(call):
            with self.lanes:
                try:
                    return call()
                finally:
                    self.batched -= 1
        self.batched += len(calls)
        greenlets = [gevent.spawn(contextvars.copy_context().run, in_lane, call) for call in calls]
        gevent.joinall(greenlets)
        return [greenlet.get() for greenlet in greenlets]

    def is_full(self):
        return len(self.running) + len(self.waiting) + self.onlookers >= self.count + self.max_queue

    def check_room(self):
        """Raises ServiceError OVERLOADED where the queue is full."""
        if self.is_full():
            raise self.overloaded()

    def is_alone(self):
        """Whether at most one call is here, and no batch: it may have the whole processor."""
        return len(self.running) <= 1 and not self.waiting and not self.batched

    def overloaded(self):
        """The refusal, with the time in which what is here now will be done."""
        seconds = self.seconds_per_job * (len(self.waiting) + len(self.running) + self.batched) / self.count
        return ServiceError(503, "OVERLOADED", "The service is at its limit; try again later.", retry_after_s=seconds)

    def overdue_seconds(self):
        """How long the oldest call goes on past its deadline."""
        return max([0.0, *(-job.deadline.remaining() for job in list(self.running.values()))])


def in_native_thread(call, *arguments):
    """call(*arguments), in one of gevent's own native threads: for what waits for others (Redis), and for a calculation
    that must not wait for a slot."""
    run = contextvars.copy_context().run
    return gevent.get_hub().threadpool.apply(Outcome, (run, call, *arguments)).get()
