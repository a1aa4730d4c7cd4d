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
from kser.storage.values import clean_text, from_ms, one_line

__all__ = ["ENDED_WITH_OPERATION", "ENDS", "FOLDED", "begin", "begin_and_end", "fold"]

_FINAL = {str(status): status for status in Status if status.final}
_OUTCOME = ("retcode", "stdout", "stderr", "retval", "error", "exception", "exception_tb")
#: The columns that events decide.
FOLDED = (
    *("kind", "entrypoint", "root", "parent", "is_top", "run", "position", "attempt", "status", "created"),
    *("start_time", "end_time", "started", "finished", "success", "skipped", "params", "worker", "note"),
    *_OUTCOME,
)
_TEXTS = {status: str(status) for status in Status}
_PENDING, _RUNNING = str(Status.PENDING), str(Status.RUNNING)
#: What becomes of a step that went on when its operation ended.
ENDED_WITH_OPERATION = {
    "status": str(Status.ABORTED),
    "finished": True,
    "success": False,
    "note": "its operation ended without it",
}

_NO_OUTCOME = dict.fromkeys(_OUTCOME)
_EPOCH = datetime.fromtimestamp(0, UTC)
#: What ends an operation or task in its run.
ENDS = frozenset({"step.done", "step.failed", "step.aborted", "operation.ended", "message.rejected"})
_OF_OPERATIONS = frozenset({"operation.started", "operation.ended"})
_STARTS = frozenset({"operation.started", "task.started"})
#: Order within one attempt.
_STEPS = {"run.sent": 0, "operation.started": 1, "message.waiting": 2, "task.started": 3, "step.retrying": 4}
#: What decides something.
_COUNTED = ENDS | _STEPS.keys()
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
    counted = [event for event in events if event.type in _COUNTED]
    if not counted:
        return None
    last = counted[0]
    if len(counted) == 1:  # of most tasks there is no more than their end
        run, position, attempt, kind = last.run, last.position, last.attempt, _kind(counted, last)
        entrypoint, parent, params = last.entrypoint, last.parent, last.data.get("params") or None
        started_ms = last.began_ms or (last.at_ms if last.type in _STARTS else 0)
    else:
        run = max(event.run for event in counted)
        current = [event for event in counted if event.run == run]
        last = _decisive(current)
        position = min(event.position for event in counted)
        attempt = max(event.attempt for event in current)
        kind = _kind(counted, last)
        entrypoint = last.entrypoint or _before(counted, "entrypoint") or ""
        parent, params = last.parent or _before(counted, "parent"), _params(counted)
        started_ms = _started_ms(counted, current, last, ended=last.type in ENDS)
    ended, status, data = last.type in ENDS, _status(last), last.data
    note = data.get("note")
    created_ms = last.at_ms if len(events) == 1 else min(event.at_ms for event in events)
    start_time = from_ms(started_ms)
    if 0 < started_ms < created_ms:
        created_ms = started_ms
    values: dict[str, Any] = {
        "kind": kind,
        "entrypoint": entrypoint,
        "root": last.root,
        "parent": parent,
        "is_top": last.root is None or last.root == last.uuid,
        "run": run,
        "position": position,
        "attempt": attempt,
        "status": _TEXTS[status],
        "created": (start_time if created_ms == started_ms else from_ms(created_ms)) or _EPOCH,
        "start_time": start_time,
        "end_time": from_ms(last.at_ms) if ended else None,
        "started": bool(started_ms) or ended or status is Status.RUNNING,
        "finished": ended,
        "success": status is Status.SUCCESS if ended else None,
        "skipped": status is Status.SKIPPED if ended else None,
        "params": params,
        "worker": last.worker or None,
        "note": clean_text(str(note)) if note else None,
    }
    result = data.get("result")
    values |= _outcome(last, result) if isinstance(result, dict) else _NO_OUTCOME
    return values


def begin(root: dict[str, Any], began: datetime | None) -> None:
    """Change the columns of an operation whose first step began then, if that is known."""
    if began is not None and (root["start_time"] is None or began < root["start_time"]):
        root["start_time"], root["created"] = began, min(root["created"], began)


def begin_and_end(root: dict[str, Any], steps: Sequence[dict[str, Any]], *, told_of_itself: bool) -> None:
    """Make true in these new rows what an operation and its steps say of each other. They are changed.

    It began when the first of its steps did, and none of its steps goes on after its end.

    Args:
        root: columns of the operation.
        steps: columns of each that is in it.
        told_of_itself: whether there is an event of its own of this run.
    """
    own = [step for step in steps if step["run"] == root["run"]]
    began = min((step["start_time"] for step in own if step["start_time"] is not None), default=None)
    begin(root, began)
    if root["status"] == _PENDING and not told_of_itself and any(step["started"] for step in own):
        root["status"], root["note"] = _RUNNING, None
    if not root["job_id"]:  # only its steps tell of it: its run is not known
        return
    for step in steps:
        if not step["finished"] and (root["run"] > step["run"] or (root["run"] == step["run"] and root["finished"])):
            step |= ENDED_WITH_OPERATION


def _kind(counted: Sequence[Told], last: Told) -> str:
    if last.root == last.uuid:
        return "operation"
    for event in counted:
        if event.type in _OF_OPERATIONS:
            return "operation"
    return "task"


def _before(counted: Sequence[Told], field: str) -> str | None:
    """What was told of it last; who sends a new run does not tell all there is to know. None when nothing was."""
    told = [event for event in counted if getattr(event, field)]
    return getattr(max(told, key=lambda event: (event.run, event.place)), field) if told else None


def _decisive(current: Sequence[Told]) -> Told:
    ends = [event for event in current if event.type in ENDS]
    if ends:
        return min(ends, key=lambda event: (event.place, event.identity))
    return max(current, key=lambda event: (event.attempt, _STEPS[event.type], event.place, event.identity))


def _status(last: Told) -> Status:
    fixed = _STATUS.get(last.type)
    # What a newer release tells may be unknown here; that it ended is not.
    return fixed or _FINAL.get(str(last.data.get("status")), Status.FAILED)


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


def _outcome(last: Told, result: dict[str, Any]) -> dict[str, Any]:
    """What it gave, and what went wrong."""
    retcode = result.get("retcode")
    values: dict[str, Any] = {
        # true is no number: of the databases one takes it for 1, another one refuses it.
        "retcode": retcode if type(retcode) is int and abs(retcode) < 1 << 63 else 1,
        "stdout": clean_text(str(result.get("stdout") or "")),
        "stderr": clean_text(str(result.get("stderr") or "")),
        "retval": result.get("retval"),
        "error": None,
        "exception": None,
        "exception_tb": None,
    }
    if values["retcode"] != 0:
        retval = result.get("retval")
        error = retval.get("error") if isinstance(retval, dict) else None
        error = error if isinstance(error, dict) else {}
        stack = error.get("stack")
        values["exception"] = {name: value for name, value in error.items() if name != "stack"} or None
        values["exception_tb"] = last.data.get("trace") or stack or None
        said = one_line(values["stderr"]) or one_line(str(error.get("message") or ""))
        values["error"] = clean_text(said) or f"retcode {values['retcode']}"
    return values
