"""Logging, which only the command line configures: to stderr, one format."""

import logging
import sys
from typing import IO

__all__ = ["FORMAT", "configure"]

FORMAT = "%(asctime)s %(levelname)-8s %(message)s"

#: What these say of a message that was not sent, the commands tell by themselves, in one line.
_TOLD_BY_COMMANDS = "kser.producer"


class _StderrHandler(logging.StreamHandler[IO[str]]):
    """Writes to whatever sys.stderr is at the time: a live display puts itself in its place to stay in one piece."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter(FORMAT))

    @property
    def stream(self) -> IO[str]:  # type: ignore[override]  # StreamHandler sets it once
        """The present sys.stderr."""
        return sys.stderr


def configure(level: str, *, chosen: bool = True) -> None:
    """Log from ``level`` on, to stderr. A second call changes the level only.

    Args:
        level: debug, info, warning or error.
        chosen: False when the user did not ask for this level: then a command's own errors are not logged as well.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler())
    root.setLevel(level.upper())
    quiet = not chosen and level.upper() == "WARNING"
    logging.getLogger(_TOLD_BY_COMMANDS).setLevel(logging.CRITICAL if quiet else logging.NOTSET)
