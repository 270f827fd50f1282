"""What is written on the Board: by the master alone, except for the tickets of those who request a reload."""
import fcntl
import json

from app.config import StartError
from app.server.board import DRAINING_AT, LENGTH_AT, SEQUENCE_AT, TEXT_AT, TICKETS_AT, TRAFFIC_AT, Board

MOST_OUTCOMES, OUTCOME_BYTES = 16, 8 * 1024  # of one, at most


class WritableBoard(Board):
    def end_at(self, moment):
        """From now on the service is draining, and ends at this time.monotonic()."""
        self.integers[DRAINING_AT] = int(1000 * moment)

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

    def write(self, **changes):
        content = {**self.read(), **changes}
        while len(text := json.dumps(content, ensure_ascii=False).encode()) > TRAFFIC_AT - TEXT_AT:
            _, *content["reloads"] = content["reloads"]
        self.integers[SEQUENCE_AT] += 1
        self.bytes[TEXT_AT:TEXT_AT + len(text)] = text
        self.integers[LENGTH_AT] = len(text)
        self.integers[SEQUENCE_AT] += 1

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
