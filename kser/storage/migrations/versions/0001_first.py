"""The first tables: build, build_progress, log, event, worker, projection."""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_BIG_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make them."""
    prefix = context.config.attributes["prefix"]
    _make_build(prefix)
    _make_build_progress(prefix)
    _make_log(prefix)
    _make_event(prefix)
    _make_worker(prefix)
    _make_projection(prefix)


def _make_build(prefix: str) -> None:
    op.create_table(
        f"{prefix}build",
        sa.Column("id", _BIG_ID, primary_key=True, autoincrement=True),
        sa.Column("uuid", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("entrypoint", sa.Text, nullable=False),
        sa.Column("root", sa.Text),
        sa.Column("parent", sa.Text),
        sa.Column("is_top", sa.Boolean, nullable=False),
        sa.Column("run", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("created", _TIME, nullable=False),
        sa.Column("start_time", _TIME),
        sa.Column("end_time", _TIME),
        sa.Column("started", sa.Boolean, nullable=False),
        sa.Column("finished", sa.Boolean, nullable=False),
        sa.Column("success", sa.Boolean),
        sa.Column("skipped", sa.Boolean),
        sa.Column("job_config", sa.Text),
        sa.Column("build_config", sa.Text),
        sa.Column("params", sa.Text),
        sa.Column("retcode", sa.BigInteger),
        sa.Column("stdout", sa.Text),
        sa.Column("stderr", sa.Text),
        sa.Column("retval", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("exception", sa.Text),
        sa.Column("exception_tb", sa.Text),
        sa.Column("worker", sa.Text),
        sa.Column("group_name", sa.Text),
        sa.Column("note", sa.Text),
    )
    _index(prefix, "build", "job_id", "id")
    _index(prefix, "build", "root")
    _index(prefix, "build", "is_top", "created")
    _index(
        prefix,
        "build",
        "finished",
        sqlite_where=sa.text("finished = 0"),
        postgresql_where=sa.text("finished = false"),
    )


def _make_build_progress(prefix: str) -> None:
    op.create_table(
        f"{prefix}build_progress",
        _build_reference(prefix, primary_key=True),
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("current", sa.BigInteger, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("status_line", sa.Text, nullable=False),
        sa.Column("began", sa.BigInteger, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
    )


def _make_log(prefix: str) -> None:
    op.create_table(
        f"{prefix}log",
        sa.Column("id", _BIG_ID, primary_key=True, autoincrement=True),
        _build_reference(prefix, nullable=False),
        sa.Column("created", _TIME, nullable=False),
        sa.Column("level", sa.Integer, nullable=False),
        sa.Column("logger", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("exception", sa.Text),
        sa.Column("exception_tb", sa.Text),
        sa.Column("worker", sa.Text),
        sa.Column("identity", sa.Text, unique=True),
    )
    _index(prefix, "log", "build_id", "id")
    _index(prefix, "log", "created", "id")


def _make_event(prefix: str) -> None:
    op.create_table(
        f"{prefix}event",
        sa.Column("id", _BIG_ID, primary_key=True, autoincrement=True),
        sa.Column("identity", sa.Text, nullable=False, unique=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("uuid", sa.Text, nullable=False),
        sa.Column("root", sa.Text),
        sa.Column("run", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("phase", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("cluster", sa.Text, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
    )
    _index(prefix, "event", "uuid")
    _index(prefix, "event", "root", "type")
    _index(prefix, "event", "topic", "partition", "offset")


def _make_worker(prefix: str) -> None:
    op.create_table(
        f"{prefix}worker",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("started", _TIME),
        sa.Column("seen", _TIME, nullable=False),
        sa.Column("interval_s", sa.Float, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
    )


def _make_projection(prefix: str) -> None:
    op.create_table(
        f"{prefix}projection",
        sa.Column("cluster", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
        sa.Column("updated", _TIME, nullable=False),
    )


def _index(prefix: str, table: str, *columns: str, **options: Any) -> None:
    op.create_index(f"ix_{prefix}{table}_{'_'.join(columns)}", f"{prefix}{table}", list(columns), **options)


def _build_reference(prefix: str, **options: Any) -> sa.Column[Any]:
    return sa.Column("build_id", _BIG_ID, sa.ForeignKey(f"{prefix}build.id", ondelete="CASCADE"), **options)
