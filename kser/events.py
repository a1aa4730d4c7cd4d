"""Events of the sequence: what happened to an operation, as records of ``{group}.events``.

They follow from settling, are keyed by the operation, and order by (run, position, attempt, phase). One that a
redelivery makes again is the same but for ``at``, ``began``, ``worker`` and maybe ``attempt``, so readers drop what
they have seen (Event.identity). schema() is the JSON Schema of these records and of those of kser.telemetry.
"""

import importlib.resources
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

import orjson

from kser import results
from kser.errors import ValidationError
from kser.masking import mask, mask_text
from kser.results import Result
from kser.schemas import parse
from kser.tracebacks import TracebackInfo
from kser.transport import Reader, Record

__all__ = ["Event", "EventType", "OperationView", "events_topic", "follow", "schema"]

#: Version of the format.
VERSION = 1
#: An event with a Result that is larger goes without its params, and if need be with a note instead of its retval.
MAX_BYTES = 512 * 1024
#: A longer traceback is shortened.
MAX_TRACE_BYTES = 96 * 1024


def events_topic(group: str) -> str:
    """Name of the topic that the events of this group go to."""
    return f"{group}.events"


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of every record of ``{group}.events`` and ``{group}.telemetry``."""
    text = importlib.resources.files("kser").joinpath("records.schema.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


class EventType:
    """The names of the events."""

    OPERATION_STARTED = "operation.started"
    STEP_DONE = "step.done"
    STEP_FAILED = "step.failed"
    #: It was not run, or what it gave does not count: somebody aborted its operation.
    STEP_ABORTED = "step.aborted"
    #: An attempt failed, another one follows.
    STEP_RETRYING = "step.retrying"
    OPERATION_ENDED = "operation.ended"
    #: A run was sent by who resumed or replayed it; its first step has this uuid. It may have begun, or ended, by then.
    RUN_SENT = "run.sent"
    #: Nobody here can run it: it waits for somebody who can.
    MESSAGE_WAITING = "message.waiting"
    #: It is no message that can be read.
    MESSAGE_REJECTED = "message.rejected"
    #: The message of what failed for good, or was rejected, is kept in the dead letters.
    MESSAGE_DEAD_LETTERED = "message.dead_lettered"


_PHASES = {
    EventType.RUN_SENT: 0,
    EventType.OPERATION_STARTED: 0,
    EventType.STEP_DONE: 1,
    EventType.STEP_FAILED: 1,
    EventType.STEP_RETRYING: 1,
    EventType.STEP_ABORTED: 1,
    EventType.MESSAGE_WAITING: 1,
    EventType.MESSAGE_REJECTED: 1,
    EventType.MESSAGE_DEAD_LETTERED: 1,
    EventType.OPERATION_ENDED: 2,
}

#: Those that tell how an execution ended.
_EXECUTIONS: Final = frozenset({EventType.STEP_DONE, EventType.STEP_FAILED, EventType.STEP_RETRYING})
#: Those that an exception may be behind.
_FAILURES: Final = frozenset({EventType.STEP_FAILED, EventType.STEP_RETRYING})

#: The default of an optional object; nobody writes into it.
_NONE: dict[str, Any] = {}


class Event(NamedTuple):
    """One thing that happened."""

    #: One of EventType.
    type: str
    #: The task or operation it happened to; for a rejected message its coordinates.
    uuid: str
    #: Its name in messages.
    entrypoint: str
    #: uuid of the root operation; None for a lone task.
    operation: str | None = None
    #: uuid of the operation around ``uuid``; None for a root operation or a lone task.
    parent: str | None = None
    #: Run of the operation.
    run: int = 1
    #: How many tasks of the operation ended before.
    position: int = 0
    #: Status after it.
    status: str = ""
    #: What it gave; None when it gave nothing yet.
    result: Result | None = None
    #: Parameters of an operation that starts, or a task that ended or waits; in bytes what looks secret is masked.
    params: dict[str, Any] = _NONE
    #: Anything else worth saying, in words.
    note: str = ""
    #: Milliseconds since the epoch, by the worker's clock: for people, not for ordering.
    at: int = 0
    #: Who tells it.
    worker: str = ""
    #: Which attempt of the task it tells of, from 1.
    attempt: int = 1
    #: When the execution that it tells of began, as ``at``; 0: there was none.
    began: int = 0
    #: Where the exception that it failed by came from; None when it was none.
    trace: TracebackInfo | None = None

    @property
    def key(self) -> str:
        """Record key: the root operation, so that all of its events lie in one partition, in order."""
        return self.operation or self.uuid

    @property
    def phase(self) -> int:
        """Order among the events of one position: started, step, ended."""
        return _PHASES.get(self.type, 1)

    @property
    def identity(self) -> tuple[Any, ...]:
        """The same for an event and its repetition after a redelivery."""
        attempt = self.attempt if self.type == EventType.STEP_RETRYING else 0
        return self.key, self.run, self.position, self.phase, self.type, self.uuid, attempt

    @property
    def ends(self) -> bool:
        """True for the end of a root operation, or of a lone task."""
        if self.operation is None:
            return self.type in (EventType.STEP_DONE, EventType.STEP_FAILED, EventType.STEP_ABORTED)
        return self.type == EventType.OPERATION_ENDED and self.uuid == self.operation

    def to_bytes(
        self, worker: str | None = None, *, attempt: int = 1, began: int = 0, trace: TracebackInfo | None = None
    ) -> bytes:
        """The event as compact UTF-8 JSON, told by ``worker`` (default: its own field).

        ``attempt``, ``began`` and ``trace`` are of the execution that made it, and take the place of its own fields
        where it tells of one. Never fails: what JSON has no form for is written as its repr().
        """
        kind = self.type
        if kind not in _EXECUTIONS or attempt == 1:
            attempt = self.attempt
        if kind not in _EXECUTIONS or not began:
            began = self.began
        if kind not in _FAILURES or trace is None:
            trace = self.trace
        data: dict[str, Any] = {
            "v": VERSION,
            "type": kind,
            "uuid": self.uuid,
            "entrypoint": self.entrypoint,
            "operation": self.operation,
            "parent": self.parent,
            "run": self.run,
            "position": self.position,
            "phase": self.phase,
            "status": self.status,
            "at": self.at or int(time.time() * 1000),
            "worker": self.worker if worker is None else worker,
        }
        if attempt != 1:
            data["attempt"] = attempt
        if began:
            data["began"] = began
        params = self.params
        if params and isinstance(params, dict):  # a task may have put anything there
            shown = mask(params)
            if isinstance(shown, dict):
                data["params"] = shown
        if self.note:
            data["note"] = self.note
        if self.result is not None:
            data["result"] = _shown(self.result)
        raw = _encode(data)
        if len(raw) > MAX_BYTES and self.result is not None and data.pop("params", None):
            raw = _encode(data)
        if len(raw) > MAX_BYTES and self.result is not None:
            shown = data["result"]
            shown["retval"] = {"truncated": f"the event had {len(raw)} bytes, the limit is {MAX_BYTES}"}
            for stream in ("stdout", "stderr"):
                shown[stream] = str(shown[stream])[:4096]
            raw = _encode(data)
        if trace is not None:  # put at its end: the rest of it is written
            raw = b'%b,"trace":%b}' % (raw[:-1], trace.to_bytes(MAX_TRACE_BYTES))
        return raw

    @classmethod
    def loads(cls, raw: bytes | None) -> Self:
        """The event in a record's value. Raises ValidationError when it is none."""
        try:
            data = parse(raw or b"")
            result, trace = data.get("result"), data.get("trace")
            return cls(
                type=data["type"],
                uuid=data["uuid"],
                entrypoint=data["entrypoint"],
                operation=data.get("operation"),
                parent=data.get("parent"),
                run=data.get("run", 1),
                position=data.get("position", 0),
                status=data.get("status", ""),
                result=Result(**result) if result is not None else None,
                params=data.get("params") or {},
                note=data.get("note", ""),
                at=data.get("at", 0),
                worker=data.get("worker", ""),
                attempt=data.get("attempt", 1),
                began=data.get("began", 0),
                trace=TracebackInfo.load(trace) if trace is not None else None,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ValidationError(f"Not an event of kser: {exc!r}") from None


def _shown(result: Result) -> dict[str, Any]:
    """The Result as data; in the texts of a failure what looks secret is masked, as in its traceback."""
    data = results.dump(result)
    retval = data["retval"]
    if result.retcode:
        data |= {name: mask_text(text) for name in ("stdout", "stderr") if isinstance(text := data[name], str)}
    if result.retcode and isinstance(retval, dict) and isinstance(error := retval.get("error"), dict):
        texts = {name: mask_text(text) for name in ("message", "stack") if isinstance(text := error.get(name), str)}
        data["retval"] = {**retval, "error": {**error, **texts}}
    return data


def _encode(data: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(data)
    except TypeError:
        return json.dumps(results.json_safe(data), separators=(",", ":")).encode()


def follow(reader: Reader, timeout_s: float | None = None) -> Iterator[Event]:
    """The events that ``reader`` gives, each once, as they come; ends after ``timeout_s`` (None: never).

    A redelivery's repetition of an event is dropped, and so are records that are no events. Between events that are
    slow to come the iterator gives nothing and blocks in slices of a fifth of a second.
    """
    seen: set[tuple[Any, ...]] = set()
    end = None if timeout_s is None else time.monotonic() + timeout_s
    while end is None or time.monotonic() < end:
        for event in read(reader.poll(0.2)):
            if event.identity not in seen:
                seen.add(event.identity)
                yield event


def read(records: list[Record]) -> Iterator[Event]:
    """The events in these records; what is none is passed over."""
    for record in records:
        try:
            yield Event.loads(record.value)
        except ValidationError:
            continue


@dataclass(slots=True)
class OperationView:
    """What the events so far say of one operation, or of one lone task."""

    uuid: str
    entrypoint: str = ""
    status: str = "PENDING"
    #: Tasks that ended, in order.
    steps: list[Event] = field(default_factory=list)
    result: Result | None = None
    #: The newest run that is told of: what is told of an older one counts no more.
    run: int = 1
    _seen: set[tuple[Any, ...]] = field(default_factory=set)

    def apply(self, event: Event) -> bool:
        """Take one event in; True when it was one of this operation and new."""
        if event.key != self.uuid or event.identity in self._seen:
            return False
        self._seen.add(event.identity)
        if event.uuid == self.uuid:
            self.entrypoint = event.entrypoint
        if event.type in (EventType.STEP_DONE, EventType.STEP_FAILED):
            self.steps.append(event)
        if event.run > self.run:  # it was resumed
            self.run, self.status, self.result = event.run, "PENDING", None
        if event.run < self.run:
            return True
        if event.ends:
            self.status, self.result = event.status, event.result
        elif self.status == "PENDING" and event.type != EventType.RUN_SENT:
            self.status = "RUNNING"
        return True

    @property
    def ended(self) -> bool:
        """True once its end has been told."""
        return self.status in ("SUCCESS", "FAILED", "SKIPPED", "ABORTED")
