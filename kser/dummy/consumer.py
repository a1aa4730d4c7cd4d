"""Consumer of the in-memory driver."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kser.dummy.clusters import cluster
from kser.worker.consumer import BaseConsumer

__all__ = ["Consumer"]


class Consumer(BaseConsumer):
    """Takes messages from a cluster in this process and runs their tasks.

    ``run(until_idle=True)`` returns once everything that was sent is done: what tests want.

    Args:
        config: ``bootstrap.servers`` (a name, default "memory") and ``group.id`` (or ``group_id``, default "kser").
        topics: topics to take messages from.
    """

    _logger: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(self, config: Mapping[str, Any] | None = None, topics: Sequence[str] = ()) -> None:
        options = config or {}
        group = str(options.get("group.id") or options.get("group_id") or "kser")
        super().__init__(cluster(options), group, topics)
