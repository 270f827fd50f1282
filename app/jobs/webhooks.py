"""Callbacks: POSTs that say how a job has ended, signed as https://www.standardwebhooks.com describes, repeated until
the receiver accepts one. Its functions block: call them in native threads."""
import asyncio
import base64
import collections
import functools
import hashlib
import hmac
import json
import logging
import random
import re
import time
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from email.utils import parsedate_to_datetime

from sqlalchemy import or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from app.data.schema import deliveries
from app.errors import ServiceError
from app.jobs.answers import job_body
from app.jobs.store import clock
from app.outbound import addresses, http
from app.outbound.event_loop import loop
from app.server import counters

WITHIN_S = 10        # for one attempt
LEASE_S = 60         # after which another process takes over what one has claimed
AT_ONCE = 64         # places per process
AT_ONCE_PER_HOST = 4  # of one owner's
AT_ONCE_BYTES = 256 * 2**20
SLOW_MS = 2000       # of a host's last attempt, beyond which it shares its owner's places for slow ones
MOST_SLOW = 256      # hosts that are remembered
LOOK_EVERY_S = 0.5   # for what is due, while others are under way
DELAYS_S = (5, 30, 120, 600, 3600, 21_600)  # between attempts
JITTER = 0.2         # of a delay, so that what failed together does not come back together
GONE = 410           # the status of a receiver that wants no more messages

log = logging.getLogger(__name__)


# --- the URL ---

def check_callback(url, optional):
    """Raises ServiceError INVALID_PARAMETER for a callback_url that may not be called. Names are resolved with each
    attempt, not here."""
    if optional.callback_secret is None:
        raise ServiceError(400, "INVALID_PARAMETER", "callback_url needs a service with CALLBACK_SECRET set")
    try:
        addresses.check_url(url, optional.callback_urls, optional.private_networks)
    except addresses.NotAllowed as e:
        where = "that CALLBACK_URLS allows" if optional.callback_urls else "to a public host on its default port"
        raise ServiceError(400, "INVALID_PARAMETER", f"callback_url must be an http or https URL {where}") from e


# --- one attempt ---

def message(delivery_id, job):
    """The body of a callback, as bytes. job: its row, whose result is not parsed, as it may be large."""
    body = job_body({name: value for name, value in job.items() if name != "result_json"}, [])
    head = json.dumps({"event": f"job.{job['state']}", "id": delivery_id})
    return f'{head[:-1]}, "job": {json.dumps(body)[:-1]}, "result": {job["result_json"] or "null"}}}}}'.encode()


async def attempt(row, body, optional):
    """Send a message once. row: of `deliveries`; body: of `message`.

    Returns ({"at": Unix seconds, "status": the answer's or None, "error": why it does not count, or None, "ms"},
    the seconds after which the receiver wants the next one, or 0).
    """
    if optional.tracing:
        from app.tracing import spans
        spans.continue_here(row["trace_json"])
    at, started = time.time(), time.monotonic()
    status, error, retry_after_s = None, None, 0
    try:
        target = addresses.check_url(row["url"], optional.callback_urls, optional.private_networks)
        headers = signed(optional.callback_secret, row["id"], int(at), body)
        status, answered = await client(optional.private_networks, optional.tracing).post(
            target, body, headers, WITHIN_S)
        retry_after_s = seconds_of(answered.get("Retry-After", ""), at)
        if 300 <= status < 400:
            error = "redirects are not followed"
        elif status == GONE:
            error = "the receiver wants no more messages"
    except addresses.NotAllowed:
        error = "the URL or its address is not allowed"
    except http.RequestFailed as e:
        error = str(e)
    except TimeoutError:
        error = f"no answer within {WITHIN_S} s"
    return {"at": at, "status": status, "error": error,
            "ms": round((time.monotonic() - started) * 1000)}, retry_after_s


@functools.cache
def client(private_networks, is_traced):
    return http.Client(private_networks, keeps_connections=False, is_traced=is_traced)


def signed(secret, message_id, timestamp, body):
    """The headers of a message. secret: CALLBACK_SECRET; timestamp: whole Unix seconds; body: bytes."""
    mac = hmac.new(key_of(secret), f"{message_id}.{timestamp}.".encode(), hashlib.sha256)
    mac.update(body)
    return {"Content-Type": "application/json", "Webhook-Id": message_id, "Webhook-Timestamp": str(timestamp),
            "Webhook-Signature": f"v1,{base64.b64encode(mac.digest()).decode()}"}


def key_of(secret):
    """The key in a secret: base64 after whsec_, as libraries for such webhooks write it, or else its characters."""
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    return secret.encode()


def has_succeeded(made):
    return made["status"] is not None and 200 <= made["status"] < 300


def seconds_of(retry_after, now):
    """The seconds in a header Retry-After, which may also be a date; 0 if it cannot be understood."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after, re.A):
        return int(retry_after)
    try:
        return max(0, parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, OverflowError):
        return 0


def next_delay(attempts, retry_after_s=0):
    """Seconds from the last of so many failed attempts to the next one, no fewer than the receiver asks for, within
    reason; None: there will be none."""
    if attempts > len(DELAYS_S):
        return None
    return max(DELAYS_S[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER),
               min(retry_after_s, DELAYS_S[-1]) * random.uniform(1, 1 + JITTER))


# --- all that are due ---

class Places:
    """The places of one process, for the messages under way. They are divided between lanes: of each owner the hosts
    that are quick, and those that are slow. A lane gets another place, and more bytes, only while it has no more than
    are free: alone it has half of them, and however many hosts it names, there is room for the next one."""

    def __init__(self, slow, rows=()):
        """slow: of `note`; rows: those under way."""
        self.slow = slow
        self.lanes, self.hosts, self.bytes = (collections.Counter() for _ in range(3))
        for row in rows:
            self.add(row)

    def take(self, row):
        """Whether the row gets a place, in the lane that it keeps."""
        row["lane"] = self.lane(row)
        if self.is_full(row["lane"], row["bytes"]) or self.hosts[row["owner"], row["host"]] >= AT_ONCE_PER_HOST:
            return False
        self.add(row)
        return True

    def add(self, row):
        self.lanes[row["lane"]] += 1
        self.bytes[row["lane"]] += row["bytes"]
        self.hosts[row["owner"], row["host"]] += 1

    def lane(self, row):
        return row["owner"], row["host"] in self.slow

    def free(self):
        return AT_ONCE - self.lanes.total()

    def is_full(self, lane, size=0):
        return self.lanes[lane] >= self.free() or self.bytes[lane] + size > AT_ONCE_BYTES - self.bytes.total()

    def conditions(self, refused):
        """Of rows that can have a place. refused: further lanes that cannot."""
        of, conditions = deliveries.c, []
        full = refused | set(filter(self.is_full, self.lanes))
        for is_slow, are_others in ((True, of.host.not_in(self.slow)), (False, of.host.in_(self.slow))):
            owners = [owner for owner, slow in full if slow is is_slow]
            if owners:
                conditions.append(or_(of.owner.not_in(owners), are_others))
        return conditions + [or_(of.owner != owner, of.host != host) for (owner, host), number in self.hosts.items()
                             if number >= AT_ONCE_PER_HOST]


def note(slow, host, ms):
    """Remember in slow, {host: True}, those whose last attempt took long, but not all that there have ever been."""
    slow.pop(host, None)
    if ms > SLOW_MS:
        slow[host] = True
        if len(slow) > MOST_SLOW:
            del slow[next(iter(slow))]


def run_due(database, optional, message_of, slow):
    """Make an attempt for each delivery that is due, side by side, and record each when it has ended; what becomes due
    meanwhile is begun too. Returns how many were due, once nothing is under way; any number of processes may do it.
    message_of(row): a delivery's message, or None if its job is gone; slow: of `note`.

    A delivery is claimed just before it is sent, and recorded afterwards: if a process dies between, another one sends
    it when the lease ends, and the receiver may see it twice.
    """
    under_way, number = {}, 0  # under_way: {future: row}
    try:
        while True:
            for row in claim(database, Places(slow, under_way.values())):
                number += 1
                body = message_of(row)
                if body:
                    under_way[asyncio.run_coroutine_threadsafe(attempt(row, body, optional), loop())] = row
                else:
                    record(database, row, None)
                del body
            if not under_way:
                return number
            for future in wait(under_way, LOOK_EVERY_S, FIRST_COMPLETED).done:
                row, (made, retry_after_s) = under_way.pop(future), future.result()
                note(slow, row["host"], made["ms"])
                record(database, row, made, retry_after_s)
    finally:  # of a failure: most others that are under way can still be recorded
        for future, row in under_way.items():
            with suppress(SQLAlchemyError, OSError):
                record(database, row, *future.result())


def claim(database, places):
    """Rows of deliveries that are due, which the caller sends now; each has taken one of the places."""
    claimed, refused = [], set()
    if not places.free():
        return claimed
    with database.read() as connection:  # nearly always there is none, and no lock is needed to see that
        if connection.execute(due(clock(connection), places.conditions(refused), 1)).first() is None:
            return claimed
    with database.begin() as connection:
        now = clock(connection)
        while places.free():
            some = due(now, places.conditions(refused), places.free()).with_for_update(skip_locked=True)
            rows, ids = [dict(row) for row in connection.execute(some).mappings()], []
            if not rows:
                break
            for row in rows:
                if places.take(row):
                    ids.append(row["id"])
                    claimed.append(row)
                elif places.is_full(places.lane(row), row["bytes"]):
                    refused.add(places.lane(row))
            connection.execute(update(deliveries).where(deliveries.c.id.in_(ids)).values(next_at=now + LEASE_S))
    return claimed


def due(now, conditions, limit):
    """Selects the rows that have been due for longest."""
    return (select(*(deliveries.c[name] for name in ("id", "job_id", "owner", "url", "host", "bytes", "trace_json")))
            .where(deliveries.c.state == "pending", deliveries.c.next_at <= now, *conditions)
            .order_by(deliveries.c.next_at).limit(limit))


def record(database, row, made, retry_after_s=0):
    """made, retry_after_s: of `attempt`; None if the job is gone."""
    is_row = deliveries.c.id == row["id"]
    with database.begin() as connection:
        found = connection.execute(select(deliveries).where(is_row).with_for_update()).mappings().first()
        if found is None or found["state"] != "pending":  # removed, or delivered by the process that took over
            return
        attempts = json.loads(found["attempts_json"]) + ([made] if made else [])
        is_last = made is None or made["status"] == GONE
        delay = None if is_last else next_delay(len(attempts), retry_after_s)
        counters.count("webhook_attempts", "delivered" if made and has_succeeded(made) else "failed")
        if made and has_succeeded(made):
            values = {"state": "delivered", "next_at": None}
        elif delay is None:
            log.warning("the callback %s has failed for good", row["id"])
            values = {"state": "failed", "next_at": None}
        else:
            values = {"next_at": clock(connection) + delay}
        connection.execute(update(deliveries).where(is_row).values(attempts_json=json.dumps(attempts), **values))
