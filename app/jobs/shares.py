"""What the owners have unfinished, how much each may have, and whose turn it is. Its functions run in a transaction of
the caller's.

Owners take turns: a job's turn comes as many after that of its owner's last one as that has files or frames, but not
before that of the job that is next when it is submitted, or of the one begun last if none waits. So whoever submits a
thousand delays others by one.
"""
from sqlalchemy import and_, func, literal_column, select

from app.data.schema import jobs
from app.errors import ServiceError
from app.jobs.broker import QUEUES

UNFINISHED = ("queued", "running")
# SQLite uses the partial indexes of schema.py only for a query that says what they are of, in the same words: others
# read the whole table.
QUEUED, RUNNING = (literal_column(f"'{state}'") for state in UNFINISHED)
is_unfinished = jobs.c.state.in_([QUEUED, RUNNING])
is_queued, is_running = and_(is_unfinished, jobs.c.state == QUEUED), and_(is_unfinished, jobs.c.state == RUNNING)


def check_room(connection, optional, owner, size):
    """{queue: the turn after the owner's last job}. With keys, each may use half of what there is at most, so that none
    can keep the others out. Raises ServiceError OVERLOADED if a job with inputs of this size cannot be added."""
    found = [(1, "", used(connection))]
    if owner:
        found.append((2, " of yours", used(connection, jobs.c.owner == owner)))
    for share, whose, (count, total, _) in found:
        if count >= max(1, optional.max_jobs // share) or \
                total + size > max(size, optional.max_jobs_storage // share):
            raise ServiceError(503, "OVERLOADED", f"There are too many unfinished jobs{whose}; try again later.",
                               retry_after_s=30)
    return found[-1][2][2]


def used(connection, *where):
    """(number, bytes of the inputs, {queue: the turn after the last one}) of unfinished jobs."""
    found = unfinished(connection, func.coalesce(func.sum(jobs.c.input_bytes), 0), func.max(jobs.c.turn + jobs.c.total),
                       where=where)
    turns = {}
    for queue, _, _, _, turn in found:
        turns[queue] = max(turn, turns.get(queue, 0))
    return sum(row[2] for row in found), sum(row[3] for row in found), turns


def backlog(connection):
    """{(queue, state): (number of unfinished jobs, when the oldest one was submitted)}."""
    return {(queue, state): (number, since)
            for queue, state, number, since in unfinished(connection, func.min(jobs.c.created_at))}


def unfinished(connection, *columns, where=()):
    """[(queue, state, number of jobs, *columns)], in the order of the index jobs_shares, which has all that is asked
    for."""
    return connection.execute(
        select(jobs.c.queue, jobs.c.state, func.count(), *columns)
        .where(jobs.c.queue.in_(QUEUES), is_unfinished, *where)
        .group_by(jobs.c.queue, jobs.c.state)).all()


def turn_now(connection, queue):
    """The turn of the job that is next in the queue, or if none waits, of the last one that was begun."""
    def of(turn, is_such):
        return select(turn).where(is_such, jobs.c.queue == queue).scalar_subquery()
    return connection.execute(select(func.coalesce(
        of(func.min(jobs.c.turn), is_queued), of(func.max(jobs.c.turn), is_running), 0))).scalar()


def add_alone(connection, owner):
    """Let no other process add a job of this owner's until the transaction ends: both would get the same turn, and
    exceed its share. SQLite has one writer anyway, and without keys there is only one owner."""
    if owner and connection.dialect.name != "sqlite":
        connection.execute(select(func.pg_advisory_xact_lock(int(owner[:15], 16))))
