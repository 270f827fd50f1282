"""Callbacks are sent by turns for their owners, and each database's services have a folder of their own in a storage
that they share with others."""
import uuid

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0004", "0003"


def upgrade():
    op.add_column("deliveries", sa.Column("owner", sa.String(length=64), nullable=False, server_default=sa.text("''")))
    op.add_column("deliveries", sa.Column("bytes", sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
                                          nullable=False, server_default="0"))
    op.execute("UPDATE deliveries SET owner = COALESCE((SELECT owner FROM jobs WHERE jobs.id = job_id), '')")
    service = op.create_table("service", sa.Column("id", sa.String(length=32), nullable=False),
                              sa.PrimaryKeyConstraint("id"))
    op.bulk_insert(service, [{"id": uuid.uuid4().hex}])
