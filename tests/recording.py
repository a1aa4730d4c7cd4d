"""For tests of storages that are fed with events: records as workers tell them, and what a storage then holds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from kser.events import Event
from kser.storage.sql import SqlStorage
from kser.transport import Partition, Record, Transport

__all__ = ["Tape", "differences", "snapshot"]

#: Milliseconds since the epoch of the first record of a Tape.
START_MS = 1_790_000_000_000


class Tape:
    """Records of the two topics of a group, in the order they are told. Time goes on by a second with each.

    Args:
        group: whose topics.
    """

    def __init__(self, group: str = "shop") -> None:
        self.group = group
        self.records: list[Record] = []
        self._offsets: dict[Partition, int] = {}

    @property
    def now_ms(self) -> int:
        """The time of the next record."""
        return START_MS + len(self.records) * 1000

    def event(self, kind: str, uuid: str, entrypoint: str = "shop.Task", **fields: Any) -> Record:
        """Add an event; ``fields`` are those of kser.events.Event, and what else it may say."""
        known = {name: fields.pop(name) for name in list(fields) if name in Event._fields}
        event = Event(type=kind, uuid=uuid, entrypoint=entrypoint, **{"at": self.now_ms, "worker": "w1", **known})
        data = json.loads(event.to_bytes()) | fields
        return self.add(f"{self.group}.events", event.key, data)

    def telemetry(self, kind: str, uuid: str, **fields: Any) -> Record:
        """Add a record of a task's telemetry."""
        data = {"v": 1, "type": kind, "uuid": uuid, "entrypoint": "shop.Task", "operation": None, "parent": None}
        data |= {
            "run": 1,
            "position": 0,
            "attempt": 1,
            "at": self.now_ms,
            "began": self.now_ms,
            "worker": "w1",
        } | fields
        return self.add(f"{self.group}.telemetry", data["operation"] or uuid, data)

    def worker(self, name: str = "w1", **fields: Any) -> Record:
        """Add what a worker tells of itself."""
        data = {"v": 1, "type": "worker.state", "at": self.now_ms, "worker": name, "group": self.group, "host": "h"}
        data |= {"pid": 7, "version": "1.0", "python": "3.11", "started": START_MS, "interval_s": 5.0}
        return self.add(f"{self.group}.telemetry", name, data | {"state": "running", "running": []} | fields)

    def add(self, topic: str, key: str, data: Mapping[str, Any] | bytes, partition: int | None = None) -> Record:
        """Add any record."""
        value = data if isinstance(data, bytes) else json.dumps(data).encode()
        number = sum(_key(key)) % 2 if partition is None else partition
        place = Partition(topic, number)
        # Gaps, as transaction markers leave them.
        offset = self._offsets[place] = self._offsets.get(place, -2) + 2
        record = Record(topic, number, offset, _key(key), value, [], self.now_ms)
        self.records.append(record)
        return record

    def operation(self, uuid: str, steps: int = 2, *, failed: int | None = None, run: int = 1) -> None:
        """Add a whole operation; ``failed``: the position of the step that fails it."""
        said: dict[str, Any] = {"operation": uuid, "run": run}
        for position in range(steps):
            step = f"{uuid}/{position}"
            self.telemetry("task.started", step, parent=uuid, position=position, **said)
            if position == 0:
                self.event("operation.started", uuid, "shop.Order", status="RUNNING", params={"of": uuid}, **said)
            retcode = 500 if position == failed else 0
            outcome = {"status": "FAILED" if retcode else "SUCCESS", "result": result(step, retcode)}
            kind = "step.failed" if retcode else "step.done"
            self.event(kind, step, parent=uuid, position=position, **outcome, **said)
            if retcode:
                break
        self.event("operation.ended", uuid, "shop.Order", position=position, **outcome, **said)

    @property
    def partitions(self) -> list[Partition]:
        """Where there are records."""
        return sorted(self._offsets)


def _key(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def result(uuid: str, retcode: int = 0) -> Any:
    """A Result, failed with an error as kser makes it when ``retcode`` is not 0."""
    from kser import Result

    if not retcode:
        return Result(uuid=uuid, stdout="done\n", retval={"by": uuid})
    error = {"code": retcode, "name": "InternalError", "message": "no luck", "msgid": "ERR-1", "extra": {}}
    return Result(uuid=uuid, retcode=retcode, stderr="no luck\nat all", retval={"error": error | {"stack": "Trace"}})


def snapshot(storage: SqlStorage) -> dict[str, list[dict[str, Any]]]:
    """All that a storage holds, by table, without the numbers of its rows and the offsets."""
    tables = storage.database.tables
    names = {}
    with storage.database.read() as connection:
        for row in connection.execute(select(tables.build.c.id, tables.build.c.uuid)):
            names[row.id] = row.uuid
        held = {}
        for table in (tables.build, tables.build_progress, tables.log, tables.event, tables.worker):
            rows = [dict(row._mapping) for row in connection.execute(select(table))]
            for row in rows:
                row.pop("id", None)
                if "build_id" in row:
                    row["build_id"] = names[row["build_id"]]
            held[table.name.removeprefix(tables.prefix)] = sorted(rows, key=repr)
    return held


def differences(storage: SqlStorage, events: Iterable[Event]) -> list[str]:
    """Where the storage tells something else than these events, in the order of their partitions; [] when nowhere.

    A judge of its own: it knows nothing of how the storage is made. Of an event that was told twice the first counts.
    """
    ends: dict[str, Event] = {}
    started: dict[str, Event] = {}
    for event in events:
        if event.type == "operation.started":
            if event.uuid not in started or event.run > started[event.uuid].run:
                started[event.uuid] = event
        elif event.type in ("step.done", "step.failed", "step.aborted", "operation.ended") and (
            event.uuid not in ends or event.run > ends[event.uuid].run
        ):
            ends[event.uuid] = event
    found = []
    known = {row["uuid"]: row for row in snapshot(storage)["build"]}
    if extra := set(known) - set(ends) - set(started):
        found.append(f"{len(extra)} rows that no event tells of, such as {min(extra)}")
    for uuid, event in ends.items():
        row = known.get(uuid)
        newer = started.get(uuid)
        status, run = event.status, event.run
        if newer is not None and newer.run > event.run:
            status, run = "RUNNING", newer.run
        if row is None:
            found.append(f"{uuid} is missing")
        elif (row["status"], row["run"], row["root"], row["parent"]) != (status, run, event.operation, event.parent):
            found.append(f"{uuid} is {row['status']} in run {row['run']}, told was {status} in run {run}")
        elif status != "RUNNING" and event.result is not None and _result(row) != _told(event):
            found.append(f"{uuid} has the result {_result(row)}, told was {_told(event)}")
    return found


def _result(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["retcode"], row["stdout"], row["stderr"], json.loads(row["retval"])


def _told(event: Event) -> tuple[Any, ...]:
    told = event.result
    assert told is not None
    return told.retcode, told.stdout, told.stderr, json.loads(json.dumps(told.retval))


def read_topic(transport: Transport, topic: str, timeout_s: float = 60) -> Sequence[Record]:
    """All records of a topic, each partition in its order."""
    info = transport.admin().describe([topic])[topic]
    partitions = [Partition(topic, number) for number in range(info.partitions)]
    return [record for batch in transport.read(partitions, timeout_s) for record in batch]
