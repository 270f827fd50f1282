"""What the owners have unfinished is counted in an index."""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0005", "0004"
UNFINISHED = sa.text("state IN ('queued', 'running')")


def upgrade():
    op.create_index("jobs_shares", "jobs", ["queue", "state", "owner", "created_at", "input_bytes", "turn", "total"],
                    postgresql_where=UNFINISHED, sqlite_where=UNFINISHED)
