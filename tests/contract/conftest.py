"""The brokers that the contract suites run on: memory, embedded (librdkafka's mock cluster) and a real Apache Kafka."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from kser.testing import FakeClock, eventually
from kser.transport import OutRecord, Partition, Position, Record, Sink, Source, TopicSpec, Transport
from kser.transport.memory import MemoryTransport

#: For the clients of the suite: short periods where a test waits for them.
CLIENTS: dict[str, object] = {
    # A member learns of a rebalance by its next heartbeat.
    "heartbeat.interval.ms": 300,
    "topic.metadata.refresh.interval.ms": 1000,
    "topic.metadata.propagation.max.ms": 1000,
}
#: For those that are to be put out: a member that does not poll, a transaction that takes too long.
HASTY: dict[str, object] = {
    "session.timeout.ms": 2000,
    "max.poll.interval.ms": 2000,
    "transaction.timeout.ms": 2000,
}


class Listener:
    """A rebalance listener that notes what it is told, and does more where a test says so."""

    def __init__(
        self,
        *,
        assigned: Callable[[Sequence[Partition]], Sequence[Position] | None] = lambda _: None,
        revoked: Callable[[Sequence[Partition]], object] = lambda _: None,
    ) -> None:
        self.told: list[tuple[str, list[Partition]]] = []
        self._assigned = assigned
        self._revoked = revoked

    def on_assign(self, partitions: Sequence[Partition]) -> Sequence[Position] | None:
        self.told.append(("assign", sorted(partitions)))
        return self._assigned(partitions)

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self.told.append(("revoke", sorted(partitions)))
        self._revoked(partitions)

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        self.told.append(("lost", sorted(partitions)))

    def partitions(self, event: str) -> list[Partition]:
        """All that came with this event, in order."""
        return [partition for name, partitions in self.told if name == event for partition in partitions]


@dataclass
class Broker:
    """One broker under test, with shorthands; what they open is closed at the end of the test."""

    name: str
    transport: Transport
    #: The same broker; its members are put out after 2 s without a poll, its transactions are aborted after 2 s.
    hasty: Transport
    _create: Callable[[str, int], object]
    _delete_before: Callable[[Partition, int], object]
    #: Milliseconds since the epoch, by the clock that stamps the records.
    now_ms: Callable[[], int]
    #: A sink without transactions, which is not to be closed.
    plain: Sink
    #: One that reports failures only.
    quiet: Sink
    _opened: ExitStack = field(default_factory=ExitStack)

    def new_name(self, what: str) -> str:
        """A name that nobody has used before."""
        return f"{what}-{uuid.uuid4().hex[:12]}"

    def make_topic(self, partitions: int = 1) -> str:
        """A new topic, which exists when this returns."""
        name = self.new_name("topic")
        self.make_topic_named(name, partitions)
        return name

    def make_topic_named(self, name: str, partitions: int = 1) -> None:
        self._create(name, partitions)

    def delete_before(self, partition: Partition, offset: int) -> None:
        """What retention does. Not on the embedded broker, which cannot."""
        self._delete_before(partition, offset)

    def source(
        self,
        group: str,
        topic: str,
        listener: Listener | None = None,
        *,
        hasty: bool = False,
        member_id: str | None = None,
    ) -> Source:
        """A source that has subscribed."""
        source = (self.hasty if hasty else self.transport).source(group, member_id=member_id)
        self._opened.callback(source.close)
        source.subscribe([topic], listener or Listener())
        return source

    def joined(self, group: str, topic: str, listener: Listener | None = None) -> Source:
        """A source that is the only member of its group and owns all of a topic in which there is nothing to read."""
        source = self.source(group, topic, listener)
        wanted = self.transport.admin().describe([topic])[topic].partitions
        early: list[Record] = []
        eventually(
            lambda: early.extend(source.poll(0.02)) or len(source.assignment()) == wanted, 30, f"{group} assigned"
        )
        assert early == []
        return source

    def sink(self, transactional_id: str | None = None, *, hasty: bool = False, failures_only: bool = False) -> Sink:
        sink = (self.hasty if hasty else self.transport).sink(transactional_id, failures_only=failures_only)
        self._opened.callback(sink.close)
        return sink

    def reader(self, *topics: str, **options: Any) -> Any:
        reader = self.transport.reader(topics, **options)
        self._opened.callback(reader.close)
        return reader

    def send(self, topic: str, *values: bytes | None, key: bytes | None = b"k", partition: int | None = None) -> None:
        """Write records one after the other, without a transaction; they are there when this returns."""
        problems: list[object] = []
        for value in values:
            self.plain.produce(OutRecord(topic, key, value, partition=partition), problems.append)
        assert self.plain.flush(20) == 0
        assert problems == [None] * len(values)

    def everything(self, topic: str) -> list[Record]:
        """What a new reader finds in the topic, by partition and offset."""
        self._wait_for_markers(topic)
        reader = self.reader(topic)
        found: list[Record] = []
        eventually(lambda: found.extend(reader.poll(0.05)) or reader.at_end(), 20, f"{topic} read to its end")
        return sorted(found, key=lambda record: (record.partition, record.offset))

    def _wait_for_markers(self, topic: str) -> None:
        """Apache Kafka writes the markers of a transaction after its commit was answered, and a reader's end is before.

        Not for long: a test may have left one open.
        """
        if self.name != "apache":
            return
        admin: Any = self.transport.admin()
        of = [Partition(topic, number) for number in range(admin.describe([topic])[topic].partitions)]
        source = self.transport.source(self.new_name("look"))
        limit = time.monotonic() + 1
        try:
            while time.monotonic() < limit and any(source.watermarks(p)[1] < admin.bounds([p])[p][1] for p in of):
                time.sleep(0.01)
        finally:
            source.close()

    def close(self) -> None:
        self._opened.close()


def _memory() -> Broker:
    clock = FakeClock()
    transport = MemoryTransport(clock=clock, auto_create=False)

    def create(name: str, partitions: int) -> None:
        transport.admin().create([TopicSpec(name=name, partitions=partitions)])

    plain, quiet = transport.sink(), transport.sink(failures_only=True)
    return Broker("memory", transport, transport, create, transport.delete_before, clock.time_ms, plain, quiet)


#: What tests of one Kafka share: a transport, the hasty one, and two sinks, whose first record alone takes 0.5 s.
Clients = tuple[Transport, Transport, Sink, Sink]


@pytest.fixture(scope="session")
def kafka_clients() -> Iterator[Callable[[str], Clients]]:
    """Those for these bootstrap servers."""
    made: dict[str, Clients] = {}

    def clients(servers: str) -> Clients:
        if servers not in made:
            from kser.confluent.transport import ConfluentTransport

            settings = {"bootstrap.servers": servers, **CLIENTS}
            transport = ConfluentTransport(settings)
            hasty = ConfluentTransport(settings | HASTY)
            made[servers] = (transport, hasty, transport.sink(), transport.sink(failures_only=True))
        return made[servers]

    yield clients
    for _, _, *sinks in made.values():
        for sink in sinks:
            sink.close()


def _kafka(name: str, server: Any, clients: Clients) -> Broker:
    transport, hasty, plain, quiet = clients

    def delete_before(partition: Partition, offset: int) -> None:
        from confluent_kafka import TopicPartition

        target = TopicPartition(partition.topic, partition.partition, offset)
        for future in server.admin.delete_records([target]).values():
            future.result(20)

    def now_ms() -> int:
        return time.time_ns() // 1_000_000

    return Broker(name, transport, hasty, server.create_topic, delete_before, now_ms, plain, quiet)


@pytest.fixture
def broker_named(
    request: pytest.FixtureRequest, kafka_clients: Callable[[str], Clients]
) -> Iterator[Callable[[str], Broker]]:
    """The broker of that name. Each test has its own topics and groups, and on memory a cluster of its own."""
    with ExitStack() as closing:

        def make(name: str) -> Broker:
            if name == "memory":
                made = _memory()
            else:
                server = request.getfixturevalue(name)
                made = _kafka(name, server, kafka_clients(server.bootstrap_servers))
            closing.callback(made.close)
            return made

        yield make


_EMBEDDED = pytest.param("embedded", marks=pytest.mark.embedded)
_APACHE = pytest.param("apache", marks=pytest.mark.apache)


@pytest.fixture(params=["memory", _EMBEDDED, _APACHE])
def broker(request: pytest.FixtureRequest, broker_named: Callable[[str], Broker]) -> Broker:
    """Each of the three."""
    return broker_named(request.param)


@pytest.fixture(params=["memory", _APACHE])
def exact_broker(request: pytest.FixtureRequest, broker_named: Callable[[str], Broker]) -> Broker:
    """Those that do all that Kafka does.

    The embedded one does not (KAFKA.md section 1): its transactions are not isolated, their offsets are never applied,
    nobody is fenced, nothing times out; records cannot be deleted, topics not be created by clients; a member that does
    not poll is thrown out by its own client only.
    """
    return broker_named(request.param)
