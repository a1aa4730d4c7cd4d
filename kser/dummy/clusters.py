"""In-memory clusters by name, so that a dummy producer and a dummy consumer find each other."""

import threading
from collections.abc import Mapping
from typing import Any

from kser.transport.memory import MemoryTransport

__all__ = ["cluster", "forget_clusters"]

_clusters: dict[str, MemoryTransport] = {}
_lock = threading.Lock()


def cluster(config: Mapping[str, Any] | None = None) -> MemoryTransport:
    """The cluster of this process that ``config["bootstrap.servers"]`` names (default "memory"); made at the first use.

    ``bootstrap_servers`` is the same. Other options have no meaning here and are ignored.
    """
    options = config or {}
    name = str(options.get("bootstrap.servers") or options.get("bootstrap_servers") or "memory")
    with _lock:
        return _clusters.setdefault(name, MemoryTransport())


def forget_clusters() -> None:
    """Drop all of them with what they hold, between two tests."""
    with _lock:
        _clusters.clear()
