"""What goes into a storage and comes out of it: JSON only, texts that every database takes, times in UTC."""

import json
import math
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from kser import results
from kser.errors import SerializationError, ValidationError

__all__ = ["as_utc", "clean_text", "dump_any_json", "dump_json", "from_ms", "load_json", "now", "one_line"]

_DEEPEST = 200


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


@lru_cache(maxsize=4096)  # of a busy worker many events have the same
def from_ms(milliseconds: int) -> datetime | None:
    """The time so many milliseconds after the epoch; None for 0, and for what no calendar has."""
    if milliseconds <= 0:
        return None
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def as_utc(name: str, value: datetime | None) -> datetime | None:
    """``value`` in UTC. Raises ValidationError for one without a time zone: nobody knows when that is."""
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValidationError(f"{name}={value!r}: give a datetime with a time zone, as datetime.now(UTC) has one")
    return value.astimezone(UTC)


def dump_json(value: Any, what: str) -> str:
    """``value`` as JSON text in ASCII; tuples become lists.

    Raises SerializationError naming the place and the type of what JSON has no form for: it would come back as
    something else.
    """
    _check(value, what, 0)
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def dump_any_json(value: Any) -> str:
    """``value``, which came out of JSON, as JSON text again. Never raises: what cannot be written becomes text."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # large numbers, lone surrogates
        return json.dumps(results.json_safe(value), separators=(",", ":"))


def load_json(text: str | None) -> Any:
    """What dump_json() wrote; None for None."""
    return None if text is None else json.loads(text)


def _check(value: Any, where: str, depth: int) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if depth > _DEEPEST:
        raise SerializationError(f"{where} is nested deeper than {_DEEPEST}: store it flat, or a reference to it")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SerializationError(f"{where} is {value}: JSON has no form for it")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SerializationError(f"{where} has the key {key!r}, a {type(key).__name__}: JSON has texts only")
            _check(item, f"{where}.{key}", depth + 1)
    else:
        raise SerializationError(
            f"{where} is a {type(value).__name__}: JSON has no form for it; give dict, list, str, int, float, bool or "
            "None",
            extra={"type": type(value).__name__},
        )


def clean_text(text: str) -> str:
    """``text`` as every database takes it: NUL and lone surrogates are written with backslashes."""
    if text.isascii() and "\x00" not in text:
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


def one_line(text: str, limit: int = 500) -> str:
    """The first line that is not empty, cut to ``limit``."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= limit else line[: limit - 3] + "..."
