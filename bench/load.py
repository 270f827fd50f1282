"""A load generator that checks every answer: one thread, keep-alive connections, prebuilt requests.

    python -m bench.load < specification.json > result.json

Specification (JSON object):
    port, path       where to POST, on 127.0.0.1
    files            paths of pictures, sent in turn as multipart/form-data in the field `file`
    expected         [class_id, probability] of the best prediction for each file
    tolerance        how far that probability may be off; null checks class_id alone
    connections      closed loop: this many connections, each of which sends as soon as it has its answer; or
    rate             open loop: requests per second with exponential gaps (seeded), however slow the answers are;
                     latency counts from when the request was due
    even             open loop: true for gaps of equal length
    warm_s, seconds  what is answered (closed) or due (open) in the first warm_s is not counted; the next `seconds` are
"""
import collections
import json
import math
import random
import selectors
import socket
import sys
import time

BOUNDARY = b"----------------------------3f9c1d7a52e84b60"
DRAIN_S = 15            # how long to wait for answers after the end of the load
MOST_CONNECTIONS = 512  # open loop: further requests wait in the client, while their latency counts
PIECE = 1 << 18


def build_request(port, path, data):
    body = (b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="file"; filename="picture.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n" + data + b"\r\n--" + BOUNDARY + b"--\r\n")
    return (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def percentiles(values_s):
    """{p50, p95, p99, mean, max} in milliseconds, or None if there are no values."""
    if not values_s:
        return None
    ordered = sorted(values_s)
    ranks = {f"p{p}": 1000 * ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 95, 99)}
    return {**ranks, "mean": 1000 * sum(ordered) / len(ordered), "max": 1000 * ordered[-1]}


class Connection:
    """One request at a time. step() advances it, and returns (status, body) once the answer is complete. Raises OSError
    if the connection fails or the answer is not HTTP with a Content-Length."""

    def __init__(self, port, selector):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector, self.events = selector, selectors.EVENT_READ
        selector.register(self.socket, self.events, self)
        self.request = None  # (index of the file, the moment that counts as its start)
        self.closing = False

    def send(self, request, data):
        self.request, self.unsent, self.answer, self.total = request, memoryview(data), bytearray(), None
        self.write()

    def write(self):
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent[:PIECE]):]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):  # refused before all was sent: the answer may be there
            self.unsent, self.closing = memoryview(b""), True
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0)
        if events != self.events:
            self.events = events
            self.selector.modify(self.socket, events, self)

    def step(self, events):
        if events & selectors.EVENT_WRITE and self.unsent:
            self.write()
        if not events & selectors.EVENT_READ:
            return None
        piece = self.socket.recv(65536)
        if not piece:
            raise ConnectionResetError("closed before the answer was complete")
        self.answer += piece
        if self.total is None:
            end = self.answer.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = bytes(self.answer[:end]).lower().split(b"\r\n")
            fields = dict(line.split(b":", 1) for line in head[1:])
            try:
                self.status = int(head[0][9:12])
                self.body_at, self.total = end + 4, end + 4 + int(fields[b"content-length"])
            except (KeyError, ValueError) as e:
                raise OSError("not an HTTP answer with a Content-Length") from e
            self.retry_after = fields.get(b"retry-after")
            self.closing |= fields.get(b"connection", b"").strip() == b"close" or bool(self.unsent)
        if len(self.answer) < self.total:
            return None
        return self.status, bytes(self.answer[self.body_at:self.total])

    def close(self):
        self.selector.unregister(self.socket)
        self.socket.close()


class Tally:
    """Counts and checks the answers within the counted window."""

    def __init__(self, expected, tolerance):
        self.expected, self.tolerance = expected, tolerance
        self.statuses, self.lost, self.unanswered, self.right, self.wrong = collections.Counter(), 0, 0, 0, 0
        self.bare_refusals = 0  # 503 without Retry-After
        self.latencies, self.refusals, self.finished = [], [], []
        self.off, self.stages, self.staged = 0.0, collections.Counter(), 0

    def add(self, index, status, body, latency_s, now, counted, retry_after=None):
        """counted: whether the request is reported; in an open loop, one that was due before the window and is answered
        in it is not, but as it is work done, it counts towards the throughput."""
        right = status == 200 and self.check(index, body)
        if right:
            self.finished.append(now)
        if not counted:
            return
        self.statuses[status] += 1
        self.bare_refusals += status == 503 and retry_after is None
        if status != 200:
            self.refusals.append(latency_s)
        elif right:
            self.right += 1
            self.latencies.append(latency_s)
        else:
            self.wrong += 1

    def check(self, index, body):
        try:
            answer = json.loads(body)
            best = answer["predictions"][0]
            class_id, probability = best["class_id"], best["confidence"]
        except (ValueError, KeyError, IndexError, TypeError):
            return False
        for stage, ms in answer.get("metadata", {}).get("timings_ms", {}).items():
            self.stages[stage] += ms
        self.staged += 1
        if class_id != self.expected[index][0]:
            return False
        off = abs(probability - self.expected[index][1])
        self.off = max(self.off, off)
        return self.tolerance is None or off <= self.tolerance


def answers_right(spec):
    """Send the first file of a specification once. Returns whether the answer is right, or any at all if `expected` is
    null; raises OSError."""
    with open(spec["files"][0], "rb") as f:
        request = build_request(spec["port"], spec["path"], f.read())
    with selectors.DefaultSelector() as selector:
        connection = Connection(spec["port"], selector)
        try:
            connection.send((0, 0), request)
            done = None
            while done is None:
                ready = selector.select(DRAIN_S)
                if not ready:
                    raise TimeoutError(f"no answer within {DRAIN_S} s")
                done = connection.step(ready[0][1])
            status, body = done
            return status == 200 and (spec["expected"] is None
                                      or Tally(spec["expected"], spec["tolerance"]).check(0, body))
        finally:
            connection.close()


def run(spec):
    """Run the load of a specification against the service. Returns the result as a dictionary."""
    requests = []
    for path in spec["files"]:
        with open(path, "rb") as f:
            requests.append(build_request(spec["port"], spec["path"], f.read()))
    tally = Tally(spec["expected"], spec["tolerance"])
    rate, randomness = spec.get("rate"), random.Random(0)
    selector = selectors.DefaultSelector()
    idle, busy, due, sent = [], set(), collections.deque(), 0
    cpu_started, started = time.process_time(), time.perf_counter()
    count_from = started + spec["warm_s"]
    end = count_from + spec["seconds"]
    next_due = started
    opened = 0

    def counted(start, now):
        return count_from <= start < end if rate else count_from <= now < end

    def dispatch(start):
        nonlocal sent, opened
        index = sent % len(requests)
        sent += 1
        try:
            connection = idle.pop() if idle else Connection(spec["port"], selector)
        except OSError:
            tally.lost += counted(start, time.perf_counter())
            time.sleep(0.01)  # nobody listens: retry, but not in a tight loop
            return
        opened = max(opened, len(busy) + 1)
        busy.add(connection)
        connection.send((index, start), requests[index])

    while True:
        now = time.perf_counter()
        if now < end:
            if rate:
                while next_due <= now:
                    due.append(next_due)
                    next_due += 1 / rate if spec.get("even") else randomness.expovariate(rate)
                while due and len(busy) < MOST_CONNECTIONS:
                    dispatch(due.popleft())
                wait_s = max(0.0, min(next_due, end) - time.perf_counter())
            else:
                for _ in range(spec["connections"] - len(busy)):
                    dispatch(time.perf_counter())
                wait_s = max(0.0, end - time.perf_counter()) if len(busy) == spec["connections"] else 0
        else:
            tally.unanswered += sum(counted(start, now) for start in due)
            due.clear()
            if not busy or now > end + DRAIN_S:
                break
            wait_s = end + DRAIN_S - now
        for key, events in selector.select(wait_s):
            connection = key.data
            if connection.request is None:  # an idle connection that the service closes
                idle.remove(connection)
                connection.close()
                continue
            index, start = connection.request
            try:
                done = connection.step(events)
                if done is None:
                    continue
                now = time.perf_counter()
                tally.add(index, *done, now - start, now, counted(start, now), connection.retry_after)
            except OSError:
                connection.closing = True
                tally.lost += counted(start, time.perf_counter())
            busy.remove(connection)
            connection.request = None
            if connection.closing:
                connection.close()
            else:
                idle.append(connection)
    tally.unanswered += sum(counted(c.request[1], 0) if rate else 1 for c in busy)
    cpu_share = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    for connection in [*idle, *busy]:
        connection.close()
    return {**result(spec, tally, cpu_share, opened, count_from, end), "drain_s": now - end}


def result(spec, tally, cpu_share, opened, count_from, end):
    finished = [t for t in tally.finished if count_from <= t < end]
    if spec.get("rate"):
        throughput = len(finished) / spec["seconds"]
    else:  # between the first and the last answer: a short run is not rounded to whole answers in a window
        span = max(finished, default=0) - min(finished, default=0)
        throughput = (len(finished) - 1) / span if span else 0.0
    return {"throughput": throughput, "right": tally.right, "wrong": tally.wrong,
            "statuses": {str(k): v for k, v in sorted(tally.statuses.items())},
            "non_200": sum(v for k, v in tally.statuses.items() if k != 200) + tally.lost + tally.unanswered,
            "lost": tally.lost, "unanswered": tally.unanswered, "bare_refusals": tally.bare_refusals,
            "latency_ms": percentiles(tally.latencies), "refused_ms": percentiles(tally.refusals),
            "probability_off": tally.off, "connections": opened, "client_cpu": cpu_share,
            "stages_ms": {k: v / tally.staged for k, v in tally.stages.items()} if tally.staged else {}}


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
