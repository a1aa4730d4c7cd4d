"""Logging, which only the command line configures: to stderr, one format."""

import logging
import sys
from typing import IO

from kser.masking import mask_text

__all__ = ["FORMAT", "FORMAT_OF_SEVERAL", "configure", "name_process", "tell_all"]

FORMAT = "%(asctime)s %(levelname)-8s %(message)s"
#: Where several processes write into one terminal or file.
FORMAT_OF_SEVERAL = "%(asctime)s %(levelname)-8s %(process)d %(message)s"

#: What these say of a broker that does not answer, a command's own error line tells as well.
_TOLD_BY_COMMANDS = ("kser.producer", "kser.confluent")
#: Of these nobody who runs a command wants to know what they do when all is well.
_CHATTY = ("alembic", "watchfiles")


class _Formatter(logging.Formatter):
    """Masks what looks secret: a failed task's error and traceback are logged here as well as told in the events."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        return mask_text(super().format(record))


class _StderrHandler(logging.StreamHandler[IO[str]]):
    """Writes to whatever sys.stderr is at the time: a live display puts itself in its place to stay in one piece."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(_Formatter(FORMAT))

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
    # Alembic says at each start which database it found: of interest to those who debug.
    logging.getLogger("alembic").setLevel(logging.DEBUG if level.upper() == "DEBUG" else logging.WARNING)
    quiet = not chosen and level.upper() == "WARNING"
    for name in _TOLD_BY_COMMANDS:
        logging.getLogger(name).setLevel(logging.CRITICAL if quiet else logging.NOTSET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING if level.upper() == "INFO" else logging.NOTSET)


def name_process() -> None:
    """From now on each line has the number of this process in it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _StderrHandler):
            handler.setFormatter(_Formatter(FORMAT_OF_SEVERAL))


def tell_all() -> None:
    """Log from the level on whoever says it: for a command that goes on whatever the broker does."""
    for name in _TOLD_BY_COMMANDS:
        logging.getLogger(name).setLevel(logging.NOTSET)
