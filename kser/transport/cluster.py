"""The broker inside the memory transport: logs of partitions, transactions, groups, and what is due when.

Thread rule of this module: whoever calls holds `Cluster.changed`.
"""

import itertools
import logging
import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from kser.errors import Error, TransportError
from kser.transport import OutRecord, Partition, Position, Record
from kser.transport.clock import Clock
from kser.transport.groups import Group
from kser.transport.partitioner import partition_of

__all__ = ["Cluster", "Operation", "PartitionLog", "Transaction", "TransactionalId"]

logger = logging.getLogger(__name__)

#: What can be made to fail: the calls of that name, ``end_txn`` for Sink.commit and ``delivery`` for the confirmation
#: of a record.
Operation = Literal[
    "poll", "commit", "committed", "watermarks", "produce", "delivery", "begin", "send_offsets", "end_txn", "abort"
]

#: What Kafka takes as the name of a topic.
_TOPIC = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}$")


class _Fault(NamedTuple):
    error: Error
    #: True: the operation is done and only the answer is lost.
    applied: bool


class Transaction:
    """One transaction, from its first record or offset to its end."""

    __slots__ = ("began", "offsets", "written")

    def __init__(self, began: float) -> None:
        #: In the clock's seconds.
        self.began = began
        #: Offsets of its records.
        self.written: defaultdict[Partition, list[int]] = defaultdict(list)
        #: What it commits, with the sequence number of having said so.
        self.offsets: dict[tuple[str, Partition], tuple[int, Position]] = {}


class TransactionalId:
    """What the coordinator knows of one transactional id. The epoch tells the holder from those before it."""

    __slots__ = ("epoch", "open")

    def __init__(self) -> None:
        self.epoch = 0
        self.open: Transaction | None = None


class PartitionLog:
    """The records of one partition. An entry is None where nobody is to see a record: a marker, or an aborted one."""

    __slots__ = ("_entries", "_open", "start")

    def __init__(self) -> None:
        #: The first offset there is.
        self.start = 0
        self._entries: list[Record | None] = []
        #: Open transactions with the offset of their first record here.
        self._open: dict[Transaction, int] = {}

    @property
    def end(self) -> int:
        """The offset that the next record will get."""
        return self.start + len(self._entries)

    @property
    def stable(self) -> int:
        """The last stable offset: what lies behind it waits for a transaction to end."""
        return min(self._open.values(), default=self.end)

    def append(self, record: Record | None, transaction: Transaction | None) -> None:
        """Add a record, or None for a marker."""
        if transaction is not None:
            self._open.setdefault(transaction, self.end)
        self._entries.append(record)

    def read(self, offset: int, limit: int) -> tuple[list[Record], int]:
        """The visible records from ``offset`` on, at most ``limit``, and the offset to go on from."""
        found: list[Record] = []
        stable = self.stable
        while offset < stable and len(found) < limit:
            upto = min(stable, offset + limit - len(found))
            chunk = self._entries[offset - self.start : upto - self.start]
            found += [entry for entry in chunk if entry is not None]
            offset = upto
        return found, offset

    def end_transaction(self, transaction: Transaction, written: list[int], *, committed: bool) -> None:
        """Show the records of a transaction, or drop them; either way a marker takes an offset, as on Kafka."""
        del self._open[transaction]
        if not committed:
            for offset in written:
                if offset >= self.start:
                    self._entries[offset - self.start] = None
        self._entries.append(None)

    def delete_before(self, offset: int) -> None:
        """Drop what lies before ``offset``, as retention does."""
        offset = min(offset, self.end)
        if offset > self.start:
            del self._entries[: offset - self.start]
            self.start = offset


class Cluster:
    """Topics, groups and transactional ids. Everything that happens notifies ``changed``."""

    def __init__(
        self,
        clock: Clock,
        *,
        default_partitions: int,
        session_timeout_s: float,
        transaction_timeout_s: float,
        auto_create: bool,
    ) -> None:
        self.clock = clock
        self.changed = threading.Condition()
        self.topics: dict[str, list[PartitionLog]] = {}
        self._default_partitions = default_partitions
        self._session_timeout_s = session_timeout_s
        self.transaction_timeout_s = transaction_timeout_s
        self._auto_create = auto_create
        self._groups: dict[str, Group] = {}
        self._ids: dict[str, TransactionalId] = {}
        self._faults: defaultdict[Operation, deque[_Fault]] = defaultdict(deque)
        self._sequence = itertools.count(1)
        self._round_robin = itertools.count()
        with self.changed:
            clock.wait(self.changed, 0)  # makes the condition known to a FakeClock before anyone measures a wait

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Do what is overdue: put out members that did not poll, abort transactions that took too long."""
        now = self.clock.monotonic()
        counts = self.partition_counts()
        acted = False
        for group in self._groups.values():
            acted |= group.put_out_overdue(now, self._session_timeout_s, counts)
        for name, holder in self._ids.items():
            if holder.open is not None and now >= holder.open.began + self.transaction_timeout_s:
                logger.info("The transaction of %s is older than %s s: aborted", name, self.transaction_timeout_s)
                self.end_transaction(holder, committed=False)
                holder.epoch += 1  # so that its producer is told, as by a Kafka coordinator
                acted = True
        if acted:
            self.changed.notify_all()

    def wait(self, deadline: float) -> None:
        """Wait until something happened, something is overdue, or the deadline has come."""
        dues = [deadline]
        for group in self._groups.values():
            dues += [m.seen + self._session_timeout_s for m in group.members.values() if not m.polling]
        dues += [h.open.began + self.transaction_timeout_s for h in self._ids.values() if h.open is not None]
        self.clock.wait(self.changed, max(0.0, min(dues) - self.clock.monotonic()))

    # -- faults ------------------------------------------------------------------------------------------------------

    def fail_next(self, operation: Operation, error: Error, *, applied: bool, times: int) -> None:
        """Let the next operations of this kind end with this error."""
        self._faults[operation].extend([_Fault(error, applied)] * times)

    @contextmanager
    def failing(self, operation: Operation) -> Iterator[None]:
        """Around an operation: raises its next fault, before it, or after it when only the answer is to be lost."""
        faults = self._faults.get(operation)
        fault = faults.popleft() if faults else None
        if fault is not None and not fault.applied:
            raise fault.error
        yield
        if fault is not None:
            raise fault.error

    # -- topics ------------------------------------------------------------------------------------------------------

    def partition_counts(self) -> dict[str, int]:
        """How many partitions each topic has."""
        return {name: len(logs) for name, logs in self.topics.items()}

    def grow(self, name: str, partitions: int) -> None:
        """Give the topic this many partitions, make it when it is new. Raises TransportError."""
        if not _TOPIC.match(name):
            raise TransportError(f"{name!r} cannot be the name of a topic: use 1 to 249 letters, digits, '.', '_', '-'")
        have = len(self.topics.get(name, ()))
        if partitions < max(1, have):
            raise TransportError(f"Topic {name} cannot have {partitions} partitions: at least {max(1, have)}")
        self.topics.setdefault(name, []).extend(PartitionLog() for _ in range(partitions - have))
        counts = self.partition_counts()
        for group in self._groups.values():
            if group.listens_to(name):
                group.rebalance(counts)
        self.changed.notify_all()

    def log(self, partition: Partition) -> PartitionLog:
        """The log of a partition. Raises TransportError when there is none."""
        logs = self.topics.get(partition.topic)
        if logs is None:
            raise TransportError(f"Topic {partition.topic} does not exist: create it first")
        if not 0 <= partition.partition < len(logs):
            raise TransportError(
                f"Topic {partition.topic} has no partition {partition.partition}, only 0 to {len(logs) - 1}"
            )
        return logs[partition.partition]

    def append(self, record: OutRecord, transaction: Transaction | None = None) -> None:
        """Write one record. Raises TransportError when its topic or partition does not exist and is not to be made."""
        if record.topic not in self.topics and self._auto_create:
            self.grow(record.topic, self._default_partitions)
        place = Partition(record.topic, self._partition(record))
        log = self.log(place)
        offset = log.end
        headers = tuple(record.headers)
        log.append(Record(*place, offset, record.key, record.value, headers, self.clock.time_ms()), transaction)
        if transaction is not None:
            transaction.written[place].append(offset)
        self.changed.notify_all()

    def _partition(self, record: OutRecord) -> int:
        if record.partition is not None:
            return record.partition
        count = max(1, len(self.topics.get(record.topic, ())))
        return next(self._round_robin) % count if record.key is None else partition_of(record.key, count)

    # -- groups ------------------------------------------------------------------------------------------------------

    def group(self, name: str) -> Group:
        """The group of this name, made at its first use."""
        return self._groups.setdefault(name, Group(name))

    def next_sequence(self) -> int:
        """A number higher than all before."""
        return next(self._sequence)

    # -- transactions ------------------------------------------------------------------------------------------------

    def take_over(self, name: str) -> int:
        """Become the holder of this transactional id; what the one before left open is aborted. Gives the epoch."""
        holder = self._ids.setdefault(name, TransactionalId())
        self.end_transaction(holder, committed=False)
        holder.epoch += 1
        return holder.epoch

    def holder(self, name: str) -> TransactionalId:
        """The state of a transactional id that was taken over before."""
        return self._ids[name]

    def transaction(self, holder: TransactionalId) -> Transaction:
        """The open transaction of a holder; its first use opens it and starts its time."""
        if holder.open is None:
            holder.open = Transaction(self.clock.monotonic())
        return holder.open

    def add_offset(self, transaction: Transaction, group: Group, position: Position) -> None:
        """Let the transaction commit this position of the group."""
        if (group.name, position.of) not in transaction.offsets:
            group.hold(position.of)
        transaction.offsets[group.name, position.of] = (self.next_sequence(), position)

    def end_transaction(self, holder: TransactionalId, *, committed: bool) -> None:
        """Make the open transaction visible, records and offsets at once, or drop it; none open: nothing."""
        transaction, holder.open = holder.open, None
        if transaction is None:
            return
        for place, written in transaction.written.items():
            self.log(place).end_transaction(transaction, written, committed=committed)
        for (name, partition), (sequence, position) in transaction.offsets.items():
            group = self.group(name)
            group.release(partition)
            if committed:
                group.store(position, sequence)
        self.changed.notify_all()
