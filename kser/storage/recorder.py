"""Recorder: follows the events and telemetry of a group and keeps a storage up to date."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime
from typing import Final

from kser.errors import Error, OffsetLostError, StorageError, TransportError
from kser.events import events_topic
from kser.storage.projection import Batch, Heard, Projection, StaleError
from kser.storage.sql import SqlStorage
from kser.storage.values import now
from kser.telemetry import telemetry_topic
from kser.transport import Partition, Position, Record, Source, Transport
from kser.worker.interpreter import collecting_rarely, quick_turns
from kser.worker.topic_plan import Feature
from kser.worker.topics import ensure_group_topics

__all__ = ["BATCH", "FEATURES", "Recorder", "recorder_group", "topics_of"]

logger = logging.getLogger(__name__)

#: Whose topics a recorder follows.
FEATURES: Final = frozenset({Feature.EVENTS, Feature.TELEMETRY})
#: Records in one transaction, at most. Where very many wait, the more the better: indices of uuids change all over, so
#: a commit writes the same pages for a few records as for many. 10,000 take some 50 MB and 0.4 s.
BATCH = 10_000
#: How long its two threads wait for their turns, in seconds: the one that stores has a hundred of them in a batch.
_TURN_S: Final = 0.0001
#: Seconds of a poll without records: how soon it stops.
_POLL_S = 0.2
#: Seconds between two looks for what died.
_LOOK_S = 5.0
#: How long it may take to find out where a partition ends, in seconds, and to read what is there at the end.
_END_S = 1.0
_FINISH_S = 3.0
#: Seconds before the next try after a failure, doubled each time, and the longest.
_AGAIN_S, _AGAIN_MOST_S = 0.2, 10.0
_ANSWER_S = 10.0


def recorder_group(group: str, storage: str) -> str:
    """The consumer group of the recorders of a group of workers that keep the storage with this id up to date.

    One for each storage: in one for all each would get a part of the partitions, and miss the rest.
    """
    return f"{group}.recorder.{storage}"


def topics_of(group: str) -> list[str]:
    """The topics that a recorder follows."""
    return [events_topic(group), telemetry_topic(group)]


class Recorder:
    """Keeps a storage up to date with what the workers of a group tell. Any number of them share the work.

    Where it goes on stands in the storage, in the same transaction as what was recorded: killed at any moment it loses
    nothing and records nothing twice. A database or broker that is away is waited for.

    Args:
        transport: the broker.
        storage: with its tables.
        group: the workers' group.
        batch: records in one transaction, at most.

    Thread rule: run() in one thread; stop() from any, and from signal handlers.
    """

    def __init__(self, transport: Transport, storage: SqlStorage, *, group: str = "kser", batch: int = BATCH) -> None:
        self._transport = transport
        self._storage = storage
        self.group = group
        self._batch = batch
        self._stop = threading.Event()
        self._projection: Projection | None = None
        #: Partitions that were assigned and are not placed where the storage says.
        self._unplaced: set[Partition] = set()
        #: Records stored so far, by this recorder.
        self.recorded = 0
        #: What keeps it from recording; "" when it knows of nothing.
        self.problem = ""
        #: When it was looked last for what died.
        self._looked = 0.0
        #: Where partitions of the telemetry ended, and when: who told nothing below that was silent by then. How many
        #: partitions there are.
        self._ends: dict[Partition, tuple[int, datetime]] = {}
        self._partitions = 0
        #: What the thread of the pool does.
        self._storing: Future[None] | None = None

    def stop(self) -> None:
        """Have run() return, after the batch at hand."""
        self._stop.set()

    def run(self, *, rebuild: bool = False, on_start: Callable[[], None] = lambda: None) -> None:
        """Record until stop().

        Args:
            rebuild: forget first what the topics still prove, and read it again.
            on_start: called once topics and tables are found to be as they should.

        Raises ConfigurationError when the topics or tables cannot be used, TransportError when the broker does not
        answer at the start or its client cannot go on.
        """
        admin = self._transport.admin()
        ensure_group_topics(admin, self.group, [], features=FEATURES)
        projection = Projection(self._storage.database, admin.cluster_id(_ANSWER_S), self.group)
        projection.positions([])  # a database that cannot be used is told at once
        self._projection = projection
        on_start()
        if rebuild:
            projection.forget_topics(self._starts())
        source = self._transport.source(recorder_group(self.group, self._storage.id))
        try:
            source.subscribe(topics_of(self.group), self)
            with quick_turns(_TURN_S), collecting_rarely():
                self._record(source, projection)
        finally:
            source.close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _record(self, source: Source, projection: Projection) -> None:
        bad = 0
        with ThreadPoolExecutor(1, "kser-recorder") as pool:
            while not self._stop.is_set():
                try:
                    self._turn(source, projection, pool)
                    bad = 0
                    self.problem = ""
                except StorageError as exc:
                    self._begin_again(source)
                    self._tell(exc)
                    self._stop.wait(min(_AGAIN_S * 2**bad, _AGAIN_MOST_S))
                    bad = min(bad + 1, 10)
            self._finish(source, projection)
        self._storing = None  # what became of it the storage says

    def _turn(self, source: Source, projection: Projection, pool: ThreadPoolExecutor) -> None:
        """Get and read the next records, while the thread of the pool stores those before them."""
        records = self._poll(source)
        prepared = projection.prepare(records) if records and not self._unplaced else None
        self._see_stored(source)
        due = time.monotonic() - self._looked > _LOOK_S
        if due:
            self._looked = time.monotonic()
            # Who rebuilds forgets offsets of idle partitions too, where no record would ever tell.
            self._unplaced |= projection.moved(source.assignment())
        if self._unplaced:
            # What came of these partitions came from a place that nobody chose.
            unplaced = set(self._unplaced)
            self._place(source, projection)
            records = [record for record in records if record.of not in unplaced]
            prepared = None
        # Not while there is more than a batch: of what seems to have died most has an end that is not read yet.
        look = due and len(records) < self._batch
        if look:
            self._find_ends(source)
        if records or look:
            self._storing = pool.submit(self._store, projection, records, prepared, look=look)

    def _finish(self, source: Source, projection: Projection) -> None:
        """Read what is there and look once more, so that what has stopped with the recorder does not run for ever."""
        end = time.monotonic() + _FINISH_S
        try:
            self._see_stored(source)
            if self._unplaced or not source.joined:
                return
            self._find_ends(source)
            while (records := self._poll(source)) and time.monotonic() < end and not self._unplaced:
                self._apply(projection, records)
            if not self._unplaced:
                self._look(projection)
        except (Error, StaleError) as exc:
            logger.debug("It is not looked once more for what has stopped: %s", exc)

    def _see_stored(self, source: Source) -> None:
        """Wait until nothing is being stored. Raises what went wrong there."""
        storing, self._storing = self._storing, None
        try:
            if storing is not None:
                storing.result()
        except StaleError as exc:
            logger.info("Another recorder of group %s is alive: %s", self.group, exc)
            self._begin_again(source)

    def _find_ends(self, source: Source) -> None:
        """Ask where the partitions of the telemetry end that this recorder has, but what it has asked and not reached.

        Each recorder says of the workers that it hears itself which of them are silent: what another one has not read
        yet is no silence.
        """
        topic = telemetry_topic(self.group)
        own = [partition for partition in source.assignment() if partition.topic == topic]
        self._ends = {partition: self._ends[partition] for partition in own if partition in self._ends}
        try:
            self._partitions = self._transport.admin().describe([topic], _END_S)[topic].partitions
            for partition in own:
                if partition not in self._ends:
                    asked = now()
                    low, high = source.watermarks(partition, _END_S)
                    self._ends[partition] = (high if low < high else 0), asked  # of an empty one nothing is to come
        except (TransportError, KeyError) as exc:
            logger.debug("It is not looked for silent workers now: %s", exc)

    def _poll(self, source: Source) -> list[Record]:
        try:
            return source.poll(_POLL_S, self._batch)
        except OffsetLostError as exc:
            partition = Partition(exc.extra["topic"], exc.extra["partition"])
            logger.warning(
                "%s. Records of group %s were deleted before they were recorded: going on with the first there is",
                exc.message,
                self.group,
            )
            source.seek(Position(*partition, -1))
            return []

    def _place(self, source: Source, projection: Projection) -> None:
        """Go to where the storage says of the partitions that came."""
        for partition, offset in projection.positions(self._unplaced).items():
            source.seek(Position(*partition, -1 if offset is None else offset))
        self._unplaced.clear()

    # -- in the thread of the pool -------------------------------------------------------------------------------------

    def _store(self, projection: Projection, records: Sequence[Record], prepared: Batch | None, *, look: bool) -> None:
        if records:
            self._apply(projection, records, prepared)
        if look:
            self._look(projection)

    def _look(self, projection: Projection) -> None:
        """Look for what died."""
        reached = [place for place, (end, _) in self._ends.items() if projection.is_stored(place, end)]
        until = {place.partition: self._ends.pop(place)[1] for place in reached}
        if closed := projection.close_dead(Heard(self._partitions, until)):
            logger.info("%d task(s) of group %s do not run any more", closed, self.group)

    def _apply(self, projection: Projection, records: Sequence[Record], prepared: Batch | None = None) -> None:
        """Store these, but a record that no database takes: it must not keep the others out for ever."""
        try:
            self.recorded += projection.apply(records, prepared=prepared)
        except StorageError as exc:
            if not exc.extra.get("refused"):
                raise
            if len(records) > 1:
                for half in (records[: len(records) // 2], records[len(records) // 2 :]):
                    self._apply(projection, half)
                return
            topic, partition, offset = records[0][:3]
            logger.error("Record %s/%d/%d is passed over: %s", topic, partition, offset, exc.message)
            projection.apply(records, pass_over=True)

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _begin_again(self, source: Source) -> None:
        """Look again where to go on: what was polled was not stored."""
        self._unplaced.update(source.assignment())

    def _tell(self, exc: Error) -> None:
        if exc.message != self.problem:
            logger.warning("The recorder of group %s waits and tries again: %s", self.group, exc.message)
        self.problem = str(exc.message)

    def _starts(self) -> dict[Partition, int]:
        """The first offset there is of each partition of the topics."""
        found: dict[Partition, int] = {}
        for topic, info in self._transport.admin().describe(topics_of(self.group), _ANSWER_S).items():
            for number in range(info.partitions):
                partition = Partition(topic, number)
                found[partition] = self._first_offset(partition)
        return found

    def _first_offset(self, partition: Partition) -> int:
        for records in self._transport.read([partition]):
            if records:
                return records[0].offset
        return 0

    # -- the group's listener ------------------------------------------------------------------------------------------

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        """See RebalanceListener."""
        self._unplaced.update(partitions)

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """See RebalanceListener. Whoever gets them finds all in the storage that was read here."""
        if self._storing is not None:
            wait([self._storing])  # whether it failed is seen after the poll
        self._unplaced.difference_update(partitions)
        if self._projection is not None:
            self._projection.forget(partitions)

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        """See RebalanceListener."""
        self.on_revoke(partitions)
