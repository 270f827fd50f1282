"""The scheduler: one native thread per slot, behind a bounded queue. Callers are greenlets, which wait for the result
without blocking others; what runs in a slot runs in a native thread, with native locks.
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

SLACK_S = 0.25        # for the work itself to notice its deadline and name its stage
ALONE_AFTER_S = 0.2   # without it, p99 at 80 % of capacity was 10 % higher


class Outcome:
    """Makes a call in the current thread and keeps its outcome for another thread."""

    def __init__(self, call, *arguments):
        self.result = self.error = None
        try:
            self.result = call(*arguments)
        except BaseException as e:  # any exception is for the caller, not for this thread
            self.error = e

    def get(self):
        """Return the call's value or raise its exception; works once. The exception is dropped then, as its traceback
        would keep the frames, and with them the request's file, until the next garbage collection."""
        try:
            if self.error is not None:
                raise self.error
            return self.result
        finally:
            self.error = None


class Job:
    """A call, from the queue to its end. Created by the caller, run in the slot's thread."""

    def __init__(self, call, deadline, stages, is_wanted):
        self.call, self.deadline, self.stages, self.is_wanted = call, deadline, stages, is_wanted
        self.context = contextvars.copy_context()
        self.queued = time.monotonic()
        self.started = None
        self.outcome, self.loop = AsyncResult(), gevent.get_hub().loop

    def run(self):
        """Make the call. Returns a function that delivers the outcome to the caller's event loop."""
        self.stages.add("queue", self.started - self.queued)
        outcome = Outcome(self.call_if_wanted)
        self.call = self.context = None
        return functools.partial(self.loop.run_callback_threadsafe, self.outcome.set, outcome)

    def call_if_wanted(self):
        if self.deadline.remaining() <= 0:
            raise DeadlineExceeded("queue")
        if self.is_wanted is not None and not self.is_wanted():
            raise ServiceError(499, "CLIENT_CLOSED_REQUEST", "The client disconnected before its turn came.")
        return self.context.run(self.call)


class Slots:
    """Runs `count` calls at once, first come, first served; `max_queue` more wait, the rest are refused immediately.
    Idle slots help with pieces of calls, as long as fewer than `cores` are busy."""

    def __init__(self, count, max_queue, cores=1):
        self.count, self.max_queue, self.cores = count, max_queue, cores
        self.waiting, self.running = collections.deque(), {}  # Jobs; {thread's number: Job}
        self.offers, self.helping = None, {}  # pieces.Offers, if there were any; {thread's number: Piece}
        self.changed = threading.Condition()  # guards these
        self.threads = []
        self.seconds_per_job = 0.05  # a running mean of the time in a slot
        self.last_met = 0.0  # when a call last found another one in a slot or the queue
        self.onlookers = 0  # requests that wait, in places of the queue, for the answer of an identical one
        self.batched = 0    # unanswered files of batches
        self.lanes = BoundedSemaphore(count)  # for files of batches, see batches.py
        counters.own.set(counters.key("slots"), count)
        counters.own.set(counters.key("queue_limit"), max_queue)

    def start(self):
        """Start the threads, which a process must not have before it forks."""
        with self.changed:
            for number in range(len(self.threads), self.count):
                thread = threading.Thread(target=self.work, args=(number,), name=f"slot-{number}", daemon=True)
                thread.start()
                self.threads.append(thread)

    def work(self, number):
        while True:
            with self.changed:
                while not self.waiting:
                    if not (self.offers and self.offers.help(number)):
                        self.changed.wait()
                job = self.running[number] = self.waiting.popleft()
                job.started = time.monotonic()
            counters.change("queue_depth", -1)
            counters.change("slots_in_use", 1)
            deliver = job.run()
            with self.changed:  # before the outcome is known, so that a caller that reacts to it finds room
                del self.running[number]
                self.seconds_per_job += 0.05 * (time.monotonic() - job.started - self.seconds_per_job)
            counters.change("slots_in_use", -1)
            deliver()
            del job, deliver

    def run(self, call, deadline, stages, is_wanted=None, admitted=False):
        """Run call() in a slot's thread and return its value.

        stages: counters.Stages, which get the time in the queue; is_wanted(): whether anyone still waits for it, asked
        just before the call; admitted: the caller is part of an admitted batch and waits even if the queue is
        full. Raises ServiceError OVERLOADED at once, DeadlineExceeded even if the call goes on, what the call raises.
        """
        self.start()
        job = Job(call, deadline, stages, is_wanted)
        with self.changed:
            if not admitted:
                self.check_room()
            if self.running or self.waiting:
                self.last_met = time.monotonic()
            self.waiting.append(job)
            self.changed.notify()
        counters.change("queue_depth", 1)
        try:
            job.outcome.wait(max(0, deadline.remaining()))
            if job.started and not job.outcome.ready():
                job.outcome.wait(SLACK_S)
            if not job.outcome.ready():
                job.outcome.rawlink(lambda late: vars(late.value).clear())  # nobody will get it
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

    def is_full(self):
        return len(self.running) + len(self.waiting) + self.onlookers >= self.count + self.max_queue

    def check_room(self):
        """Raises ServiceError OVERLOADED if the queue is full."""
        if self.is_full():
            raise self.overloaded()

    def is_alone(self):
        """Whether calls come one at a time now, and no batch: one may use the whole processor."""
        return len(self.running) <= 1 and not self.batched and time.monotonic() > self.last_met + ALONE_AFTER_S

    def overloaded(self):
        """The refusal; its Retry-After estimates when the present work will be done."""
        seconds = self.seconds_per_job * (len(self.waiting) + len(self.running) + self.batched) / self.count
        return ServiceError(503, "OVERLOADED", "The service is at its limit; try again later.", retry_after_s=seconds)

    def overdue_seconds(self):
        """How long the most overdue call, or piece of one, has been running past its deadline."""
        jobs = [*list(self.running.values()), *list(self.helping.values())]
        return max([0.0, *(-job.deadline.remaining() for job in jobs)])


def in_native_thread(call, *arguments):
    """call(*arguments) in one of gevent's native threads: for blocking calls (Redis) and computation without a slot."""
    return gevent.get_hub().threadpool.apply(Outcome, (contextvars.copy_context().run, call, *arguments)).get()
