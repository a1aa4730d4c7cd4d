"""Indices that cost more than they gave: those of what belongs to no operation, and of where an event was told."""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them anew, or drop them."""
    prefix = context.config.attributes["prefix"]
    where: Any = {name: sa.text("root IS NOT NULL") for name in ("sqlite_where", "postgresql_where")}
    for table, columns in (("build", ["root"]), ("event", ["root", "type"])):
        name = f"ix_{prefix}{table}_{'_'.join(columns)}"
        op.drop_index(name, f"{prefix}{table}")
        op.create_index(name, f"{prefix}{table}", columns, **where)
    op.drop_index(f"ix_{prefix}event_topic_partition_offset", f"{prefix}event")
