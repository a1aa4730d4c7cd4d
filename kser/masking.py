"""Masking of values whose name looks secret: one list, in one place, for logs, results and pages."""

import functools
import os
import re
from typing import Any

__all__ = ["MASK", "looks_secret", "mask", "mask_text"]

#: What is shown instead of a secret value.
MASK = "********"

_WORDS: tuple[str, ...] = (
    "password", "passwd", "passphrase", "secret", "token", "key", "apikey", "credential", "authorization"
)  # fmt: skip
#: Environment variable with more words, separated by commas. Read at each use.
EXTRA_WORDS_VARIABLE = "KSER_SECRET_WORDS"
_SPLIT = re.compile(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_TOO_DEEP = "(nested too deep to be shown)"
#: ``"password": "x"``, ``password=x``, ``Authorization: Basic x`` and ``scheme://user:x@host``.
_SIGNS = ("=", "'", '"', "://")
_SECRETS = re.compile(
    r"""(?P<quote>["'])(?P<quoted>[\w.\-]{1,100})(?P=quote)\s*:\s*(?P<value1>"[^"\n]*"?|'[^'\n]*'?|[^\s,;}\])]+)"""
    r"""|(?<![\w.\-])(?P<plain>[\w.\-]{1,100})=(?P<value2>"[^"\n]*"?|'[^'\n]*'?|[^\s,;&}\])]+)"""
    r"""|(?<!\w)authorization:\s*(?P<value3>[^\n"',;]+)"""
    r"""|://[^\s/:@]*:(?P<value4>[^\s/]+)@""",
    re.IGNORECASE,
)


def looks_secret(name: str) -> bool:
    """True when one of the words of ``name`` (api_key, apiKey, sasl.password) is, or begins with, a secret one."""
    return _looks_secret(name, os.environ.get(EXTRA_WORDS_VARIABLE, ""))


@functools.lru_cache(maxsize=4096)
def _looks_secret(name: str, extra: str) -> bool:
    words = _WORDS
    if extra:
        words += tuple(word.strip().lower() for word in extra.split(",") if word.strip())
    lowered = name.lower()
    return any(part in words or part.rstrip("s") in words for part in (p.lower() for p in _SPLIT.split(name))) or any(
        word in lowered for word in words if word != "key"
    )


def mask(value: Any) -> Any:
    """A copy of ``value`` in which the values under secret names, at any depth, are replaced by MASK.

    Never raises: what refers to itself or is nested too deep for a copy is replaced by a text that says so.
    """
    try:
        return _mask(value)
    except RecursionError:
        return _TOO_DEEP


def mask_text(text: str) -> str:
    """``text`` in which the values that are written beside secret names are replaced by MASK."""
    # Most lines of a log have none of what _SECRETS begins to match at, and it is slow to find that out.
    if not any(sign in text for sign in _SIGNS) and "authorization:" not in text.lower():
        return text
    return _SECRETS.sub(_masked, text)


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: MASK if isinstance(k, str) and v not in (None, "", {}, []) and looks_secret(k) else _mask(v)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mask(v) for v in value]
    return value


def _masked(found: "re.Match[str]") -> str:
    name = found["quoted"] or found["plain"]
    if name is not None and not looks_secret(name):
        return found[0]
    kind = next(kind for kind in ("value1", "value2", "value3", "value4") if found[kind] is not None)
    start, end = found.span(kind)
    whole = found.string[found.start() : found.end()]
    return whole[: start - found.start()] + MASK + whole[end - found.start() :]
