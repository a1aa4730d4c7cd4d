"""What a piece of code runs within: the task being run, and the delivery that what it sends belongs to.

Everything here is a context variable: it follows the code into coroutines and into threads started with a copied
context, and two tasks running side by side do not see each other's.
"""

import uuid as uuids
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kser.entry import Entrypoint
    from kser.results import Result
    from kser.schemas import Message

__all__ = ["Delivery", "current_delivery", "current_task", "delivering", "derive_uuid", "id_scope", "new_uuid"]


class Delivery(Protocol):
    """Takes what a task sends while a worker runs it: it leaves when the task is settled, and not if it failed."""

    def send(self, kmsg: "Message", topic: str | None, key: str | None) -> "Result":
        """Keep one message. Topic None: the one the running message came from. retcode 202, or a failed Result."""


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
        return str(uuids.uuid4())
    scope.made += 1
    return derive_uuid(scope.parent, scope.made - 1)


def derive_uuid(parent: str, position: int) -> str:
    """uuid5(parent, position). A parent that is no UUID is hashed into one first."""
    try:
        namespace = uuids.UUID(parent)
    except ValueError:
        namespace = uuids.uuid5(uuids.NAMESPACE_OID, parent)
    return str(uuids.uuid5(namespace, str(position)))
