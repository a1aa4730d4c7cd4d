"""What the read API gives: frozen records, each of which can say itself as JSON."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = ["Execution", "LogLine", "ProjectionView", "TimelineEvent", "WorkerView"]


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One operation or task as the storage knows it, in its newest run."""

    #: Its number in the storage.
    id: int
    uuid: str
    #: "operation" or "task".
    kind: str
    entrypoint: str
    #: The job it is a build of; its entrypoint where no job made it.
    job_id: str
    #: uuid of the root operation, its own for a root; None for a task that belongs to none.
    operation: str | None
    #: uuid of the operation around it.
    parent: str | None
    run: int
    #: How many tasks of the operation ended before.
    position: int
    attempt: int
    #: Name of a kser.status.Status.
    status: str
    #: When the storage first heard of it.
    created: datetime
    started: datetime | None
    ended: datetime | None
    #: What went wrong, in one line; None when nothing did.
    error: str | None
    #: The error as JSON: code, name, message, msgid, extra.
    exception: Any
    #: Its traceback as JSON: text, or a record of frames.
    traceback: Any
    params: Mapping[str, Any]
    #: uuid, retcode, stdout, stderr, retval; None when it gave nothing yet.
    result: Mapping[str, Any] | None
    worker: str | None
    group: str | None
    #: Anything else worth saying, in words.
    note: str
    #: What is in an operation, in order; only where the tree was asked for.
    tasks: tuple["Execution", ...] = ()

    @property
    def duration_s(self) -> float | None:
        """Seconds from start to end; None while one of them is not known."""
        if self.started is None or self.ended is None:
            return None
        return max((self.ended - self.started).total_seconds(), 0.0)

    def to_json(self, *, details: bool = False) -> dict[str, Any]:
        """As JSON; with ``details`` params, result, exception and traceback too. ``tasks`` for an operation only.

        Without, and when it was listed, its tasks were not read and are left out.
        """
        data: dict[str, Any] = {
            "uuid": self.uuid,
            "id": self.id,
            "kind": self.kind,
            "entrypoint": self.entrypoint,
            "status": self.status,
            "started": _time(self.started),
            "ended": _time(self.ended),
            "duration_s": self.duration_s,
            "error": self.error,
            "run": self.run,
            "position": self.position,
            "attempt": self.attempt,
            "worker": self.worker,
            "operation": self.operation,
            "parent": self.parent,
        }
        if details:
            data |= {
                "job_id": self.job_id,
                "created": _time(self.created),
                "params": self.params,
                "result": self.result,
                "exception": self.exception,
                "traceback": self.traceback,
                "group": self.group,
                "note": self.note,
            }
        if self.kind == "operation" and (details or self.tasks):
            data["tasks"] = [task.to_json(details=details) for task in self.tasks]
        return data

    def walk(self) -> Iterator["Execution"]:
        """This one and all that is in it, outer before inner, in order."""
        yield self
        for task in self.tasks:
            yield from task.walk()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One thing that was told of an operation or task."""

    id: int
    type: str
    uuid: str
    entrypoint: str
    operation: str | None
    run: int
    position: int
    attempt: int
    phase: int
    status: str
    #: By the clock of who told it.
    at: datetime | None
    worker: str
    #: All that was told.
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All fields; ``at`` as ISO 8601."""
        return {
            "id": self.id,
            "type": self.type,
            "uuid": self.uuid,
            "entrypoint": self.entrypoint,
            "operation": self.operation,
            "run": self.run,
            "position": self.position,
            "attempt": self.attempt,
            "phase": self.phase,
            "status": self.status,
            "at": _time(self.at),
            "worker": self.worker,
            "data": self.data,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One log record of a build."""

    id: int
    build_id: int
    uuid: str
    entrypoint: str
    created: datetime
    level: int
    logger: str
    message: str
    exception: Any
    traceback: Any
    worker: str | None

    @property
    def level_name(self) -> str:
        """As logging calls the level."""
        return logging.getLevelName(self.level)

    def to_json(self) -> dict[str, Any]:
        """All fields; ``created`` as ISO 8601."""
        return {
            "id": self.id,
            "build_id": self.build_id,
            "uuid": self.uuid,
            "entrypoint": self.entrypoint,
            "created": _time(self.created),
            "level": self.level,
            "level_name": self.level_name,
            "logger": self.logger,
            "message": self.message,
            "exception": self.exception,
            "traceback": self.traceback,
            "worker": self.worker,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker of the fleet, as its own telemetry tells."""

    name: str
    group: str
    hostname: str | None
    pid: int | None
    #: What it runs with: "kser" and "python" -> version.
    versions: Mapping[str, str]
    started: datetime | None
    #: When it told of itself last, by its own clock.
    seen: datetime
    #: "starting", "running", "draining", "stopped" as it told; "gone": it was to tell something long ago.
    state: str
    #: What it runs: uuid, entrypoint, seconds, heartbeat_s_ago. At most 100, the longest first.
    running: Sequence[Mapping[str, Any]]
    #: All that it told.
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All fields; times as ISO 8601."""
        return {
            "name": self.name,
            "group": self.group,
            "hostname": self.hostname,
            "pid": self.pid,
            "versions": dict(self.versions),
            "started": _time(self.started),
            "seen": _time(self.seen),
            "state": self.state,
            "running": [dict(task) for task in self.running],
            "data": self.data,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionView:
    """How far the recorders have come in one partition."""

    #: Id of the Kafka cluster.
    cluster: str
    topic: str
    partition: int
    next_offset: int
    updated: datetime

    def to_json(self) -> dict[str, Any]:
        """All fields; ``updated`` as ISO 8601."""
        return {
            "cluster": self.cluster,
            "topic": self.topic,
            "partition": self.partition,
            "next_offset": self.next_offset,
            "updated": _time(self.updated),
        }
