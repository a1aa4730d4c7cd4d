"""Control: its records, the functions that write them, what a worker knows of them, and the commands. In memory."""

import json
import logging
import threading
import time

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kser import Operation, OperationRegistry, Result, Task, control, headers
from kser.cli.connection import Drivers
from kser.cli.main import cli
from kser.control import (
    Abort,
    Change,
    ControlSet,
    Pause,
    PauseKind,
    WorkerNote,
    control_topic,
    decode,
    find_operation,
    read_control,
)
from kser.errors import ConfigurationError, DeliveryError, TransportError, ValidationError
from kser.events import Event, EventType, events_topic
from kser.operating import OperatingProducer
from kser.testing import FakeClock, eventually
from kser.transport import OutRecord, Partition, Record, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker import control as watching
from kser.worker.control import ControlWatch
from tests.unit.fakes import FakeProducer

GROUP = "shop"
TOPIC = "shop.control"
NOW = 1_700_000_000_000
DAY_MS = 24 * 3600 * 1000


def record(key, value, *, at=NOW, header=None):
    given_headers = () if header is None else ((headers.AT, str(header).encode()),)
    return Record(TOPIC, 0, 0, key.encode() if isinstance(key, str) else key, value, given_headers, at)


def read_back(entry, *, at=NOW):
    out = Change(entry.key, entry).to_record(GROUP)
    return decode(Record(out.topic, 0, 0, out.key, out.value, out.headers, at))


def event(uuid, kind, status, *, run=1, position=0, operation=None, task="shop.Order"):
    return Event(type=kind, uuid=uuid, entrypoint=task, operation=operation, run=run, position=position, status=status)


def started(uuid, run=1):
    return event(uuid, EventType.OPERATION_STARTED, "RUNNING", run=run, operation=uuid)


def ended(uuid, status, run=1):
    return event(uuid, EventType.OPERATION_ENDED, status, run=run, position=3, operation=uuid)


@pytest.fixture
def transport():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name=TOPIC, partitions=1), TopicSpec(name=events_topic(GROUP), partitions=6)])
    return made


@pytest.fixture
def tell(transport):
    """Write events of the group, or changes of its control topic."""
    sink = transport.sink()

    def write(*what):
        outs = [
            one.to_record(GROUP)
            if isinstance(one, Change)
            else OutRecord(events_topic(GROUP), one.key.encode(), raw(one))
            for one in what
        ]
        assert sink.deliver(outs) == []

    def raw(one):
        return one.to_bytes("w1")

    yield write
    sink.close()


@pytest.fixture
def watches(monkeypatch):
    """``watches(transport, ...)`` is a watch that was started; all of them end with the test."""
    monkeypatch.setattr(watching, "_SLICE_S", 0.05)  # so soon
    made = []

    def start(*args, **options):
        watch = ControlWatch(*args, **options)
        made.append(watch)
        watch.start()
        return watch

    yield start
    for watch in made:
        assert watch.stop(10)


@pytest.fixture
def run(transport):
    class InMemory(Drivers):
        pass

    drivers = InMemory(lambda config: transport, lambda config: None)

    def invoke(*args):
        servers = ["--bootstrap-servers", "127.0.0.1:1", "--group", GROUP]
        return CliRunner().invoke(cli, [*map(str, args), *servers], obj=drivers)

    return invoke


# -- the records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        (Abort("3f2a", 2, "ann@build1", NOW, "wrong prices"), "abort:3f2a"),
        (Abort("with:colons and blanks"), "abort:with:colons and blanks"),
        (Abort("\ud800"), "abort:\ud800"),  # JSON may bring such uuids
        (Pause(PauseKind.GROUP, "", "ann", NOW), "pause:group"),
        (Pause(PauseKind.TOPIC, "mails", "ann", NOW, "\U0001f4a4"), "pause:topic:mails"),
        (Pause(PauseKind.TASK, "shop.tasks.Charge"), "pause:task:shop.tasks.Charge"),
        (Pause(PauseKind.WORKER, "host:0"), "pause:worker:host:0"),
    ],
)
def test_what_is_written_is_read_back_under_its_key(entry, key):
    assert entry.key == key
    assert read_back(entry) == Change(key, entry)


@given(uuid=st.text(min_size=1), run=st.integers(1, 2**31), by=st.text(), why=st.text())
def test_any_text_can_be_written(uuid, run, by, why):
    assert read_back(Abort(uuid, run, by, NOW, why)).entry[:2] == (uuid, run)


def test_a_text_that_has_no_utf_8_is_written_with_backslashes():
    assert read_back(Abort("a", 1, "x\udcff", NOW, "y\udcff")).entry == Abort("a", 1, "x\\udcff", NOW, "y\\udcff")


@pytest.mark.parametrize(
    "key",
    [
        None,
        b"",
        b"\xff",
        b"abort:",
        b"abort",
        b"pause:",
        b"pause:topic:",
        b"pause:topic",
        b"pause:group:x",
        b"pause:x:y",
        b"pause:Topic:x",
        b"log-level:w1",
        b"tcpause:group",
    ],
)
def test_a_key_of_no_known_form_says_nothing(key):
    assert decode(record(key, b'{"v":1}')) is None
    assert decode(record(key, None)) is None


@given(st.binary() | st.none(), st.binary() | st.none())
def test_no_bytes_break_the_reading(key, value):
    ControlSet().apply(record(key, value))
    ControlSet().apply(record(b"abort:" + (key or b""), value))


@pytest.mark.parametrize("value", [b"", b"[]", b"nonsense", b'{"v":2,"run":1}', b'{"run":1}', b"\xff"])
def test_a_value_that_cannot_be_read_takes_away_what_held(value):
    """Else who has met what was before would know other things than who comes when it is compacted away."""
    found = ControlSet()
    found.apply(record("abort:a", b'{"v":1}'))
    assert found.apply(record("abort:a", value)) == Change("abort:a", None)
    assert found.aborts == {}


def test_fields_that_are_missing_or_wrong_have_defaults():
    assert decode(record("abort:a", b'{"v":1}')).entry == Abort("a", 1, "", NOW, "")
    odd = b'{"v":1,"run":0,"by":5,"at":"x","why":null,"new":[1]}'
    assert decode(record("abort:a", odd)).entry == Abort("a", 1, "5", NOW, "None")
    assert decode(record("abort:a", b'{"v":1,"run":true}')).entry.run == 1


def test_an_older_run_that_is_aborted_once_more_gives_a_newer_one_no_new_life():
    found = ControlSet()
    for abort in (Abort("a", 3), Abort("a", 1)):
        found.apply(record(abort.key, Change(abort.key, abort).to_record(GROUP).value))
    assert found.aborts["a"].run == 3


def test_only_what_changes_something_is_told_as_a_change():
    found, pause = ControlSet(), Pause(PauseKind.GROUP, "", "ann", NOW)
    value = Change(pause.key, pause).to_record(GROUP).value
    told = [found.apply(record("pause:group", v)) for v in (None, value, value, None, None)]
    assert [change is not None for change in told] == [False, True, False, True, False]


def test_what_takes_out_an_old_abort_leaves_a_younger_one_and_says_so():
    found = ControlSet()
    found.apply(record("abort:a", b'{"v":1,"at":20}'))
    assert found.apply(record("abort:a", None, header=10)) is None
    assert found.aborts["a"].at_ms == 20
    assert set(found.wronged) == {"a"}
    found.apply(record("abort:a", b'{"v":1,"at":20}'))  # written again
    assert found.wronged == {}
    assert found.apply(record("abort:a", None, header=20)) == Change("abort:a", None, 20)
    assert found.aborts == {}


# -- writing -----------------------------------------------------------------------------------------------------------


def test_send_control_raises_what_is_not_confirmed(transport):
    class Refusing:
        def deliver(self, records, timeout_s):
            assert timeout_s == 3
            return [(len(records) - 1, DeliveryError("not confirmed"))]

    with pytest.raises(DeliveryError, match="not confirmed"):
        control.send_control(Refusing(), GROUP, [Change("pause:group", None)], 3)


def test_an_abort_is_durable_when_it_returns_and_says_who_when_and_why(transport, tell):
    tell(started("op-1"))
    before = time.time() * 1000
    answer = control.abort("op-1", group=GROUP, transport=transport, why="wrong prices")
    [written] = transport.records(TOPIC)
    assert decode(written).entry == answer.abort
    assert answer.abort[:3] == ("op-1", 1, control.whoami())
    assert before - 1 <= answer.abort.at_ms <= time.time() * 1000
    assert answer.abort.reason == f"aborted by {control.whoami()}: wrong prices"
    assert answer.progress.status == "RUNNING"
    assert answer.note == ""


def test_an_abort_means_the_newest_run_that_the_events_tell_of(transport, tell):
    tell(started("op-1"), ended("op-1", "FAILED"), started("op-1", run=2), started("other", run=7))
    answer = control.abort("op-1", group=GROUP, transport=transport)
    assert answer.abort.run == 2
    assert answer.progress == control.Progress("op-1", "shop.Order", 2, "RUNNING")


def test_a_run_that_is_given_is_taken_whatever_the_events_tell(transport, tell, monkeypatch):
    tell(started("op-1"), ended("op-1", "FAILED"))
    answer = control.abort("op-1", group=GROUP, transport=transport, run=4, by="cron")
    assert (answer.abort[:3], answer.note) == (("op-1", 4, "cron"), "")

    def unread(*args):
        raise TransportError("not read")

    monkeypatch.setattr(control, "find_operation", unread)
    answer = control.abort("op-1", group=GROUP, transport=transport, run=5)
    assert answer.abort.run == 5
    assert answer.note.endswith("that could not be looked up: not read")


@pytest.mark.parametrize("status", ["SUCCESS", "FAILED", "ABORTED"])
def test_what_has_ended_is_left_alone(transport, tell, status):
    tell(started("op-1"), ended("op-1", status))
    answer = control.abort("op-1", group=GROUP, transport=transport)
    assert answer.abort is None
    assert answer.progress.status == status
    assert answer.note == f"it has ended before: {status}"
    assert transport.records(TOPIC) == []


def test_a_lone_task_is_found_too(transport, tell):
    tell(event("lone-1", EventType.STEP_DONE, "SUCCESS", task="shop.Charge"))
    assert find_operation(transport, GROUP, "lone-1") == control.Progress("lone-1", "shop.Charge", 1, "SUCCESS")


def test_what_no_event_tells_of_is_aborted_in_its_first_run_with_a_note(transport):
    answer = control.abort("op-1", group=GROUP, transport=transport)
    assert (answer.abort.run, answer.progress) == (1, None)
    assert answer.note == "nothing of it is in shop.events yet, so it is taken to be in its first run"


def test_without_an_events_topic_nothing_is_known_and_the_abort_is_written():
    transport = MemoryTransport()
    transport.admin().create([TopicSpec(name=TOPIC, partitions=1)])
    assert control.abort("op-1", group=GROUP, transport=transport).abort.run == 1


def test_events_from_before_partitions_were_added_are_found(transport, tell):
    tell(*(started(f"op-{n}", run=3) for n in range(20)))
    transport.add_partitions(events_topic(GROUP), 17)
    assert {find_operation(transport, GROUP, f"op-{n}").run for n in range(20)} == {3}


@pytest.mark.parametrize("n", range(4))
def test_the_uuid_of_a_step_is_refused_with_that_of_its_operation(transport, tell, n):
    step = f"step-{n}"
    tell(started("op-1"), event(step, EventType.STEP_DONE, "SUCCESS", operation="op-1", task="shop.Charge"))
    with pytest.raises(ValidationError, match=rf"shop\.Charge\[{step}\] is part of operation op-1: name that one"):
        control.abort(step, group=GROUP, transport=transport)
    with pytest.raises(ValidationError, match="name that one"):
        control.abort(step, group=GROUP, transport=transport, run=1)
    assert transport.records(TOPIC) == []


def test_events_that_cannot_be_read_in_time_name_the_way_out(transport):
    sink = transport.sink("tx")
    sink.begin()
    sink.produce_all([OutRecord(events_topic(GROUP), b"op-1", b"{}")])  # and it stays open
    with pytest.raises(TransportError, match=r"Say which run is meant \(run=, --run\)") as failure:
        control.abort("op-1", group=GROUP, transport=transport, timeout_s=0.3)
    assert failure.value.retriable
    sink.abort()
    sink.close()


def test_records_that_are_no_events_are_passed_over(transport, tell):
    sink = transport.sink()
    assert sink.deliver([OutRecord(events_topic(GROUP), b"op-1", value) for value in (b"op-1 nonsense", None)]) == []
    tell(started("op-1", run=2))
    assert find_operation(transport, GROUP, "op-1").run == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda t: control.abort("a", group="ship", transport=t),
        lambda t: control.unabort("a", group="ship", transport=t),
        lambda t: control.pause(group="ship", transport=t),
    ],
)
def test_a_group_without_a_control_topic_is_refused_with_what_to_do(transport, call):
    with pytest.raises(
        ConfigurationError, match=r"Topic ship\.control does not exist.*kser topics create --group ship"
    ):
        call(transport)
    assert transport.records("ship.control") == []


@pytest.mark.parametrize("uuid", ["", " ", " a", "a\n", None, 5])
def test_a_uuid_that_cannot_be_is_refused(transport, uuid):
    with pytest.raises(ValidationError, match="uuid="):
        control.abort(uuid, group=GROUP, transport=transport)


@pytest.mark.parametrize("number", [0, -1, "2", 1.5])
def test_a_run_that_cannot_be_is_refused(transport, number):
    with pytest.raises(ValidationError, match="runs are whole numbers from 1"):
        control.abort("a", group=GROUP, transport=transport, run=number)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"topic": "a/b"}, "is no topic name"),
        ({"topic": ""}, "topic=''"),
        ({"task": " x"}, "task=' x'"),
        ({"worker": ""}, "worker=''"),
        ({"task": "x", "worker": "y"}, "task='x' and worker='y': one of them at a time"),
    ],
)
def test_a_target_that_cannot_be_is_refused(transport, target, said):
    for call in (control.pause, control.resume):
        with pytest.raises(ValidationError, match=said):
            call(group=GROUP, transport=transport, **target)


@pytest.mark.parametrize("target", [{}, {"topic": "mails"}, {"task": "shop.Charge"}, {"worker": "shop-0"}])
def test_what_is_paused_is_so_until_it_is_resumed_and_nothing_else_with_it(transport, target):
    others = [{"topic": "other"}, {"task": "other"}, {"worker": "other"}]
    for other in others:
        control.pause(group=GROUP, transport=transport, **other)
    entry = control.pause(group=GROUP, transport=transport, why="night", **target)
    assert read_control(transport, GROUP).pauses[entry.key] == entry
    assert control.resume(group=GROUP, transport=transport, **target) == entry
    assert len(read_control(transport, GROUP).pauses) == len(others)
    written = len(transport.records(TOPIC))
    assert control.resume(group=GROUP, transport=transport, **target) is None
    assert len(transport.records(TOPIC)) == written


def test_a_sink_that_is_given_is_used_and_left_open(transport):
    sink = transport.sink()
    control.pause(group=GROUP, transport=transport, sink=sink)
    control.resume(group=GROUP, transport=transport, sink=sink)
    control.abort("a", group=GROUP, transport=transport, sink=sink)
    control.unabort("a", group=GROUP, transport=transport, sink=sink)
    assert len(transport.records(TOPIC)) == 4
    assert sink.deliver([OutRecord("x", None, b"")]) == []
    found = read_control(transport, GROUP)
    assert (found.aborts, found.pauses) == ({}, {})


def test_a_group_without_its_topic_has_nothing_paused(transport):
    assert read_control(transport, "ship").pauses == {}
    assert control.resume(group="ship", transport=transport) is None


def test_a_user_without_a_name_is_unknown(monkeypatch):
    def fail():
        raise OSError

    monkeypatch.setattr(control.getpass, "getuser", fail)
    assert control.whoami().startswith("unknown@")


# -- the watch ---------------------------------------------------------------------------------------------------------


def test_all_that_was_there_is_known_once_the_watch_is_ready(transport, tell, watches):
    tell(*(Change(f"abort:op-{n}", Abort(f"op-{n}", 1, "", _now())) for n in range(1200)))  # several polls
    tell(*(Change(f"abort:op-{n}", None) for n in range(0, 1200, 2)))
    pause = control.pause(group=GROUP, transport=transport, topic="mails")
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    assert set(watch.aborts) == {f"op-{n}" for n in range(1, 1200, 2)}
    assert watch.paused_topics == {"mails"}
    assert watch.pauses() == (pause,)
    assert watch.version == 1


def _now():
    return time.time_ns() // 1_000_000


def test_a_watch_is_not_ready_before_it_has_read_to_the_end(transport, watches):
    """A record that a transaction holds back must not be passed over: here the reader has not come to its end."""
    control.abort("op-1", group=GROUP, transport=transport, run=1)
    gate = threading.Event()

    class Slow:
        def __init__(self, reader):
            self._reader = reader
            self.at_end, self.close = reader.at_end, reader.close

        def poll(self, timeout_s, max_records=500):
            return self._reader.poll(timeout_s, max_records) if gate.wait(0.01) else []

    class Held:
        def reader(self, topics, start):
            assert (topics, start) == ([TOPIC], "beginning")
            return Slow(transport.reader(topics, start))

    watch = watches(Held(), GROUP)
    assert not watch.wait_ready(0.1)
    assert watch.aborted("op-1") is None
    gate.set()
    assert watch.wait_ready(10)
    assert watch.aborted("op-1").run == 1


def test_without_a_topic_nothing_holds_until_there_is_one(watches):
    transport = MemoryTransport()
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    assert (watch.version, watch.aborts, watch.pauses()) == (0, {}, ())
    transport.admin().create([TopicSpec(name=TOPIC, partitions=3)])
    control.abort("op-1", group=GROUP, transport=transport, run=1)
    eventually(lambda: watch.aborts)


def test_an_abort_means_its_run_and_those_before_it(transport, watches):
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    assert watch.aborted("op-1") is None
    told = control.abort("op-1", group=GROUP, transport=transport, run=2, why="x").abort
    eventually(lambda: watch.aborts)
    assert [watch.aborted("op-1", run) for run in (1, 2, 3)] == [told, told, None]
    assert watch.aborted_task("op-1") == told
    assert watch.aborted("op-2") is None
    control.unabort("op-1", group=GROUP, transport=transport)
    eventually(lambda: not watch.aborts)


def test_each_change_is_told_once_and_the_version_grows_with_it(transport, watches):
    told = threading.Event()
    seen = []
    watch = watches(transport, GROUP, changed=lambda: (seen.append(watch.version), told.set()))
    assert watch.wait_ready(10)
    assert seen == []
    for n, target in enumerate([{}, {"topic": "mails"}, {"task": "shop.Charge"}, {"worker": "w1"}], 1):
        told.clear()
        control.pause(group=GROUP, transport=transport, **target)
        assert told.wait(10)
        assert seen[-1] == watch.version == n
    assert watch.paused_group
    assert (watch.paused_topics, watch.paused_tasks, watch.paused_workers) == ({"mails"}, {"shop.Charge"}, {"w1"})
    assert all(type(names) is frozenset for names in (watch.paused_topics, watch.paused_tasks, watch.paused_workers))
    before = watch.paused_topics
    control.resume(group=GROUP, transport=transport, topic="mails")
    eventually(lambda: watch.version == 5)
    assert watch.paused_topics == frozenset()
    assert before == {"mails"}  # a snapshot


def test_the_pause_of_a_worker_is_its_own_or_that_of_its_group(transport, watches):
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    own = control.pause(group=GROUP, transport=transport, worker="w1")
    eventually(lambda: watch.version == 1)
    assert (watch.pause_of("w1"), watch.pause_of("w2")) == (own, None)
    group = control.pause(group=GROUP, transport=transport)
    eventually(lambda: watch.version == 2)
    assert (watch.pause_of("w1"), watch.pause_of("w2")) == (group, group)
    control.resume(group=GROUP, transport=transport)
    eventually(lambda: watch.version == 3)
    assert (watch.pause_of("w1"), watch.pause_of("w2")) == (own, None)


def test_records_of_a_newer_release_change_nothing(transport, watches):
    sink = transport.sink()
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    odd = [(b"log-level:w1", b"debug"), (b"pause:queue:x", b'{"v":1}'), (None, b"x"), (b"abort:a", b'{"v":2}')]
    assert sink.deliver([OutRecord(TOPIC, key, value) for key, value in odd]) == []
    control.pause(group=GROUP, transport=transport)
    eventually(lambda: watch.paused_group)
    assert (watch.version, watch.aborts) == (1, {})


class Shaky:
    """A transport whose readers fail as told: ``failures`` are raised one by one, when one is opened or polled."""

    def __init__(self, transport):
        self.transport = transport
        self.failures = []
        self.down = False
        self.opened = 0

    def check(self):
        if self.failures:
            raise self.failures.pop(0)
        if self.down:
            raise TransportError("no broker")

    def reader(self, topics, start):
        self.check()
        self.opened += 1
        return ShakyReader(self, self.transport.reader(topics, start))

    def sink(self):
        return self.transport.sink()


class ShakyReader:
    def __init__(self, shaky, reader):
        self._shaky, self._reader = shaky, reader
        self.at_end, self.close = reader.at_end, reader.close

    def poll(self, timeout_s, max_records=500):
        self._shaky.check()
        return self._reader.poll(0.02, max_records)


def test_a_broker_that_goes_away_takes_nothing_with_it_and_is_told_of_once(transport, watches, monkeypatch, caplog):
    monkeypatch.setattr(watching, "_AGAIN_S", 0.01)
    caplog.set_level(logging.INFO, "kser.worker.control")
    shaky = Shaky(transport)
    control.pause(group=GROUP, transport=transport)
    control.abort("op-1", group=GROUP, transport=transport, run=1)
    watch = watches(shaky, GROUP)
    assert watch.wait_ready(10)
    version = watch.version
    shaky.down = True
    eventually(lambda: watch.problem)
    control.resume(group=GROUP, transport=transport)  # missed
    control.abort("op-2", group=GROUP, transport=transport, run=1)
    shaky.failures = [TransportError("no broker")] * 5
    eventually(lambda: not shaky.failures)
    assert watch.paused_group
    assert watch.aborted("op-1")
    assert watch.version == version
    shaky.down = False
    eventually(lambda: not watch.paused_group)
    assert watch.aborted("op-1")
    assert watch.aborted("op-2")
    assert watch.problem is None
    [said] = [r.message for r in caplog.records if "cannot be read" in r.message]
    assert said.startswith("Topic shop.control cannot be read: what is aborted or paused from now on is not known here")
    assert said.endswith(": no broker")
    assert sum("is read again" in r.message for r in caplog.records) == 1


def test_a_broker_that_comes_late_is_waited_for(transport, watches, monkeypatch):
    monkeypatch.setattr(watching, "_AGAIN_S", 0.01)
    control.abort("op-1", group=GROUP, transport=transport, run=1)
    shaky = Shaky(transport)
    shaky.down = True
    watch = watches(shaky, GROUP)
    assert not watch.wait_ready(0.1)
    shaky.down = False
    assert watch.wait_ready(10)
    assert watch.aborted("op-1")


def test_brokers_that_refuse_are_an_error_for_who_waits_and_are_asked_again(transport, watches, monkeypatch):
    monkeypatch.setattr(watching, "_REFUSED_AGAIN_S", 0.05)
    shaky = Shaky(transport)
    shaky.failures = [ConfigurationError("not allowed")]
    watch = ControlWatch(shaky, GROUP)
    watch.start()
    with pytest.raises(ConfigurationError, match="not allowed"):
        watch.wait_ready(10)
    eventually(lambda: watch.wait_ready(0.1))  # somebody gave the right
    assert watch.stop(10)


def test_an_error_that_nobody_thought_of_ends_nothing(transport, watches, monkeypatch, caplog):
    monkeypatch.setattr(watching, "_AGAIN_S", 0.01)
    shaky = Shaky(transport)
    shaky.failures = [RuntimeError("surprise")]
    watch = watches(shaky, GROUP)
    assert watch.wait_ready(10)
    assert "Reading topic shop.control failed: it is read anew" in caplog.text


def test_the_topic_is_read_anew_now_and_then_so_that_what_was_missed_is_known(transport, watches, monkeypatch):
    """Records without a value are gone after a day: who was cut off meanwhile never sees them."""
    monkeypatch.setattr(watching, "_ANEW_S", 0.05)
    shaky = Shaky(transport)
    control.pause(group=GROUP, transport=transport, topic="mails")
    watch = watches(shaky, GROUP)
    assert watch.wait_ready(10)
    version = watch.version
    opened = shaky.opened
    eventually(lambda: shaky.opened > opened + 2)
    assert watch.version == version  # nothing has changed
    other = MemoryTransport()
    other.admin().create([TopicSpec(name=TOPIC, partitions=1)])
    shaky.transport = other  # as if all of it were gone, with nobody having seen that
    eventually(lambda: not watch.paused_topics)
    assert watch.version == version + 1


def test_aborts_hold_for_their_time_and_are_then_forgotten_and_taken_out(transport, tell, watches, monkeypatch):
    monkeypatch.setattr(watching, "_OLD_EVERY_S", 0.05)
    clock = FakeClock(NOW, auto_advance=False)
    tell(*(Change(f"abort:{n}", Abort(f"{n}", 1, "", NOW - (30 - n) * DAY_MS)) for n in range(-3, 4)))
    tell(Change("pause:group", Pause(PauseKind.GROUP, "", "", NOW - 99 * DAY_MS)))
    watch = watches(transport, GROUP, now_ms=clock.time_ms)
    assert watch.wait_ready(10)
    assert set(watch.aborts) == {"1", "2", "3"}
    assert watch.paused_group
    eventually(lambda: set(read_control(transport, GROUP).aborts) == {"1", "2", "3"})
    clock.advance(24 * 3600)
    eventually(lambda: set(watch.aborts) == {"2", "3"})
    eventually(lambda: set(read_control(transport, GROUP).aborts) == {"2", "3"})
    assert read_control(transport, GROUP).pauses
    written = len(transport.records(TOPIC))
    eventually(lambda: not watch._known.expired)
    assert written == 8 + 5  # each was taken out once


def test_a_watch_that_may_not_clean_writes_nothing(transport, tell, watches, monkeypatch):
    monkeypatch.setattr(watching, "_OLD_EVERY_S", 0.01)
    tell(Change("abort:old", Abort("old", 1, "", NOW)))
    watch = watches(transport, GROUP, clean=False)
    assert watch.wait_ready(10)
    looked = watch._look_at
    eventually(lambda: watch._look_at > looked)
    assert watch.aborts == {}
    assert len(transport.records(TOPIC)) == 1


def test_an_abort_that_comes_while_an_old_one_is_taken_out_holds_and_is_written_again(transport, tell, watches):
    """Compaction would leave only the record that took the old one out."""
    now = _now()
    tell(Change("abort:a", Abort("a", 1, "", now - 31 * DAY_MS)))
    tell(Change("abort:a", Abort("a", 2, "ann", now)))
    tell(Change("abort:a", None, now - 31 * DAY_MS))
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    assert watch.aborted("a", 2)
    last = eventually(lambda: (records := transport.records(TOPIC)) and len(records) == 4 and records[-1])
    assert decode(last).entry == Abort("a", 2, "ann", now)
    eventually(lambda: not watch._known.wronged)
    assert watch.aborted("a", 2)


def test_what_cannot_be_cleaned_is_no_trouble(transport, tell, watches, monkeypatch, caplog):
    monkeypatch.setattr(watching, "_OLD_EVERY_S", 0.01)
    caplog.set_level(logging.INFO, "kser.worker.control")

    class Refusing(Shaky):
        def sink(self):
            class Sink:
                def deliver(self, records, timeout_s):
                    return [(0, DeliveryError("not allowed"))]

                def close(self, timeout_s):
                    pass

            return Sink()

    tell(Change("abort:old", Abort("old", 1, "", NOW)))
    watch = watches(Refusing(transport), GROUP)
    assert watch.wait_ready(10)
    eventually(lambda: "could not be cleaned: not allowed" in caplog.text)
    control.pause(group=GROUP, transport=transport)
    eventually(lambda: watch.paused_group)


def test_what_is_told_is_logged_with_who_and_why(transport, watches, caplog):
    caplog.set_level(logging.INFO, "kser.worker.control")
    watch = watches(transport, GROUP)
    assert watch.wait_ready(10)
    calls = {"group": GROUP, "transport": transport}
    control.abort("op-1", run=2, by="ann", why="wrong prices", **calls)
    control.unabort("op-1", **calls)
    control.pause(topic="mails", by="bob", **calls)
    control.resume(topic="mails", **calls)
    control.pause(by="bob", **calls)
    eventually(lambda: watch.paused_group)
    assert [r.message for r in caplog.records] == [
        "Told: op-1 up to run 2 is aborted by ann: wrong prices",
        "Told: op-1 is aborted no more",
        "Told: the topic mails is paused by bob",
        "Told: the topic mails goes on",
        "Told: the group is paused by bob",
    ]


def test_stop_ends_the_thread_soon_and_may_be_called_again_and_without_start(transport):
    never = ControlWatch(transport, GROUP)
    assert never.stop(0)
    watch = ControlWatch(transport, GROUP)
    watch.start()
    assert watch.wait_ready(10)
    began = time.monotonic()
    assert watch.stop(5)
    assert time.monotonic() - began < 2
    assert watch.stop(0)
    with pytest.raises(RuntimeError):
        watch.start()


def test_who_waits_for_a_watch_that_is_stopped_waits_no_longer(transport):
    shaky = Shaky(transport)
    shaky.down = True
    watch = ControlWatch(shaky, GROUP)
    watch.start()
    threading.Timer(0.1, watch.stop).start()
    began = time.monotonic()
    assert not watch.wait_ready(30)
    assert time.monotonic() - began < 10
    assert watch.stop(10)


def test_a_time_that_cannot_be_is_refused(transport):
    with pytest.raises(ConfigurationError, match="it must be more than 0"):
        ControlWatch(transport, GROUP, keep_s=0)


# -- the commands ------------------------------------------------------------------------------------------------------


def test_the_command_abort_says_what_it_told(run, transport, tell):
    tell(started("op-1", run=2))
    result = run("abort", "op-1", "--why", "wrong prices")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "The workers are told: shop.Order[op-1] is aborted, up to its run 2\n"
    assert read_control(transport, GROUP).aborts["op-1"].why == "wrong prices"


def test_the_command_abort_in_json(run, tell):
    tell(started("op-1"))
    result = run("abort", "op-1", "--run", 3, "--why", "x", "--format", "json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert isinstance(shown.pop("at"), int)
    assert shown == {
        "uuid": "op-1",
        "entrypoint": None,
        "run": 3,
        "told": True,
        "by": control.whoami(),
        "why": "x",
        "status": None,
        "note": "",
    }


def test_the_command_abort_notes_what_nobody_has_heard_of(run):
    result = run("abort", "op-1")
    assert result.exit_code == 0
    assert result.stdout == "The workers are told: op-1 is aborted, up to its run 1\n"
    assert "kser: nothing of it is in shop.events yet" in result.stderr


@pytest.mark.parametrize("more", [[], ["--wait"], ["--wait", "--run", "1"]])
def test_the_command_abort_fails_for_what_has_ended_otherwise(run, tell, more):
    tell(started("op-1"), ended("op-1", "SUCCESS"))
    result = run("abort", "op-1", *more)
    assert result.exit_code == 1
    assert result.stderr == "kser: error: shop.Order[op-1] ended before it could be aborted: SUCCESS\n"


@pytest.mark.parametrize("more", [[], ["--wait"]])
def test_the_command_abort_is_content_with_what_is_aborted_already(run, tell, more):
    tell(started("op-1"), ended("op-1", "ABORTED"))
    result = run("abort", "op-1", *more)
    assert (result.exit_code, result.stdout) == (0, "shop.Order[op-1] is ABORTED already\n")


@pytest.mark.parametrize(("status", "code"), [("ABORTED", 0), ("SUCCESS", 1), ("FAILED", 1)])
@pytest.mark.parametrize("output", ["human", "json"])
def test_the_command_abort_waits_for_the_end(run, transport, tell, status, code, output):
    tell(started("op-1"), ended("op-0", "FAILED"))

    def worker():
        eventually(lambda: transport.records(TOPIC), 20)
        tell(ended("op-2", "ABORTED"), ended("op-1", "FAILED", run=2), ended("op-1", status))

    thread = threading.Thread(target=worker)
    thread.start()
    result = run("abort", "op-1", "--wait", "--timeout", 30, "--format", output)
    thread.join()
    assert result.exit_code == code, result.output
    if output == "human":
        assert result.stdout.splitlines()[-1] == f"shop.Order[op-1] {status}"
    else:
        assert json.loads(result.stdout)["status"] == status
    assert (f"ended before it could be aborted: {status}" in result.stderr) is bool(code)


def test_the_command_abort_gives_up_and_says_what_goes_on(run, tell, monkeypatch):
    monkeypatch.setattr("kser.cli.control._HINT_AFTER_S", 0.1)
    tell(started("op-1"))
    result = run("abort", "op-1", "--wait", "--timeout", 1)
    assert result.exit_code == 1
    assert "kser: It has not ended for 0.1 s" in result.stderr
    assert "shop.Order[op-1] has not ended within 1 s. The workers are told" in result.stderr


def test_pause_resume_and_paused_tell_what_they_did(run, transport):
    transport.admin().create([TopicSpec(name="mails", partitions=1)])
    assert run("paused").stdout == "Nothing of group shop is paused\n"
    for args, said in [
        (["--why", "move\x1b[2J"], "Group shop is paused. It goes on with: kser resume --group shop\n"),
        (
            ["--topic", "mails"],
            "Topic mails of group shop is paused. It goes on with: kser resume --group shop --topic ",
        ),
        (["--task", "shop.Charge"], "Task shop.Charge of group shop is paused."),
        (
            ["--worker", "w 1"],
            "Worker w 1 of group shop is paused. It goes on with: kser resume --group shop --worker '",
        ),
    ]:
        result = run("pause", *args)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(said)
    lines = run("paused").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["WHAT", "NAME"],
        ["group", "shop"],
        ["worker", "w"],
        ["topic", "mails"],
        ["task", "shop.Charge"],
    ]
    assert lines[1].endswith(f"{control.whoami()}  move\ufffd[2J")  # and the terminal is not cleared
    result = run("resume", "--worker", "w 1")
    assert result.stdout.startswith("Worker w 1 of group shop goes on. It was paused 20")
    assert result.stderr == "kser: still paused: group shop, topic mails, task shop.Charge\n"
    again = run("resume", "--worker", "w 1")
    assert (again.exit_code, again.stdout) == (0, "Nothing of the kind was paused\n")
    shown = json.loads(run("paused", "--format", "json").stdout)
    assert [(entry["kind"], entry["name"]) for entry in shown["paused"]] == [
        ("group", ""),
        ("topic", "mails"),
        ("task", "shop.Charge"),
    ]
    done = json.loads(run("resume", "--format", "json").stdout)
    assert (done["resumed"]["kind"], len(done["paused"])) == ("group", 2)
    assert json.loads(run("pause", "--format", "json").stdout)["kind"] == "group"


def test_a_pause_of_a_topic_that_is_not_there_says_so(run):
    result = run("pause", "--topic", "mials")
    assert result.exit_code == 0
    assert result.stderr == "kser: there is no topic mials yet\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["abort"], "Missing argument 'UUID'"),
        (["abort", ""], "uuid=''"),
        (["abort", "x", "--run", "0"], "--run"),
        (["pause", "--topic", "a", "--task", "b"], "topic='a' and task='b': one of them at a time"),
        (["pause", "--topic", "a/b"], "is no topic name"),
        (["resume", "--worker", ""], "worker=''"),
        (["pause", "--group", "ship"], "Topic ship.control does not exist"),
    ],
)
def test_misuse_is_told_in_one_line_with_exit_code_2(transport, args, said):
    class InMemory(Drivers):
        pass

    servers = ["--bootstrap-servers", "127.0.0.1:1"]
    servers += [] if "--group" in args else ["--group", GROUP]
    drivers = InMemory(lambda config: transport, lambda config: None)
    result = CliRunner().invoke(cli, [*args, *servers], obj=drivers)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    assert said in line


def test_where_messages_are_sent_is_not_what_is_paused(run, transport, monkeypatch):
    monkeypatch.setenv("KSER_TOPIC", "shop")
    assert run("pause").stdout.startswith("Group shop is paused")


# -- uuids that begin so -----------------------------------------------------------------------------------------------

ONE, TWO = "3f2a1c9e-6b1d-4c55-9d0e-2f1d6a7b8c90", "3f2a1c9e-0000-4c55-9d0e-2f1d6a7b8c90"


def test_a_uuid_may_be_shortened_to_what_a_list_shows(run, transport, tell):
    tell(started(ONE))
    result = run("abort", ONE[:8])
    assert result.exit_code == 0
    assert result.stdout == f"The workers are told: shop.Order[{ONE}] is aborted, up to its run 1\n"
    assert [decode(record).entry.uuid for record in transport.records(TOPIC)] == [ONE]


def test_what_no_uuid_begins_with_is_not_aborted_by_that_name(run, transport, tell):
    tell(started(ONE), started("deadbeef"))
    result = run("abort", "3f2a1c9f")
    assert (result.exit_code, transport.records(TOPIC)) == (1, [])
    assert "Nothing that begins with 3f2a1c9f is told of: give the whole uuid to abort it" in result.stderr
    assert run("abort", "deadbeef").exit_code == 0  # it is called just that
    assert [decode(record).entry.uuid for record in transport.records(TOPIC)] == ["deadbeef"]


def test_what_several_uuids_begin_with_is_refused_with_all_of_them(run, transport, tell):
    tell(started(ONE), started(TWO))
    result = run("abort", ONE[:9])
    assert result.exit_code == 2
    assert f"2 uuids begin with {ONE[:9]}: {TWO}, {ONE}. Give more of the one you mean" in result.stderr
    assert transport.records(TOPIC) == []
    assert control.complete_uuid(transport, GROUP, ONE[:10].upper()) == ONE
    many = [f"3f2a1c9e-{n:04}-4c55-9d0e-2f1d6a7b8c90" for n in range(9)]
    with pytest.raises(ValidationError, match=r"and 4 more\. Give more"):
        control.only_one("3f2a1c9e", many)


@pytest.mark.parametrize("begin", [ONE[:7], ONE, "order 7 of ann", "3f2a1c9f"])
def test_what_is_no_begin_of_a_uuid_is_taken_as_it_is(transport, tell, begin):
    tell(started(ONE), started(TWO))
    assert control.complete_uuid(transport, GROUP, begin) == begin


# -- what workers tell of themselves -----------------------------------------------------------------------------------


def note(name, *entrypoints, **more):
    return WorkerNote.of(name, entrypoints, more.pop("itinerary", 1), more.pop("at_ms", _now()))


def told(transport, *notes):
    control.send_control(transport.sink(), GROUP, [Change(it.key, it) for it in notes])


def test_what_a_worker_tells_is_read_as_it_was_written(transport):
    written = note("w1", "shop.Charge", "shop.Mail", itinerary=2)
    told(transport, written, note("w2"))
    found = read_control(transport, GROUP).workers_at(_now())
    assert found[0] == written
    assert [it.name for it in found] == ["w1", "w2"]
    assert read_control(transport, GROUP).workers_at(_now() + 2 * 24 * 3600 * 1000) == []


def test_a_worker_with_very_many_names_tells_the_first_of_them():
    large = note("w1", *(f"shop.tasks.Task{n:05}" for n in range(5000)))
    assert not large.complete
    assert 500 < len(large.entrypoints) < 1000
    record = Change(large.key, large).to_record(GROUP)
    assert len(record.value) < control.NOTE_BYTES + 200


def test_a_watch_tells_of_its_worker_as_long_as_it_runs_and_wakes_nobody(transport, watches):
    woken = []
    one = watches(
        transport, GROUP, changed=lambda: woken.append(1), note=lambda at_ms: note("w1", "shop.Charge", at_ms=at_ms)
    )
    assert one.wait_ready(10)
    eventually(lambda: [it.name for it in one.workers()] == ["w1"])
    other = watches(transport, GROUP, note=lambda at_ms: note("w2", "shop.Mail", "shop.Male", itinerary=2, at_ms=at_ms))
    eventually(lambda: [it.name for it in one.workers()] == ["w1", "w2"])
    assert one.who_could_run("shop.Mail", 1) == "w2 can run it"
    assert one.who_could_run("shop.Mail", 3) == "no worker of the group can run it"
    assert one.who_could_run("shop.Chrage", 1).startswith("no worker of the group can run it; they know shop.Charge")
    assert other.stop(10)
    eventually(lambda: [it.name for it in one.workers()] == ["w1"])
    assert one.who_could_run("shop.Mail", 1).startswith("no worker of the group can run it")
    assert (woken, one.version) == ([], 0)
    told(transport, *(note(f"x{n}", "shop.New") for n in range(5)))
    eventually(lambda: one.who_could_run("shop.New", 1) == "x0, x1, x2 and 2 more can run it")
    large = note("y", *(f"shop.tasks.Task{n:05}" for n in range(5000)))
    told(transport, large)
    eventually(lambda: "tells that it" in one.who_could_run("zzz", 1))


def test_a_worker_whose_note_is_taken_out_with_an_old_one_of_its_name_tells_again(transport, watches):
    one = watches(transport, GROUP, note=lambda at_ms: note("w1", at_ms=at_ms))
    eventually(lambda: one.workers())
    control.send_control(transport.sink(), GROUP, [Change("worker:w1", None)])
    eventually(lambda: len(transport.records(TOPIC)) == 3 and one.workers())


def test_a_worker_that_ended_without_a_word_is_taken_out_after_a_day(transport, watches, monkeypatch):
    monkeypatch.setattr("kser.worker.control._OLD_EVERY_S", 0)
    told(transport, note("old", at_ms=_now() - 25 * 3600 * 1000), note("new"))
    one = watches(transport, GROUP)
    assert one.wait_ready(10)
    assert [it.name for it in one.workers()] == ["new"]
    eventually(lambda: [it.name for it in read_control(transport, GROUP).workers.values()] == ["new"])


def test_where_there_is_no_topic_nobody_tells_and_none_is_made(watches):
    transport = MemoryTransport()
    one = watches(transport, GROUP, note=lambda at_ms: note("w1", at_ms=at_ms))
    assert one.wait_ready(10)
    one.stop(10)
    assert transport.records(TOPIC) == []
    assert one.who_could_run("shop.Charge", 1) == ""


def test_the_command_workers_lists_what_each_knows(run, transport):
    assert run("workers").stdout == "No worker of group shop has told of itself within 60 s\n"
    told(transport, note("w1", "shop.Mail", "shop.Charge"), note("w2", *(f"shop.T{n}" for n in range(9))))
    lines = run("workers").stdout.splitlines()
    assert lines[1].split()[:4] == ["w1", "silent", "0", "s"]
    assert lines[2] == "  knows shop.Charge, shop.Mail"
    assert lines[4] == "  knows shop.T0, shop.T1, shop.T2, shop.T3, shop.T4 and 4 more"
    shown = json.loads(run("workers", "--format", "json").stdout)
    assert shown[0]["entrypoints"] == ["shop.Charge", "shop.Mail"]


def test_a_pause_of_a_class_that_no_worker_knows_says_so(run, transport):
    told(transport, note("w1", "shop.Charge"))
    result = run("pause", "--task", "shop.Chrage")
    assert result.exit_code == 0
    assert result.stderr == "kser: no worker knows a class shop.Chrage. Is shop.Charge meant?\n"
    assert run("pause", "--task", "x").stderr.endswith("`kser workers` lists what they know\n")
    assert run("pause", "--task", "shop.Charge").stderr == ""


def test_the_topic_of_a_group_is_named_after_it():
    assert control_topic("shop") == TOPIC
    assert Partition(TOPIC, 0).topic == TOPIC


def test_a_task_and_a_producer_can_name_the_run_that_they_abort(transport, tell):
    producer = OperatingProducer(transport)
    registry = OperationRegistry(producer=producer, topic="work")

    @registry.task(name="shop.Charge")
    def charge():
        pass

    tell(started("op-1"), ended("op-1", "FAILED"))
    assert producer.abort("op-1", group=GROUP).retcode == 409
    assert producer.abort("op-1", group=GROUP, run=2).retval == {"run": 2}
    assert charge(uuid="lone-1").abort(group=GROUP, run=3, why="night").retval == {"run": 3}
    assert [decode(record).entry[:2] for record in transport.records(TOPIC)] == [("op-1", 2), ("lone-1", 3)]
    producer.close()


# -- abort() of an object: D-23 to D-25 --------------------------------------------------------------------------------


class Telling(FakeProducer):
    """A producer that can abort and resume, and answers as it is told."""

    def __init__(self, answer=0):
        super().__init__()
        self.answer, self.asked = answer, []

    def abort(self, uuid, **options):
        self.asked.append(("abort", uuid, options["group"]))
        return Result(uuid=uuid, retcode=self.answer)

    def resume(self, uuid, **options):
        self.asked.append(("resume", uuid, options["group"]))
        return Result(uuid=uuid, retval={"run": 2})


def called_off(kind, hooks):
    class Step(Task):
        def run(self):
            hooks.append("run")

        def onerror(self, result):
            hooks.append("onerror")

    class Order(Operation):
        def build_tasks(self):
            return [Step(), Step()]

        def onerror(self, result):
            hooks.append("onerror")

    return (Step if kind == "task" else Order)()


@pytest.mark.parametrize("kind", ["task", "operation"])
def test_what_was_aborted_before_it_was_executed_is_not_run(kind):
    hooks, producer = [], Telling()
    made = called_off(kind, hooks)
    assert made.aborted is None
    for _ in range(2):  # once more changes nothing
        assert made.abort(group=GROUP, producer=producer).retcode == 0
        assert made.aborted == "aborted"
    assert producer.asked == [("abort", made.uuid, GROUP)] * 2
    with pytest.raises(AttributeError):
        made.aborted = None
    for _ in range(2):
        result = made.execute()
        assert (result.retcode, made.status) == (409, "ABORTED")
        assert "was aborted" in result.stderr
    assert hooks == []


def test_what_the_workers_refuse_to_abort_is_not_aborted_here():
    hooks = []
    made = called_off("task", hooks)
    assert made.abort(group=GROUP, producer=Telling(answer=409)).retcode == 409
    assert made.aborted is None
    assert made.execute().retcode == 0


def test_without_a_producer_it_is_aborted_here_and_said_that_nobody_else_knows():
    made = called_off("task", [])
    with pytest.raises(ConfigurationError, match="give producer="):
        made.abort()
    assert (made.execute().retcode, made.status) == (409, "ABORTED")


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("raises", [False, True])
def test_a_task_that_runs_in_this_process_sees_it_and_is_aborted_whatever_it_gives(hooked, raises):
    hooks = []

    class Step(Task):
        def run(self):
            self.abort(group=GROUP, producer=Telling())
            assert self.aborted == "aborted"
            if raises:
                raise ValueError("gave up")

    if hooked:
        Step.onsuccess = Step.onerror = lambda self, result: hooks.append(result)
    step = Step()
    assert (step.execute().retcode, step.status, hooks) == (409, "ABORTED", [])


def test_an_operation_that_runs_in_this_process_starts_nothing_more():
    ran = []

    class Step(Task):
        def run(self):
            ran.append(self.params["n"])
            if self.params["n"] == 1:
                order.abort(group=GROUP, producer=Telling())

    class Order(Operation):
        def build_tasks(self):
            return [Step(params={"n": n}) for n in range(4)]

    order = Order()
    assert (order.execute().retcode, order.status, ran) == (409, "ABORTED", [0, 1])


def test_operation_resume_needs_no_class_but_a_producer():
    producer = Telling()
    assert Operation.resume("u-1", group=GROUP, producer=producer).retval == {"run": 2}
    assert producer.asked == [("resume", "u-1", GROUP)]
    with pytest.raises(ConfigurationError, match="give producer="):
        Operation.resume("u-1")
