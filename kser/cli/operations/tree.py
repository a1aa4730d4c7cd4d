"""What `kser operations watch` shows on a terminal: the tasks as a tree that changes in place."""

import time
from collections import Counter, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from kser.cli.operations.live import LiveOperation
from kser.cli.operations.view import COLOURS, called, duration
from kser.cli.terminal import one_line
from kser.cli.watch import writes_unicode
from kser.progress import ProgressReport
from kser.status import Status
from kser.transport import Record

if TYPE_CHECKING:
    from kser.storage.views import Execution, LogLine

__all__ = ["TreeView", "render"]

_MARKS: Final = {
    Status.SUCCESS: "✓",
    Status.FAILED: "✗",
    Status.ABORTED: "■",
    Status.SKIPPED: "→",
    Status.PENDING: "·",
    Status.WAITING_FOR_INPUT: "?",
}
_PLAIN_MARKS: Final = {
    Status.SUCCESS: "+",
    Status.FAILED: "x",
    Status.ABORTED: "#",
    Status.SKIPPED: ">",
    Status.PENDING: ".",
    Status.WAITING_FOR_INPUT: "?",
}
_TURNING: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_TURNING: Final = "|/-\\"
#: Columns of a bar.
_BAR: Final = 20
#: Lines of the log that are shown, and lines of the screen that are no tasks.
_LOGGED: Final = 4
_OTHER_LINES: Final = 5


class TreeView:
    """The operation as a tree: a line for each task, below it how far it is, and at the end what was logged last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._found: Execution | None = None
        self._progress: ProgressReport | None = None
        self._logged: deque[LogLine] = deque(maxlen=_LOGGED)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def update(self, live: LiveOperation, _records: list[Record], /) -> None:
        """Show it as it is now. The next refresh does."""
        found = live.find()
        if found is not None:
            self._found, self._progress = found, live.progress()
            self._logged.extend(live.logs())

    def gone(self, _task: "Execution", /) -> None:
        """Nothing to be said: the tree has it."""

    def hint(self, text: str) -> None:
        """Say something that is not of the data."""
        self._live.console.print(text, style="yellow", markup=False)

    def _render(self) -> Group | Text:
        if self._found is None or self._progress is None:
            return Text(f"{_turning(self._console)} waiting for a word of it", style="yellow")
        return render(self._found, self._progress, list(self._logged), self._console)


def render(found: "Execution", progress: ProgressReport, logged: "list[LogLine]", console: Console) -> Group:
    """The operation as it is: its tree, and the lines of the log, cut to the width of the screen."""
    tree = Tree(_label(found, progress if not found.tasks else None, console, root=True), guide_style="dim")
    room = max(console.height - _OTHER_LINES - len(logged), 3)
    _grow(tree, found, progress, console, room)
    lines = [Text(_logged(line), style="dim", overflow="ellipsis", no_wrap=True) for line in logged]
    return Group(tree, *([Text(), *lines] if lines else []))


def _grow(tree: Tree, found: "Execution", progress: ProgressReport, console: Console, room: int) -> None:
    """Put below ``tree`` what is in it: how far it is, then its tasks, of very many the last."""
    own = progress.children[: len(progress.children) - len(found.tasks)]
    if not Status.parse(found.status).final:
        for group in own:
            _grow_group(tree, group, console)
    reports = progress.children[len(own) :]
    first = max(len(found.tasks) - room, 0)
    if first:
        counted = Counter(task.status for task in found.tasks[:first])
        tree.add(Text(f"{first} more: {', '.join(f'{n} {status}' for status, n in counted.items())}", style="dim"))
    for task, report in zip(found.tasks[first:], reports[first:], strict=True):
        branch = tree.add(_label(task, report if not task.tasks else None, console))
        _grow(branch, task, report, console, room)


def _grow_group(tree: Tree, group: ProgressReport, console: Console) -> None:
    branch = tree.add(_one(Text.assemble(f"{one_line(group.name or '')}  ", *_bar(group, console))))
    for child in group.children:
        _grow_group(branch, child, console)


def _label(found: "Execution", progress: ProgressReport | None, console: Console, *, root: bool = False) -> Text:
    """Mark, name, status or progress, how long, who, and what went wrong."""
    colour = COLOURS.get(found.status, "dim")
    parts: list[tuple[str, str]] = [(f"{_mark(found.status, console)} ", colour), (called(found), "bold" * root)]
    if root:
        parts += [(f"  {one_line(found.uuid)}", "dim"), (f"  {found.status}", colour)]
    elif found.status not in (Status.SUCCESS, Status.RUNNING):
        parts.append((f"  {found.status}", colour))
    parts.append((f"  {duration(_seconds(found))}", "dim"))
    for name, number in (("run", found.run), ("attempt", found.attempt)):
        if number > 1:
            parts.append((f"  {name} {number}", "dim"))
    if found.worker and not root:
        parts.append((f"  {one_line(found.worker)}", "dim"))
    # Of one group below it a bar of its own would say the same.
    if progress and progress.total and len(progress.children) != 1 and not Status.parse(found.status).final:
        parts += [("  ", ""), *_bar(progress, console)]
    if text := one_line(found.error or found.note):
        parts.append((f"  {text}", "red" if found.error else "yellow"))
    return _one(Text.assemble(*parts))


def _bar(progress: ProgressReport, console: Console) -> list[tuple[str, str]]:
    full, rest = ("━", "─") if writes_unicode(console) else ("#", "-")
    done = min(max(round(_BAR * progress.percent / 100), 0), _BAR)
    parts = [(full * done, "green"), (rest * (_BAR - done), "dim"), (f" {progress.label}", "")]
    if progress.status_line:
        parts.append((f"  {one_line(progress.status_line)}", "cyan"))
    return parts


def _one(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _mark(status: str, console: Console) -> str:
    if status == Status.RUNNING:
        return _turning(console)
    marks: dict[Status, str] = _MARKS if writes_unicode(console) else _PLAIN_MARKS
    return marks.get(Status.parse(status), "?")


def _turning(console: Console) -> str:
    signs = _TURNING if writes_unicode(console) else _PLAIN_TURNING
    return signs[int(time.monotonic() * 8) % len(signs)]


def _seconds(found: "Execution") -> float | None:
    if found.duration_s is not None or found.started is None:
        return found.duration_s
    return max((datetime.now(UTC) - found.started).total_seconds(), 0)


def _logged(line: "LogLine") -> str:
    return f"{line.created.astimezone():%H:%M:%S} {line.level_name:7} {_of(line)}{one_line(line.message)}"


def _of(line: "LogLine") -> str:
    return f"{one_line(line.entrypoint)}: " if line.entrypoint else ""
