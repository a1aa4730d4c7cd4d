"""Telemetry: what goes on, as records of ``{group}.telemetry``: tasks that run, their progress and log, and workers.

A plain producer of each worker writes them while things happen, so they may be lost, come twice, and come before or
after the events they belong to. What counts is in kser.events; this is for those who look on. The records of a task
have the key of its events, those of a worker its name. kser.events.schema() describes each of them.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Final, Self, get_args, get_origin, get_type_hints

import orjson

from kser import results
from kser.errors import ValidationError
from kser.schemas import parse
from kser.tracebacks import TracebackInfo
from kser.transport import Record

__all__ = [
    "END_OF_TIME_MS",
    "LONGEST_INTERVAL_S",
    "Running",
    "Subject",
    "TaskHeartbeat",
    "TaskLog",
    "TaskProgress",
    "TaskStarted",
    "Telemetry",
    "TelemetryType",
    "WorkerState",
    "loads",
    "read",
    "telemetry_topic",
]

#: Version of the format.
VERSION: Final = 1
#: Longest interval of a worker, in seconds, and the first time, in milliseconds since the epoch, that it cannot tell of
#: itself: it begins the year 9999, behind which there is no room to reckon with.
LONGEST_INTERVAL_S: Final = 86_400
END_OF_TIME_MS: Final = 253_370_764_800_000


def telemetry_topic(group: str) -> str:
    """Name of the topic that the telemetry of this group goes to."""
    return f"{group}.telemetry"


class TelemetryType:
    """The names of the records."""

    TASK_STARTED = "task.started"
    TASK_HEARTBEAT = "task.heartbeat"
    TASK_PROGRESS = "task.progress"
    TASK_LOG = "task.log"
    WORKER_STATE = "worker.state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One execution of a task, as its records and its events name it."""

    uuid: str
    #: Its name in messages.
    entrypoint: str
    #: uuid of the root operation; None for a lone task. And its name in messages: an event tells it when the task ends.
    operation: str | None = None
    operation_entrypoint: str = ""
    #: uuid of the operation around it.
    parent: str | None = None
    run: int = 1
    position: int = 0
    attempt: int = 1
    #: When the execution began, in milliseconds since the epoch by the worker's clock.
    began: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry(ABC):
    """What each record has."""

    TYPE: ClassVar[str] = ""

    #: Who tells it, and when: milliseconds since the epoch by its clock.
    worker: str = ""
    at: int = 0

    @property
    @abstractmethod
    def key(self) -> str:
        """Record key."""

    def to_bytes(self) -> bytes:
        """The record as compact UTF-8 JSON. Never fails: what JSON has no form for is written as its repr()."""
        data = {"v": VERSION, "type": self.TYPE, **self._data()}
        data["at"] = self.at or int(time.time() * 1000)
        try:
            return orjson.dumps(data)
        except TypeError:
            return json.dumps(results.json_safe(data), separators=(",", ":")).encode()

    def _data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """The record in its JSON object. Raises KeyError, TypeError, ValueError or ValidationError for what is none."""
        return cls(**_known(cls, data))


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfTask(Telemetry):
    """A record of one execution of a task."""

    task: Subject

    @property
    def key(self) -> str:
        """That of its events."""
        return self.task.operation or self.task.uuid

    def _data(self) -> dict[str, Any]:
        data = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "task"}
        return {**asdict(self.task), **data}

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """See Telemetry."""
        return cls(task=Subject(**_known(Subject, data)), **_known(cls, data))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStarted(_OfTask):
    """A task has been running for a moment. Those that end within it are told by their event alone."""

    TYPE: ClassVar[str] = TelemetryType.TASK_STARTED


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHeartbeat(_OfTask):
    """A running task has called heartbeat()."""

    TYPE: ClassVar[str] = TelemetryType.TASK_HEARTBEAT

    #: When it did so last, as ``at``.
    beat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress(_OfTask):
    """How far a running task is. Of one group the record with the largest ``n`` counts; some are left out."""

    TYPE: ClassVar[str] = TelemetryType.TASK_PROGRESS

    #: Path of the progress group, () is the top level.
    group: tuple[str, ...] = ()
    current: int
    total: int
    status_line: str = ""
    #: Grows within one execution.
    n: int = 0

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """See Telemetry."""
        known = _known(cls, data)
        return cls(
            task=Subject(**_known(Subject, data)), **known | {"group": tuple(map(str, known.get("group") or ()))}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLog(_OfTask):
    """What a running task has logged; ``at`` is when."""

    TYPE: ClassVar[str] = TelemetryType.TASK_LOG

    #: As in the module logging.
    level: int
    logger: str = ""
    message: str = ""
    #: Where in the code, ``file.py:12 in f``.
    where: str = ""
    #: Of the exception it was logged with.
    trace: TracebackInfo | None = None
    #: So many log records of this execution were dropped before this one, which does nothing but say so.
    dropped: int = 0
    #: Grows within one execution.
    n: int = 0

    @property
    def exception(self) -> str:
        """The exception it was logged with, as Python shows it; "" when there was none."""
        return self.trace.exception if self.trace is not None else ""

    def _data(self) -> dict[str, Any]:
        data = _OfTask._data(self)
        data["trace"] = self.trace.dump() if self.trace is not None else None
        if not self.dropped:
            del data["dropped"]
        return data

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """See Telemetry."""
        known = _known(cls, data)
        trace = known.get("trace")
        known["trace"] = TracebackInfo.load(trace) if trace is not None else None
        return cls(task=Subject(**_known(Subject, data)), **known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A task that a worker runs."""

    uuid: str
    entrypoint: str
    seconds: float
    #: Seconds since its last heartbeat(); None: it has made none.
    heartbeat_s_ago: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState(Telemetry):
    """How a worker does: told when it starts, every ``interval_s``, when ``state`` changes, and when it ends."""

    TYPE: ClassVar[str] = TelemetryType.WORKER_STATE

    group: str
    host: str = ""
    pid: int = 0
    #: Of kser, and of Python.
    version: str = ""
    python: str = ""
    #: Differs between two workers of one name, also between a worker and itself after a restart.
    life: str = ""
    #: When it started, as ``at``.
    started: int = 0
    #: The next record comes within so many seconds: when three times that pass, the worker is gone.
    interval_s: float = 0.0
    #: "starting", "running", "draining" or "stopped".
    state: str = ""
    topics: Sequence[str] = ()
    #: What it owns: topic -> numbers.
    partitions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    delivery: str = ""
    concurrency: int = 0
    #: What it runs, the longest first, and how many that are; not all of very many are listed.
    running: Sequence[Running] = ()
    running_count: int = 0
    #: Messages taken and not run; and run, but not settled.
    in_flight: int = 0
    unsettled: int = 0
    free_executors: int = 0
    #: Why it takes nothing; empty when it does.
    reasons: Sequence[str] = ()
    #: What became of its records so far.
    stats: Mapping[str, int] = field(default_factory=dict)
    #: Telemetry that was not sent: "log" over the limit of its task, "record" for which the broker was too slow.
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name."""
        return self.worker

    @property
    def gone_at_ms(self) -> float:
        """When it counts as gone without a word, as ``at``."""
        return self.at + 3000 * self.interval_s

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """See Telemetry."""
        known = _known(cls, data)
        running = [Running(**_known(Running, one)) for one in known.get("running") or ()]
        found = cls(**known | {"running": running})
        if not 0 <= found.interval_s <= LONGEST_INTERVAL_S:
            raise ValidationError(f"interval_s={found.interval_s} is not from 0 to {LONGEST_INTERVAL_S}")
        if not (0 <= found.at < END_OF_TIME_MS and 0 <= found.started < END_OF_TIME_MS):
            raise ValidationError(f"at={found.at}, started={found.started}: not both are times")
        return found


_KINDS: Final[Mapping[str, type[Telemetry]]] = {
    kind.TYPE: kind for kind in (TaskStarted, TaskHeartbeat, TaskProgress, TaskLog, WorkerState)
}


def loads(raw: bytes | None) -> Telemetry | None:
    """The record in these bytes; None for one of a kind that this release does not know. Raises ValidationError."""
    try:
        data = parse(raw or b"")
        kind = _KINDS.get(data["type"])
        return kind.load(data) if kind is not None else None
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ValidationError(f"Not a record of telemetry: {exc!r}") from None


def read(records: Iterable[Record]) -> Iterator[Telemetry]:
    """The telemetry in these records; what is none, or not known, is passed over."""
    for record in records:
        try:
            found = loads(record.value)
        except ValidationError:
            continue
        if found is not None:
            yield found


def _known(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of ``data`` that are fields of ``cls``: a newer release may write more.

    Raises ValidationError for one that is not of its type: whoever shows it reckons with it.
    """
    found = {name: data[name] for name in _hints(cls) if name in data}
    for name, value in found.items():
        if not _fits(value, _hints(cls)[name]):
            raise ValidationError(f"{name}={value!r:.100} is not what a {cls.__name__} has there")
    return found


@cache
def _hints(cls: Any) -> Mapping[str, Any]:
    """The types of its fields, but of ``task``, whose own stand beside the others in a record."""
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.name != "task"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether JSON gave what a field with this type is made of."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, one) for one in of)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(one, of[1]) for one in value.values())
    if origin in (Sequence, tuple):
        return isinstance(value, list) and all(_fits(one, of[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    if hint is int:
        return type(value) is int
    return isinstance(value, dict if is_dataclass(hint) else hint)
