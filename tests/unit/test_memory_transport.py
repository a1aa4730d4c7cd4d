"""What the memory transport has beyond the contract of all transports: clock, faults, helpers, assignment, threads."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kser.errors import (
    ConfigurationError,
    DeliveryError,
    FencedError,
    GroupError,
    MessageTooLargeError,
    OffsetLostError,
    TransportError,
)
from kser.testing import FakeClock, eventually
from kser.transport import OutRecord, Partition, Position, TopicSpec
from kser.transport.groups import assign
from kser.transport.memory import MemoryTransport
from kser.transport.partitioner import murmur2, partition_of


class Listener:
    """Notes what it is told."""

    def __init__(self, on_assign=lambda _: None, on_revoke=lambda _: None):
        self.told = []
        self._assigned, self._revoked = on_assign, on_revoke

    def on_assign(self, partitions):
        self.told.append(("assign", list(partitions)))
        return self._assigned(partitions)

    def on_revoke(self, partitions):
        self.told.append(("revoke", list(partitions)))
        self._revoked(partitions)

    def on_lost(self, partitions):
        self.told.append(("lost", list(partitions)))


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def transport(clock):
    made = MemoryTransport(clock=clock, default_partitions=2)
    made.admin().create([TopicSpec(name="t", partitions=2)])
    return made


def joined(transport, group="g", topic="t", listener=None):
    source = transport.source(group)
    source.subscribe([topic], listener or Listener())
    source.poll(0)
    return source


def send(transport, *values, topic="t", partition=0):
    sink = transport.sink()
    for value in values:
        sink.produce(OutRecord(topic, b"k", value, partition=partition))


def values(records):
    return [record.value for record in records]


P0, P1 = Partition("t", 0), Partition("t", 1)


# -- partitioner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "java"),
    [
        # UtilsTest of Apache Kafka
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
        (b"", 275646681),
    ],
)
def test_murmur2_is_that_of_java(key, java):
    assert murmur2(key) == java % 2**32
    assert partition_of(key, 7) == (java & 0x7FFFFFFF) % 7


def test_records_without_a_key_take_turns(transport):
    sink = transport.sink()
    for _ in range(10):
        sink.produce(OutRecord("t", None, b"v"))
    assert [record.partition for record in transport.records("t")] == [0] * 5 + [1] * 5


# -- assignment --------------------------------------------------------------------------------------------------------

_partitions = st.sets(st.builds(Partition, st.sampled_from("ab"), st.integers(0, 6)), max_size=12)


@given(_partitions, st.integers(1, 5), st.data())
def test_members_with_one_subscription_get_equal_shares_and_keep_what_they_had(partitions, members, data):
    """Every partition once, loads within one of each other, and no more moves than the new shares ask for."""
    names = [f"m{n}" for n in range(members)]
    owners = {p: data.draw(st.sampled_from([*names, "gone", None])) for p in sorted(partitions)}
    previous = {name: {p for p, owner in owners.items() if owner == name} for name in [*names, "gone"]}
    result = assign(dict.fromkeys(names, partitions), previous)
    assert sorted(p for owned in result.values() for p in owned) == sorted(partitions)
    loads = sorted(map(len, result.values()))
    assert loads[-1] - loads[0] <= 1
    share = -(-len(partitions) // members)
    for name in names:
        taken = previous[name] - result[name]
        assert len(taken) <= max(0, len(previous[name]) - (share - 1))
        assert not taken or not result[name] - previous[name]  # nothing is swapped


@given(
    st.dictionaries(st.sampled_from("wxyz"), _partitions, min_size=1),
    st.dictionaries(st.sampled_from("wxyz"), _partitions),
)
def test_members_get_only_what_they_subscribed_to_and_no_one_move_would_be_fairer(eligible, had):
    seen = set()
    previous = {}
    for name, partitions in had.items():
        previous[name] = partitions - seen
        seen |= partitions
    result = assign(eligible, previous)
    assert sorted(p for owned in result.values() for p in owned) == sorted(set().union(*eligible.values()))
    for name, owned in result.items():
        assert owned <= eligible[name]
        for other, theirs in result.items():
            assert len(owned) <= len(theirs) + 1 or not owned & eligible[other]


def test_a_topic_that_grows_is_shared_out_to_who_is_there(transport):
    told = Listener()
    source = joined(transport, listener=told)
    transport.add_partitions("t", 3)
    send(transport, b"new", partition=2)
    assert values(source.poll(0)) == [b"new"]
    assert told.told == [("assign", [P0, P1]), ("assign", [Partition("t", 2)])]


def test_a_subscription_by_pattern_takes_in_topics_as_they_are_made(transport):
    source = transport.source("g")
    source.subscribe(["^orders\\."], Listener())
    send(transport, b"no", topic="other")
    send(transport, b"yes", topic="orders.eu")
    assert values(source.poll(0)) == [b"yes"]
    with pytest.raises(ConfigurationError):
        source.subscribe(["^("], Listener())


def test_a_partition_goes_to_the_next_only_after_on_revoke_returned(transport):
    owners = []
    a = joined(transport, listener=Listener(on_revoke=lambda _: owners.append((len(a.assignment()), b.assignment()))))
    b = joined(transport)
    assert b.assignment() == []
    a.poll(0)
    assert owners == [(2, [])]
    b.poll(0)
    assert a.assignment() + b.assignment() == [P0, P1]


def test_what_a_closed_member_had_is_free_at_once(transport, clock):
    a, b = joined(transport), joined(transport)
    a.close()
    b.poll(0)
    assert b.assignment() == [P0, P1]
    assert clock.monotonic() == 0


def test_a_new_owner_gets_nothing_until_the_transaction_that_may_move_its_start_has_ended(transport):
    send(transport, b"0", b"1", b"2")
    send(transport, b"other", partition=1)
    a, sink = joined(transport), transport.sink("tx")
    sink.begin()
    sink.send_offsets([Position("t", 0, 2)], a.member())
    a.close()
    b = joined(transport)  # its first poll gave what is not waited for
    assert b.committed([P1])[0].offset == -1
    assert b.assignment() == [P0, P1]
    assert b.poll(1) == []
    sink.commit()
    assert values(b.poll(0)) == [b"2"]


def test_who_is_no_member_cannot_even_commit_nothing(transport, clock):
    outsider, member = transport.source("g"), joined(transport)
    stale = member.member()
    sink = transport.sink("tx")
    sink.begin()
    for _ in range(2):  # before it subscribed, and before it polled
        with pytest.raises(GroupError, match="before it was joined"):
            sink.send_offsets([], outsider.member())
        outsider.subscribe(["t"], Listener())
    clock.advance(6)
    with pytest.raises(GroupError, match="was put out"):
        sink.send_offsets([], stale)


# -- time --------------------------------------------------------------------------------------------------------------


def test_an_idle_poll_takes_its_time_on_the_fake_clock_only(transport, clock):
    source = joined(transport)
    begin = time.monotonic()
    assert source.poll(3600) == []
    assert clock.monotonic() == pytest.approx(3600)
    assert time.monotonic() - begin < 1


def test_records_carry_the_time_of_the_clock(transport, clock):
    clock.advance(1.5)
    send(transport, b"v")
    assert transport.records("t")[0].timestamp_ms == 1_700_000_001_500 == clock.time_ms()


def test_a_member_that_does_not_poll_for_the_session_timeout_is_put_out(transport, clock):
    told = Listener()
    a = joined(transport, listener=told)
    clock.advance(5.9)
    b = joined(transport)
    assert told.told == [("assign", [P0, P1])]
    assert b.assignment() == []
    clock.advance(0.1)
    b.poll(0)
    assert b.assignment() == [P0, P1]
    with pytest.raises(GroupError):
        a.commit([Position("t", 0, 1)])
    a.poll(0)
    assert told.told[1] == ("lost", [P0, P1])
    b.poll(0)
    a.poll(0)
    assert (len(a.assignment()), len(b.assignment())) == (1, 1)  # it is a member again, a new one


def test_a_waiting_poll_wakes_when_another_member_is_overdue(transport, clock):
    joined(transport)
    b = joined(transport)
    send(transport, b"0", partition=0)
    assert values(b.poll(60)) == [b"0"]
    assert clock.monotonic() == pytest.approx(6)


def test_a_member_inside_a_callback_is_not_put_out(transport, clock):
    def slow(_):
        clock.advance(100)
        b.poll(0)
        a.commit([Position("t", 1, 5, "in time")])

    a = joined(transport, listener=Listener(on_revoke=slow))
    b = joined(transport)
    a.poll(0)
    assert a.assignment() == [P0]
    assert transport.positions("g") == [Position("t", 1, 5, "in time")]


def test_a_member_that_was_put_out_and_closes_is_told_that_all_is_lost(transport, clock):
    told = Listener()
    a = joined(transport, listener=told)
    clock.advance(6)
    a.close()
    assert told.told[-1] == ("lost", [P0, P1])


def test_an_overdue_transaction_is_aborted_and_frees_what_waited(transport, clock):
    sink = transport.sink("tx")
    sink.begin()
    clock.advance(100)  # a transaction begins with what it does first, as on Kafka
    sink.produce(OutRecord("t", b"k", b"slow", partition=0))
    source = joined(transport)
    sink.send_offsets([Position("t", 1, 4)], source.member())
    send(transport, b"behind")
    assert values(source.poll(60)) == [b"behind"]
    assert clock.monotonic() == pytest.approx(110)
    assert source.committed([P1]) == [Position("t", 1, -1)]
    for late in (sink.commit, sink.abort, sink.begin):
        with pytest.raises(FencedError) as caught:
            late()
        assert caught.value.extra["expired"]


def test_a_young_transaction_that_is_fenced_did_not_expire(transport, clock):
    sink = transport.sink("tx")
    sink.begin()
    clock.advance(7.9)
    transport.sink("tx").begin()
    with pytest.raises(FencedError) as caught:
        sink.produce(OutRecord("t", b"k", b"v"))
        sink.commit()
    assert "expired" not in caught.value.extra


def test_committed_gives_up_after_its_timeout(transport, clock):
    source = joined(transport)
    sink = transport.sink("tx")
    sink.begin()
    sink.send_offsets([Position("t", 0, 4)], source.member())
    with pytest.raises(TransportError) as caught:
        source.committed([P0], 3)
    assert caught.value.retriable
    assert clock.monotonic() == pytest.approx(3)
    assert source.committed([P1]) == [Position("t", 1, -1)]  # of others it can tell


def test_a_sink_without_anything_to_serve_waits_out_its_poll(transport, clock):
    assert transport.sink().poll(2) == 0
    assert clock.monotonic() == pytest.approx(2)


def test_advance_ends_a_wait_in_another_thread():
    clock = FakeClock(auto_advance=False)
    source = joined(MemoryTransport(clock=clock))
    done = []
    thread = threading.Thread(target=lambda: done.append(source.poll(5)))
    thread.start()
    for _ in range(10):
        assert not done
        clock.advance(0.5)
    thread.join(10)
    assert done == [[]]


def test_a_wait_that_nobody_ends_says_so_instead_of_hanging():
    source = joined(MemoryTransport(clock=FakeClock(auto_advance=False, hang_s=0.05)))
    with pytest.raises(TimeoutError, match="nobody advanced"):
        source.poll(5)


def test_a_clock_does_not_go_back(clock):
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)


def test_eventually_gives_the_first_true_value_or_fails_with_what_it_waited_for():
    answers = iter([0, None, "yes"])
    assert eventually(lambda: next(answers)) == "yes"
    with pytest.raises(AssertionError, match="a miracle"):
        eventually(lambda: False, 0.01, "a miracle")


# -- threads, on the real clock ----------------------------------------------------------------------------------------


def test_a_waiting_poll_wakes_at_once_when_something_comes():
    transport = MemoryTransport()
    source = joined(transport, topic="late")
    got, waiting = [], threading.Event()

    def wait():
        waiting.set()
        got.append((values(source.poll(30)), time.monotonic()))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(10)
    sent = time.monotonic()
    send(transport, b"v", topic="late")
    thread.join(20)
    assert got[0][0] == [b"v"]
    assert got[0][1] - sent < 5


def test_writers_and_members_in_many_threads_lose_and_repeat_nothing():
    transport = MemoryTransport()
    transport.admin().create([TopicSpec(name="t", partitions=4)])
    writers, each = 4, 300
    seen, lock, stop = [], threading.Lock(), threading.Event()

    def write(writer):
        sink = transport.sink(f"tx{writer}" if writer % 2 else None)
        for n in range(each):
            if writer % 2:
                sink.begin()
            sink.produce(OutRecord("t", b"%d" % n, b"%d/%d" % (writer, n)))
            if writer % 2:
                sink.commit()
        sink.close()

    def read():
        reached = {}

        def commit(partitions):
            source.commit([Position(*p, reached[p]) for p in partitions if p in reached])

        source = transport.source("g")
        source.subscribe(
            ["t"], Listener(on_assign=lambda ps: [reached.pop(p, None) for p in ps] and None, on_revoke=commit)
        )
        while not stop.is_set():
            for record in source.poll(0.05, 7):
                reached[record.of] = record.offset + 1
                with lock:
                    seen.append(record.value)
        source.close()

    readers = [threading.Thread(target=read) for _ in range(3)]
    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in readers + threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    eventually(lambda: len(seen) >= writers * each, 30, "everything read")
    stop.set()
    for thread in readers:
        thread.join(30)
    assert sorted(seen) == sorted(b"%d/%d" % (w, n) for w in range(writers) for n in range(each))
    assert sum(p.offset for p in transport.positions("g")) >= writers * each


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_fault_hits_the_next_calls_only_and_faults_queue_up(transport):
    source = joined(transport)
    first, second = TransportError("first", retriable=True), GroupError("second")
    transport.fail_next("commit", first, times=2)
    transport.fail_next("commit", second)
    for error in (first, first, second):
        with pytest.raises(TransportError) as caught:
            source.commit([Position("t", 0, 1)])
        assert caught.value is error
    assert transport.positions("g") == []
    source.commit([Position("t", 0, 1)])
    assert transport.positions("g") == [Position("t", 0, 1)]


def test_a_commit_whose_answer_is_lost_is_stored(transport):
    source = joined(transport)
    transport.fail_next("commit", TransportError("no answer"), applied=True)
    with pytest.raises(TransportError, match="no answer"):
        source.commit([Position("t", 0, 1)])
    assert source.committed([P0]) == [Position("t", 0, 1)]


@pytest.mark.parametrize("applied", [False, True])
def test_a_transaction_whose_commit_failed_can_be_committed_again(transport, applied):
    sink = transport.sink("tx")
    sink.begin()
    sink.produce(OutRecord("t", b"k", b"v"))
    transport.fail_next("end_txn", TransportError("again", retriable=True), applied=applied)
    with pytest.raises(TransportError):
        sink.commit()
    assert len(transport.records("t")) == applied
    sink.commit()
    assert values(transport.records("t")) == [b"v"]
    sink.begin()
    sink.produce(OutRecord("t", b"k", b"w"))
    sink.commit()
    assert values(transport.records("t")) == [b"v", b"w"]


def test_a_sink_that_was_fenced_by_a_fault_stays_fenced(transport):
    sink = transport.sink("tx")
    sink.begin()
    transport.fail_next("end_txn", FencedError("taken over"))
    for _ in range(2):
        with pytest.raises(FencedError):
            sink.commit()
    sink.close()


def test_a_failed_delivery_is_told_to_the_callback_and_the_record_is_not_there(transport):
    sink, told, error = transport.sink(), [], DeliveryError("not in time", retriable=True)
    transport.fail_next("delivery", error)
    for value in (b"lost", b"kept"):
        sink.produce(OutRecord("t", b"k", value), told.append)
    assert sink.flush(1) == 0
    assert told == [error, None]
    assert values(transport.records("t")) == [b"kept"]


def test_a_failed_delivery_lets_a_transaction_only_be_aborted(transport):
    sink, error = transport.sink("tx"), DeliveryError("not in time")
    transport.fail_next("delivery", error)
    sink.begin()
    sink.produce(OutRecord("t", b"k", b"lost"))
    sink.produce(OutRecord("t", b"k", b"half"))
    with pytest.raises(TransportError) as caught:
        sink.commit()
    assert caught.value.extra == {"abort": True, "record": error}
    sink.abort()
    sink.begin()
    sink.commit()
    assert transport.records("t") == []


def test_a_transaction_whose_offsets_were_not_sent_cannot_be_committed_until_they_are(transport):
    """Else its records would come again with the next settling."""
    source, sink = joined(transport), transport.sink("tx")
    transport.fail_next("send_offsets", TransportError("lost on the way", retriable=True))
    sink.begin()
    sink.produce(OutRecord("t", b"k", b"v"))
    with pytest.raises(TransportError, match="lost on the way"):
        sink.send_offsets([Position("t", 0, 1)], source.member())
    with pytest.raises(TransportError, match="has not got its offsets"):
        sink.commit()
    sink.send_offsets([Position("t", 0, 1)], source.member())
    sink.commit()
    assert transport.positions("g") == [Position("t", 0, 1)]


def test_deliver_gives_the_faults_of_single_records_by_index(transport):
    refused, lost = TransportError("refused"), DeliveryError("not in time")
    transport.fail_next("produce", refused)
    transport.fail_next("delivery", lost)
    sink = transport.sink()
    assert sink.deliver([OutRecord("t", b"k", b"%d" % n) for n in range(3)]) == [(0, refused), (1, lost)]
    assert values(transport.records("t")) == [b"2"]


# -- static members ----------------------------------------------------------------------------------------------------


def test_a_static_member_that_closed_keeps_its_partitions_until_the_session_timeout(transport, clock):
    named = transport.source("g", member_id="a")
    named.subscribe(["t"], Listener())
    named.poll(0)
    other = transport.source("g")
    other.subscribe(["t"], Listener())
    eventually(lambda: named.poll(0) or other.poll(0) or len(other.assignment()) == 1, 5)
    named.close()
    clock.advance(5)
    other.poll(0)
    assert len(other.assignment()) == 1
    clock.advance(2)
    other.poll(0)
    assert len(other.assignment()) == 2


def test_a_static_member_that_comes_again_takes_its_place_and_nobody_else_is_disturbed(transport):
    first = transport.source("g", member_id="a")
    first.subscribe(["t"], Listener())
    first.poll(0)
    told = Listener()
    other = transport.source("g")
    other.subscribe(["t"], told)
    eventually(lambda: first.poll(0) or other.poll(0) or len(other.assignment()) == 1, 5)
    kept, before, member = first.assignment(), list(told.told), other.member()
    first.close()
    again = transport.source("g", member_id="a")
    again.subscribe(["t"], Listener())
    again.poll(0)
    other.poll(0)
    assert again.assignment() == kept
    assert told.told == before
    assert other.member() == member


def test_a_static_member_that_was_replaced_may_not_commit(transport):
    first = transport.source("g", member_id="a")
    first.subscribe(["t"], Listener())
    first.poll(0)
    stale = first.member()
    second = transport.source("g", member_id="a")
    second.subscribe(["t"], Listener())
    second.poll(0)
    sink = transport.sink("tx")
    sink.begin()
    with pytest.raises(GroupError):
        sink.send_offsets([Position("t", 0, 1)], stale)
    with pytest.raises(GroupError):
        first.commit([Position("t", 0, 1)])
    assert not first.joined
    first.close()
    assert P0 in second.assignment()
    second.commit([Position("t", 0, 1)])


@pytest.mark.parametrize("name", ["", "no blank", "x" * 250, "..", 5])
def test_a_name_that_kafka_does_not_take_is_refused(transport, name):
    with pytest.raises(ConfigurationError):
        transport.source("g", member_id=name)


@pytest.mark.parametrize("operation", ["poll", "committed", "watermarks", "produce", "begin", "send_offsets", "abort"])
def test_every_operation_can_be_made_to_fail_once(transport, operation):
    source, plain, sink = joined(transport), transport.sink(), transport.sink("tx")
    calls = {
        "poll": lambda: source.poll(0),
        "committed": lambda: source.committed([P0]),
        "watermarks": lambda: source.watermarks(P0),
        "produce": lambda: plain.produce(OutRecord("t", b"k", b"v")),
        "begin": sink.begin,
        "send_offsets": lambda: sink.send_offsets([Position("t", 0, 1)], source.member()),
        "abort": sink.abort,
    }
    if operation in ("send_offsets", "abort"):
        sink.begin()
    transport.fail_next(operation, TransportError("now"))
    with pytest.raises(TransportError, match="now"):
        calls[operation]()
    calls[operation]()


def test_a_callback_that_raises_disturbs_no_other(transport, caplog):
    sink, told = transport.sink(), []
    sink.produce(OutRecord("t", b"k", b"v"), lambda _: 1 / 0)
    sink.produce(OutRecord("t", b"k", b"v"), told.append)
    assert sink.poll(0) == 2
    assert told == [None]
    assert "A delivery callback raised" in caplog.text


def test_what_a_listener_raises_comes_out_of_poll_and_the_assignment_comes_again(transport):
    told = Listener(on_assign=lambda _: 1 / 0 if len(told.told) == 1 else None)
    source = transport.source("g")
    source.subscribe(["t"], told)
    with pytest.raises(ZeroDivisionError):
        source.poll(0)
    assert source.assignment() == []
    source.poll(0)
    assert told.told == [("assign", [P0, P1])] * 2
    assert source.assignment() == [P0, P1]


def test_a_listener_decides_where_to_start_by_what_it_returns_only(transport):
    def meddle(partitions):
        source.pause(partitions)
        source.seek(Position("t", 0, 2))
        return [Position("t", 0, 1)]

    source = transport.source("g")
    source.subscribe(["t"], Listener(on_assign=meddle))
    send(transport, b"0", b"1", b"2")
    assert values(source.poll(0)) == [b"1", b"2"]


def test_a_listener_cannot_poll_or_close(transport):
    def reenter(_):
        for call in (lambda: source.poll(0), source.close):
            with pytest.raises(TransportError, match="inside a rebalance listener"):
                call()

    source = transport.source("g")
    source.subscribe(["t"], Listener(on_assign=reenter))
    send(transport, b"v")
    assert values(source.poll(0)) == [b"v"]


# -- topics and helpers ------------------------------------------------------------------------------------------------


def test_writing_makes_a_topic_with_the_default_number_of_partitions(transport):
    send(transport, b"v", topic="new")
    assert transport.admin().describe(["new"])["new"].partitions == 2


def test_without_auto_create_a_record_for_a_topic_that_does_not_exist_fails_at_delivery(caplog):
    transport = MemoryTransport(auto_create=False)
    sink, told = transport.sink(), []
    sink.produce(OutRecord("missing", b"k", b"v"), told.append)
    sink.flush(1)
    assert isinstance(told[0], TransportError)
    sink.produce(OutRecord("missing", b"k", b"v"))
    assert "was not written" in caplog.text
    assert transport.admin().describe(["missing"]) == {}


def test_a_record_for_a_partition_that_does_not_exist_fails_at_delivery(transport):
    sink, told = transport.sink(), []
    sink.produce(OutRecord("t", b"k", b"v", partition=2), told.append)
    sink.flush(1)
    assert "only 0 to 1" in told[0].message


def test_records_gives_what_a_source_could_read(transport):
    sink = transport.sink("tx")
    send(transport, b"p1", partition=1)
    send(transport, b"p0")
    sink.begin()
    sink.produce(OutRecord("t", b"k", b"open", partition=0))
    send(transport, b"behind")
    assert values(transport.records("t")) == [b"p0", b"p1"]
    sink.commit()
    assert values(transport.records("t")) == [b"p0", b"open", b"behind", b"p1"]
    assert transport.records("missing") == []


def test_what_retention_took_is_passed_over_by_a_reader_and_lost_to_a_source(transport):
    send(transport, b"0", b"1", b"2")
    reader, source = transport.reader(["t"]), joined(transport)
    source.seek(Position("t", 0, 0))
    transport.delete_before(P0, 2)
    assert values(reader.poll(0)) == [b"2"]
    assert reader.at_end()
    with pytest.raises(OffsetLostError, match="it has 2 to 3"):
        source.poll(0)
    transport.delete_before(P0, 1)  # gone is gone
    source.seek(Position("t", 0, 2))
    assert values(source.poll(0)) == [b"2"]
    assert source.watermarks(P0) == (2, 3)


def test_a_reader_is_at_its_end_when_only_what_nobody_sees_is_left(transport):
    sink = transport.sink("tx")
    sink.begin()
    sink.produce(OutRecord("t", b"k", b"dropped", partition=0))
    sink.abort()
    assert transport.reader(["t"]).at_end()


def test_a_transaction_that_was_overtaken_by_a_plain_commit_does_not_move_it_back(transport):
    source = joined(transport)
    sink = transport.sink("tx")
    sink.begin()
    sink.send_offsets([Position("t", 0, 1, "transaction"), Position("t", 1, 1, "transaction")], source.member())
    source.commit([Position("t", 0, 2, "plain")])
    sink.commit()
    assert transport.positions("g") == [Position("t", 0, 2, "plain"), Position("t", 1, 1, "transaction")]


def test_a_sink_takes_members_of_this_transport_only(transport):
    sink = transport.sink("tx")
    sink.begin()
    with pytest.raises(TypeError, match="MemorySource"):
        sink.send_offsets([], object())


def test_groups_do_not_know_of_each_other(transport):
    a, b = joined(transport, "a"), joined(transport, "b")
    a.commit([Position("t", 0, 1)])
    assert a.assignment() == b.assignment() == [P0, P1]
    assert b.committed([P0]) == [Position("t", 0, -1)]


def test_the_size_of_a_record_counts_key_value_and_headers():
    sink = MemoryTransport(max_record_bytes=10).sink()
    sink.produce(OutRecord("t", b"kk", b"vvvv", [("h", b"123")]))
    with pytest.raises(MessageTooLargeError):
        sink.produce(OutRecord("t", b"kk", b"vvvv", [("h", b"1234")]))


@pytest.mark.parametrize(
    "wrong",
    [{"default_partitions": 0}, {"session_timeout_s": 0}, {"transaction_timeout_s": -1}, {"max_record_bytes": 0}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        MemoryTransport(**wrong)


def test_a_group_needs_a_name(transport):
    with pytest.raises(ConfigurationError):
        transport.source("")


def test_it_loads_no_kafka_client():
    import subprocess
    import sys

    code = "import sys, kser.transport.memory, kser.testing; sys.exit('confluent_kafka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
