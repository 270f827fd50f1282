"""Callbacks: POSTs that say how a job has ended, signed as https://www.standardwebhooks.com describes, repeated until
the receiver accepts one. Its functions block: call them in native threads."""
import asyncio
import base64
import functools
import hashlib
import hmac
import json
import logging
import random
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress

from sqlalchemy import and_, select, update
from sqlalchemy.exc import SQLAlchemyError

from app.data.schema import deliveries
from app.errors import ServiceError
from app.outbound import addresses, http
from app.outbound.event_loop import loop, run
from app.server import counters

WITHIN_S = 10        # for one attempt
LEASE_S = 60         # after which another process takes over what one has claimed
AT_ONCE = 32         # per process
AT_ONCE_PER_HOST = 4  # so that one that does not answer leaves room for the others
LOOK_EVERY_S = 0.5   # for what is due, while others are under way
DELAYS_S = (5, 30, 120, 600, 3600, 21_600)  # between attempts
JITTER = 0.2         # of a delay, so that what failed together does not come back together

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

def deliver(row, job_body, optional):
    """Make one attempt. row: of `deliveries`; job_body: what GET /jobs/ID answers.

    Returns {"at": Unix seconds, "status": the answer's or None, "error": why it does not count, or None, "ms"}.
    """
    return run(attempt(row, job_body, optional))


async def attempt(row, job_body, optional):
    if optional.tracing:
        from app.tracing import spans
        spans.continue_here(row["trace_json"])
    at, started = time.time(), time.monotonic()
    status = error = None
    body = json.dumps({"event": f"job.{job_body['state']}", "id": row["id"], "job": job_body}).encode()
    try:
        target = addresses.check_url(row["url"], optional.callback_urls, optional.private_networks)
        headers = signed(optional.callback_secret, row["id"], int(at), body)
        status = await client(optional.private_networks, optional.tracing).post(target, body, headers, WITHIN_S)
        if 300 <= status < 400:
            error = "redirects are not followed"
    except addresses.NotAllowed:
        error = "the URL or its address is not allowed"
    except http.RequestFailed as e:
        error = str(e)
    except TimeoutError:
        error = f"no answer within {WITHIN_S} s"
    return {"at": at, "status": status, "error": error, "ms": round((time.monotonic() - started) * 1000)}


@functools.cache
def client(private_networks, is_traced):
    return http.Client(private_networks, keeps_connections=False, is_traced=is_traced)


def signed(secret, message_id, timestamp, body):
    """The headers of a message. secret: CALLBACK_SECRET; timestamp: whole Unix seconds; body: bytes."""
    content = b".".join([message_id.encode(), str(timestamp).encode(), body])
    signature = base64.b64encode(hmac.digest(key_of(secret), content, hashlib.sha256)).decode()
    return {"Content-Type": "application/json", "Webhook-Id": message_id, "Webhook-Timestamp": str(timestamp),
            "Webhook-Signature": f"v1,{signature}"}


def key_of(secret):
    """The key in a secret: base64 after whsec_, as libraries for such webhooks write it, or else its characters."""
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    return secret.encode()


def has_succeeded(made):
    return made["status"] is not None and 200 <= made["status"] < 300


def next_delay(attempts):
    """Seconds from the last of so many failed attempts to the next one; None: there will be none."""
    if attempts > len(DELAYS_S):
        return None
    return DELAYS_S[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)


# --- all that are due ---

def run_due(database, optional, job_body_of):
    """Make an attempt for each delivery that is due, side by side, and record each when it has ended; what becomes due
    meanwhile is begun too. Returns how many were due, once nothing is under way; any number of processes may do it.
    job_body_of(job's id): its body, or None if it is gone.

    A delivery is claimed just before it is sent, and recorded afterwards: if a process dies between, another one sends
    it when the lease ends, and the receiver may see it twice.
    """
    under_way, number = {}, 0  # {future: row}
    try:
        while True:
            for row in claim(database, Counter(row["host"] for row in under_way.values())):
                number += 1
                body = job_body_of(row["job_id"])
                if body:
                    under_way[asyncio.run_coroutine_threadsafe(attempt(row, body, optional), loop())] = row
                else:
                    record(database, row, None)
            if not under_way:
                return number
            for future in wait(under_way, LOOK_EVERY_S, FIRST_COMPLETED).done:
                record(database, under_way.pop(future), future.result())
    finally:  # of a failure: most others that are under way can still be recorded
        for future, row in under_way.items():
            with suppress(SQLAlchemyError, OSError):
                record(database, row, future.result())


def claim(database, under_way):
    """Rows of deliveries that are due, which the caller sends now. under_way: {host: number}, to which it adds."""
    claimed, now = [], time.time()
    if under_way.total() >= AT_ONCE:
        return claimed
    with database.read() as connection:  # nearly always there is none, and no lock is needed to see that
        if connection.execute(due(under_way, now, 1)).first() is None:
            return claimed
    with database.begin() as connection:
        while room := AT_ONCE - under_way.total():
            some, ids = due(under_way, now, room).with_for_update(skip_locked=True), []
            rows = [dict(row) for row in connection.execute(some).mappings()]
            if not rows:
                break
            for row in rows:
                if under_way[row["host"]] < AT_ONCE_PER_HOST:
                    under_way[row["host"]] += 1
                    ids.append(row["id"])
                    claimed.append(row)
            connection.execute(update(deliveries).where(deliveries.c.id.in_(ids)).values(next_at=now + LEASE_S))
    return claimed


def due(under_way, now, limit):
    """Selects the rows that have been due for longest, without those of hosts at which enough is under way."""
    is_due = and_(deliveries.c.state == "pending", deliveries.c.next_at <= now)
    full = [host for host, number in under_way.items() if number >= AT_ONCE_PER_HOST]
    return (select(*(deliveries.c[name] for name in ("id", "job_id", "url", "host", "trace_json")))
            .where(is_due, deliveries.c.host.not_in(full)).order_by(deliveries.c.next_at).limit(limit))


def record(database, row, made):
    """made: the attempt, or None if the job is gone."""
    is_row = deliveries.c.id == row["id"]
    with database.begin() as connection:
        found = connection.execute(select(deliveries).where(is_row).with_for_update()).mappings().first()
        if found is None or found["state"] != "pending":  # removed, or delivered by the process that took over
            return
        attempts = json.loads(found["attempts_json"]) + ([made] if made else [])
        delay = next_delay(len(attempts)) if made else None
        counters.count("webhook_attempts", "delivered" if made and has_succeeded(made) else "failed")
        if made and has_succeeded(made):
            values = {"state": "delivered", "next_at": None}
        elif delay is None:
            log.warning("the callback %s has failed for good", row["id"])
            values = {"state": "failed", "next_at": None}
        else:
            values = {"next_at": time.time() + delay}
        connection.execute(update(deliveries).where(is_row).values(attempts_json=json.dumps(attempts), **values))
