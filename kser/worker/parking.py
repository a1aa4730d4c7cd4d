"""ParkingLot: units that wait for the next attempt of their first record, and the key with them."""

import heapq
from collections import deque
from collections.abc import Callable, Collection
from typing import Final

from kser.worker.dispatch import Item
from kser.worker.offsets import PartitionState

__all__ = ["KEYS", "LONGEST_S", "ParkingLot"]

#: A longer delay is spent in a topic, in seconds: a parked record is bound to its worker's memory.
LONGEST_S: Final = 30.0
#: Records of a partition that may be parked: their attempts have to fit beside the committed offset.
KEYS: Final = 100


class ParkingLot:
    """Units by the time they are due.

    Thread rule: belongs to the poll thread.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, deque[Item]]] = []
        self._count = 0
        #: Records in here, and bytes of their values.
        self.items = 0
        self.bytes = 0

    def put(self, unit: deque[Item], due: float) -> None:
        """Keep a unit until ``due``, of time.monotonic()."""
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, unit))
        self._counted(unit, 1)

    def due(self, now: float) -> list[deque[Item]]:
        """Take out the units whose time has come, but for those of partitions that are going."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            unit = heapq.heappop(self._heap)[2]
            self._counted(unit, -1)
            if not unit[0].state.closed:
                found.append(unit)
        return found

    def take(self, meant: Callable[[Item], bool]) -> list[deque[Item]]:
        """Take out the units whose first record is meant, whenever they are due."""
        found = [unit for _, _, unit in self._heap if meant(unit[0])]
        if found:
            taken = {id(unit) for unit in found}
            self._heap = [entry for entry in self._heap if id(entry[2]) not in taken]
            heapq.heapify(self._heap)
            for unit in found:
                self._counted(unit, -1)
        return found

    @property
    def next_due(self) -> float:
        """When the first one is due, of time.monotonic(); infinity when there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def drop(self, gone: Collection[PartitionState]) -> None:
        """Forget the units of partitions that were let go of: their next owner knows of them."""
        if not self._heap:
            return
        for _, _, unit in self._heap:
            if unit[0].state in gone:
                self._counted(unit, -1)
        self._heap = [entry for entry in self._heap if entry[2][0].state not in gone]
        heapq.heapify(self._heap)

    def _counted(self, unit: deque[Item], sign: int) -> None:
        self.items += sign * len(unit)
        self.bytes += sign * sum(len(item.record.value or b"") for item in unit)
