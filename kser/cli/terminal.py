"""Text for a terminal: on one line, no wider than it is, and without anything that it would obey.

What commands show came from messages, errors and logs, which may hold anything.
"""

import json
import shutil
import sys
from typing import Any

from kser.masking import mask

__all__ = ["fit", "json_lines", "one_line", "printable", "terminal_width", "width_of"]


def terminal_width() -> int | None:
    """Columns of the terminal; None when stdout is none."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return max(shutil.get_terminal_size().columns, 40)


def one_line(text: str) -> str:
    """``text`` on one line, and printable()."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """``text`` without what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text)


def width_of(text: str) -> int:
    """Columns that the text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # here: it takes its time, and most text needs none of it

    return cell_len(text)


def fit(text: str, width: int | None) -> str:
    """``text`` in at most so many columns; None: as it is."""
    if width is None or width_of(text) <= width:
        return text
    if text.isascii():
        return text[: width - 1] + _ellipsis()
    from rich.cells import set_cell_size

    return set_cell_size(text, width - 1).rstrip() + _ellipsis()


def json_lines(value: Any) -> list[str]:
    """JSON on several lines; values under names that look secret are masked."""
    try:
        return json.dumps(mask(value), indent=2, ensure_ascii=False).splitlines()
    except RecursionError:
        return ["(nested too deep to be shown)"]


def _ellipsis() -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return "\u2026" if encoding.lower().startswith("utf") else "~"
