"""The relay on the memory transport: hours pass in milliseconds, crashes happen where a test wants them."""

import logging
import random
import threading
import time
from collections import Counter

import pytest

from kser import headers as names
from kser.errors import DeliveryError, Error, FencedError, GroupError, TransportError, ValidationError
from kser.testing import FakeClock, eventually
from kser.transport import Partition, Position, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker import relay as module
from kser.worker.relay import Relay, RelayPlan, Session
from kser.worker.tiers import tier_topic, tier_topics, to_tier
from kser.worker.topic_plan import TIERS

GROUP, ORIGIN, DLQ = "shop", "orders", "shop.dlq"
HOUR_MS = 3600 * 1000
#: Of the tests that run a relay in its thread, by the real clock.
QUICK = {"a": 0.05, "b": 0.3}


class Crash(BaseException):
    """The process dies here."""


class Breaking:
    """A sink or source of which one method does something else the first time: before its work, or after."""

    def __init__(self, real, lab):
        self.real, self.lab = real, lab

    def __getattr__(self, name):
        real = getattr(self.real, name)
        if name != self.lab.at[0] or self.lab.hit:
            return real

        def broken(*arguments, **options):
            self.lab.hit = True
            if self.lab.at[1] == "before":
                self.lab.act()
            answer = real(*arguments, **options)
            if self.lab.at[1] == "after":
                self.lab.act()
            return answer

        return broken


class Lab:
    """A broker in memory with the topics of a group, sessions of relays, and what comes back."""

    def __init__(self, *, clock=None, partitions=2, tiers=TIERS, create=True, **options):
        self.clock = clock or FakeClock()
        self.memory = MemoryTransport(clock=self.clock, auto_create=False, **options)
        self.tiers, self.partitions = tiers, partitions
        if create:
            self.create()
        self.plain = self.memory.sink()
        self.sent = {}
        self.sessions = []
        #: Where a Breaking acts, whether it has, and what it does.
        self.at, self.hit, self.act = ("", ""), False, lambda: None

    def create(self, *topics):
        topics = topics or [*tier_topics(GROUP, self.tiers), ORIGIN, DLQ]
        self.memory.admin().create([TopicSpec(name=name, partitions=self.partitions) for name in topics])

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def source(self, group, **options):
        return Breaking(self.memory.source(group, **options), self)

    def sink(self, *arguments, **options):
        return Breaking(self.memory.sink(*arguments, **options), self)

    # -- what a test does ----------------------------------------------------------------------------------------------

    def delay(self, delay_ms, number=None, origin=ORIGIN, value=None, headers=()):
        """A record that is to be back after this time. Its value is its number."""
        number = len(self.sent) if number is None else number
        value = b"%d" % number if value is None else value
        self.sent[value] = self.clock.time_ms() + delay_ms
        self.put(to_tier(GROUP, origin, b"key-%d" % number, value, headers, delay_ms, self.tiers))

    def put(self, out):
        assert self.plain.deliver([out]) == []

    def session(self, worker="w", *, exactly_once=True, **options):
        plan = RelayPlan(
            transport=self,
            group=GROUP,
            worker=worker,
            exactly_once=exactly_once,
            tiers=self.tiers,
            clock=self.clock,
            **options,
        )
        made = Session(plan)
        self.sessions.append(made)
        made.open()
        return made

    def turn(self, *sessions, until, most=200_000):
        """Let these sessions work by turns until something is so."""
        for _ in range(most):
            if until():
                return
            for session in sessions:
                session.turn(0.5 / len(sessions))
        raise AssertionError(
            f"not after {most} turns at {self.clock.monotonic()} s: {len(self.back())} of {len(self.sent)}"
        )

    def back(self):
        """The values that came back."""
        return [record.value for record in self.memory.records(ORIGIN)]

    def all_back(self):
        return len(self.back()) >= len(self.sent)

    def lateness_ms(self):
        """How late they came, or will be run: a worker waits for NOT_BEFORE."""
        return [
            max(record.timestamp_ms, names.number(record.headers, names.NOT_BEFORE)) - self.sent[record.value]
            for record in self.memory.records(ORIGIN)
        ]

    def check_once(self, late_ms=1000):
        assert sorted(self.back()) == sorted(self.sent)
        assert all(0 <= late <= late_ms for late in self.lateness_ms()), max(self.lateness_ms())

    def close(self):
        self.at = ("", "")
        for session in self.sessions:
            session.close()


@pytest.fixture
def make_lab():
    labs = []

    def make(**options):
        labs.append(Lab(**options))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


@pytest.fixture
def lab(make_lab):
    return make_lab()


@pytest.fixture(params=[True, False], ids=["exactly_once", "at_least_once"])
def exactly_once(request):
    return request.param


@pytest.fixture
def start():
    """Relays in their threads."""
    running = []

    def go(lab, worker="w", **options):
        running.append(Relay(lab, GROUP, worker, tiers=lab.tiers, clock=lab.clock, **options))
        running[-1].start()
        return running[-1]

    yield go
    for relay in running:
        assert relay.stop(10)


@pytest.fixture
def real_lab(make_lab):
    return make_lab(clock=module.RealClock(), tiers=QUICK)


def test_what_others_have_gone_on_with_is_not_moved(make_lab):
    """KIP-848: for a moment two members may have one partition, and Kafka takes what both of them commit."""
    lab = make_lab(partitions=1)
    lab.delay(11_000)
    session = lab.session()
    lab.turn(session, until=lambda: session.held == 1)
    (topic,) = (name for name in tier_topics(GROUP, lab.tiers) if lab.memory.records(name))
    with lab.memory._cluster.changed:  # as if another relay had moved it
        others = Position(topic, 0, 1, "")
        lab.memory._cluster.group(session._plan.source_group).store(others, lab.memory._cluster.next_sequence())
    with pytest.raises(TransportError, match="others have gone on with"):
        lab.turn(session, until=lab.all_back)
    session.close()
    again = lab.session()
    lab.delay(11_000)
    lab.turn(again, until=lambda: len(lab.back()) == 1)
    assert lab.back() == [b"1"]


# -- aborts ------------------------------------------------------------------------------------------------------------


class Aborts:
    """What was aborted: values of records."""

    def __init__(self):
        self.version, self.values = 0, set()

    def add(self, *values):
        self.values.update(values)
        self.version += 1

    def means(self, record):
        return record.value in self.values


def test_what_was_aborted_comes_out_of_the_middle_of_a_tier_once_and_the_rest_when_it_is_due(make_lab, exactly_once):
    lab, aborts = make_lab(partitions=1), Aborts()
    for _ in range(10):
        lab.delay(HOUR_MS)
    session = lab.session(exactly_once=exactly_once, aborted=aborts)
    lab.turn(session, until=lambda: session.held == 10)
    assert lab.back() == []
    aborts.add(b"3", b"7")
    lab.turn(session, until=lambda: len(lab.back()) == 2)
    assert lab.clock.time_ms() < lab.sent[b"3"] - HOUR_MS / 2
    for record in lab.memory.records(ORIGIN):
        assert record.value in (b"3", b"7")
        assert names.number(record.headers, names.NOT_BEFORE) == lab.sent[record.value]
        assert names.value_of(record.headers, names.ORIGIN_TOPIC) is None
        lab.put(to_tier(GROUP, ORIGIN, record.key, b"again", record.headers, HOUR_MS))  # by a worker that knows nothing
    session.close()
    heir = lab.session("heir", exactly_once=exactly_once, aborted=aborts)
    aborts.add(b"again", b"9")
    lab.turn(heir, until=lambda: len(lab.back()) == 3)
    lab.turn(heir, until=lambda: lab.clock.time_ms() > lab.sent[b"9"] + 2000)
    values = lab.back()
    assert sorted(values[:3]) == [b"3", b"7", b"9"]
    assert values[3:10] == [b"0", b"1", b"2", b"4", b"5", b"6", b"8"]
    lab.turn(heir, until=lambda: lab.back()[10:] == [b"again"] * 2)


def test_what_is_not_in_the_hands_of_the_relay_yet_is_taken_out_when_it_comes(make_lab):
    lab, aborts = make_lab(partitions=1), Aborts()
    aborts.add(b"9")
    for _ in range(10):
        lab.delay(HOUR_MS)
        lab.clock.advance(300)
    session = lab.session(aborted=aborts, max_records=3)
    lab.turn(session, until=lab.all_back)
    assert sorted(lab.back()) == sorted(lab.sent)
    (early,) = [record for record in lab.memory.records(ORIGIN) if record.value == b"9"]
    assert early.timestamp_ms < lab.sent[b"9"] - 200_000


@pytest.mark.parametrize("method", ["commit", "produce_all", "send_offsets"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_takes_nothing_out_twice(make_lab, method, when):
    def crash():
        raise Crash

    lab, aborts = make_lab(partitions=1), Aborts()
    for _ in range(6):
        lab.delay(HOUR_MS)
    session = lab.session(aborted=aborts)
    lab.turn(session, until=lambda: session.held == 6)
    aborts.add(b"2", b"4")
    lab.at, lab.hit, lab.act = (method, when), False, crash
    with pytest.raises(Crash):
        lab.turn(session, until=lambda: len(lab.back()) == 2)
    lab.at = ("", "")
    session.close()
    heir = lab.session(aborted=aborts)
    lab.turn(heir, until=lab.all_back)
    assert sorted(lab.back()) == sorted(lab.sent)


def test_more_than_can_be_noted_waits_and_is_lost_by_nobody(make_lab, monkeypatch):
    monkeypatch.setattr(module, "_MOST_GONE", 5)
    lab, aborts = make_lab(partitions=1), Aborts()
    for _ in range(20):
        lab.delay(HOUR_MS)
    session = lab.session(aborted=aborts)
    lab.turn(session, until=lambda: session.held == 20)
    aborts.add(*(b"%d" % n for n in range(1, 20)))
    lab.turn(session, until=lambda: len(lab.back()) == 5)
    lab.turn(session, until=lab.all_back)
    assert sorted(lab.back()) == sorted(lab.sent)


@pytest.mark.parametrize("gone", [[], [5], [3, 4, 9], list(range(2**40, 2**40 + 8 * 400, 8))])
def test_what_is_noted_beside_an_offset_fits_and_is_read_as_it_was(gone):
    note = module._note(3, gone)
    assert len(note) < 4095
    assert module._noted(3, note) == gone
    assert module._noted(3, note + ",x") == []


# -- delays ------------------------------------------------------------------------------------------------------------


def test_records_come_back_when_they_are_due_whatever_their_delay(lab, exactly_once):
    for delay_ms in (10_000, 10_001, 19_999, 60_000, 75_500, HOUR_MS, 2 * HOUR_MS + 11 * 60_000 + 35_000):
        lab.delay(delay_ms)
    session = lab.session(exactly_once=exactly_once)
    lab.turn(session, until=lab.all_back)
    lab.check_once()
    assert session._plan.moved["back"] == 7
    assert session._plan.moved["hop"] == 1 + 6  # of 75.5 s, and of 2 h 11 min 35 s: 1 h, 10 min, 1 min, 10 s x 3
    assert session._plan.moved["dead"] == 0


def test_nothing_is_moved_before_it_is_due(lab):
    lab.delay(HOUR_MS)
    session = lab.session()
    lab.turn(session, until=lambda: lab.clock.monotonic() > 3598)
    assert lab.back() == []
    assert session.held == 1
    lab.turn(session, until=lab.all_back)
    assert lab.clock.monotonic() < 3601


def test_a_partition_is_first_in_first_out(make_lab, exactly_once):
    lab = make_lab(partitions=1)
    session = lab.session(exactly_once=exactly_once)
    for _ in range(300):
        lab.delay(60_000)
        lab.clock.advance(0.05)
    lab.turn(session, until=lab.all_back)
    assert lab.back() == [b"%d" % n for n in range(300)]
    lab.check_once()


def test_offsets_are_committed_plain_and_lead_to_nothing_left(lab, exactly_once):
    for _ in range(20):
        lab.delay(10_000)
    session = lab.session(exactly_once=exactly_once)
    lab.turn(session, until=lab.all_back)
    session.close()
    positions = lab.positions(f"{GROUP}.retry")
    assert {position.metadata for position in positions} == {""}
    ends = {r.of: r.offset + 1 for r in lab.records(tier_topic(GROUP, "10s"))}
    assert {p.of: p.offset for p in positions} == ends
    again = lab.session(exactly_once=exactly_once)
    for _ in range(50):
        again.turn()
    lab.check_once()


def test_what_fell_due_while_no_relay_was_there_comes_back_once(lab, exactly_once):
    for n in range(500):
        lab.delay(10_000 + 37 * n)
    first = lab.session(exactly_once=exactly_once)
    lab.turn(first, until=lambda: len(lab.back()) > 100)
    first.close()
    lab.clock.advance(3600)
    lab.turn(lab.session("later", exactly_once=exactly_once), until=lab.all_back)
    lab.check_once(late_ms=HOUR_MS + 1000)


def test_memory_is_bounded_and_all_come_back(make_lab, exactly_once):
    """Each record is 2 KB, 20 KB are held."""
    lab = make_lab(partitions=3)
    for n in range(200):
        lab.delay((10_000, 60_000)[n % 2], value=b"%05d" % n + bytes(1500))
        lab.clock.advance(0.2)
    session = lab.session(exactly_once=exactly_once, max_bytes=20_000, max_records=50)
    most = 0

    def watched():
        nonlocal most
        most = max(most, session.held)
        return lab.all_back()

    lab.turn(session, until=watched)
    assert 5 <= most <= 10
    lab.check_once(late_ms=40_000)


def test_no_more_than_max_records_of_a_partition_are_held(make_lab):
    lab = make_lab(partitions=1)
    for _ in range(100):
        lab.delay(60_000)
    session = lab.session(max_records=10)
    lab.turn(session, until=lambda: session.held)
    for _ in range(20):
        session.turn()
    assert session.held == 10
    lab.turn(session, until=lab.all_back)
    lab.check_once()


def test_records_that_a_client_skips_are_noticed(make_lab):
    """It was told to read them again, and gives what comes after them: the session ends, the next one has them."""
    lab = make_lab(partitions=1)
    for n in range(30):
        lab.delay(10_000, value=b"%05d" % n + bytes(1500))
        lab.clock.advance(0.2)
    session = lab.session(max_bytes=20_000)
    session._source.real.seek = lambda position: None
    lab.turn(session, until=lambda: session.held and session.held < 30)
    lab.delay(10_000)
    with pytest.raises(TransportError, match="was to be read at"):
        lab.turn(session, until=lab.all_back)
    session.close()
    lab.turn(lab.session(), until=lab.all_back)
    lab.check_once(late_ms=15_000)


# -- rebalances --------------------------------------------------------------------------------------------------------


def test_relays_that_come_and_go_move_every_record_once(make_lab, exactly_once):
    lab = make_lab(partitions=4)
    chance = random.Random(7)
    for _ in range(300):
        lab.delay(chance.randint(31_000, 200_000))
        lab.clock.advance(0.1)
    here = [lab.session("one", exactly_once=exactly_once)]
    for step, name in enumerate(["two", "three", "four", "five", "six", "seven"]):
        until_s = 40 + 30 * step
        lab.turn(*here, until=lambda until_s=until_s: lab.clock.monotonic() > until_s)
        here.append(lab.session(name, exactly_once=exactly_once))
        if step % 2:
            here.pop(0).close()
    lab.turn(*here, until=lab.all_back)
    assert all(session.partitions for session in here)
    lab.check_once(late_ms=2500)  # what a rebalance holds up, with four of them that take turns in a thread


@pytest.mark.parametrize("looked", [False, True])
def test_a_member_that_was_put_out_moves_nothing_of_what_it_held(lab, looked):
    """It did not poll for so long that another has its partitions: it sees that, or its transaction is refused."""
    for _ in range(50):
        lab.delay(10_000)
    slow, other = lab.session("slow"), lab.session("other")
    lab.turn(slow, until=lambda: slow.held == 50)
    lab.clock.advance(11)
    lab.turn(other, until=lab.all_back)
    batch = slow._due()
    assert len(batch) == 50
    if looked:  # just before
        for lane in slow._lanes.values():
            lane.round = slow._source.member().round
        slow._move(slow._source, batch)
        assert slow._failures == 1
    else:
        with pytest.raises(TransportError, match="others have gone on"):
            slow._move(slow._source, batch)
        slow.close()
        slow = lab.session("slow")
    for _ in range(20):
        slow.turn()
        other.turn()
    lab.check_once(late_ms=15_000)


def test_a_relay_that_lost_what_it_could_not_move_takes_up_what_comes_later(lab):
    for _ in range(20):
        lab.delay(10_000)
    session = lab.session("w")
    lab.turn(session, until=lambda: session.held == 20)
    lab.fail_next("delivery", DeliveryError("not confirmed", retriable=True))
    lab.turn(session, until=lambda: session.problem)
    other = lab.session("other")
    lab.clock.advance(7)
    lab.turn(other, until=lab.all_back)
    lab.turn(session, until=lambda: session.partitions == 0)
    other.close()
    lab.turn(session, until=lambda: session.partitions == 8)
    session.turn()
    lab.delay(10_000)
    lab.turn(session, until=lab.all_back, most=1000)
    assert session.problem == ""
    lab.check_once(late_ms=20_000)


# -- crashes -----------------------------------------------------------------------------------------------------------

EXACT = [(call, when) for call in ("begin", "produce_all", "send_offsets", "commit") for when in ("before", "after")]
PLAIN = [(call, when) for call in ("deliver", "commit") for when in ("before", "after")]


@pytest.mark.parametrize("heir", ["w", "another"])
@pytest.mark.parametrize(("call", "when"), EXACT)
def test_a_crash_at_any_step_of_a_transaction_loses_and_doubles_nothing(lab, call, when, heir):
    """The same worker comes again, or another takes over when the member is put out and its transaction timed out."""
    for _ in range(40):
        lab.delay(75_000)
    first = lab.session("w")
    lab.turn(first, until=lambda: first.held == 40)

    def crash():
        raise Crash

    lab.at, lab.act = (call, when), crash
    with pytest.raises(Crash):
        lab.turn(first, until=lab.all_back)
    second = lab.session(heir)
    lab.turn(second, until=lab.all_back)
    for _ in range(50):
        second.turn()
    lab.check_once(late_ms=20_000)


@pytest.mark.parametrize(("call", "when"), PLAIN)
def test_a_crash_at_any_step_loses_nothing_at_least_once(lab, call, when):
    for _ in range(40):
        lab.delay(75_000)
    first = lab.session("w", exactly_once=False)
    lab.turn(first, until=lambda: first.held == 40)

    def crash():
        raise Crash

    lab.at, lab.act = (call, when), crash
    with pytest.raises(Crash):
        lab.turn(first, until=lab.all_back)
    second = lab.session("another", exactly_once=False)
    lab.turn(second, until=lambda: set(lab.back()) == set(lab.sent))
    assert max(Counter(lab.back()).values()) <= 2
    if (call, when) in (("deliver", "before"), ("commit", "after")):
        assert max(Counter(lab.back()).values()) == 1


# -- trouble that passes -----------------------------------------------------------------------------------------------


def passing():
    return TransportError("the broker is busy", retriable=True)


def fatal():
    return TransportError("the client broke", extra={"fatal": True})


def unknown():
    return TransportError("no answer")


TROUBLE = {
    "begin passes": ("begin", passing, False),
    "begin fatal": ("begin", fatal, False),
    "produce passes": ("produce", passing, False),
    "delivery timed out": ("delivery", lambda: DeliveryError("not confirmed", retriable=True), False),
    "offsets refused": ("send_offsets", lambda: GroupError("not yours", extra={"abort": True}), False),
    "offsets sent, answer lost": ("send_offsets", passing, True),
    "offsets fatal": ("send_offsets", fatal, False),
    "commit to be aborted": ("end_txn", lambda: TransportError("broken", extra={"abort": True}), False),
    "commit retriable": ("end_txn", passing, False),
    "commit done, retriable": ("end_txn", passing, True),
    "commit not done, unknown": ("end_txn", unknown, False),
    "commit done, unknown": ("end_txn", unknown, True),
    "fenced": ("end_txn", lambda: FencedError("fenced", extra={"fatal": True}), False),
    "poll": ("poll", unknown, False),
    "committed": ("committed", unknown, False),
    "a bug": ("poll", lambda: ZeroDivisionError("a bug"), False),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_relay_gets_over_trouble_without_losing_or_doubling(real_lab, start, trouble, caplog):
    operation, make, applied = TROUBLE[trouble]
    error = make()
    if operation == "committed":
        real_lab.fail_next(operation, error, applied=applied)
    relay = start(real_lab)
    for _ in range(20):
        real_lab.delay(600)
    if operation != "committed":
        real_lab.fail_next(operation, error, applied=applied)
    eventually(real_lab.all_back, 10, "all back")
    for _ in range(5):
        real_lab.delay(300)
    eventually(real_lab.all_back, 10, "later ones too")
    assert relay.status().running
    eventually(lambda: relay.status().problem == "", 5, "no problem any more")
    assert sorted(real_lab.back()) == sorted(real_lab.sent)
    assert all(late >= 0 for late in real_lab.lateness_ms())
    if isinstance(error, ZeroDivisionError):
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("operation", ["delivery", "commit", "poll"])
def test_a_relay_gets_over_trouble_at_least_once(real_lab, start, operation):
    relay = start(real_lab, delivery="at_least_once")
    eventually(lambda: relay.status().partitions == 4)
    for _ in range(20):
        real_lab.delay(300)
    real_lab.fail_next(operation, DeliveryError("not confirmed", retriable=True), times=3)
    eventually(real_lab.all_back, 10, "all back")
    assert sorted(real_lab.back()) == sorted(real_lab.sent)  # what was confirmed is not written again


def test_without_a_broker_it_goes_on_trying_and_says_so_once(real_lab, start, caplog):
    real_lab.fail_next("begin", TransportError("no coordinator answers", retriable=True), times=3)
    real_lab.delay(300)
    relay = start(real_lab)
    eventually(lambda: "no coordinator answers" in relay.status().problem, 5)
    eventually(real_lab.all_back, 15, "back once there is a broker")
    eventually(lambda: relay.status().problem == "", 5)
    assert caplog.text.count("no coordinator answers") == 1


def test_tiers_that_are_made_later_are_taken_up(make_lab, start):
    lab = make_lab(clock=module.RealClock(), tiers=QUICK, create=False)
    relay = start(lab)
    eventually(lambda: relay.status().running)
    lab.create()
    lab.delay(300)
    eventually(lab.all_back, 10)


def test_a_missing_tier_is_waited_for_and_nothing_becomes_a_dead_letter(make_lab):
    lab = make_lab(create=False)
    lab.create(tier_topic(GROUP, "1m"), ORIGIN, DLQ)
    lab.delay(119_000)
    session = lab.session()
    with pytest.raises(TransportError, match=r"shop\.retry\.10s does not exist"):
        lab.turn(session, until=lab.all_back)  # after some patience the session ends, the relay makes another one
    session.close()
    lab.create()
    lab.turn(lab.session(), until=lab.all_back)
    lab.check_once(late_ms=60_000)
    assert lab.records(DLQ) == []


# -- records that nobody takes -----------------------------------------------------------------------------------------


def test_records_for_a_topic_that_is_gone_become_dead_letters_and_hold_up_nobody(lab, exactly_once, caplog):
    for n in range(60):
        lab.delay(10_000, origin="gone" if n % 3 == 0 else ORIGIN, headers=[("user", b"u")])
    session = lab.session(exactly_once=exactly_once)
    lab.turn(session, until=lambda: len(lab.back()) == 40 and len(lab.records(DLQ)) == 20)
    for _ in range(20):
        session.turn()
    assert sorted(lab.back() + [record.value for record in lab.records(DLQ)]) == sorted(lab.sent)
    for record in lab.records(DLQ):
        found = dict(record.headers)
        assert (found["user"], found[names.ORIGIN_TOPIC], found[names.WORKER]) == (b"u", b"gone", b"w")
        assert b"gone does not exist" in found[names.ERROR]
    assert session._plan.moved == {"back": 40, "dead": 20}
    assert caplog.text.count("cannot be moved on") == 1
    assert session.problem == ""


def test_a_record_that_not_even_the_dead_letters_take_leaves_its_coordinates(make_lab, exactly_once):
    """With the headers of a dead letter it is too large."""
    lab = make_lab(max_record_bytes=5000)
    lab.delay(10_000, origin="gone", value=bytes(4880))
    lab.delay(10_000)
    session = lab.session(exactly_once=exactly_once)
    lab.turn(session, until=lambda: lab.records(DLQ) and lab.back())
    (letter,) = lab.records(DLQ)
    (tier,) = {r for r in lab.records(tier_topic(GROUP, "10s")) if r.value == bytes(4880)}
    assert (letter.key, letter.value) == (b"key-0", None)
    where = names.text(letter.headers, names.ORIGIN_TOPIC), names.number(letter.headers, names.ORIGIN_OFFSET)
    assert where == (tier.topic, tier.offset)
    assert lab.back() == [b"1"]


def test_a_record_of_which_nothing_at_all_is_taken_waits_and_is_not_lost(lab, exactly_once):
    """It is tried again after some time, not at once and for ever: the session ends, the next one may do better."""
    lab.delay(10_000)
    lab.fail_next("delivery", ValidationError("not that"), times=12)
    session = lab.session(exactly_once=exactly_once)
    with pytest.raises(Error, match="not that"):
        lab.turn(session, until=lambda: False)
    assert lab.clock.monotonic() > 40
    session.close()
    lab.turn(lab.session(exactly_once=exactly_once), until=lab.all_back)
    lab.check_once(late_ms=60_000)


def test_nonsense_in_a_tier_becomes_a_dead_letter_and_holds_up_nobody(lab, exactly_once):
    out = to_tier(GROUP, ORIGIN, b"k", b"nonsense", [], 10_000)
    lab.put(out._replace(headers=()))
    lab.put(out._replace(headers=[(names.ORIGIN_TOPIC, b"orders"), (names.REMAINING, b"x")]))
    lab.delay(10_000)
    session = lab.session(exactly_once=exactly_once)
    lab.turn(session, until=lambda: len(lab.records(DLQ)) == 2 and lab.back())
    assert lab.back() == [b"0"]
    assert {record.value for record in lab.records(DLQ)} == {b"nonsense"}


def test_without_a_topic_for_dead_letters_such_a_record_waits(make_lab):
    lab = make_lab(create=False)
    lab.create(*tier_topics(GROUP), ORIGIN)
    lab.put(to_tier(GROUP, ORIGIN, b"k", b"nonsense", [], 10_000)._replace(headers=()))
    session = lab.session()
    with pytest.raises(TransportError, match=r"shop\.dlq does not exist"):
        lab.turn(session, until=lambda: False)
    session.close()
    lab.create()
    lab.turn(lab.session(), until=lambda: lab.records(DLQ))


# -- calls that hang ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["send_offsets", "commit"])
def test_a_call_that_hangs_is_left_behind_and_can_do_no_harm_later(real_lab, start, monkeypatch, call):
    """librdkafka#5456. What it left open is ended by the next session, and it is fenced when it comes to."""
    monkeypatch.setattr(module, "_MOVE_S", 0.3)
    released, ended = threading.Event(), threading.Event()

    def hang():
        released.wait(20)
        ended.set()

    relay = start(real_lab)
    eventually(lambda: relay.status().partitions == 4)
    real_lab.at, real_lab.act = (call, "before"), hang
    for _ in range(20):
        real_lab.delay(300)
    eventually(lambda: "hangs" in relay.status().problem, 5)
    eventually(real_lab.all_back, 10, "all back")
    released.set()
    assert ended.wait(5)
    real_lab.delay(300)
    eventually(real_lab.all_back, 10)
    assert sorted(real_lab.back()) == sorted(real_lab.sent)


def test_a_relay_stops_in_time_while_a_call_hangs(real_lab, start, monkeypatch):
    monkeypatch.setattr(module, "_STOPPING_S", 0.3)
    released = threading.Event()
    real_lab.at, real_lab.act = ("send_offsets", "before"), lambda: released.wait(20)
    relay = start(real_lab)
    real_lab.delay(50)
    eventually(lambda: real_lab.hit, 5)
    began = time.monotonic()
    assert relay.stop(5)
    assert time.monotonic() - began < 2
    released.set()


def test_a_relay_that_waits_for_a_coordinator_stops_at_once(real_lab, start):
    released = threading.Event()
    real_lab.at, real_lab.act = ("begin", "before"), lambda: released.wait(20)
    relay = start(real_lab)
    eventually(lambda: real_lab.hit, 5)
    assert relay.status().problem == "it has not found its brokers yet"
    began = time.monotonic()
    assert relay.stop(5)
    assert time.monotonic() - began < 2
    released.set()


# -- offsets that are lost ---------------------------------------------------------------------------------------------


def test_what_was_deleted_too_early_is_told_and_the_rest_comes_back(make_lab, caplog):
    lab = make_lab(partitions=1)
    for _ in range(10):
        lab.delay(10_000)
    session = lab.session()
    lab.turn(session, until=lab.all_back)
    for _ in range(10):
        lab.delay(10_000)
    session.close()
    lab.delete_before(Partition(tier_topic(GROUP, "10s"), 0), 15)
    lab.turn(lab.session(), until=lambda: len(lab.back()) == 15)
    assert set(lab.back()) == set(lab.sent) - {b"10", b"11", b"12", b"13", b"14"}
    assert "deleted before they were due, 10 to 15" in caplog.text


@pytest.mark.parametrize(("policy", "moved"), [("stop", 0), ("earliest", 10), ("latest", 0)])
def test_an_offset_beyond_the_end_is_handled_as_was_said(make_lab, policy, moved, caplog):
    """As when the topic was made anew. The other partitions go on in any case."""
    lab = make_lab(partitions=1)
    tier = tier_topic(GROUP, "10s")
    lab.turn(early := lab.session(), until=lambda: early.partitions == 4)
    early._source.commit([Position(tier, 0, 100)])
    early.close()
    for _ in range(10):
        lab.delay(10_000)
    lab.delay(60_000)
    session = lab.session(on_lost_offset=policy)
    lab.turn(session, until=lambda: len(lab.back()) == moved + 1)
    assert f"has committed offset 100 of {tier}[0]" in caplog.text
    assert ("10s[0]" in session.problem) == (policy == "stop")
    lab.delay(10_000)
    lab.turn(session, until=lambda: lab.clock.monotonic() > 100)
    assert len(lab.back()) == moved + 1 + (policy != "stop")


# -- the thread --------------------------------------------------------------------------------------------------------


def test_a_relay_tells_how_it_does_and_stops_quickly(real_lab, start):
    relay = Relay(real_lab, GROUP, "w", tiers=real_lab.tiers)
    assert not relay.status().running
    assert relay.stop()
    relay = start(real_lab)
    eventually(lambda: relay.status().partitions == 4)
    real_lab.delay(300)
    eventually(lambda: relay.status().held == 1)
    eventually(real_lab.all_back)
    status = eventually(lambda: relay.status().moved and relay.status())
    assert (status.moved, status.problem, status.running) == ({"back": 1}, "", True)
    assert status.turned_s_ago < 2
    began = time.monotonic()
    relay.stop(0)
    assert relay.stop(5)
    assert time.monotonic() - began < 1.5
    assert not relay.status().running


def test_an_idle_relay_turns_a_few_times_a_second_only(real_lab, start, monkeypatch):
    turns = Counter()
    turn = Session.turn
    monkeypatch.setattr(Session, "turn", lambda self: (turns.update("t"), turn(self)))
    relay = start(real_lab)
    eventually(lambda: relay.status().partitions == 4)
    turns.clear()
    time.sleep(1)
    assert turns["t"] <= 3


def test_two_workers_of_one_name_do_not_end_either(real_lab, start, caplog):
    """They fence each other, as the workers themselves do, which notice it and end; what is due comes back once."""
    caplog.set_level(logging.WARNING)
    one, two = start(real_lab, "same"), start(real_lab, "same")
    for _ in range(30):
        real_lab.delay(400)
    eventually(real_lab.all_back, 20)
    assert one.status().running
    assert two.status().running
    assert sorted(real_lab.back()) == sorted(real_lab.sent)
