"""Very many rows in one statement, each driver by the way it is fastest: PostgreSQL by COPY, sqlite by long VALUES.

SQLAlchemy looks at each value of each row, which takes longer than the database needs to store it. So what is given
here must be ready: texts without NUL and lone surrogates (clean_text), times in UTC, JSON as text.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, Final

import orjson
from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    CursorResult,
    Executable,
    Integer,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from kser.storage.schema import UtcTime

__all__ = ["BulkInsert", "BulkUpdate", "among"]

Rows = Sequence[dict[str, Any]]
#: Rows in one statement of sqlite: few sizes, so that the driver finds them among those it has prepared. executemany()
#: takes Python's lock for each row, and waits for it 5 ms each time while another thread is busy.
_SIZES: Final = (500, 50, 5, 1)
_QUOTE: Final = sqlite.dialect().identifier_preparer.quote
#: How COPY reads what is no text, and what has a meaning in texts.
_NULL: Final = r"\N"
_FLAGS: Final = {None: _NULL, True: "t", False: "f"}
_ESCAPES: Final = {"\\": r"\\", "\n": r"\n", "\t": r"\t", "\r": r"\r"}


def among(connection: Connection, of: ColumnElement[Any], values: Sequence[str]) -> ColumnElement[bool]:
    """``of`` is one of these: any number of them is one parameter."""
    if _is_postgresql(connection):
        return of == func.any(bindparam(None, list(values), type_=postgresql.ARRAY(Text)))
    given = bindparam(None, orjson.dumps(values).decode(), type_=Text)
    return of.in_(select(func.json_each(given).table_valued("value").c.value))


class BulkInsert:
    """Inserts rows of one table, in their order, but those that are there: they have a unique value of it.

    Args:
        table: where to.
        names: its columns that the rows have.

    Thread rule: may be shared by threads.
    """

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        columns = ", ".join(map(_QUOTE, names))
        head = f"INSERT INTO {_QUOTE(table.name)} ({columns}) VALUES "  # noqa: S608 - names of the schema
        self._values = _Values(table, names, head, " ON CONFLICT DO NOTHING")
        self._copy = _Copy(table, names)
        given = _recordset(table, names)
        new = postgresql.insert(table).from_select(list(names), select(*(given.c[name] for name in names)))
        self._json = new.on_conflict_do_nothing()

    def all_or_none(self, connection: Connection, rows: Rows) -> bool:
        """Insert them if none is there, where that is quicker than to look; False: none was made."""
        return _is_postgresql(connection) and self._copy.execute(connection, rows)

    def __call__(self, connection: Connection, rows: Rows) -> int:
        """Insert them; how many were made. The rows are changed."""
        if not rows:
            return 0
        if not _is_postgresql(connection):
            return self._values.execute(connection, rows)
        if self._copy.execute(connection, rows):
            return len(rows)
        return _execute(connection, self._json, rows)


class BulkUpdate:
    """Changes rows of one table.

    Args:
        table: where.
        names: the columns that are set.
        key: the column that says which row, by the value the rows have under this name.

    Thread rule: may be shared by threads.
    """

    def __init__(self, table: Table, names: Sequence[str], *, key: str) -> None:
        given, changed = [*names, key], _QUOTE(table.name)
        sets = ", ".join(f"{_QUOTE(name)} = given.{_QUOTE(name)}" for name in names)
        head = f"WITH given ({', '.join(map(_QUOTE, given))}) AS (VALUES "
        where = f"{changed}.{_QUOTE(key)} = given.{_QUOTE(key)}"
        tail = f") UPDATE {changed} SET {sets} FROM given WHERE {where}"  # noqa: S608 - names of the schema
        self._values = _Values(table, given, head, tail)
        new = _recordset(table, given)
        self._json = update(table).where(table.c[key] == new.c[key]).values({name: new.c[name] for name in names})

    def __call__(self, connection: Connection, rows: Rows) -> int:
        """Set the columns of these rows; how many there were. The rows are changed."""
        if not rows:
            return 0
        if not _is_postgresql(connection):
            return self._values.execute(connection, rows)
        return _execute(connection, self._json, rows)


class _Values:
    """A statement of sqlite with very many rows between its ``head`` and ``tail``."""

    def __init__(self, table: Table, names: Sequence[str], head: str, tail: str) -> None:
        row = f"({', '.join('?' * len(names))})"
        self._statements = {size: f"{head}{', '.join([row] * size)}{tail}" for size in _SIZES}
        self._pick = itemgetter(*names)
        self._times = [name for name in names if isinstance(table.c[name].type, UtcTime)]

    def execute(self, connection: Connection, rows: Rows) -> int:
        """How many rows it made or changed."""
        for name in self._times:
            for row in rows:
                if (time := row[name]) is not None:
                    row[name] = _time_of_sqlite(time)
        picked, count, at = list(map(self._pick, rows)), 0, 0
        for size in _SIZES:
            while len(picked) - at >= size:
                values = tuple(chain.from_iterable(picked[at : at + size]))
                count += connection.exec_driver_sql(self._statements[size], values).rowcount
                at += size
        return count


@lru_cache(maxsize=1024)  # many rows of a batch have the same
def _time_of_sqlite(time: datetime) -> str:
    return time.replace(tzinfo=None).isoformat(" ", "microseconds")


class _Copy:
    """COPY of PostgreSQL: half of what JSON costs there. It knows no ON CONFLICT."""

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        self._sql = f"COPY {_QUOTE(table.name)} ({', '.join(map(_QUOTE, names))}) FROM STDIN"
        self._fields = [(name, _fields_of(table.c[name])) for name in names]

    def execute(self, connection: Connection, rows: Rows) -> bool:
        """Whether they were made; False when one of them was there, and none was made."""
        import psycopg  # here: it may not be installed

        columns = [fields([row[name] for row in rows]) for name, fields in self._fields]
        text = "\n".join(map("\t".join, zip(*columns, strict=True)))
        driver: Any = connection.connection.driver_connection
        saved = connection.begin_nested()
        try:
            with driver.cursor() as cursor, cursor.copy(self._sql) as copy:
                copy.write(text)
                copy.write("\n")
        except psycopg.errors.UniqueViolation:
            saved.rollback()
            return False
        except psycopg.Error as exc:  # as SQLAlchemy tells those that it meets itself
            if driver.closed:
                connection.invalidate(exc)
            raise DBAPIError.instance(self._sql, None, exc, psycopg.Error, dialect=connection.dialect) from exc
        saved.commit()
        return True


def _fields_of(column: Column[Any]) -> Callable[[list[Any]], list[str]]:
    """What writes values of this column as COPY reads them."""
    if isinstance(column.type, UtcTime):
        return _copied_times
    if isinstance(column.type, Boolean):
        return _copied_flags
    if isinstance(column.type, Integer):
        return _copied_numbers
    return _copied_texts


@lru_cache(maxsize=1024)
def _copied_time(time: datetime | None) -> str:
    return _NULL if time is None else time.isoformat()


def _copied_times(times: list[datetime | None]) -> list[str]:
    return [_copied_time(time) for time in times]


def _copied_flags(flags: list[bool | None]) -> list[str]:
    return [_FLAGS[flag] for flag in flags]


def _copied_numbers(numbers: list[int | None]) -> list[str]:
    return [_NULL if number is None else str(number) for number in numbers]


def _copied_texts(texts: list[str | None]) -> list[str]:
    together = "".join(filter(None, texts))  # most columns have nothing to be escaped, and many are empty
    if any(character in together for character in _ESCAPES):
        return [_NULL if text is None else _escaped(text) for text in texts]
    return [_NULL if text is None else text for text in texts]


def _escaped(text: str) -> str:
    for character, escape in _ESCAPES.items():  # the backslash first
        if character in text:
            text = text.replace(character, escape)
    return text


def _execute(connection: Connection, statement: Executable, rows: Rows) -> int:
    given = {"rows": orjson.dumps(rows).decode()}
    result: CursorResult[Any] = connection.execute(statement, given, execution_options={"preserve_rowcount": True})
    return result.rowcount


def _recordset(table: Table, names: Sequence[str]) -> Any:
    """The rows in the parameter ``rows``, a JSON array of objects, as a table."""
    columns = [column(name, table.c[name].type) for name in names]
    given = cast(bindparam("rows", type_=Text), postgresql.JSON)
    return func.json_to_recordset(given).table_valued(*columns).render_derived("given", with_types=True)


def _is_postgresql(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"
