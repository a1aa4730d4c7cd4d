"""How much a group has not done yet: the unfinished records of each partition, which is not what Kafka calls lag.

Kafka's tools count from the committed offset to the end. Beside that offset it is stored which records behind it are
finished (kser.worker.offsets), and markers of transactions take up offsets as well. Here neither is counted.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kser.errors import NotFound, TransportError
from kser.transport import Partition, Position, Transport
from kser.worker.offsets import decode

__all__ = ["PartitionLag", "lag_of"]

#: Of a partition with more offsets behind what is known the records are not counted, but their offsets.
EXACT: Final = 10_000
#: Longest time to count records, in seconds: an open transaction may hold it up.
_COUNT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionLag:
    """What a group has not done of one partition."""

    topic: str
    partition: int
    #: The lowest unfinished offset; -1: the group has committed nothing.
    committed: int
    #: The offset that the next record will get.
    end: int
    #: Records that are not finished, those included that are being run and that wait for another attempt.
    unfinished: int
    #: Those that wait for their next attempt.
    parked: int
    #: False: ``unfinished`` is at most that many, because offsets were counted and not records.
    exact: bool


def lag_of(transport: Transport, group: str, topics: Sequence[str], timeout_s: float = 30) -> list[PartitionLag]:
    """The lag of each partition of these topics, in their order.

    Raises NotFound: there is no such topic. TransportError: no answer within ``timeout_s``. ConfigurationError: the
    offsets were committed by a newer release.
    """
    limit = time.monotonic() + timeout_s
    there = transport.admin().describe(topics, _left(limit))
    if missing := [topic for topic in topics if topic not in there]:
        raise NotFound(f"There is no topic {', '.join(missing)}", extra={"topics": missing})
    partitions = [Partition(topic, number) for topic in topics for number in range(there[topic].partitions)]
    source = transport.source(group)
    try:
        committed = source.committed(partitions, _left(limit))
        bounds = {of: source.watermarks(of, _left(limit)) for of in partitions}
    finally:
        source.close(_left(limit))
    known = [_Known(position, *bounds[position.of]) for position in committed]
    counted = _count(transport, [each for each in known if each.behind <= EXACT], min(_COUNT_S, _left(limit)))
    return [each.lag(counted) for each in known]


class _Known:
    """What the committed position tells of a partition with records from ``low`` to ``high``."""

    def __init__(self, position: Position, low: int, high: int) -> None:
        self.position = position
        self.high = high
        self.listed = 0
        self.parked = 0
        #: From here on nothing is finished.
        self.start = low
        if position.offset >= 0:
            found = decode(position.offset, position.metadata)
            self.start = max(found.end, low)
            self.listed = sum(1 for offset in found.unfinished if offset >= low)
            self.parked = sum(1 for offset in found.parked if offset >= low)

    @property
    def behind(self) -> int:
        """How many offsets there are of which nothing is known."""
        return max(self.high - self.start, 0)

    def lag(self, counted: Counter[Partition] | None) -> PartitionLag:
        """The answer; ``counted``: records from ``start`` on, where they were counted."""
        exact = not self.behind or (counted is not None and self.behind <= EXACT)
        rest = counted[self.position.of] if exact and counted is not None else self.behind
        return PartitionLag(
            topic=self.position.topic,
            partition=self.position.partition,
            committed=self.position.offset,
            end=self.high,
            unfinished=self.listed + rest,
            parked=self.parked,
            exact=exact,
        )


def _count(transport: Transport, known: Sequence[_Known], timeout_s: float) -> Counter[Partition] | None:
    """How many records there are from ``start`` on; None when that could not be found out in time."""
    counted: Counter[Partition] = Counter()
    starts = {each.position.of: each.start for each in known if each.behind}
    highs = {each.position.of: each.high for each in known}
    try:
        for batch in transport.read(list(starts), timeout_s, starts=starts):
            counted.update(record.of for record in batch if record.offset < highs[record.of])
    except TransportError as exc:
        if not exc.retriable:
            raise
        return None
    return counted


def _left(limit: float) -> float:
    return max(limit - time.monotonic(), 0.1)
