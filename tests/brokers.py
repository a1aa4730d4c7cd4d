"""What the embedded broker and Apache Kafka have in common, for tests that run on both."""

import uuid
from typing import Protocol

__all__ = ["Broker", "make_topic", "unique"]


class Broker(Protocol):
    """A broker that a test may use: EmbeddedBroker and ApacheKafka are."""

    @property
    def bootstrap_servers(self) -> str:
        """The addresses for clients."""

    def create_topic(self, name: str, partitions: int) -> None:
        """Make a topic."""


def unique(prefix: str = "t") -> str:
    """A name that no other test has, for topics, groups and transactional ids."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def make_topic(broker: Broker, partitions: int = 4, prefix: str = "t") -> str:
    """The name of a new topic on this broker."""
    name = unique(prefix)
    broker.create_topic(name, partitions)
    return name
