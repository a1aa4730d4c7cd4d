"""report_progress(): how far the running task is, for whoever looks on."""

from collections.abc import Iterable
from typing import Any

from kser import context

__all__ = ["check_progress", "parse_group", "report_progress"]


def report_progress(group_name: "str | Iterable[str] | None", current: int, total: int, status_line: str = "") -> None:
    """Tell how far the running task is. It costs next to nothing: call it at each step.

    Not each report is shown: those that follow quickly replace each other, and the last one of a group always counts.

    Args:
        group_name: the path of a group as a tuple, a list or ``"a::b"``; None: the top level.
        current: how much is done.
        total: of how much.
        status_line: what is being done, in words.

    Raises RuntimeError outside of a running task, TypeError when ``current`` or ``total`` is no whole number.
    """
    task = context.current_task()
    if task is None:
        raise RuntimeError(
            "report_progress() outside of an execution context: call it from the code of a task that is being run"
        )
    task.report_progress(current, total, status_line, group_name)


def parse_group(group_name: Any) -> tuple[str, ...]:
    """The path of a progress group: of a tuple or list of names, a text with ``::`` between them, or None.

    Raises TypeError for anything else.
    """
    if group_name is None:
        return ()
    if isinstance(group_name, str):
        return tuple(str.__str__(group_name).split("::")) if group_name else ()
    if isinstance(group_name, (tuple, list)) and all(isinstance(name, str) for name in group_name):
        return tuple(str.__str__(name) for name in group_name)
    raise TypeError(f"group_name={group_name!r}: give a tuple of names, a text like 'a::b', or None")


def check_progress(current: Any, total: Any) -> None:
    """Raise TypeError unless both are whole numbers."""
    for name, value in (("current", current), ("total", total)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: give a whole number, not a {type(value).__name__}")
