"""Fewer indices: steps are not in that of what lists show, and events have one for their uuid and for being unique."""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them anew."""
    prefix = context.config.attributes["prefix"]
    op.drop_index(f"ix_{prefix}build_is_top_created", f"{prefix}build")
    top: Any = {"sqlite_where": sa.text("is_top = 1"), "postgresql_where": sa.text("is_top = true")}
    op.create_index(f"ix_{prefix}build_created", f"{prefix}build", ["created"], **top)
    table = f"{prefix}event"
    op.drop_index(f"ix_{prefix}event_uuid", table)
    if op.get_bind().dialect.name == "sqlite":
        _make_anew(table)
        op.create_index(
            f"ix_{prefix}event_root_type", table, ["root", "type"], sqlite_where=sa.text("root IS NOT NULL")
        )
    else:
        for constraint in sa.inspect(op.get_bind()).get_unique_constraints(table):
            if constraint["name"] is not None:
                op.drop_constraint(constraint["name"], table)
    op.create_index(f"ix_{prefix}event_uuid_identity", table, ["uuid", "identity"], unique=True)


def _make_anew(table: str) -> None:
    """Without the unique constraint, which has no name there."""
    columns = (
        *("id", "identity", "type", "uuid", "root", "run", "position", "attempt", "phase", "worker", "data"),
        *("cluster", "topic", "partition", "offset"),
    )
    numbers = {"run", "position", "attempt", "phase", "partition"}
    op.rename_table(table, f"{table}_old")
    op.create_table(
        table,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        *(
            sa.Column(
                name,
                sa.Integer if name in numbers else sa.BigInteger if name == "offset" else sa.Text,
                nullable=name == "root",
            )
            for name in columns[1:]
        ),
    )
    names = ", ".join(f'"{name}"' for name in columns)
    op.execute(f'INSERT INTO "{table}" ({names}) SELECT {names} FROM "{table}_old"')  # noqa: S608 - our own names
    op.drop_table(f"{table}_old")
