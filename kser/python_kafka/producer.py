"""Producer that takes the option names of kafka-python."""

from collections.abc import Mapping
from typing import Any

from kser.confluent.transport import ConfluentTransport
from kser.operating import OperatingProducer
from kser.python_kafka.config import producer_config

__all__ = ["Producer"]


class Producer(OperatingProducer):
    """Sends messages to Kafka, and waits until the broker has them. May be shared by threads; close() it at the end.

    Args:
        config: kafka-python options, for example ``{"bootstrap_servers": "127.0.0.1:9092"}``.

    Raises ConfigurationError for an option that does not exist or has no counterpart. A broker that is down is no error
    here: each send says whether it was confirmed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(ConfluentTransport(producer_config(config)))
