"""One operation as its topics tell it, up to now and from now on: no recorder has to run, and none is waited for."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal, Self

from kser.cli.workers import fleet
from kser.errors import NotFound, TransportError
from kser.events import events_topic
from kser.progress import ProgressReport
from kser.status import Status
from kser.telemetry import telemetry_topic
from kser.transport import Partition, Reader, Record, Transport
from kser.transport.partitioner import partition_of

if TYPE_CHECKING:
    from kser.storage.views import Execution, LogLine

__all__ = ["LiveOperation"]

#: Longest wait for what the topics are, in seconds.
_ANSWER_S: Final = 10.0
#: Seconds between two looks whether a topic is there that was not.
_LOOK_S: Final = 1.0
#: Seconds within which a worker has told of itself, if it is there: it does so every 5.
_SILENT_S: Final = 60.0
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
        self._group = group
        self._key = uuid.encode("utf-8", "surrogatepass")
        #: Those that are not there yet.
        self._missing = [events_topic(group), telemetry_topic(group)]
        self._looked = time.monotonic()
        self._storage = MemoryStorage()
        self._projection = Projection(self._storage.database, _CLUSTER, group)
        self._known: set[Partition] = set()
        self._logged = 0
        self._telemetry = telemetry_topic(group)
        #: Keys of those that run its tasks; what they tell of themselves is listened to from then on.
        self._workers: set[bytes] = set()
        #: Names of those of whom it is known what they told before that.
        self._recalled: set[str] = set()
        self._looked_at_workers = self._looked
        self._readers: list[Reader] = []
        end = self._looked + timeout_s
        try:
            # First the reader, then what is there: what lies between comes twice, and the projection knows it.
            found = self._open("end", min(_ANSWER_S, timeout_s))
            #: What was told until now.
            self.told = list(self._read_until_now(found, end))
        except BaseException:
            self.close()
            raise

    def _open(self, start: Literal["beginning", "end"], timeout_s: float) -> dict[str, int]:
        """Begin to read the topics that are there by now; the partitions of each."""
        described = self._transport.admin().describe(self._missing, timeout_s)
        found = {topic: described[topic].partitions for topic in self._missing if topic in described}
        if found:
            self._readers.append(self._transport.reader(list(found), start=start))
            self._missing = [topic for topic in self._missing if topic not in found]
        return found

    def _read_until_now(self, topics: Mapping[str, int], end: float) -> Iterator[Record]:
        """What was told until now. It is in its key's partitions, unless partitions were added since."""
        home = [Partition(topic, partition_of(self._key, count)) for topic, count in topics.items()]
        everywhere = [Partition(topic, n) for topic, count in topics.items() for n in range(count)]
        for partitions in (home, [partition for partition in everywhere if partition not in home]):
            if partitions:
                for batch in self._transport.read(partitions, max(end - time.monotonic(), 0.01)):
                    yield from self._take(batch)
            if self.find() is not None:
                return

    def poll(self, timeout_s: float) -> list[Record]:
        """What was told since; [] after ``timeout_s``, or a little earlier or later."""
        if self._missing and time.monotonic() - self._looked > _LOOK_S:
            self._open("beginning", _ANSWER_S)
            self._looked = time.monotonic()
        if not self._readers:
            time.sleep(timeout_s)  # no worker of the group has run yet
        return [record for reader in self._readers for record in self._take(reader.poll(timeout_s))]

    def look(self) -> "list[Execution]":
        """Tasks of it that turned out to run no more: their workers are gone. Looks now and then, else gives []."""
        now = time.monotonic()
        if now - self._looked_at_workers < _LOOK_S:
            return []
        self._looked_at_workers = now
        found = self.find()
        running = [] if found is None else [task for task in found.walk() if task.status == Status.RUNNING]
        names = {task.worker for task in running if task.worker}
        self._workers = {name.encode("utf-8", "surrogatepass") for name in names}
        self._recall(names - self._recalled)
        if not names or not self._projection.close_dead():
            return []
        uuids, found = {task.uuid for task in running}, self.find()
        return [] if found is None else [each for each in found.walk() if each.uuid in uuids and each.note]

    def _recall(self, names: set[str]) -> None:
        """Put in what these workers told last before they were listened to. Who told nothing for long is gone."""
        from kser.storage.records import WorkerTold, worker_told  # here: it loads SQL

        if not names:
            return
        since = datetime.now(UTC) - timedelta(seconds=_SILENT_S)
        try:
            told = {state.worker: state for state in fleet(self._transport, self._group, _SILENT_S)}
        except TransportError:
            return  # the next look asks again
        workers = [WorkerTold(name, self._group, "running", 0, since, 0.0, {}) for name in names if name not in told]
        for name in names & told.keys():
            with suppress(ValueError, TypeError, KeyError):  # nobody can reckon with what it told
                workers.append(worker_told(asdict(told[name])))
        self._projection.add_workers(workers)
        self._recalled |= names

    def _take(self, records: list[Record]) -> list[Record]:
        # What workers tell of themselves has their name for a key.
        told = [record for record in records if record.key in self._workers and record.topic == self._telemetry]
        self._put(told)
        return self._put([record for record in records if record.key == self._key])

    def _put(self, own: list[Record]) -> list[Record]:
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
        for reader in self._readers:
            reader.close()
        self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
