"""The tables, by their names in SQL. One place for the code; the migrations have their own, frozen copies."""

import re
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeDecorator

from kser.errors import ConfigurationError
from kser.storage.values import clean_text

__all__ = ["DEFAULT_PREFIX", "CleanText", "Tables", "UtcTime", "check_prefix"]

DEFAULT_PREFIX = "jobcontrol_"
_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,30}\Z|\Z")

#: sqlite counts up only what is declared as INTEGER.
BigId = BigInteger().with_variant(Integer, "sqlite")

#: Of an index that begins with the root operation: most rows of many belong to none, and storing them is quicker.
_NOT_NULL: Any = {"sqlite_where": text("root IS NOT NULL"), "postgresql_where": text("root IS NOT NULL")}


def check_prefix(prefix: str) -> str:
    """``prefix``, if names of tables can begin with it. Raises ConfigurationError."""
    if not _PREFIX.match(prefix):
        raise ConfigurationError(
            f"table_prefix={prefix!r}: write small letters, digits and _, at most 31 of them, as in {DEFAULT_PREFIX}"
        )
    return prefix


class UtcTime(TypeDecorator[datetime]):
    """A datetime in UTC: what goes in has a time zone, what comes out is in UTC, on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """A value for the database: sqlite knows no time zones."""
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """In UTC, whatever the session's time zone is."""
        if value is None:
            return None
        stored: datetime = value
        return stored.replace(tzinfo=UTC) if stored.tzinfo is None else stored.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text of any content: PostgreSQL takes no NUL, UTF-8 no lone surrogates."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Without what cannot be stored."""
        return None if value is None else clean_text(value)


class Tables:
    """The tables of one storage. All names begin with ``prefix``."""

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        self.prefix = prefix
        self.metadata = MetaData()
        self.build = self._build()
        self.build_progress = self._build_progress()
        self.log = self._log()
        self.event = self._event()
        self.worker = self._worker()
        self.projection = self._projection()
        #: One row: the name of this storage among others.
        self.storage = self._table("storage", Column("id", Text, primary_key=True))

    @property
    def version_name(self) -> str:
        """The table alembic keeps the version in."""
        return f"{self.prefix}alembic_version"

    def _table(self, name: str, *items: Any) -> Table:
        return Table(self.prefix + name, self.metadata, *items)

    def _index(self, table: str, *columns: str, **options: Any) -> Index:
        return Index(f"ix_{self.prefix}{table}_{'_'.join(columns)}", *columns, **options)

    def _build(self) -> Table:
        return self._table(
            "build",
            Column("id", BigId, primary_key=True, autoincrement=True),
            Column("uuid", CleanText, nullable=False, unique=True),
            Column("kind", Text, nullable=False),
            Column("job_id", CleanText, nullable=False),
            Column("entrypoint", CleanText, nullable=False),
            # The root operation; NULL for what belongs to none.
            Column("root", CleanText),
            Column("parent", CleanText),
            # Roots and lone tasks: what lists of operations show.
            Column("is_top", Boolean, nullable=False),
            Column("run", Integer, nullable=False),
            Column("position", Integer, nullable=False),
            Column("attempt", Integer, nullable=False),
            Column("status", Text, nullable=False),
            Column("created", UtcTime, nullable=False),
            Column("start_time", UtcTime),
            Column("end_time", UtcTime),
            Column("started", Boolean, nullable=False),
            Column("finished", Boolean, nullable=False),
            Column("success", Boolean),
            Column("skipped", Boolean),
            # JSON as text: it may hold what JSONB refuses, such as an escaped NUL, and comes back as it was.
            Column("job_config", Text),
            Column("build_config", Text),
            Column("params", Text),
            Column("retcode", BigInteger),
            Column("stdout", CleanText),
            Column("stderr", CleanText),
            Column("retval", Text),
            Column("error", CleanText),
            Column("exception", Text),
            Column("exception_tb", Text),
            Column("worker", CleanText),
            Column("group_name", CleanText),
            Column("note", CleanText),
            self._index("build", "job_id", "id"),
            self._index("build", "root", **_NOT_NULL),
            self._index("build", "created", sqlite_where=text("is_top = 1"), postgresql_where=text("is_top = true")),
            self._index(
                "build", "finished", sqlite_where=text("finished = 0"), postgresql_where=text("finished = false")
            ),
        )

    def _build_progress(self) -> Table:
        return self._table(
            "build_progress",
            self._build_reference(primary_key=True),
            Column("group_name", CleanText, primary_key=True),
            Column("current", BigInteger, nullable=False),
            Column("total", BigInteger, nullable=False),
            Column("status_line", CleanText, nullable=False),
            # When the execution that told it began, and which of its reports it was; 0 for what came by a call.
            Column("began", BigInteger, nullable=False),
            Column("n", BigInteger, nullable=False),
        )

    def _log(self) -> Table:
        return self._table(
            "log",
            Column("id", BigId, primary_key=True, autoincrement=True),
            self._build_reference(nullable=False),
            Column("created", UtcTime, nullable=False),
            Column("level", Integer, nullable=False),
            Column("logger", CleanText, nullable=False),
            Column("message", CleanText, nullable=False),
            Column("exception", Text),
            Column("exception_tb", Text),
            Column("worker", CleanText),
            # The same for a record that was told twice; NULL for what came by a call.
            Column("identity", Text, unique=True),
            self._index("log", "build_id", "id"),
            self._index("log", "created", "id"),
        )

    def _event(self) -> Table:
        return self._table(
            "event",
            Column("id", BigId, primary_key=True, autoincrement=True),
            # The same for an event and its repetition after a redelivery; it tells of the same uuid.
            Column("identity", Text, nullable=False),
            Column("type", CleanText, nullable=False),
            Column("uuid", CleanText, nullable=False),
            Column("root", CleanText),
            Column("run", Integer, nullable=False),
            Column("position", Integer, nullable=False),
            Column("attempt", Integer, nullable=False),
            Column("phase", Integer, nullable=False),
            Column("worker", CleanText, nullable=False),
            # The record as it was told, and where.
            Column("data", Text, nullable=False),
            Column("cluster", CleanText, nullable=False),
            Column("topic", CleanText, nullable=False),
            Column("partition", Integer, nullable=False),
            Column("offset", BigInteger, nullable=False),
            self._index("event", "uuid", "identity", unique=True),
            self._index("event", "root", "type", **_NOT_NULL),  # new runs of an operation, among very many events
        )

    def _worker(self) -> Table:
        return self._table(
            "worker",
            Column("name", CleanText, primary_key=True),
            Column("group_name", CleanText, primary_key=True),
            Column("state", CleanText, nullable=False),
            Column("started", UtcTime),
            Column("seen", UtcTime, nullable=False),
            # Seconds within which it says something again.
            Column("interval_s", Float, nullable=False),
            # The record as it was told.
            Column("data", Text, nullable=False),
        )

    def _projection(self) -> Table:
        return self._table(
            "projection",
            # A broker in memory begins at 0 again, under a new cluster id.
            Column("cluster", CleanText, primary_key=True),
            Column("topic", CleanText, primary_key=True),
            Column("partition", Integer, primary_key=True),
            Column("next_offset", BigInteger, nullable=False),
            Column("updated", UtcTime, nullable=False),
        )

    def _build_reference(self, **options: Any) -> Column[Any]:
        target = ForeignKey(f"{self.prefix}build.id", ondelete="CASCADE")
        return Column("build_id", BigId, target, **options)
