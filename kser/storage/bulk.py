"""Very many rows in one statement, each driver by the way it is fastest: sqlite takes tuples, PostgreSQL one JSON text.

SQLAlchemy looks at each value of each row, which takes longer than the database needs to store it. So what is given
here must be ready: texts without NUL and lone surrogates (clean_text), times in UTC, JSON as text.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import orjson
from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Executable,
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

from kser.storage.schema import UtcTime

__all__ = ["BulkInsert", "BulkUpdate", "among"]

Rows = Sequence[dict[str, Any]]
#: The parameter that says which row is changed: the column itself may be a parameter of what it is set to.
_KEY = "at_key"


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
        self._tuples = _Tuples(table, names, sqlite.insert(table).on_conflict_do_nothing(), column_keys=list(names))
        given = _recordset(table, names)
        new = postgresql.insert(table).from_select(list(names), select(*(given.c[name] for name in names)))
        self._json = new.on_conflict_do_nothing()

    def __call__(self, connection: Connection, rows: Rows) -> int:
        """Insert them; how many were made. The rows are changed."""
        return _execute(connection, self._json, self._tuples, rows)


class BulkUpdate:
    """Changes rows of one table.

    Args:
        table: where.
        names: the columns that are set.
        key: the column that says which row, by the value the rows have under this name.

    Thread rule: may be shared by threads.
    """

    def __init__(self, table: Table, names: Sequence[str], *, key: str) -> None:
        change = update(table).where(table.c[key] == bindparam(_KEY))
        self._tuples = _Tuples(table, [*names, key], change.values({name: bindparam(name) for name in names}), key=key)
        given = _recordset(table, [*names, key])
        self._json = update(table).where(table.c[key] == given.c[key]).values({name: given.c[name] for name in names})

    def __call__(self, connection: Connection, rows: Rows) -> int:
        """Set the columns of these rows; how many there were. The rows are changed."""
        return _execute(connection, self._json, self._tuples, rows)


class _Tuples:
    """A statement for sqlite's executemany()."""

    def __init__(self, table: Table, names: Sequence[str], statement: Any, *, key: str = "", **options: Any) -> None:
        compiled = statement.compile(dialect=sqlite.dialect(), **options)
        self._sql = str(compiled)
        self._pick = itemgetter(*(key if name == _KEY else name for name in compiled.positiontup))
        self._times = [name for name in names if isinstance(table.c[name].type, UtcTime)]

    def execute(self, connection: Connection, rows: Rows) -> int:
        for name in self._times:
            for row in rows:
                if (time := row[name]) is not None:
                    row[name] = time.replace(tzinfo=None).isoformat(" ", "microseconds")
        return connection.exec_driver_sql(self._sql, [self._pick(row) for row in rows]).rowcount


def _execute(connection: Connection, json: Executable, tuples: _Tuples, rows: Rows) -> int:
    if not rows:
        return 0
    if not _is_postgresql(connection):
        return tuples.execute(connection, rows)
    given = {"rows": orjson.dumps(rows).decode()}
    result: CursorResult[Any] = connection.execute(json, given, execution_options={"preserve_rowcount": True})
    return result.rowcount


def _recordset(table: Table, names: Sequence[str]) -> Any:
    """The rows in the parameter ``rows``, a JSON array of objects, as a table."""
    columns = [column(name, table.c[name].type) for name in names]
    given = cast(bindparam("rows", type_=Text), postgresql.JSON)
    return func.json_to_recordset(given).table_valued(*columns).render_derived("given", with_types=True)


def _is_postgresql(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"
