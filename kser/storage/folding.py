"""What the events of one operation or task say of it: the same whatever order they came in. Pure.

1. Events of an older run than the newest count for nothing but when it was first heard of, and its place.
2. In that run what ended it beats everything else; of two ends the one that was told first counts.
3. Before its end the newest attempt counts, and in it, in this order: that the run was sent, an operation's start,
   waiting, a task's start, to be retried. Of two starts of one attempt the one told last counts: its worker took over.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kser.status import Status
from kser.storage.records import Told
from kser.storage.values import from_ms, one_line

__all__ = ["FOLDED", "fold"]

#: The columns that events decide.
FOLDED = (
    *("kind", "entrypoint", "root", "parent", "is_top", "run", "position", "attempt", "status", "created"),
    *("start_time", "end_time", "started", "finished", "success", "skipped", "params", "worker", "note"),
    *("retcode", "stdout", "stderr", "retval", "error", "exception", "exception_tb"),
)

_EPOCH = datetime.fromtimestamp(0, UTC)
_ENDS = frozenset({"step.done", "step.failed", "step.aborted", "operation.ended", "message.rejected"})
#: Order within one attempt.
_STEPS = {"run.sent": 0, "operation.started": 1, "message.waiting": 2, "task.started": 3, "step.retrying": 4}
_STATUS = {
    "run.sent": Status.PENDING,
    "operation.started": Status.RUNNING,
    "message.waiting": Status.PENDING,
    "task.started": Status.RUNNING,
    "step.retrying": Status.PENDING,
    "message.rejected": Status.FAILED,
}


def fold(events: Sequence[Told]) -> dict[str, Any] | None:
    """The columns of the table build that these events of one uuid decide; None when they decide nothing yet.

    JSON columns are given as values. Which is not in there stays as it is.
    """
    counted = [event for event in events if event.type in _ENDS or event.type in _STEPS]
    if not counted:
        return None
    run = max(event.run for event in counted)
    current = [event for event in counted if event.run == run]
    last = _decisive(current)
    ended = last.type in _ENDS
    status = _status(last)
    started_ms = _started_ms(counted, current, last, ended=ended)
    result = last.data.get("result")
    values: dict[str, Any] = {
        "kind": "operation" if any(event.type.startswith("operation.") for event in counted) else _kind(last),
        "entrypoint": last.entrypoint or _before(counted, "entrypoint") or "",
        "root": last.root,
        "parent": last.parent or _before(counted, "parent"),
        "is_top": last.root is None or last.root == last.uuid,
        "run": run,
        "position": min(event.position for event in counted),
        "attempt": max(last.attempt, *(event.attempt for event in current)),
        "status": str(status),
        "created": from_ms(min([event.at_ms for event in events] + [started_ms] * bool(started_ms))) or _EPOCH,
        "start_time": from_ms(started_ms),
        "end_time": from_ms(last.at_ms) if ended else None,
        "started": bool(started_ms) or ended or status == Status.RUNNING,
        "finished": ended,
        "success": status == Status.SUCCESS if ended else None,
        "skipped": status == Status.SKIPPED if ended else None,
        "params": _params(counted),
        "worker": last.worker or None,
        "note": str(last.data.get("note") or "") or None,
    }
    return values | _outcome(last, result if isinstance(result, dict) else None)


def _kind(last: Told) -> str:
    return "operation" if last.root == last.uuid else "task"


def _before(counted: Sequence[Told], field: str) -> str | None:
    """What was told of it last; who sends a new run does not tell all there is to know. None when nothing was."""
    told = [event for event in counted if getattr(event, field)]
    return getattr(max(told, key=lambda event: (event.run, event.place)), field) if told else None


def _decisive(current: Sequence[Told]) -> Told:
    ends = [event for event in current if event.type in _ENDS]
    if ends:
        return min(ends, key=lambda event: (event.place, event.identity))
    return max(current, key=lambda event: (event.attempt, _STEPS[event.type], event.place, event.identity))


def _status(last: Told) -> Status:
    fixed = _STATUS.get(last.type)
    if fixed is not None:
        return fixed
    told = str(last.data.get("status"))
    # What a newer release tells may be unknown here; that it ended is not.
    return Status(told) if told in Status.__members__ and Status(told).final else Status.FAILED


def _started_ms(counted: Sequence[Told], current: Sequence[Told], last: Told, *, ended: bool) -> int:
    """When what ``last`` tells of began, in milliseconds; 0 when that is not known."""
    if last.began_ms:
        return last.began_ms
    operation = [event for event in current if event.type == "operation.started"] or [
        event for event in counted if event.type == "operation.started"
    ]
    if operation:
        return min(operation, key=lambda event: (-event.run, event.place)).at_ms
    starts = [event for event in current if event.type == "task.started"]
    # Who ended it began it; another one may have begun it too and lost it.
    own = [event for event in starts if event.worker == last.worker] if ended else []
    found = max(own or starts, key=lambda event: (event.attempt, event.place, event.identity), default=None)
    return 0 if found is None else found.began_ms or found.at_ms


def _params(counted: Sequence[Told]) -> Any:
    """The parameters told last, by run."""
    told = [event for event in counted if event.data.get("params")]
    return max(told, key=lambda event: (event.run, event.place)).data["params"] if told else None


def _outcome(last: Told, result: dict[str, Any] | None) -> dict[str, Any]:
    """What it gave, and what went wrong."""
    names = ("retcode", "stdout", "stderr", "retval", "error", "exception", "exception_tb")
    values: dict[str, Any] = dict.fromkeys(names)
    if result is None:
        return values
    retcode = result.get("retcode")
    values["retcode"] = retcode if isinstance(retcode, int) and abs(retcode) < 1 << 63 else 1
    values["stdout"] = str(result.get("stdout") or "")
    values["stderr"] = str(result.get("stderr") or "")
    values["retval"] = result.get("retval")
    if values["retcode"] != 0:
        retval = result.get("retval")
        error = retval.get("error") if isinstance(retval, dict) else None
        error = error if isinstance(error, dict) else {}
        stack = error.get("stack")
        values["exception"] = {name: value for name, value in error.items() if name != "stack"} or None
        values["exception_tb"] = last.data.get("trace") or stack or None
        said = one_line(values["stderr"]) or one_line(str(error.get("message") or ""))
        values["error"] = said or f"retcode {values['retcode']}"
    return values
