"""The judge's own view of the topics: what is committed, read with confluent-kafka and none of the code under test."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    OffsetSpec,
    ResourceType,
)

from tests.chaos.judge import EVENT, MESSAGE, Committed, Facts, Observed

__all__ = ["Observer", "Tail", "committed", "group_state", "partitions_of", "read_all", "set_session", "wait_stable"]

ANSWER_S = 10.0
#: An Observer looks so often, and waits so long for an answer, in seconds.
OBSERVE_S = 0.1
LOOK_S = 2.0


class Seen(NamedTuple):
    """One record."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class Tail:
    """Reads the task topic and the events topic of a group from their beginning and on, under read_committed.

    Thread rule: belongs to one thread.
    """

    def __init__(self, bootstrap: str, topic: str, events: str, facts: Facts) -> None:
        self._take: dict[str, Callable[[Seen], None]] = {topic: facts.message, events: facts.event}
        self._consumer = Consumer(_reader(bootstrap))
        self._partitions: list[TopicPartition] = []
        for name in self._take:
            count = partitions_of(self._consumer, name)
            self._partitions += [TopicPartition(name, number, OFFSET_BEGINNING) for number in range(count)]
        self._consumer.assign(self._partitions)

    def read(self, wait_s: float) -> int:
        """Take in what has come; how many records."""
        count = 0
        for message in self._consumer.consume(1000, wait_s):
            if message.error() is None:
                seen = Seen(message.partition(), message.offset(), message.key(), message.value())
                self._take[str(message.topic())](seen)
                count += 1
            elif message.error().fatal():
                raise KafkaException(message.error())
        return count

    def read_to_end(self, within_s: float) -> None:
        """Take in all that is there now. Raises AssertionError when that takes too long."""
        ends = {(p.topic, p.partition): high_watermark(self._consumer, p) for p in self._partitions}
        until = time.monotonic() + within_s
        while any(end > 0 and self._position(*of) < end for of, end in ends.items()):
            if time.monotonic() > until:
                raise AssertionError(f"the topics could not be read to their ends within {within_s} s")
            self.read(0.2)

    def _position(self, topic: str, partition: int) -> int:
        return int(self._consumer.position([TopicPartition(topic, partition)])[0].offset)

    def close(self) -> None:
        """Let go of the brokers."""
        self._consumer.close()


class Observer:
    """Notes again and again what a group has committed, and where the topics end then, in a thread of its own.

    The ends are asked for after the offsets, and are those under read_uncommitted: a transaction is ended partition by
    partition, so its offsets may be there a little earlier than one can read what was written with them.
    """

    def __init__(self, bootstrap: str, group: str, topic: str, events: str) -> None:
        #: From first to last, without those in which nothing had changed.
        self.seen: list[Observed] = []
        self._bootstrap = bootstrap
        self._group = group
        self._kinds = {topic: MESSAGE, events: EVENT}
        self._topic = topic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="chaos-observer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Note no more. A second call does nothing."""
        self._stop.set()
        self._thread.join(120)

    def _work(self) -> None:
        settings = {"group.id": self._group, "isolation.level": "read_uncommitted"}
        consumer = Consumer(_reader(self._bootstrap) | settings)
        try:
            partitions: list[TopicPartition] = []
            while not self._stop.wait(OBSERVE_S):
                with contextlib.suppress(KafkaException):  # a broker was killed; at another moment, then
                    partitions = partitions or self._partitions(consumer)
                    self._note(consumer, partitions)
        finally:
            consumer.close()

    def _partitions(self, consumer: Consumer) -> list[TopicPartition]:
        """Of both topics; [] as long as one of them is not there."""
        counts = {name: len(consumer.list_topics(name, timeout=LOOK_S).topics[name].partitions) for name in self._kinds}
        if not all(counts.values()):
            return []
        return [TopicPartition(name, number) for name, count in counts.items() for number in range(count)]

    def _note(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        found = consumer.committed([p for p in partitions if p.topic == self._topic], timeout=LOOK_S)
        positions = [Committed(p.partition, p.offset, p.metadata or "") for p in found if not p.error and p.offset >= 0]
        if not positions or (self.seen and self.seen[-1].positions == positions):
            return
        ends = {
            (self._kinds[p.topic], p.partition): int(consumer.get_watermark_offsets(p, timeout=LOOK_S)[1])
            for p in partitions
        }
        self.seen.append(Observed(positions, ends))


def read_all(bootstrap: str, topic: str, events: str, within_s: float = 120) -> Facts:
    """All that is in both topics now, as a reader sees it that starts now."""
    facts = Facts()
    tail = Tail(bootstrap, topic, events, facts)
    try:
        tail.read_to_end(within_s)
    finally:
        tail.close()
    return facts


def committed(bootstrap: str, group: str, topic: str) -> list[Committed]:
    """What the group has committed of the topic."""
    consumer = Consumer(_reader(bootstrap) | {"group.id": group})
    try:
        wanted = [TopicPartition(topic, number) for number in range(partitions_of(consumer, topic))]
        found = asked(lambda: consumer.committed(wanted, timeout=ANSWER_S))
        for position in found:
            if position.error:
                raise KafkaException(position.error)
        return [Committed(p.partition, p.offset if p.offset >= 0 else -1, p.metadata or "") for p in found]
    finally:
        consumer.close()


def group_state(admin: AdminClient, group: str) -> list[str]:
    """Who is in the group and has which partitions, for people who look for what went wrong."""
    try:
        described = admin.describe_consumer_groups([group], request_timeout=ANSWER_S)[group].result(ANSWER_S)
    except KafkaException as error:
        return [f"group {group} cannot be described: {error}"]
    lines = [f"group {group} is {described.state}"]
    for member in described.members:
        line = f"member {member.member_id} ({member.group_instance_id or 'no name'}) has partitions"
        line += f" {sorted(p.partition for p in member.assignment.topic_partitions)}"
        if member.target_assignment is not None:  # KIP-848: others may have to let go of them first, or it of some
            line += f", is to have {sorted(p.partition for p in member.target_assignment.topic_partitions)}"
        lines.append(line)
    return lines


def wait_stable(admin: AdminClient, topics: dict[str, int], within_s: float) -> list[str]:
    """Wait until no transaction is open in these topics (name to partitions); what is still open after ``within_s``."""
    wanted = [TopicPartition(name, number) for name, count in topics.items() for number in range(count)]
    until = time.monotonic() + within_s
    while True:
        stable, high = (
            _ends(admin, wanted, level) for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
        )
        held = [
            f"{name}/{number}: open from {stable[name, number]}"
            for name, number in high
            if stable[name, number] < high[name, number]
        ]
        if not held or time.monotonic() > until:
            return held
        time.sleep(0.2)


def set_session(admin: AdminClient, group: str, session_s: float) -> None:
    """Set the session timeout of a group with KIP-848, where no member chooses it."""
    settings = {"consumer.session.timeout.ms": session_s * 1000, "consumer.heartbeat.interval.ms": session_s * 1000 / 6}
    entries = [
        ConfigEntry(name, str(round(value)), incremental_operation=AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.GROUP, group, incremental_configs=entries)
    asked(lambda: admin.incremental_alter_configs([resource])[resource].result(ANSWER_S))


def partitions_of(client: Any, topic: str) -> int:
    """How many partitions a topic has; waits until it is there."""

    def found() -> int:
        topics = client.list_topics(topic, timeout=ANSWER_S).topics
        if not topics[topic].partitions:
            raise KafkaException(topics[topic].error)
        return len(topics[topic].partitions)

    return int(asked(found))


def high_watermark(consumer: Consumer, partition: TopicPartition) -> int:
    """The offset after the last record that is committed (the last stable offset, under read_committed)."""
    return int(asked(lambda: consumer.get_watermark_offsets(partition, timeout=ANSWER_S))[1])


def asked(question: Callable[[], Any], within_s: float = 60) -> Any:
    """The answer, asked for again while brokers cannot give one: one may have been killed a moment ago."""
    until = time.monotonic() + within_s
    while True:
        with contextlib.suppress(KafkaException):
            return question()
        if time.monotonic() > until:
            return question()
        time.sleep(0.2)


def _ends(admin: AdminClient, wanted: list[TopicPartition], level: IsolationLevel) -> dict[tuple[str, int], int]:
    def ask() -> dict[tuple[str, int], int]:
        answers = admin.list_offsets(
            {partition: OffsetSpec.latest() for partition in wanted}, isolation_level=level, request_timeout=ANSWER_S
        )
        return {(p.topic, p.partition): answer.result(ANSWER_S).offset for p, answer in answers.items()}

    found: dict[tuple[str, int], int] = asked(ask)
    return found


def _reader(bootstrap: str) -> dict[str, Any]:
    return {
        "bootstrap.servers": bootstrap,
        "group.id": f"chaos-{uuid.uuid4()}",
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "error",
        "fetch.wait.max.ms": 100,
        "log_level": 0,
    }
