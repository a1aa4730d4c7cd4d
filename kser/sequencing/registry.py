"""OperationRegistry: where tasks and operations are subscribed."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.errors import ConfigurationError, ValidationError
from kser.retry import Retry
from kser.schemas import Message
from kser.sequencing.task import MessageSender, Task, function_task

if TYPE_CHECKING:
    from kser.storage import StorageBase

__all__ = ["OperationRegistry"]

logger = logging.getLogger(__name__)


class OperationRegistry:
    """Routes messages from Kafka to the classes subscribed to it, and knows how to send theirs.

    Args:
        app: Flask application, if any; stored as ``app`` after load_tasks().
        controller_class: Controller to use; the registry makes a subclass of it for itself.
        producer: sends what ``launch()`` and ``send()`` are called on, outside of workers.
        topic: topic of the subscribed classes that name none.
        storage: where ``Task.init_by_id()`` looks, or its URL.
    """

    def __init__(
        self,
        app: Any = None,
        controller_class: type[Controller] = Controller,
        *,
        producer: MessageSender | None = None,
        topic: str | None = None,
        storage: "StorageBase | str | None" = None,
    ) -> None:
        own = {} if controller_class is Controller else dict(controller_class.ENTRYPOINTS)
        name = controller_class.__name__
        #: The controller of this registry, for Consumer.REGISTRY and Worker.
        self.controller: Controller = type(name, (controller_class,), {"ENTRYPOINTS": own})()
        self.producer = producer
        self.topic = topic
        self.storage = storage
        self.app: Any = None
        if app is not None:
            self.init_app(app)

    @property
    def transport(self) -> type[Message]:
        """How messages of this registry are written: its controller's TRANSPORT."""
        return self.controller.TRANSPORT

    def configure(
        self,
        *,
        producer: MessageSender | None = None,
        topic: str | None = None,
        storage: "StorageBase | str | None" = None,
    ) -> None:
        """Set the producer, the topic, the storage, or several; what is None stays as it is."""
        self.producer = producer if producer is not None else self.producer
        self.topic = topic or self.topic
        self.storage = storage if storage is not None else self.storage

    def find(self, name: str) -> type[Entrypoint] | None:
        """The class subscribed under this name in messages, or None."""
        return self.controller.find(name)

    def init_app(self, app: Any = None) -> None:
        """Take the Flask application and load the tasks."""
        self.app = app
        self.load_tasks()

    def load_tasks(self) -> None:
        """Called by init_app(). Override it to import the modules whose classes subscribe themselves."""

    def subscribe(
        self,
        callback: Any = None,
        /,
        *,
        name: str | None = None,
        aliases: Iterable[str] = (),
        topic: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        isolate: bool | None = None,
        retry: Retry | None = None,
        order: Literal["tier", "strict"] | None = None,
    ) -> Any:
        """Class decorator: route messages that name this class to it. Gives the class itself.

        Args:
            callback: a class derived from Entrypoint.
            name: its name in messages, instead of ``module.Class``.
            aliases: further names it answers to, for example the one it had before it was moved.
            topic: topic of its messages.
            timeout: seconds one execution may take on a worker.
            limit: how many of it a worker runs side by side.
            isolate: True to run it in a child process of the worker.
            retry: whether and when a worker tries it again after it failed.
            order: "strict": later messages of the same key wait for its next attempt, however long that takes.

        Subscribing the same class again changes nothing. Raises ValidationError for anything that is no Entrypoint
        class, and for a name another class has already; ConfigurationError for an option that cannot be.
        """
        options = _options(topic, timeout, limit, isolate, retry, order)
        if callback is None:
            return lambda decorated: self._subscribe(decorated, name, aliases, options)
        return self._subscribe(callback, name, aliases, options)

    def _subscribe(self, cls: Any, name: str | None, aliases: Iterable[str], options: Mapping[str, Any]) -> Any:
        Controller.check(getattr(cls, "__name__", repr(cls)), cls)
        if isinstance(aliases, str):
            raise ConfigurationError(f"aliases={aliases!r} is one text: give a list of names", extra={"name": aliases})
        path = name or cls.path
        aliases = list(aliases)
        for wanted in (path, *aliases):
            other = self.controller.ENTRYPOINTS.get(wanted)
            if other is not None and other is not cls and not _same_source(other, cls):
                raise ValidationError(
                    f"{wanted} is subscribed already, as another class: give one of them a name, subscribe(name=...)",
                    extra={"entrypoint": wanted},
                )
        known = self.controller.ENTRYPOINTS.get(path)
        if name:
            cls.WIRE_NAME = name
        if issubclass(cls, Task):
            cls._home = self
        for option, value in options.items():
            setattr(cls, option, value)
        if known is None:
            logger.info("Operation registry: loaded %s", path)
            self.controller.register(path, cls)
        for alias in aliases:
            self.controller.register(alias, cls)
        return cls

    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        aliases: Iterable[str] = (),
        topic: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        isolate: bool | None = None,
        retry: Retry | None = None,
        order: Literal["tier", "strict"] | None = None,
    ) -> Any:
        """Decorator: make a Task class of a plain function of its params, and subscribe it. Gives the class.

        The function gets those of the task's params that it names; its parameters without a default are required. A
        Result it returns is taken as it is, None forwards what came, a dict becomes ``retval``, anything else
        ``retval["value"]``. ``async def`` works too; the function itself is the class attribute ``function``.

        Args: as for subscribe().
        """
        options = _options(topic, timeout, limit, isolate, retry, order)
        if function is None:
            return lambda decorated: self._subscribe(function_task(decorated), name, aliases, options)
        return self._subscribe(function_task(function), name, aliases, options)

    def tasks(self) -> dict[str, type[Entrypoint]]:
        """Name in messages -> class, of everything subscribed."""
        return dict(self.controller.ENTRYPOINTS)


def _options(
    topic: str | None,
    timeout: float | None,
    limit: int | None,
    isolate: bool | None,
    retry: Retry | None,
    order: str | None,
) -> dict[str, Any]:
    """The class attributes that these keywords set. Raises ConfigurationError."""
    if timeout is not None and not timeout > 0:
        raise ConfigurationError(f"timeout={timeout!r}: give more than 0 seconds, or None for no limit")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigurationError(f"limit={limit!r}: give a whole number from 1, or None for no limit")
    if retry is not None and not isinstance(retry, Retry):
        raise ConfigurationError(f"retry={retry!r}: give a Retry, such as Retry(attempts=5, backoff_s=2)")
    if order not in (None, "tier", "strict"):
        raise ConfigurationError(f"order={order!r}: give 'tier' or 'strict'")
    given: dict[str, Any] = {"topic": topic or None, "timeout": timeout, "limit": limit, "isolate": isolate}
    given |= {"retry": retry, "order": order}
    return {name: value for name, value in given.items() if value is not None}


def _same_source(one: type, other: type) -> bool:
    """True for a class that was defined again by the same line of code (a test run twice, a module reloaded)."""
    return one.__module__ == other.__module__ and one.__qualname__ == other.__qualname__
