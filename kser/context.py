"""What a piece of code runs within: the task being run, and the delivery that what it sends belongs to.

Everything here is a context variable: it follows the code into coroutines and into threads started with a copied
context, and two tasks running side by side do not see each other's.
"""

import os
import uuid as uuids
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kser.entry import Entrypoint
    from kser.results import Result
    from kser.schemas import Message

__all__ = [
    "Delivery",
    "current_delivery",
    "current_task",
    "delivering",
    "derive_uuid",
    "id_scope",
    "new_uuid",
    "random_uuid",
]


class Delivery(Protocol):
    """Takes what a task sends while a worker runs it: it leaves when the task is settled, and not if it failed."""

    def send(self, kmsg: "Message", topic: str | None, key: str | None) -> "Result":
        """Keep one message. Topic None: the one the running message came from. retcode 202, or a failed Result."""

    def drop(self) -> None:
        """Forget what was kept so far: what sent it failed."""


_task: ContextVar[Any] = ContextVar("kser_task", default=None)
_delivery: ContextVar[Delivery | None] = ContextVar("kser_delivery", default=None)
_ids: "ContextVar[id_scope | None]" = ContextVar("kser_ids", default=None)


def current_task() -> "Entrypoint | None":
    """The task whose code is running, or None outside of one."""
    task: Entrypoint | None = _task.get()
    return task


def current_delivery() -> Delivery | None:
    """What takes the messages sent here, or None outside of a worker: then a producer sends them."""
    return _delivery.get()


class delivering:  # noqa: N801 - used as a statement
    """Within the block what tasks send goes to ``delivery``."""

    __slots__ = ("_delivery", "_token")

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    def __enter__(self) -> None:
        self._token = _delivery.set(self._delivery)

    def __exit__(self, *exc_info: object) -> None:
        _delivery.reset(self._token)


class id_scope:  # noqa: N801 - used as a statement
    """Within the block new ids are derived from ``parent`` and their order, so that running it again makes the same."""

    __slots__ = ("_token", "made", "parent")

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.made = 0

    def __enter__(self) -> None:
        self._token = _ids.set(self)

    def __exit__(self, *exc_info: object) -> None:
        _ids.reset(self._token)


def new_uuid() -> str:
    """A random uuid, or on a worker one that a redelivery of the same message makes again."""
    scope = _ids.get()
    if scope is None:
        return random_uuid()
    scope.made += 1
    return derive_uuid(scope.parent, scope.made - 1)


def random_uuid() -> str:
    """A random (version 4) uuid, as ``str(uuid.uuid4())`` gives it but several times as fast."""
    while True:
        try:
            return _random.pop()
        except IndexError:
            digits = os.urandom(16 * _DRAWN).hex()
            _random.extend(
                f"{digits[i : i + 8]}-{digits[i + 8 : i + 12]}-4{digits[i + 13 : i + 16]}-"
                f"{_VARIANT[digits[i + 16]]}{digits[i + 17 : i + 20]}-{digits[i + 20 : i + 32]}"
                for i in range(0, len(digits), 32)
            )


#: Uuids that were drawn and not used. pop() of a list is atomic, so threads never get the same.
_random: list[str] = []
_DRAWN = 128
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_random.clear)  # or parent and child would go on with the same


def derive_uuid(parent: str, position: int) -> str:
    """uuid5(parent, position). A parent that is no UUID is hashed into one first."""
    try:
        namespace = uuids.UUID(parent)
    except ValueError:
        namespace = uuids.uuid5(uuids.NAMESPACE_OID, parent.encode("utf-8", "backslashreplace").decode())
    return str(uuids.uuid5(namespace, str(position)))
