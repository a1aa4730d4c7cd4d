"""What the resources work with: a broker, a producer, and maybe a storage and a registry."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from flask import current_app

from kser import errors
from kser.dead_letters import DeadLetters
from kser.errors import ConfigurationError
from kser.producer import BaseProducer
from kser.sequencing.registry import OperationRegistry
from kser.transport import Transport
from kser.transport.names import is_topic_name
from kser.web.streams import Streams

if TYPE_CHECKING:
    from kser.storage import StorageBase
    from kser.storage.history import History

__all__ = ["KEY", "Site", "WebSettings", "site"]

#: Where a program keeps its Site, among its extensions.
KEY: Final = "kser"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings:
    """How the API behaves. Raises ConfigurationError for values that cannot be."""

    #: The group that requests mean which name none.
    group: str = "kser"
    #: What callers have to send; None: only callers on this machine, by a name of this machine, are let in.
    token: str | None = field(default=None, repr=False)
    #: Where operations are launched that name no topic.
    topic: str | None = None
    #: Longest wait for an answer of the broker, in seconds.
    timeout_s: float = 10.0
    #: Streams of events at a time; each holds a thread of the server.
    max_streams: int = 8
    #: Longest time one of them lasts, in seconds; its reader calls again.
    stream_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.token is not None and not self.token.strip():
            raise ConfigurationError("The token is empty: give a long random text, or None")
        for name in ("timeout_s", "max_streams", "stream_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name}={getattr(self, name)}: give more than 0")
        if not is_topic_name(self.group):
            raise ConfigurationError(f"group={self.group!r}: names of topics begin with it, so give one that can")


class Site:
    """What the resources of one program work with. May be shared by threads."""

    def __init__(
        self,
        transport: Transport,
        producer: BaseProducer,
        settings: WebSettings,
        *,
        storage: "StorageBase | None",
        registry: OperationRegistry | None,
        owns_producer: bool,
    ) -> None:
        self.transport = transport
        self.producer = producer
        self.settings = settings
        self.registry = registry
        self._storage = storage
        self._owns_producer = owns_producer
        self.streams = Streams(
            transport, most=settings.max_streams, lasting_s=settings.stream_s, timeout_s=settings.timeout_s
        )

    @property
    def storage(self) -> "StorageBase":
        """The storage. Raises NotImplemented when there is none."""
        if self._storage is None:
            raise errors.NotImplemented("Nothing is kept here that could be asked for: start the API with a storage")
        return self._storage

    @property
    def history(self) -> "History":
        """What happened. Raises NotImplemented when there is no storage."""
        return self.storage.history

    @property
    def has_storage(self) -> bool:
        """Whether what happened can be asked for."""
        return self._storage is not None

    def close(self) -> None:
        """End the streams, and close the producer unless it was given. A second call does nothing."""
        self.streams.close()
        if self._owns_producer:
            self.producer.close()

    def group(self, named: str | None) -> str:
        """The group that a request means."""
        return named or self.settings.group

    def letters(self, group: str | None) -> DeadLetters:
        """The dead letters of a group."""
        return DeadLetters(self.transport, self.group(group), timeout_s=self.settings.timeout_s)


def site() -> Site:
    """The site of the request that is being answered."""
    found: Site = current_app.extensions[KEY]
    return found
