"""Batches go through a sink of their own, which tells of failures only: each Result is right all the same."""

import logging
import threading
import time

import pytest

from kser import DeliveryError, Message, Operation, OperationRegistry, Task, TransportError
from kser.dummy.clusters import cluster, forget_clusters
from kser.dummy.producer import Producer as DummyProducer
from kser.producer import BaseProducer
from kser.results import is_success
from kser.transport import OutRecord
from tests.unit.fakes import HOLD, FakeSink


class Lane(FakeSink):
    """Calls back for failures only, as ``answer`` says."""

    doubts = 0
    #: Does not even end what is given up.
    stuck = False

    def __init__(self, answer=lambda record: None, refuse=lambda record: None):
        super().__init__(answer, refuse)
        self.up = 0

    def produce(self, record, on_delivery=None):
        if self.closed:
            raise TransportError("The producer is closed: make a new one")
        super().produce(record, None if on_delivery is None else lambda error: error and on_delivery(error))

    def flush(self, timeout_s):
        if self.closed:
            raise TransportError("The producer is closed: make a new one")
        return super().flush(timeout_s)

    def deliver(self, records, timeout_s=30):
        assert not records
        if self.closed:
            raise TransportError("The producer is closed: make a new one")
        if not self.stuck:
            waiting, self._open = list(self._open), type(self._open)()
            for record, callback in waiting:
                callback(DeliveryError(f"A record for topic {record.topic} was given up"))
        return []


class NumberedLane(Lane):
    """With the quicker way of the Kafka sink."""

    def numbered(self, tell):
        lane = self

        class Numbered:
            @property
            def doubts(self):
                return lane.doubts

            def answered(self):
                lane.up += 1

            def produce(self, topic, key, value, number):
                lane.produce(OutRecord(topic, key, value), lambda error: tell(number, error))

        return Numbered()


class Lanes:
    """A producer with a shared sink and as many lanes as it asks for."""

    def __init__(self, made=NumberedLane, **kwargs):
        self.shared, self.opened = FakeSink(), []
        self.made, self.kwargs = made, kwargs
        self.producer = BaseProducer(self.shared, self.open)

    def open(self):
        self.opened.append(self.made(**self.kwargs))
        return self.opened[-1]

    @property
    def only(self):
        (lane,) = self.opened
        return lane


def kmsg(uuid="u", **fields):
    return Message(uuid=uuid, entrypoint="e", **fields)


def refusing(*uuids):
    failing = {uuid.encode() for uuid in uuids}
    return lambda record: TransportError("not for you") if record.key in failing else None


def holding(*uuids):
    held = {uuid.encode() for uuid in uuids}
    return lambda record: HOLD if record.key in held else None


@pytest.fixture(params=[Lane, NumberedLane])
def made(request):
    return request.param


def send(lanes, *uuids, timeout=5):
    """A batch of these; their Results and the uuids that its end named."""
    given, named = [], []
    try:
        with lanes.producer.batch(timeout):
            given += [lanes.producer.send("t", kmsg(uuid)) for uuid in uuids]
            assert {r.retcode for r in given} == {202}
    except DeliveryError as exc:
        named = exc.extra["uuids"]
    return given, named


# -- what goes where ---------------------------------------------------------------------------------------------------


def test_a_batch_and_a_bulk_take_the_lane_and_a_single_message_does_not(made):
    lanes = Lanes(made)
    given, named = send(lanes, "a", "b")
    assert is_success(lanes.producer.bulk_send("t", [kmsg("c")]))
    assert is_success(lanes.producer.send("t", kmsg("d")))
    assert ([r.key for r in lanes.only.records], [r.key for r in lanes.shared.records]) == ([b"a", b"b", b"c"], [b"d"])
    assert [(r.retcode, r.stdout, r.uuid) for r in given] == [
        (0, "Message e[a] sent in t", "a"), (0, "Message e[b] sent in t", "b"),
    ]  # fmt: skip
    assert named == []


def test_a_lane_is_opened_by_the_first_batch_and_kept_for_the_next():
    lanes = Lanes()
    assert lanes.opened == []
    for uuid in ("a", "b", "c"):
        send(lanes, uuid)
    assert len(lanes.only.records) == 3
    lanes.producer.close()
    assert (lanes.only.closed, lanes.shared.closed) == (True, True)


def test_batches_of_several_threads_have_lanes_of_their_own_up_to_four():
    lanes, results = Lanes(), []
    inside, leave = threading.Barrier(7), threading.Event()

    def work(n):
        with lanes.producer.batch():
            results.append(lanes.producer.send("t", kmsg(str(n))))
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert [len(lane.records) for lane in lanes.opened] == [1] * 4
    assert len(lanes.shared.records) == 2
    leave.set()
    for thread in threads:
        thread.join(10)
    assert [r.retcode for r in results] == [0] * 6
    assert len(lanes.producer._idle) == 4


def test_where_no_lane_can_be_opened_the_shared_sink_serves(caplog):
    def fails():
        raise TransportError("no more files")

    shared = FakeSink()
    producer = BaseProducer(shared, fails)
    with producer.batch():
        result = producer.send("t", kmsg())
    assert (result.retcode, len(shared.records)) == (0, 1)
    assert "no more files" in caplog.text


def test_a_bulk_inside_a_batch_comes_after_what_the_batch_has_handed_over():
    """They take two lanes, and one key may be in both."""
    arrived, slow = [], threading.Event()

    def answer(record):
        if record.key == b"slow" and not slow.wait(0):
            return HOLD
        arrived.append(record.key)
        return None

    lanes = Lanes(answer=answer)
    timer = threading.Timer(0.1, slow.set)
    with lanes.producer.batch():
        lanes.producer.send("t", kmsg("slow"))
        timer.start()
        assert is_success(lanes.producer.bulk_send("t", [kmsg("after")], timeout=10))
    timer.join(10)
    assert arrived == [b"slow", b"after"]


def test_the_dummy_producer_has_lanes_too():
    forget_clusters()
    with DummyProducer() as producer:
        with producer.batch():
            results = [producer.send("t", kmsg(str(n))) for n in range(3)]
        assert [r.retcode for r in results] == [0] * 3
        cluster().fail_next("delivery", TransportError("refused"))
        assert producer.bulk_send("t", [kmsg("a"), kmsg("b")]).retval == {"failed": ["a"], "sent": ["b"]}
    assert sorted(r.key for r in cluster().records("t")) == [b"0", b"1", b"2", b"b"]
    forget_clusters()


# -- failures ----------------------------------------------------------------------------------------------------------


def test_the_failed_ones_are_named_and_the_others_are_not(made):
    lanes = Lanes(made, answer=refusing("b", "d"))
    given, named = send(lanes, *"abcde")
    assert [r.retcode for r in given] == [0, 503, 0, 503, 0]
    assert (given[1].stderr, named) == ("not for you", ["b", "d"])


def test_what_is_not_confirmed_in_time_is_told_and_the_rest_is_a_success(made):
    lanes, begun = Lanes(made, answer=holding("b")), time.monotonic()
    given, named = send(lanes, *"abc", timeout=0.2)
    assert 0.15 < time.monotonic() - begun < 5
    assert ([r.retcode for r in given], named) == ([0, 504, 0], ["b"])
    assert given[1].stderr == "Message e[b] was not confirmed by the broker within 0.2 s: is it reachable?"
    assert given[1].retval["error"]["extra"]["uuids"] == ["b"]


def test_a_refusal_that_came_before_the_timeout_keeps_its_reason(made):
    lanes = Lanes(made, answer=lambda record: {b"b": HOLD, b"c": DeliveryError("too few replicas")}.get(record.key))
    given, named = send(lanes, *"abc", timeout=0.1)
    assert (given[2].stderr, named) == ("too few replicas", ["b", "c"])


def test_after_a_timeout_the_next_batch_has_another_lane():
    """The client may give up late, and would take with it what is on its way by then."""
    lanes = Lanes(answer=holding("b"))
    send(lanes, *"ab", timeout=0.05)
    assert lanes.only.closed
    given, named = send(lanes, *"cd")
    assert ([r.retcode for r in given], named) == ([0, 0], [])
    assert [len(lane.records) for lane in lanes.opened] == [2, 2]
    assert len(lanes.producer._lanes) == 1


def test_where_what_is_given_up_never_ends_all_of_the_batch_is_doubtful():
    lanes = Lanes(answer=holding("b"))
    lanes.made = type("Stuck", (NumberedLane,), {"stuck": True})
    given, named = send(lanes, *"abc", timeout=0.05)
    assert ([r.retcode for r in given], named) == ([504] * 3, ["a", "b", "c"])
    assert lanes.only.closed


def test_a_failure_of_an_earlier_batch_is_not_one_of_this():
    """It was interrupted, so some of it was still under way when the lane went to the next."""
    lanes, answers = Lanes(), {b"a": HOLD}
    lanes.kwargs = {"answer": lambda record: answers.get(record.key)}
    with pytest.raises(KeyboardInterrupt), lanes.producer.batch():
        old = lanes.producer.send("t", kmsg("a"))
        lanes.only.flush = interrupt
    del lanes.only.flush
    assert old.retcode == 202
    answers[b"a"] = TransportError("late")
    given, named = send(lanes, "b")
    assert ([r.retcode for r in given], named) == ([0], [])


def interrupt(*args):
    raise KeyboardInterrupt


def test_what_the_client_may_have_kept_back_is_no_success():
    def breaks(record):
        lanes.only.doubts += record.key == b"b"

    lanes = Lanes(answer=breaks)
    given = []
    with pytest.raises(DeliveryError) as caught, lanes.producer.batch():
        given += [lanes.producer.send("t", kmsg(uuid)) for uuid in "abc"]
        lanes.producer._lanes[0].flush(1)
        given.append(lanes.producer.send("t", kmsg("d")))
    assert ([r.retcode for r in given], caught.value.extra["uuids"]) == ([504] * 3 + [0], ["a", "b", "c"])
    assert "fatal error" in given[0].stderr
    given, named = send(lanes, "e")
    assert ([r.retcode for r in given], named) == ([0], [])


def test_what_is_refused_when_it_is_handed_over_takes_no_number_of_another(made):
    lanes = Lanes(made, refuse=lambda record: TransportError("full") if record.key == b"b" else None,
                  answer=refusing("c"))  # fmt: skip
    given = []
    with pytest.raises(DeliveryError) as caught, lanes.producer.batch():
        given += [lanes.producer.send("t", kmsg(uuid)) for uuid in "abcd"]
    assert [r.retcode for r in given] == [0, 503, 503, 0]
    assert [r.stderr for r in given[1:3]] == ["full", "not for you"]
    assert caught.value.extra["uuids"] == ["b", "c"]
    bulk = lanes.producer.bulk_send("t", [kmsg(uuid) for uuid in "abcd"])
    assert bulk.retval == {"failed": ["b", "c"], "sent": ["a", "d"]}


@pytest.mark.parametrize("at", ["before", "after"])
def test_an_interrupted_hand_over_is_told_as_possibly_sent(at, caplog):
    lanes, given = Lanes(), []

    def interrupted(record):
        if record.key == b"b":
            if at == "after":
                lanes.only.records.append(record)
            raise KeyboardInterrupt

    lanes.kwargs = {"refuse": interrupted}
    with pytest.raises(KeyboardInterrupt), lanes.producer.batch():
        given.append(lanes.producer.send("t", kmsg("a")))
        lanes.producer.send("t", kmsg("b"))
    assert [r.retcode for r in given] == [0]
    assert "e[b] was interrupted while it was handed over, it may have been sent" in caplog.text


def test_closing_the_producer_inside_a_batch_settles_what_was_handed_over_before(made):
    lanes, given = Lanes(made), []
    with pytest.raises(DeliveryError) as caught, lanes.producer.batch():
        given.append(lanes.producer.send("t", kmsg("a")))
        lanes.producer.close()
        given.append(lanes.producer.send("t", kmsg("b")))
    assert [r.retcode for r in given] == [0, 503]
    assert "closed" in given[1].stderr
    assert caught.value.extra["uuids"] == ["b"]


def test_closing_the_producer_during_a_batch_leaves_no_success_that_is_none():
    lanes, given = Lanes(answer=holding("b")), []
    with pytest.raises(DeliveryError) as caught, lanes.producer.batch():
        given += [lanes.producer.send("t", kmsg(uuid)) for uuid in "ab"]
        lanes.producer.close(0.05)
    assert given[1].retcode == 504
    assert "closed" in given[1].stderr
    assert "b" in caught.value.extra["uuids"]


def test_a_lane_tells_its_sink_that_something_was_stored():
    lanes = Lanes(answer=refusing("b"))
    send(lanes, "b")
    assert lanes.only.up == 0
    send(lanes, "a")
    assert lanes.only.up > 0


# -- launches ----------------------------------------------------------------------------------------------------------


def test_launches_of_thousands_are_each_told_right(caplog):
    caplog.set_level(logging.CRITICAL, logger="kser")
    lanes = Lanes(answer=lambda record: TransportError("no") if record.key in failing else None)
    registry = OperationRegistry(producer=lanes.producer, topic="t")
    step = registry.subscribe(type("Step", (Task,), {}))
    plain = registry.subscribe(type("Plain", (Operation,), {}))
    operations = [plain(uuid=f"op{n}", tasks=[step(), step()]) for n in range(3500)]
    failing = {b"op0", b"op999", b"op1000", b"op3499"}
    with pytest.raises(DeliveryError) as caught, lanes.producer.batch():
        results = [operation.launch() for operation in operations]
    failed = [at for at, result in enumerate(results) if result.retcode]
    assert failed == [0, 999, 1000, 3499]
    assert caught.value.extra["uuids"] == [operations[at].tasks[0].uuid for at in failed]
    assert [r.key for r in lanes.only.records] == [operation.uuid.encode() for operation in operations]


def test_a_long_batch_waits_when_too_many_are_open(monkeypatch):
    monkeypatch.setattr("kser.batches._OPEN_IN_BATCH", 1000)
    flushed, answers = [], []

    class Slow(NumberedLane):
        def flush(self, timeout_s):
            flushed.append(timeout_s)
            if timeout_s >= 1:
                answers.append(True)
            return super().flush(0)

    lanes = Lanes(Slow, answer=lambda record: None if answers else HOLD)
    given, named = send(lanes, *map(str, range(2500)))
    assert flushed[:2] == [0, 1]
    assert ({r.retcode for r in given}, named) == ({0}, [])
