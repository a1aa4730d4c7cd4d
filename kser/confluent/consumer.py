"""Consumer over confluent-kafka: the face of a worker that kser 0.8 had."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kser.confluent.transport import ConfluentTransport
from kser.controller import Controller
from kser.transport import Transport
from kser.worker import Worker

__all__ = ["BaseConsumer", "Consumer"]


class BaseConsumer:
    """Takes messages and runs their tasks: a Worker with the interface of kser 0.8.

    Args:
        transport: the broker.
        group: consumer group.
        topics: topics to take messages from.
        max_poll_records: records taken from the client at a time.
    """

    #: The controller that runs the messages; set it on the instance to ``registry.controller``.
    REGISTRY: ClassVar[type[Controller] | Controller] = Controller

    _logger: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(self, transport: Transport, group: str, topics: Sequence[str], max_poll_records: int = 500) -> None:
        self.transport = transport
        self.group = group
        self.topics = [topics] if isinstance(topics, str) else list(topics)
        self.max_poll_records = max_poll_records
        self.worker: Worker | None = None

    def run(self, *, until_idle: bool = False) -> None:
        """Take and run messages until SIGTERM, SIGINT, the terminate file or stop(). Blocks; see Worker.run()."""
        self.worker = Worker(
            self.REGISTRY,
            topics=self.topics,
            group=self.group,
            transport=self.transport,
            max_poll_records=self.max_poll_records,
        )
        self._logger.info("%s.Starting...", type(self).__name__)
        self.worker.run(until_idle=until_idle)

    def stop(self) -> None:
        """Ask run() to end. From any thread."""
        if self.worker is not None:
            self.worker.stop()


class Consumer(BaseConsumer):
    """Takes messages from Kafka and runs their tasks.

    Args:
        config: librdkafka properties, at least ``bootstrap.servers``; ``group.id`` is the consumer group, default
            ``kser``. Offsets are committed only when a task's consequences are confirmed: ``enable.auto.commit`` is
            switched off.
        topics: topics to take messages from.

    Raises ConfigurationError for a property that does not exist.
    """

    def __init__(self, config: Mapping[str, Any], topics: Sequence[str]) -> None:
        super().__init__(ConfluentTransport(config), str(config.get("group.id") or "kser"), topics)
