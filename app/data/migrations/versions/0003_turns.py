"""Jobs are run in turns of their owners; workers say that they are there."""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"
QUEUED = sa.text("state = 'queued'")


def upgrade():
    op.add_column("jobs", sa.Column("turn", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False,
                                    server_default="0"))
    op.create_index("jobs_in_turn", "jobs", ["queue", "turn", "created_at"], postgresql_where=QUEUED,
                    sqlite_where=QUEUED)
    op.create_table("workers",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("queues_json", sa.Text(), nullable=False),
        sa.Column("models_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id")
        )
