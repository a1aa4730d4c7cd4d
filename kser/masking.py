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
_CHANGED = "(changed while it was to be shown)"
#: Longest text, in characters, that is remembered with its secrets masked.
_SHORT = 512
#: After one of these at the end of a line a value may follow in the next one.
_OPEN = ('"', "'", ":")
_SIGNS = ("=", "'", '"', "://")
#: ``"password": "x"``, ``password=x``, ``Authorization: Basic x`` and ``scheme://user:x@host``. Of a list or dict only
#: how it begins.
_SECRETS = re.compile(
    r"""(?P<quote>["'])(?P<quoted>[\w.\-]{1,100})(?P=quote)\s*:\s*"""
    r"""(?P<value1>"[^"\n]*"?|'[^'\n]*'?|[\[{(]|[^\s,;}\])]+)"""
    r"""|(?<![\w.\-])(?P<plain>[\w.\-]{1,100})="""
    r"""(?P<value2>"[^"\n]*"?|'[^'\n]*'?|[\[{(]|[^\s,;&}\])]+)"""
    r"""|(?<!\w)authorization:\s*(?P<value3>[^\n"',;]+)"""
    r"""|://[^\s/:@]*:(?P<value4>[^\s/]+)@""",
    re.IGNORECASE,
)
_VALUES = ("value1", "value2", "value3", "value4")
_BRACKETS = frozenset("[{(")
#: The rest of a list or dict, up to where it closes first.
_REST = re.compile(r"[^\]})\n]*[\]})]*")


def looks_secret(name: str) -> bool:
    """True when one of the words of ``name`` (api_key, apiKey, sasl.password) is, or begins with, a secret one."""
    return looks_secret_by(name, extra_words())


def extra_words() -> str:
    """What the environment has as more words: for who asks looks_secret_by() often."""
    return os.environ.get(EXTRA_WORDS_VARIABLE, "")


@functools.lru_cache(maxsize=4096)
def looks_secret_by(name: str, extra: str) -> bool:
    """looks_secret() when the environment has these ``extra`` words."""
    words = _WORDS
    if extra:
        words += tuple(word.strip().lower() for word in extra.split(",") if word.strip())
    lowered = name.lower()
    return any(part in words or part.rstrip("s") in words for part in (p.lower() for p in _SPLIT.split(name))) or any(
        word in lowered for word in words if word != "key"
    )


def mask(value: Any) -> Any:
    """A copy of ``value`` in which the values under secret names, at any depth, are replaced by MASK.

    Never raises: what refers to itself or is nested too deep for a copy is replaced by a text that says so, and so is
    what another thread changes meanwhile.
    """
    try:
        return _mask(value, extra_words())
    except RecursionError:
        return _TOO_DEEP
    except RuntimeError:  # a task that was given up may still be at work with its params
        return _CHANGED


def mask_text(text: str) -> str:
    """``text`` in which the values that are written beside secret names are replaced by MASK."""
    # Most lines of a log have none of what _SECRETS begins to match at, and it is slow to find that out.
    if not any(sign in text for sign in _SIGNS) and "authorization:" not in text.lower():
        return text
    extra = extra_words()
    # The same text is often asked for in several places, and most lines of a traceback were there the last time, too.
    if len(text) <= _SHORT:
        return _masked_before(text, extra)
    return "\n".join(
        [_masked_before(part, extra) if len(part) <= _SHORT else _mask_text(part, extra) for part in _apart(text)]
    )


def _apart(text: str) -> list[str]:
    """The lines of a text, together where a name may be at the end of the one and its value in the next."""
    lines = text.split("\n")
    parts = []
    start = 0
    for at, line in enumerate(lines, 1):
        last = line.rstrip()[-1:]
        if last in _OPEN if last else at - 1 > start:
            continue
        parts.append(line if at - 1 == start else "\n".join(lines[start:at]))
        start = at
    if start < len(lines):
        parts.append("\n".join(lines[start:]))
    return parts


def _mask_text(text: str, extra: str) -> str:
    shown: list[str] = []
    end = at = 0
    while (found := _SECRETS.search(text, at)) is not None:
        kind = next(kind for kind in _VALUES if found[kind] is not None)
        first, at = found.span(kind)
        name = found["quoted"] or found["plain"]
        if name is not None and not looks_secret_by(name, extra):
            continue  # of a list or dict what is in it has names of its own
        if text[first:at] in _BRACKETS and (rest := _REST.match(text, at)) is not None:
            at = rest.end()
        shown += (text[end:first], MASK)
        end = at
    return "".join([*shown, text[end:]]) if shown else text


_masked_before = functools.lru_cache(maxsize=2048)(_mask_text)


def _mask(value: Any, extra: str) -> Any:
    if isinstance(value, dict):
        return {
            k: MASK
            if isinstance(k, str) and v not in (None, "", {}, []) and looks_secret_by(k, extra)
            else _mask(v, extra)
            if type(v) is not str
            else v
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mask(v, extra) for v in value]
    return value
