"""What the user did wrong, what failed, and how either is told: one line on stderr and an exit code."""

import os
import threading
import traceback
from types import FrameType

import click

from kser.errors import ConfigurationError, Error, ValidationError
from kser.loading import where

__all__ = ["FAILED", "MISUSE", "CommandFailed", "debugging", "explain", "interrupt"]

#: Exit code of what was tried and did not work.
FAILED = 1
#: Exit code of what could not be tried: wrong options, settings, files.
MISUSE = 2
INTERRUPTED = 130


class CommandFailed(click.ClickException):
    """Ends the command with this one line on stderr and an exit code, 1 unless another one says more."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def debugging() -> bool:
    """True when KSER_DEBUG asks for tracebacks."""
    return os.environ.get("KSER_DEBUG", "").lower() not in ("", "0", "false", "no")


_interrupted = threading.Event()


def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface of signal handlers
    """Handler of SIGINT: Python's own, but that explain() knows of it when the exception is lost on its way.

    Source: confluent-kafka 2.16, a flush() interrupted by a signal raises SystemError instead of what the handler did.
    """
    _interrupted.set()
    raise KeyboardInterrupt


def explain(exc: BaseException) -> int:
    """Tell ``exc`` on stderr; the exit code it means."""
    if isinstance(exc, (KeyboardInterrupt, click.Abort)) or _interrupted.is_set():
        return INTERRUPTED
    if debugging():
        traceback.print_exception(exc)
    text, code = _told(exc)
    click.echo(f"kser: error: {' '.join(text.split())}", err=True)
    return code


def _told(exc: BaseException) -> tuple[str, int]:
    match exc:
        case CommandFailed():
            return exc.format_message(), exc.code
        case click.UsageError():
            path = exc.ctx.command_path if exc.ctx is not None else "kser"
            return f"{_sentence(exc.format_message())} Try: {path} --help", MISUSE
        case click.ClickException():
            return exc.format_message(), MISUSE
        case ConfigurationError() | ValidationError():
            return str(exc.message), MISUSE
        case Error():
            return str(exc.message), FAILED
    return f"{type(exc).__name__}: {exc} ({where(exc)}; KSER_DEBUG=1 shows the traceback)", FAILED


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."
