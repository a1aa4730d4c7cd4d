"""The text that Python writes of an exception, at a fraction of what Python takes: what fails, does so there again.

A stack is looked up by the places in the code that it is made of, so its text is that of the source as it was when
something failed there for the first time. What is not plain is left to the traceback module.
"""

import sys
import traceback
from types import CodeType, TracebackType
from typing import Final

__all__ = ["format_exception", "format_exception_only"]

#: The traceback module looks into these: for the place of the error, for what they are a group of, for a name that may
#: have been meant.
_SPECIAL: Final[tuple[type[BaseException], ...]] = (
    (SyntaxError, BaseExceptionGroup, NameError, AttributeError, ImportError)
    if sys.version_info >= (3, 12)
    else (SyntaxError, BaseExceptionGroup)
)
_FOLLOWED: Final = "\nThe above exception was the direct cause of the following exception:\n\n"
_MEANWHILE: Final = "\nDuring handling of the above exception, another exception occurred:\n\n"
#: Stacks that are remembered, and the most frames of one.
_KEPT: Final = 512
_FRAMES: Final = 64

#: Places in code -> the code, so that its id stays its own, and the text.
_stacks: dict[tuple[int, ...], tuple[list[CodeType], str]] = {}


def format_exception(exc: BaseException) -> str:
    """What traceback.format_exception() gives, as one text. Never raises, as that may."""
    text = _plain(exc)
    if text is None:
        try:
            text = "".join(traceback.format_exception(exc))
        except Exception:  # noqa: BLE001 - user code: an exception that does not even let itself be looked at
            text = f"{type(exc).__name__} whose traceback cannot be told\n"
    return text


def format_exception_only(exc: BaseException) -> str:
    """What traceback.format_exception_only() gives, as one text."""
    return _last_line(exc) or "".join(traceback.format_exception_only(exc))


def _plain(exc: BaseException) -> str | None:
    """The text of an exception; None where it takes more than is done here."""
    if getattr(sys, "tracebacklimit", None) is not None:
        return None
    parts: list[str] = []  # the last one first
    seen = set()
    one: BaseException | None = exc
    while one is not None:
        last = _last_line(one)
        if last is None or id(one) in seen:
            return None
        seen.add(id(one))
        cause, around = one.__cause__, one.__context__
        if cause is not None and around is not None and around is not cause:
            return None  # what is told of the cause depends on what it shares with the other one
        parts += (last, _stack(one.__traceback__))
        if cause is not None:
            parts.append(_FOLLOWED)
            one = cause
        elif around is not None and not one.__suppress_context__:
            parts.append(_MEANWHILE)
            one = around
        else:
            one = None
    parts.reverse()
    return "".join(parts)


def _last_line(exc: BaseException) -> str | None:
    """The line that says which exception it is; None when there is more to it."""
    kind = type(exc)
    if issubclass(kind, _SPECIAL):
        return None
    try:
        if getattr(exc, "__notes__", None) is not None:
            return None
        text, module, name = str(exc), kind.__module__, kind.__qualname__
    except Exception:  # noqa: BLE001 - user code: an exception that cannot even say what it is
        return None
    if type(text) is not str or type(module) is not str:
        return None
    if module not in ("__main__", "builtins"):
        name = f"{module}.{name}"
    return f"{name}: {text}\n" if text else f"{name}\n"


def _stack(tb: TracebackType | None) -> str:
    if tb is None:
        return ""
    places: list[int] = []
    codes: list[CodeType] = []
    at: TracebackType | None = tb
    while at is not None:
        code = at.tb_frame.f_code
        codes.append(code)
        places += (id(code), at.tb_lasti, at.tb_lineno or 0)
        at = at.tb_next
    key = tuple(places)
    known = _stacks.get(key)
    if known is not None:
        return known[1]
    text = "Traceback (most recent call last):\n" + "".join(traceback.format_tb(tb))
    if len(codes) <= _FRAMES:
        if len(_stacks) >= _KEPT:
            _stacks.clear()
        _stacks[key] = (codes, text)
    return text
