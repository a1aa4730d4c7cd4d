"""A name of its own for each storage: the recorders of one share the work, those of two do not."""

import uuid

import sqlalchemy as sa
from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table and the name."""
    prefix = context.config.attributes["prefix"]
    table = op.create_table(f"{prefix}storage", sa.Column("id", sa.Text, primary_key=True))
    op.bulk_insert(table, [{"id": uuid.uuid4().hex[:12]}])
