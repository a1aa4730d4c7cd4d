"""SqlStorage: builds in sqlite or PostgreSQL."""

import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Literal, Self

from sqlalchemy import Connection, Row, and_, delete, false, func, or_, select, update

from kser.errors import ConfigurationError, NotFound, StatusError, ValidationError
from kser.progress import SEPARATOR, parse_group
from kser.status import Status
from kser.storage import migrate
from kser.storage.base import StorageBase
from kser.storage.database import Database, insert, number_in_order
from kser.storage.history import History
from kser.storage.values import as_utc, dump_json, load_json, now, one_line

__all__ = ["SqlStorage"]

#: Rows read at a time: no connection is held while whoever iterates takes its time.
_PAGE = 500


class SqlStorage(StorageBase):
    """See StorageBase. All processes that use one database see the same.

    Args:
        url: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``postgresql://user:password@host:5432/db``, with
            ``?table_prefix=x_`` if need be.

    Raises ConfigurationError for a URL that cannot be. Connects at the first use.
    """

    def __init__(self, url: str) -> None:
        #: Its connections and tables, for kser.storage alone.
        self.database = Database(url)
        self._tables = self.database.tables

    @classmethod
    def from_url(cls, url: str) -> Self:
        """See StorageBase."""
        return cls(url)

    @cached_property
    def history(self) -> History:
        """See StorageBase."""
        return History(self.database)

    # -- tables --------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """See StorageBase."""
        with self.database.write() as connection:
            migrate.upgrade(connection, self._tables)

    def uninstall(self) -> None:
        """See StorageBase."""
        with self.database.write() as connection:
            migrate.uninstall(connection, self._tables)

    def version(self) -> tuple[str | None, str]:
        """The version its tables have (None: there are none), and the one this release of kser needs."""
        with self.database.read() as connection:
            return migrate.current_version(connection, self._tables), migrate.newest_version()

    @property
    def id(self) -> str:
        """A name that no other storage has, made with its tables. Raises ConfigurationError without these."""
        with self.database.read() as connection:
            found = connection.execute(select(self._tables.storage.c.id).limit(1)).scalar()
        if found is None:
            raise ConfigurationError(f"Storage {self.database.shown} has no name: its table storage is empty")
        return str(found)

    def prepare(self) -> None:
        """install() where there are no tables at all.

        Raises ConfigurationError when they have another version than this release of kser needs.
        """
        current, newest = self.version()
        if current is None:
            self.install()
        elif current != newest:
            raise ConfigurationError(
                f"Storage {self.database.shown} has tables of version {current}, this release of kser needs {newest}: "
                "run kser db upgrade --storage URL"
            )

    def close(self) -> None:
        """See StorageBase."""
        self.database.close()

    # -- builds --------------------------------------------------------------------------------------------------------

    def get_job_builds(
        self,
        job_id: str,
        started: bool | None = None,
        finished: bool | None = None,
        success: bool | None = None,
        skipped: bool | None = None,
        order: Literal["asc", "desc"] = "asc",
        limit: int | None = 100,
    ) -> Iterator[dict[str, Any]]:
        """See StorageBase."""
        if order not in ("asc", "desc"):
            raise ValueError(f"order={order!r}: write 'asc' or 'desc'")
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise ValueError(f"limit={limit!r}: give a whole number from 0, or None for no limit")
        build = self._tables.build
        query = select(build).where(build.c.job_id == job_id)
        flags = {"started": started, "finished": finished, "success": success, "skipped": skipped}
        for name, wanted in flags.items():
            if isinstance(wanted, bool):
                is_so = func.coalesce(build.c[name], false())
                query = query.where(is_so if wanted else ~is_so)
        date = func.coalesce(build.c.start_time, build.c.created)
        keys = [date.asc(), build.c.id.asc()] if order == "asc" else [date.desc(), build.c.id.desc()]
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(*keys).limit(limit)).all()
        return iter([_build(row) for row in rows])

    def create_build(self, job_id: str, job_config: dict[str, Any], build_config: dict[str, Any]) -> int:
        """See StorageBase."""
        if not isinstance(job_id, str) or not job_id:
            raise ValidationError(f"job_id={job_id!r}: give a text that is not empty")
        values = {
            "uuid": str(uuids.uuid4()),
            "kind": "task",
            "job_id": job_id,
            "entrypoint": job_id,
            "is_top": True,
            "run": 1,
            "position": 0,
            "attempt": 1,
            "status": str(Status.PENDING),
            "created": now(),
            "started": False,
            "finished": False,
            "job_config": dump_json(job_config, "job_config"),
            "build_config": dump_json(build_config, "build_config"),
        }
        with self.database.write() as connection:
            made = insert(connection, self._tables.build).values(values).returning(self._tables.build.c.id)
            return int(connection.execute(made).scalar_one())

    def get_build(self, build_id: int) -> dict[str, Any]:
        """See StorageBase."""
        with self.database.read() as connection:
            return _build(self._row(connection, build_id))

    def find_build(self, uuid: str) -> int:
        """See StorageBase."""
        build = self._tables.build
        with self.database.read() as connection:
            found = connection.execute(select(build.c.id).where(build.c.uuid == uuid)).scalar()
        if found is None:
            raise NotFound(f"No build has uuid {uuid!r}", extra={"uuid": uuid})
        return int(found)

    def start_build(self, build_id: int) -> None:
        """See StorageBase."""
        values = {"started": True, "start_time": now()}
        self._move(build_id, Status.RUNNING, values)

    def finish_build(
        self,
        build_id: int,
        success: bool | None = None,
        skipped: bool | None = None,
        retval: Any = None,
        exception: Any = None,
        exception_tb: Any = None,
    ) -> None:
        """See StorageBase."""
        status = Status.SKIPPED if skipped else Status.SUCCESS if success else Status.FAILED
        values = {
            "finished": True,
            "end_time": now(),
            "success": success,
            "skipped": skipped,
            "retval": dump_json(retval, "retval"),
            "exception": _optional(exception, "exception"),
            "exception_tb": _optional(exception_tb, "exception_tb"),
            "error": _said(exception) if status == Status.FAILED else None,
        }
        self._move(build_id, status, values)

    def delete_build(self, build_id: int) -> None:
        """See StorageBase."""
        build, event = self._tables.build, self._tables.event
        with self.database.write() as connection:
            row = self._row(connection, build_id)
            connection.execute(delete(event).where(or_(event.c.uuid == row.uuid, event.c.root == row.uuid)))
            connection.execute(delete(build).where(or_(build.c.id == build_id, build.c.root == row.uuid)))

    def _move(self, build_id: int, status: Status, values: Mapping[str, Any]) -> None:
        """Change a build whose status allows that; two that do it at once cannot both."""
        build = self._tables.build
        with self.database.write() as connection:
            row = self._row(connection, build_id, lock=True)
            old = Status.parse(row.status)
            if old.final:
                raise StatusError(f"Build {build_id} has ended, {old}: make a new one", extra={"build_id": build_id})
            old.move(status)
            changed = {"status": str(status), **values}
            connection.execute(update(build).where(build.c.id == build_id).values(changed))

    def _row(self, connection: Connection, build_id: int, *, lock: bool = False) -> Row[Any]:
        build = self._tables.build
        found = None
        if isinstance(build_id, int) and not isinstance(build_id, bool) and abs(build_id) < 1 << 63:
            query = select(build).where(build.c.id == build_id)
            found = connection.execute(query.with_for_update() if lock else query).first()
        if found is None:
            raise NotFound(f"No such build: {build_id!r}", extra={"build_id": build_id})
        return found

    # -- progress ------------------------------------------------------------------------------------------------------

    def report_build_progress(
        self,
        build_id: int,
        current: int,
        total: int,
        group_name: Sequence[str] | str | None = "",
        status_line: str = "",
    ) -> None:
        """See StorageBase."""
        for name, value in (("current", current), ("total", total)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: give a whole number")
            if abs(value) >= 1 << 63:
                raise ValidationError(f"{name}={value}: give a number that 64 bits can hold")
        progress = self._tables.build_progress
        said = {"current": current, "total": total, "status_line": status_line or "", "began": 0, "n": 0}
        key = {"build_id": build_id, "group_name": SEPARATOR.join(parse_group(group_name))}
        with self.database.write() as connection:
            self._row(connection, build_id)
            statement = insert(connection, progress).values(**key, **said)
            connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=said))

    def get_build_progress_info(self, build_id: int) -> list[tuple[tuple[str, ...], int, int, str]]:
        """See StorageBase."""
        progress = self._tables.build_progress
        query = select(progress).where(progress.c.build_id == build_id)
        with self.database.read() as connection:
            self._row(connection, build_id)
            rows = connection.execute(query).all()
        # Sorted here: databases do not agree on the order of texts.
        return sorted((parse_group(row.group_name), row.current, row.total, row.status_line) for row in rows)

    # -- logs ----------------------------------------------------------------------------------------------------------

    def log_message(
        self,
        build_id: int,
        level: int,
        message: str,
        *,
        logger: str = "",
        created: datetime | None = None,
        exception: Any = None,
        exception_tb: Any = None,
    ) -> None:
        """See StorageBase."""
        values = {
            "build_id": build_id,
            "created": as_utc("created", created) or now(),
            "level": int(level),
            "logger": logger,
            "message": str(message),
            "exception": _optional(exception, "exception"),
            "exception_tb": _optional(exception_tb, "exception_tb"),
        }
        with self.database.write() as connection:
            # Locked first: a recorder that has the build may wait below.
            self._row(connection, build_id, lock=True)
            number_in_order(connection, self._tables.log)
            connection.execute(insert(connection, self._tables.log).values(values))

    def iter_log_messages(
        self,
        build_id: int | None = None,
        max_date: datetime | None = None,
        min_date: datetime | None = None,
        min_level: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """See StorageBase."""
        _check_id(build_id)
        log, build = self._tables.log, self._tables.build
        query = select(log, build.c.job_id).join(build, build.c.id == log.c.build_id)
        if build_id is not None:
            query = query.where(log.c.build_id == build_id)
        if (until := as_utc("max_date", max_date)) is not None:
            query = query.where(log.c.created < until)
        if (since := as_utc("min_date", min_date)) is not None:
            query = query.where(log.c.created >= since)
        if min_level is not None:
            query = query.where(log.c.level >= min_level)
        return self._pages(query.order_by(log.c.created, log.c.id).limit(_PAGE))

    def _pages(self, query: Any) -> Iterator[dict[str, Any]]:
        log = self._tables.log
        page = query
        while True:
            with self.database.read() as connection:
                rows = connection.execute(page).all()
            yield from (_log(row) for row in rows)
            if len(rows) < _PAGE:
                return
            last = rows[-1]
            page = query.where(
                or_(log.c.created > last.created, and_(log.c.created == last.created, log.c.id > last.id))
            )

    def prune_log_messages(
        self,
        job_id: str | None = None,
        build_id: int | None = None,
        max_age: float | None = None,
        level: int | None = None,
    ) -> int:
        """See StorageBase."""
        _check_id(build_id)
        log, build = self._tables.log, self._tables.build
        query = delete(log)
        if job_id is not None:
            query = query.where(log.c.build_id.in_(select(build.c.id).where(build.c.job_id == job_id)))
        if build_id is not None:
            query = query.where(log.c.build_id == build_id)
        if max_age is not None:
            query = query.where(log.c.created < _ago(max_age))
        if level is not None:
            query = query.where(log.c.level <= level)
        with self.database.write() as connection:
            return connection.execute(query).rowcount


def _check_id(build_id: int | None) -> None:
    if build_id is not None and (not isinstance(build_id, int) or isinstance(build_id, bool)):
        raise ValidationError(f"build_id={build_id!r}: give the number of a build")


def _ago(seconds: float) -> datetime:
    """So many seconds ago; the first moment there is for an age that no calendar has."""
    try:
        return now() - timedelta(seconds=seconds)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def _build(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "uuid": row.uuid,
        "job_id": row.job_id,
        "start_time": row.start_time,
        "end_time": row.end_time,
        "started": row.started,
        "finished": row.finished,
        "success": row.success,
        "skipped": row.skipped,
        "job_config": load_json(row.job_config),
        "build_config": load_json(row.build_config),
        "retval": load_json(row.retval),
        "exception": load_json(row.exception),
        "exception_tb": load_json(row.exception_tb),
    }


def _log(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "build_id": row.build_id,
        "job_id": row.job_id,
        "created": row.created,
        "level": row.level,
        "logger": row.logger,
        "message": row.message,
        "exception": load_json(row.exception),
        "exception_tb": load_json(row.exception_tb),
    }


def _optional(value: Any, what: str) -> str | None:
    return None if value is None else dump_json(value, what)


def _said(exception: Any) -> str | None:
    """An error as JSON in one line."""
    if exception is None:
        return None
    text = exception.get("message") if isinstance(exception, dict) else exception
    return one_line(str(text or exception))
