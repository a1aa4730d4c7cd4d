"""TracebackInfo: a traceback as data, with the code around each line and the local variables.

It is made while the frames are still there, keeps none of them, and goes into JSON and back. What looks secret is
masked when it is made.
"""

import contextlib
import enum
import functools
import itertools
import json
import linecache
import logging
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, Self

import orjson

from kser.errors import ValidationError
from kser.masking import MASK, extra_words, looks_secret, looks_secret_by, mask_text
from kser.stacks import format_exception, format_exception_only

__all__ = ["FrameInfo", "TracebackInfo", "hide", "log_raised", "secret_values"]

#: Lines of code before and after the one that was being run.
CONTEXT: Final = 5
#: Longest repr of a local variable, in characters.
MAX_REPR: Final = 1024
#: Of more frames than these the ones in the middle are left out: a recursion without end has a thousand.
_FIRST: Final = 10
_LAST: Final = 40
_MAX_LOCALS: Final = 50
_MAX_LINE: Final = 500
_MAX_TEXT: Final = 4096
#: Causes of causes that are kept.
_MAX_CAUSES: Final = 5
#: Entries of a container, and levels of nesting, that are shown.
_MAX_ENTRIES: Final = 100
_MAX_DEPTH: Final = 6
#: A masked value that is shorter is not looked for in other texts: it may be a part of many words.
_MIN_SECRET: Final = 6
_LEAST_SECRET_NUMBER: Final = 10 ** (_MIN_SECRET - 1)
_LARGEST_SECRET_NUMBER: Final = 10**100
#: Levels of nesting that are looked through for them, and names that are looked at in all.
_DEEPEST_LOOK: Final = 3
_MOST_LOOKS: Final = 5000
_HOW: Final = {
    "cause": "The above exception was the direct cause of the following exception:",
    "context": "During handling of the above exception, another exception occurred:",
}
#: ``password = "x"`` and ``password: str = "x"`` in code.
_CODE: Final = re.compile(r"""(?P<name>\w+)(?P<between>\s*(?::[^=]*)?=\s*\w{0,2})(?P<text>(?P<q>["']).*)""")


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """One call."""

    filename: str
    lineno: int
    function: str
    #: The line of code, and those around it, as they are in the file; "" and () when it cannot be read.
    line: str = ""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    #: Name -> repr() of each local variable, MAX_REPR characters of it at most.
    locals: Mapping[str, str] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """The frame as JSON data."""
        return {
            "filename": self.filename,
            "lineno": self.lineno,
            "function": self.function,
            "line": self.line,
            "before": list(self.before),
            "after": list(self.after),
            "locals": dict(self.locals),
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """The frame in what dump() gave. Raises KeyError and TypeError for what is none."""
        return cls(
            str(data["filename"]),
            int(data["lineno"]),
            str(data["function"]),
            str(data.get("line", "")),
            tuple(map(str, data.get("before", ()))),
            tuple(map(str, data.get("after", ()))),
            {str(name): str(value) for name, value in data.get("locals", {}).items()},
        )

    def format(self, *, context: bool, variables: bool) -> Iterator[str]:
        """The lines of it."""
        yield f'  File "{self.filename}", line {self.lineno}, in {self.function}'
        if context and (self.before or self.after):
            around = [*self.before, self.line, *self.after]
            width = len(str(self.lineno + len(self.after)))
            for number, code in enumerate(around, self.lineno - len(self.before)):
                mark = ">" if number == self.lineno else " "
                yield f"    {mark} {number:{width}}  {code}".rstrip()
        elif self.line:
            yield f"    {self.line.strip()}"
        if variables:
            for name, value in self.locals.items():
                yield f"      {name} = {value}"


@dataclass(frozen=True, slots=True)
class TracebackInfo:
    """A traceback, and the exception at its end.

    Frames of kser before the first one of other code are left out: they are the same for each task, and tell nothing.
    """

    #: Outermost first.
    frames: tuple[FrameInfo, ...] = ()
    #: The exception as Python shows it, ``ValueError: no``; "" when there is only a traceback.
    exception: str = ""
    #: The name of its class.
    type: str = ""
    #: How many frames in the middle were left out.
    cut: int = 0
    #: What it came from, and how: "cause" (``raise ... from``) or "context" (while that was being handled).
    cause: "TracebackInfo | None" = None
    how: Literal["", "cause", "context"] = ""

    # -- made ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_current_exc(cls) -> "TracebackInfo":
        """Of the exception that is being handled. Raises ValidationError when there is none."""
        exc = sys.exception()
        if exc is None:
            raise ValidationError("No exception is being handled: call from_current_exc() in an except block")
        return cls.from_exception(exc)

    @classmethod
    def from_tb(cls, tb: types.TracebackType | None) -> "TracebackInfo":
        """Of a traceback alone. Never raises."""
        secrets = _Secrets()
        _search(_variables_of(tb), secrets)
        return _hidden(_made(None, tb, secrets), secrets.values)

    @classmethod
    def from_exception(cls, exc: BaseException) -> "TracebackInfo":
        """Of an exception, with what caused it. Never raises, whatever the exception and the variables are."""
        secrets = _Secrets()
        _search(_variables_behind(exc, []), secrets)
        return _hidden(_with_causes(exc, secrets), secrets.values)

    @property
    def tells(self) -> bool:
        """False when only kser's own code was at work: the text of its error says all."""
        return bool(self.frames) or self.cause is not None

    def fitted(self, max_bytes: int) -> "TracebackInfo":
        """The same in at most so many bytes of JSON (16 KiB or more): what says least is left out first."""
        least = replace(self._only(0, context=False), cause=None, how="")
        for info in (self, self._only(5), self._only(1), least):
            if len(json.dumps(info.dump(), separators=(",", ":"))) <= max_bytes:
                return info
        kept = self.frames[-5:]
        bare = tuple(FrameInfo(f.filename[-200:], f.lineno, f.function[:100], f.line[:100]) for f in kept)
        left_out = self.cut + len(self.frames) - len(kept)
        return TracebackInfo(bare, self.exception[:500], self.type[:100], left_out)

    def to_bytes(self, max_bytes: int) -> bytes:
        """JSON of it, as fitted() makes it fit."""
        raw = _json(self.dump())
        return raw if len(raw) <= max_bytes and raw.isascii() else _json(self.fitted(max_bytes).dump())

    def _only(self, last: int, *, context: bool = True) -> "TracebackInfo":
        """Only the ``last`` frames have variables, and the code around them."""
        at = len(self.frames) - last
        frames = tuple(
            frame if n >= at else FrameInfo(frame.filename, frame.lineno, frame.function, frame.line)
            for n, frame in enumerate(self.frames)
        )
        if not context:
            frames = frames[-_LAST:]
        cause = self.cause._only(last, context=context) if self.cause is not None else None
        return replace(self, frames=frames, cut=self.cut + len(self.frames) - len(frames), cause=cause)

    # -- as data -------------------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """JSON data: exception, type, frames, and where they are not empty cut, cause and how."""
        data: dict[str, Any] = {
            "exception": self.exception,
            "type": self.type,
            "frames": [frame.dump() for frame in self.frames],
        }
        if self.cut:
            data["cut"] = self.cut
        if self.cause is not None:
            data |= {"cause": self.cause.dump(), "how": self.how}
        return data

    @classmethod
    def load(cls, data: Any) -> "TracebackInfo":
        """What dump() gave. Raises ValidationError when it is something else."""
        try:
            cause, how = data.get("cause"), data.get("how", "")
            return cls(
                frames=tuple(FrameInfo.load(frame) for frame in data["frames"]),
                exception=str(data["exception"]),
                type=str(data.get("type", "")),
                cut=int(data.get("cut", 0)),
                cause=cls.load(cause) if cause is not None else None,
                how=how if how in _HOW else "",
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
            raise ValidationError(f"Not a traceback of kser: {exc!r}") from None

    # -- as text -------------------------------------------------------------------------------------------------------

    def format(self, *, context: bool = True, variables: bool = True) -> str:
        """The text of it, as Python's own but with the code around each line and the variables unless not wanted."""
        lines: list[str] = []
        if self.cause is not None:
            lines += [self.cause.format(context=context, variables=variables), "", _HOW.get(self.how, ""), ""]
        lines.append("Traceback (most recent call last):")
        for n, frame in enumerate(self.frames):
            if self.cut and n == min(_FIRST, len(self.frames) // 2):
                lines.append(f"  ... {self.cut} more ...")
            lines += frame.format(context=context, variables=variables)
        if self.exception:
            lines.append(self.exception)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.format()


# -- inside ------------------------------------------------------------------------------------------------------------


class _Secrets:
    """What is secret in one traceback: names that look so, and the values that they had."""

    __slots__ = ("values", "words")

    def __init__(self) -> None:
        #: More words, read once: many names are asked for.
        self.words = extra_words()
        self.values: set[str] = set()


def _json(data: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(data)
    except TypeError:  # a lone surrogate, in one that was loaded
        return json.dumps(data, separators=(",", ":")).encode()


def _with_causes(exc: BaseException, secrets: _Secrets) -> TracebackInfo:
    """Of the exception and of what it came from, each once."""
    chain: list[tuple[BaseException, Literal["", "cause", "context"]]] = []
    following: BaseException | None = exc
    how: Literal["", "cause", "context"] = ""
    while following is not None and len(chain) <= _MAX_CAUSES and all(following is not seen for seen, _ in chain):
        chain.append((following, how))
        if following.__cause__ is not None:
            following, how = following.__cause__, "cause"
        else:
            following, how = (None if following.__suppress_context__ else following.__context__), "context"
    info: TracebackInfo | None = None
    came: Literal["", "cause", "context"] = ""
    for one, leads in reversed(chain):
        made = _made(one, one.__traceback__, secrets)
        info = made if info is None else replace(made, cause=info, how=came)
        came = leads
    assert info is not None
    return info


def _made(exc: BaseException | None, tb: types.TracebackType | None, secrets: _Secrets) -> TracebackInfo:
    found: list[tuple[types.FrameType, int]] = []
    while tb is not None:
        frame = tb.tb_frame
        if found or not _is_ours(frame):
            found.append((frame, tb.tb_lineno or 0))
        tb = tb.tb_next
    cut = max(len(found) - _FIRST - _LAST, 0)
    if cut:
        found = found[:_FIRST] + found[-_LAST:]
    return TracebackInfo(
        frames=tuple([_frame(frame, lineno, secrets) for frame, lineno in found]),
        exception=_text(exc) if exc is not None else "",
        type=type(exc).__name__ if exc is not None else "",
        cut=cut,
    )


def _is_ours(frame: types.FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and (name == "kser" or name.startswith("kser."))


def _text(exc: BaseException) -> str:
    try:
        text = format_exception_only(exc).rstrip("\n")
    except Exception:  # noqa: BLE001 - user code: an exception that cannot even say what it is
        text = type(exc).__name__
    return mask_text(_trimmed(text, _MAX_TEXT))


def _frame(frame: types.FrameType, lineno: int, secrets: _Secrets) -> FrameInfo:
    code = frame.f_code
    key = (id(code), lineno, secrets.words)
    known = _places.get(key)
    if known is None:
        known = (code, _place(frame, lineno))
        if len(_places) >= _KEPT:
            _places.clear()
        _places[key] = known
    return FrameInfo(*known[1], dict(_variables(frame, secrets)))


#: Everything of a frame that is the same each time: filename, lineno, function, line, before, after.
_Place = tuple[str, int, str, str, tuple[str, ...], tuple[str, ...]]

#: Code by its id and line and the words that look secret -> the code, so that its id stays its own, and the place.
_places: dict[tuple[int, int, str], tuple[types.CodeType, _Place]] = {}
#: Places that are remembered: what fails does so there again. The code around one is that of the first time.
_KEPT: Final = 512


def _place(frame: types.FrameType, lineno: int) -> _Place:
    code = frame.f_code
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, frame.f_globals)
    at = lineno - 1

    def between(start: int, stop: int) -> tuple[str, ...]:
        return tuple(_code(line) for line in lines[max(start, 0) : max(stop, 0)])

    return (
        _trimmed(code.co_filename, _MAX_LINE),
        lineno,
        _trimmed(code.co_qualname, _MAX_LINE),
        _code(lines[at]) if 0 <= at < len(lines) else "",
        between(at - CONTEXT, at),
        between(at + 1, at + 1 + CONTEXT),
    )


def _code(line: str) -> str:
    """A line of code, without what is written there as a secret."""

    def masked(found: "re.Match[str]") -> str:
        return f"{found['name']}{found['between']}{MASK}" if looks_secret(found["name"]) else found[0]

    return mask_text(_CODE.sub(masked, _trimmed(line.rstrip(), _MAX_LINE)))


def _variables(frame: types.FrameType, secrets: _Secrets) -> Iterator[tuple[str, str]]:
    found = frame.f_locals
    if not found:
        return
    named = [name for name in tuple(found) if isinstance(name, str) and not name.startswith("__")]
    if found is frame.f_globals:  # code of a module: what it imports and defines are no variables
        named = [name for name in named if not isinstance(found[name], (types.ModuleType, types.FunctionType, type))]
    for name in named[:_MAX_LOCALS]:
        yield _trimmed(name, _MAX_LINE), _shown_as(name, found[name], secrets)
    if len(named) > _MAX_LOCALS:
        yield "...", f"{len(named) - _MAX_LOCALS} more"


def _shown_as(name: str, value: Any, secrets: _Secrets) -> str:
    if _is_secret(name, value, secrets):
        _note_secret(name, value, secrets)
        return MASK
    try:
        text = _repr(value, 0, secrets)
    except Exception:  # noqa: BLE001 - user code, and RecursionError
        text = f"<{type(value).__name__} that cannot be shown>"
    return _trimmed(text, MAX_REPR)


def _is_secret(name: str, value: Any, secrets: _Secrets) -> bool:
    # What is empty is no secret; only of these types, because bool() of a user's object may be anything.
    return (
        looks_secret_by(name, secrets.words)
        and value is not None
        and (type(value) not in (str, bytes, dict, list) or bool(value))
    )


def _note_secret(name: str, value: Any, secrets: _Secrets) -> None:
    """Remember a value that must not be shown elsewhere. What is called key is often none, and a common word."""
    if name.lower().rstrip("s") != "key":
        _note(value, 0, secrets)


def _note(value: Any, depth: int, secrets: _Secrets) -> None:
    kind = type(value)
    if kind is str:
        if len(value) >= _MIN_SECRET:
            secrets.values.add(value)
            if not value.isalnum():
                secrets.values.add(repr(value)[1:-1])  # as {value!r} has it
    elif kind is bytes or kind is bytearray:
        if len(value) >= _MIN_SECRET:
            secrets.values.add(repr(bytes(value))[2:-1])
            secrets.values.add(value.decode("utf-8", "backslashreplace"))
    elif kind is int:
        if _LEAST_SECRET_NUMBER <= abs(value) < _LARGEST_SECRET_NUMBER:
            secrets.values.add(str(abs(value)))
    elif kind in _BRACKETS and depth < _MAX_DEPTH:
        for entry in itertools.islice(value.values() if kind is dict else value, _MAX_ENTRIES):
            _note(entry, depth + 1, secrets)


def secret_values(exc: BaseException) -> list[str]:
    """The values that must not be shown in a text about this exception, longest first.

    They are those of variables, attributes of objects and entries of dicts whose name looks secret, in what the frames
    of ``exc``, of what it came from and of those in a group have, a few levels deep; of at least 6 characters or
    digits. Objects are only looked at: nothing of theirs is called. Never raises.
    """
    secrets = _Secrets()
    _search(_variables_behind(exc, []), secrets)
    return sorted(secrets.values, key=len, reverse=True)


def log_raised(logger: logging.Logger, message: str, *args: object) -> None:
    """What logger.exception() logs of the exception that is being handled, without the values that must not be shown.

    Where there are such values the record has no exc_info: who gets it would write them.
    """
    exc = sys.exception()
    text = "" if exc is None else format_exception(exc).rstrip()
    shown = text if exc is None else hide(text, secret_values(exc))
    if shown == text:
        logger.error(message, *args, exc_info=exc, stacklevel=2)
    else:
        logger.error(f"{message}\n%s", *args, shown, stacklevel=2)


#: Names and what they stand for; "" for what has no name where it was found.
_Named = list[tuple[str, Any]]


def _variables_behind(exc: BaseException, seen: list[BaseException]) -> _Named:
    """The variables of all frames of an exception, of what it came from, and of those in a group."""
    found: _Named = []
    following: BaseException | None = exc
    while following is not None and len(seen) <= _MAX_CAUSES and all(following is not one for one in seen):
        seen.append(following)
        found += _variables_of(following.__traceback__)
        if isinstance(following, BaseExceptionGroup):
            for each in following.exceptions[:_MAX_ENTRIES]:
                found += _variables_behind(each, [])
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return found


def _variables_of(tb: types.TracebackType | None) -> _Named:
    """The variables of all frames of a traceback that are not kser's own, and the attributes of each ``self``."""
    frames: list[types.FrameType] = []
    while tb is not None:
        if not _is_ours(tb.tb_frame):
            frames.append(tb.tb_frame)
        tb = tb.tb_next
    found: _Named = []
    for frame in frames if len(frames) <= _FIRST + _LAST else frames[:_FIRST] + frames[-_LAST:]:
        for name, value in tuple(frame.f_locals.items())[:_MAX_LOCALS]:
            if name == "self":
                found += _inside(value)
            else:
                found.append((name, value))
    return found


def _search(level: _Named, secrets: _Secrets) -> None:
    """Note the secret ones among these and in what they have: level by level, because there may be no end to it."""
    opened: set[int] = set()
    left, words = _MOST_LOOKS, secrets.words
    for depth in range(_DEEPEST_LOOK + 1):
        below: _Named = []
        for name, value in level[:left]:
            kind = type(value)
            if kind in _BARE:
                if kind is int and name and looks_secret_by(name, words):
                    _note_secret(name, value, secrets)
                continue
            if name and looks_secret_by(name, words):
                _note_secret(name, value, secrets)
                if kind in _BRACKETS:
                    continue
            if kind in _TEXTS or depth == _DEEPEST_LOOK or len(below) >= left:
                continue
            if id(value) not in opened:
                opened.add(id(value))
                below += _inside(value)
        left -= len(level)
        if left <= 0 or not below:
            return
        level = below


def _inside(value: Any) -> _Named:
    """What is in a value, of very much the first: entries, attributes. Runs no code of its class."""
    found: _Named = []
    kind: Any = type(value)
    try:
        entries, fields, attributes, slots = _layout(kind)
        if entries is dict:
            for key, entry in itertools.islice(dict.items(value), _MAX_ENTRIES):
                found.append((key if type(key) is str else "", entry))
        elif entries is not None:
            named = itertools.chain(fields, itertools.repeat(""))
            found += zip(named, itertools.islice(entries.__iter__(value), _MAX_ENTRIES), strict=False)
        if attributes is not None:
            found += tuple(attributes.__get__(value).items())[:_MAX_LOCALS]
        for name, slot in slots:
            with contextlib.suppress(AttributeError):  # it is not set
                found.append((name, slot.__get__(value)))
    except Exception:  # noqa: BLE001, S110 - another thread changes it meanwhile
        pass
    return found


class _Layout(NamedTuple):
    """Where a class keeps what its objects have."""

    #: The built-in type that gives the entries; None: there are none.
    entries: Any = None
    #: Names of the first entries.
    fields: tuple[str, ...] = ()
    #: What gives the dict of attributes; None: there is none.
    attributes: Any = None
    #: Name, and what gives the value.
    slots: Sequence[tuple[str, types.MemberDescriptorType]] = ()


#: What has names that are nobody's variables.
_CLOSED: Final = frozenset({type, types.ModuleType, enum.Enum})


@functools.lru_cache(maxsize=1024)
def _layout(kind: Any) -> _Layout:
    bases = _BASES.__get__(kind)
    if not _CLOSED.isdisjoint(bases):
        return _Layout()
    entries = next((base for base in (dict, list, tuple, set, frozenset) if base in bases), None)
    fields: tuple[str, ...] = ()
    attributes, slots = None, []
    for base in bases:
        names = _NAMESPACE.__get__(base)
        if entries is tuple and not fields and type(names.get("_fields")) is tuple:
            fields = names["_fields"]
        if attributes is None and type(own := names.get("__dict__")) in _BUILT_IN:
            attributes = own
        for name, slot in names.items():
            if type(slot) is types.MemberDescriptorType and not name.startswith("__"):
                slots.append((name, slot))
    return _Layout(entries, fields, attributes, slots)


#: What is no code of a class.
_BUILT_IN: Final = frozenset({types.GetSetDescriptorType, types.MemberDescriptorType})
#: Asked like this a class runs no code of its own, as inspect.getattr_static() does it.
_BASES: Final = type.__dict__["__mro__"]
_NAMESPACE: Final = type.__dict__["__dict__"]


def hide(data: Any, values: Sequence[str]) -> Any:
    """JSON data in which these values, longest first, are replaced by MASK in all texts."""
    if type(data) is str:
        for value in values:
            if value in data:
                data = data.replace(value, MASK)
        return data
    if type(data) is dict:
        return {key: hide(value, values) for key, value in data.items()}
    if type(data) is list:
        return [hide(value, values) for value in data]
    return data


def _repr(value: Any, depth: int, secrets: _Secrets) -> str:
    """repr() of a value, with secrets in it masked; of large ones no more is made than is shown."""
    kind = type(value)
    if kind in _BARE:
        return repr(value)
    if kind in _TEXTS:
        return repr(value) if len(value) <= MAX_REPR else f"{value[:MAX_REPR]!r}..."
    if kind not in _BRACKETS or not value:
        return mask_text(_trimmed(repr(value), 64 * MAX_REPR))
    if depth >= _MAX_DEPTH:
        return "..."
    depth += 1
    shown: list[str]
    if kind is dict:
        pairs = itertools.islice(value.items(), _MAX_ENTRIES)
        shown = [f"{_repr(k, depth, secrets)}: {_entry(k, v, depth, secrets)}" for k, v in pairs]
    else:
        shown = [_repr(entry, depth, secrets) for entry in itertools.islice(value, _MAX_ENTRIES)]
    if len(value) > _MAX_ENTRIES:
        shown.append("...")
    start, end = _BRACKETS[kind]
    comma = "," if kind is tuple and len(value) == 1 else ""
    return f"{start}{', '.join(shown)}{comma}{end}"


_TEXTS: Final = frozenset({str, bytes, bytearray})
#: Nothing is written beside their values.
_BARE: Final = frozenset({int, float, bool, type(None)})
_BRACKETS: Final[dict[type, tuple[str, str]]] = {dict: ("{", "}"), list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}")}


def _entry(key: Any, value: Any, depth: int, secrets: _Secrets) -> str:
    if isinstance(key, str) and _is_secret(key, value, secrets):
        _note_secret(key, value, secrets)
        return repr(MASK)
    return _repr(value, depth, secrets)


def _trimmed(text: str, limit: int) -> str:
    """The beginning of the text; what JSON has no form for (lone surrogates) with backslashes."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _hidden(info: TracebackInfo, secrets: Iterable[str]) -> TracebackInfo:
    """The same without the values that were masked, wherever they are."""
    values = sorted(secrets, key=len, reverse=True)
    if not values:
        return info

    def clean(text: str) -> str:
        for value in values:
            text = text.replace(value, MASK)
        return text

    def cleaned(frame: FrameInfo) -> FrameInfo:
        texts = "\n".join((frame.line, *frame.before, *frame.after, *frame.locals.values()))
        if not any(value in texts for value in values):
            return frame
        return replace(
            frame,
            line=clean(frame.line),
            before=tuple(map(clean, frame.before)),
            after=tuple(map(clean, frame.after)),
            locals={name: clean(value) for name, value in frame.locals.items()},
        )

    frames = tuple(map(cleaned, info.frames))
    cause = _hidden(info.cause, values) if info.cause is not None else None
    return replace(info, frames=frames, exception=clean(info.exception), cause=cause)
