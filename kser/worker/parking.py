"""ParkingLot: units that wait for the next attempt of their first record, and the key with them.

Backlog: what waits with them, and what came behind them since. It has a budget of its own, so that one key that waits
never takes the room of all others.
"""

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from kser.transport import Partition
from kser.worker.dispatch import Dispatcher, Item
from kser.worker.offsets import PartitionState

__all__ = ["KEYS", "LONGEST_S", "Backlog", "ParkingLot", "size_of"]

#: A longer delay is spent in a topic, in seconds: a parked record is bound to its worker's memory.
LONGEST_S: Final = 30.0
#: Records of a partition that may be parked: their attempts have to fit beside the committed offset.
KEYS: Final = 100
#: A clogged partition is fetched again when it has so much of its share: not paused and resumed for each record.
_HALF: Final = 0.5
#: Seconds between two counts of what waits, for each parked record: some fifty times what one takes to be counted.
_LOOK_S: Final = 50e-6


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

    def __iter__(self) -> Iterator[deque[Item]]:
        """The units, in no order."""
        return (unit for _, _, unit in self._heap)

    def _counted(self, unit: deque[Item], sign: int) -> None:
        self.items += sign * len(unit)
        self.bytes += sign * size_of(unit)


class Backlog:
    """What waits behind parked records, and with them: at most half of what a worker may hold.

    A partition that holds more than its share of that is ``clogged`` until no more than half of its share is left, of
    whatever it has: what was parked is at its next attempt now and then, and what is behind it waits all the time.

    Thread rule: belongs to the poll thread.

    Args:
        lot: of the parked units.
        dispatcher: whose lanes are behind them.
        max_items: records that the worker may hold.
        max_bytes: bytes of their values.
    """

    def __init__(self, lot: ParkingLot, dispatcher: Dispatcher, max_items: int, max_bytes: int) -> None:
        self._lot = lot
        self._dispatcher = dispatcher
        #: Its budget.
        self.most_items = max_items // 2
        self.most_bytes = max_bytes // 2
        #: What was there at the last look.
        self.items = 0
        self.bytes = 0
        #: Partitions of which nothing more is wanted.
        self.clogged: set[Partition] = set()
        #: When it may be counted anew, of time.monotonic().
        self._due = 0.0

    def look(self, parts: Mapping[Partition, PartitionState]) -> None:
        """Count anew, but not so often that it costs much: each parked record is looked at.

        ``parts``: the partitions that share the budget.
        """
        now = time.monotonic()
        if now < self._due:
            return
        items: Counter[Partition] = Counter()
        sizes: Counter[Partition] = Counter()
        units = 0
        behind = self._dispatcher.behind
        for units, unit in enumerate(self._lot, 1):  # noqa: B007 - how many there are
            first = unit[0]
            of, waiting = first.state.of, behind(first)
            items[of] += len(unit)
            sizes[of] += size_of(unit) if len(unit) > 1 else len(first.record.value or b"")
            if waiting:
                items[of] += len(waiting)
                sizes[of] += size_of(waiting)
        self._due = now + units * _LOOK_S
        for of in self.clogged:
            items[of] = len(parts[of].running)
            sizes[of] = max(sizes[of], sum(map(size_of, self._dispatcher.waiting(parts[of]))))
        self.items, self.bytes = items.total(), sizes.total()
        over = self.items > self.most_items or self.bytes > self.most_bytes
        for of in self.clogged | (items.keys() if over else set()):
            share = len(parts) * max(items[of] / max(self.most_items, 1), sizes[of] / max(self.most_bytes, 1))
            if over and share > 1:
                self.clogged.add(of)
            elif share <= _HALF:
                self.clogged.discard(of)

    def clear(self) -> None:
        """There is too little of everything for it to matter."""
        self.items = self.bytes = 0


def size_of(items: Iterable[Item]) -> int:
    """Bytes of the values of these records."""
    return sum(len(item.record.value or b"") for item in items)
