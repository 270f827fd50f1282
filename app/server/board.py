"""What a service's processes tell each other: whether it is stopping, which model is published, how reloads ended.

It lives in shared memory that the Gunicorn master creates before it forks. On Linux this is a memfd: it has no name in
any file system, so that nothing is left behind and nothing can be removed while the service runs, and `python -m app
reload` opens it through /proc. The counters (counters.py) follow it in the same memory.
"""
import fcntl
import json
import mmap
import os

from app.config import StartError

NAME = "model-server"
BYTES = 64 * 1024
TRAFFIC_AT = 48 * 1024  # from here to BYTES: which versions answer, see traffic.py
MAGIC = 0x6D6F64656C763032
MAGIC_AT, MASTER_AT, DRAINING_AT, TICKETS_AT, SEQUENCE_AT, LENGTH_AT, TEXT_AT = 0, 1, 2, 3, 4, 5, 64
MOST_OUTCOMES, OUTCOME_BYTES = 16, 8 * 1024  # of one, at most


class Board:
    """Only the master writes, except for the tickets of reload requests.

    The text is JSON: `plan`; `published` and `previous` {"generation", "models": [Prepared.as_json(), …]}; and
    `reloads`, the last outcomes, oldest first {"covers": the last ticket when it began, "worked", "message",
    "generation"}.
    """

    def __init__(self, memory, descriptor=None):
        self.descriptor = descriptor
        self.bytes, self.integers = memory[:BYTES], memory[:BYTES].cast("q")
        self.last_text, self.last = b"", {}

    @property
    def draining(self):
        return bool(self.integers[DRAINING_AT])

    @draining.setter
    def draining(self, value):
        self.integers[DRAINING_AT] = value

    @property
    def tickets(self):
        return self.integers[TICKETS_AT]

    def draw_ticket(self):
        """A number for a reload requested now, by any process."""
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        try:
            self.integers[TICKETS_AT] += 1
            return self.tickets
        finally:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def read(self):
        """The JSON object; retries while the master is writing."""
        for _ in range(1000):  # a master that is killed while writing never ends it
            sequence = self.integers[SEQUENCE_AT]
            text = bytes(self.bytes[TEXT_AT:TEXT_AT + self.integers[LENGTH_AT]])
            if sequence % 2 == 0 and sequence == self.integers[SEQUENCE_AT]:
                if text != self.last_text:
                    self.last_text, self.last = text, json.loads(text)
                break
        return dict(self.last)

    def write(self, **changes):
        content = {**self.read(), **changes}
        while len(text := json.dumps(content, ensure_ascii=False).encode()) > TRAFFIC_AT - TEXT_AT:
            _, *content["reloads"] = content["reloads"]
        self.integers[SEQUENCE_AT] += 1
        self.bytes[TEXT_AT:TEXT_AT + len(text)] = text
        self.integers[LENGTH_AT] = len(text)
        self.integers[SEQUENCE_AT] += 1

    def published(self):
        return self.read().get("published")

    def generation(self):
        """How often models have been published; cheap enough to check ten times a second."""
        return (self.published() or {}).get("generation", 0)

    def publish(self, models):
        """Set the models, a list of Prepared, that workers serve from now on. Returns their generation. Raises
        StartError if there are too many."""
        before = self.published()
        generation = (before["generation"] if before else 0) + 1
        published = {"generation": generation, "models": [
            model.as_json() | {"fallback_reason": model.fallback_reason and model.fallback_reason[:1000]}
            for model in models]}
        # The next publishing has to fit too, whose `previous` this one is, and the outcome of its reload.
        if 2 * len(json.dumps(published, ensure_ascii=False).encode()) > TRAFFIC_AT - TEXT_AT - OUTCOME_BYTES:
            raise StartError(f"{len(models)} models are too many for one service: the names of their folders "
                             f"take more than {(TRAFFIC_AT - TEXT_AT - OUTCOME_BYTES) // 2} bytes")
        self.write(previous=before, published=published)
        return generation

    def add_outcome(self, covers, worked, message, generation=None):
        outcome = {"covers": covers, "worked": worked, "message": message[:1000], "generation": generation}
        self.write(reloads=[*self.read().get("reloads", []), outcome][-MOST_OUTCOMES:])


own = None  # the Board of the service that this process belongs to; None without Gunicorn


def create(counter_bytes):
    """In the master: create the memory. Returns its part for the counters, as a memoryview."""
    global own
    size = BYTES + counter_bytes
    try:
        descriptor = os.memfd_create(NAME)
        os.ftruncate(descriptor, size)
        memory = memoryview(mmap.mmap(descriptor, size))
    except (AttributeError, OSError):  # not Linux, or forbidden: `reload` then works by signal only
        descriptor, memory = None, memoryview(mmap.mmap(-1, size))
    own = Board(memory, descriptor)
    own.integers[MASTER_AT], own.integers[MAGIC_AT] = os.getpid(), MAGIC
    return memory[BYTES:]


def is_draining():
    """Whether the service has been told to stop and is waiting for load balancers to notice."""
    return own is not None and own.draining
