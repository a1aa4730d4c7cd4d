"""ConfluentReader: reads topics without a group. read_partitions(): all that is in some partitions."""

import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from kser.confluent.admin import ConfluentAdmin
from kser.confluent.aside import Aside
from kser.confluent.config import new_client, reader_config
from kser.confluent.errors import is_fatal, kafka_errors, translate, unanswered
from kser.confluent.logs import ClientState, logger
from kser.errors import ConfigurationError, Error, TransportError
from kser.transport import Partition, Record

__all__ = ["ConfluentReader", "read_partitions"]

#: Seconds between two looks for a topic that does not exist yet, and for partitions added to one that does.
_MISSING_EVERY_S: Final = 0.5
_GROWN_EVERY_S: Final = 5.0
#: Longest wait for the brokers when a reader is made, and when a running one looks for topics.
_OPEN_S: Final = 10.0
_LOOK_S: Final = 2.0
_CLOSE_S: Final = 5.0
#: Seconds between two tries of a question that a broker cannot answer yet.
_AGAIN_S: Final = 0.05
#: Records of one batch of read_partitions(), and the longest wait for the first of it, in seconds.
_BATCH: Final = 5000
_SLICE_S: Final = 0.2
#: An end behind markers and aborted records is told by a fetch that finds nothing, after this time.
_SHORT_READ: Final = {"fetch.wait.max.ms": 10}


class _Onlooker:
    """A client outside any group, and what it reads. One thread owns it.

    Args:
        user: librdkafka properties that went through checked().
        more: properties over those of a reader.
    """

    def __init__(self, user: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
        self._state = ClientState("reader", str(user["bootstrap.servers"]))
        # Never joined and never committed under, so that it leaves nothing behind.
        group = f"kser-reader-{uuid.uuid4()}"
        config = reader_config(user, group) | dict(more or {})
        self._consumer: Consumer | None = new_client(Consumer, config, self._state)
        #: The next offset to give of each partition; negative is librdkafka's mark of the beginning.
        self._next: dict[tuple[str, int], int] = {}
        #: What at_end() still waits for: partitions, and the end each had when this was made.
        self._ends: dict[tuple[str, int], int] = {}

    def at_end(self) -> bool:
        """See Reader."""
        return not self._ends

    def close(self) -> None:
        """See Reader."""
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        try:
            Aside().call(consumer.close, _CLOSE_S)
        except TimeoutError:
            logger.warning("A reader did not end within %g s and is left behind", _CLOSE_S)
        except (KafkaException, RuntimeError) as exc:
            logger.warning("Closing a reader: %s", exc)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _fetch(self, wait_s: float, max_records: int) -> list[Record]:
        """What comes within ``wait_s``; [] also when it was only news, such as the end of a partition."""
        consumer = self._client()
        with kafka_errors("Reading"):
            first = consumer.poll(wait_s)
            messages = [first] if first is not None else []
            if messages and max_records > 1:
                messages += consumer.consume(max_records - 1, 0)
        return self._records(messages)

    def _add(self, starts: Mapping[tuple[str, int], int]) -> None:
        if starts:
            with kafka_errors("Starting to read"):
                self._client().incremental_assign([TopicPartition(*key, offset=at) for key, at in starts.items()])
            self._next.update(starts)

    def _records(self, messages: Sequence[Message]) -> list[Record]:
        records: list[Record] = []
        for m in messages:
            topic, partition, offset = m.topic() or "", _number(m), m.offset() or 0
            key = (topic, partition)
            if (error := m.error()) is not None:
                self._on_error(key, offset, error)
                continue
            if key not in self._next:
                continue  # of a topic that went
            self._reached(key, offset + 1)
            records.append(Record(topic, partition, offset, m.key(), m.value(), m.headers() or (), m.timestamp()[1]))  # type: ignore[arg-type]
        if records:
            self._state.up()
        return records

    def _reached(self, key: tuple[str, int], position: int) -> None:
        self._next[key] = position
        if position >= self._ends.get(key, position + 1):
            del self._ends[key]

    def _on_error(self, key: tuple[str, int], offset: int, error: KafkaError) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            # Behind the last record there may be markers of transactions, aborted records and gaps of compaction: only
            # this tells that they were passed.
            self._reached(key, max(offset, self._next.get(key, offset)))
        elif code in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC):
            self._unknown()
        else:
            failure: Error = translate(error, f"Reading {key[0]}[{key[1]}]" if key[0] else "Reading")
            if is_fatal(error) or isinstance(failure, ConfigurationError):
                raise failure
            self._state.quiet.log(logging.WARNING, "%s [%s] %s", error.name(), "reader", failure.message)

    def _unknown(self) -> None:
        """A broker does not know one of the topics or partitions: it may, in a moment."""

    def _client(self) -> Consumer:
        if self._consumer is None:
            raise TransportError("The reader is closed: make a new one")
        return self._consumer


class ConfluentReader(_Onlooker):
    """Reads topics to their ends and on. Implements kser.transport.Reader. One thread owns it.

    Args:
        user: librdkafka properties that went through checked().
        admin: of the same brokers.
        topics: what to read; those that do not exist yet are waited for.
        start: "beginning", or "end" for only what is written after this call returned.

    Raises TransportError when no broker answers within 10 s.
    """

    def __init__(
        self,
        user: Mapping[str, Any],
        admin: ConfluentAdmin,
        topics: Sequence[str],
        start: Literal["beginning", "end"] = "beginning",
    ) -> None:
        if isinstance(topics, str) or start not in ("beginning", "end"):
            raise ConfigurationError(f"topics={topics!r}, start={start!r}: give a list, and beginning or end")
        super().__init__(user)
        self._admin = admin
        #: Topics and the number of partitions read of each, 0 while it does not exist.
        self._topics = dict.fromkeys(topics, 0)
        #: Topics that were not there at the last look: a broker may not know one for a moment.
        self._doubted: set[str] = set()
        self._look_again_at = 0.0
        try:
            self._open(start)
        except BaseException:
            self.close()
            raise

    def poll(self, timeout_s: float, max_records: int = 500) -> list[Record]:
        """See Reader. ConfigurationError when the brokers refuse this client."""
        end = time.monotonic() + timeout_s
        while True:
            if time.monotonic() >= self._look_again_at:
                self._look(min(_LOOK_S, max(end - time.monotonic(), 0.1)))
            left = min(max(end - time.monotonic(), 0), max(self._look_again_at - time.monotonic(), 0))
            records = self._fetch(left, max_records)
            if records or time.monotonic() >= end:
                return records
            if (refusal := self._state.refusal) is not None:
                raise refusal

    # -- inside --------------------------------------------------------------------------------------------------------

    def _open(self, start: Literal["beginning", "end"]) -> None:
        limit = time.monotonic() + _OPEN_S
        starts: dict[tuple[str, int], int] = {}
        for topic in self._topics:
            self._topics[topic] = self._admin.partitions_of(topic, _left(limit))
            for number in range(self._topics[topic]):
                low, high = self._watermarks(topic, number, _left(limit))
                starts[topic, number] = low if start == "beginning" else high
                if start == "beginning" and low < high:
                    self._ends[topic, number] = high
        self._add(starts)
        self._look_again_at = time.monotonic() + self._pause_s()

    def _look(self, timeout_s: float) -> None:
        """Take up what has come since: topics that did not exist, partitions that were added; leave what went."""
        end = time.monotonic() + timeout_s
        gone: list[str] = []
        new: dict[tuple[str, int], int] = {}
        for topic, known in self._topics.items():
            try:
                count = self._admin.partitions_of(topic, _left(end))
            except TransportError as exc:
                self._state.quiet.log(logging.INFO, "%s [%s] %s", "LOOK", "reader", exc.message)
                break
            if count > known:
                new |= dict.fromkeys(((topic, number) for number in range(known, count)), OFFSET_BEGINNING)
                self._topics[topic] = count
            if count or not known:
                self._doubted.discard(topic)
            elif topic in self._doubted:
                gone.append(topic)
            else:
                self._doubted.add(topic)
        for topic in gone:
            self._forget(topic)
        self._add(new)
        self._look_again_at = time.monotonic() + self._pause_s()

    def _pause_s(self) -> float:
        return _GROWN_EVERY_S if all(self._topics.values()) and not self._doubted else _MISSING_EVERY_S

    def _unknown(self) -> None:
        self._look_again_at = min(self._look_again_at, time.monotonic() + _MISSING_EVERY_S)

    def _forget(self, topic: str) -> None:
        """A topic was deleted: should it come again, it is another one and read from its start."""
        gone = [key for key in self._next if key[0] == topic]
        if gone:
            with kafka_errors(f"Leaving topic {topic}"):
                self._client().incremental_unassign([TopicPartition(*key) for key in gone])
        for key in gone:
            del self._next[key]
            self._ends.pop(key, None)
        self._topics[topic] = 0
        self._doubted.discard(topic)

    def _watermarks(self, topic: str, partition: int, timeout_s: float) -> tuple[int, int]:
        doing = f"Looking for the end of {topic}[{partition}]"
        end = time.monotonic() + timeout_s
        while True:
            try:
                with kafka_errors(doing):
                    found = self._client().get_watermark_offsets(TopicPartition(topic, partition), timeout=_left(end))
            except TransportError as exc:
                # A partition that was made a moment ago has no leader yet that every broker knows of.
                if not exc.retriable or time.monotonic() >= end:
                    raise
                time.sleep(_AGAIN_S)
                continue
            if found is None:
                raise unanswered(doing, timeout_s)
            return found


def read_partitions(
    user: Mapping[str, Any],
    admin: ConfluentAdmin,
    partitions: Sequence[Partition],
    timeout_s: float,
    starts: Mapping[Partition, int],
) -> Iterator[list[Record]]:
    """All that is in these partitions, in batches: see kser.transport.Transport.read().

    The end is the high watermark, not the last stable offset that a read_committed client is told: behind that one
    there may be committed records, of transactions whose markers are on their way or that came behind an open one. The
    client gets past it when the last of them is decided. Source: Kafka Streams restores state stores in the same way.
    """
    limit = time.monotonic() + timeout_s
    bounds = {
        (of.topic, of.partition): (max(low, starts.get(of, low)), high)
        for of, (low, high) in admin.bounds(partitions, timeout_s).items()
    }
    ends = {key: end for key, (start, end) in bounds.items() if start < end}
    if not ends:
        return
    reader = _Onlooker(user, _SHORT_READ)
    try:
        reader._ends |= ends
        # Offsets and not the mark of the beginning: a new client takes half a second to find out what that is.
        reader._add({key: bounds[key][0] for key in ends})
        while not reader.at_end():
            if time.monotonic() >= limit:
                raise _unread(reader, timeout_s)
            records = reader._fetch(min(_left(limit), _SLICE_S), _BATCH)
            if wanted := [record for record in records if record.offset < ends[record.of]]:
                yield wanted
    finally:
        reader.close()


def _unread(reader: _Onlooker, timeout_s: float) -> Error:
    if (refusal := reader._state.refusal) is not None:
        return refusal
    where = ", ".join(f"{topic}/{n} at {reader._next[topic, n]} of {end}" for (topic, n), end in reader._ends.items())
    return TransportError(
        f"Not read to the end within {timeout_s:g} s, because a transaction is open there or the broker is away: "
        f"{where}. Try again",
        retriable=True,
    )


def _left(end: float) -> float:
    return max(end - time.monotonic(), 0.1)


def _number(message: Message) -> int:
    partition = message.partition()
    return -1 if partition is None else partition
