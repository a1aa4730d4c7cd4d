"""Producer over confluent-kafka."""

from collections.abc import Mapping
from typing import Any

from kser.confluent.transport import ConfluentTransport
from kser.operating import OperatingProducer

__all__ = ["Producer"]


class Producer(OperatingProducer):
    """Sends messages to Kafka, and waits until the broker has them. May be shared by threads; close() it at the end.

    Args:
        config: librdkafka properties, at least ``bootstrap.servers``. Those that decide about loss are set
            (``acks=all``, ``enable.idempotence``), and the partitioner is the one of Java producers.

    Raises ConfigurationError for a property that does not exist. A broker that is down is no error here: each send
    says whether it was confirmed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(ConfluentTransport(config))
