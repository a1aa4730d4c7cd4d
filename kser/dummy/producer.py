"""Producer of the in-memory driver."""

from collections.abc import Mapping
from typing import Any

from kser.dummy.clusters import cluster
from kser.operating import OperatingProducer

__all__ = ["Producer"]


class Producer(OperatingProducer):
    """Sends messages to a cluster in this process; a dummy Consumer with the same ``bootstrap.servers`` gets them.

    Args:
        config: only ``bootstrap.servers`` counts, as a name; default "memory".
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(cluster(config))
