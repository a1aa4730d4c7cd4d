"""The storage of a command: one option, and what is opened with it."""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kser.cli.options import Function, option
from kser.errors import ConfigurationError

if TYPE_CHECKING:
    from kser.storage import StorageBase
    from kser.storage.history import History
    from kser.storage.sql import SqlStorage

__all__ = ["need_file", "open_history", "open_sql", "open_storage", "storage_option"]


def storage_option(function: Function) -> Function:
    """--storage; the command gets the URL as ``storage``, which is there: a command without one is misused."""

    @option(
        "--storage",
        metavar="URL",
        help="Where the history is: sqlite:///kser.db, postgresql://USER:PASSWORD@HOST:5432/DB, or memory:. "
        "?table_prefix=x_ behind it names the tables.  [tables: jobcontrol_...]",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, storage: str | None, **kwargs: Any) -> Any:
        if not storage:
            raise ConfigurationError("No storage is named: add --storage sqlite:///kser.db, or set KSER_STORAGE")
        return function(*args, storage=storage, **kwargs)

    return wrapper


@contextmanager
def open_storage(url: str) -> Iterator["StorageBase"]:
    """The storage at this URL, closed at the end of the block. Raises ConfigurationError for one that cannot be."""
    from kser.storage import get_storage_from_url  # here: it loads what it needs, SQL among it

    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)  # a storage of one's own is found where a registry is
    opened = get_storage_from_url(url)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def open_sql(url: str) -> Iterator["SqlStorage"]:
    """open_storage() of one that has a history. Raises ConfigurationError for one that keeps builds only."""
    from kser.storage.sql import SqlStorage

    with open_storage(url) as opened:
        opened.history  # noqa: B018 - says so when there is none
        if not isinstance(opened, SqlStorage):
            raise ConfigurationError(f"{type(opened).__name__} has no tables that a recorder can write")
        yield opened


@contextmanager
def open_history(url: str) -> Iterator["History"]:
    """The history in the storage at this URL. Raises ConfigurationError for one that has none."""
    with open_storage(url) as opened:
        need_file(opened)
        yield opened.history


def need_file(storage: "StorageBase") -> None:
    """Raise ConfigurationError for a file that is not there: reading would make an empty one of a mistyped name."""
    from kser.storage.sql import SqlStorage

    file = storage.database.file if isinstance(storage, SqlStorage) else None
    if file is not None and not file.exists():
        raise ConfigurationError(
            f"There is no storage {file}: name the one that a recorder writes, or make it with kser install --storage"
        )
