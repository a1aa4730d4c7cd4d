"""A broker in this process, with the semantics of Kafka: MemoryTransport.

Partitions and offsets, consumer groups that rebalance cooperatively, commit metadata, transactions with fencing and a
last stable offset, markers that leave gaps in the offsets. It is for tests, for `kser.dummy` and for scripts that need
no broker. What it holds is gone with the process, and nothing of it is deleted unless `delete_before()` is called.

It has no threads of its own: a member that does not poll, or a transaction that takes too long, is dealt with when
somebody else calls. Waiting wakes at once when something comes.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from kser.errors import (
    ConfigurationError,
    Error,
    FencedError,
    GroupError,
    MessageTooLargeError,
    OffsetLostError,
    TransportError,
    ValidationError,
)
from kser.transport import (
    EXPIRED_SHARE,
    DeliveryCallback,
    GroupMember,
    OutRecord,
    Partition,
    Position,
    RebalanceListener,
    Record,
    TopicInfo,
    TopicSpec,
)
from kser.transport.clock import Clock, RealClock
from kser.transport.cluster import Cluster, Operation, Transaction, TransactionalId
from kser.transport.groups import Group, Member, Membership, Subscription, checked_member_id, to_store

__all__ = ["MemoryAdmin", "MemoryReader", "MemorySink", "MemorySource", "MemoryTransport"]

logger = logging.getLogger(__name__)

#: Records of one partition in one batch of MemoryTransport.read().
_READ_BATCH = 1000


class MemoryTransport:
    """One in-process cluster and what talks to it. May be shared by threads.

    Args:
        clock: what timeouts and timestamps are measured on; default the real one, `kser.testing.FakeClock` for tests.
        default_partitions: partitions of a topic that is made by writing to it.
        session_timeout_s: a member of a group that does not poll for so long is put out.
        transaction_timeout_s: a transaction that is open for so long is aborted, and its producer fenced.
        auto_create: make a topic when something is first written to it; False: such a record is refused.
        max_record_bytes: a record with more bytes in key, value and headers is refused.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        default_partitions: int = 4,
        session_timeout_s: float = 6,
        transaction_timeout_s: float = 10,
        auto_create: bool = True,
        max_record_bytes: int = 1_048_576,
    ) -> None:
        if default_partitions < 1 or session_timeout_s <= 0 or transaction_timeout_s <= 0 or max_record_bytes < 1:
            raise ConfigurationError(
                f"default_partitions={default_partitions}, session_timeout_s={session_timeout_s}, "
                f"transaction_timeout_s={transaction_timeout_s}, max_record_bytes={max_record_bytes}: "
                "all of them must be more than 0"
            )
        self._max_record_bytes = max_record_bytes
        self._cluster = Cluster(
            clock or RealClock(),
            default_partitions=default_partitions,
            session_timeout_s=session_timeout_s,
            transaction_timeout_s=transaction_timeout_s,
            auto_create=auto_create,
        )

    # -- Transport ---------------------------------------------------------------------------------------------------

    def source(self, group: str, *, member_id: str | None = None) -> "MemorySource":
        """A new member of this consumer group, which joins with subscribe(); with ``member_id`` a static one."""
        if not group:
            raise ConfigurationError("group is empty: name the consumer group")
        return MemorySource(self._cluster, group, checked_member_id(member_id) if member_id is not None else None)

    def sink(self, transactional_id: str | None = None, *, failures_only: bool = False) -> "MemorySink":
        """A new writer; with ``failures_only`` one that calls an ``on_delivery`` only with an error."""
        return MemorySink(self._cluster, transactional_id, self._max_record_bytes, failures_only=failures_only)

    def reader(self, topics: Sequence[str], start: Literal["beginning", "end"] = "beginning") -> "MemoryReader":
        """A new reader of these topics. "end": only what is written after this call returned."""
        return MemoryReader(self._cluster, topics, start)

    def read(
        self,
        partitions: Sequence[Partition],
        timeout_s: float = 60,
        *,
        starts: Mapping[Partition, int] | None = None,
    ) -> Iterator[list[Record]]:
        """All that is in these partitions, in batches; see `kser.transport.Transport.read`."""
        begin = starts or {}
        cluster = self._cluster
        deadline = cluster.clock.monotonic() + timeout_s
        with cluster.changed:
            # The next offset to read and the end of each; the end counts what an open transaction has written.
            left = {of: (begin.get(of, 0), cluster.log(of).end) for of in partitions}
        while left:
            records: list[Record] = []
            with cluster.changed:
                cluster.tick()
                for partition, (position, end) in list(left.items()):
                    log = cluster.log(partition)
                    more, position = log.read(max(position, log.start), _READ_BATCH)
                    records += [record for record in more if record.offset < end]
                    left[partition] = position, end
                    if position >= end:
                        del left[partition]
                if not records and left:
                    if cluster.clock.monotonic() >= deadline:
                        where = ", ".join(
                            f"{of.topic}/{of.partition} at {at} of {end}" for of, (at, end) in left.items()
                        )
                        raise TransportError(
                            f"Not read to the end within {timeout_s:g} s, because a transaction is open there: "
                            f"{where}. Try again",
                            retriable=True,
                        )
                    cluster.wait(deadline)
            if records:
                yield records

    def admin(self) -> "MemoryAdmin":
        """The topics of this broker."""
        return MemoryAdmin(self._cluster)

    # -- for tests ---------------------------------------------------------------------------------------------------

    def records(self, topic: str) -> list[Record]:
        """What a Source could read of this topic: by partition, each in the order of offsets. No topic: nothing."""
        with self._cluster.changed:
            self._cluster.tick()
            logs = self._cluster.topics.get(topic, [])
            return [record for log in logs for record in log.read(log.start, log.end)[0]]

    def positions(self, group: str) -> list[Position]:
        """What the group has committed, by topic and partition."""
        with self._cluster.changed:
            self._cluster.tick()
            return self._cluster.group(group).positions()

    def add_partitions(self, topic: str, partitions: int) -> None:
        """Give the topic this many partitions; it is made when it is new. Raises TransportError when it has more."""
        with self._cluster.changed:
            self._cluster.grow(topic, partitions)

    def delete_before(self, partition: Partition, offset: int) -> None:
        """Drop the records before ``offset``, as retention does: who stands before it gets OffsetLostError."""
        with self._cluster.changed:
            self._cluster.log(partition).delete_before(offset)

    def fail_next(self, operation: Operation, error: Error, *, applied: bool = False, times: int = 1) -> None:
        """Let the next ``times`` calls of this operation, by anyone, end with ``error``.

        Args:
            operation: the method of that name; ``end_txn`` is Sink.commit(), ``delivery`` what a delivery callback
                gets: its record is not written.
            error: raised, or given to the callback.
            applied: False: nothing is done. True: all is done and only the answer is lost. With ``poll`` and
                ``committed`` there is nothing that could have been done.
            times: how often. Later calls of fail_next() queue behind it.
        """
        with self._cluster.changed:
            self._cluster.fail_next(operation, error, applied=applied, times=times)


class _Assigned:
    """What one source has: where it stands in each partition. Belongs to the source's thread, under the lock."""

    def __init__(self) -> None:
        #: The next offset to read; None until the committed one is known.
        self.positions: dict[Partition, int | None] = {}
        self.paused: set[Partition] = set()
        self._turn = 0

    def add(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self.positions[partition] = None
            self.paused.discard(partition)

    def remove(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self.positions.pop(partition, None)
            self.paused.discard(partition)

    def fetch(self, cluster: Cluster, group: Group, limit: int) -> list[Record]:
        """At most ``limit`` records, the partitions taking turns in being first. Raises OffsetLostError."""
        ready = [p for p in sorted(self.positions) if p not in self.paused and self._locate(p, cluster, group)]
        self._turn += 1
        found: list[Record] = []
        for at in range(len(ready)):
            partition = ready[(at + self._turn) % len(ready)]
            position = self.positions[partition]
            if len(found) < limit and position is not None:
                more, self.positions[partition] = cluster.log(partition).read(position, limit - len(found))
                found += more
        return found

    def _locate(self, partition: Partition, cluster: Cluster, group: Group) -> bool:
        """Settle where to read; False while an open transaction may still move it."""
        log, position = cluster.log(partition), self.positions[partition]
        if position is None:
            if group.held([partition]):
                return False
            committed = group.committed(partition).offset
            position = self.positions[partition] = committed if committed >= 0 else log.start
        if not log.start <= position <= log.end:
            raise OffsetLostError(
                f"Offset {position} of {partition.topic}/{partition.partition} does not exist any more, it has "
                f"{log.start} to {log.end}: choose where to go on, and seek() there",
                extra={"topic": partition.topic, "partition": partition.partition, "offset": position},
            )
        return True


class MemorySource:
    """One member of a consumer group in memory: see `kser.transport.Source`. One thread owns it."""

    def __init__(self, cluster: Cluster, group: str, member_id: str | None = None) -> None:
        self._cluster = cluster
        self._member_id = member_id
        with cluster.changed:
            self._group = cluster.group(group)
        self._subscription: Subscription | None = None
        self._listener: RebalanceListener | None = None
        self._member: Member | None = None
        self._assigned = _Assigned()
        self._closed = False
        #: What commit_later() asked for, to be told by poll().
        self._stored: deque[tuple[DeliveryCallback, Error | None]] = deque()

    # -- reading -----------------------------------------------------------------------------------------------------

    def subscribe(self, topics: Sequence[str], listener: RebalanceListener) -> None:
        """Join the group for these topics. Returns at once; partitions come during poll()."""
        with self._locked():
            self._subscription = Subscription(topics)
            self._listener = listener
            if self._member is not None and self._member.alive:
                self._member.subscription = self._subscription
                self._group.rebalance(self._cluster.partition_counts())
            else:
                self._join()
            self._cluster.changed.notify_all()

    def poll(self, timeout_s: float, max_records: int = 500) -> list[Record]:
        """What has come; see `kser.transport.Source.poll`. A call of its own from inside a listener is refused."""
        cluster = self._cluster
        deadline = cluster.clock.monotonic() + timeout_s
        while self._stored:
            on_stored, error = self._stored.popleft()
            on_stored(error)
        with self._present():
            with cluster.changed, cluster.failing("poll"):
                pass
            while True:
                with cluster.changed:
                    cluster.tick()
                    change = self._next_change()
                    if change is None:
                        records = self._assigned.fetch(cluster, self._group, max_records)
                        if records or cluster.clock.monotonic() >= deadline:
                            return records
                        cluster.wait(deadline)
                if change is not None:
                    self._tell(*change)

    @property
    def joined(self) -> bool:
        """Whether the group has taken this member in: from its first poll() until it is put out or closed."""
        with self._cluster.changed:
            self._cluster.tick()
            return self._member is not None and self._member.alive and self._member.generation > 0

    def assignment(self) -> list[Partition]:
        """The partitions this member owns now."""
        return sorted(self._assigned.positions)

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Give nothing of these until resume(); what this member does not own is passed over."""
        self._assigned.paused |= set(partitions) & self._assigned.positions.keys()

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Give records of these again, from where they were paused."""
        self._assigned.paused.difference_update(partitions)

    def seek(self, position: Position) -> None:
        """Read this partition from ``position.offset`` on. Raises GroupError when this member does not own it."""
        if position.of not in self._assigned.positions:
            raise GroupError(f"Cannot seek in {position.topic}/{position.partition}: this member does not own it")
        with self._locked():
            start = self._cluster.log(position.of).start
        self._assigned.positions[position.of] = position.offset if position.offset >= 0 else start

    # -- offsets -----------------------------------------------------------------------------------------------------

    def committed(self, partitions: Sequence[Partition], timeout_s: float = 10) -> list[Position]:
        """What the group has committed, offset -1 where there is nothing; waits for transactions under way."""
        cluster = self._cluster
        deadline = cluster.clock.monotonic() + timeout_s
        with self._locked(), cluster.failing("committed"):
            while self._group.held(partitions):
                if cluster.clock.monotonic() >= deadline:
                    raise TransportError(
                        f"What group {self._group.name} has committed is not known after {timeout_s} s: a transaction "
                        "that moves it is still open",
                        retriable=True,
                    )
                cluster.wait(deadline)
                cluster.tick()
            return [self._group.committed(partition) for partition in partitions]

    def commit(self, positions: Sequence[Position], timeout_s: float = 10) -> None:  # noqa: ARG002 - never waits
        """Store these positions for the group. With GroupError those of partitions still owned are stored."""
        stored = to_store(positions)
        with self._locked(), self._cluster.failing("commit"):
            self._cluster.tick()
            self._group.store_owned(self._member, stored, self._cluster.next_sequence())

    @property
    def callback_s(self) -> float:
        """Any time: nobody is put out."""
        return float("inf")

    @property
    def commit_overdue(self) -> bool:
        """Always False: commit() is answered at once."""
        return False

    def commit_later(self, positions: Sequence[Position], on_stored: DeliveryCallback) -> None:
        """Ask for these positions to be stored: done at once, and told by the next poll()."""
        owned = [position for position in positions if position.of in self._assigned.positions]
        error: Error | None = None
        try:
            self.commit(owned)
        except Error as exc:
            error = exc
        self._stored.append((on_stored, error))

    def watermarks(self, partition: Partition, timeout_s: float = 10) -> tuple[int, int]:  # noqa: ARG002 - never waits
        """The first offset there is, and the one the next record will get.

        While a transaction is open in the partition, the second is the offset of its first record, as on Kafka.
        """
        with self._locked(), self._cluster.failing("watermarks"):
            self._cluster.tick()
            log = self._cluster.log(partition)
            return log.start, log.stable

    def member(self) -> GroupMember:
        """This member as of now."""
        with self._cluster.changed:
            generation = self._member.generation if self._member is not None else 0
            return Membership(self._group.name, self._member, generation)

    def retake(self, partitions: Sequence[Partition]) -> None:
        """Take these over anew: on_lost now, on_assign from the next poll()."""
        owned = [partition for partition in partitions if partition in self._assigned.positions]
        if owned:
            self._tell("lost", owned)
            self._release(owned)

    # -- leaving -----------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float = 10) -> None:  # noqa: ARG002 - never waits
        """Leave the group. Calls on_revoke for what is still owned, on_lost when this member was put out."""
        if self._closed:
            return
        with self._present():
            try:
                with self._cluster.changed:
                    owned = self.assignment()
                    alive = self._member is not None and self._member.alive
                if owned:
                    self._tell("revoke" if alive else "lost", owned)
            finally:
                self._leave()

    def _leave(self) -> None:
        with self._cluster.changed:
            self._closed = True
            self._assigned = _Assigned()
            if self._member is not None:
                self._group.leave(self._member, self._cluster.partition_counts(), self._cluster.clock.monotonic())
                self._member = None
            self._cluster.changed.notify_all()

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._cluster.changed:
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"This source of group {self._group.name} is closed: make a new one")

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Count as polling, so that a listener that takes its time is not put out meanwhile."""
        with self._locked():
            if self._member is not None:
                if self._member.polling:
                    raise TransportError("poll() and close() cannot be called from inside a rebalance listener")
                self._cluster.tick()  # first: a member that is overdue stays so
                self._member.polling = True
        try:
            yield
        finally:
            with self._cluster.changed:
                if self._member is not None:
                    self._member.polling = False
                    self._member.seen = self._cluster.clock.monotonic()

    def _join(self) -> None:
        assert self._subscription is not None
        cluster = self._cluster
        self._member = self._group.join(
            self._subscription, cluster.partition_counts(), cluster.clock.monotonic(), self._member_id
        )

    def _next_change(self) -> tuple[Literal["lost", "revoke", "assign"], list[Partition]] | None:
        """What the listener has to be told next; None when the member is up to date with its group."""
        member = self._member
        if member is None:
            return None
        if not member.alive:
            lost = self.assignment()
            self._assigned.remove(lost)
            if member.replaced:
                if lost:
                    return "lost", lost
                raise GroupError(
                    f"Another worker took over the name {self._member_id} (group.instance.id) in group "
                    f"{self._group.name}: give each its own"
                )
            self._join()
            assert self._member is not None
            self._member.polling = True
            return ("lost", lost) if lost else self._next_change()
        if leaving := sorted(member.owned - member.target):
            return "revoke", leaving
        member.generation = self._group.generation
        if coming := self._group.free_for(member):
            member.owned.update(coming)
            self._assigned.add(coming)
            return "assign", coming
        return None

    def _tell(self, change: Literal["lost", "revoke", "assign"], partitions: list[Partition]) -> None:
        """Call the listener, without the lock: it may wait for other threads that need it."""
        assert self._listener is not None
        if change == "lost":
            self._listener.on_lost(partitions)
        elif change == "assign":
            try:
                starts = self._listener.on_assign(partitions) or ()
            except BaseException:
                self._release(partitions)  # it is told again at the next poll; until then nothing of them is given
                raise
            self._assigned.add(partitions)  # what the listener sought or paused in there does not count, as on Kafka
            for start in starts:
                if start.offset >= 0 and start.of in self._assigned.positions:
                    self._assigned.positions[start.of] = start.offset
        else:
            try:
                self._listener.on_revoke(partitions)
            finally:
                self._release(partitions)

    def _release(self, partitions: list[Partition]) -> None:
        with self._cluster.changed:
            assert self._member is not None
            self._member.owned.difference_update(partitions)
            self._assigned.remove(partitions)
            self._cluster.changed.notify_all()


class MemorySink:
    """A writer in memory: see `kser.transport.Sink`. May be shared by threads."""

    def __init__(
        self, cluster: Cluster, transactional_id: str | None, max_record_bytes: int, *, failures_only: bool = False
    ) -> None:
        self._cluster = cluster
        self._id = transactional_id
        self._failures_only = failures_only
        self._max_record_bytes = max_record_bytes
        self._epoch: int | None = None
        #: "unanswered": committed, but its answer was lost; the same commit() again is answered with success.
        self._phase: Literal["ready", "open", "unanswered"] = "ready"
        #: When the transaction was begun, in the clock's seconds.
        self._began = 0.0
        #: Why the open transaction can only be aborted.
        self._failure: Error | None = None
        #: The error of the first record of the transaction that was not delivered.
        self._undelivered: Error | None = None
        #: send_offsets() failed: a commit would show the records without the offsets.
        self._offsets_missing = False
        #: Records that produce_all() wrote since begin().
        self._handed = 0
        self._reports: deque[tuple[DeliveryCallback, Error | None]] = deque()
        self._closed = False

    # -- records -----------------------------------------------------------------------------------------------------

    def produce(self, record: OutRecord, on_delivery: DeliveryCallback | None = None) -> None:
        """Write one record; see `kser.transport.Sink.produce`. ``on_delivery`` waits for poll(), flush(), commit()."""
        with self._locked():
            error = self._write(record)
            if error is not None and self._id is None and on_delivery is None:
                logger.warning("A record for %s was not written: %s", record.topic, error.message)
            if on_delivery is not None and (error is not None or not self._failures_only):
                self._reports.append((on_delivery, error))
                self._cluster.changed.notify_all()

    def produce_all(self, records: Sequence[OutRecord]) -> None:
        """Write all of these; see `kser.transport.Sink.produce_all`."""
        with self._locked():
            for index, record in enumerate(records):
                before = self._undelivered
                try:
                    self.produce(record)
                except Error as exc:
                    exc.extra["index"] = index
                    raise
                if before is None and self._undelivered is not None:
                    self._undelivered.extra["index"] = self._handed
                self._handed += 1

    def deliver(self, records: Sequence[OutRecord], timeout_s: float = 30) -> list[tuple[int, Error]]:  # noqa: ARG002 - never waits
        """Write all of these and give the failures, by index; see `kser.transport.Sink.deliver`."""
        failures: list[tuple[int, Error]] = []
        with self._locked():
            if self._id is not None:
                raise TransportError(f"deliver() of {self._id}: it is for sinks without transactions")
            for index, record in enumerate(records):
                try:
                    error = self._write(record)
                except Error as exc:
                    error = exc
                if error is not None:
                    failures.append((index, error))
        return failures

    def _write(self, record: OutRecord) -> Error | None:
        """Why it was not delivered, None when it was. Raises when it is not even taken."""
        size = _size(record)
        if size > self._max_record_bytes:
            raise MessageTooLargeError(f"A record for {record.topic}", size, self._max_record_bytes)
        if self._id is not None:
            self._check_phase("open")
        with self._cluster.failing("produce"):
            try:
                with self._cluster.failing("delivery"):
                    self._cluster.append(record, self._transaction() if self._id is not None else None)
            except Error as exc:
                if self._id is not None:
                    self._failure = exc if isinstance(exc, FencedError) else self._failure
                    self._undelivered = self._undelivered or exc
                return exc
        return None

    def poll(self, timeout_s: float) -> int:
        """Serve delivery callbacks, waiting up to ``timeout_s`` for the first; the number served."""
        cluster = self._cluster
        served = self._serve()
        if served or timeout_s <= 0:
            return served
        deadline = cluster.clock.monotonic() + timeout_s
        with cluster.changed:
            while not self._reports and cluster.clock.monotonic() < deadline:
                cluster.wait(deadline)
        return self._serve()

    def flush(self, timeout_s: float) -> int:  # noqa: ARG002 - never waits
        """Serve all callbacks. Everything handed over is confirmed or failed already, so 0."""
        self._serve()
        return 0

    def drop_queued(self) -> None:
        """Nothing: a record is written by produce(), so none is ever queued."""

    def _serve(self) -> int:
        served = 0
        while self._reports:
            try:
                callback, error = self._reports.popleft()
            except IndexError:  # another thread took the last one
                break
            served += 1
            try:
                callback(error)
            except Exception:
                logger.exception("A delivery callback raised; it must not")
        return served

    # -- transactions ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Open a transaction. The first one fences whoever used the same transactional id before."""
        with self._locked(), self._cluster.failing("begin"):
            if self._id is None:
                raise TransportError("This sink has no transactional id, so it has no transactions")
            self._check_phase("ready")
            if self._epoch is None:
                self._epoch = self._cluster.take_over(self._id)
            self._phase, self._handed, self._undelivered, self._offsets_missing = "open", 0, None, False
            self._began = self._cluster.clock.monotonic()

    def send_offsets(self, positions: Sequence[Position], member: GroupMember) -> None:
        """Make these positions part of the transaction; after a GroupError it can only be aborted."""
        if not isinstance(member, Membership):
            raise TypeError(f"{type(member).__name__} is no member of a MemorySource: give what its member() returns")
        stored = to_store(positions)
        with self._locked():
            self._check_phase("open")
            self._offsets_missing = True
            with self._cluster.failing("send_offsets"):
                self._add_offsets(stored, member)
            self._offsets_missing = False

    def _add_offsets(self, stored: Sequence[Position], member: Membership) -> None:
        self._cluster.tick()
        group = self._cluster.group(member.group)
        try:
            group.check_membership(member, stored)
        except GroupError as exc:
            exc.extra["abort"] = True
            self._failure = exc
            raise
        with self._fenced_for_good():
            transaction = self._transaction()
        for position in stored:
            self._cluster.add_offset(transaction, group, position)

    def commit(self, timeout_s: float = 30) -> None:  # noqa: ARG002 - never waits
        """Make the transaction visible: its records and its offsets, together."""
        with self._locked():
            self._cluster.tick()
            if self._phase == "unanswered":
                self._phase = "ready"
                return
            self._check_phase("open")
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            if self._undelivered is not None:
                raise TransportError(
                    f"Committing the transaction of {self._id} failed: a record was not delivered: "
                    f"{self._undelivered.message}",
                    extra={"abort": True, "record": self._undelivered},
                )
            if self._offsets_missing:
                raise TransportError(
                    f"The transaction of {self._id} has not got its offsets: abort() it, its records would be doubled",
                    extra={"abort": True},
                )
            with self._fenced_for_good(), self._cluster.failing("end_txn"):
                self._cluster.end_transaction(self._holder(), committed=True)
                self._phase = "unanswered"
            self._phase = "ready"
        self._serve()

    def abort(self, timeout_s: float = 30) -> None:  # noqa: ARG002 - never waits
        """Drop the transaction: none of its records is ever seen, none of its offsets is stored."""
        with self._locked():
            self._cluster.tick()
            self._check_phase("open")
            with self._fenced_for_good(), self._cluster.failing("abort"):
                self._cluster.end_transaction(self._holder(), committed=False)
                self._phase, self._failure, self._undelivered = "ready", None, None
        self._serve()

    def close(self, timeout_s: float = 10) -> None:  # noqa: ARG002 - never waits
        """Serve the callbacks, abort what is open. A second call does nothing."""
        with self._cluster.changed:
            if self._closed:
                return
            self._closed = True
            if self._phase == "open" and not isinstance(self._failure, FencedError):
                holder = self._cluster.holder(self._id or "")
                if holder.epoch == self._epoch:
                    self._cluster.end_transaction(holder, committed=False)
        self._serve()

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._cluster.changed:
            if self._closed:
                raise TransportError("This sink is closed: make a new one")
            yield

    def _check_phase(self, phase: Literal["ready", "open"]) -> None:
        if isinstance(self._failure, FencedError):
            raise self._failure
        if self._phase != phase:
            raise TransportError(
                "No transaction is open: begin() one first"
                if phase == "open"
                else "A transaction is open already: commit() or abort() it first"
            )

    def _holder(self) -> TransactionalId:
        """The coordinator's state of this sink's id. Raises FencedError when it is another's by now."""
        assert self._id is not None
        holder = self._cluster.holder(self._id)
        if holder.epoch != self._epoch:
            extra = {"fatal": True}
            age_s = self._cluster.clock.monotonic() - self._began
            if self._phase == "open" and age_s >= EXPIRED_SHARE * self._cluster.transaction_timeout_s:
                extra["expired"] = True
            raise FencedError(
                f"Transactional id {self._id} was taken over by another producer, or its transaction took too long: "
                "make a new sink",
                extra=extra,
            )
        return holder

    @contextmanager
    def _fenced_for_good(self) -> Iterator[None]:
        """A FencedError, whoever raised it, stays: nothing can be done with this sink any more."""
        try:
            yield
        except FencedError as exc:
            self._failure = exc
            raise

    def _transaction(self) -> Transaction:
        return self._cluster.transaction(self._holder())


def _size(record: OutRecord) -> int:
    try:
        _, key, value, headers, _ = record
        return len(key or b"") + len(value or b"") + sum(len(n.encode()) + len(v or b"") for n, v in headers)
    except (TypeError, ValueError, AttributeError) as exc:
        raise ValidationError(f"A record for topic {record[0]!r} cannot be written: {exc}") from exc


class MemoryReader:
    """An onlooker in memory: see `kser.transport.Reader`. One thread owns it."""

    def __init__(self, cluster: Cluster, topics: Sequence[str], start: Literal["beginning", "end"]) -> None:
        self._cluster = cluster
        self._subscription = Subscription(topics)
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._turn = 0
        self._closed = False
        with cluster.changed:
            self._discover()
            # As for a read_committed consumer of Kafka, "there" is what no open transaction holds back.
            self._ends = {partition: cluster.log(partition).stable for partition in self._positions}
            if start == "end":
                self._positions = dict(self._ends)

    def poll(self, timeout_s: float, max_records: int = 500) -> list[Record]:
        """What has come, [] after ``timeout_s``."""
        cluster = self._cluster
        deadline = cluster.clock.monotonic() + timeout_s
        with cluster.changed:
            if self._closed:
                raise TransportError("This reader is closed: make a new one")
            while True:
                cluster.tick()
                self._discover()
                records = self._fetch(max_records)
                if records or cluster.clock.monotonic() >= deadline:
                    return records
                cluster.wait(deadline)

    def at_end(self) -> bool:
        """True when everything that was there when the reader was made has been given."""
        with self._cluster.changed:
            self._cluster.tick()
            return all(self._passed(partition, end) for partition, end in self._ends.items())

    def close(self) -> None:
        """Let go of it. A second call does nothing."""
        self._closed = True

    def _passed(self, partition: Partition, end: int) -> bool:
        log = self._cluster.log(partition)
        found, position = log.read(max(self._positions[partition], log.start), 1)
        return (found[0].offset if found else position) >= end

    def _discover(self) -> None:
        for topic, logs in self._cluster.topics.items():
            if self._subscription.matches(topic):
                for number, log in enumerate(logs):
                    self._positions.setdefault(Partition(topic, number), log.start)

    def _fetch(self, limit: int) -> list[Record]:
        partitions = sorted(self._positions)
        self._turn += 1
        found: list[Record] = []
        for at in range(len(partitions)):
            partition = partitions[(at + self._turn) % len(partitions)]
            log = self._cluster.log(partition)
            position = max(self._positions[partition], log.start)  # what retention took is passed over
            more, self._positions[partition] = log.read(position, limit - len(found))
            found += more
        return found


class MemoryAdmin:
    """The topics in memory: see `kser.transport.TopicAdmin`. May be shared by threads."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def cluster_id(self, timeout_s: float = 10) -> str:  # noqa: ARG002 - never waits
        """Always "memory"."""
        return "memory"

    def can_create(self, timeout_s: float = 10) -> bool:  # noqa: ARG002 - never waits
        """Always True."""
        return True

    def describe(self, names: Sequence[str], timeout_s: float = 10) -> dict[str, TopicInfo]:  # noqa: ARG002 - never waits
        """Those of ``names`` that exist, without settings."""
        with self._cluster.changed:
            counts = self._cluster.partition_counts()
        return {name: TopicInfo(name=name, partitions=counts[name], replication=1) for name in names if name in counts}

    def create(self, specs: Sequence[TopicSpec], timeout_s: float = 30) -> list[str]:  # noqa: ARG002 - never waits
        """Make the topics that do not exist yet; their settings are not kept. Raises TransportError."""
        made: list[str] = []
        with self._cluster.changed:
            for spec in specs:
                if spec.name in self._cluster.topics:
                    continue
                if spec.replication not in (None, 1):
                    raise TransportError(
                        f"Topic {spec.name} cannot have {spec.replication} replicas: there is only this process"
                    )
                self._cluster.grow(spec.name, spec.partitions)
                made.append(spec.name)
        return made

    def offsets_at(
        self,
        partitions: Sequence[Partition],
        time_ms: int,
        timeout_s: float = 10,  # noqa: ARG002 - never waits
    ) -> dict[Partition, int]:
        """Where what was written at that time or later begins; see `kser.transport.TopicAdmin.offsets_at`."""
        found = {}
        with self._cluster.changed:
            self._cluster.tick()
            for of in partitions:
                log = self._cluster.log(of)
                records = log.read(log.start, log.end)[0]
                found[of] = next((record.offset for record in records if record.timestamp_ms >= time_ms), log.end)
        return found

    def delete_records(self, positions: Sequence[Position], timeout_s: float = 30) -> None:  # noqa: ARG002 - never waits
        """Delete what lies before these offsets; see `kser.transport.TopicAdmin.delete_records`."""
        with self._cluster.changed:
            for position in positions:
                if not 0 <= position.offset <= self._cluster.log(position.of).end:
                    raise TransportError(
                        f"Records of {position.topic}/{position.partition} before {position.offset} cannot be deleted: "
                        f"its next offset is {self._cluster.log(position.of).end}"
                    )
                self._cluster.log(position.of).delete_before(position.offset)
