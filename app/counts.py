"""Numbers that the processes of one running service add up, in memory that they share, made by the Gunicorn master.

The memory is anonymous and inherited over fork: there is no file that could be left behind, torn, empty, or not be
written on a full disk. Each worker writes to a region of its own, so that no lock spans processes and a kill at any
moment leaves all readable. A new worker goes on in the region of one that ended: nothing that was counted is lost, and
there are never more regions than workers at one time.
"""
import mmap
import os
import threading

REGION_BYTES = 256 * 1024  # some 2,000 series; pages that are not written take no memory
HEADER_BYTES = 16          # int64 owner: process id, 0 when it ended; int64 end: where the next entry goes
WASTE_DOUBLES = 32         # at the region's end: takes what found no room, and is never read


class Region:
    """What one process counts: a log of entries, each a key (text) with some float64 values.

    An entry: int32 bytes of the key, int32 number of values, the key in UTF-8 padded with spaces to 8 bytes, the
    values.
    """

    def __init__(self, memory):
        self.bytes, self.integers, self.doubles = memory, memory.cast("q"), memory.cast("d")
        self.lock = threading.Lock()
        self.places = {}  # key → index of its first value

    def claim(self):
        """Make the current process the owner; it counts on from what is there."""
        self.lock = threading.Lock()
        self.places = {key: place for key, place, _ in self.entries()}
        self.integers[1] = max(self.integers[1], HEADER_BYTES)
        self.integers[0] = os.getpid()

    @property
    def owner(self):
        return self.integers[0]

    def release(self):
        self.integers[0] = 0

    def entries(self):
        """(key, index of the first value, number of values) of every entry, while another process may be adding."""
        at, end = HEADER_BYTES, self.integers[1]
        while at < end:
            length, count = self.bytes[at:at + 8].cast("i")
            key = bytes(self.bytes[at + 8:at + 8 + length]).decode().rstrip(" ")
            place = (at + 8 + length) // 8
            yield key, place, count
            at = 8 * (place + count)

    def place(self, key, count):
        """The index of a key's first value; the lock is held. A full region gives the waste."""
        place = self.places.get(key)
        if place is not None:
            return place
        text = key.encode()
        text += b" " * (-len(text) % 8)
        at = self.integers[1]
        place = (at + 8 + len(text)) // 8
        if place + count > len(self.doubles) - WASTE_DOUBLES:
            return len(self.doubles) - WASTE_DOUBLES
        header = self.bytes[at:at + 8].cast("i")
        header[0], header[1] = len(text), count
        self.bytes[at + 8:at + 8 + len(text)] = text
        for i in range(place, place + count):  # an entry that was cut off may have been here
            self.doubles[i] = 0
        self.integers[1] = 8 * (place + count)  # from here on it can be seen
        self.places[key] = place
        return place

    def add(self, key, amount):
        with self.lock:
            self.doubles[self.place(key, 1)] += amount

    def set(self, key, value):
        with self.lock:
            self.doubles[self.place(key, 1)] = value

    def observe(self, key, count, index, value):
        """For a histogram: one more in its bucket `index`, and `value` to the sum, which is the last of `count`."""
        with self.lock:
            place = self.place(key, count)
            self.doubles[place + index] += 1
            self.doubles[place + count - 1] += value

    def read(self):
        """{key: list of values}."""
        return {key: self.doubles[place:place + count].tolist() for key, place, count in self.entries()}

    def zero(self, is_wanted):
        """Set the values of the keys for which is_wanted(key) to 0."""
        for key, place, count in self.entries():
            if is_wanted(key):
                for i in range(place, place + count):
                    self.doubles[i] = 0


def private():
    region = Region(memoryview(bytearray(REGION_BYTES)))
    region.claim()
    return region


own = private()  # what this process counts; its own alone without Gunicorn
regions = [own]  # what all count


def share(workers):
    """In the master, before it forks: room for the master and `workers` at one time."""
    global own, regions
    memory = memoryview(mmap.mmap(-1, (1 + workers) * REGION_BYTES))
    regions = [Region(memory[i * REGION_BYTES:(i + 1) * REGION_BYTES]) for i in range(1 + workers)]
    own = regions[0]
    own.claim()


def free_region(taken):
    """The number of a worker's region that is not among `taken`; None when there is no more room."""
    return min(set(range(1, len(regions))) - set(taken), default=None)


def claim(number):
    """In a new worker: count in this region from now on; with None, where nobody reads it."""
    global own
    if number is None:
        own = private()
        return
    own = regions[number]
    own.claim()
