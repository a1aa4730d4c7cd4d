"""One operation as its topics tell it, up to now and from now on: no recorder has to run, and none is waited for."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Self

from kser.errors import NotFound
from kser.events import events_topic
from kser.progress import ProgressReport
from kser.telemetry import telemetry_topic
from kser.transport import Partition, Record, Transport
from kser.transport.partitioner import partition_of

if TYPE_CHECKING:
    from kser.storage.views import Execution, LogLine

__all__ = ["LiveOperation"]

#: Longest wait for what the topics are, in seconds.
_ANSWER_S: Final = 10.0
#: The records lie in no other cluster that this could be mixed up with.
_CLUSTER: Final = "live"


class LiveOperation:
    """What the events and the telemetry of a group tell of an operation, or of a task that belongs to none.

    They are put into a storage in memory as a recorder would, so it shows what `kser operations show` does.

    Args:
        uuid: of the operation.
        timeout_s: longest wait for what was told until now.

    Raises TransportError when that cannot be read in time. One thread uses it, and closes it.
    """

    def __init__(self, transport: Transport, group: str, uuid: str, timeout_s: float = 60) -> None:
        from kser.storage.memory import MemoryStorage  # here: it loads SQL
        from kser.storage.projection import Projection

        self.uuid = uuid
        self._transport = transport
        self._key = uuid.encode("utf-8", "surrogatepass")
        end = time.monotonic() + timeout_s
        topics = (events_topic(group), telemetry_topic(group))
        found = transport.admin().describe(list(topics), min(_ANSWER_S, timeout_s))
        self._partitions = {topic: found[topic].partitions for topic in topics if topic in found}
        self._storage = MemoryStorage()
        self._projection = Projection(self._storage.database, _CLUSTER, group)
        self._known: set[Partition] = set()
        self._logged = 0
        # First the reader, then what is there: what lies between comes twice, and the projection knows it.
        self._reader = transport.reader(list(self._partitions), start="end") if self._partitions else None
        try:
            self.told = list(self._read_until_now(end))
        except BaseException:
            self.close()
            raise

    def _read_until_now(self, end: float) -> Iterator[Record]:
        """What was told until now. It is in its key's partitions, unless partitions were added since."""
        home = [Partition(topic, partition_of(self._key, count)) for topic, count in self._partitions.items()]
        everywhere = [Partition(topic, n) for topic, count in self._partitions.items() for n in range(count)]
        for partitions in (home, [partition for partition in everywhere if partition not in home]):
            if not partitions:
                continue
            for batch in self._transport.read(partitions, max(end - time.monotonic(), 0.01)):
                yield from self._take(batch)
            if self.find() is not None:
                return

    def poll(self, timeout_s: float) -> list[Record]:
        """What was told since; [] after ``timeout_s``, or earlier."""
        if self._reader is None:
            time.sleep(timeout_s)  # the group has no topics yet: no worker has run
            return []
        return self._take(self._reader.poll(timeout_s))

    def _take(self, records: list[Record]) -> list[Record]:
        own = [record for record in records if record.key == self._key]
        new = {record.of for record in own} - self._known
        if new:
            self._known |= new
            self._projection.positions(new)
        fresh = [record for record in own if self._projection.is_new(record)]
        self._projection.apply(fresh)
        return fresh

    def find(self) -> "Execution | None":
        """The operation with all that is in it; None while nothing is told of it."""
        try:
            return self._storage.history.get_operation(self.uuid)
        except NotFound:
            return None

    def progress(self) -> ProgressReport:
        """How far it is. Raises NotFound while nothing is told of it."""
        return self._storage.history.get_progress(self.uuid)

    def logs(self) -> "list[LogLine]":
        """What its tasks have logged since this was asked for last."""
        lines = self._storage.history.list_logs(self.uuid, after=self._logged)
        if lines:
            self._logged = lines[-1].id
        return lines

    def close(self) -> None:
        """Let go of the connection."""
        if self._reader is not None:
            self._reader.close()
        self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
