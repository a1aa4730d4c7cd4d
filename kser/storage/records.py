"""Records of `{group}.events` and `{group}.telemetry` as a storage takes them. Pure; what is none of them is None."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from kser import schemas
from kser.errors import ValidationError
from kser.storage.values import clean_text
from kser.transport import Record

__all__ = ["RUN_SENT", "LogTold", "ProgressTold", "Told", "WorkerTold", "of_root", "parse", "stored"]

#: Version of the format that is read.
_VERSION = 1
_TASK_STARTED = "task.started"
#: What the timeline is made of: it tells of one execution, and nothing of it is ever replaced.
_EVENT_PREFIXES = ("operation.", "step.", "message.", "run.")
#: A new run of an operation, told of its first step.
RUN_SENT = "run.sent"
#: A repetition of these after a redelivery counts as another one.
_BY_ATTEMPT = ("step.retrying", _TASK_STARTED)
#: Longest name, in bytes: PostgreSQL refuses longer ones in an index.
_LONGEST = 1000
#: Largest number in a column of its own.
_LARGEST = 2**31 - 1
_LARGEST_BIG = 2**63 - 1


class Told(NamedTuple):
    """One event of the timeline."""

    identity: str
    type: str
    uuid: str
    entrypoint: str
    root: str | None
    parent: str | None
    run: int
    position: int
    attempt: int
    phase: int
    at_ms: int
    #: When the execution began, 0 when that is not told.
    began_ms: int
    worker: str
    data: Mapping[str, Any]
    #: Where it was told, to compare events of one topic: cluster, topic, partition, offset.
    place: tuple[str, str, int, int]


class ProgressTold(NamedTuple):
    """How far a group of a task has come."""

    about: Told
    group: tuple[str, ...]
    current: int
    total: int
    status_line: str
    n: int


class LogTold(NamedTuple):
    """A log record of a task."""

    about: Told
    level: int
    logger: str
    message: str
    exception: Any
    traceback: Any


class WorkerTold(NamedTuple):
    """A worker about itself."""

    name: str
    group: str
    state: str
    started_ms: int
    seen: datetime
    interval_s: float
    data: Mapping[str, Any]


def parse(record: Record, cluster: str) -> "Told | ProgressTold | LogTold | WorkerTold | None":
    """What a record tells; None when it tells nothing that a storage keeps, or cannot be read."""
    try:
        data = schemas.parse(record.value or b"")
        if data.get("v") != _VERSION:
            return None
        kind = data["type"]
        if kind == "worker.state":
            return _worker(data)
        if kind == "task.progress":
            return _progress(_told(data, record, cluster))
        if kind == "task.log":
            return _log(_told(data, record, cluster))
        if kind == _TASK_STARTED or kind.startswith(_EVENT_PREFIXES):
            return _told(data, record, cluster)
    except (ValidationError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return None


def stored(row: Any) -> Told:
    """The event in a row of the table."""
    place = (row.cluster, row.topic, row.partition, row.offset)
    return _build(schemas.parse(row.data), place, 0, row.identity)


def of_root(told: Told) -> Told | None:
    """What an event of a step tells of the operation around it all; None for all but a new run."""
    if told.type != RUN_SENT or told.root is None or told.root == told.uuid:
        return None
    return told._replace(uuid=told.root, entrypoint="", parent=None, position=0)


def _told(data: Mapping[str, Any], record: Record, cluster: str) -> Told:
    place = (cluster, record.topic, record.partition, record.offset)
    return _build(data, place, record.timestamp_ms, None)


def _build(data: Mapping[str, Any], place: tuple[str, str, int, int], stored_ms: int, identity: str | None) -> Told:
    kind, uuid = _name(data["type"]), _name(data["uuid"])
    if not uuid:
        raise ValueError("no uuid")
    operation, parent = data.get("operation"), data.get("parent")
    told = Told(
        identity="",
        type=kind,
        uuid=uuid,
        entrypoint=_name(data.get("entrypoint", "")),
        root=None if operation is None else _name(operation),
        parent=None if parent is None else _name(parent),
        run=_number(data.get("run", 1)),
        position=_number(data.get("position", 0)),
        attempt=_number(data.get("attempt", 1)),
        phase=_number(data.get("phase", 0)),
        at_ms=_number(data.get("at") or stored_ms, _LARGEST_BIG),
        began_ms=_number(data.get("began") or 0, _LARGEST_BIG),
        worker=_name(data.get("worker") or ""),
        data=data,
        place=place,
    )
    return told._replace(identity=identity or _identity(told))


def _identity(told: Told) -> str:
    """The same for an event and its repetition: an event of a redelivery, an execution told twice."""
    key: list[Any] = [told.root or told.uuid, told.run, told.position, told.phase, told.type, told.uuid]
    key.append(told.attempt if told.type in _BY_ATTEMPT else 0)
    if told.type in (_TASK_STARTED, "task.log"):
        key += [told.worker, told.began_ms]
    if told.type == "task.log":
        key.append(told.data.get("n"))
    if told.type == "message.rejected":
        key.append(told.data.get("note"))  # the coordinates of what was rejected
    # ASCII with escapes: a uuid may hold what UTF-8 has no form for.
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def _progress(about: Told) -> ProgressTold:
    data = about.data
    group = tuple(_text(part) for part in data.get("group") or ())
    return ProgressTold(
        about=about,
        group=group,
        current=_number(data["current"], _LARGEST_BIG, least=-_LARGEST_BIG),
        total=_number(data["total"], _LARGEST_BIG, least=-_LARGEST_BIG),
        status_line=_text(data.get("status_line") or ""),
        n=_number(data.get("n", 0), _LARGEST_BIG),
    )


def _log(about: Told) -> LogTold:
    data = about.data
    return LogTold(
        about=about,
        level=_number(data.get("level", 0)),
        logger=_text(data.get("logger") or ""),
        message=_text(data.get("message") or ""),
        exception=data.get("exception"),
        traceback=data.get("trace"),
    )


def _worker(data: Mapping[str, Any]) -> WorkerTold:
    return WorkerTold(
        name=_name(data["worker"]),
        group=_text(data.get("group") or ""),
        state=_text(data.get("state") or "running"),
        started_ms=_number(data.get("started") or 0, _LARGEST_BIG),
        seen=datetime.fromtimestamp(_number(data["at"], _LARGEST_BIG) / 1000, UTC),
        interval_s=float(data.get("interval_s") or 0),
        data=data,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return clean_text(value)


def _name(value: Any) -> str:
    """A text that is looked up: one that is too long for that is cut, and told apart by its hash."""
    text = _text(value)
    if len(text) * 4 <= _LONGEST or len(raw := text.encode()) <= _LONGEST:
        return text
    return f"{text[:200]}~{hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def _number(value: Any, most: int = _LARGEST, *, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is no number from {least} to {most}")
    return value
