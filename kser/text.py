"""Texts of a limited length, and objects by name."""

import importlib
from typing import Any

from kser.results import shown

__all__ = ["import_object", "short_repr", "trim_string"]


def trim_string(s: str, maxlen: int = 1024, ellps: str = "...") -> str:
    """``s`` in at most ``maxlen`` characters; where it was cut, ``ellps`` stands at its end, counted in."""
    if len(s) <= maxlen:
        return s
    if maxlen <= len(ellps):
        return ellps[: max(maxlen, 0)]
    return s[: maxlen - len(ellps)] + ellps


def short_repr(obj: Any, maxlen: int = 50) -> str:
    """repr() in at most ``maxlen`` characters, ``...`` at the end where it was cut. Never raises."""
    return trim_string(shown(obj), maxlen)


def import_object(name: str) -> Any:
    """The object ``package.module:name``; ``package.module:Class.method`` goes further in.

    Raises ValueError for a name that has not exactly one colon, with something on both sides, and ImportError when
    the module or the object is not there.
    """
    module, _, path = name.partition(":")
    if not module or not path or ":" in path:
        raise ValueError(f"{name!r} is no name of an object: write package.module:name")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as exc:
            raise ImportError(f"{name!r}: {shown(found)} has no {part!r}") from exc
    return found
