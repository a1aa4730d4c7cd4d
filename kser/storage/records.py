"""Records of `{group}.events` and `{group}.telemetry` as a storage takes them. Pure; what is none of them is None."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from kser import schemas
from kser.errors import ValidationError
from kser.storage.values import clean_text, dump_any_json
from kser.telemetry import END_OF_TIME_MS, LONGEST_INTERVAL_S
from kser.transport import Record

__all__ = [
    "RUN_SENT",
    "LogTold",
    "ProgressTold",
    "Told",
    "WorkerTold",
    "name_of_root",
    "of_root",
    "parse",
    "stored",
    "worker_told",
]

#: Version of the format that is read.
_VERSION = 1
_TASK_STARTED = "task.started"
#: What the timeline is made of: it tells of one execution, and nothing of it is ever replaced.
_EVENT_PREFIXES = ("operation.", "step.", "message.", "run.")
#: A new run of an operation, told of its first step.
RUN_SENT = "run.sent"
#: A repetition of these after a redelivery counts as another one.
_BY_ATTEMPT = frozenset({"step.retrying", _TASK_STARTED})
#: Of these there may be several of one task, position and phase.
_SAID_APART = frozenset({_TASK_STARTED, "task.log", "message.rejected"})
#: Longest name, in bytes: PostgreSQL refuses longer ones in an index.
_LONGEST = 1000
#: Of characters that take one byte, surely short enough.
_SHORT = _LONGEST // 4
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
    #: ``data`` as it is stored.
    text: str
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
        data, text = _read(record.value or b"")
        if data.get("v") != _VERSION:
            return None
        kind = data["type"]
        if kind == _TASK_STARTED or kind.startswith(_EVENT_PREFIXES):
            return _told(data, text, record, cluster)
        if kind == "task.progress":
            return _progress(_told(data, text, record, cluster))
        if kind == "task.log":
            return _log(_told(data, text, record, cluster))
        if kind == "worker.state":
            return worker_told(data)
    except (ValidationError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return None


def stored(row: Any) -> Told:
    """The event in a row of the table, with its columns in their order."""
    _, identity, kind, uuid, root, run, position, attempt, phase, worker, text, *place = row
    data = schemas.parse(text)
    parent = data.get("parent")
    return Told(
        identity,
        kind,
        uuid,
        _often(data.get("entrypoint", "")),
        root,
        None if parent is None else _name(parent),
        run,
        position,
        attempt,
        phase,
        _number(data.get("at") or 0, _LARGEST_BIG),
        _number(data.get("began") or 0, _LARGEST_BIG),
        worker,
        data,
        text,
        tuple(place),
    )


def of_root(told: Told) -> Told | None:
    """What an event of a step tells of the operation around it all; None for all but a new run."""
    if told.type != RUN_SENT or told.root is None or told.root == told.uuid:
        return None
    return told._replace(uuid=told.root, entrypoint="", parent=None, position=0)


def name_of_root(told: Told) -> str:
    """The name in messages of the operation around what is told of; "" when that is not told."""
    name = told.data.get("operation_entrypoint")
    return _often(name) if isinstance(name, str) else ""


def _read(raw: bytes) -> tuple[Any, str]:
    """The JSON in these bytes, and its text for a database: what orjson has read has no NUL and is UTF-8."""
    try:
        return schemas.parse_plain(raw), raw.decode()
    except ValueError:
        data = schemas.parse(raw)
        return data, dump_any_json(data)


def _told(data: Mapping[str, Any], text: str, record: Record, cluster: str) -> Told:
    get = data.get
    kind, uuid, worker = _often(data["type"]), _name(data["uuid"]), _often(get("worker") or "")
    if not uuid:
        raise ValueError("no uuid")
    operation, parent = get("operation"), get("parent")
    root = None if operation is None else _name(operation)
    run, position, phase = _number(get("run", 1)), _number(get("position", 0)), _number(get("phase", 0))
    attempt, began_ms = _number(get("attempt", 1)), _number(get("began") or 0, _LARGEST_BIG)
    # The same for an event and its repetition: an event of a redelivery, an execution told twice.
    key: list[Any] = [root or uuid, run, position, phase, kind, uuid, attempt if kind in _BY_ATTEMPT else 0]
    if kind in _SAID_APART:
        key += _apart(data, kind, worker, began_ms)
    return Told(
        _hashed(key),
        kind,
        uuid,
        _often(get("entrypoint", "")),
        root,
        None if parent is None else _name(parent),
        run,
        position,
        attempt,
        phase,
        _number(get("at") or record.timestamp_ms, _LARGEST_BIG),
        began_ms,
        worker,
        data,
        text,
        (cluster, record.topic, record.partition, record.offset),
    )


def _apart(data: Mapping[str, Any], kind: str, worker: str, began_ms: int) -> list[Any]:
    """What else tells such a record from another one of the same task."""
    if kind == "message.rejected":
        return [data.get("note")]  # the coordinates of what was rejected
    return [worker, began_ms] if kind == _TASK_STARTED else [worker, began_ms, data.get("n")]


def _hashed(key: list[Any]) -> str:
    try:
        raw = orjson.dumps(key)
    except TypeError:  # ASCII with escapes: a uuid may hold what UTF-8 has no form for, ``n`` any number
        raw = json.dumps(key).encode()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


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


def worker_told(data: Mapping[str, Any]) -> WorkerTold:
    """What a worker told of itself. Raises ValueError, TypeError or KeyError when nobody can reckon with it."""
    interval_s = data.get("interval_s") or 0
    # A number that is none, and an infinite one, are not between two others either.
    if (
        isinstance(interval_s, bool)
        or not isinstance(interval_s, (int, float))
        or not 0 <= interval_s <= LONGEST_INTERVAL_S
    ):
        raise ValueError(f"interval_s={interval_s!r} is no number of seconds from 0 to {LONGEST_INTERVAL_S}")
    return WorkerTold(
        name=_name(data["worker"]),
        group=_text(data.get("group") or ""),
        state=_text(data.get("state") or "running"),
        started_ms=_number(data.get("started") or 0, END_OF_TIME_MS - 1),
        seen=datetime.fromtimestamp(_number(data["at"], END_OF_TIME_MS - 1) / 1000, UTC),
        interval_s=float(interval_s),
        data=data,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return clean_text(value)


def _name(value: Any) -> str:
    """A text that is looked up: one that is too long for that is cut, and told apart by its hash."""
    if type(value) is str and len(value) <= _SHORT and value.isascii() and "\x00" not in value:
        return value
    text = _text(value)
    if len(text) * 4 <= _LONGEST or len(raw := text.encode()) <= _LONGEST:
        return text
    return f"{text[:200]}~{hashlib.blake2b(raw, digest_size=16).hexdigest()}"


#: _name() of what many records name: their kinds, classes and workers.
_often = lru_cache(maxsize=4096)(_name)


def _number(value: Any, most: int = _LARGEST, *, least: int = 0) -> int:
    if type(value) is int and least <= value <= most:
        return value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is no number from {least} to {most}")
    return value
