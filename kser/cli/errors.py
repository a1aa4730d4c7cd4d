"""What the user did wrong, what failed, and how either is told: one line on stderr and an exit code."""

import os
import sysconfig
import threading
import traceback
from pathlib import Path
from types import FrameType

import click

from kser.errors import ConfigurationError, Error, ValidationError

__all__ = ["FAILED", "MISUSE", "CommandFailed", "debugging", "explain", "interrupt", "where"]

#: Exit code of what was tried and did not work.
FAILED = 1
#: Exit code of what could not be tried: wrong options, settings, files.
MISUSE = 2
INTERRUPTED = 130


class CommandFailed(click.ClickException):
    """Ends the command with this one line on stderr and exit code 1."""

    exit_code = FAILED


def debugging() -> bool:
    """True when KSER_DEBUG asks for tracebacks."""
    return os.environ.get("KSER_DEBUG", "").lower() not in ("", "0", "false", "no")


#: Where code that is not the user's lies: kser, the standard library, what was installed.
_FOREIGN = (
    Path(__file__).resolve().parent.parent,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
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
            return exc.format_message(), FAILED
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


def where(exc: BaseException) -> str:
    """``file:line`` of ``exc``: the innermost line of the user's own code, else the innermost of all."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{_short(exc.filename)}:{exc.lineno}"
    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if _is_users(f.filename)]
    found = (own or frames)[-1] if frames else None
    return f"{_short(found.filename)}:{found.lineno}" if found is not None else "nowhere"


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    return not any(path.is_relative_to(folder) for folder in _FOREIGN)


def _short(filename: str) -> str:
    try:
        return str(Path(filename).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return filename


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."
