"""History: the read API over what the storage knows, for people and tools."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, func, or_, select

from kser.control import only_one
from kser.errors import NotFound, ValidationError
from kser.progress import ProgressReport
from kser.status import Status
from kser.storage.database import Database, chunks
from kser.storage.values import as_utc, from_ms, load_json, now
from kser.storage.views import Execution, LogLine, ProjectionView, TimelineEvent, WorkerView

__all__ = ["History", "worker_state"]

#: A worker that was silent for so many of its intervals is gone, but not within so many seconds: clocks differ.
_MISSED = 3
_LEAST_S = 5.0
_KINDS = ("operation", "task")
#: Characters of a uuid that may stand for it, and uuids with the same ones that are looked at.
_LEAST_BEGIN = 8
_MOST_BEGINS = 100


class History:
    """Operations, tasks, events, logs, progress and workers, as they were when they were asked for.

    Each method raises StorageError when the database does not answer, ConfigurationError when its tables are missing,
    and those that name one thing NotFound when there is none. Times must have a time zone and come in UTC.

    Thread rule: may be shared by threads.

    Args:
        database: of a SqlStorage; its ``history`` is one of these.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tables = database.tables

    # -- operations ----------------------------------------------------------------------------------------------------

    def list_operations(
        self,
        *,
        states: Iterable[str] = (),
        entrypoint: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        text: str | None = None,
        kind: str | None = None,
        group: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Execution]:
        """Root operations and tasks that belong to none, newest first, without what is in them.

        Args:
            states: only these; names of Status.
            entrypoint: only of this class: its name in messages, or the last part of it.
            since: only what began from this time on, or was heard of first where no start is known.
            until: only what began before this time.
            text: only what has this in its uuid, name, params or error, in capitals or not.
            kind: "operation" or "task"; None: both.
            group: only what workers of this group told of.
            limit: at most so many.
            offset: leave out so many first.

        Raises ValidationError for a status, kind, limit or offset that cannot be.
        """
        for name, value in (("limit", limit), ("offset", offset)):
            if not isinstance(value, int) or not 0 <= value < 1 << 63:
                raise ValidationError(f"{name}={value!r}: give a whole number from 0, of 63 bits at most")
        build = self._tables.build
        query = select(build).where(*self._filters(states, entrypoint, since, until, text, kind, group))
        query = query.order_by(build.c.created.desc(), build.c.id.desc()).limit(limit).offset(offset)
        with self._database.read() as connection:
            return [execution(row) for row in connection.execute(query)]

    def count_operations(
        self,
        *,
        states: Iterable[str] = (),
        entrypoint: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        text: str | None = None,
        kind: str | None = None,
        group: str | None = None,
    ) -> int:
        """How many list_operations() has with these filters and no limit."""
        query = select(func.count()).select_from(self._tables.build)
        query = query.where(*self._filters(states, entrypoint, since, until, text, kind, group))
        with self._database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def get_operation(self, uuid: str | int) -> Execution:
        """One operation or task with all that is in it, as a tree. By its uuid, or its number in the storage."""
        build = self._tables.build
        with self._database.read() as connection:
            row = connection.execute(select(build).where(self._named(uuid))).first()
            if row is None:
                short = isinstance(uuid, str) and len(uuid) < _LEAST_BEGIN and not uuid.isdecimal()
                hint = f": of a uuid at least the first {_LEAST_BEGIN} characters are needed" if short else ""
                raise NotFound(f"Nothing is known of {uuid}{hint}", extra={"uuid": str(uuid)})
            if row.kind != "operation" or row.root is None:
                return execution(row)
            # Of all in the root operation, for one that is nested in it too: whose children they are is found here.
            within = select(build).where(build.c.root == row.root, build.c.uuid != row.root)
            rows = connection.execute(within).all()
        return _tree(row, rows)

    def complete_uuid(self, begin: str) -> str:
        """The uuid that begins so; ``begin`` itself when it is no 8 characters long, or no uuid begins so.

        Raises ValidationError, which names them, when several do.
        """
        if len(begin) < _LEAST_BEGIN:
            return begin
        uuid = self._tables.build.c.uuid
        query = select(uuid).where(uuid.startswith(begin, autoescape=True)).order_by(uuid).limit(_MOST_BEGINS)
        with self._database.read() as connection:
            return only_one(begin, connection.execute(query).scalars())

    # -- what was told -------------------------------------------------------------------------------------------------

    def list_events(self, uuid: str, *, after: int = 0, limit: int = 500) -> list[TimelineEvent]:
        """What was told of an operation and all in it, or of a task, by (run, position, attempt, phase).

        Args:
            uuid: of the operation or task. One that nobody told of has none.
            after: only what came into the storage after the event with this ``id``: how to follow. None comes later
                with a smaller one.
            limit: at most so many, of those the first to come into the storage.
        """
        event = self._tables.event
        query = select(event).where(or_(event.c.uuid == uuid, event.c.root == uuid), event.c.id > after)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(event.c.id).limit(limit)).all()
        return [
            _event(row) for row in sorted(rows, key=lambda row: (row.run, row.position, row.attempt, row.phase, row.id))
        ]

    def list_logs(
        self, uuid: str | None = None, *, after: int = 0, min_level: int | None = None, limit: int = 500
    ) -> list[LogLine]:
        """Log records of an operation and all in it, or of a task; None: of everything. In the order they were stored.

        Args:
            uuid: of the operation or task.
            after: only those stored after the one with this ``id``: how to follow. None comes later with a smaller one.
            min_level: only of this level and above, as in logging.
            limit: at most so many.
        """
        log, build = self._tables.log, self._tables.build
        columns = (log, build.c.uuid, build.c.entrypoint)
        query = select(*columns).join(build, build.c.id == log.c.build_id).where(log.c.id > after)
        if uuid is not None:
            query = query.where(or_(build.c.uuid == uuid, build.c.root == uuid))
        if min_level is not None:
            query = query.where(log.c.level >= min_level)
        with self._database.read() as connection:
            return [_log_line(row) for row in connection.execute(query.order_by(log.c.id).limit(limit))]

    def get_progress(self, uuid: str) -> ProgressReport:
        """How far an operation or task has come, as a tree: an operation's has its tasks as groups, by name."""
        found = self.get_operation(uuid)
        return _progress(found, self._progress_rows([each.id for each in found.walk()]))

    # -- the fleet -----------------------------------------------------------------------------------------------------

    def list_workers(self) -> list[WorkerView]:
        """The workers that told of themselves, by group and name.

        A worker tells how soon it will say something again; who is silent for three times that is gone.
        """
        worker = self._tables.worker
        with self._database.read() as connection:
            rows = connection.execute(select(worker)).all()
        views = [_worker(row) for row in rows]
        return sorted(views, key=lambda view: (view.group, view.name))

    def list_projections(self) -> list[ProjectionView]:
        """How far the recorders have come in each partition."""
        projection = self._tables.projection
        with self._database.read() as connection:
            rows = connection.execute(select(projection)).all()
        views = [
            ProjectionView(
                cluster=row.cluster,
                topic=row.topic,
                partition=row.partition,
                next_offset=row.next_offset,
                updated=row.updated,
            )
            for row in rows
        ]
        return sorted(views, key=lambda view: (view.cluster, view.topic, view.partition))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _named(self, uuid: str | int) -> ColumnElement[bool]:
        build = self._tables.build
        if isinstance(uuid, int):
            return build.c.id == uuid if 0 < uuid < 1 << 63 else build.c.id.is_(None)
        return build.c.uuid == uuid

    def _filters(
        self,
        states: Iterable[str],
        entrypoint: str | None,
        since: datetime | None,
        until: datetime | None,
        text: str | None,
        kind: str | None,
        group: str | None,
    ) -> list[ColumnElement[bool]]:
        build = self._tables.build
        filters: list[ColumnElement[bool]] = [build.c.is_top]
        if wanted := [str(Status.parse(state)) for state in ([states] if isinstance(states, str) else states)]:
            filters.append(build.c.status.in_(wanted))
        if kind is not None:
            if kind not in _KINDS:
                raise ValidationError(f"kind={kind!r}: use one of {', '.join(_KINDS)}")
            filters.append(build.c.kind == kind)
        if group is not None:
            filters.append(build.c.group_name == group)
        if entrypoint:
            last = build.c.entrypoint.endswith(f".{entrypoint}", autoescape=True)
            filters.append(or_(build.c.entrypoint == entrypoint, last))
        began = func.coalesce(build.c.start_time, build.c.created)
        if (begin := as_utc("since", since)) is not None:
            filters.append(began >= begin)
        if (end := as_utc("until", until)) is not None:
            filters.append(began < end)
        if text:
            looked_at = (build.c.uuid, build.c.entrypoint, build.c.job_id, build.c.params, build.c.error)
            filters.append(or_(*(column.icontains(text, autoescape=True) for column in looked_at)))
        return filters

    def _progress_rows(self, ids: Sequence[int]) -> dict[int, list[Any]]:
        progress = self._tables.build_progress
        found: dict[int, list[Any]] = {}
        with self._database.read() as connection:
            for some in chunks(ids):
                query: Select[Any] = select(progress).where(progress.c.build_id.in_(some))
                for row in connection.execute(query.order_by(progress.c.build_id, progress.c.group_name)):
                    found.setdefault(row.build_id, []).append((row.group_name, row.current, row.total, row.status_line))
        return found


def execution(row: Row[Any], tasks: tuple[Execution, ...] = ()) -> Execution:
    """A row of the table build, as people see it."""
    return Execution(
        id=row.id,
        uuid=row.uuid,
        kind=row.kind,
        entrypoint=row.entrypoint,
        job_id=row.job_id,
        operation=row.root,
        parent=row.parent,
        run=row.run,
        position=row.position,
        attempt=row.attempt,
        status=row.status,
        created=row.created,
        started=row.start_time,
        ended=row.end_time,
        error=row.error,
        exception=load_json(row.exception),
        traceback=load_json(row.exception_tb),
        params=load_json(row.params) or {},
        result=_result(row),
        worker=row.worker,
        group=row.group_name,
        note=row.note or "",
        tasks=tasks,
    )


def _result(row: Row[Any]) -> dict[str, Any] | None:
    if row.retcode is None:
        return None
    return {
        "uuid": row.uuid,
        "retcode": row.retcode,
        "stdout": row.stdout or "",
        "stderr": row.stderr or "",
        "retval": load_json(row.retval),
    }


def _tree(top: Row[Any], rows: Sequence[Row[Any]]) -> Execution:
    """``top`` with those of ``rows`` that are in it. Built from the inside out: there may be many levels."""
    children: dict[str, list[Row[Any]]] = {}
    known = {row.uuid for row in rows}
    for row in sorted(rows, key=lambda row: (row.run, row.position, row.attempt, row.uuid)):
        # What is in an operation that nobody has told of yet is shown below the root.
        children.setdefault(row.parent if row.parent in known else row.root, []).append(row)
    order, waiting, seen = [], [top], {top.uuid}
    while waiting:
        row = waiting.pop()
        order.append(row)
        below = [child for child in children.get(row.uuid, []) if child.uuid not in seen]
        seen.update(child.uuid for child in below)
        waiting += below
        children[row.uuid] = below
    made: dict[str, Execution] = {}
    for row in reversed(order):
        made[row.uuid] = execution(row, tuple(made[child.uuid] for child in children[row.uuid]))
    return made[top.uuid]


def _progress(found: Execution, rows: dict[int, list[Any]]) -> ProgressReport:
    """The progress an execution reported itself, and below it that of its tasks."""
    report = ProgressReport.from_table(rows.get(found.id, []), found.entrypoint)
    for task in found.tasks:
        report.children.append(_progress(task, rows))
    return report


def _event(row: Row[Any]) -> TimelineEvent:
    data = load_json(row.data)
    return TimelineEvent(
        id=row.id,
        type=row.type,
        uuid=row.uuid,
        entrypoint=str(data.get("entrypoint", "")),
        operation=row.root,
        run=row.run,
        position=row.position,
        attempt=row.attempt,
        phase=row.phase,
        status=str(data.get("status", "")),
        at=from_ms(data.get("at") or 0),
        worker=row.worker,
        data=data,
    )


def _log_line(row: Row[Any]) -> LogLine:
    return LogLine(
        id=row.id,
        build_id=row.build_id,
        uuid=row.uuid,
        entrypoint=row.entrypoint,
        created=row.created,
        level=row.level,
        logger=row.logger,
        message=row.message,
        exception=load_json(row.exception),
        traceback=load_json(row.exception_tb),
        worker=row.worker,
    )


def worker_state(row: Row[Any], at: datetime | None = None) -> str:
    """What a worker told of its state; "gone" when it should have told something long ago, now or by then."""
    # In seconds: a row may hold an interval that no calendar has room for, or one that is no number.
    overdue = ((at or now()) - row.seen).total_seconds() > max(_LEAST_S, _MISSED * row.interval_s)
    return "gone" if overdue and row.state != "stopped" else str(row.state)


def _worker(row: Row[Any]) -> WorkerView:
    data, state = load_json(row.data), worker_state(row)
    versions = {name: data[field] for name, field in (("kser", "version"), ("python", "python")) if data.get(field)}
    return WorkerView(
        name=row.name,
        group=row.group_name,
        hostname=data.get("host"),
        pid=data.get("pid"),
        versions=versions,
        started=row.started,
        seen=row.seen,
        state=state,
        running=[] if state in ("gone", "stopped") else data.get("running") or [],
        data=data,
    )
