"""Counters and timings of a running service, in memory shared by all its processes.

Each worker writes to its own region (shared_memory.py creates them): no lock spans processes, a kill leaves everything
readable, and a new worker continues in the region of one that ended. api/metrics.py exposes them to Prometheus.
"""
import bisect
import contextlib
import os
import threading
import time
from dataclasses import dataclass

REGION_BYTES = 256 * 1024  # some 2,000 series; pages that are not written take no memory
OWNER_AT, END_AT, READY_AT, GENERATION_AT, FAILED_AT = range(5)
HEADER_BYTES = 40          # process id of the owner, 0 when it ended; where the next entry goes; see Region
WASTE_DOUBLES = 32         # at the region's end: receives what no longer fits, and is never read
SEPARATOR = "\x1f"         # between the parts of a key: the measure's name and its labels
METHODS = ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "PATCH")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
POWERS_OF_2 = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Measure:
    """kind: counter, gauge or histogram; buckets: a histogram's upper bounds; join: how workers' gauges combine."""
    kind: str
    help: str
    labels: tuple = ()
    buckets: tuple = ()
    join: object = sum


MEASURES = {
    "requests": Measure("counter", "Requests answered; error is the code of the answer, empty for a success.",
                        ("endpoint", "method", "status", "error")),
    "request_duration_seconds": Measure("histogram", "From a request's headers to its answer.", ("endpoint",), SECONDS),
    "stage_duration_seconds": Measure("histogram", "Time that requests spent in a stage.", ("stage",), SECONDS),
    "batch_size": Measure("histogram", "Pictures in each batch that the engine ran, self-tests included.",
                          buckets=POWERS_OF_2),
    "cache_lookups": Measure("counter", "Result cache lookups, by result: hit or miss.", ("result",)),
    "shadow_answers": Measure("counter", "Answers of a model's shadow version, by result: agree or disagree with the "
                                         "one that was sent; skipped, as no slot was idle; failed.",
                              ("model", "version", "result")),
    "batch_files": Measure("counter", "Files of batch requests; error is the code of the file's result, empty for a "
                                      "success.", ("error",)),
    "overloaded": Measure("counter", "Requests refused because the queue or the memory for uploads was full."),
    "deadline_exceeded": Measure("counter", "Requests that exceeded their deadline."),
    "connections_cut_off": Measure("counter", "Connections closed because the client did not read its answer in time."),
    "log_lines_dropped": Measure("counter", "Log lines lost because nobody read standard error."),
    "worker_exits": Measure("counter", "Workers that crashed, were killed or stopped."),
    "connections": Measure("gauge", "Open connections."),
    "requests_in_progress": Measure("gauge", "Requests being answered, including this scrape."),
    "body_bytes": Measure("gauge", "Bytes of request bodies in memory."),
    "queue_depth": Measure("gauge", "Requests waiting for a slot."),
    "queue_limit": Measure("gauge", "Requests that may wait for a slot."),
    "slots_in_use": Measure("gauge", "Busy slots."),
    "slots": Measure("gauge", "Requests that may be decoded or inferred at once."),
    "workers_ready": Measure("gauge", "Workers that have loaded their model and serve requests."),
    "model_load_seconds": Measure("gauge", "How long a model took to load and pass its self-test.",
                                  ("model", "version", "worker")),
    "model_info": Measure("gauge", "The models being served; weights is the start of their SHA-256.",
                          ("model", "version", "engine", "precision", "device", "weights"), join=max),
    "model_requests": Measure("counter", "Requests that a model was asked to answer, as in requests.",
                              ("model", "version", "status", "error")),
    "model_duration_seconds": Measure("histogram", "From a request's headers to its answer, by model.",
                                      ("model", "version"), SECONDS),
    "info": Measure("gauge", "Versions of the service and of Python.", ("version", "python"), join=max),
    "draining": Measure("gauge", "1 while the service is stopping and waits for load balancers."),
}


class Region:
    """What one process counts, and its state: a header, then a log of entries, each a key (text) with float64 values.

    An entry: int32 length of the key, int32 number of values, the UTF-8 key space-padded to 8 bytes, the values.
    """

    def __init__(self, memory):
        self.bytes, self.integers, self.doubles = memory, memory.cast("q"), memory.cast("d")
        self.lock = threading.Lock()
        self.places = {}  # key → index of its first value

    def claim(self):
        """Make the current process the owner; it continues the existing counts, but resets gauges."""
        self.lock = threading.Lock()
        self.integers[END_AT] = max(self.integers[END_AT], HEADER_BYTES)
        self.places = {}
        for key, place, count in self.entries():
            self.places[key] = place
            if MEASURES[key.partition(SEPARATOR)[0]].kind == "gauge":
                self.reset(place, count)
        self.integers[READY_AT] = self.integers[GENERATION_AT] = self.integers[FAILED_AT] = 0
        self.integers[OWNER_AT] = os.getpid()

    def release(self):
        self.integers[OWNER_AT] = self.integers[READY_AT] = 0

    @property
    def owner(self):
        return self.integers[OWNER_AT]

    @property
    def ready(self):
        """Whether the owner has loaded its model and serves requests."""
        return bool(self.owner and self.integers[READY_AT])

    def serves(self, generation):
        """Record that the owner serves the model of this generation (see Board.publish)."""
        self.integers[GENERATION_AT], self.integers[READY_AT] = generation, 1

    def failed(self, generation):
        """Record that the owner could not load the model of this generation, and keeps its current one."""
        self.integers[FAILED_AT] = generation

    def entries(self):
        """Yield (key, index of the first value, number of values) of every entry, even while others are added."""
        at, end = HEADER_BYTES, self.integers[END_AT]
        while at < end:
            length, count = self.bytes[at:at + 8].cast("i")
            key = bytes(self.bytes[at + 8:at + 8 + length]).decode().rstrip(" ")
            place = (at + 8 + length) // 8
            yield key, place, count
            at = 8 * (place + count)

    def place(self, key, count):
        """The index of a key's first value, in the waste if the region is full. The caller holds the lock."""
        place = self.places.get(key)
        if place is not None:
            return place
        text = key.encode()
        text += b" " * (-len(text) % 8)
        at = self.integers[END_AT]
        place = (at + 8 + len(text)) // 8
        if place + count > len(self.doubles) - WASTE_DOUBLES:
            return len(self.doubles) - WASTE_DOUBLES
        header = self.bytes[at:at + 8].cast("i")
        header[0], header[1] = len(text), count
        self.bytes[at + 8:at + 8 + len(text)] = text
        self.reset(place, count)  # an unfinished entry may have been here
        self.integers[END_AT] = 8 * (place + count)  # now readers can see it
        self.places[key] = place
        return place

    def reset(self, place, count):
        self.bytes[8 * place:8 * (place + count)] = bytes(8 * count)

    def add(self, key, amount):
        with self.lock:
            self.doubles[self.place(key, 1)] += amount

    def set(self, key, value):
        with self.lock:
            self.doubles[self.place(key, 1)] = value

    def observe(self, key, count, index, value):
        """For a histogram: add one to bucket `index`, and `value` to the sum, which is the last of `count` values."""
        with self.lock:
            place = self.place(key, count)
            self.doubles[place + index] += 1
            self.doubles[place + count - 1] += value

    def read(self):
        """{key: list of values}."""
        return {key: self.doubles[place:place + count].tolist() for key, place, count in self.entries()}


def key(name, *labels):
    return SEPARATOR.join((name, *labels))


def private():
    region = Region(memoryview(bytearray(REGION_BYTES)))
    region.claim()
    return region


own = private()  # this process's region; without Gunicorn, the only one
regions = [own]  # those of all processes


# --- which process counts where ---

def start_worker(number):
    """In a new worker: count in this region from now on; if None, in one that nobody reads."""
    global own
    own = private() if number is None else regions[number]
    own.claim()


def ready_workers():
    """How many workers serve requests; 1 if this is the only process."""
    return sum(region.ready for region in regions[1:]) if len(regions) > 1 else 1


# --- counting ---

def count(name, *labels):
    own.add(key(name, *labels), 1)


def change(name, amount):
    """Change a gauge of this worker."""
    own.add(key(name), amount)


def observe(name, value, *labels):
    """Add a value to a histogram."""
    buckets = MEASURES[name].buckets
    own.observe(key(name, *labels), len(buckets) + 2, bisect.bisect_left(buckets, value), value)


def count_answer(endpoint, method, status, error):
    count("requests", endpoint, method if method in METHODS else "other", str(status), error)
    if error == "OVERLOADED":
        count("overloaded")
    elif error == "DEADLINE_EXCEEDED":
        count("deadline_exceeded")


def note_model(model, value=1):
    """Set the gauges that describe one of this worker's models; value: 0 for one that it no longer has."""
    worker, name, version = str(regions.index(own)) if own in regions else "-", model.name, model.version or ""
    engine, precision, weights = model.task.gauges()
    own.set(key("model_info", name, version, engine, precision, model.task.device, weights), value)
    own.set(key("model_load_seconds", name, version, worker), model.load_seconds * value)


class Stages:
    """How many milliseconds a request spends in each stage."""

    def __init__(self):
        self.timings_ms = {}

    @contextlib.contextmanager
    def __call__(self, stage):
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage, seconds, error=None):
        self.timings_ms[stage] = round(self.timings_ms.get(stage, 0) + 1000 * seconds, 2)

    def count(self):
        """Add the totals to the histograms, once, at the end: a stage may occur several times."""
        for stage, ms in list(self.timings_ms.items()):
            observe("stage_duration_seconds", ms / 1000, stage)
