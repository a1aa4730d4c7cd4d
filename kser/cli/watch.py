"""An operation followed by its events: a line a step, and its end as an exit code."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

from kser.cli.errors import CommandFailed
from kser.cli.output import write_json
from kser.events import Event, EventType, OperationView, read
from kser.masking import mask
from kser.results import Result
from kser.schemas import parse
from kser.status import Status
from kser.transport import Reader

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status as Spinner

__all__ = ["Deadline", "describe_failure", "said", "spinner_for", "styled_terminal", "watch", "writes_unicode"]

#: Seconds without any event after which it is likely that no worker runs.
HINT_AFTER_S = 10.0
_POLL_S = 0.2


class Deadline:
    """A time to be done by. None: no limit."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left(self) -> float:
        """Seconds left, in hundredths, rounded up; never negative, infinite without a limit.

        It becomes the timeout of calls, and their errors repeat it: 2.0 s is told, and not 1.99998 s.
        """
        return float("inf") if self._end is None else max(math.ceil((self._end - time.monotonic()) * 100) / 100, 0.0)


def watch(
    reader: Reader, uuid: str, name: str, *, group: str, topic: str, deadline: Deadline, output: str
) -> OperationView:
    """Show what happens to the operation, or lone task, until its end. Its view.

    Raises CommandFailed when it ends otherwise than well, and when the deadline passes.
    """
    view = OperationView(uuid, name)
    with _display(output) as display:
        silent_since: float | None = time.monotonic()
        while not view.ended:
            if not deadline.left:
                raise CommandFailed(
                    f"{name}[{uuid}] has not ended within {deadline.timeout_s:g} s: {view.status}, {len(view.steps)} "
                    "step(s) done. It goes on by itself"
                )
            for event in read(reader.poll(min(_POLL_S, deadline.left))):
                if view.apply(event):
                    silent_since = None
                    display.event(event)
            if silent_since is not None and time.monotonic() - silent_since > HINT_AFTER_S:
                silent_since = None
                display.hint(
                    f"Nothing has ended for {HINT_AFTER_S:g} s: no worker of group {group} seems to run on topic "
                    f"{topic}, or the first task takes long"
                )
    if view.status != Status.SUCCESS:
        raise CommandFailed(describe_failure(view))
    return view


def describe_failure(view: OperationView) -> str:
    """One line: the operation, the task that failed it, and its error."""
    result = view.result or Result(uuid=view.uuid, stderr="no reason is known")
    failed = result.retval.get("failed_task")  # of a lone task anything may be there
    task = f" in {failed.get('path')}[{failed.get('uuid')}]" if failed and isinstance(failed, dict) else ""
    return f"{view.entrypoint}[{view.uuid}] {view.status}{task}: {_reason(result)}"


def styled_terminal() -> "Console | None":
    """The console of a terminal that can be written on in colours; None when stdout is no such thing."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None  # without loading rich
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def writes_unicode(console: "Console") -> bool:
    """True when the terminal takes more than ASCII."""
    return console.encoding.lower().startswith("utf")


def spinner_for(console: "Console") -> str:
    """The name of a rich spinner that this terminal can show."""
    return "dots" if writes_unicode(console) else "line"


# -- displays --------------------------------------------------------------------------------------------------------


def _display(output: str) -> AbstractContextManager["_Lines"]:
    if output == "json":
        return nullcontext(_JsonLines())
    console = styled_terminal()
    return nullcontext(_Lines()) if console is None else _live(console)


class _Lines:
    """A plain line for each event."""

    def __init__(self) -> None:
        self._depths: dict[str | None, int] = {None: 0}
        self._began = time.monotonic()

    def event(self, event: Event) -> None:
        """Show one event."""
        click.echo("".join(text for text, _ in self._parts(event)))

    def hint(self, text: str) -> None:
        """Say something that is not of the data."""
        click.echo(f"kser: {text}", err=True)

    def _parts(self, event: Event) -> list[tuple[str, str]]:
        """The event in words, nested operations indented, each with its style."""
        depth = self._depths.get(event.parent, 0)
        if event.type == EventType.OPERATION_STARTED:
            self._depths[event.uuid] = depth + 1
        style = {"SUCCESS": "green", "FAILED": "bold red"}.get(event.status, "yellow")
        parts = [
            (f"{time.monotonic() - self._began:7.2f} s  ", "dim"),
            (f"{event.status:7}  ", style),
            (f"{'  ' * depth}{event.entrypoint}", ""),
        ]
        if words := said(event):
            parts.append((f"  {words}", ""))
        if event.worker:
            parts.append((f"  ({event.worker})", "dim"))
        return parts


class _JsonLines(_Lines):
    """A JSON object for each event, with what looks secret masked, on a line of its own."""

    def event(self, event: Event) -> None:
        """Show one event."""
        write_json(mask(parse(event.to_bytes())))


class _LiveLines(_Lines):
    """Coloured lines above a line that moves while something is awaited."""

    def __init__(self, console: "Console", status: "Spinner") -> None:
        super().__init__()
        self._console = console
        self._status = status
        self._steps = 0

    def event(self, event: Event) -> None:
        """Show one event."""
        from rich.text import Text

        self._console.print(Text.assemble(*self._parts(event)))
        self._steps += event.type in (EventType.STEP_DONE, EventType.STEP_FAILED)
        self._status.update(f"running, {self._steps} step(s) done")

    def hint(self, text: str) -> None:
        """Say something that is not of the data."""
        self._console.print(text, style="yellow", markup=False)


@contextmanager
def _live(console: "Console") -> Iterator["_LiveLines"]:
    with console.status("waiting for a worker", spinner=spinner_for(console)) as status:
        yield _LiveLines(console, status)


def said(event: Event) -> str:
    """What an event tells beside its status, in a few words; "" when that is nothing."""
    match event.type:
        case EventType.OPERATION_STARTED:
            return "started"
        case EventType.OPERATION_ENDED if event.status == Status.SUCCESS:
            return "ended"
    if event.result is None:
        return event.note
    return _reason(event.result) if event.result.retcode else _first_line(event.result.stdout)


def _reason(result: Result) -> str:
    error = result.retval.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return _first_line(result.stderr or str(message or "")) or f"retcode {result.retcode}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "")
