"""Consumer: the face of a worker that kser 0.8 had. The drivers only differ in their Transport."""

import logging
from collections.abc import Sequence
from typing import ClassVar

from kser.controller import Controller
from kser.errors import ConfigurationError
from kser.transport import Transport
from kser.worker.worker import Worker

__all__ = ["BaseConsumer"]


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
        if topics is None or not topics:
            raise ConfigurationError(f"topics={topics!r}: give a topic, or a list of them")
        self.topics = [topics] if isinstance(topics, str) else list(topics)
        self.max_poll_records = max_poll_records
        self.worker: Worker | None = None
        self._stopped = False

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
        if self._stopped and not self.worker.stopping:  # asked before there was a worker to ask
            self.worker.stop()
        try:
            self.worker.run(until_idle=until_idle)
        finally:
            self._stopped = False

    def stop(self) -> None:
        """Ask run() to end; before it was called: end as soon as it is. From any thread."""
        self._stopped = True
        if self.worker is not None:
            self.worker.stop()
