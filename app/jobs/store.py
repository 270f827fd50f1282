"""Jobs in the database, which alone says what state a job is in. A message of the broker says no more than that there
may be something to do, so that a lost one is sent again and a repeated one does nothing.

    queued ──claim──> running ──finish──> succeeded, failed, cancelled
      ^                  │
      └─── worker lost ──┘      at the third loss: failed with WORKER_LOST

Every step is one conditional UPDATE, so that of several processes that try it, one succeeds. All functions block.
"""
import contextlib
import json
import time
import uuid

from sqlalchemy import (
    and_,
    delete,
    exists,
    func,
    insert,
    not_,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from app.config import StartError
from app.data.database import STATEMENT_WITHIN_S
from app.data.schema import deliveries, jobs
from app.jobs import shares
from app.jobs.shares import QUEUED, is_queued, is_running, is_unfinished

LOSSES = 3                 # of a worker in the middle of a job, after which it fails
LEASE_S = 10               # a worker that has not renewed its lease for so long counts as lost
RENEW_EVERY_S = 1          # which is also when a worker sees that its job has been cancelled
MESSAGE_LOST_AFTER_S = 10  # of a queued job, if the broker's queue is empty
SEND_AGAIN_AFTER_S = 300   # if it is not
AT_ONCE = 100              # jobs that one sweep changes at most, of each kind
REMOVE_FOR_S = 0.2         # until others may write to SQLite: it takes 0.1 s to remove some large results

STORAGE_AWAY_AT_MOST_S = 3600  # since the job was accepted
STORAGE_AWAY = {"error": "STORAGE_UNAVAILABLE", "message": "The job's input could not be read for an hour."}

AWAY = (SQLAlchemyError, OSError, StartError)  # what a database that is away raises, or one with newer tables

LISTED = [column for column in jobs.columns if column.name not in ("result_json", "inputs_json", "options_json",
                                                                 "trace_json")]

AGAIN = {"state": "queued", "lease_until": None, "done": 0}  # its number stays: it cannot end the next one


class Uncertain(OSError):
    """The database went away while it was to commit: nobody knows whether it did."""


class Lost(Exception):
    """The job is no longer this worker's: its lease ran out, and another may have it now."""


class Store:
    def __init__(self, database, optional):
        self.database, self.optional = database, optional

    # --- for the API ---

    @contextlib.contextmanager
    def committed(self):
        """A connection in a transaction. Raises Uncertain if the database went away in its commit."""
        is_complete = False
        try:
            with self.database.begin() as connection:
                yield connection
                is_complete = True
        except AWAY as e:
            if is_complete:
                raise Uncertain(first_line(e)) from e
            raise

    def find_idempotent(self, owner, key):
        """The row of the job that this client has sent with this Idempotency-Key, or None."""
        with self.database.read() as connection:
            return row_of(connection.execute(select(jobs).where(jobs.c.owner == owner, jobs.c.idempotency_key == key)))

    def add(self, row):
        """(row as stored, True), or, if another request with the same key came first, (its row, False). The caller
        publishes the job next. Raises ServiceError OVERLOADED if there are too many unfinished jobs; Uncertain."""
        try:
            with self.committed() as connection:
                shares.add_alone(connection, row["owner"])
                after = shares.check_room(connection, self.optional, row["owner"], row["input_bytes"])
                turn = max(shares.turn_now(connection, row["queue"]), after.get(row["queue"], 0))
                now = clock(connection)
                stored = connection.execute(insert(jobs).values(
                    **row, turn=turn, created_at=now, dispatched_at=now, dispatches=1, state="queued", attempt=0,
                    losses=0, done=0, cancel_requested=False).returning(*jobs.columns)).mappings().one()
                return dict(stored), True
        except IntegrityError:
            earlier = row["idempotency_key"] and self.find_idempotent(row["owner"], row["idempotency_key"])
            if not earlier:
                raise
            return earlier, False

    def check(self, owner, size):
        """Raises ServiceError OVERLOADED if a job with inputs of this size could not be added now."""
        with self.database.read() as connection:
            shares.check_room(connection, self.optional, owner, size)

    def rely_on(self, job_id):
        """Whether the job is still there, and then stays: a client that has sent it again is about to be told of it."""
        with self.database.begin() as connection:
            return bool(connection.execute(update(jobs).where(jobs.c.id == job_id)
                                           .values(dispatches=jobs.c.dispatches + 1)).rowcount)

    def withdraw(self, job_id):
        """Forget a job that could not be published. Returns whether it is gone: it stays if someone relies on it, if it
        was sent again or begun meanwhile, or if the database is away too. Raises Uncertain."""
        is_ours = [jobs.c.id == job_id, is_queued, jobs.c.dispatches == 1]
        try:
            with self.committed() as connection:
                return bool(connection.execute(delete(jobs).where(*is_ours)).rowcount)
        except Uncertain:
            raise
        except AWAY:
            return False

    def get(self, job_id, owner):
        """The row, or None. owner: whose it must be; None: anybody's."""
        with self.database.read() as connection:
            return row_of(connection.execute(select(jobs).where(*mine(job_id, owner))))

    def deliveries(self, job_id):
        with self.database.read() as connection:
            found = connection.execute(select(deliveries).where(deliveries.c.job_id == job_id)
                                       .order_by(deliveries.c.created_at))
            return [dict(row) for row in found.mappings()]

    def listed(self, owner, states=(), model=None, since=None, until=None, after=None, limit=20):
        """Rows without their results, newest first. after: (created_at, id) of the last one that has been seen."""
        where = [] if owner is None else [jobs.c.owner == owner]
        if model is not None:
            where.append(jobs.c.model == model)
        if since is not None:
            where.append(jobs.c.created_at >= since)
        if until is not None:
            where.append(jobs.c.created_at < until)
        if after is not None:
            where.append(tuple_(jobs.c.created_at, jobs.c.id) < tuple_(*after))
        # The newest of each state, and of those the newest: read in order from an index, however many there are.
        each = [newest(jobs, [*where, jobs.c.state == state], limit) for state in set(states)]
        if not each:
            query = newest(jobs, where, limit)
        elif len(each) == 1:
            query = each[0]
        else:
            query = newest(union_all(*(select(one.subquery()) for one in each)).subquery(), [], limit)
        with self.database.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def cancel(self, job_id, owner):
        """The row afterwards, or None. A queued job is cancelled, a running one is asked to stop."""
        with self.database.begin(STATEMENT_WITHIN_S) as connection:
            # The lock, for PostgreSQL: its state does not change between the steps.
            found = connection.execute(select(jobs.c.state).where(*mine(job_id, owner)).with_for_update()).scalar()
            if found == "queued":
                self.end(connection, job_id, "cancelled", [is_queued])
            elif found == "running":
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
            return row_of(connection.execute(select(jobs).where(*mine(job_id, owner))))

    # --- for workers ---

    def claim(self, queue, models, worker):
        """Begin an attempt at the job of this queue whose turn it is: its row, or None if there is nothing to do.
        models: those that the worker has, "NAME" or "NAME@VERSION"; worker: "INSTANCE/process ID"."""
        # Of two workers that choose at the same time, PostgreSQL gives one the next job; SQLite lets it wait.
        first = (select(jobs.c.id).where(jobs.c.state == QUEUED, jobs.c.queue == queue, is_of(models))
                 .order_by(jobs.c.turn, jobs.c.created_at).limit(1).with_for_update(skip_locked=True))
        with self.database.begin() as connection:
            now = clock(connection)
            return row_of(connection.execute(
                update(jobs).where(jobs.c.id == first.scalar_subquery(), is_queued).values(
                    state="running", attempt=jobs.c.attempt + 1, worker=worker, lease_until=now + LEASE_S,
                    started_at=now, done=0).returning(*jobs.columns)))

    def left_to_others(self, queue, models):
        """The model of a queued job that a worker with these models cannot run, or None."""
        with self.database.read() as connection:
            found = connection.execute(select(jobs.c.model, jobs.c.version).where(
                jobs.c.state == QUEUED, jobs.c.queue == queue, not_(is_of(models))).limit(1)).first()
        return found and label(*found)

    def renew(self, job_id, attempt, done):
        """Say that the attempt goes on. Returns whether it should stop, as the client has cancelled it. Raises Lost."""
        with self.database.begin() as connection:
            found = connection.execute(
                update(jobs).where(*running(job_id, attempt)).values(
                    lease_until=clock(connection) + LEASE_S, done=done).returning(jobs.c.cancel_requested)).scalar()
        if found is None:
            raise Lost(job_id)
        return found

    def finish(self, job_id, attempt, state, done, result=None, error=None, trace=None):
        """End the attempt; result: JSON types, or their text; error: JSON types; trace: what its webhook
        continues, if not the request's. Raises Lost."""
        with self.database.begin() as connection:
            if not self.end(connection, job_id, state, running(job_id, attempt), trace, done=done,
                            result_json=result if isinstance(result, str) else as_json(result),
                            error_json=as_json(error)):
                raise Lost(job_id)

    def end(self, connection, job_id, state, where, trace=None, **values):
        """Make it final if `where` holds, and order its webhook in the same transaction. Returns whether it did."""
        now = clock(connection)
        found = connection.execute(
            update(jobs).where(jobs.c.id == job_id, *where).values(
                state=state, ended_at=now, expires_at=now + self.optional.jobs_ttl, lease_until=None, **values)
            .returning(jobs.c.callback_url, jobs.c.trace_json, jobs.c.owner)).first()
        if found is not None and found.callback_url:
            connection.execute(insert(deliveries).values(
                id=uuid.uuid4().hex, job_id=job_id, owner=found.owner, url=found.callback_url, state="pending",
                created_at=now, next_at=now, attempts_json="[]", bytes=len(values.get("result_json") or ""),
                trace_json=trace or found.trace_json))
        return found is not None

    def give_back(self, job_id, attempt):
        """End the attempt as if it had not been: the storage is away. Its message is sent again after a while, and all
        that wait now come first. The job fails when that has gone on for too long."""
        with self.database.begin() as connection:
            now, is_mine = clock(connection), running(job_id, attempt)
            if self.end(connection, job_id, "cancelled", [*is_mine, jobs.c.cancel_requested]) or \
                    self.end(connection, job_id, "failed", [*is_mine, jobs.c.created_at < now - STORAGE_AWAY_AT_MOST_S],
                             error_json=json.dumps(STORAGE_AWAY)):
                return
            others = jobs.alias()
            last = select(func.coalesce(func.max(others.c.turn), 0)).where(others.c.state == QUEUED,
                                                                           others.c.queue == jobs.c.queue)
            connection.execute(update(jobs).where(*is_mine).values(**AGAIN, dispatched_at=now,
                                                                   turn=last.scalar_subquery() + 1))

    def give_back_all(self, instance):
        """Queue the jobs of workers that have ended in the middle of them because they were told to. Returns how many.
        """
        where = [is_running, jobs.c.worker.startswith(f"{instance}/", autoescape=True)]
        with self.database.begin() as connection:
            for job_id in list(connection.execute(select(jobs.c.id).where(*where, jobs.c.cancel_requested)).scalars()):
                self.end(connection, job_id, "cancelled", where)
            return connection.execute(update(jobs).where(*where).values(**AGAIN, dispatched_at=None)).rowcount

    # --- for upkeep ---

    def give_up_lost(self, instance=None, is_alive=None, leases_count=lambda now: True):
        """[(id, its new state, who had it)] of jobs whose worker was lost: queued again, or final. instance,
        is_alive(process ID): of the workers that the caller can see, which need no lease to run out. leases_count(now):
        whether leases count, at this time of the database."""
        columns, changed = (jobs.c.id, jobs.c.attempt, jobs.c.losses, jobs.c.worker, jobs.c.started_at,
                            jobs.c.cancel_requested, jobs.c.lease_until), []
        with self.database.read() as connection:
            now = clock(connection)
            by_lease, valid = leases_count(now), (now, now + 2 * LEASE_S)  # beyond that: the clock was put back
            of_mine = jobs.c.worker.startswith(f"{instance}/", autoescape=True) if instance else False
            has_run_out = not_(jobs.c.lease_until.between(*valid)) if by_lease else False
            found = connection.execute(select(*columns).where(
                is_running, or_(has_run_out, of_mine)).limit(AT_ONCE)).all()
        for row in found:
            has_expired = by_lease and not valid[0] <= row.lease_until <= valid[1]
            if not has_expired and is_alive(int(row.worker.rpartition("/")[2])):
                continue
            state, values = after_loss(row, self.optional.job_timeout, valid[1])
            where = [*running(row.id, row.attempt), jobs.c.lease_until == row.lease_until]
            # Where one cannot write at once, others could perhaps not renew their leases, and come first.
            with self.database.begin(RENEW_EVERY_S) as connection:
                if state == "queued":
                    done = connection.execute(update(jobs).where(*where).values(
                        **AGAIN, dispatched_at=None, losses=jobs.c.losses + 1)).rowcount
                else:
                    done = self.end(connection, row.id, state, where, **values)
            if done:
                changed.append((row.id, state, row.worker))
        return changed

    def due(self, waiting):
        """[(id, queue)] of queued jobs whose message seems to be lost, now noted as sent again. waiting: {queue: number
        of messages that the broker has in it}."""
        with self.database.read() as connection:  # nearly always there is none, and no lock is needed to see that
            now, lost = clock(connection), [jobs.c.dispatched_at.is_(None)]
            numbers = {queue: number for (queue, state), (number, _) in shares.backlog(connection).items()
                       if state == "queued"}
            for queue, messages in waiting.items():
                if messages < numbers.get(queue, 0):  # those that there are lead to as many jobs
                    after_s = SEND_AGAIN_AFTER_S if messages else MESSAGE_LOST_AFTER_S
                    lost += [and_(jobs.c.queue == queue, is_old) for is_old in (
                        jobs.c.dispatched_at < now - after_s,
                        jobs.c.dispatched_at > now + after_s)]  # the clock was put back
            ids = [job_id for is_lost in lost for job_id in connection.execute(  # each from its part of an index
                select(jobs.c.id).where(is_queued, is_lost).order_by(jobs.c.dispatched_at).limit(AT_ONCE)).scalars()]
        if not ids:
            return []
        with self.database.begin() as connection:
            return [tuple(row) for row in connection.execute(
                update(jobs).where(jobs.c.id.in_(ids), is_queued, or_(*lost)).values(
                    dispatched_at=now, dispatches=jobs.c.dispatches + 1).returning(jobs.c.id, jobs.c.queue))]

    def not_sent(self, ids):
        """Undo `due` for jobs that could not be sent."""
        with self.database.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.id.in_(ids), is_queued)
                               .values(dispatched_at=None))

    def expire(self):
        """Remove some of the jobs whose time is over, with their deliveries, but none that is still to be called back.
        Returns how many."""
        with self.database.begin() as connection:
            has_callback = exists().where(deliveries.c.job_id == jobs.c.id, deliveries.c.state == "pending")
            ids = list(connection.execute(select(jobs.c.id).where(jobs.c.expires_at < clock(connection), ~has_callback)
                                          .limit(AT_ONCE)).scalars())
            removed, until = [], time.monotonic() + REMOVE_FOR_S
            for job_id in ids:
                connection.execute(delete(jobs).where(jobs.c.id == job_id))
                removed.append(job_id)
                if time.monotonic() > until:
                    break
            if removed:
                connection.execute(delete(deliveries).where(deliveries.c.job_id.in_(removed)))
            return len(removed)

    def unfinished(self, ids):
        """Those of these jobs that are unfinished, as a set."""
        found = set()
        with self.database.read() as connection:
            for i in range(0, len(ids), AT_ONCE):
                found |= set(connection.execute(select(jobs.c.id).where(
                    jobs.c.id.in_(ids[i:i + AT_ONCE]), is_unfinished)).scalars())
        return found

    def backlog(self):
        """{(queue, state): (number of unfinished jobs, seconds since the oldest one was submitted)}."""
        with self.database.read() as connection:
            found, now = shares.backlog(connection), clock(connection)
        return {name: (number, max(0.0, now - since)) for name, (number, since) in found.items()}


def clock(connection):
    """Unix seconds by the clock of the database, which all machines have in common."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar())


def label(model, version):
    return f"{model}@{version}" if version else model


def is_of(models):
    """Whether a job is for one of these models, "NAME" or "NAME@VERSION"."""
    return func.coalesce(jobs.c.model + "@" + jobs.c.version, jobs.c.model).in_(models)


def as_json(value):
    return None if value is None else json.dumps(value)


def newest(rows, where, limit):
    return (select(*(rows.c[column.name] for column in LISTED)).where(*where)
            .order_by(rows.c.created_at.desc(), rows.c.id.desc()).limit(limit))


def row_of(result):
    row = result.mappings().first()
    return None if row is None else dict(row)


def mine(job_id, owner):
    return [jobs.c.id == job_id, *([] if owner is None else [jobs.c.owner == owner])]


def running(job_id, attempt):
    return [jobs.c.id == job_id, is_running, jobs.c.attempt == attempt]


def after_loss(row, job_timeout, latest):
    """(state, values) of a job whose worker was lost. latest: the end of the longest lease that there can be."""
    if row.cancel_requested:
        return "cancelled", {}
    # It kept its lease until about then: it hangs, but was not killed earlier.
    if latest >= row.lease_until >= row.started_at + job_timeout + LEASE_S - 1.25 * RENEW_EVERY_S:
        return "failed", {"error_json": json.dumps(overdue_error(job_timeout))}
    if row.losses + 1 >= LOSSES:
        return "failed", {"losses": LOSSES, "error_json": json.dumps({
            "error": "WORKER_LOST", "message": f"The worker ended in the middle of this job, {LOSSES} times."})}
    return "queued", {}


def overdue_error(job_timeout):
    return {"error": "DEADLINE_EXCEEDED", "message": f"The job took longer than {job_timeout:g} s, the time allowed."}


def first_line(error):
    """An exception of a library in one line, for the log."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
