"""Operations for people: a table of many, one in detail, its tasks as a tree."""

import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from kser.cli.terminal import fit, json_lines, one_line, printable, terminal_width, width_of
from kser.errors import ValidationError
from kser.status import Status
from kser.tracebacks import TracebackInfo

if TYPE_CHECKING:
    from kser.storage.views import Execution

__all__ = ["COLOURS", "called", "coloured", "details", "duration", "table", "traceback_lines"]

#: Of a status, as click and rich call it.
COLOURS: Final[dict[str, str]] = {
    Status.SUCCESS: "green",
    Status.FAILED: "red",
    Status.ABORTED: "magenta",
    Status.SKIPPED: "cyan",
    Status.RUNNING: "yellow",
    Status.WAITING_FOR_INPUT: "yellow",
}
_HEADER: Final = ("started", "took", "status", "name", "uuid", "error")
#: Of a uuid, where there is no room for all of it.
_SHORT: Final = 8
#: Columns that an error should have before other things are shortened.
_ERROR: Final = 30


def coloured(text: str, status: str) -> str:
    """``text`` in the colour of this status."""
    return click.style(text, fg=COLOURS[status]) if status in COLOURS else text


def duration(seconds: float | None) -> str:
    """``0.012 s``, ``3.4 s``, ``2m 05s``, ``1h 02m``, ``3d 04h``; "" for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = int(seconds)
    for big, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= big:
            return f"{whole // big}{names[0]} {whole % big // small:02}{names[1]}"
    raise AssertionError("a minute at least")


def called(execution: "Execution") -> str:
    """Its name in messages; ``?`` while only telemetry has told of it."""
    return one_line(execution.entrypoint) or "?"


def table(found: Sequence["Execution"], width: int | None = None) -> list[str]:
    """One a line, below a header; on a terminal no wider than that (``width`` columns, None: as it is)."""
    if not found:
        return []
    width = width or terminal_width()
    rows = [_cells(execution) for execution in found]
    if width is not None and _needs(rows) > width:
        rows = [[*row[:4], row[4][:_SHORT], row[5]] for row in rows]
    if width is not None and _needs(rows) > width:
        rows = [[*row[:3], row[3].rpartition(".")[2], *row[4:]] for row in rows]
    head = [name.upper() for name in _HEADER]
    widths = [max(width_of(row[at]) for row in [head, *rows]) for at in range(len(_HEADER) - 1)]
    lines = [click.style(_line(head, widths, width), bold=True)]
    for execution, row in zip(found, rows, strict=True):
        plain, cell = _line(row, widths, width), row[2].ljust(widths[2])
        before = sum(widths[:2]) + 4
        status = coloured(cell, execution.status)
        lines.append(f"{plain[:before]}{status}{plain[before + len(cell) :]}")
    return lines


def _line(row: Sequence[str], widths: Sequence[int], width: int | None) -> str:
    front = "  ".join(cell + " " * (wide - width_of(cell)) for cell, wide in zip(row, widths, strict=False))
    return fit(f"{front}  {row[-1]}".rstrip(), width)


def _cells(execution: "Execution") -> list[str]:
    began = (execution.started or execution.created).astimezone()
    day = "%m-%d" if began.year == datetime.now().astimezone().year else "%Y-%m-%d"
    return [
        f"{began:{day} %H:%M:%S}",
        duration(execution.duration_s) or "-",
        execution.status,
        called(execution),
        one_line(execution.uuid),
        one_line(execution.error or execution.note),
    ]


def _needs(rows: Sequence[Sequence[str]]) -> int:
    """Columns that the rows take with a part of each error."""
    front = sum(max(width_of(row[at]) for row in rows) + 2 for at in range(len(_HEADER) - 1))
    return front + max(min(width_of(row[-1]), _ERROR) for row in rows)


# -- one of them -----------------------------------------------------------------------------------------------------


def details(found: "Execution", traceback: str = "full") -> Iterator[str]:
    """One operation or task: the facts, parameters, tasks, result, and the traceback of what failed.

    ``traceback``: "full", "short" (without variables and the code around) or "none".
    """
    name = click.style(f"{called(found)} [{one_line(found.uuid)}]", bold=True)
    yield f"{name}  {coloured(found.status, found.status)}"
    for name, value in _facts(found):
        yield f"  {name:10}{value}"
    if found.error:
        yield f"  {'error':10}{click.style(one_line(found.error), fg='red')}"
    yield from _block("Parameters", json_lines(found.params) if found.params else [])
    if found.tasks:
        yield click.style("\nTasks", bold=True)
        yield from _task_lines(found)
    if found.result is not None:
        retval = found.result["retval"]
        if isinstance(retval, dict):  # the error is above
            retval = {name: value for name, value in retval.items() if name != "error"}
        yield from _block("Result", json_lines(retval) if retval else [])
        for name in ("stdout", "stderr"):
            text = str(found.result[name]).rstrip()
            yield from _block(name, text.splitlines() if text != found.error else [])
    if traceback != "none":
        for each in _failed(found):
            lines = traceback_lines(each.traceback, full=traceback == "full")
            yield from _block(f"Traceback of {called(each)} [{one_line(each.uuid)}]", lines)
    top = found.operation in (None, found.uuid)
    if top and found.status in (Status.FAILED, Status.ABORTED):
        command = shlex.join(["kser", "operations", "resume", found.uuid, "--group", found.group or "kser"])
        yield f"\nTo run it again from there: {command}"


def _facts(found: "Execution") -> Iterator[tuple[str, str]]:
    if found.started is not None:
        took = duration(found.duration_s)
        yield "started", f"{_time(found.started)}{f', took {took}' if took else ''}"
    else:
        yield "created", _time(found.created)
    if found.operation is not None and found.operation != found.uuid:
        yield "operation", one_line(found.operation)
    if found.run > 1:
        yield "run", str(found.run)
    if found.attempt > 1:
        yield "attempt", str(found.attempt)
    for name, value in (("group", found.group), ("worker", found.worker), ("note", found.note)):
        if value:
            yield name, one_line(value)


def _task_lines(found: "Execution", depth: int = 0) -> Iterator[str]:
    for task in found.tasks:
        told = [duration(task.duration_s)]
        told += [f"run {task.run}"] * (task.run > 1) + [f"attempt {task.attempt}"] * (task.attempt > 1)
        told += [one_line(task.error or task.note)]
        status = coloured(f"{task.status:8}", task.status)
        said = "  ".join(filter(None, told))
        yield f"  {'  ' * depth}{task.position:2}  {status} {called(task)} [{one_line(task.uuid)}]  {said}".rstrip()
        yield from _task_lines(task, depth + 1)


def _failed(found: "Execution") -> Iterator["Execution"]:
    """What has a traceback to show; an operation only when nothing in it has one: its error came from there."""
    below = [each for task in found.tasks for each in _failed(task)]
    if below:
        yield from below
    elif found.traceback is not None and _tells(found):
        yield found


def _tells(found: "Execution") -> bool:
    """Whether its traceback says more than its error: what was aborted before it ran was raised nowhere."""
    try:
        return TracebackInfo.load(found.traceback).tells
    except ValidationError:
        text, said = str(found.traceback).rstrip(), str((found.result or {}).get("stderr") or "").rstrip()
        return not said or not text.endswith(said) or "\n" in text.removesuffix(said)


def _block(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield click.style(f"\n{title}", bold=True)
        yield from (f"  {printable(line)}" for line in lines)


def traceback_lines(traceback: Any, *, full: bool) -> list[str]:
    """A traceback as it is stored: a TracebackInfo, or the text of one."""
    try:
        return TracebackInfo.load(traceback).format(context=full, variables=full).splitlines()
    except ValidationError:
        return str(traceback).rstrip().splitlines()


def _time(value: datetime) -> str:
    return f"{value.astimezone():%Y-%m-%d %H:%M:%S %Z}"
