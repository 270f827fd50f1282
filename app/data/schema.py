"""The tables. A change here needs a migration in migrations/versions/, and its number in REVISION."""
from urllib.parse import urlsplit

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

REVISION = "0005"  # of the last migration

metadata = MetaData()
BigNumber = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only INTEGER keys by itself


def host_of_url(context):
    """The default of a row's `host`, of which one host has only a few callbacks at a time."""
    return (urlsplit(context.get_current_parameters()["url"]).hostname or "").rstrip(".")[:255]


# Times are Unix seconds; texts called *_json hold JSON.
jobs = Table(
    "jobs", metadata,
    Column("id", String(32), primary_key=True),            # of a UUID4, in hexadecimal digits
    Column("created_at", Double, nullable=False),
    Column("owner", String(64), nullable=False),           # SHA-256 of the key that asked; "" without keys
    Column("state", String(10), nullable=False),           # queued, running, succeeded, failed, cancelled
    Column("queue", String(10), nullable=False),           # short, long
    Column("turn", BigNumber, nullable=False, server_default="0"),  # of its queue; the lowest one is next
    Column("request_id", String(128), nullable=False),
    Column("model", String(64), nullable=False),
    Column("version", String(32)),
    Column("is_batch", Boolean, nullable=False),
    Column("options_json", Text, nullable=False),
    Column("inputs_json", Text, nullable=False),           # [{"key", "filename", "field", "bytes", "sha256"}, …]
    Column("input_bytes", BigNumber, nullable=False),      # of all that lies in the storage
    Column("fingerprint", String(64), nullable=False),     # SHA-256 of model, options and inputs
    Column("idempotency_key", String(255)),
    Column("callback_url", Text),
    Column("dispatched_at", Double),                       # when its message was last given to the broker
    Column("dispatches", Integer, nullable=False, default=0),
    Column("attempt", Integer, nullable=False, default=0),  # number of the last one
    Column("losses", Integer, nullable=False, default=0),   # attempts that ended because their worker did
    Column("worker", String(255)),                         # INSTANCE/process ID of who runs it, or ran it last
    Column("lease_until", Double),                         # while running: after it, the worker counts as lost
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("done", Integer, nullable=False, default=0),
    Column("total", Integer, nullable=False),
    Column("unit", String(10), nullable=False),            # files, frames
    Column("started_at", Double),                          # of the last attempt
    Column("ended_at", Double),
    Column("expires_at", Double),
    Column("error_json", Text),                            # {"error": code, "message", …}
    Column("result_json", Text),                           # the body of the answer that /predict would have given
    Column("trace_json", Text),                            # {"traceparent", …}: headers that continue its trace
    UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    Index("jobs_listed", "owner", "created_at", "id"),
    Index("jobs_listed_by_state", "owner", "state", "created_at", "id"),
    Index("jobs_listed_by_model", "owner", "model", "created_at", "id"),
    Index("jobs_by_time", "created_at", "id"),
    Index("jobs_unfinished", "state", "dispatched_at", postgresql_where=text("state IN ('queued', 'running')"),
          sqlite_where=text("state IN ('queued', 'running')")),
    Index("jobs_in_turn", "queue", "turn", "created_at", postgresql_where=text("state = 'queued'"),
          sqlite_where=text("state = 'queued'")),
    Index("jobs_shares", "queue", "state", "owner", "created_at", "input_bytes", "turn", "total",
          postgresql_where=text("state IN ('queued', 'running')"),
          sqlite_where=text("state IN ('queued', 'running')")),
    Index("jobs_expiry", "expires_at"),
)

deliveries = Table(
    "deliveries", metadata,
    Column("id", String(32), primary_key=True),            # which receivers tell repeats by
    Column("job_id", String(32), nullable=False, index=True),
    Column("owner", String(64), nullable=False, server_default=text("''")),  # as of jobs
    Column("url", Text, nullable=False),
    Column("host", String(255), nullable=False, default=host_of_url),
    Column("state", String(10), nullable=False),           # pending, delivered, failed
    Column("created_at", Double, nullable=False),
    Column("next_at", Double),                             # when it is due, or the lease of who is delivering it ends
    Column("attempts_json", Text, nullable=False),         # [{"at", "status" or null, "error" or null, "ms"}, …]
    Column("bytes", BigNumber, nullable=False, server_default="0"),  # of the job's result
    Column("trace_json", Text),                            # as of jobs
    Index("deliveries_due", "state", "next_at", "host"),
)

service = Table(  # one row
    "service", metadata,
    Column("id", String(32), primary_key=True),            # of a UUID4: the name of all that share this database
)

workers = Table(
    "workers", metadata,
    Column("id", String(255), primary_key=True),           # INSTANCE/process ID
    Column("seen_at", Double, nullable=False),
    Column("queues_json", Text, nullable=False),           # ["short", …]: those from which it takes jobs
    Column("models_json", Text, nullable=False),           # ["NAME" or "NAME@VERSION", …]
)

history = Table(
    "history", metadata,
    Column("id", BigNumber, primary_key=True, autoincrement=True),
    Column("time", Double, nullable=False),
    Column("owner", String(64), nullable=False),           # as of jobs
    Column("request_id", String(128), nullable=False, index=True),
    Column("position", Integer, nullable=False),           # of the file in its batch, else 0
    Column("model", String(64), nullable=False),
    Column("version", String(32)),
    Column("weights", String(64)),                         # the weights' SHA-256
    Column("input_sha256", String(64), nullable=False),
    Column("options_json", Text, nullable=False),
    Column("predictions_json", Text, nullable=False),      # the best answers, or the traits
    Column("top_class", String(255)),                      # of a classifier
    Column("confidence", Double),
    Column("milliseconds", Double, nullable=False),
    Column("cached", Boolean, nullable=False),
    Index("history_listed", "owner", "time", "id"),
    Index("history_by_time", "time", "id"),
)
