"""What a piece of code runs within: the task being run, and the delivery that what it sends belongs to.

Everything here is a context variable: it follows the code into coroutines and into threads started with a copied
context, and two tasks running side by side do not see each other's.
"""

import logging
import os
import threading
import time
import uuid as uuids
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kser.entry import Entrypoint
    from kser.headers import Headers
    from kser.results import Result
    from kser.schemas import Message

__all__ = [
    "Control",
    "Delivery",
    "Reports",
    "Scope",
    "controlling",
    "current_control",
    "current_delivery",
    "current_task",
    "derive_uuid",
    "id_scope",
    "new_uuid",
    "random_uuid",
    "within",
]


class Delivery(Protocol):
    """Takes what a task sends while a worker runs it: it leaves when the task is settled, and not if it failed."""

    #: Whether somebody is told where the exception came from that a task failed by.
    traced: bool

    def send(self, kmsg: "Message", topic: str | None, key: str | None, headers: "Headers" = ()) -> "Result":
        """Keep one message. Topic None: the one the running message came from. retcode 202, or a failed Result."""

    def drop(self) -> None:
        """Forget what was kept so far: what sent it failed."""


class Reports(Protocol):
    """Takes what one execution tells of itself while it goes on. From any thread; never blocks, never raises."""

    def progress(self, group: tuple[str, ...], current: int, total: int, status_line: str) -> None:
        """How far it is."""

    def log(self, record: logging.LogRecord) -> None:
        """What its code has logged. Raises what formatting the record raises."""

    def end(self) -> None:
        """It is over: what is told from now on is not of it."""


class Control:
    """One execution as its worker sees it: told to end from outside, and telling that it is alive.

    Args:
        attempt: which attempt it is.
        open_reports: makes what takes its reports, when there is the first one; None: nobody wants to know.

    Thread rule: the worker writes ``aborted``, the task's thread calls beat(); both are single assignments.
    """

    __slots__ = ("_open", "_reports", "aborted", "again_s", "alive", "attempt", "began", "cancel")

    def __init__(self, attempt: int = 1, open_reports: "Callable[[Control], Reports] | None" = None) -> None:
        #: Why the execution should end: "timeout", "lost", "stopping"; None while it should go on.
        self.aborted: str | None = None
        #: time.monotonic() of the last heartbeat, 0 before the first.
        self.alive = 0.0
        self.attempt = attempt
        #: Set when it failed and is tried again: seconds until then.
        self.again_s: float | None = None
        #: Ends the coroutine that the task's thread waits for, if it waits for one.
        self.cancel: Callable[[], object] | None = None
        #: When it began, in milliseconds since the epoch.
        self.began = int(time.time() * 1000)
        self._open = open_reports
        self._reports: Reports | None = None

    @property
    def reports(self) -> Reports | None:
        """Takes what the execution tells of itself; None when nobody wants to know."""
        if self._reports is None and (make := self._open) is not None:
            with _opening:
                if self._reports is None:
                    self._reports = make(self)
            if self._open is None:  # it ended meanwhile, and end() may not have seen this
                self._reports.end()
        return self._reports

    def end(self) -> None:
        """Note that the execution is over."""
        self._open = None
        if self._reports is not None:
            self._reports.end()

    def beat(self) -> None:
        """Note that the execution is alive."""
        self.alive = time.monotonic()


_opening = threading.Lock()

_task: ContextVar[Any] = ContextVar("kser_task", default=None)
_control: ContextVar[Control | None] = ContextVar("kser_control", default=None)
_scope: "ContextVar[Scope | None]" = ContextVar("kser_scope", default=None)


class Scope:
    """One record being run on a worker: where what is sent goes, and what new ids are derived from.

    One object for both, so that a record costs one context variable. Thread rule: belongs to the thread that runs the
    record; what that thread's task starts may share it.
    """

    __slots__ = ("_delivery", "_parent", "_suffix", "made")

    def __init__(self, delivery: Delivery | None, parent: str | None = None) -> None:
        self._delivery = delivery
        self._parent = parent
        self._suffix = ""
        #: Ids made so far of the parent of now.
        self.made = 0

    @property
    def delivery(self) -> Delivery | None:
        """Takes what is sent; None: a producer sends it."""
        return self._delivery

    def derive_from(self, parent: str, suffix: str = "") -> None:
        """From now on new ids are derived from ``parent`` and their order, so that running it again makes the same."""
        self._parent, self._suffix, self.made = parent, suffix, 0

    def new_uuid(self) -> str | None:
        """The next derived id; None when there is no parent."""
        if self._parent is None:
            return None
        self.made += 1
        return derive_uuid(self._parent + self._suffix, self.made - 1)


def current_task() -> "Entrypoint | None":
    """The task whose code is running, or None outside of one."""
    task: Entrypoint | None = _task.get()
    return task


def current_control() -> Control | None:
    """What the worker and the running task tell each other, or None outside of a worker."""
    return _control.get()


class controlling:  # noqa: N801 - used as a statement
    """Within the block the tasks that are made are under ``control``."""

    __slots__ = ("_control", "_token")

    def __init__(self, control: Control) -> None:
        self._control = control

    def __enter__(self) -> None:
        self._token = _control.set(self._control)

    def __exit__(self, *exc_info: object) -> None:
        _control.reset(self._token)


def current_delivery() -> Delivery | None:
    """What takes the messages sent here, or None outside of a worker: then a producer sends them."""
    scope = _scope.get()
    return scope.delivery if scope is not None else None


class within:  # noqa: N801 - used as a statement
    """Within the block this scope is the current one."""

    __slots__ = ("_scope", "_token")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __enter__(self) -> Scope:
        self._token = _scope.set(self._scope)
        return self._scope

    def __exit__(self, *exc_info: object) -> None:
        _scope.reset(self._token)


class id_scope:  # noqa: N801 - used as a statement
    """Within the block new ids are derived from ``parent`` and their order; after it as before it."""

    __slots__ = ("_scope", "_token")

    def __init__(self, parent: str) -> None:
        current = _scope.get()
        self._scope = Scope(current.delivery if current is not None else None, parent)

    def __enter__(self) -> None:
        self._token = _scope.set(self._scope)

    def __exit__(self, *exc_info: object) -> None:
        _scope.reset(self._token)


def new_uuid() -> str:
    """A random uuid, or on a worker one that a redelivery of the same message makes again."""
    scope = _scope.get()
    if scope is not None and (derived := scope.new_uuid()) is not None:
        return derived
    try:
        return _random.pop()
    except IndexError:
        return random_uuid()


def random_uuid() -> str:
    """A random (version 4) uuid, as ``str(uuid.uuid4())`` gives it but several times as fast."""
    while True:
        try:
            return _random.pop()
        except IndexError:
            _random.extend(_draw())


def _draw() -> list[str]:
    """As many new uuids as are drawn at a time. Written side by side, digit by digit: few steps for all of them."""
    digits = os.urandom(16 * _DRAWN).hex().encode()
    text = bytearray(_FORM * _DRAWN)
    for at, digit in _DIGITS:
        text[at :: len(_FORM)] = digits[digit::32]
    text[_VARIANT_AT :: len(_FORM)] = digits[16::32].translate(_VARIANT)
    drawn = text.decode()
    return [drawn[at : at + len(_FORM)] for at in range(0, len(drawn), len(_FORM))]


#: Uuids that were drawn and not used. pop() of a list is atomic, so threads never get the same.
_random: list[str] = []
_DRAWN = 256
#: A uuid of version 4: where there is a zero stands a random digit, where there is an x the variant, one of four.
_FORM = b"00000000-0000-4000-x000-000000000000"
_VARIANT_AT = _FORM.index(b"x")
_VARIANT = bytes.maketrans(b"0123456789abcdef", b"89ab" * 4)
#: Place in the form -> which of 32 random digits stands there; digits 12 and 16 are the version's and the variant's.
_DIGITS = list(
    zip(
        (at for at, sign in enumerate(_FORM) if sign == ord("0")),
        (digit for digit in range(32) if digit not in (12, 16)),
        strict=True,
    )
)
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_random.clear)  # or parent and child would go on with the same


def derive_uuid(parent: str, position: int) -> str:
    """uuid5(parent, position). A parent that is no UUID is hashed into one first."""
    try:
        namespace = uuids.UUID(parent)
    except ValueError:
        namespace = uuids.uuid5(uuids.NAMESPACE_OID, parent.encode("utf-8", "backslashreplace").decode())
    return str(uuids.uuid5(namespace, str(position)))
