"""What kser needs of a broker: Source, Sink, Reader, TopicAdmin, and the Transport that makes them.

Implementations: `kser.transport.memory` (in this process, exact semantics) and `kser.confluent` (Kafka). One contract
suite (tests/contract) runs on all of them, so what a docstring here says is what each of them does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol

from kser.errors import Error

__all__ = [
    "EMBEDDED_CLUSTERS",
    "EXPIRED_SHARE",
    "DeliveryCallback",
    "GroupMember",
    "Header",
    "OutRecord",
    "Partition",
    "Position",
    "Reader",
    "RebalanceListener",
    "Record",
    "Sink",
    "Source",
    "TopicAdmin",
    "TopicInfo",
    "TopicSpec",
    "Transport",
]

#: A transaction that has been open for this share of its timeout has expired when its producer is fenced: a producer
#: that takes over an id fences young ones, which are open for milliseconds, and clocks and answers differ a little.
EXPIRED_SHARE: Final = 0.8

#: How the ids of clusters begin that are the embedded broker, librdkafka's mock cluster.
EMBEDDED_CLUSTERS: Final = "mockCluster"

#: One record header: name and raw value. Names may repeat.
Header = tuple[str, bytes | None]

#: Called once for each record, with None when the broker confirmed it, else with the error. Never raises.
DeliveryCallback = Callable[[Error | None], None]


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int


class Position(NamedTuple):
    """The next offset to read of a partition, with what was stored beside it. ``offset`` is -1 when there is none."""

    topic: str
    partition: int
    offset: int
    #: Stored and given back as it is; at most 4095 bytes of UTF-8: offset.metadata.max.bytes is 4096, and
    #: confluent-kafka sends a zero byte behind it.
    metadata: str = ""

    @property
    def of(self) -> Partition:
        """The partition this position belongs to."""
        return Partition(self.topic, self.partition)


class Record(NamedTuple):
    """One record as it was read."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]
    #: Milliseconds since the epoch, as the broker stored them.
    timestamp_ms: int

    @property
    def of(self) -> Partition:
        """The partition this record came from."""
        return Partition(self.topic, self.partition)

    def header(self, name: str) -> bytes | None:
        """The value of the last header of this name, or None."""
        for found, value in reversed(self.headers):
            if found == name:
                return value
        return None


class OutRecord(NamedTuple):
    """One record to write. The key picks the partition (murmur2, as Java producers do) unless one is given."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header] = ()
    partition: int | None = None


class GroupMember(Protocol):
    """What a transaction needs to know of the member whose offsets it commits: opaque, and of one moment only."""

    @property
    def joined(self) -> bool:
        """False before the group has been joined: then nothing may be committed with it (KAFKA.md finding 4)."""

    @property
    def round(self) -> object:
        """Another one as soon as the partitions of this member may be others' too, and it would not know yet.

        Brokers refuse what is committed by its member and generation, not by whose the partition is.
        """


class RebalanceListener(Protocol):
    """Told of partitions that come and go, inside Source.poll() and Source.close(), in the thread that calls those."""

    def on_assign(self, partitions: Sequence[Partition]) -> Sequence[Position] | None:
        """New partitions came. Gives where to start each; None or offset -1 mean the committed one, else the start."""

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """These partitions will go when this returns; until then their offsets can still be committed."""

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        """These partitions are gone already; others may own them. Nothing of them can be committed."""


class Source(Protocol):
    """One member of a consumer group. One thread owns it: every method is called from that thread only."""

    def subscribe(self, topics: Sequence[str], listener: RebalanceListener) -> None:
        """Join the group for these topics. Returns at once; partitions come during poll()."""

    def poll(self, timeout_s: float, max_records: int = 500) -> list[Record]:
        """What has come: at most ``max_records``, as soon as there is one, [] after ``timeout_s``.

        Only committed records of transactions are given. Transient errors are logged and waited out.

        Raises:
            OffsetLostError: the position does not exist any more; the partition stays where it is.
            TransportError: the client cannot go on.
        """

    @property
    def joined(self) -> bool:
        """Whether the group has taken this member in, even when it has no partition for it. Never raises.

        It stays False for good where the broker does not know the group protocol: Kafka tells no error then.
        """

    def assignment(self) -> list[Partition]:
        """The partitions this member owns now."""

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Give nothing of these until resume(). A partition that is newly assigned is never paused."""

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Give records of these again, from where they were paused; none is lost."""

    def seek(self, position: Position) -> None:
        """Read this partition from ``position.offset`` on."""

    def committed(self, partitions: Sequence[Partition], timeout_s: float = 10) -> list[Position]:
        """What the group has committed, offset -1 where there is nothing.

        Waits for transactions under way. Raises TransportError when there is no answer within ``timeout_s``.
        """

    def commit(self, positions: Sequence[Position], timeout_s: float = 10) -> None:
        """Store these positions for the group, and return once they are stored.

        Raises:
            GroupError: this member does not own the partition any more. Nothing was stored for it.
            TransportError: it is not known whether they were stored.
        """

    @property
    def callback_s(self) -> float:
        """How long a callback of the listener may take before the group goes on without this member, in seconds."""

    @property
    def commit_overdue(self) -> bool:
        """Whether a commit() that got no answer in its time may still be stored: after what is stored by then, too.

        It ends with an answer, or when the client gives the request up. Never raises.
        """

    def commit_later(self, positions: Sequence[Position], on_stored: DeliveryCallback) -> None:
        """Ask for these positions to be stored, and return at once. ``on_stored`` tells, from poll() or commit().

        Positions that are not owned any more are left out; when none is left, ``on_stored`` may be called at once. For
        positions that may be stored late or not at all: what
        has to be stored before a partition goes, commit() stores.
        """

    def watermarks(self, partition: Partition, timeout_s: float = 10) -> tuple[int, int]:
        """The first offset there is, and the one the next record will get."""

    def member(self) -> GroupMember:
        """This member as of now, for Sink.send_offsets()."""

    def retake(self, partitions: Sequence[Partition]) -> None:
        """Take these over anew, as far as they are owned: on_lost now, on_assign from poll(). Not inside on_assign."""

    def close(self, timeout_s: float = 10) -> None:
        """Leave the group. Calls on_revoke for what is still owned. A second call does nothing."""


class Sink(Protocol):
    """Writes records. May be shared by threads, but a transaction belongs to one thread at a time.

    A Sink made with a transactional id writes in transactions only; without one it has no transactions. One made with
    ``failures_only`` calls an ``on_delivery`` only with an error; what has not failed when flush() gives 0 is stored.

    Errors of a transaction's calls have in ``extra``, where it is so: ``abort`` True: nothing is stored, call abort(),
    then begin(); ``fatal`` True: this sink is of no more use, close it and make one of the same transactional id;
    ``expired`` True, of a FencedError: the transaction was open for about as long as it may be, so it was the broker
    that ended it, for all that is known, and no other producer of the same id;
    ``record``: the Error of the first record that could not be delivered, with ``extra["index"]`` when it came by
    produce_all(), counted over all those calls since begin().
    """

    def produce(self, record: OutRecord, on_delivery: DeliveryCallback | None = None) -> None:
        """Hand over one record. Waits for room when the buffer is full.

        ``on_delivery`` is called later, from poll(), flush() or another thread's call of them.

        Raises:
            MessageTooLargeError: the client refuses its size.
            TransportError: the client cannot take it.
        """

    def produce_all(self, records: Sequence[OutRecord]) -> None:
        """Hand over all of these, in this order, as produce() without on_delivery would, but quicker.

        For transactions: commit() tells of those that could not be delivered. Waits for room when the buffer is full.

        Raises:
            MessageTooLargeError: the client refuses the size of one.
            ValidationError: one is no record that can be written.
            TransportError: the client cannot take one.

        Each has ``extra["index"]``, which one it was; those before it were handed over, those behind it were not.
        """

    def deliver(self, records: Sequence[OutRecord], timeout_s: float = 30) -> list[tuple[int, Error]]:
        """Write all of these, in this order, and wait until each one is confirmed or failed.

        Gives the failures, by index and in that order: [] when all are stored. What is not confirmed after
        ``timeout_s`` is given up, together with what else this sink still has to write, and is a DeliveryError here:
        it may have been stored even so. Not for transactions, nor for calls inside an on_delivery.

        Raises TransportError only when the sink is closed or has a transactional id, never because of a record.
        """

    def poll(self, timeout_s: float) -> int:
        """Serve delivery callbacks for up to ``timeout_s``; the number served."""

    def flush(self, timeout_s: float) -> int:
        """Wait until everything handed over is confirmed or failed; the number still open after ``timeout_s``."""

    def drop_queued(self) -> None:
        """Give up what was handed over but not yet written to a broker: its callbacks get a DeliveryError."""

    def begin(self) -> None:
        """Open a transaction. The first one fences whoever used the same transactional id before."""

    def send_offsets(self, positions: Sequence[Position], member: GroupMember) -> None:
        """Make these positions part of the transaction.

        Raises GroupError when the member has not joined or is not of the current generation; then abort().
        """

    def commit(self, timeout_s: float = 30) -> None:
        """Make the transaction visible: its records and its offsets, together.

        Raises:
            FencedError: another producer has this transactional id now, or the transaction took too long (``expired``).
                Nothing of it is visible.
            Error: with ``extra["abort"]`` True when only abort() is left; ``extra["record"]`` is then the Error of the
                first record that was refused, if that is why.
            TransportError: it is not known what became of it, unless ``retriable``: then call commit() again.
        """

    def abort(self, timeout_s: float = 30) -> None:
        """Drop the transaction: none of its records is ever seen by a Source, none of its offsets is stored."""

    def close(self, timeout_s: float = 10) -> None:
        """Flush within ``timeout_s`` and let go of the connection. A second call does nothing."""


class Reader(Protocol):
    """Reads topics without a group: everything of them, for one onlooker. One thread owns it."""

    def poll(self, timeout_s: float, max_records: int = 500) -> list[Record]:
        """What has come, [] after ``timeout_s``. Topics and partitions that appear later are read from their start."""

    def at_end(self) -> bool:
        """True when everything that was there when the reader was made has been given."""

    def close(self) -> None:
        """Let go of the connection. A second call does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """A topic as it should be."""

    name: str
    partitions: int
    #: Copies of each partition; None leaves it to the broker.
    replication: int | None = None
    #: Topic settings by their Kafka names, e.g. {"cleanup.policy": "compact"}.
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicInfo:
    """A topic as it is."""

    name: str
    partitions: int
    replication: int
    #: Topic settings in force; empty where the broker tells none (the embedded one, memory).
    config: Mapping[str, str] = field(default_factory=dict)


class TopicAdmin(Protocol):
    """Looks at topics and makes them. May be shared by threads."""

    def cluster_id(self, timeout_s: float = 10) -> str:
        """The cluster's own name. Raises TransportError when no broker answers within ``timeout_s``."""

    def can_create(self, timeout_s: float = 10) -> bool:
        """False on a broker that makes topics by itself and takes no order (the embedded one)."""

    def describe(self, names: Sequence[str], timeout_s: float = 10) -> dict[str, TopicInfo]:
        """Those of ``names`` that exist. Asking creates nothing where the broker can be told so."""

    def create(self, specs: Sequence[TopicSpec], timeout_s: float = 30) -> list[str]:
        """Make the topics that do not exist yet; the names of those made now. Raises TransportError."""

    def offsets_at(self, partitions: Sequence[Partition], time_ms: int, timeout_s: float = 10) -> dict[Partition, int]:
        """Where to begin to read each of these for what was written at ``time_ms`` or later: Transport.read(starts=).

        By the timestamps of the records, milliseconds since the epoch. A partition without such a record is left at its
        end, and one of a broker that cannot tell (the embedded one) at its start.

        Raises TransportError: there is no such partition, or no answer within ``timeout_s``.
        """

    def delete_records(self, positions: Sequence[Position], timeout_s: float = 30) -> None:
        """Delete, for good, what lies before the offset of each of these positions, and return once it is done.

        Offsets do not change by it. Of a position that is the start of its partition nothing is deleted.

        Raises TransportError: there is no such partition or offset, the broker refuses or cannot do it (the embedded
        one), or there is no answer within ``timeout_s``; some of the positions may be done then.
        """


class Transport(Protocol):
    """One broker, and the things that talk to it."""

    def source(self, group: str, *, member_id: str | None = None) -> Source:
        """A new member of this consumer group; it joins with subscribe().

        Args:
            group: the consumer group.
            member_id: makes it a static member, which keeps its partitions while it is away for less than the session
                timeout: nothing moves when it closes and one of the same name comes again. Of two that are there at a
                time one gets a GroupError from poll() that says so: on Kafka's classic protocol and in memory the one
                that was there first; with KIP-848 the newcomer, after having waited for the session of a dead
                predecessor to end.
        """

    def sink(self, transactional_id: str | None = None, *, failures_only: bool = False) -> Sink:
        """A new writer. With ``failures_only`` deliver() and produce_all() are quicker: see Sink."""

    def reader(self, topics: Sequence[str], start: Literal["beginning", "end"] = "beginning") -> Reader:
        """A new reader of these topics. "end": only what is written after this call returned."""

    def read(
        self,
        partitions: Sequence[Partition],
        timeout_s: float = 60,
        *,
        starts: Mapping[Partition, int] | None = None,
    ) -> Iterator[list[Record]]:
        """All that is in these partitions, from their starts to their ends, in batches; each partition in its order.

        Of a partition that has an offset in ``starts``, what is there from that offset on.

        It ends with what was there when the first batch was asked for. Of transactions only committed records are
        given; one that was open then is waited for, because it may be committed. Empty partitions cost next to nothing.
        The thread that takes the first batch takes them all; close() of the iterator lets go of the connection early.

        Raises TransportError from the first batch on: there is no such partition, or, ``retriable``, the end was not
        reached within ``timeout_s``.
        """

    def admin(self) -> TopicAdmin:
        """The topics of this broker."""
