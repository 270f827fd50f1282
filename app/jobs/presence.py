"""Which processes of workers are there, as they say themselves in the database. All functions block."""
import json

from sqlalchemy import delete, insert, not_, select, update

from app.data.schema import workers
from app.jobs.store import clock

BEAT_EVERY_S = 4
HEARD_WITHIN_S = 15       # who says nothing for so long is not there
FORGOTTEN_AFTER_S = 300


def beat(database, worker, queues, models):
    """Say that a process is there, which takes jobs for these models from these queues. worker: as of jobs."""
    with database.begin() as connection:
        values = {"seen_at": clock(connection), "queues_json": json.dumps(queues), "models_json": json.dumps(models)}
        if not connection.execute(update(workers).where(workers.c.id == worker).values(**values)).rowcount:
            connection.execute(insert(workers).values(id=worker, **values))


def leave(database, worker):
    """Say that it ends."""
    with database.begin() as connection:
        connection.execute(delete(workers).where(workers.c.id == worker))


def heard(database):
    """[(queues, models)] of the processes that are there."""
    with database.read() as connection:
        found = connection.execute(select(workers.c.queues_json, workers.c.models_json)
                                   .where(was_seen(clock(connection), HEARD_WITHIN_S)))
        return [(json.loads(queues), json.loads(models)) for queues, models in found]


def forget(database):
    """Remove those that were killed."""
    with database.begin() as connection:
        connection.execute(delete(workers).where(not_(was_seen(clock(connection), FORGOTTEN_AFTER_S))))


def was_seen(now, within_s):
    return workers.c.seen_at.between(now - within_s, now + within_s)  # the clock may have been put back
