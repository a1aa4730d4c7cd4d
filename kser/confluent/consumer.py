"""Consumer over confluent-kafka."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kser.confluent.transport import ConfluentTransport
from kser.worker.consumer import BaseConsumer

__all__ = ["Consumer"]


class Consumer(BaseConsumer):
    """Takes messages from Kafka and runs their tasks.

    Args:
        config: librdkafka properties, at least ``bootstrap.servers``; ``group.id`` is the consumer group, default
            ``kser``. Offsets are committed only when a task's consequences are confirmed: ``enable.auto.commit`` is
            switched off.
        topics: topics to take messages from.

    Raises ConfigurationError for a property that does not exist.
    """

    _logger: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(self, config: Mapping[str, Any], topics: Sequence[str]) -> None:
        super().__init__(ConfluentTransport(config), str(config.get("group.id") or "kser"), topics)
