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

from sqlalchemy import and_, select, update

from app.data.schema import deliveries
from app.errors import ServiceError
from app.outbound import addresses, http
from app.outbound.event_loop import run
from app.server import counters

WITHIN_S = 10        # for one attempt
LEASE_S = 60         # after which another process takes over what one has claimed
AT_ONCE = 32
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

    Returns {"at": Unix seconds, "status": the answer's or None, "error": why there was none, or None, "ms"}.
    """
    return run(attempt(row, job_body, optional))


async def attempt(row, job_body, optional):
    at, started = time.time(), time.monotonic()
    status = error = None
    body = json.dumps({"event": f"job.{job_body['state']}", "id": row["id"], "job": job_body}).encode()
    try:
        target = addresses.check_url(row["url"], optional.callback_urls, optional.private_networks)
        headers = signed(optional.callback_secret, row["id"], int(at), body)
        status = await client(optional.private_networks).post(target, body, headers, WITHIN_S)
    except addresses.NotAllowed:
        error = "the URL or its address is not allowed"
    except http.RequestFailed as e:
        error = str(e)
    except TimeoutError:
        error = f"no answer within {WITHIN_S} s"
    return {"at": at, "status": status, "error": error, "ms": round((time.monotonic() - started) * 1000)}


@functools.cache
def client(private_networks):
    return http.Client(private_networks)


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
    """Make an attempt for each delivery that is due, side by side, and record it. Takes up to WITHIN_S; any number of
    processes may do it. job_body_of(job's id): its body, or None if it is gone. Returns how many were due.

    A delivery is claimed before it is sent, and recorded afterwards: if a process dies between, another one sends it
    when the lease ends, and the receiver may see it twice.
    """
    claimed = claim(database)
    if claimed:
        bodies = [job_body_of(row["job_id"]) for row in claimed]

        async def attempts():
            return await asyncio.gather(*(attempt_if_there(row, body, optional)
                                          for row, body in zip(claimed, bodies, strict=True)))
        for row, made in zip(claimed, run(attempts()), strict=True):
            record(database, row, made)
    return len(claimed)


async def attempt_if_there(row, body, optional):
    return await attempt(row, body, optional) if body else None


def claim(database):
    now = time.time()
    is_due = and_(deliveries.c.state == "pending", deliveries.c.next_at <= now)
    with database.read() as connection:  # nearly always there is none, and no lock is needed to see that
        if connection.execute(select(deliveries.c.id).where(is_due).limit(1)).first() is None:
            return []
    with database.begin() as connection:
        due = select(deliveries).where(is_due).order_by(deliveries.c.next_at).limit(AT_ONCE)
        rows = [dict(row) for row in connection.execute(due.with_for_update(skip_locked=True)).mappings()]
        connection.execute(update(deliveries).where(deliveries.c.id.in_([row["id"] for row in rows]))
                           .values(next_at=now + LEASE_S))
    return rows


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
