"""The relay on real clients: Apache Kafka exactly once, the embedded broker at least once.

Run as a program it is a relay in a process of its own: see _main().
"""

import json
import os
import signal
import sys
import time
from collections import Counter

import pytest

from kser import headers as names
from kser.confluent.transport import ConfluentTransport
from kser.testing import eventually
from kser.transport import Partition
from kser.worker.relay import Relay
from kser.worker.tiers import dead_letter_topic, tier_topic, to_tier
from tests.brokers import unique
from tests.processes import process, wait_for

#: The tiers of these tests: seconds for what takes 10 s and 1 min.
TIERS = {"10s": 1.0, "1m": 2.5}
PARTITIONS = 4
#: A dead member and what it left open are missed soon.
HASTY = {
    "session.timeout.ms": 3000,
    "heartbeat.interval.ms": 500,
    "transaction.timeout.ms": 4000,
    "topic.metadata.refresh.interval.ms": 1000,
}


class Stage:
    """A group with its topics on a broker; what was delayed, and what came back."""

    def __init__(self, broker, *, exact, **settings):
        self.group, self.origin = unique("g"), unique("origin")
        self.exact = exact
        self.settings = {"bootstrap.servers": broker.bootstrap_servers, **HASTY, **settings}
        if settings.get("group.protocol") == "consumer":
            del self.settings["session.timeout.ms"], self.settings["heartbeat.interval.ms"]
        stamped = {"config": {"message.timestamp.type": "LogAppendTime"}} if exact else {}
        for topic in (*(tier_topic(self.group, tier) for tier in TIERS), self.origin):
            broker.create_topic(topic, PARTITIONS, **stamped)
        broker.create_topic(dead_letter_topic(self.group), 1)
        self.transport = ConfluentTransport(self.settings)
        self.plain = self.transport.sink()
        self.relays = []
        self.due = {}

    def delay(self, *delays_ms, origin=None, size=0):
        """Records that wait; each comes back with its number first in its value."""
        outs = []
        for delay_ms in delays_ms:
            number = b"%d" % len(self.due)
            self.due[number] = time.time_ns() // 1_000_000 + delay_ms
            value = number + b" " + bytes(size)
            given = [("user", number)]
            outs.append(to_tier(self.group, origin or self.origin, b"key-" + number, value, given, delay_ms, TIERS))
        assert self.plain.deliver(outs) == []

    def start(self, name, **options):
        delivery = "exactly_once" if self.exact else "at_least_once"
        relay = Relay(self.transport, self.group, name, delivery, tiers=TIERS, **options)
        self.relays.append(relay)
        relay.start()
        return relay

    def child(self, name, log, *, die="", after=0):
        """A relay in a process, which kills itself (-9) at the end of the ``after``-th call of that method."""
        delivery = "exactly_once" if self.exact else "at_least_once"
        arguments = json.dumps([self.settings, self.group, name, delivery, die, after])
        return process("-m", "tests.integration.test_relay", arguments, log=log)

    def records(self, topic=None, partitions=PARTITIONS):
        where = [Partition(topic or self.origin, number) for number in range(partitions)]
        return [record for batch in self.transport.read(where, 30) for record in batch]

    def back(self):
        return Counter(record.value.split()[0] for record in self.records())

    def all_back(self):
        return set(self.back()) == set(self.due)

    def check(self, late_ms):
        """None was early, none later than that, nothing of it is changed."""
        for record in self.records():
            number = record.value.split()[0]
            assert record.key == b"key-" + number
            assert record.header("user") == number
            run_ms = max(record.timestamp_ms, names.number(record.headers, names.NOT_BEFORE))
            assert 0 <= run_ms - self.due[number] <= late_ms, record

    def close(self):
        stopped = [relay.stop(15) for relay in self.relays]
        self.plain.close()
        assert all(stopped)


@pytest.fixture
def make_stage():
    stages = []

    def make(broker, **options):
        stages.append(Stage(broker, **options))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


LONG = pytest.mark.long
BOTH_PROTOCOLS = [
    pytest.param({"group.protocol": "classic"}, id="classic"),
    pytest.param({"group.protocol": "consumer"}, id="kip848", marks=LONG),
]
BOTH = [pytest.param("apache", marks=pytest.mark.apache), pytest.param("embedded", marks=pytest.mark.embedded)]


@pytest.fixture(params=BOTH)
def stage(request, make_stage):
    """On each broker with the delivery that it can do."""
    return make_stage(request.getfixturevalue(request.param), exact=request.param == "apache")


def test_200_records_come_back_in_time_and_once(stage):
    """Straight, by hops, and with a rest that the worker parks."""
    relay = stage.start("w")
    eventually(lambda: relay.status().partitions == len(TIERS) * PARTITIONS, 30)
    stage.delay(*(1000 + 20 * n for n in range(200)))
    eventually(stage.all_back, 30, "all back")
    assert stage.back().total() == 200
    stage.check(late_ms=2500)
    assert eventually(lambda: relay.status().moved.get("back") == 200)
    assert relay.status().moved["hop"] >= 50
    assert relay.status().problem == ""


@pytest.mark.apache
@pytest.mark.parametrize("protocol", BOTH_PROTOCOLS)
@pytest.mark.parametrize(
    "die", [*(pytest.param(at, marks=LONG) for at in ("begin", "send_offsets")), "produce_all", "commit"]
)
def test_a_relay_killed_in_a_transaction_loses_and_doubles_nothing(apache, make_stage, tmp_path, die, protocol):
    """Two relays; one is killed (-9) with its transaction open, the other takes over: each record is back once."""
    stage, log = make_stage(apache, exact=True, **protocol), tmp_path / "log"
    with stage.child("first", log, die=die, after=6) as first:  # begin counts the one at its start
        relay = stage.start("second")
        eventually(lambda: relay.status().partitions == len(TIERS) * PARTITIONS / 2, 30, "a fair share")
        for _ in range(20):
            stage.delay(*(1000 + 250 * n for n in range(10)))
            time.sleep(0.1)
        wait_for(lambda: first.poll() is not None, 30, f"the kill: {log.read_text()}")
        assert first.returncode == -signal.SIGKILL
        eventually(stage.all_back, 60, "all back")
    assert relay.stop(10)
    assert stage.back().total() == 200
    stage.check(late_ms=30_000)


@pytest.mark.parametrize("die", ["deliver", "store"])
def test_a_relay_killed_at_least_once_loses_nothing(embedded, make_stage, tmp_path, die):
    """Confirmed, or its offsets stored: what it did not come to, the other one does."""
    stage, log = make_stage(embedded, exact=False), tmp_path / "log"
    with stage.child("first", log, die=die, after=3) as first:
        relay = stage.start("second")
        eventually(lambda: relay.status().partitions == len(TIERS) * PARTITIONS / 2, 30, "a fair share")
        for _ in range(20):
            stage.delay(*(1000 + 250 * n for n in range(10)))
            time.sleep(0.1)
        wait_for(lambda: first.poll() is not None, 30, f"the kill: {log.read_text()}")
        assert first.returncode == -signal.SIGKILL
        eventually(stage.all_back, 60, "all back")
    assert max(stage.back().values()) <= 2
    if die == "store":
        assert stage.back().total() == 200


def test_records_that_fall_due_while_no_relay_runs_come_back_once(stage):
    first = stage.start("w")
    stage.delay(*[1000] * 100, *(3500 + 5 * n for n in range(400)))
    eventually(lambda: len(stage.back()) >= 100, 30, "the first ones")
    assert first.stop(10)
    time.sleep(3)
    for name in ("w", "x"):
        stage.start(name)
    eventually(stage.all_back, 30, "all back")
    time.sleep(0.5)
    assert stage.back().total() == 500
    stage.check(late_ms=20_000)


@pytest.mark.apache
@pytest.mark.parametrize("protocol", BOTH_PROTOCOLS)
def test_relays_that_come_and_go_move_each_record_once(apache, make_stage, protocol):
    stage = make_stage(apache, exact=True, **protocol)
    here = [stage.start("one")]
    for name in ("two", "three", "four"):
        for _ in range(10):
            stage.delay(*(1000 + 150 * n for n in range(10)))
            time.sleep(0.1)
        here.append(stage.start(name))
        eventually(lambda: here[-1].status().partitions, 30, "its share")
        if name != "two":
            assert here.pop(0).stop(10)
    eventually(stage.all_back, 30, "all back")
    time.sleep(1)
    assert stage.back().total() == 300


class Aborts:
    """Records of these numbers were aborted."""

    def __init__(self, *numbers):
        self.version, self.numbers = 1, numbers

    def means(self, record):
        return record.value.split()[0] in self.numbers


def test_what_was_aborted_is_taken_out_of_its_tier_before_its_time_and_once(stage):
    stage.delay(*([60_000] * 12))
    first = stage.start("w1", aborted=Aborts(b"3", b"7"))
    eventually(lambda: set(stage.back()) == {b"3", b"7"}, 30, "what was aborted")
    assert first.stop(15)
    heir = stage.start("w2", aborted=Aborts(b"3", b"7"))
    eventually(lambda: heir.status().moved.get("hop", 0) + first.status().moved.get("hop", 0) >= 10, 30, "the others")
    assert stage.back() == {b"3": 1, b"7": 1}
    for record in stage.records():
        assert names.number(record.headers, names.NOT_BEFORE) >= stage.due[record.value.split()[0]]


def test_little_memory_is_enough(stage):
    """What does not fit is let go of and read again: 200 records of 5 KB, 50 KB are held."""
    stage.delay(*(1000 + 1500 * (n % 2) + n for n in range(200)), size=5000)
    relay = stage.start("w", max_bytes=50_000)
    held = set()
    eventually(lambda: held.add(relay.status().held) or stage.all_back(), 60, "all back")
    assert max(held) <= 10
    assert stage.back().total() == 200


@pytest.mark.apache
def test_records_for_a_topic_that_is_gone_become_dead_letters(apache, make_stage):
    stage = make_stage(apache, exact=True)
    stage.delay(*[1000] * 20)
    stage.delay(*[1000] * 10, origin=unique("gone"))
    stage.start("w")
    eventually(lambda: len(stage.back()) == 20, 60, "those that can be back")
    letters = eventually(lambda: stage.records(dead_letter_topic(stage.group), 1), 60, "dead letters")
    assert {names.text(letter.headers, names.ERROR_TYPE) for letter in letters} == {"TransportError"}
    eventually(lambda: len(stage.records(dead_letter_topic(stage.group), 1)) == 10, 60, "all dead letters")
    assert stage.back().total() == 20


def _main(arguments):
    """A relay that ends by its own kill -9, or with the test. Argument: JSON, see Stage.child()."""
    settings, group, name, delivery, die, after = json.loads(arguments)
    calls = Counter()

    def dying(thing, method, called):
        real = getattr(thing, method)

        def call(*args, **options):
            answer = real(*args, **options)
            calls[called] += 1
            if called == die and calls[called] == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        setattr(thing, method, call)

    class Dying(ConfluentTransport):
        def sink(self, *args, **options):
            sink = super().sink(*args, **options)
            for method in ("begin", "produce_all", "send_offsets", "commit", "deliver"):
                dying(sink, method, method)
            return sink

        def source(self, *args, **options):
            source = super().source(*args, **options)
            dying(source, "commit", "store")
            return source

    Relay(Dying(settings), group, name, delivery, tiers=TIERS).start()
    time.sleep(300)


if __name__ == "__main__":
    _main(sys.argv[1])
