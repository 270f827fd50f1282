"""What a service's workers learn from its Gunicorn master: whether it is stopping, and which models are published.

The Board lies at the start of the memory that shared_memory.py creates; publishing.py writes it.
"""
import json

BYTES = 64 * 1024
TRAFFIC_AT = 48 * 1024  # from here to BYTES: which versions answer, see traffic.py
MAGIC_AT, MASTER_AT, DRAINING_AT, TICKETS_AT, SEQUENCE_AT, LENGTH_AT, TEXT_AT = 0, 1, 2, 3, 4, 5, 64


class Board:
    """The text is JSON: `plan`; `published` and `previous` {"generation", "models": [Prepared.as_json(), …]}; and
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

    def published(self):
        """Cheap enough to check ten times a second."""
        return self.read().get("published")


own = None  # the Board of the service that this process belongs to; None without Gunicorn


def is_draining():
    """Whether the service has been told to stop and is waiting for load balancers to notice."""
    return own is not None and own.draining
