"""Consumer that takes the option names of kafka-python."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kser.confluent.transport import ConfluentTransport
from kser.python_kafka.config import consumer_config
from kser.worker.consumer import BaseConsumer

__all__ = ["Consumer"]


class Consumer(BaseConsumer):
    """Takes messages from Kafka and runs their tasks.

    Args:
        config: kafka-python options, for example ``{"bootstrap_servers": "127.0.0.1:9092", "group_id": "dice"}``.
        topics: topics to take messages from.

    Raises ConfigurationError for an option that does not exist or has no counterpart.
    """

    _logger: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(self, config: Mapping[str, Any], topics: Sequence[str]) -> None:
        translated, max_poll_records = consumer_config(config)
        group = str(translated.get("group.id") or "kser")
        super().__init__(ConfluentTransport(translated), group, topics, max_poll_records)
