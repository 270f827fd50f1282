"""The first tables."""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None
BigNumber = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
UNFINISHED = sa.text("state IN ('queued', 'running')")


def upgrade():
    op.create_table("deliveries",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("next_at", sa.Double()),
        sa.Column("attempts_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id")
        )
    op.create_index("deliveries_due", "deliveries", ["state", "next_at", "host"])
    op.create_index("ix_deliveries_job_id", "deliveries", ["job_id"])
    op.create_table("history",
        sa.Column("id", BigNumber, autoincrement=True, nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=32)),
        sa.Column("weights", sa.String(length=64)),
        sa.Column("input_sha256", sa.String(length=64), nullable=False),
        sa.Column("options_json", sa.Text(), nullable=False),
        sa.Column("predictions_json", sa.Text(), nullable=False),
        sa.Column("top_class", sa.String(length=255)),
        sa.Column("confidence", sa.Double()),
        sa.Column("milliseconds", sa.Double(), nullable=False),
        sa.Column("cached", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id")
        )
    op.create_index("history_by_time", "history", ["time", "id"])
    op.create_index("history_listed", "history", ["owner", "time", "id"])
    op.create_index("ix_history_request_id", "history", ["request_id"])
    op.create_table("jobs",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("queue", sa.String(length=10), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=32)),
        sa.Column("is_batch", sa.Boolean(), nullable=False),
        sa.Column("options_json", sa.Text(), nullable=False),
        sa.Column("inputs_json", sa.Text(), nullable=False),
        sa.Column("input_bytes", BigNumber, nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255)),
        sa.Column("callback_url", sa.Text()),
        sa.Column("dispatched_at", sa.Double()),
        sa.Column("dispatches", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(length=255)),
        sa.Column("lease_until", sa.Double()),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("unit", sa.String(length=10), nullable=False),
        sa.Column("started_at", sa.Double()),
        sa.Column("ended_at", sa.Double()),
        sa.Column("expires_at", sa.Double()),
        sa.Column("error_json", sa.Text()),
        sa.Column("result_json", sa.Text()),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency")
        )
    op.create_index("jobs_expiry", "jobs", ["expires_at"])
    op.create_index("jobs_by_time", "jobs", ["created_at", "id"])
    op.create_index("jobs_listed", "jobs", ["owner", "created_at", "id"])
    op.create_index("jobs_listed_by_model", "jobs", ["owner", "model", "created_at", "id"])
    op.create_index("jobs_listed_by_state", "jobs", ["owner", "state", "created_at", "id"])
    op.create_index("jobs_unfinished", "jobs", ["state", "dispatched_at"],
                    postgresql_where=UNFINISHED, sqlite_where=UNFINISHED)
