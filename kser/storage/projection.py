"""Projection: records of the events and telemetry topics become rows, each once, whoever gives them and how often.

A batch is one SQL transaction. What its records say by themselves is made out before (prepare()); then:

1. The offsets are moved on, if they still are where this process left them. Are they not, another recorder has moved
   them: nothing is stored, and this one looks where to go on (StaleError).
2. A row of the table build is made or locked for everything the batch tells of, and for the operations around it.
   What this process knows to be there is not made out anew: of operations that go on side by side that is most.
3. The events go into the timeline. A repetition of one that is there is dropped.
4. Each row that was there is computed anew from all events of its uuid (kser.storage.folding), whatever their order.
5. What an operation says of its steps is made true: it began when its first step did, and none of its steps goes on
   after its end. Where none of it was there before, that was done in step 2.
6. Progress, log records and what workers tell of themselves are stored.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, and_, case, delete, exists, func, or_, select, update
from sqlalchemy.orm import aliased

from kser.errors import StorageError
from kser.progress import SEPARATOR
from kser.status import Status
from kser.storage.bulk import BulkInsert, BulkUpdate, Packed, all_rows, among, columns_of, to_time
from kser.storage.database import Database, insert, need_not_last, number_in_order
from kser.storage.folding import ENDED_WITH_OPERATION, ENDS, FOLDED, begin, begin_and_end, fold
from kser.storage.history import worker_state
from kser.storage.records import RUN_SENT, LogTold, ProgressTold, Told, WorkerTold, name_of_root, of_root, parse, stored
from kser.storage.schema import Tables
from kser.storage.values import dump_any_json, from_ms, load_json, now
from kser.transport import Partition, Record
from kser.transport.partitioner import partition_of

__all__ = ["Batch", "Heard", "Projection", "StaleError"]

_RUNNING = str(Status.RUNNING)
#: Columns of JSON among those that fold() gives.
_JSON = ("params", "retval", "exception", "exception_tb")
#: Columns of a new row of the table build.
_BUILD = (*FOLDED, "uuid", "job_id", "group_name")
#: Those of the table event.
_EVENT = (
    *("identity", "type", "uuid", "root", "run", "position", "attempt", "phase", "worker", "data"),
    *("cluster", "topic", "partition", "offset"),
)
#: How many rows that are there are known of, so that they are not made again: 100 bytes each.
_KNOWN = 100_000
#: The end of a note at a task that waits because its worker is gone.
_WAITS = ": it waits for another one"
#: A worker that runs a task for so long has told of itself, if it ever does: that is every few seconds.
_UNHEARD = timedelta(minutes=10)


class StaleError(Exception):
    """Another recorder has stored records of these partitions: look where it left off."""


class _GoneError(Exception):
    """A row that was known to be there is not: somebody deleted it."""


class _Old(NamedTuple):
    """What counts of a row of the table build that was there. Times as in all_rows()."""

    id: int
    uuid: str
    job_id: str
    entrypoint: str
    job_config: str | None
    created: Any
    run: int
    status: str
    start_time: Any


class Heard(NamedTuple):
    """Up to when it is known what workers told of themselves."""

    #: Partitions of the telemetry topic: what a worker tells of itself goes to that of its name.
    partitions: int
    #: By the number of such a partition: all that was told there by then is stored.
    until: Mapping[int, datetime]

    def of(self, worker: str) -> datetime | None:
        """Up to when it is known of this worker; None: it is not."""
        if not self.until:
            return None
        return self.until.get(partition_of(worker.encode("utf-8", "surrogatepass"), self.partitions))


class Batch(NamedTuple):
    """What records tell, by kind, each in the order it was told."""

    #: The first offset of each partition, and the one behind its last.
    firsts: dict[Partition, int]
    ends: dict[Partition, int]
    events: list[Told]
    progress: list[ProgressTold]
    logs: list[LogTold]
    workers: list[WorkerTold]
    #: The events by what they tell of.
    by_uuid: dict[str, list[Told]]
    #: What is told of operations and tasks.
    about: list[Told]
    #: Uuids of operations around what is told of, and of all else that is; in the order in which rows are made.
    roots: list[str]
    rest: list[str]
    #: Those of them that may be told of again, and those that hardly are: they have ended.
    going_on: dict[str, None]
    ended: list[str]
    #: By their uuids the rows of those that may be new, as they are when they are.
    rows: dict[str, dict[str, Any]]
    #: The same rows, and those of the events, as the driver takes them.
    packed: dict[str, Any]
    packed_events: Packed


class Projection:
    """Puts records into a storage. See the module.

    Args:
        database: of a SqlStorage with its tables.
        cluster: id of the Kafka cluster that the records are of.
        group: whose events they are.

    Thread rule: one thread uses it at a time, but for prepare(). Any number of them, in any processes, may work on one
    database.
    """

    def __init__(self, database: Database, cluster: str, group: str) -> None:
        self._database = database
        self._tables: Tables = database.tables
        self._cluster = cluster
        self._group = group
        dialect = database.engine.dialect.name
        self._insert_builds = BulkInsert(self._tables.build, _BUILD, dialect)
        self._update_builds = BulkUpdate(self._tables.build, [*FOLDED, "job_id", "group_name"], key="id")
        self._insert_events = BulkInsert(self._tables.event, _EVENT, dialect)
        #: Whether none of the rows of the last batch that might be there was: of operations around others, of the rest.
        self._new_before = [False, False]
        #: Uuids of rows that are there and may be told of again, in the order in which they were first told of.
        self._known: dict[str, None] = {}
        #: Next offset of each partition, as this process knows it is stored; None: nothing is stored.
        self._next: dict[Partition, int | None] = {}

    def positions(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """The next offset to record of each of these partitions; None where nothing of it is recorded."""
        projection = self._tables.projection
        query = select(projection).where(projection.c.cluster == self._cluster)
        with self._database.read() as connection:
            found = {Partition(row.topic, row.partition): row.next_offset for row in connection.execute(query)}
        looked_up = {partition: found.get(partition) for partition in partitions}
        self._next |= looked_up
        return looked_up

    def is_stored(self, partition: Partition, end: int) -> bool:
        """Whether this process knows that all of it below this offset is stored."""
        return (self._next.get(partition) or 0) >= end

    def moved(self, partitions: Iterable[Partition]) -> set[Partition]:
        """Those of these partitions that are not stored as far as this process knew: another one moved them."""
        known = dict(self._next)
        return {place for place, offset in self.positions(partitions).items() if offset != known.get(place)}

    def forget(self, partitions: Iterable[Partition]) -> None:
        """Drop what is known of partitions that another recorder has now."""
        for partition in partitions:
            self._next.pop(partition, None)

    def prepare(self, records: Sequence[Record]) -> Batch:
        """What these records tell, for apply(). It looks at nothing stored: another thread may do that meanwhile."""
        events: list[Told] = []
        progress: list[ProgressTold] = []
        logs: list[LogTold] = []
        workers: list[WorkerTold] = []
        lists: dict[type, list[Any]] = {Told: events, ProgressTold: progress, LogTold: logs, WorkerTold: workers}
        firsts: dict[Any, int] = {}
        ends: dict[Any, int] = {}
        for record in records:
            place = record[:2]  # as good as a Partition in a dict, and there at once
            if place not in ends:
                firsts[place] = record.offset
            ends[place] = record.offset + 1
            told = parse(record, self._cluster)
            if told is not None:
                lists[type(told)].append(told)
        about = [*events, *(told.about for told in progress), *(told.about for told in logs)]
        roots = {told.root for told in about if told.root is not None}
        rest = {told.uuid for told in about} - roots
        by_uuid = _by_uuid(events)
        known = self._known
        rows = self._rows(events, by_uuid, about, {uuid for uuids in (roots, rest) for uuid in uuids if uuid in known})
        packed = self._insert_builds.pack(columns_of(list(rows.values()), _BUILD))
        ended = [uuid for uuid, own in by_uuid.items() if any(told.type in ENDS for told in own)]
        return Batch(
            {Partition(*place): offset for place, offset in firsts.items()},
            {Partition(*place): offset for place, offset in ends.items()},
            events,
            progress,
            logs,
            workers,
            by_uuid,
            about,
            sorted(roots),
            sorted(rest),
            dict.fromkeys((roots | rest).difference(ended)),
            ended,
            rows,
            dict(zip(rows, packed, strict=True)),
            self._insert_events.pack(_columns(events)),
        )

    def apply(self, records: Sequence[Record], *, prepared: Batch | None = None, pass_over: bool = False) -> int:
        """Store these records, those of partitions that positions() was asked for; how many of them were new.

        Args:
            records: each partition's in its order.
            prepared: what prepare() made of them, which serves once.
            pass_over: go on behind them, and store nothing of what they tell.

        Raises StaleError when another recorder was faster, and StorageError: nothing is stored in either case.
        """
        fresh: Sequence[Record]
        if prepared is not None and not pass_over and self._are_next(prepared):
            fresh, upto = records, prepared.ends
        else:
            fresh, upto = self._fresh(records)
            prepared = self.prepare([] if pass_over else fresh)
        if not fresh:
            return 0
        try:
            self._write(prepared, upto)
        except _GoneError:
            self._known.clear()
            try:
                self._write(self.prepare(fresh), upto)
            except _GoneError:
                raise StorageError("Rows were deleted while they were recorded") from None
        self._next |= upto
        return len(fresh)

    def _write(self, batch: Batch, upto: Mapping[Partition, int]) -> None:
        with self._database.write() as connection:
            need_not_last(connection)  # the offsets go with it
            self._claim(connection, upto)
            self._store(connection, batch)
        self._remember(batch)

    def _remember(self, batch: Batch) -> None:
        """Know what is there, but what will hardly be told of again."""
        known = self._known
        known.update(batch.going_on)
        for uuid in batch.ended:
            known.pop(uuid, None)
        for uuid in list(islice(known, max(len(known) - _KNOWN, 0))):  # at once: each look for the first is a long one
            del known[uuid]

    def is_new(self, record: Record) -> bool:
        """Whether it is of a partition that positions() was asked for, and behind all that is recorded of that."""
        return record.of in self._next and record.offset >= (self._next[record.of] or 0)

    def _are_next(self, batch: Batch) -> bool:
        """Whether all of its records are of partitions that positions() was asked for, and behind what is there."""
        known = self._next
        return all(place in known and first >= (known[place] or 0) for place, first in batch.firsts.items())

    def _fresh(self, records: Sequence[Record]) -> tuple[list[Record], dict[Partition, int]]:
        """Those of partitions that positions() was asked for that are behind all recorded there, and their ends."""
        starts = {place: offset or 0 for place, offset in self._next.items()}
        fresh: list[Record] = []
        ends: dict[Partition, int] = {}
        for record in records:
            place: Any = record[:2]
            start = starts.get(place)
            if start is not None and record.offset >= start:
                fresh.append(record)
                if record.offset >= ends.get(place, 0):
                    ends[place] = record.offset + 1
        return fresh, {Partition(*place): end for place, end in ends.items()}

    def close_dead(self, heard: Heard | None = None) -> int:
        """See that nothing is RUNNING for ever; the number of tasks that were not running any more.

        A task whose worker is gone, or was never heard of, waits for another one: PENDING, until one
        takes it up, or until its worker is heard of again and still runs it. A task whose operation has ended is
        ABORTED.

        Args:
            heard: of whom it is known that they are silent, and do not just wait to be read; None: of all.
        """
        build = self._tables.build
        with self._database.write() as connection:
            closed = self._end_steps(connection, None)
            for row in self._with_workers(connection, Status.RUNNING):
                at = now() if heard is None else heard.of(row.worker)
                if at is not None and (why := _why_gone(row, at)) is not None:
                    here = self._still(row, Status.RUNNING)
                    waits = update(build).where(here).values(status=str(Status.PENDING), note=why)
                    closed += connection.execute(waits).rowcount
            for row in self._with_workers(connection, Status.PENDING):
                if (row.note or "").endswith(_WAITS) and _runs(row):
                    here = self._still(row, Status.PENDING)
                    connection.execute(update(build).where(here).values(status=_RUNNING, note=None))
        return closed

    def _with_workers(self, connection: Connection, status: Status) -> Sequence[Row[Any]]:
        """Tasks of this group with this status that a worker has, or had, each with what that told of itself."""
        build, worker = self._tables.build, self._tables.worker
        of_worker = and_(worker.c.name == build.c.worker, worker.c.group_name == build.c.group_name)
        query = (
            select(build.c.id, build.c.worker, build.c.start_time, build.c.created, build.c.uuid, build.c.note, worker)
            .outerjoin(worker, of_worker)
            .where(~build.c.finished, build.c.status == str(status), build.c.kind == "task")
            .where(build.c.worker.is_not(None), build.c.group_name == self._group)
        )
        return connection.execute(query).all()

    def _still(self, row: Row[Any], status: Status) -> ColumnElement[bool]:
        """Whether nothing has been recorded of a task meanwhile that matters."""
        build = self._tables.build
        return and_(
            build.c.id == row.id, ~build.c.finished, build.c.status == str(status), build.c.worker == row.worker
        )

    def end_lost(self, clusters: str) -> int:
        """End what goes on in this group and was told by other clusters whose ids begin so; the number of rows.

        For those that lived in the memory of a process: what they held is gone, and nobody will ever end it.
        """
        build, event = self._tables.build, self._tables.event
        told = exists().where(or_(event.c.uuid == build.c.uuid, event.c.root == build.c.uuid))
        lost = told.where(event.c.cluster.startswith(clusters, autoescape=True), event.c.cluster != self._cluster)
        here = and_(~build.c.finished, build.c.group_name == self._group, lost)
        values = ENDED_WITH_OPERATION | {"note": "the broker that held it lived in memory, and has ended"}
        with self._database.write() as connection:
            return connection.execute(update(build).where(here).values(values)).rowcount

    def add_workers(self, workers: Sequence[WorkerTold]) -> None:
        """Store what workers told of themselves, wherever that stands; what is newer of them stays."""
        with self._database.write() as connection:
            self._add_workers(connection, workers)

    def forget_topics(self, starts: Mapping[Partition, int]) -> None:
        """Begin these partitions again: forget their offsets, and their events from these offsets on.

        ``starts``: the first offset there still is. What was told before it is proved by nothing but the storage: kept.
        """
        projection, event = self._tables.projection, self._tables.event
        with self._database.write() as connection:
            for (topic, partition), start in starts.items():
                for table in (projection, event):
                    here = [
                        table.c.cluster == self._cluster,
                        table.c.topic == topic,
                        table.c.partition == partition,
                    ]
                    if table is event:
                        here.append(event.c.offset >= start)
                    connection.execute(delete(table).where(*here))
                self._next.pop(Partition(topic, partition), None)

    # -- one batch -----------------------------------------------------------------------------------------------------

    def _claim(self, connection: Connection, upto: Mapping[Partition, int]) -> None:
        projection = self._tables.projection
        for partition, offset in sorted(upto.items()):  # in one order everywhere, so that no two wait for each other
            expected = self._next[partition]
            values = {"next_offset": offset, "updated": now()}
            key = {"cluster": self._cluster, "topic": partition.topic, "partition": partition.partition}
            if expected is None:
                statement = insert(connection, projection).values(**key, **values).on_conflict_do_nothing()
            else:
                here = [projection.c[name] == value for name, value in key.items()]
                statement = update(projection).where(*here, projection.c.next_offset == expected).values(values)
            if connection.execute(statement.returning(projection.c.partition)).first() is None:
                raise StaleError(f"{partition.topic}[{partition.partition}] is not at {expected} any more")

    def _store(self, connection: Connection, batch: Batch) -> None:
        if batch.about:
            made, old = self._make_builds(connection, batch)
            changed = self._changed(connection, batch.events, made, old)
            before = self._stored(connection, changed)
            self._add_events(connection, batch)
            begun = self._refold(connection, changed, before, batch)
            roots = _unsettled(batch, made, old, {row.uuid for row in changed})
            self._settle_roots(connection, roots, begun)
            shown = [told.about for told in batch.progress] + [told.about for told in batch.logs]
            ids = self._ids(connection, {told.uuid for told in shown})
            self._add_progress(connection, batch.progress, ids)
        self._add_workers(connection, batch.workers)
        if batch.logs:  # last of all: others wait with theirs until the end of the transaction
            self._add_logs(connection, batch.logs, ids)

    def _make_builds(self, connection: Connection, batch: Batch) -> tuple[set[str], dict[str, _Old]]:
        """A row for everything that is told of and the operations around it, locked until the end.

        Gives the uuids of those that were made here, and the rows that were there before. A new one is made from the
        events of this batch, which are all there are of it.

        Root operations first: who has one may change all that is in it, and nobody waits for another in a circle.
        """
        all_made: set[str] = set()
        old: dict[str, _Old] = {}
        for kind, uuids in enumerate((batch.roots, batch.rest)):
            fresh = [uuid for uuid in uuids if uuid in batch.rows]
            made = self._make_rows(connection, batch, fresh, all_new=self._new_before[kind])
            self._new_before[kind] = len(made) == len(fresh)
            if len(made) < len(uuids):
                there = [uuid for uuid in uuids if uuid not in made]
                found = self._locked(connection, there)
                if len(found) < len(there):
                    raise _GoneError
                old |= found
            all_made |= made
        return all_made, old

    def _rows(
        self,
        events: Sequence[Told],
        by_uuid: Mapping[str, list[Told]],
        about: Sequence[Told],
        known: Collection[str],
    ) -> dict[str, dict[str, Any]]:
        """By its uuid the row of each of these, as it is when there was none before; but of those that are known."""
        rows: dict[str, dict[str, Any]] = {}
        for uuid, own in by_uuid.items():
            if uuid not in known and (values := fold(own)) is not None:
                _dump(values)
                values["uuid"], values["job_id"], values["group_name"] = uuid, values["entrypoint"], self._group
                rows[uuid] = values
        for told in about:
            if told.uuid not in rows and told.uuid not in known:
                rows[told.uuid] = self._first_row(told, told.uuid)
            if told.root is not None and told.root not in rows and told.root not in known:
                rows[told.root] = self._first_row(told, told.root)
        within: dict[str, list[dict[str, Any]]] = {}
        for uuid, row in rows.items():
            if row["root"] is not None and row["root"] != uuid:
                within.setdefault(row["root"], []).append(row)
        if within:
            own_runs = {(told.uuid, told.run) for told in events}
            for root, steps in within.items():
                if root in rows:
                    begin_and_end(rows[root], steps, told_of_itself=(root, rows[root]["run"]) in own_runs)
        return rows

    def _make_rows(self, connection: Connection, batch: Batch, uuids: Sequence[str], *, all_new: bool) -> set[str]:
        """Make those of these rows that are not there; the uuids of which it is known that they were made here.

        ``all_new``: most likely none is there, and one that is costs no more than a try.
        """
        if not uuids:
            return set()
        if all_new and self._insert_builds.all_or_none(connection, [batch.packed[uuid] for uuid in uuids]):
            return set(uuids)
        column = self._tables.build.c.uuid
        there = {row[0] for row in all_rows(connection, select(column).where(among(connection, column, uuids)))}
        new = [uuid for uuid in uuids if uuid not in there]
        made = self._insert_builds(
            connection, [batch.packed[uuid] for uuid in new], lambda: [batch.rows[uuid] for uuid in new]
        )
        # Fewer: another recorder made some of them meanwhile.
        return set(new) if made == len(new) else set()

    def _locked(self, connection: Connection, uuids: Sequence[str]) -> dict[str, _Old]:
        if not uuids:
            return {}
        build = self._tables.build
        query = select(*(build.c[name] for name in _Old._fields)).where(among(connection, build.c.uuid, uuids))
        found = all_rows(connection, query.order_by(build.c.uuid).with_for_update())
        return {row[1]: _Old(*row) for row in found}

    def _ids(self, connection: Connection, uuids: Collection[str]) -> dict[str, int]:
        if not uuids:
            return {}
        build = self._tables.build
        query = select(build.c.uuid, build.c.id).where(among(connection, build.c.uuid, sorted(uuids)))
        return {row[0]: row[1] for row in all_rows(connection, query)}

    def _first_row(self, told: Told, uuid: str) -> dict[str, Any]:
        """What is known of something before an event of its own is told: it runs."""
        own = told.uuid == uuid
        return dict.fromkeys(FOLDED) | {
            "uuid": uuid,
            "kind": "task" if own else "operation",
            "job_id": told.entrypoint if own else "",
            "entrypoint": told.entrypoint if own else name_of_root(told),
            "root": told.root,
            "parent": told.parent if own else None,
            "is_top": told.root is None or told.root == uuid,
            "run": told.run,
            "position": told.position if own else 0,
            "attempt": told.attempt if own else 1,
            "status": str(Status.RUNNING),
            "created": from_ms(told.at_ms) or now(),
            "started": True,
            "finished": False,
            "worker": (told.worker or None) if own else None,
            "group_name": self._group,
        }

    def _add_events(self, connection: Connection, batch: Batch) -> None:
        # Of one operation they are numbered in the order of commits without number_in_order(): whoever adds one of it
        # has its row in the table build, locked by _make_builds(), from before it takes numbers until the commit.
        self._insert_events(
            connection,
            batch.packed_events,
            lambda: [dict(zip(_EVENT, values, strict=True)) for values in zip(*_columns(batch.events), strict=True)],
        )

    def _changed(
        self, connection: Connection, events: Sequence[Told], made: Collection[str], old: Mapping[str, _Old]
    ) -> list[_Old]:
        """The rows that must be computed anew because of these events."""
        changed: set[str] = set()
        for told in events:
            if told.uuid not in made:
                changed.add(told.uuid)
                if told.root is not None:  # when the operation began follows from when this one did
                    changed.add(told.root)
            elif told.type == RUN_SENT and told.root is not None and told.root not in made:
                changed.add(told.root)
        missing = sorted(uuid for uuid in changed if uuid not in old)
        rows: dict[str, _Old] = dict(old)
        rows |= self._locked(connection, missing)
        return [rows[uuid] for uuid in sorted(changed)]

    def _stored(self, connection: Connection, rows: Sequence[_Old]) -> dict[str, list[Told]]:
        """All events of these rows that were stored before. None is added meanwhile: their rows are locked."""
        if not rows:
            return {}
        event = self._tables.event
        uuids = [row.uuid for row in rows]
        told_of = or_(
            among(connection, event.c.uuid, uuids),
            and_(event.c.type == RUN_SENT, among(connection, event.c.root, uuids)),
        )
        return _by_uuid(map(stored, all_rows(connection, select(event).where(told_of))))

    def _refold(
        self,
        connection: Connection,
        rows: Sequence[_Old],
        before: Mapping[str, list[Told]],
        batch: Batch,
    ) -> set[str]:
        """Compute these rows anew from all of their events; what no event decides stays as it is.

        Operations that others are in begin with the first of these, so they come last. Gives the uuids of those.
        """
        if not rows:
            return set()
        roots = set(batch.roots)
        events = {row.uuid: _together(before.get(row.uuid, ()), batch.by_uuid.get(row.uuid, ())) for row in rows}
        changes = [self._columns(row, own) for row in rows if (own := fold(events[row.uuid])) is not None]
        self._update_builds(connection, [values for values in changes if values["uuid"] not in roots])
        last = {values["uuid"]: values for values in changes if values["uuid"] in roots}
        began = self._began(connection, sorted(last))
        for uuid, values in last.items():
            begin(values, began.get((uuid, values["run"])))
        self._update_builds(connection, list(last.values()))
        return set(last)

    def _began(self, connection: Connection, roots: Sequence[str]) -> dict[tuple[str, int], datetime | None]:
        """When the first step of each run of these operations began."""
        if not roots:
            return {}
        build = self._tables.build
        query = select(build.c.root, build.c.run, func.min(build.c.start_time))
        steps = and_(among(connection, build.c.root, roots), build.c.root != build.c.uuid)
        found = all_rows(connection, query.where(steps).group_by(build.c.root, build.c.run))
        return {(row[0], row[1]): to_time(row[2]) for row in found}

    def _columns(self, row: _Old, values: dict[str, Any]) -> dict[str, Any]:
        _dump(values)
        values |= {
            "id": row.id,
            "uuid": row.uuid,
            "group_name": self._group,
            "job_id": row.job_id or values["entrypoint"],
        }
        if not values["entrypoint"]:  # a new run is all that is told of it
            values["entrypoint"] = row.entrypoint
        if row.job_config is not None:  # somebody created it before it was sent
            values["created"] = to_time(row.created)
        return values

    def _settle_roots(self, connection: Connection, roots: Sequence[str], begun: Collection[str]) -> None:
        if early := [root for root in roots if root not in begun]:
            self._begin_roots(connection, early)
        if roots:
            self._wake_roots(connection, roots)
            self._end_steps(connection, roots)

    def _begin_roots(self, connection: Connection, roots: Sequence[str]) -> None:
        """An operation, or a new run of it, began when the first of its steps did; its own event is told after that."""
        build = self._tables.build
        step = aliased(build)
        first = (
            select(step.c.root, step.c.run, func.min(step.c.start_time).label("began"))
            .where(among(connection, step.c.root, roots), step.c.root != step.c.uuid, step.c.start_time.is_not(None))
            .group_by(step.c.root, step.c.run)
            .subquery("first")
        )
        earlier = or_(build.c.start_time.is_(None), first.c.began < build.c.start_time)
        here = and_(build.c.uuid == first.c.root, build.c.run == first.c.run, earlier)
        created = case((build.c.created > first.c.began, first.c.began), else_=build.c.created)
        connection.execute(update(build).where(here).values(start_time=first.c.began, created=created))

    def _wake_roots(self, connection: Connection, roots: Sequence[str]) -> None:
        """A run that was sent goes on once a step of it is told of, unless it tells of itself, that it waits say."""
        build, event = self._tables.build, self._tables.event
        step = aliased(build)
        own = exists().where(event.c.uuid == build.c.uuid, event.c.run == build.c.run)
        stepped = exists().where(
            step.c.root == build.c.uuid, step.c.uuid != build.c.uuid, step.c.run == build.c.run, step.c.started
        )
        sent = and_(among(connection, build.c.uuid, roots), build.c.status == str(Status.PENDING), ~own, stepped)
        connection.execute(update(build).where(sent).values(status=str(Status.RUNNING), note=None))

    def _end_steps(self, connection: Connection, roots: Sequence[str] | None) -> int:
        """End what goes on in runs of these operations (None: of all) that are over; the number of steps.

        A run is over when its end was told, or a newer one began. When such a step ended is not known.
        """
        build = self._tables.build
        root = aliased(build)
        newer = or_(root.c.run > build.c.run, and_(root.c.run == build.c.run, root.c.finished))
        # Of an operation that only its steps tell of the run is not known, and it is not listed as a job.
        over = exists().where(root.c.uuid == build.c.root, root.c.job_id != "", newer)
        here = and_(~build.c.finished, build.c.root.is_not(None), build.c.root != build.c.uuid, over)
        if roots is not None:
            here = and_(among(connection, build.c.root, roots), here)
        return connection.execute(update(build).where(here).values(ENDED_WITH_OPERATION)).rowcount

    def _add_progress(self, connection: Connection, progress: Sequence[ProgressTold], ids: Mapping[str, int]) -> None:
        if not progress:
            return
        table = self._tables.build_progress
        statement = insert(connection, table)
        new = statement.excluded
        later = or_(new.began > table.c.began, and_(new.began == table.c.began, new.n >= table.c.n))
        names = ("current", "total", "status_line", "began", "n")
        statement = statement.on_conflict_do_update(
            index_elements=["build_id", "group_name"], set_={name: new[name] for name in names}, where=later
        )
        values = [
            {
                "build_id": ids[told.about.uuid],
                "group_name": SEPARATOR.join(told.group),
                "current": told.current,
                "total": told.total,
                "status_line": told.status_line,
                "began": told.about.began_ms,
                "n": told.n,
            }
            for told in progress
        ]
        connection.execute(statement, values)

    def _add_logs(self, connection: Connection, logs: Sequence[LogTold], ids: Mapping[str, int]) -> None:
        number_in_order(connection, self._tables.log)
        values = [
            {
                "build_id": ids[told.about.uuid],
                "created": from_ms(told.about.at_ms) or now(),
                "level": told.level,
                "logger": told.logger,
                "message": told.message,
                "exception": None if told.exception is None else dump_any_json(told.exception),
                "exception_tb": None if told.traceback is None else dump_any_json(told.traceback),
                "worker": told.about.worker,
                "identity": told.about.identity,
            }
            for told in logs
        ]
        connection.execute(insert(connection, self._tables.log).on_conflict_do_nothing(), values)

    def _add_workers(self, connection: Connection, workers: Sequence[WorkerTold]) -> None:
        if not workers:
            return
        table = self._tables.worker
        statement = insert(connection, table)
        new = statement.excluded
        names = ("state", "started", "seen", "interval_s", "data")
        statement = statement.on_conflict_do_update(
            index_elements=["name", "group_name"],
            set_={name: new[name] for name in names},
            where=new.seen >= table.c.seen,
        )
        newest = {told.name: told for told in sorted(workers, key=lambda told: told.seen)}
        heard = now()
        values = [
            {
                "name": told.name,
                "group_name": self._group,
                "state": told.state,
                "started": from_ms(told.started_ms),
                # A clock that is ahead would keep a worker alive that has died.
                "seen": min(told.seen, heard),
                "interval_s": told.interval_s,
                "data": dump_any_json(told.data),
            }
            for _, told in sorted(newest.items())
        ]
        connection.execute(statement, values)


def _unsettled(batch: Batch, made: Collection[str], old: Mapping[str, _Old], changed: Collection[str]) -> Sequence[str]:
    """The operations of which it must be looked at what they say of their steps, once these are stored.

    Where the operation and all that was told of it were made here, it was true before they were stored. Nor does the
    look change anything where a step was made that began after an operation of the same run that goes on.
    """
    roots: set[str] = set()
    for told in batch.about:
        root = told.root
        if root is None or root in roots:
            continue
        if told.uuid not in made:
            if root in changed or root in made:
                roots.add(root)
        elif root not in made:
            step, around = batch.rows[told.uuid], old[root]
            began, start = step["start_time"], to_time(around.start_time)
            plain = root not in changed and around.run == step["run"] and around.status == _RUNNING
            if not plain or (began is not None and (start is None or began < start)):
                roots.add(root)
    return sorted(roots)


def _by_uuid(events: Iterable[Told]) -> dict[str, list[Told]]:
    """Events by what they tell of; of one and its repetitions the first."""
    seen: set[str] = set()
    found: dict[str, list[Told]] = {}
    for told in events:
        if told.identity in seen:
            continue
        seen.add(told.identity)
        found.setdefault(told.uuid, []).append(told)
        if told.type == RUN_SENT and (around := of_root(told)) is not None:
            found.setdefault(around.uuid, []).append(around)
    return found


def _together(before: Sequence[Told], new: Sequence[Told]) -> list[Told]:
    """Events of one uuid, but what repeats one that was there before."""
    there = {told.identity for told in before}
    return [*before, *(told for told in new if told.identity not in there)]


def _columns(events: Sequence[Told]) -> list[list[Any]]:
    """The values of each column of the table event."""
    return [
        [told.identity for told in events],
        [told.type for told in events],
        [told.uuid for told in events],
        [told.root for told in events],
        [told.run for told in events],
        [told.position for told in events],
        [told.attempt for told in events],
        [told.phase for told in events],
        [told.worker for told in events],
        [told.text for told in events],
        *([told.place[number] for told in events] for number in range(4)),
    ]


def _dump(values: dict[str, Any]) -> None:
    """Have JSON as text in these columns."""
    for name in _JSON:
        if (value := values[name]) is not None:
            values[name] = dump_any_json(value)


def _why_gone(row: Row[Any], at: datetime) -> str | None:
    """Why the task in this row did not run any more by then; None when it may have."""
    if row.name is None:
        if at - (row.start_time or row.created) < _UNHEARD:
            return None
        return f"worker {row.worker} was never heard of{_WAITS}"
    state = worker_state(row, at)
    if state == "stopped":
        return f"worker {row.worker} has stopped{_WAITS}"
    if state == "gone":
        return f"worker {row.worker} was not heard of since {_shown(row.seen)}{_WAITS}"
    if row.started is not None and row.start_time is not None and row.started - row.start_time > timedelta(seconds=1):
        return f"worker {row.worker} was started anew at {_shown(row.started)}: it waits to be taken up again"
    return None


def _runs(row: Row[Any]) -> bool:
    """Whether the worker in this row, which was taken for gone, tells that it runs the task."""
    if row.name is None or worker_state(row) in ("gone", "stopped"):
        return False
    data = load_json(row.data)
    running, count = data.get("running"), data.get("running_count")
    if not isinstance(running, list):
        return False
    if isinstance(count, int) and count > len(running):  # not all of very many are listed
        return True
    return any(isinstance(one, dict) and one.get("uuid") == row.uuid for one in running)


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
