"""Traces go through jobs."""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def upgrade():
    op.add_column("jobs", sa.Column("trace_json", sa.Text()))
    op.add_column("deliveries", sa.Column("trace_json", sa.Text()))
