"""Producer of the in-memory driver."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from kser.dummy.clusters import cluster
from kser.producer import BaseProducer

__all__ = ["Producer"]


class Producer(BaseProducer):
    """Sends messages to a cluster in this process; a dummy Consumer with the same ``bootstrap.servers`` gets them.

    Args:
        config: only ``bootstrap.servers`` counts, as a name; default "memory".
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        memory = cluster(config)
        super().__init__(memory.sink(), partial(memory.sink, failures_only=True))
