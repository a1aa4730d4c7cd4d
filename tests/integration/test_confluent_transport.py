"""kser.confluent where brokers and members fail, and what only Kafka does. Tests of all transports: tests/contract."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
from confluent_kafka import KafkaError, TopicPartition
from confluent_kafka.admin import NewPartitions

from kser.confluent.embedded import EmbeddedBroker
from kser.confluent.transport import ConfluentTransport
from kser.errors import (
    ConfigurationError,
    DeliveryError,
    Error,
    GroupError,
    MessageTooLargeError,
    OffsetLostError,
    TransportError,
)
from kser.testing import eventually
from kser.transport import OutRecord, Partition, Position, Record, Source, TopicSpec, Transport
from tests.apache_kafka import free_ports
from tests.brokers import make_topic, unique
from tests.processes import environment

#: Ways in which a group may share its partitions out, with times as short as the test brokers allow.
GROUPS = {
    "cooperative": {"session.timeout.ms": 2000, "heartbeat.interval.ms": 300},
    "eager": {"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "partition.assignment.strategy": "range"},
    "kip848": {"group.protocol": "consumer"},
}


class Listener:
    """Notes what it is told."""

    def __init__(self, assigned: Callable[[Sequence[Partition]], object] = lambda _: None) -> None:
        self.told: list[tuple[str, list[Partition]]] = []
        self._assigned = assigned

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self.told.append(("assign", sorted(partitions)))
        self._assigned(partitions)

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self.told.append(("revoke", sorted(partitions)))

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        self.told.append(("lost", sorted(partitions)))


#: What is handed over before a flush goes out in one request, however slow the machine is. The embedded broker takes
#: the request behind one that it refused, as no Kafka does: it does not check the sequence numbers of producers without
#: a transactional id (rd_kafka_mock_validate_records in librdkafka's rdkafka_mock.c). Its client concludes then that
#: the refused one was stored ("implicitly acked by subsequent batch success"), or leaves the second one in its place.
ONE_REQUEST = {"linger.ms": 10_000}
#: Each record goes out in a request of its own, at once.
REQUEST_EACH = {"linger.ms": 0, "batch.num.messages": 1}


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is to be closed at the end of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, to be broken."""
    with EmbeddedBroker({"t": 1}) as one:
        yield one


def connect(server, **properties) -> ConfluentTransport:
    return ConfluentTransport({"bootstrap.servers": server.bootstrap_servers, **properties})


def joined(opened: ExitStack, transport: Transport, group: str, topic: str, listener: Listener | None = None) -> Source:
    """A source that has partitions, of a topic in which there is nothing for it yet."""
    source = subscribed(opened, transport, group, topic, listener)
    eventually(lambda: source.poll(0.05) == [] and source.assignment(), 30, "assigned")
    return source


def subscribed(
    opened: ExitStack, transport: Transport, group: str, topic: str, listener: Listener | None = None
) -> Source:
    source = transport.source(group)
    opened.callback(source.close)
    source.subscribe([topic], listener or Listener())
    return source


def send(transport: Transport, topic: str, *values: bytes, partition: int = 0) -> None:
    sink, problems = transport.sink(), []
    for value in values:
        sink.produce(OutRecord(topic, b"k", value, partition=partition), problems.append)
    assert sink.flush(20) == 0
    assert problems == [None] * len(values)
    sink.close()


def take(source, count: int, seconds: float = 20) -> list[bytes | None]:
    """The values of the next ``count`` records, and no more come for a moment."""
    found: list[Record] = []
    eventually(lambda: found.extend(source.poll(0.05)) or len(found) >= count, seconds, f"{count} records")
    assert len(found) == count
    return [record.value for record in found]


def everything(transport: Transport, *topics: str) -> list[bytes | None]:
    reader = transport.reader(topics)
    found: list[Record] = []
    eventually(lambda: found.extend(reader.poll(0.05)) or reader.at_end(), 20, "read to the end")
    reader.close()
    return [record.value for record in found]


# -- nobody there ------------------------------------------------------------------------------------------------------


def test_without_a_broker_a_sink_is_made_and_what_it_could_not_send_is_given_up_in_time(caplog):
    """And three seconds of a dead broker are a few lines in the log."""
    transport = ConfluentTransport({"bootstrap.servers": f"127.0.0.1:{free_ports(1, None)[0]}"})
    sink, told = transport.sink(), []
    started = time.monotonic()
    sink.produce(OutRecord("t", b"k", b"v"), told.append)
    sink.produce(OutRecord("t", b"k", b"without callback"))
    assert sink.flush(3) == 2
    sink.drop_queued()
    assert time.monotonic() - started < 5
    (error,) = told
    assert isinstance(error, DeliveryError)
    assert error.retriable
    assert sink.failed == 1
    assert sink.flush(0) == 0
    sink.close(1)
    assert time.monotonic() - started < 6
    assert 1 <= len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 4


def test_without_a_broker_questions_end_in_time_and_name_the_address():
    address = f"127.0.0.1:{free_ports(1, None)[0]}"
    transport = ConfluentTransport({"bootstrap.servers": address})
    for ask in (transport.admin().cluster_id, lambda s: transport.admin().describe(["t"], s)):
        started = time.monotonic()
        with pytest.raises(TransportError, match=address) as caught:
            ask(0.5)
        assert caught.value.retriable
        assert time.monotonic() - started < 2


def test_without_a_broker_a_source_waits_and_leaves_in_time():
    source = ConfluentTransport({"bootstrap.servers": f"127.0.0.1:{free_ports(1, None)[0]}"}).source("g")
    source.subscribe(["t"], Listener())
    assert source.poll(0.5) == []
    assert source.assignment() == []
    assert not source.joined
    assert not source.member().joined
    started = time.monotonic()
    source.close(2)
    assert time.monotonic() - started < 3


# -- a broker that goes and comes --------------------------------------------------------------------------------------


def test_what_is_written_during_an_outage_arrives_once_after_it(broker: EmbeddedBroker, opened: ExitStack):
    transport = connect(broker)
    sink, told = transport.sink(), []
    opened.callback(sink.close)
    for n in range(10):
        sink.produce(OutRecord("t", b"k", b"%d" % n), told.append)
    assert sink.flush(20) == 0
    broker.broker_down(1)
    for n in range(10, 20):
        sink.produce(OutRecord("t", b"k", b"%d" % n), told.append)
    assert sink.flush(0.5) == 10
    broker.broker_up(1)
    assert sink.flush(20) == 0
    assert told == [None] * 20
    assert everything(transport, "t") == [b"%d" % n for n in range(20)]


def test_a_commit_without_an_answer_ends_in_time_and_the_source_goes_on_afterwards(broker, opened: ExitStack):
    """The client's own commit would wait for ever, and no signal would end it."""
    transport = connect(broker)
    source = joined(opened, transport, "g", "t")
    broker.broker_down(1)
    for _ in range(2):  # the second one waits for the first
        started = time.monotonic()
        with pytest.raises(TransportError) as caught:
            source.commit([Position("t", 0, 1)], 0.5)
        assert caught.value.retriable
        assert time.monotonic() - started < 2
        assert source.commit_overdue
    with pytest.raises(TransportError) as caught:
        source.committed([Partition("t", 0)], 0.5)
    assert caught.value.retriable
    assert source.poll(0.2) == []
    broker.broker_up(1)
    send(transport, "t", b"0", b"1", b"2")

    def committed() -> bool:
        """The group may have put the member out meanwhile; it comes again."""
        source.poll(0.05)
        if not source.assignment():
            return False
        try:
            source.commit([Position("t", 0, 2, "after")], 5)
        except TransportError:
            return False
        return True

    eventually(committed, 30, "committed again")
    assert not source.commit_overdue
    source.close()
    assert take(subscribed(opened, transport, "g", "t"), 1) == [b"2"]


def test_closing_during_an_outage_ends_in_time(broker: EmbeddedBroker, opened: ExitStack):
    transport = connect(broker)
    source, sink = joined(opened, transport, "g", "t"), transport.sink()
    reader = transport.reader(["t"])
    broker.broker_down(1)
    sink.produce(OutRecord("t", b"k", b"v"))
    with pytest.raises(TransportError):
        source.commit([Position("t", 0, 1)], 0.2)
    started = time.monotonic()
    source.close(1)
    sink.close(1)
    reader.close()
    assert time.monotonic() - started < 5


def test_a_transaction_during_an_outage_ends_by_its_own_timeout_and_can_be_aborted(broker, opened: ExitStack):
    sink = connect(broker, **{"transaction.timeout.ms": 1000}).sink(unique("tx"))
    opened.callback(sink.close)
    sink.begin()
    broker.broker_down(1)
    sink.produce(OutRecord("t", b"k", b"v"))
    started = time.monotonic()
    with pytest.raises(TransportError) as caught:
        sink.commit()
    assert time.monotonic() - started < 5
    assert caught.value.extra["abort"]
    assert "timed out" in caught.value.message
    broker.broker_up(1)
    sink.abort(20)

    def transaction() -> bool:
        """The client needs a moment to connect again, which may be longer than this short timeout."""
        sink.begin()
        sink.produce(OutRecord("t", b"k", b"v"))
        try:
            sink.commit()
        except TransportError:
            sink.abort()
            return False
        return True

    eventually(transaction, 20, "committed")


@pytest.mark.parametrize("code", ["OUT_OF_ORDER_SEQUENCE_NUMBER", "INVALID_PRODUCER_EPOCH", "UNKNOWN_PRODUCER_ID"])
def test_a_producer_that_lost_its_place_is_renewed_and_the_record_may_be_sent_again(broker, opened: ExitStack, code):
    sink = connect(broker).sink()
    opened.callback(sink.close)

    def confirmed(value: bytes) -> Error | None:
        told: list[Error | None] = []
        sink.produce(OutRecord("t", b"k", value), told.append)
        eventually(lambda: sink.poll(0.05) and told, 20, "told")
        return told[0]

    assert confirmed(b"0") is None
    broker.fail_next("Produce", getattr(KafkaError, code))
    problem = confirmed(b"1")
    assert problem is None or (isinstance(problem, TransportError) and problem.retriable)
    assert confirmed(b"2") is None


@pytest.mark.parametrize("how", ["produce", "produce_at"])
def test_flush_tells_every_callback_of_what_a_fatal_error_took_along(broker, opened: ExitStack, how: str):
    """confluent-kafka leaves an exception behind that would come out of the first callback, or of flush() itself."""
    sink = connect(broker, **ONE_REQUEST).sink()
    told: dict[int, Error | None] = {}
    opened.callback(sink.close)

    def write(n: int) -> None:
        if how == "produce":
            sink.produce(OutRecord("t", b"k", b"%d" % n), lambda error: told.update({n: error}))
        else:
            sink.produce_at("t", b"k", b"%d" % n, lambda index, error: told.update({index: error}), n)

    write(0)
    assert sink.flush(20) == 0
    broker.fail_next("Produce", KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER)
    for n in range(1, 6):
        write(n)
    eventually(lambda: sink.flush(0.5) == 0, 20)
    assert told.pop(0) is None
    assert sorted(told) == [1, 2, 3, 4, 5]
    assert all(isinstance(error, TransportError) and error.retriable for error in told.values())
    assert sink.deliver([OutRecord("t", b"k", b"after")], 20) == []


# -- delivering many ---------------------------------------------------------------------------------------------------


def batch(topic: str, *values: bytes) -> list[OutRecord]:
    return [OutRecord(topic, b"k", value) for value in values]


def test_deliver_during_an_outage_gives_all_up_in_time_and_none_of_them_arrives_later(broker, opened: ExitStack):
    transport = connect(broker)
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    assert sink.deliver(batch("t", b"before")) == []
    broker.broker_down(1)
    started = time.monotonic()
    failures = sink.deliver(batch("t", b"0", b"1"), 1)
    assert time.monotonic() - started < 3
    assert [index for index, _ in failures] == [0, 1]
    assert all(isinstance(error, DeliveryError) and error.retriable for _, error in failures)
    assert sink.flush(0) == 0
    broker.broker_up(1)
    assert sink.deliver(batch("t", b"after"), 20) == []
    assert everything(transport, "t") == [b"before", b"after"]


def test_deliver_gives_up_what_the_broker_does_not_answer_and_the_next_one_is_not_held_up(broker, opened: ExitStack):
    transport = connect(broker)
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    assert sink.deliver(batch("t", b"before")) == []
    broker.rtt(1, 4000)
    started = time.monotonic()
    failures = sink.deliver(batch("t", b"lost"), 0.5)
    assert time.monotonic() - started < 3
    assert [(index, type(error)) for index, error in failures] == [(0, DeliveryError)]
    assert "may have been stored" in failures[0][1].message
    broker.rtt(1, 0)
    assert sink.deliver(batch("t", b"after"), 20) == []
    found = everything(transport, "t")
    assert (found[0], found[-1]) == (b"before", b"after")
    assert set(found) <= {b"before", b"lost", b"after"}


def test_deliver_without_a_broker_gives_all_up_in_time(opened: ExitStack):
    sink = ConfluentTransport({"bootstrap.servers": f"127.0.0.1:{free_ports(1, None)[0]}"}).sink(failures_only=True)
    opened.callback(lambda: sink.close(1))
    started = time.monotonic()
    failures = sink.deliver(batch("t", *(b"%d" % n for n in range(100))), 1)
    assert time.monotonic() - started < 3
    assert [(index, type(error)) for index, error in failures] == [(n, DeliveryError) for n in range(100)]


def test_a_client_that_the_broker_refuses_is_told_why_by_deliver_long_before_its_timeout(apache, opened: ExitStack):
    credentials = {"sasl.mechanism": "PLAIN", "sasl.username": "kser", "sasl.password": "hunter2"}
    sink = connect(apache, **{"security.protocol": "sasl_plaintext", **credentials}).sink(failures_only=True)
    opened.callback(lambda: sink.close(1))
    started = time.monotonic()
    ((index, error),) = sink.deliver(batch("t", b"v"), 30)
    assert time.monotonic() - started < 10
    assert index == 0
    assert isinstance(error, ConfigurationError)
    assert "check sasl.mechanism" in error.message
    assert "hunter2" not in error.message


@pytest.mark.parametrize("how", ["deliver", "produce"])
def test_a_refused_client_is_told_why_for_all_its_records_and_again_for_those_after(embedded, opened: ExitStack, how):
    """The embedded broker knows no SASL. What was given up for that must not be handed over again, for ever."""
    credentials = {"sasl.mechanism": "PLAIN", "sasl.username": "kser", "sasl.password": "hunter2"}
    sink = connect(embedded, **{"security.protocol": "sasl_plaintext", **credentials}).sink()
    opened.callback(lambda: sink.close(1))
    for _ in range(2):
        started = time.monotonic()
        told: dict[int, Error | None] = {}
        records = batch("t", *(b"%d" % n for n in range(100)))
        if how == "deliver":
            told.update(sink.deliver(records, 30))
        else:
            for n, record in enumerate(records):
                sink.produce(record, lambda error, n=n, told=told: told.update({n: error}))
            eventually(lambda: sink.flush(0.5) == 0, 30)
        assert time.monotonic() - started < 10
        assert sorted(told) == list(range(100))
        assert all(isinstance(error, ConfigurationError) for error in told.values())


@pytest.mark.parametrize("how", ["deliver", "produce_all"])
def test_more_records_than_the_buffer_holds_are_written_as_room_comes(embedded, opened: ExitStack, how: str):
    transport, topic = connect(embedded, **{"queue.buffering.max.messages": 50}), make_topic(embedded, 1)
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    sent = [b"%d" % n for n in range(1000)]
    assert not getattr(sink, how)(batch(topic, *sent))
    assert sink.flush(20) == 0
    assert everything(transport, topic) == sent


def test_what_found_no_room_in_time_was_given_up_too(broker, opened: ExitStack):
    transport = connect(broker, **{"queue.buffering.max.messages": 50})
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    assert sink.deliver(batch("t", b"before")) == []
    broker.broker_down(1)
    failures = sink.deliver(batch("t", *(b"%d" % n for n in range(80))), 1)
    assert [index for index, _ in failures] == list(range(80))
    assert all(isinstance(error, DeliveryError) for _, error in failures)
    broker.broker_up(1)
    assert sink.deliver(batch("t", b"after"), 20) == []
    assert everything(transport, "t") == [b"before", b"after"]


@pytest.mark.parametrize("code", ["OUT_OF_ORDER_SEQUENCE_NUMBER", "INVALID_PRODUCER_EPOCH", "UNKNOWN_PRODUCER_ID"])
@pytest.mark.parametrize("failures_only", [True, False])
def test_deliver_outlives_a_producer_that_lost_its_place(broker, opened: ExitStack, code: str, failures_only: bool):
    transport = connect(broker, **ONE_REQUEST)
    sink = transport.sink(failures_only=failures_only)
    opened.callback(sink.close)
    assert sink.deliver(batch("t", b"0")) == []
    broker.fail_next("Produce", getattr(KafkaError, code))
    failures = sink.deliver(batch("t", b"1", b"2"), 20)
    assert all(isinstance(error, TransportError) and error.retriable for _, error in failures)
    assert sink.deliver([OutRecord("t", b"k", b"%d" % (index + 1)) for index, _ in failures], 20) == []
    assert sink.deliver(batch("t", b"3"), 20) == []
    found = everything(transport, "t")
    assert found == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize(
    # No UNKNOWN_PRODUCER_ID: the client repeats the first request by itself, and the embedded broker would take the
    # second one in its place; see ONE_REQUEST.
    "code",
    ["OUT_OF_ORDER_SEQUENCE_NUMBER", "INVALID_PRODUCER_EPOCH"],
)
@pytest.mark.parametrize("failures_only", [True, False])
def test_deliver_tells_of_each_refused_request_when_there_are_several(
    broker, opened: ExitStack, code: str, failures_only: bool
):
    """The client takes the second one back for another try, which never comes when the first error was fatal."""
    transport = connect(broker, **REQUEST_EACH)
    sink = transport.sink(failures_only=failures_only)
    opened.callback(sink.close)
    assert sink.deliver(batch("t", b"0")) == []
    broker.fail_next("Produce", *[getattr(KafkaError, code)] * 2)
    started = time.monotonic()
    failures = sink.deliver(batch("t", b"1", b"2"), 30)
    assert time.monotonic() - started < 10
    broker.clear_failures("Produce")  # the second may not have been on its way yet when the first was refused
    assert all(isinstance(error, TransportError) and error.retriable for _, error in failures)
    assert sink.deliver([OutRecord("t", b"k", b"%d" % (index + 1)) for index, _ in failures], 20) == []
    assert sink.deliver(batch("t", b"3"), 20) == []
    found = everything(transport, "t")
    assert (found[0], found[-1]) == (b"0", b"3")
    assert sorted(value or b"" for value in found) == [b"0", b"1", b"2", b"3"]  # the caller decides on their order


def test_of_a_client_that_breaks_while_deliver_hands_over_only_its_own_records_are_reported_failed(
    broker, opened: ExitStack
):
    """What the new client writes is stored: to report it failed would double thousands of records."""
    transport = connect(broker, **{"linger.ms": 0, "batch.num.messages": 100, "max.in.flight": 1})
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    assert sink.deliver(batch("t", b"first")) == []
    broker.fail_next("Produce", KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER)
    records = batch("t", *(b"%d" % n for n in range(10_000)))
    failures = sink.deliver(records, 20)
    assert failures
    stored = everything(transport, "t")
    failed = [records[index] for index, _ in failures]
    # Of the old client at most one request is in doubt: what came in while it broke.
    assert len({record.value for record in failed}.intersection(stored)) <= 100
    assert sink.deliver(failed, 20) == []
    assert set(everything(transport, "t")) == {b"first", *(record.value for record in records)}
    assert len(stored) == len(set(stored))


def test_a_batch_that_the_broker_refuses_for_one_record_fails_for_that_one_only(apache, opened: ExitStack):
    transport, topic = connect(apache), unique("small")
    transport.admin().create([TopicSpec(name=topic, partitions=1, config={"max.message.bytes": "10000"})])
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    ((index, error),) = sink.deliver(batch(topic, b"0", b"1", os.urandom(20_000), b"3"))
    assert index == 2
    assert isinstance(error, MessageTooLargeError)
    assert sorted(v or b"" for v in everything(transport, topic)) == [b"0", b"1", b"3"]


def test_deliver_inside_a_callback_is_refused(embedded, opened: ExitStack):
    """It would crash the client."""
    topic, sink, problems = make_topic(embedded), connect(embedded).sink(), []
    opened.callback(sink.close)

    def misuse(_: Error | None) -> None:
        try:
            sink.deliver(batch(topic, b"v"))
        except TransportError as exc:
            problems.append(exc.message)

    sink.produce(OutRecord(topic, b"k", b"v"), misuse)
    assert sink.flush(20) == 0
    assert len(problems) == 1
    assert "inside an on_delivery" in (problems[0] or "")


def test_threads_may_deliver_through_one_sink(embedded, opened: ExitStack):
    transport, topic = connect(embedded), make_topic(embedded, 1)
    sink = transport.sink(failures_only=True)
    opened.callback(sink.close)
    outcomes: list[list[tuple[int, Error]]] = []

    def work(number: int) -> None:
        for n in range(10):
            records = batch(topic, *(b"%d/%d/%d" % (number, n, m) for m in range(20)), b"x" * 2_000_000)
            outcomes.append(sink.deliver(records))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [[index for index, _ in outcome] for outcome in outcomes] == [[20]] * 40
    assert len(set(everything(transport, topic))) == 800


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_what_on_delivery_raises_is_logged_and_an_interrupt_comes_out_of_flush(embedded, opened: ExitStack, caplog):
    topic = make_topic(embedded)
    sink, told = connect(embedded).sink(), []
    opened.callback(sink.close)

    def fail(_: Error | None) -> None:
        raise ZeroDivisionError

    def interrupt(_: Error | None) -> None:
        raise KeyboardInterrupt

    sink.produce(OutRecord(topic, b"k", b"1"), fail)
    sink.produce(OutRecord(topic, b"k", b"2"), told.append)
    assert sink.flush(20) == 0
    assert told == [None]
    assert "ZeroDivisionError" in caplog.text
    sink.produce(OutRecord(topic, b"k", b"3"), interrupt)
    sink.produce(OutRecord(topic, b"k", b"4"), told.append)
    with pytest.raises(KeyboardInterrupt):
        sink.flush(20)
    assert sink.flush(20) == 0
    assert told == [None] * 2


def test_on_delivery_may_produce_and_a_full_buffer_there_is_an_error_that_passes(embedded, opened: ExitStack):
    """Serving callbacks inside a callback would crash the client."""
    topic = make_topic(embedded)
    sink = connect(embedded, **{"queue.buffering.max.messages": 10}).sink()
    opened.callback(sink.close)
    seen: list[object] = []

    def again(error: Error | None) -> None:
        seen.append(error)
        for _ in range(20):
            try:
                sink.produce(OutRecord(topic, b"k", b"again"))
            except TransportError as exc:
                seen.append(exc)
        sink.flush(5)
        sink.poll(5)

    sink.produce(OutRecord(topic, b"k", b"first"), again)
    assert sink.flush(20) == 0
    assert seen[0] is None
    assert len(seen) > 1
    assert all(isinstance(problem, TransportError) and problem.retriable for problem in seen[1:])
    for n in range(200):  # outside of callbacks produce() waits for room
        sink.produce(OutRecord(topic, b"k", b"%d" % n))
    assert sink.flush(20) == 0


def test_what_a_listener_raises_comes_out_of_poll_and_its_partitions_give_nothing(embedded, opened: ExitStack):
    topic = make_topic(embedded, 1)
    transport = connect(embedded)
    send(transport, topic, b"v")

    def fail(_: Sequence[Partition]) -> None:
        raise ZeroDivisionError("of the listener")

    source = subscribed(opened, transport, unique("g"), topic, Listener(fail))
    with pytest.raises(ZeroDivisionError, match="of the listener"):
        eventually(lambda: source.poll(0.1), 10)
    assert source.poll(0.5) == []
    assert source.assignment() == []


def test_poll_and_close_inside_a_callback_are_refused(embedded, opened: ExitStack):
    """They would crash the client."""
    topic, problems = make_topic(embedded, 1), []

    def misuse(_: Sequence[Partition]) -> None:
        for call in (lambda: source.poll(0), source.close):
            try:
                call()
            except TransportError as exc:
                problems.append(exc.message)

    source = connect(embedded).source(unique("g"))
    opened.callback(source.close)
    source.subscribe([topic], Listener(misuse))
    eventually(lambda: source.poll(0.05) or source.assignment(), 10)
    assert len(problems) == 2
    assert all("inside a callback" in problem for problem in problems)


class Meddling:
    """A Consumer whose consume() does something more, after the messages were taken out of the client."""

    def __init__(self, consumer) -> None:
        self._consumer = consumer
        self.meddle: Callable[[list], list] = lambda messages: messages

    def __getattr__(self, name: str):
        return getattr(self._consumer, name)

    def consume(self, count: int, timeout: float):
        return self.meddle(self._consumer.consume(count, timeout))


@pytest.fixture
def meddled(embedded, opened: ExitStack) -> tuple[Source, Meddling, list[bytes]]:
    """A source whose Consumer can be meddled with, and 300 values that are there for it."""
    topic = make_topic(embedded, 1)
    transport = connect(embedded)
    values = [b"%d" % n for n in range(300)]
    send(transport, topic, *values)
    source = transport.source(unique("g"))
    opened.callback(source.close)
    source._consumer = meddling = Meddling(source._consumer)
    source.subscribe([topic], Listener())
    return source, meddling, values


def test_an_interrupt_inside_poll_loses_no_record(meddled):
    source, meddling, values = meddled
    countdown = [3]

    def interrupt(messages: list) -> list:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt
        return messages

    meddling.meddle = interrupt
    found: list[bytes | None] = []

    def more() -> bool:
        try:
            found.extend(record.value for record in source.poll(0.1, 20))
        except KeyboardInterrupt:
            found.append(b"interrupted")
        return len(found) > len(values)

    eventually(more, 20)
    assert found.count(b"interrupted") == 1
    assert [value for value in found if value != b"interrupted"] == values


def test_records_that_the_client_gives_twice_within_an_assignment_are_dropped_and_counted(meddled):
    source, meddling, values = meddled
    meddling.meddle = lambda messages: messages + messages[:2]
    found: list[bytes | None] = []
    eventually(lambda: found.extend(r.value for r in source.poll(0.1, 50)) or len(found) >= len(values), 20)
    assert found == values
    assert source.came_again > 0


def test_a_batch_during_which_its_partition_came_anew_is_read_again(meddled):
    """What is in it may be of the assignment before: to take it would skip what lies below."""
    source, meddling, values = meddled
    found: list[bytes | None] = []
    eventually(lambda: found.extend(r.value for r in source.poll(0.1, 50)) or len(found) >= 100, 20)
    (partition,) = source.assignment()
    source.commit([Position(*partition, 30)])

    def reassign(messages: list) -> list:
        meddling.meddle = lambda messages: messages
        again = [TopicPartition(*partition)]
        source._on_revoke(meddling, again)
        meddling.incremental_unassign(again)
        source._on_assign(meddling, again)
        return messages

    meddling.meddle = reassign
    del found[:]
    eventually(lambda: found.extend(r.value for r in source.poll(0.1, 50)) or len(found) >= 270, 20)
    assert found == values[30:]


# -- groups ------------------------------------------------------------------------------------------------------------

MEMBER = """
import sys
from kser.confluent.transport import ConfluentTransport
from kser.transport import Position

class Listener:
    def on_assign(self, partitions): pass
    def on_revoke(self, partitions): pass
    def on_lost(self, partitions): pass

server, topic, group, properties = sys.argv[1:]
source = ConfluentTransport({"bootstrap.servers": server, **eval(properties)}).source(group)
source.subscribe([topic], Listener())
taken = 0
while True:
    taken += len(source.poll(0.1))
    if taken >= 10:
        source.commit([Position(topic, 0, 4, "of the dead")])
        print("committed", flush=True)
        taken = 0
"""


def kill_after_commit(apache, topic: str, group: str, properties: dict[str, object]) -> None:
    """A member in a process of its own takes ten records, commits behind the fourth, and is killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", MEMBER, apache.bootstrap_servers, topic, group, repr(properties)],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"committed\n"
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("kind", GROUPS)
def test_what_a_killed_member_had_not_committed_is_given_to_the_next(apache, opened: ExitStack, kind: str):
    transport = connect(apache, **GROUPS[kind])
    topic, group = make_topic(apache, 1), unique("g")
    send(transport, topic, *(b"%d" % n for n in range(10)))
    kill_after_commit(apache, topic, group, GROUPS[kind])
    heir = subscribed(opened, transport, group, topic)
    assert take(heir, 6, seconds=40) == [b"%d" % n for n in range(4, 10)]
    assert heir.committed([Partition(topic, 0)]) == [Position(topic, 0, 4, "of the dead")]


@pytest.mark.parametrize("kind", GROUPS)
def test_every_record_is_given_once_while_members_come_and_go(apache, opened: ExitStack, kind: str):
    """Each commits what it has taken when a partition is revoked, as on_revoke promises it may; in closing, too."""
    transport = connect(apache, **GROUPS[kind])
    topic, group = make_topic(apache, 4), unique("g")
    found: list[bytes | None] = []

    class Committing(Listener):
        def __init__(self) -> None:
            super().__init__()
            self.reached: dict[Partition, int] = {}
            self.source = transport.source(group)
            opened.callback(self.source.close)
            self.source.subscribe([topic], self)

        def step(self) -> None:
            for record in self.source.poll(0.02, 7):
                self.reached[record.of] = record.offset + 1
                found.append(record.value)

        def on_revoke(self, partitions: Sequence[Partition]) -> None:
            super().on_revoke(partitions)
            gone = [p for p in partitions if p in self.reached]
            self.source.commit([Position(*p, self.reached.pop(p)) for p in gone])

    sent = 0

    def send_more() -> None:
        nonlocal sent
        for partition in range(4):
            send(transport, topic, *(b"%d" % n for n in range(sent, sent + 10)), partition=partition)
            sent += 10

    members = [Committing()]
    send_more()
    eventually(lambda: members[0].step() or found, 30)
    for _ in range(2):
        members.append(Committing())
        send_more()
        wanted = 4 // len(members)
        eventually(
            lambda wanted=wanted: (
                [m.step() for m in members] and all(len(m.source.assignment()) >= wanted for m in members)
            ),
            30,
            "shared out",
        )
    members.pop(0).source.close()
    send_more()
    eventually(lambda: [m.step() for m in members] and len(found) >= sent, 30, f"{sent} records")
    assert sorted(found, key=lambda value: int(value or -1)) == [b"%d" % n for n in range(sent)]
    assert "lost" not in [what for m in members for what, _ in m.told]


def test_a_topic_that_comes_after_the_group_subscribed_is_read(apache, embedded, opened: ExitStack):
    """On the embedded broker subscribing makes it: that would not be told of one made later."""
    for server in (apache, embedded):
        transport, topic = connect(server), unique("late")
        source = subscribed(opened, transport, unique("g"), topic)
        assert source.poll(0.3) == []
        if server is apache:
            server.create_topic(topic, 1)
        send(transport, topic, b"v")
        assert take(source, 1) == [b"v"]


def test_a_new_group_that_starts_at_the_end_misses_nothing_from_then_on(apache, opened: ExitStack):
    """Not what comes while it is away before its first commit, and not what is in a partition that is added."""
    transport = connect(apache, **{"auto.offset.reset": "latest", "topic.metadata.refresh.interval.ms": 500})
    topic, group = make_topic(apache, 1), unique("g")
    send(transport, topic, b"before")
    source = joined(opened, transport, group, topic)
    assert source.poll(0.3) == []
    source.close()
    send(transport, topic, b"while away")
    source = subscribed(opened, transport, group, topic)
    assert take(source, 1) == [b"while away"]
    source.commit([Position(topic, 0, 2)])
    for future in apache.admin.create_partitions([NewPartitions(topic, 2)]).values():
        future.result(20)
    other = connect(apache)
    eventually(lambda: other.admin().describe([topic])[topic].partitions == 2, 20)
    send(other, topic, b"in the new one", partition=1)
    assert take(source, 1, seconds=30) == [b"in the new one"]


def test_a_group_without_offsets_is_told_so_when_the_user_wants_no_start(apache, opened: ExitStack):
    topic = make_topic(apache, 1)
    source = subscribed(opened, connect(apache, **{"auto.offset.reset": "error"}), unique("g"), topic)
    with pytest.raises(OffsetLostError):
        eventually(lambda: source.poll(0.1), 20)


def test_a_static_member_that_was_replaced_is_told_so_and_has_lost_its_partitions(apache, opened: ExitStack):
    transport = connect(apache, **GROUPS["cooperative"], **{"group.instance.id": "me"})
    topic, group, told = make_topic(apache, 1), unique("g"), Listener()
    old = joined(opened, transport, group, topic, told)
    new = joined(opened, transport, group, topic)
    for _ in range(2):
        with pytest.raises(GroupError, match=r"group\.instance\.id"):
            eventually(lambda: old.poll(0.05), 20)
    assert told.told[-1] == ("lost", [Partition(topic, 0)])
    assert old.assignment() == []
    assert new.assignment() == [Partition(topic, 0)]


def test_under_kip_848_a_static_member_waits_for_the_name_that_its_dead_predecessor_holds(
    apache, opened: ExitStack, caplog
):
    settings = {**GROUPS["kip848"], "group.instance.id": "me"}
    topic, group = make_topic(apache, 1), unique("g")
    transport = connect(apache, **settings)
    send(transport, topic, *(b"%d" % n for n in range(10)))
    kill_after_commit(apache, topic, group, settings)
    heir = connect(apache, **GROUPS["kip848"]).source(group, member_id="me")
    opened.callback(heir.close)
    heir.subscribe([topic], Listener())
    assert heir.poll(0.2) == []
    assert not heir.joined
    assert take(heir, 6, seconds=30) == [b"%d" % n for n in range(4, 10)]
    assert heir.joined
    assert len([r for r in caplog.records if "The name me" in r.message and r.levelname == "WARNING"]) == 1


def test_under_kip_848_a_static_member_gives_up_when_its_name_is_that_of_a_live_one(
    apache, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kser.confluent.source._NAME_SESSIONS", 0.5)
    transport = connect(apache, **GROUPS["kip848"])
    topic, group = make_topic(apache, 1), unique("g")
    old, new = (transport.source(group, member_id="me") for _ in range(2))
    for source in (old, new):
        opened.callback(source.close)
        source.subscribe([topic], Listener())
        eventually(lambda s=source: s.poll(0.05) == [] and (s is new or s.assignment()), 20)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(GroupError, match=r"alive has the name me \(group\.instance\.id\)"):
            eventually(lambda: old.poll(0.01) or new.poll(0.05), 20)
    assert 2 < time.monotonic() - started < 10  # half of the session timeout of 6 s that the broker told
    send(transport, topic, b"v")
    assert take(old, 1) == [b"v"]


# -- what librdkafka does otherwise than one would think (KAFKA.md section 0) ------------------------------------------


class Elsewhere(Listener):
    """Settles in on_revoke, by a transaction."""

    def __init__(self, sink, position: Position) -> None:
        super().__init__()
        self.sink, self.position = sink, position
        self.source: Source | None = None

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        super().on_revoke(partitions)
        assert self.source is not None
        self.sink.begin()
        self.sink.send_offsets([self.position], self.source.member())
        self.sink.commit()


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_settled_in_on_revoke_while_closing_is_stored(apache, opened: ExitStack, kind: str):
    """Finding 13: the client's own close() leaves first under KIP-848."""
    transport = connect(apache, **GROUPS[kind])
    topic, group = make_topic(apache, 1), unique("g")
    sink = transport.sink(unique("tx"))
    opened.callback(sink.close)
    position = Position(topic, 0, 1, "settled while closing")
    listener = Elsewhere(sink, position)
    listener.source = source = subscribed(opened, transport, group, topic, listener)
    send(transport, topic, b"v")
    assert take(source, 1) == [b"v"]
    source.close()
    assert listener.told[-1] == ("revoke", [Partition(topic, 0)])
    assert joined(opened, transport, group, topic).committed([Partition(topic, 0)]) == [position]


@pytest.mark.parametrize("kind", GROUPS)
def test_a_pause_does_not_outlive_its_assignment(apache, opened: ExitStack, kind: str):
    """Finding 3: librdkafka keeps it over a revocation."""
    transport = connect(apache, **GROUPS[kind])
    topic, other, group = make_topic(apache, 1), make_topic(apache, 1), unique("g")
    source = joined(opened, transport, group, topic)
    source.pause(source.assignment())
    source.subscribe([other], Listener())
    eventually(lambda: source.poll(0.05) or source.assignment() == [Partition(other, 0)], 30)
    source.subscribe([topic], Listener())
    send(transport, topic, b"v")
    assert take(source, 1, seconds=30) == [b"v"]


@pytest.mark.parametrize("kind", GROUPS)
def test_offsets_of_who_is_in_no_group_move_nothing(apache, opened: ExitStack, kind: str):
    """Finding 4: a classic group would take them over the head of their owner."""
    transport = connect(apache, **GROUPS[kind])
    topic, group = make_topic(apache, 1), unique("g")
    owner = joined(opened, transport, group, topic)
    owner.commit([Position(topic, 0, 0, "the owner's")])
    sink, outsider = transport.sink(unique("tx")), transport.source(group)
    opened.callback(sink.close)
    opened.callback(outsider.close)
    member = outsider.member()
    assert not member.joined
    sink.begin()
    for pretended in (member, replace(member, owned=frozenset({(topic, 0)}))):
        with pytest.raises(GroupError, match="has not joined"):
            sink.send_offsets([Position(topic, 0, 5)], pretended)
    with pytest.raises(TransportError):
        sink.commit()
    sink.abort()
    assert owner.committed([Partition(topic, 0)]) == [Position(topic, 0, 0, "the owner's")]


@pytest.mark.parametrize("kind", GROUPS)
def test_a_static_member_of_a_worker_that_left_is_taken_over_at_once(apache, opened: ExitStack, kind: str):
    transport = connect(apache, **GROUPS[kind])
    topic, group = make_topic(apache, 1), unique("g")
    for _ in range(2):
        source = transport.source(group, member_id="me")
        opened.callback(source.close)
        source.subscribe([topic], Listener())
        started = time.monotonic()
        eventually(lambda s=source: s.poll(0.05) == [] and s.assignment(), 20)
        assert time.monotonic() - started < 5  # the session timeout of KIP-848 is 6 s here
        source.close()


def test_a_polling_source_starves_nobody(embedded, opened: ExitStack):
    """confluent-kafka 2.16 lets other threads wait behind the one that polls a Consumer, so none of them touches it."""
    topic = make_topic(embedded)
    transport = connect(embedded)
    source = joined(opened, transport, unique("g"), topic)
    stop = threading.Event()

    def others() -> None:
        sink, told = transport.sink(), []
        for n in range(2000):
            sink.produce(OutRecord(topic, b"k", b"%d" % n), told.append)
        assert sink.flush(20) == 0
        transport.admin().describe([topic])
        sink.close()
        stop.set()

    thread = threading.Thread(target=others, daemon=True)
    started = time.monotonic()
    thread.start()
    taken = 0
    while taken < 2000 and time.monotonic() - started < 20:
        taken += len(source.poll(1))
        source.commit([Position(topic, source.assignment()[0].partition, 0)], 5)
    thread.join(20)
    assert stop.is_set()
    assert taken == 2000
    assert time.monotonic() - started < 10


def test_a_callback_that_raises_is_logged_without_its_secrets(embedded, opened: ExitStack, caplog):
    sink = connect(embedded).sink()
    opened.callback(sink.close)
    told: list[object] = []

    def calls(password: str) -> Callable[[Error | None], None]:
        def on_delivery(error: Error | None) -> None:
            told.append(error)
            raise ValueError(f"{password} was refused")

        return on_delivery

    sink.produce(OutRecord(make_topic(embedded, 1), b"k", b"v"), calls("open sesame"))
    assert sink.flush(20) == 0
    assert told == [None]
    assert "was refused" in caplog.text
    assert "open sesame" not in caplog.text


#: A member that leaves before it has seen its first round, of a broker as new as itself; many times.
LEAVING_AT_ONCE = """
import faulthandler
from kser.confluent.embedded import EmbeddedBroker
from kser.confluent.transport import ConfluentTransport

class Listener:
    on_assign = on_revoke = on_lost = lambda self, partitions: []

faulthandler.dump_traceback_later(60, exit=True)
for _ in range(60):
    with EmbeddedBroker({"t": 2}) as broker:
        source = ConfluentTransport({"bootstrap.servers": broker.bootstrap_servers}).source("g")
        source.subscribe(["t"], Listener())
        source.close(5)
"""


def test_a_member_that_leaves_just_as_partitions_come_does_not_hang():
    """In a process of its own: it hung with Python's lock in its hands (one time in twenty)."""
    command = [sys.executable, "-c", LEAVING_AT_ONCE]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 0, ended.stderr


# -- sending -----------------------------------------------------------------------------------------------------------


def test_a_missing_topic_and_a_missing_partition_are_told_by_name_in_seconds(apache, opened: ExitStack):
    sink, topic, missing = connect(apache).sink(), make_topic(apache, 1), unique("missing")
    opened.callback(sink.close)
    told: dict[str, Error | None] = {}
    started = time.monotonic()
    sink.produce(OutRecord(missing, b"k", b"v"), lambda error: told.update(topic=error))
    sink.produce(OutRecord(topic, b"k", b"v", partition=7), lambda error: told.update(partition=error))
    assert sink.flush(20) == 0
    assert time.monotonic() - started < 10
    for what, name in (("topic", missing), ("partition", topic)):
        error = told[what]
        assert isinstance(error, TransportError)
        assert not error.retriable
        assert name in error.message


def test_a_transaction_with_a_record_that_cannot_be_delivered_says_which_and_can_be_aborted(apache, opened: ExitStack):
    topic, missing = make_topic(apache, 1), unique("missing")
    transport = connect(apache, **{"topic.metadata.propagation.max.ms": 1000})
    sink = transport.sink(unique("tx"))
    opened.callback(sink.close)
    sink.begin()
    sink.produce(OutRecord(topic, b"k", b"never"))
    sink.produce(OutRecord(missing, b"k", b"never"))
    with pytest.raises(TransportError) as caught:
        sink.commit()
    assert missing in caught.value.message
    assert caught.value.extra["abort"]
    assert not caught.value.retriable
    sink.abort()
    sink.begin()
    sink.produce(OutRecord(topic, b"k", b"v"))
    sink.commit()
    assert everything(transport, topic) == [b"v"]


def test_a_record_over_the_topics_own_limit_is_told_by_its_callback(apache, opened: ExitStack):
    transport, topic, told = connect(apache), unique("small"), []
    transport.admin().create([TopicSpec(name=topic, partitions=1, config={"max.message.bytes": "10000"})])
    sink = transport.sink()
    opened.callback(sink.close)
    for value in (os.urandom(20_000), b"small"):  # one at a time: a batch is refused as a whole
        sink.produce(OutRecord(topic, b"k", value), told.append)
        assert sink.flush(20) == 0
    assert isinstance(told[0], MessageTooLargeError)
    assert told[0].extra["size"] >= 20_000
    assert told[1] is None


def test_a_message_of_900_kib_with_headers_passes(apache, opened: ExitStack):
    transport, topic = connect(apache), make_topic(apache, 1)
    sink, told, value = transport.sink(), [], os.urandom(900 * 1024)
    opened.callback(sink.close)
    sink.produce(OutRecord(topic, b"k" * 100, value, [("trace", os.urandom(8000))]), told.append)
    assert sink.flush(20) == 0
    assert told == [None]
    assert everything(transport, topic) == [value]


# -- readers -----------------------------------------------------------------------------------------------------------


def test_a_reader_takes_up_partitions_that_are_added(apache, opened: ExitStack):
    transport, topic = connect(apache), make_topic(apache, 1)
    send(transport, topic, b"0")
    reader = transport.reader([topic])
    opened.callback(reader.close)
    assert take(reader, 1) == [b"0"]
    for future in apache.admin.create_partitions([NewPartitions(topic, 2)]).values():
        future.result(20)
    eventually(lambda: transport.admin().describe([topic])[topic].partitions == 2, 20)
    send(transport, topic, b"1", partition=1)
    assert take(reader, 1, seconds=30) == [b"1"]


def test_a_reader_reads_a_topic_that_was_deleted_and_made_again_from_its_start(apache, opened: ExitStack):
    transport, topic = connect(apache, **{"topic.metadata.refresh.interval.ms": 500}), make_topic(apache, 1)
    send(transport, topic, b"old 0", b"old 1")
    reader = transport.reader([topic])
    opened.callback(reader.close)
    assert take(reader, 2) == [b"old 0", b"old 1"]
    for future in apache.admin.delete_topics([topic]).values():
        future.result(20)
    eventually(lambda: reader.poll(0.05) or not transport.admin().describe([topic]), 20, "gone")
    eventually(lambda: reader.poll(0.1) or not reader._next, 20, "noticed")
    apache.create_topic(topic, 1)
    send(connect(apache), topic, b"new 0", b"new 1")
    assert take(reader, 2, seconds=30) == [b"new 0", b"new 1"]


def test_a_reader_is_at_its_end_where_the_last_offsets_are_markers_and_aborted_records(apache, opened: ExitStack):
    transport, topic = connect(apache), make_topic(apache, 1)
    send(transport, topic, b"kept")
    sink = transport.sink(unique("tx"))
    opened.callback(sink.close)
    for _ in range(2):
        sink.begin()
        for _ in range(5):
            sink.produce(OutRecord(topic, b"k", b"aborted", partition=0))
        assert sink.flush(20) == 0
        sink.abort()
    assert everything(transport, topic) == [b"kept"]


# -- a cluster that loses a broker -------------------------------------------------------------------------------------


def test_nothing_is_lost_or_doubled_when_a_broker_is_killed_under_load(apache3, opened: ExitStack):
    transport = connect(apache3, **GROUPS["cooperative"])
    topic, group, count = unique("load"), unique("g"), 3000
    transport.admin().create([TopicSpec(name=topic, partitions=6, replication=3, config={"min.insync.replicas": "2"})])
    source, sink = joined(opened, transport, group, topic), transport.sink()
    opened.callback(sink.close)
    told: list[Error | None] = []
    found: list[bytes | None] = []
    for n in range(count):
        sink.produce(OutRecord(topic, b"%d" % n, b"%d" % n), told.append)
        if n == count // 3:
            apache3.kill(2)
        if n % 20 == 0:
            sink.poll(0.01)
            found += [record.value for record in source.poll(0)]
    assert eventually(lambda: sink.flush(0.2) == 0 or found.extend(r.value for r in source.poll(0)), 60) is not None
    assert told == [None] * count

    def all_found() -> bool:
        found.extend(record.value for record in source.poll(0.05))
        return len(set(found)) == count

    eventually(all_found, 60, "all of them")
    assert sorted(everything(transport, topic), key=lambda v: int(v or -1)) == [b"%d" % n for n in range(count)]


def test_transactions_go_on_when_a_broker_is_killed(apache3, opened: ExitStack):
    """Each is committed, or known not to be, and is then made again."""
    transport = connect(apache3)
    topic, name = unique("load"), unique("tx")
    transport.admin().create([TopicSpec(name=topic, partitions=3, replication=3, config={"min.insync.replicas": "2"})])
    sink = transport.sink(name)
    opened.callback(lambda: sink.close(5))
    n = 0

    def transaction() -> bool:
        """True when it is certain that it was committed. One that may have been is looked for."""
        nonlocal sink
        value = b"%d" % n
        try:
            sink.begin()
            sink.produce(OutRecord(topic, value, value))
            for _ in range(10):
                try:
                    sink.commit()
                    return True
                except TransportError as exc:
                    if not exc.retriable:
                        raise
            raise AssertionError("commit() was retriable ten times")
        except TransportError as exc:
            if exc.extra.get("abort") and not exc.extra.get("fatal"):
                sink.abort()
                return False
            sink.close(1)
            sink = transport.sink(name)
            eventually(begin, 60, "a new sink that can begin")  # ends what the old one left, one way or the other
            sink.abort()
            return value in everything(transport, topic)

    def begin() -> bool:
        try:
            sink.begin()
        except TransportError as exc:
            if not exc.retriable:
                raise
            return False
        return True

    killed = False
    while n < 150:
        if n == 50 and not killed:
            killed = True  # once: a transaction that was aborted is tried again
            apache3.kill(3)
        n += transaction()
    assert sorted(everything(transport, topic), key=lambda v: int(v or -1)) == [b"%d" % m for m in range(150)]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_what_librdkafka_refuses_is_refused_before_anything_is_connected():
    with pytest.raises(ConfigurationError, match=r"did you mean bootstrap\.servers"):
        ConfluentTransport({"bootstrap.server": "127.0.0.1:9092"})


def test_workers_on_the_embedded_broker_use_its_quick_group_protocol(embedded, opened: ExitStack):
    topic, group = make_topic(embedded, 2), unique("g")
    transport = connect(embedded, **GROUPS["cooperative"])
    one = joined(opened, transport, group, topic)
    started = time.monotonic()
    two = subscribed(opened, transport, group, topic)
    eventually(lambda: one.poll(0.02) or two.poll(0.02) or len(two.assignment()) == 1, 20)
    assert time.monotonic() - started < 3  # a classic group takes 5 s there
