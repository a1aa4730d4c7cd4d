"""The database under a storage: one engine, its transactions, and its errors as kser's own."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, func, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from kser.errors import ConfigurationError, Error, StorageError, ValidationError
from kser.storage.schema import DEFAULT_PREFIX, Tables, check_prefix
from kser.storage.urls import safe_url

__all__ = ["Database", "chunks", "insert", "number_in_order"]

#: Seconds to wait for a connection, a lock, an answer.
_CONNECT_S = 10
_POOL_S = 30.0
_LOCK_S = 30
_STATEMENT_S = 120
_CONNECTIONS = 8
_WRITES = "kser_writes"
#: What PostgreSQL and sqlite call a table or column that is not there.
_MISSING_STATES = ("42P01", "42703")
_MISSING_TEXT = re.compile(r"no such (table|column)")
_IN_MEMORY = (None, "", ":memory:")
#: What the query of a URL may have; with ``uri`` sqlite has more.
_SQLITE_OPTIONS = frozenset(
    {"timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements", "uri"}
)
_INSTALL = "pip install 'kser[postgres]'"


class Database:
    """Connections to one database, and the tables in it.

    Thread rule: may be shared by threads; a connection is one thread's for as long as its block lasts.

    Args:
        url: ``memory:``, ``sqlite:///...`` or ``postgresql://...``; ``table_prefix`` in its query.

    Raises ConfigurationError for a URL that cannot be, or when the driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self.shown = safe_url(url)
        parsed, prefix = _parse(url)
        self.tables = Tables(prefix)
        try:
            self.engine = _postgresql(parsed) if parsed.drivername.startswith("postgresql") else _sqlite(parsed)
        except ImportError as exc:
            raise ConfigurationError(f"Storage {self.shown} needs psycopg, which is not installed: {_INSTALL}") from exc
        except (ArgumentError, ValueError) as exc:  # an option in the query of the URL
            raise ConfigurationError(f"Storage {self.shown!r} cannot be opened: {exc}") from exc

    @property
    def file(self) -> Path | None:
        """The file that it is; None for a database in memory or on a server."""
        url = self.engine.url
        if not url.drivername.startswith("sqlite") or url.database in _IN_MEMORY or url.database.startswith("file:"):
            return None
        return Path(url.database)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._told(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end of the block, rolled back when the block raises."""
        with self._told(), self.engine.connect() as connection:
            connection.execution_options(**{_WRITES: True})
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Let go of all connections that no thread has."""
        self.engine.dispose()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the database as kser's own; ``extra["refused"]`` True for values that it will never take."""
        try:
            yield
        except PoolTimeoutError as exc:
            raise StorageError(f"Storage {self.shown}: no connection was free within {_POOL_S:g} s") from exc
        except SQLAlchemyError as exc:
            raise self._as_error(exc) from exc
        except OverflowError as exc:  # of sqlite's driver, which has whole numbers of 64 bits
            raise ValidationError(f"A number is too large for storage {self.shown}: {exc}") from exc

    def _as_error(self, exc: SQLAlchemyError) -> Error:
        origin = exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc
        said = " ".join(str(origin).split()) or type(origin).__name__
        if getattr(origin, "sqlstate", None) in _MISSING_STATES or _MISSING_TEXT.search(said):
            return ConfigurationError(
                f"Storage {self.shown} lacks tables of this release of kser ({said.splitlines()[0][:200]}): run "
                "kser install --storage URL"
            )
        refused = isinstance(exc, (DataError, IntegrityError)) or not isinstance(exc, DBAPIError)
        return StorageError(f"Storage {self.shown}: {said[:500]}", extra={"refused": refused})


def insert(connection: Connection, table: Table) -> Any:
    """An INSERT that knows ON CONFLICT, for the database of this connection."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def need_not_last(connection: Connection) -> None:
    """What this transaction stores may be gone, all of it, after the server lost its power: it will be stored again.

    Its commit does not wait for the disk then, as none does on sqlite here.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")


def number_in_order(connection: Connection, table: Table) -> None:
    """From here to the end of the transaction nobody else who calls this adds rows to ``table``.

    So who reads it by growing numbers misses none: PostgreSQL gives a number when a row is made, and another row with a
    larger one may be committed before. Lock all else first: the others wait here with what they have locked.
    """
    if connection.dialect.name == "postgresql":  # sqlite has one writer anyhow
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(table.name))))


def _parse(url: str) -> tuple[URL, str]:
    """The URL without what is ours, and the prefix of the tables."""
    if url.partition(":")[0].lower() == "memory":
        url = "sqlite://" + ("?" + url.partition("?")[2] if "?" in url else "")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as exc:
        raise ConfigurationError(f"Storage {safe_url(url)!r} is no URL that can be read") from exc
    query = dict(parsed.query)
    prefix = query.pop("table_prefix", DEFAULT_PREFIX)
    if not isinstance(prefix, str):
        raise ConfigurationError(f"Storage {safe_url(url)!r} has table_prefix more than once")
    return parsed.set(query=query), check_prefix(prefix)


# -- sqlite ------------------------------------------------------------------------------------------------------------


def _sqlite(url: URL) -> Engine:
    if url.host or url.username or url.password or url.port:
        raise ConfigurationError(
            f"Storage {safe_url(url.render_as_string())!r} is no file: three slashes stand before a relative path, as "
            "in sqlite:///kser.db, and four before an absolute one"
        )
    if unknown := set() if "uri" in url.query else set(url.query) - _SQLITE_OPTIONS:
        raise ConfigurationError(
            f"Storage {safe_url(url.render_as_string())!r}: there is no option {sorted(unknown)[0]!r}; sqlite has "
            f"table_prefix, {', '.join(sorted(_SQLITE_OPTIONS))}"
        )
    memory = url.database in _IN_MEMORY
    engine = create_engine(
        url,
        # In memory the one connection is the database: it is never closed, and threads take turns.
        poolclass=QueuePool,
        pool_size=1 if memory else _CONNECTIONS,
        max_overflow=0,
        pool_timeout=_POOL_S,
        pool_recycle=-1,
        connect_args={"check_same_thread": False, "timeout": _LOCK_S},
    )

    @event.listens_for(engine, "connect")
    def prepare(raw: Any, _record: object) -> None:
        raw.isolation_level = None  # the module would begin transactions by itself, too late
        # Batches of the recorder change more pages than fit into the usual cache of 2 MB, and fill a usual log of 4 MB;
        # they write each page by itself. The size of pages is that of the file, if there is one.
        for pragma in (
            *("page_size=8192", "foreign_keys=ON", "journal_mode=WAL", "synchronous=NORMAL"),
            *("cache_size=-32768", "wal_autocheckpoint=5000"),
        ):
            raw.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails when another one wrote between: lock at once.
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def _postgresql(url: URL) -> Engine:
    options: Mapping[str, Any] = {
        "connect_timeout": _CONNECT_S,
        "application_name": "kser",
        # Every wait has an end, that for a dead server too.
        # Tables grow while a plan that was made for a small one lives on: plan each time.
        "options": f"-c statement_timeout={_STATEMENT_S}s -c lock_timeout={_LOCK_S}s -c timezone=UTC "
        "-c plan_cache_mode=force_custom_plan",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    # SQLAlchemy decodes user and password only.
    database = unquote(url.database) if url.database else None
    return create_engine(
        url.set(drivername="postgresql+psycopg", database=database),
        pool_size=_CONNECTIONS,
        max_overflow=0,
        pool_timeout=_POOL_S,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={name: value for name, value in options.items() if name not in url.query},
    )


def chunks(values: Sequence[Any], size: int = 500) -> Iterator[Sequence[Any]]:
    """``values`` in pieces that a statement takes as parameters: sqlite's limit is 32766 of them."""
    for at in range(0, len(values), size):
        yield values[at : at + size]
