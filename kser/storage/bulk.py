"""Very many rows in one statement, each driver by the way it is fastest: PostgreSQL by COPY, sqlite by long VALUES.

SQLAlchemy looks at each value of each row, which takes longer than the database needs to store it. So what is given
here must be ready: texts without NUL and lone surrogates (clean_text), times in UTC, JSON as text. How the driver takes
a row is made out before, by pack(), while another thread waits for the database.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
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
    Select,
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

__all__ = ["BulkInsert", "BulkUpdate", "Packed", "all_rows", "among", "columns_of", "to_time"]

Rows = Sequence[dict[str, Any]]
#: What BulkInsert.pack() makes, a row each.
Packed = Sequence[Any]
#: Rows in one statement of sqlite: few sizes, so that the driver finds them among those it has prepared. executemany()
#: takes Python's lock for each row, and waits for it 5 ms each time while another thread is busy.
_SIZES: Final = (500, 50, 5, 1)
_QUOTE: Final = sqlite.dialect().identifier_preparer.quote
#: How COPY reads what is no text, and what has a meaning in texts.
_NULL: Final = r"\N"
_FLAGS: Final = {None: _NULL, True: "t", False: "f"}
_ESCAPES: Final = {"\\": r"\\", "\n": r"\n", "\t": r"\t", "\r": r"\r"}


def among(connection: Connection, of: ColumnElement[Any], values: Sequence[str]) -> ColumnElement[bool]:
    """``of`` is one of these: any number of them is one parameter, and a JSON text, which no driver looks into."""
    given = bindparam(None, orjson.dumps(values).decode(), type_=Text)
    if _is_postgresql(connection):
        texts = func.json_array_elements_text(cast(given, postgresql.JSON))
        return of == func.any(func.array(select(texts).scalar_subquery()))
    return of.in_(select(func.json_each(given).table_valued("value").c.value))


def all_rows(connection: Connection, query: Select[Any]) -> Sequence[Sequence[Any]]:
    """All rows of a query at once, with the values as the driver gives them; see to_time() for times.

    From sqlite they come as one JSON text: its driver gives Python's lock away at each row, and waits for it while
    another thread is busy.
    """
    if _is_postgresql(connection):
        return connection.execute(query).all()
    rows = query.subquery()
    text = connection.execute(select(func.json_group_array(func.json_array(*rows.c)))).scalar_one()
    found: list[list[Any]] = orjson.loads(text)
    return found


def to_time(value: str | datetime | None) -> datetime | None:
    """What a column of times has in a row of all_rows()."""
    return datetime.fromisoformat(value).replace(tzinfo=UTC) if isinstance(value, str) else value


class BulkInsert:
    """Inserts rows of one table, in their order, but those that are there: they have a unique value of it.

    Args:
        table: where to.
        names: its columns that the rows have.
        dialect: the database's name for SQLAlchemy.

    Thread rule: may be shared by threads.
    """

    def __init__(self, table: Table, names: Sequence[str], dialect: str) -> None:
        self._driver: _Copy | _Values
        if dialect == postgresql.dialect.name:
            self._driver = _Copy(table, names)
            given = _recordset(table, names)
            new = postgresql.insert(table).from_select(list(names), select(*(given.c[name] for name in names)))
            self._json = new.on_conflict_do_nothing()
        else:
            columns = ", ".join(map(_QUOTE, names))
            head = f"INSERT INTO {_QUOTE(table.name)} ({columns}) VALUES "  # noqa: S608 - names of the schema
            self._driver = _Values(table, names, head, " ON CONFLICT DO NOTHING")

    def pack(self, columns: Sequence[list[Any]]) -> Packed:
        """Rows as the driver takes them, from the values of each column: work for which no connection is needed."""
        return self._driver.pack(columns)

    def all_or_none(self, connection: Connection, packed: Packed) -> bool:
        """Insert them if none is there, where that is quicker than to look; False: none was made."""
        return isinstance(self._driver, _Copy) and self._driver.execute(connection, packed)

    def __call__(self, connection: Connection, packed: Packed, rows: Callable[[], Rows]) -> int:
        """Insert them; how many were made. ``rows``: makes the same rows again, which is seldom needed."""
        if not packed:
            return 0
        if isinstance(self._driver, _Values):
            return self._driver.execute(connection, packed)
        if self._driver.execute(connection, packed):
            return len(packed)
        return _execute(connection, self._json, rows())


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
        self._names = given
        sets = ", ".join(f"{_QUOTE(name)} = given.{_QUOTE(name)}" for name in names)
        head = f"WITH given ({', '.join(map(_QUOTE, given))}) AS (VALUES "
        where = f"{changed}.{_QUOTE(key)} = given.{_QUOTE(key)}"
        tail = f") UPDATE {changed} SET {sets} FROM given WHERE {where}"  # noqa: S608 - names of the schema
        self._values = _Values(table, given, head, tail)
        new = _recordset(table, given)
        self._json = update(table).where(table.c[key] == new.c[key]).values({name: new.c[name] for name in names})

    def __call__(self, connection: Connection, rows: Rows) -> int:
        """Set the columns of these rows; how many there were."""
        if not rows:
            return 0
        if not _is_postgresql(connection):
            return self._values.execute(connection, self._values.pack(columns_of(rows, self._names)))
        return _execute(connection, self._json, rows)


def columns_of(rows: Rows, names: Sequence[str]) -> list[list[Any]]:
    """The values of each of these columns."""
    return [[row[name] for row in rows] for name in names]


class _Values:
    """A statement of sqlite with very many rows between its ``head`` and ``tail``."""

    def __init__(self, table: Table, names: Sequence[str], head: str, tail: str) -> None:
        row = f"({', '.join('?' * len(names))})"
        self._statements = {size: f"{head}{', '.join([row] * size)}{tail}" for size in _SIZES}
        self._are_times = [isinstance(table.c[name].type, UtcTime) for name in names]

    def pack(self, columns: Sequence[list[Any]]) -> Packed:
        """Tuples."""
        given = zip(self._are_times, columns, strict=True)
        ready = [_times_of_sqlite(values) if are_times else values for are_times, values in given]
        return list(zip(*ready, strict=True))

    def execute(self, connection: Connection, packed: Packed) -> int:
        """How many rows it made or changed."""
        count, at = 0, 0
        for size in _SIZES:
            while len(packed) - at >= size:
                values = tuple(chain.from_iterable(packed[at : at + size]))
                count += connection.exec_driver_sql(self._statements[size], values).rowcount
                at += size
        return count


def _times_of_sqlite(times: list[datetime | None]) -> list[str | None]:
    return [None if time is None else _time_of_sqlite(time) for time in times]


# A time that is looked up again is most often the same object, which knows its hash.
@lru_cache(maxsize=4096)
def _time_of_sqlite(time: datetime) -> str:
    return time.isoformat(" ", "microseconds")[:-6]  # it is in UTC: +00:00


class _Copy:
    """COPY of PostgreSQL: half of what JSON costs there. It knows no ON CONFLICT."""

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        self._sql = f"COPY {_QUOTE(table.name)} ({', '.join(map(_QUOTE, names))}) FROM STDIN"
        self._fields = [_fields_of(table.c[name]) for name in names]

    def pack(self, columns: Sequence[list[Any]]) -> Packed:
        """Lines."""
        ready = [fields(values) for fields, values in zip(self._fields, columns, strict=True)]
        return list(map("\t".join, zip(*ready, strict=True)))

    def execute(self, connection: Connection, packed: Packed) -> bool:
        """Whether they were made; False when one of them was there, and none was made."""
        import psycopg  # here: it may not be installed

        driver: Any = connection.connection.driver_connection
        saved = connection.begin_nested()
        try:
            with driver.cursor() as cursor, cursor.copy(self._sql) as copy:
                copy.write("\n".join(packed))
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


def _copied_times(times: list[datetime | None]) -> list[str]:
    return [_NULL if time is None else _copied_time(time) for time in times]


_copied_time = lru_cache(maxsize=4096)(datetime.isoformat)


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
