"""How far a task is: report_progress() tells it, and a ProgressReport is the tree of what was told.

Groups are inside groups, each with numbers of its own or the sum of what is in it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kser import context

__all__ = ["SEPARATOR", "ProgressReport", "check_progress", "parse_group", "report_progress"]

#: Between the names of nested groups, where a group is written as one text.
SEPARATOR = "::"

#: One row of progress: group path, current, total, status line.
Row = tuple[Sequence[str] | str | None, int, int, str]


def report_progress(group_name: "str | Iterable[str] | None", current: int, total: int, status_line: str = "") -> None:
    """Tell how far the running task is. It costs next to nothing: call it at each step.

    Not each report is shown: those that follow quickly replace each other, and the last one of a group always counts.

    Args:
        group_name: the path of a group as a tuple, a list or ``"a::b"``; None: the top level.
        current: how much is done.
        total: of how much.
        status_line: what is being done, in words. What looks secret in it, or in a name, is masked as in a log line.

    Raises RuntimeError outside of a running task, TypeError when ``current`` or ``total`` is no whole number, or
    ``group_name`` no group.
    """
    task = context.current_task()
    if task is None:
        raise RuntimeError(
            "report_progress() outside of an execution context: call it from the code of a task that is being run"
        )
    task.report_progress(group_name, current, total, status_line)


def parse_group(group_name: Any) -> tuple[str, ...]:
    """The path of a progress group: of a tuple or list of names, a text with ``::`` between them, or None.

    Raises TypeError for anything else.
    """
    if group_name is None:
        return ()
    if isinstance(group_name, str):
        return tuple(str.__str__(group_name).split(SEPARATOR)) if group_name else ()
    if isinstance(group_name, (tuple, list)) and all(isinstance(name, str) for name in group_name):
        return tuple(str.__str__(name) for name in group_name)
    raise TypeError(f"group_name={group_name!r}: give a tuple of names, a text like 'a::b', or None")


def check_progress(current: Any, total: Any) -> None:
    """Raise TypeError unless both are whole numbers."""
    for name, value in (("current", current), ("total", total)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{name}={value!r}: give a whole number, not a {type(value).__name__}; "
                "the order is report_progress(group_name, current, total, status_line)"
            )


@dataclass(init=False, slots=True, repr=False, eq=True)
class ProgressReport:
    """How far a group has come, and the groups inside it.

    Args:
        name: of the group; None at the top.
        current: steps done; None: the sum of the children's.
        total: steps there are; None: the sum of the children's.
        status_line: what happens now, in words.
        children: the groups inside.
    """

    name: str | None
    status_line: str | None
    children: list["ProgressReport"]
    _current: int | None
    _total: int | None

    def __init__(
        self,
        name: str | None,
        current: int | None = None,
        total: int | None = None,
        status_line: str | None = None,
        children: "Iterable[ProgressReport] | None" = None,
    ) -> None:
        self.name = name
        self.status_line = status_line
        self.children = list(children or ())
        self._current = current
        self._total = total

    @classmethod
    def from_table(cls, rows: Iterable[Row], name: str | None = None) -> "ProgressReport":
        """The tree of rows (group, current, total, status line), in any order; groups in the order they come in.

        Raises TypeError for a group that is no text, tuple, list or None.
        """
        root = cls(name)
        for group, current, total, status_line in rows:
            node = root
            for part in parse_group(group):
                node = node._child(part)
            node._current, node._total, node.status_line = current, total, status_line or None
        return root

    @property
    def current(self) -> int:
        """Steps done: its own number, else the sum of the children's."""
        return self._current if self._current is not None else sum(child.current for child in self.children)

    @property
    def total(self) -> int:
        """Steps there are: its own number, else the sum of the children's."""
        return self._total if self._total is not None else sum(child.total for child in self.children)

    @property
    def percent(self) -> float:
        """0.0 to 100.0 as the numbers say; 0.0 when there is nothing to do."""
        return self.current * 100.0 / self.total if self.total else 0.0

    @property
    def label(self) -> str:
        """As in ``5/10 (50%)``; 100% is all of it, and not nearly."""
        return f"{self.current}/{self.total} ({math.floor(self.percent)}%)"

    def to_json(self) -> dict[str, Any]:
        """name, current, total, percent, label, status_line, and children of the same form."""
        return {
            "name": self.name,
            "current": self.current,
            "total": self.total,
            "percent": self.percent,
            "label": self.label,
            "status_line": self.status_line,
            "children": [child.to_json() for child in self.children],
        }

    def _child(self, name: str) -> "ProgressReport":
        for child in self.children:
            if child.name == name:
                return child
        made = ProgressReport(name)
        self.children.append(made)
        return made

    def __repr__(self) -> str:
        return f"ProgressReport({self.name!r}, {self.label}, {len(self.children)} children)"
