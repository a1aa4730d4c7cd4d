"""What the docstrings of kser.transport promise, on every broker: Source, Sink, Reader and TopicAdmin."""

from functools import cached_property

import pytest

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
from kser.testing import eventually
from kser.transport import OutRecord, Partition, Position, Reader, Record, Sink, Source, TopicSpec
from tests.contract.conftest import Broker, Listener

#: Java's murmur2 of a key, from UtilsTest of Apache Kafka and murmur2's tests in librdkafka and kafkajs.
MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
    b"": 275646681,
    b"kafka": -798503068,
    b"0": 272173970,
    b"170859375": 102939717,
}


def take(source, count, *, seconds=20) -> list[Record]:
    """The next ``count`` records; fails when there are more or fewer."""
    found: list[Record] = []
    eventually(lambda: found.extend(source.poll(0.05)) or len(found) >= count, seconds, f"{count} records")
    assert len(found) == count
    return found


def nothing(source, *, seconds=0.3) -> None:
    """Nothing comes for a while."""
    assert source.poll(seconds) == []


def values(records) -> list[bytes | None]:
    return [record.value for record in records]


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_key_goes_to_the_partition_that_a_java_producer_would_pick(broker: Broker):
    partitions = 6
    topic = broker.make_topic(partitions)
    for key in MURMUR2:
        broker.send(topic, b"v", key=key)
    expected = {key: (murmur2 & 0x7FFFFFFF) % partitions for key, murmur2 in MURMUR2.items()}
    assert {record.key: record.partition for record in broker.everything(topic)} == expected


def test_a_record_without_a_key_goes_somewhere_and_a_given_partition_beats_the_key(broker: Broker):
    topic = broker.make_topic(3)
    broker.send(topic, b"any", key=None)
    for partition in range(3):
        broker.send(topic, b"there %d" % partition, key=b"abc", partition=partition)
    found = broker.everything(topic)
    assert sorted(r.value for r in found) == [b"any", b"there 0", b"there 1", b"there 2"]
    assert all(r.value == b"there %d" % r.partition for r in found if r.key is not None)
    assert next(r.key for r in found if r.value == b"any") is None


def test_records_of_a_partition_keep_their_order_and_get_rising_offsets(broker: Broker):
    topic = broker.make_topic()
    sent = [b"%d" % n for n in range(500)]
    broker.send(topic, *sent)
    found = take(broker.source("g", topic), 500)
    assert values(found) == sent
    assert [record.offset for record in found] == list(range(500))
    assert {(record.topic, record.partition) for record in found} == {(topic, 0)}


def test_headers_come_back_in_order_with_repeated_names_none_and_binary(broker: Broker):
    topic = broker.make_topic()
    headers = [("a", b"1"), ("b", None), ("a", b"\x00\xff"), ("c", b""), ("ü", b"u")]
    sink = broker.plain
    sink.produce(OutRecord(topic, b"k", b"v", headers))
    sink.produce(OutRecord(topic, b"k", b"bare"))
    assert sink.flush(20) == 0
    record, bare = broker.everything(topic)
    assert [tuple(header) for header in record.headers] == headers
    assert record.header("a") == b"\x00\xff"
    assert record.header("b") is None
    assert record.header("missing") is None
    assert list(bare.headers) == []


def test_a_tombstone_is_not_an_empty_value_and_no_key_is_not_an_empty_key(broker: Broker):
    topic = broker.make_topic()
    for key, value in [(b"k", None), (b"k", b""), (None, b"v"), (b"", b"v")]:
        broker.send(topic, value, key=key)
    assert [(r.key, r.value) for r in broker.everything(topic)] == [
        (b"k", None),
        (b"k", b""),
        (None, b"v"),
        (b"", b"v"),
    ]


def test_a_record_has_the_time_it_was_written(broker: Broker):
    topic = broker.make_topic()
    before = broker.now_ms()
    broker.send(topic, b"v")
    (record,) = broker.everything(topic)
    assert before <= record.timestamp_ms <= broker.now_ms()


# -- delivery ----------------------------------------------------------------------------------------------------------


def test_a_delivery_callback_gets_none_and_only_from_poll_or_flush(broker: Broker):
    topic = broker.make_topic()
    sink, told = broker.plain, []
    sink.produce(OutRecord(topic, b"k", b"1"), told.append)
    assert told == []
    assert eventually(lambda: sink.poll(0.05), 20) == 1
    assert told == [None]
    for _ in range(10):
        sink.produce(OutRecord(topic, b"k", b"more"), told.append)
    assert sink.flush(20) == 0
    assert told == [None] * 11
    assert sink.flush(0) == 0
    assert sink.poll(0) == 0


def test_a_record_that_is_too_large_is_refused_with_size_and_limit(broker: Broker):
    topic = broker.make_topic()
    sink, told = broker.plain, []
    with pytest.raises(MessageTooLargeError) as caught:
        sink.produce(OutRecord(topic, b"k", b"x" * 2_000_000), told.append)
    assert caught.value.extra["size"] >= 2_000_000
    assert 900 * 1024 <= caught.value.extra["limit"] < 2_000_000
    sink.produce(OutRecord(topic, b"k", b"x" * 900 * 1024), told.append)
    assert sink.flush(20) == 0
    assert told == [None]


def test_what_was_dropped_or_delivered_leaves_nothing_open(broker: Broker):
    topic = broker.make_topic()
    sink, told = broker.sink(), []
    for _ in range(20):
        sink.produce(OutRecord(topic, b"k", b"v"), told.append)
    sink.drop_queued()
    assert sink.flush(20) == 0
    assert len(told) == 20
    assert len(broker.everything(topic)) >= told.count(None)


def test_a_record_for_a_topic_that_does_not_exist_fails_at_its_delivery(exact_broker: Broker):
    missing = exact_broker.new_name("missing")
    sink, told = exact_broker.plain, []
    sink.produce(OutRecord(missing, b"k", b"v"), told.append)
    assert sink.flush(20) == 0
    (error,) = told
    assert isinstance(error, TransportError)
    assert missing in error.message
    assert exact_broker.transport.admin().describe([missing]) == {}


def test_a_record_for_a_partition_that_does_not_exist_is_refused_or_fails_at_its_delivery(broker: Broker):
    topic = broker.make_topic()
    broker.send(topic, b"known")
    sink, told = broker.plain, []
    try:
        sink.produce(OutRecord(topic, b"k", b"v", partition=7), told.append)
    except TransportError as error:
        told.append(error)
    assert sink.flush(20) == 0
    assert [type(error) for error in told] == [TransportError]


def test_a_sink_without_transactional_id_has_no_transactions(broker: Broker):
    with pytest.raises(TransportError):
        broker.sink().begin()


def test_a_closed_sink_takes_nothing_and_closing_again_does_nothing(broker: Broker):
    topic = broker.make_topic()
    sink, told = broker.sink(), []
    sink.produce(OutRecord(topic, b"k", b"v"), told.append)
    sink.close()
    sink.close()
    assert told == [None]
    with pytest.raises(TransportError):
        sink.produce(OutRecord(topic, b"k", b"late"))
    assert values(broker.everything(topic)) == [b"v"]


# -- delivering many ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "quiet"])
def delivering(request: pytest.FixtureRequest, broker: Broker) -> Sink:
    """Both kinds of sink deliver alike."""
    return getattr(broker, request.param)


def test_deliver_returns_when_all_are_stored_in_the_order_given(broker: Broker, delivering: Sink):
    topic = broker.make_topic(2)
    sent = [OutRecord(topic, b"k%d" % (n % 7), b"%d" % n, [("n", b"%d" % n)], n % 2) for n in range(1000)]
    assert delivering.deliver(sent) == []
    found = broker.everything(topic)
    for partition in range(2):
        assert [r.value for r in found if r.partition == partition] == [b"%d" % n for n in range(partition, 1000, 2)]
    assert all(r.headers == [("n", r.value)] or tuple(r.headers) == (("n", r.value),) for r in found)
    assert delivering.deliver([]) == []
    assert delivering.flush(0) == 0


def test_deliver_gives_what_was_refused_by_index_and_stores_the_rest(broker: Broker, delivering: Sink):
    topic = broker.make_topic()
    records = [OutRecord(topic, b"k", b"%d" % n) for n in range(6)]
    records[1] = OutRecord(topic, b"k", b"x" * 2_000_000)
    records[3] = OutRecord(topic, b"k", 5)  # type: ignore[arg-type]  # no bytes
    failures = delivering.deliver(records)
    assert [index for index, _ in failures] == [1, 3]
    (_, large), (_, malformed) = failures
    assert isinstance(large, MessageTooLargeError)
    assert large.extra["size"] >= 2_000_000
    assert isinstance(malformed, ValidationError)
    assert topic in malformed.message
    assert values(broker.everything(topic)) == [b"0", b"2", b"4", b"5"]


@pytest.mark.parametrize("kind", ["plain", "quiet"])
def test_deliver_gives_those_for_a_topic_that_does_not_exist(exact_broker: Broker, kind: str):
    topic, missing = exact_broker.make_topic(), exact_broker.new_name("missing")
    records = [OutRecord(missing if n in (0, 2) else topic, b"k", b"%d" % n) for n in range(4)]
    failures = getattr(exact_broker, kind).deliver(records)
    assert [index for index, _ in failures] == [0, 2]
    for _, error in failures:
        assert isinstance(error, TransportError)
        assert missing in error.message
        assert not error.retriable
    assert values(exact_broker.everything(topic)) == [b"1", b"3"]


def test_deliver_gives_those_for_a_partition_that_does_not_exist(broker: Broker, delivering: Sink):
    topic = broker.make_topic()
    records = [OutRecord(topic, b"k", b"%d" % n, partition=7 if n == 1 else None) for n in range(3)]
    failures = delivering.deliver(records)
    assert [(index, type(error)) for index, error in failures] == [(1, TransportError)]
    assert values(broker.everything(topic)) == [b"0", b"2"]


def test_deliver_waits_for_what_was_produced_before_and_its_callbacks_come_all_the_same(broker: Broker):
    topic = broker.make_topic()
    sink, told = broker.plain, []
    sink.produce(OutRecord(topic, b"k", b"first"), told.append)
    assert sink.deliver([OutRecord(topic, b"k", b"second")]) == []
    assert sink.flush(20) == 0
    assert told == [None]
    assert values(broker.everything(topic)) == [b"first", b"second"]


def test_deliver_is_not_for_transactions_nor_for_a_closed_sink(broker: Broker):
    topic = broker.make_topic()
    with pytest.raises(TransportError, match="deliver"):
        broker.sink(broker.new_name("tx")).deliver([OutRecord(topic, b"k", b"v")])
    sink = broker.sink()
    sink.close()
    for call in (sink.deliver, sink.produce_all):
        with pytest.raises(TransportError, match="closed"):
            call([OutRecord(topic, b"k", b"v")])
    assert broker.everything(topic) == []


def test_a_sink_of_failures_only_calls_back_for_those(exact_broker: Broker):
    topic, missing = exact_broker.make_topic(), exact_broker.new_name("missing")
    sink, told = exact_broker.quiet, []
    sink.produce(OutRecord(topic, b"k", b"v"), told.append)
    assert sink.flush(20) == 0
    assert told == []
    sink.produce(OutRecord(missing, b"k", b"v"), told.append)
    assert sink.flush(20) == 0
    assert [type(error) for error in told] == [TransportError]
    assert values(exact_broker.everything(topic)) == [b"v"]


def test_produce_all_hands_over_until_one_is_refused_and_says_which(broker: Broker, delivering: Sink):
    topic = broker.make_topic()
    sink = delivering
    for culprit, kind in ((b"x" * 2_000_000, MessageTooLargeError), (5, ValidationError)):
        with pytest.raises(kind) as caught:
            sink.produce_all([OutRecord(topic, b"k", value) for value in (b"0", b"1", culprit, b"3")])
        assert caught.value.extra["index"] == 2
    assert sink.flush(20) == 0
    assert values(broker.everything(topic)) == [b"0", b"1", b"0", b"1"]


# -- groups ------------------------------------------------------------------------------------------------------------


def test_a_new_group_reads_from_the_start_and_has_committed_nothing(broker: Broker):
    topic = broker.make_topic(2)
    broker.send(topic, b"0", partition=0)
    broker.send(topic, b"1", partition=1)
    listener = Listener()
    source = broker.source(broker.new_name("g"), topic, listener)
    assert source.assignment() == []
    assert sorted(values(take(source, 2))) == [b"0", b"1"]
    both = [Partition(topic, 0), Partition(topic, 1)]
    assert sorted(source.assignment()) == both
    assert sorted(listener.partitions("assign")) == both
    assert [(p.of, p.offset) for p in source.committed(both)] == [(both[0], -1), (both[1], -1)]


def test_a_poll_gives_no_more_than_was_asked_for_and_loses_nothing_by_it(broker: Broker):
    topic = broker.make_topic()
    broker.send(topic, *(b"%d" % n for n in range(25)))
    source = broker.source(broker.new_name("g"), topic)
    batches: list[list[Record]] = []
    eventually(lambda: batches.append(source.poll(0.05, 10)) or sum(map(len, batches)) >= 25, 20)
    assert max(map(len, batches)) <= 10
    assert values(record for batch in batches for record in batch) == [b"%d" % n for n in range(25)]
    nothing(source, seconds=0.1)


def test_a_commit_is_stored_with_its_metadata_and_the_next_member_resumes_there(broker: Broker):
    topic, group = broker.make_topic(), broker.new_name("g")
    broker.send(topic, *(b"%d" % n for n in range(5)))
    first = broker.source(group, topic)
    take(first, 5)
    position = Position(topic, 0, 3, "unfinished: 1, 2 - größer")
    first.commit([position])
    assert first.committed([position.of]) == [position]
    first.close()
    second = broker.source(group, topic)
    assert values(take(second, 2)) == [b"3", b"4"]
    assert second.committed([position.of]) == [position]
    second.commit([Position(topic, 0, 5)])
    assert second.committed([position.of]) == [Position(topic, 0, 5, "")]


def test_metadata_of_4095_bytes_is_stored_and_more_is_refused(broker: Broker):
    topic = broker.make_topic()
    source = broker.joined(broker.new_name("g"), topic)
    for full in (Position(topic, 0, 0, "x" * 4095), Position(topic, 0, 0, "ü" * 2047 + "x")):
        source.commit([full])
        assert source.committed([full.of]) == [full]
    with pytest.raises(ValidationError):
        source.commit([Position(topic, 0, 0, full.metadata + "x")])
    assert source.committed([full.of]) == [full]


def test_a_listener_may_say_where_to_start(broker: Broker):
    topic, group = broker.make_topic(2), broker.new_name("g")
    first = broker.joined(group, topic)
    for partition in range(2):
        broker.send(topic, *(b"%d/%d" % (partition, n) for n in range(4)), partition=partition)
    first.commit([Position(topic, 0, 1), Position(topic, 1, 1)])
    first.close()
    listener = Listener(assigned=lambda _: [Position(topic, 0, 3), Position(topic, 1, -1)])
    second = broker.source(group, topic, listener)
    assert sorted(values(take(second, 4))) == [b"0/3", b"1/1", b"1/2", b"1/3"]


def test_a_listener_may_read_and_commit_what_it_is_given_and_the_start_stays(broker: Broker):
    topic, group = broker.make_topic(), broker.new_name("g")
    first = broker.joined(group, topic)
    broker.send(topic, b"0", b"1", b"2")
    first.commit([Position(topic, 0, 1, "closed")])
    first.close()
    seen: list[Position] = []

    def mark(partitions):
        seen.extend(second.committed(partitions))
        second.commit([position._replace(metadata="open") for position in seen])

    second = broker.source(group, topic, Listener(assigned=mark))
    assert values(take(second, 2)) == [b"1", b"2"]
    assert seen == [Position(topic, 0, 1, "closed")]
    assert second.committed([seen[0].of]) == [Position(topic, 0, 1, "open")]


def test_committing_no_offset_changes_nothing(broker: Broker):
    topic = broker.make_topic()
    source = broker.joined(broker.new_name("g"), topic)
    source.commit([Position(topic, 0, -1)])
    source.commit([])
    assert source.committed([Partition(topic, 0)])[0].offset == -1


def test_two_members_share_the_partitions_and_one_that_closes_hands_over_its_own(broker: Broker):
    topic, group = broker.make_topic(4), broker.new_name("g")
    every = {Partition(topic, n) for n in range(4)}
    told_a, told_b = Listener(), Listener()
    a = broker.joined(group, topic, told_a)
    assert set(a.assignment()) == every
    b = broker.source(group, topic, told_b)

    def shared() -> bool:
        a.poll(0.05)
        b.poll(0.05)
        return len(a.assignment()) == len(b.assignment()) == 2

    eventually(shared, 30, "two partitions each")
    assert set(a.assignment()) | set(b.assignment()) == every
    assert sorted(told_a.partitions("revoke")) == sorted(told_b.partitions("assign"))  # only what moves is revoked
    kept = a.assignment()
    a.close()
    assert sorted(told_a.told[-1][1]) == sorted(kept)
    assert told_a.told[-1][0] == "revoke"
    eventually(lambda: b.poll(0.05) or set(b.assignment()) == every, 30, "all of them handed over")
    assert "lost" not in [name for name, _ in told_a.told + told_b.told]
    assert all(partitions for _, partitions in told_a.told + told_b.told)  # nobody is told of nothing


def test_every_record_reaches_one_of_two_members_when_they_commit_in_on_revoke(broker: Broker):
    """What on_revoke commits is where the next owner starts: nothing comes twice, nothing is left out."""
    topic, group = broker.make_topic(2), broker.new_name("g")
    for partition in range(2):
        broker.send(topic, *(b"%d/%d" % (partition, n) for n in range(10)), partition=partition)
    reached: dict[Partition, int] = {}

    def commit(partitions):
        a.commit([Position(p.topic, p.partition, reached[p], "by on_revoke") for p in partitions])

    a = broker.source(group, topic, Listener(revoked=commit))
    found = take(a, 20)
    reached.update({record.of: record.offset + 1 for record in found})
    b = broker.source(group, topic)

    def shared() -> bool:
        assert a.poll(0.05) == []
        assert b.poll(0.05) == []
        return len(a.assignment()) == len(b.assignment()) == 1

    eventually(shared, 30, "one partition each")
    (moved,) = b.assignment()
    assert b.committed([moved]) == [Position(*moved, 10, "by on_revoke")]
    a.close()  # on_revoke commits here too
    eventually(lambda: b.poll(0.05) or len(b.assignment()) == 2, 30, "both handed over")
    broker.send(topic, b"new", partition=0)
    broker.send(topic, b"new", partition=1)
    assert values(take(b, 2)) == [b"new", b"new"]


def test_a_member_that_was_put_out_cannot_commit_and_is_told_so(exact_broker: Broker):
    topic, group = exact_broker.make_topic(2), exact_broker.new_name("g")
    exact_broker.send(topic, b"0", partition=0)
    exact_broker.send(topic, b"1", partition=1)
    told = Listener()
    a = exact_broker.source(group, topic, told, hasty=True)
    take(a, 2)
    stale = a.member()
    b = exact_broker.source(group, topic)  # a does not poll any more
    found: list[Record] = []
    eventually(lambda: found.extend(b.poll(0.05)) or len(b.assignment()) == 2, 30, "all taken over")
    with pytest.raises(GroupError):
        a.commit([Position(topic, 0, 1, "too late")])
    sink = exact_broker.sink(exact_broker.new_name("tx"))
    sink.begin()
    with pytest.raises(GroupError):
        sink.send_offsets([Position(topic, 0, 1, "too late")], stale)
    sink.abort()
    assert [p.offset for p in b.committed([Partition(topic, 0), Partition(topic, 1)])] == [-1, -1]
    eventually(lambda: a.poll(0.05) or len(told.partitions("lost")) >= 2, 20, "told of the loss")
    assert sorted(told.partitions("lost")) == [Partition(topic, 0), Partition(topic, 1)]
    assert told.partitions("revoke") == []


def test_a_partition_that_is_not_owned_cannot_be_committed_or_sought(broker: Broker):
    topic = broker.make_topic()
    source = broker.joined(broker.new_name("g"), topic)
    with pytest.raises(GroupError):
        source.commit([Position(topic, 7, 1)])
    with pytest.raises(GroupError):
        source.seek(Position(topic, 7, 0))
    assert source.committed([Partition(topic, 0)])[0].offset == -1


def test_a_paused_partition_gives_nothing_and_loses_nothing(broker: Broker):
    topic = broker.make_topic(2)
    source = broker.joined(broker.new_name("g"), topic)
    broker.send(topic, *(b"0/%d" % n for n in range(10)), partition=0)
    found = eventually(lambda: source.poll(0.05, 3), 20)
    source.pause([Partition(topic, 0)])
    broker.send(topic, b"1/0", partition=1)
    assert values(take(source, 1)) == [b"1/0"]
    nothing(source)
    source.resume([Partition(topic, 0)])
    found += take(source, 10 - len(found))
    assert values(found) == [b"0/%d" % n for n in range(10)]


def test_a_partition_that_comes_anew_is_not_paused(broker: Broker):
    topic, group = broker.make_topic(), broker.new_name("g")
    a = broker.joined(group, topic)
    a.pause([Partition(topic, 0)])
    a.close()
    b = broker.joined(group, topic)
    b.pause([Partition(topic, 0)])
    b.subscribe([broker.make_topic()], Listener())
    eventually(lambda: b.poll(0.05) or Partition(topic, 0) not in b.assignment(), 30, "given up")
    b.subscribe([topic], Listener())
    broker.send(topic, b"v")
    assert values(take(b, 1, seconds=30)) == [b"v"]


def test_seek_goes_back_and_forth_also_while_paused(broker: Broker):
    topic = broker.make_topic()
    broker.send(topic, *(b"%d" % n for n in range(10)))
    source = broker.source(broker.new_name("g"), topic)
    take(source, 10)
    source.seek(Position(topic, 0, 7))
    assert values(take(source, 3)) == [b"7", b"8", b"9"]
    source.pause([Partition(topic, 0)])
    source.seek(Position(topic, 0, 2))
    nothing(source)
    source.resume([Partition(topic, 0)])
    assert values(take(source, 8))[0] == b"2"
    source.seek(Position(topic, 0, 10))
    broker.send(topic, b"10")
    assert values(take(source, 1)) == [b"10"]


def test_watermarks_are_the_first_offset_and_the_next_one(broker: Broker):
    topic = broker.make_topic()
    source = broker.joined(broker.new_name("g"), topic)
    assert source.watermarks(Partition(topic, 0)) == (0, 0)
    broker.send(topic, *(b"%d" % n for n in range(30)))
    assert source.watermarks(Partition(topic, 0)) == (0, 30)


def test_seek_to_no_offset_goes_to_the_beginning(broker: Broker):
    topic = broker.make_topic()
    broker.send(topic, b"a", b"b")
    source = broker.source("g", topic)
    assert values(take(source, 2)) == [b"a", b"b"]
    source.seek(Position(topic, 0, -1))
    assert values(take(source, 2)) == [b"a", b"b"]


def test_commit_later_tells_when_it_is_stored_and_leaves_out_what_is_not_owned(broker: Broker):
    topic, other = broker.make_topic(), broker.make_topic()
    broker.send(topic, b"a", b"b")
    source = broker.source("g", topic)
    take(source, 2)
    told: list[Error | None] = []
    source.commit_later([Position(topic, 0, 2, "note"), Position(other, 0, 1)], told.append)
    eventually(lambda: bool(source.poll(0.05) or told), 20, "on_stored")
    assert told == [None]
    assert source.committed([Partition(topic, 0)]) == [Position(topic, 0, 2, "note")]
    assert source.committed([Partition(other, 0)])[0].offset == -1
    source.commit_later([Position(other, 0, 1)], told.append)
    eventually(lambda: bool(source.poll(0.05) or len(told) == 2), 20, "on_stored")
    assert told == [None, None]


def test_what_is_produced_right_after_drop_queued_is_delivered(broker: Broker):
    """A client may drop late, and takes with it what came after."""
    topic, sink, told = broker.make_topic(), broker.plain, []
    for n in range(50):
        sink.produce(OutRecord(topic, b"k", b"dropped %d" % n))
        sink.drop_queued()
        sink.produce(OutRecord(topic, b"k", b"%d" % n), told.append)
        assert sink.flush(20) == 0
    assert told == [None] * 50
    assert [v for v in values(broker.everything(topic)) if not v.startswith(b"dropped")] == [
        b"%d" % n for n in range(50)
    ]


def test_a_committed_offset_that_is_gone_is_an_error_until_one_seeks(exact_broker: Broker):
    topic, group = exact_broker.make_topic(), exact_broker.new_name("g")
    first = exact_broker.joined(group, topic)
    exact_broker.send(topic, *(b"%d" % n for n in range(10)))
    first.commit([Position(topic, 0, 2)])
    first.close()
    exact_broker.delete_before(Partition(topic, 0), 6)
    source = exact_broker.source(group, topic)
    with pytest.raises(OffsetLostError) as caught:
        take(source, 1)
    assert (caught.value.extra["topic"], caught.value.extra["partition"], caught.value.extra["offset"]) == (topic, 0, 2)
    with pytest.raises(OffsetLostError):
        source.poll(0)
    first_left, _ = source.watermarks(Partition(topic, 0))
    source.seek(Position(topic, 0, first_left))
    assert values(take(source, 4)) == [b"6", b"7", b"8", b"9"]


def test_a_group_without_commit_starts_at_the_first_record_that_is_left(exact_broker: Broker):
    topic = exact_broker.make_topic()
    exact_broker.send(topic, *(b"%d" % n for n in range(10)))
    exact_broker.delete_before(Partition(topic, 0), 6)
    assert values(take(exact_broker.source(exact_broker.new_name("g"), topic), 4)) == [b"6", b"7", b"8", b"9"]


def test_a_closed_source_has_left_and_closing_again_does_nothing(broker: Broker):
    topic = broker.make_topic()
    told = Listener()
    source = broker.joined(broker.new_name("g"), topic, told)
    source.close()
    source.close()
    assert told.told[-1] == ("revoke", [Partition(topic, 0)])
    assert [name for name, _ in told.told].count("revoke") == 1
    assert source.assignment() == []
    with pytest.raises(TransportError):
        source.poll(0)
    with pytest.raises(TransportError):
        source.commit([Position(topic, 0, 1)])


def test_a_source_that_never_subscribed_can_be_closed_and_has_not_joined(broker: Broker):
    source = broker.transport.source(broker.new_name("g"))
    assert not source.joined
    assert not source.member().joined
    source.close()


def test_a_member_that_gets_no_partition_has_joined_all_the_same(broker: Broker):
    topic, group = broker.make_topic(), broker.new_name("g")
    told = Listener()
    first = broker.joined(group, topic)
    assert first.joined
    second = broker.source(group, topic, told)
    eventually(lambda: first.poll(0.05) or second.poll(0.05) or second.joined, 30, "joined")
    assert len(first.assignment() + second.assignment()) == 1
    first.close()
    second.close()
    assert not first.joined
    assert not second.joined


# -- static members ----------------------------------------------------------------------------------------------------


def test_of_two_static_members_of_one_name_the_first_is_told_and_loses_all(exact_broker: Broker):
    topic, group, told = exact_broker.make_topic(2), exact_broker.new_name("g"), Listener()
    both = [Partition(topic, 0), Partition(topic, 1)]
    first = exact_broker.source(group, topic, told, member_id="slot-1")
    eventually(lambda: first.poll(0.05) == [] and len(first.assignment()) == 2, 30)
    second = exact_broker.source(group, topic, member_id="slot-1")
    eventually(lambda: second.poll(0.05) == [] and len(second.assignment()) == 2, 30, "taken over")
    for _ in range(2):
        with pytest.raises(GroupError, match=r"took over this name|took over the name slot-1"):
            eventually(lambda: first.poll(0.05), 20)
    assert sorted(told.partitions("lost")) == both
    assert first.assignment() == []
    assert not first.joined
    with pytest.raises(GroupError):
        eventually(lambda: first.poll(0.05), 1)
    exact_broker.send(topic, b"v", partition=1)
    assert values(take(second, 1)) == [b"v"]
    second.commit([Position(topic, 1, 1)])


def test_a_static_member_that_comes_again_has_its_partitions_and_the_other_one_learns_nothing_of_it(
    exact_broker: Broker,
):
    topic, group, told = exact_broker.make_topic(2), exact_broker.new_name("g"), Listener()
    named = exact_broker.source(group, topic, member_id="slot-1")
    eventually(lambda: named.poll(0.05) or len(named.assignment()) == 2, 30)
    other = exact_broker.source(group, topic, told)

    def shared() -> bool:
        named.poll(0.05)
        other.poll(0.05)
        return len(named.assignment()) == len(other.assignment()) == 1

    eventually(shared, 30)
    (kept,) = named.assignment()
    seen = list(told.told)
    named.close()
    again = exact_broker.source(group, topic, member_id="slot-1")
    eventually(lambda: other.poll(0.05) == [] and again.poll(0.05) == [] and again.assignment(), 30)
    assert again.assignment() == [kept]
    assert told.told == seen


def test_a_name_that_kafka_does_not_take_is_refused(broker: Broker):
    with pytest.raises(ConfigurationError, match="no blanks"):
        broker.transport.source("g", member_id="no blanks")


# -- readers -----------------------------------------------------------------------------------------------------------


def test_a_reader_gives_all_of_its_topics_without_a_group_and_knows_when_it_is_through(broker: Broker):
    one, two = broker.make_topic(2), broker.make_topic()
    for partition in range(2):
        broker.send(one, *(b"%d/%d" % (partition, n) for n in range(5)), partition=partition)
    broker.send(two, b"two")
    for _ in range(2):  # it leaves no trace: the next one reads the same
        reader = broker.reader(one, two)
        found: list[Record] = []
        assert not reader.at_end()
        eventually(lambda r=reader, f=found: f.extend(r.poll(0.05, 3)) or r.at_end(), 20)
        assert sorted(values(found)) == sorted([b"two", *(b"%d/%d" % (p, n) for p in range(2) for n in range(5))])
        assert [r.value for r in found if r.topic == one and r.partition == 1] == [b"1/%d" % n for n in range(5)]
    broker.send(two, b"more")
    assert values(take(reader, 1)) == [b"more"]
    assert reader.at_end()


def test_a_reader_from_the_end_gives_only_what_comes_after(broker: Broker):
    topic = broker.make_topic(2)
    broker.send(topic, b"before", partition=0)
    reader = broker.reader(topic, start="end")
    eventually(lambda: reader.poll(0.05) or reader.at_end(), 20)
    broker.send(topic, b"after", partition=1)
    broker.send(topic, b"after", partition=0)
    assert values(take(reader, 2)) == [b"after", b"after"]


def test_what_is_written_right_after_a_reader_from_the_end_was_made_is_given(broker: Broker):
    topic = broker.make_topic(2)
    broker.send(topic, b"before")
    reader = broker.reader(topic, start="end")
    broker.send(topic, b"after", partition=0)
    broker.send(topic, b"after", partition=1)
    assert values(take(reader, 2)) == [b"after", b"after"]


def test_a_reader_of_an_empty_topic_is_at_its_end(broker: Broker):
    reader = broker.reader(broker.make_topic(2))
    eventually(lambda: reader.poll(0.05) or reader.at_end(), 20)
    assert reader.poll(0.1) == []


@pytest.mark.parametrize("start", ["beginning", "end"])
def test_a_reader_reads_a_topic_that_appears_later_from_its_start(broker: Broker, start: str):
    there, later = broker.make_topic(), broker.new_name("topic")
    broker.send(there, b"old")
    reader = broker.reader(there, later, start=start)
    found: list[Record] = []
    eventually(lambda: found.extend(reader.poll(0.05)) or reader.at_end(), 20)
    broker.make_topic_named(later, 2)
    broker.send(later, b"first", partition=1)
    broker.send(later, b"second", partition=1)
    found += take(reader, 2, seconds=30)
    assert values(found) == [b"old"] * (start == "beginning") + [b"first", b"second"]


def test_a_closed_reader_gives_nothing_and_closing_again_does_nothing(broker: Broker):
    reader = broker.reader(broker.make_topic())
    reader.close()
    reader.close()
    with pytest.raises(TransportError):
        reader.poll(0)


# -- all that is in some partitions ------------------------------------------------------------------------------------


def everything_in(broker: Broker, *partitions: Partition, timeout_s: float = 20) -> list[Record]:
    return [record for batch in broker.transport.read(partitions, timeout_s) for record in batch]


def test_read_gives_all_of_the_partitions_it_is_told_and_of_no_other(broker: Broker):
    one, two = broker.make_topic(3), broker.make_topic()
    for partition in range(3):
        broker.send(one, *(b"%d/%d" % (partition, n) for n in range(50)), partition=partition)
    broker.send(two, b"two", None)
    for _ in range(2):  # it leaves no trace: the next one reads the same
        found = everything_in(broker, Partition(one, 0), Partition(one, 2), Partition(two, 0))
        assert [(r.value, r.offset) for r in found if r.of == (one, 0)] == [(b"0/%d" % n, n) for n in range(50)]
        assert [r.value for r in found if r.of == (one, 2)] == [b"2/%d" % n for n in range(50)]
        assert [r.value for r in found if r.of == (two, 0)] == [b"two", None]
        assert len(found) == 102


def test_read_of_empty_partitions_and_of_none_gives_nothing(broker: Broker):
    topic = broker.make_topic(2)
    assert everything_in(broker, Partition(topic, 0), Partition(topic, 1)) == []
    assert everything_in(broker) == []


def test_read_ends_with_what_was_there_at_its_first_batch(broker: Broker):
    topic = broker.make_topic()
    broker.send(topic, b"before", b"before")
    batches = broker.transport.read([Partition(topic, 0)], 20)
    found = next(batches)
    broker.send(topic, b"after")
    assert values([*found, *(record for batch in batches for record in batch)]) == [b"before", b"before"]


def test_read_of_a_partition_that_does_not_exist_is_refused(broker: Broker):
    for partition in (Partition(broker.make_topic(), 7), Partition(broker.new_name("topic"), 0)):
        with pytest.raises(TransportError):
            everything_in(broker, partition, timeout_s=1)


def test_read_begins_where_it_is_told_to(broker: Broker):
    topic = broker.make_topic(2)
    for partition in range(2):
        broker.send(topic, b"0", b"1", b"2", partition=partition)
    zero, one = Partition(topic, 0), Partition(topic, 1)
    for starts, wanted in (({zero: 2}, [b"2"]), ({zero: 0}, [b"0", b"1", b"2"]), ({zero: 3}, []), ({zero: 9}, [])):
        found = [r for batch in broker.transport.read([zero, one], 20, starts=starts) for r in batch]
        assert [r.value for r in found if r.of == zero] == wanted
        assert [r.value for r in found if r.of == one] == [b"0", b"1", b"2"]


def test_offsets_at_a_time_are_those_of_the_first_records_written_then(broker: Broker):
    topic = broker.make_topic(2)
    zero, one = Partition(topic, 0), Partition(topic, 1)
    broker.send(topic, b"old", partition=0)
    eventually(lambda: everything_in(broker, zero))
    [old] = everything_in(broker, zero)
    broker.send(topic, b"new", partition=0)
    admin = broker.transport.admin()
    found = admin.offsets_at([zero, one], old.timestamp_ms)
    assert found == {zero: 0, one: 0}
    later = admin.offsets_at([zero, one], old.timestamp_ms + 3_600_000)
    assert later == ({zero: 0, one: 0} if broker.name == "embedded" else {zero: 2, one: 0})
    with pytest.raises(TransportError):
        admin.offsets_at([Partition(topic, 7)], 0, timeout_s=1)


def test_a_read_that_is_not_read_to_its_end_can_be_closed(broker: Broker):
    topic = broker.make_topic()
    broker.send(topic, b"v")
    batches = broker.transport.read([Partition(topic, 0)], 20)
    assert values(next(batches)) == [b"v"]
    batches.close()  # type: ignore[attr-defined]
    assert values(everything_in(broker, Partition(topic, 0))) == [b"v"]


# -- topics ------------------------------------------------------------------------------------------------------------


def test_a_cluster_has_an_id_that_stays(broker: Broker):
    assert broker.transport.admin().cluster_id()
    assert broker.transport.admin().cluster_id() == broker.transport.admin().cluster_id()


def test_describe_tells_of_the_topics_that_exist(broker: Broker):
    topic = broker.make_topic(3)
    found = broker.transport.admin().describe([topic])
    assert list(found) == [topic]
    assert (found[topic].name, found[topic].partitions, found[topic].replication) == (topic, 3, 1)


def test_asking_for_a_topic_does_not_make_it(exact_broker: Broker):
    admin, missing = exact_broker.transport.admin(), exact_broker.new_name("missing")
    assert admin.describe([missing]) == {}
    assert admin.describe([missing]) == {}


def test_create_makes_what_is_missing_and_tells_which(exact_broker: Broker):
    admin = exact_broker.transport.admin()
    one, two = exact_broker.new_name("made"), exact_broker.new_name("made")
    assert admin.can_create()
    settings = {"retention.ms": "86400000"}
    assert admin.create([TopicSpec(name=one, partitions=2, config=settings)]) == [one]
    assert admin.create([TopicSpec(name=one, partitions=5), TopicSpec(name=two, partitions=1)]) == [two]
    found = admin.describe([one, two])
    assert {name: info.partitions for name, info in found.items()} == {one: 2, two: 1}
    assert found[one].config.get("retention.ms", "86400000") == "86400000"


def test_a_topic_that_cannot_be_is_refused(exact_broker: Broker):
    admin = exact_broker.transport.admin()
    for spec in [
        TopicSpec(name="no spaces", partitions=1),
        TopicSpec(name=exact_broker.new_name("many"), partitions=1, replication=3),
        TopicSpec(name=exact_broker.new_name("none"), partitions=0),
    ]:
        with pytest.raises(TransportError):
            admin.create([spec])


# -- transactions ------------------------------------------------------------------------------------------------------


class Bench:
    """One input topic, one output topic, one transactional id, and who looks at them."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.group, self.id = broker.new_name("g"), broker.new_name("tx")
        self.input, self.output = broker.make_topic(), broker.make_topic(2)
        self.sink = broker.sink(self.id)

    @cached_property
    def source(self) -> Source:
        """The member of the group that reads the input."""
        return self.broker.joined(self.group, self.input)

    @cached_property
    def reader(self) -> Reader:
        """A reader of the output; quicker to make."""
        return self.broker.reader(self.output)

    def watching(self) -> Source:
        """A member of another group, which reads the output and has all of it."""
        return self.broker.joined(self.broker.new_name("watching"), self.output)

    def position(self, offset: int = 1) -> Position:
        return Position(self.input, 0, offset, f"settled at {offset}")

    def write(self, sink, *payloads: bytes, partition: int = 0) -> None:
        for payload in payloads:
            sink.produce(OutRecord(self.output, b"k", payload, partition=partition))

    def committed(self) -> Position:
        return self.source.committed([Partition(self.input, 0)])[0]


@pytest.fixture
def bench(exact_broker: Broker) -> Bench:
    return Bench(exact_broker)


def test_a_commit_shows_records_and_offsets_together(bench: Bench):
    member, watching = bench.source.member(), bench.watching()
    bench.sink.begin()
    bench.write(bench.sink, b"0", partition=0)
    bench.write(bench.sink, b"1", partition=1)
    nothing(watching)
    bench.sink.send_offsets([bench.position()], member)
    bench.sink.commit()
    assert sorted(values(take(watching, 2))) == [b"0", b"1"]
    assert bench.committed() == bench.position()


def test_an_abort_shows_nothing_and_the_sink_goes_on(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"never")
    bench.sink.send_offsets([bench.position(7)], bench.source.member())
    bench.sink.abort()
    assert bench.committed().offset == -1
    for payload in (b"first", b"second"):
        bench.sink.begin()
        bench.write(bench.sink, payload)
        bench.sink.commit()
    assert values(take(bench.reader, 2)) == [b"first", b"second"]
    assert values(bench.broker.everything(bench.output)) == [b"first", b"second"]


def test_commit_and_abort_take_an_offset_in_each_partition_they_touched(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"kept", partition=0)
    bench.write(bench.sink, b"kept", partition=1)
    bench.sink.commit()
    bench.sink.begin()
    bench.write(bench.sink, b"dropped", partition=0)
    bench.sink.abort()
    bench.sink.begin()
    bench.write(bench.sink, b"kept too", partition=0)
    bench.sink.commit()
    found = bench.broker.everything(bench.output)
    assert [(r.partition, r.offset) for r in found] == [(0, 0), (0, 4), (1, 0)]
    assert bench.source.watermarks(Partition(bench.output, 0)) == (0, 6)
    assert bench.source.watermarks(Partition(bench.output, 1)) == (0, 2)


def test_delivery_callbacks_of_a_transaction_come_by_the_time_it_is_committed(bench: Bench):
    told = []
    bench.sink.begin()
    for n in range(20):
        bench.sink.produce(OutRecord(bench.output, b"%d" % n, b"v"), told.append)
    bench.sink.commit()
    assert bench.sink.flush(20) == 0
    assert told == [None] * 20


def test_an_open_transaction_holds_back_later_records_of_its_partition_only(bench: Bench):
    watching = bench.watching()
    bench.sink.begin()
    bench.write(bench.sink, b"in it", partition=0)
    assert bench.sink.flush(20) == 0
    bench.broker.send(bench.output, b"behind", partition=0)
    bench.broker.send(bench.output, b"beside", partition=1)
    assert values(take(watching, 1)) == [b"beside"]
    nothing(watching)
    assert watching.watermarks(Partition(bench.output, 0)) == (0, 0)
    bench.sink.commit()
    assert values(take(watching, 2)) == [b"in it", b"behind"]


def test_an_aborted_transaction_lets_the_records_behind_it_through(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"in it")
    assert bench.sink.flush(20) == 0
    bench.broker.send(bench.output, b"behind", partition=0)
    bench.sink.abort()
    assert values(take(bench.reader, 1)) == [b"behind"]


def test_the_first_begin_of_a_sink_fences_the_one_before_it(bench: Bench):
    zombie, heir = bench.sink, bench.broker.sink(bench.id)
    zombie.begin()
    bench.write(zombie, b"half")
    assert zombie.flush(20) == 0
    zombie.send_offsets([bench.position(9)], bench.source.member())
    heir.begin()
    bench.write(heir, b"whole")
    heir.commit()
    with pytest.raises(FencedError) as caught:
        zombie.commit()
    assert "expired" not in caught.value.extra
    with pytest.raises(FencedError):
        zombie.begin()
    assert values(take(bench.reader, 1)) == [b"whole"]
    assert bench.committed().offset == -1
    heir.begin()  # and the heir is not disturbed by any of it
    bench.write(heir, b"on")
    heir.commit()
    assert values(take(bench.reader, 1)) == [b"on"]


def test_an_idle_zombie_is_told_when_it_tries(bench: Bench):
    zombie, heir = bench.sink, bench.broker.sink(bench.id)
    zombie.begin()
    bench.write(zombie, b"before")
    zombie.commit()
    heir.begin()

    def go_on() -> None:
        zombie.begin()
        bench.write(zombie, b"after")
        zombie.commit()

    with pytest.raises(FencedError):  # by which of the three is left open
        go_on()
    heir.abort()
    assert values(bench.broker.everything(bench.output)) == [b"before"]


def test_offsets_of_a_source_that_has_not_joined_are_refused(bench: Bench):
    outsider = bench.broker.transport.source(bench.group)
    assert not outsider.member().joined
    bench.sink.begin()
    bench.write(bench.sink, b"never")
    with pytest.raises(GroupError):
        bench.sink.send_offsets([bench.position()], outsider.member())
    outsider.close()
    bench.sink.abort()
    assert bench.committed().offset == -1
    assert bench.broker.everything(bench.output) == []


def test_offsets_of_a_partition_that_the_member_does_not_own_are_refused(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"never")
    with pytest.raises(GroupError):
        bench.sink.send_offsets([bench.position(), Position(bench.input, 1, 1)], bench.source.member())
    bench.sink.abort()
    assert bench.committed().offset == -1
    assert bench.broker.everything(bench.output) == []


def test_metadata_over_4095_bytes_is_refused_in_a_transaction_too(bench: Bench):
    full = Position(bench.input, 0, 1, "x" * 4095)
    bench.sink.begin()
    with pytest.raises(ValidationError):
        bench.sink.send_offsets([full._replace(metadata=full.metadata + "x")], bench.source.member())
    bench.sink.abort()
    bench.sink.begin()
    bench.sink.send_offsets([full], bench.source.member())
    bench.sink.commit()
    assert bench.committed() == full


def test_a_transaction_without_its_offsets_cannot_be_committed(bench: Bench):
    """After an error of send_offsets() a commit would store the records and not the offsets."""
    outsider = bench.broker.transport.source(bench.group)
    bench.sink.begin()
    bench.write(bench.sink, b"never")
    with pytest.raises(GroupError):
        bench.sink.send_offsets([bench.position()], outsider.member())
    outsider.close()
    with pytest.raises(TransportError):
        bench.sink.commit()
    bench.sink.abort()
    assert bench.broker.everything(bench.output) == []


def test_a_transaction_with_a_record_that_failed_can_only_be_aborted(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"half")
    bench.sink.produce(OutRecord(bench.broker.new_name("missing"), b"k", b"v"))
    with pytest.raises(TransportError) as caught:
        bench.sink.commit()
    assert caught.value.extra["abort"] is True
    assert isinstance(caught.value.extra["record"], TransportError)
    bench.sink.abort()
    bench.sink.begin()
    bench.write(bench.sink, b"whole")
    bench.sink.commit()
    assert values(take(bench.reader, 1)) == [b"whole"]


@pytest.mark.parametrize("failures_only", [True, False])
def test_a_transaction_of_many_records_shows_all_of_them_or_none(exact_broker: Broker, failures_only: bool):
    topic, missing = exact_broker.make_topic(), exact_broker.new_name("missing")
    sink = exact_broker.sink(exact_broker.new_name("tx"), failures_only=failures_only)
    with pytest.raises(TransportError) as caught:
        sink.produce_all([OutRecord(topic, b"k", b"outside")])
    assert caught.value.extra["index"] == 0
    sink.begin()
    sink.produce_all([OutRecord(topic, b"k", b"first")])
    with pytest.raises(MessageTooLargeError) as caught:
        sink.produce_all([OutRecord(topic, b"k", b"never"), OutRecord(topic, b"k", b"x" * 2_000_000)])
    assert caught.value.extra["index"] == 1
    sink.abort()
    sink.begin()
    sink.produce_all([OutRecord(topic, b"k", b"never")] * 3)
    sink.produce_all([OutRecord(topic, b"k", b"never"), OutRecord(missing, b"k", b"never")])
    with pytest.raises(TransportError) as caught:
        sink.commit()
    assert caught.value.extra["abort"] is True
    assert caught.value.extra["record"].extra["index"] == 4
    assert missing in caught.value.extra["record"].message
    sink.abort()
    assert exact_broker.everything(topic) == []
    sink.begin()
    sink.produce_all([OutRecord(topic, b"k", b"%d" % n) for n in range(1000)])
    sink.commit()
    assert values(exact_broker.everything(topic)) == [b"%d" % n for n in range(1000)]


def test_offsets_of_a_member_of_an_earlier_generation_are_refused(bench: Bench):
    stale = bench.source.member()
    assert stale.joined
    other = bench.broker.source(bench.group, bench.input)

    def both_joined() -> bool:
        bench.source.poll(0.05)
        other.poll(0.05)
        return other.member().joined and len(bench.source.assignment() + other.assignment()) == 1

    eventually(both_joined, 30, "a second member")
    bench.sink.begin()
    with pytest.raises(GroupError):
        bench.sink.send_offsets([bench.position()], stale)
    bench.sink.abort()
    assert bench.committed().offset == -1


def test_committed_waits_for_a_transaction_that_may_move_it(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"v")
    bench.sink.send_offsets([bench.position()], bench.source.member())
    with pytest.raises(TransportError) as caught:
        bench.source.committed([Partition(bench.input, 0)], 0.5)
    assert caught.value.retriable
    bench.sink.commit()
    assert bench.committed() == bench.position()


def test_a_new_owner_starts_behind_the_offsets_of_a_pending_transaction(bench: Bench):
    assert bench.source.member().joined
    bench.broker.send(bench.input, b"0", b"1", b"2")
    take(bench.source, 3)
    bench.sink.begin()
    bench.write(bench.sink, b"v")
    bench.sink.send_offsets([bench.position(2)], bench.source.member())
    bench.source.close()
    heir = bench.broker.source(bench.group, bench.input)
    bench.sink.commit()
    assert values(take(heir, 1)) == [b"2"]


def test_a_transaction_that_takes_too_long_is_aborted_and_its_producer_fenced(bench: Bench):
    sink = bench.broker.sink(bench.id, hasty=True)
    sink.begin()
    bench.write(sink, b"too slow")
    assert sink.flush(20) == 0
    bench.broker.send(bench.output, b"behind", partition=0)
    assert values(take(bench.reader, 1, seconds=30)) == [b"behind"]
    with pytest.raises(FencedError) as caught:
        sink.commit()
    assert caught.value.extra["expired"]  # so that nobody takes it for a twin
    renewed = bench.broker.sink(bench.id)
    renewed.begin()
    bench.write(renewed, b"again")
    renewed.commit()
    assert values(take(bench.reader, 1)) == [b"again"]


def test_read_passes_markers_and_aborted_records_and_ends_behind_them(bench: Bench):
    for commit in (True, False):
        bench.sink.begin()
        bench.write(bench.sink, b"kept" if commit else b"never")
        assert bench.sink.flush(20) == 0
        bench.sink.commit() if commit else bench.sink.abort()
    assert values(everything_in(bench.broker, Partition(bench.output, 0))) == [b"kept"]


@pytest.mark.parametrize(("commits", "wanted"), [(True, [b"in it", b"behind"]), (False, [b"behind"])])
def test_read_waits_for_a_transaction_that_is_open_and_gives_what_lies_behind_it(bench: Bench, commits, wanted):
    """What is behind it may be committed long since: an end at the last stable offset would leave that out."""
    bench.sink.begin()
    bench.write(bench.sink, b"in it")
    assert bench.sink.flush(20) == 0
    other = bench.broker.sink(bench.broker.new_name("tx"))
    other.begin()
    bench.write(other, b"behind")
    other.commit()
    of = Partition(bench.output, 0)
    with pytest.raises(TransportError, match="transaction is open") as caught:
        everything_in(bench.broker, of, timeout_s=1)
    assert caught.value.retriable
    bench.sink.commit() if commits else bench.sink.abort()
    assert values(everything_in(bench.broker, of)) == wanted


@pytest.mark.parametrize(("commits", "wanted"), [(True, [b"in it"]), (False, [])])
def test_a_read_under_way_goes_on_when_the_open_transaction_at_the_end_is_decided(bench: Bench, commits, wanted):
    bench.broker.send(bench.output, b"before", partition=0)
    bench.sink.begin()
    bench.write(bench.sink, b"in it")
    assert bench.sink.flush(20) == 0
    batches = bench.broker.transport.read([Partition(bench.output, 0)], 30)
    assert values(next(batches)) == [b"before"]
    bench.sink.commit() if commits else bench.sink.abort()
    assert values([record for batch in batches for record in batch]) == wanted


def test_read_ends_when_the_open_transaction_of_a_dead_producer_is_timed_out(bench: Bench):
    dead = bench.broker.sink(bench.id + ".dead", hasty=True)
    dead.begin()
    bench.write(dead, b"never")
    assert dead.flush(20) == 0
    bench.broker.send(bench.output, b"behind", partition=0)
    assert values(everything_in(bench.broker, Partition(bench.output, 0), timeout_s=30)) == [b"behind"]


def test_a_sink_that_is_closed_inside_a_transaction_leaves_nothing_to_see(bench: Bench):
    bench.sink.begin()
    bench.write(bench.sink, b"never")
    bench.sink.close()
    bench.sink.close()
    bench.broker.send(bench.output, b"behind", partition=0)
    assert values(take(bench.reader, 1)) == [b"behind"]


def test_a_transaction_that_was_not_begun_cannot_be_used(bench: Bench):
    with pytest.raises(TransportError):
        bench.sink.commit()
    with pytest.raises(TransportError):
        bench.sink.abort()
    with pytest.raises(TransportError):
        bench.sink.produce(OutRecord(bench.output, b"k", b"v"))
    bench.sink.begin()
    with pytest.raises(TransportError):
        bench.sink.begin()
    bench.write(bench.sink, b"still fine")
    bench.sink.commit()
    assert values(take(bench.reader, 1)) == [b"still fine"]


def test_an_empty_transaction_can_be_committed_and_aborted(bench: Bench):
    for end in (bench.sink.commit, bench.sink.abort):
        bench.sink.begin()
        end()
    assert bench.broker.everything(bench.output) == []


def test_a_source_sees_every_record_of_many_transactions_once_and_in_order(bench: Bench):
    for n in range(10):
        bench.sink.begin()
        bench.write(bench.sink, *(b"%d/%d" % (n, m) for m in range(5)))
        bench.sink.abort() if n % 3 == 2 else bench.sink.commit()
    expected = [b"%d/%d" % (n, m) for n in range(10) if n % 3 != 2 for m in range(5)]
    assert values(take(bench.broker.source(bench.group, bench.output), len(expected))) == expected
