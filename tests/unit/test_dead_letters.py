"""Dead letters: how one is made, and what can be done with them, on memory: list, show, replay, resume, purge."""

import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kser import Message, Operation, OperationRegistry, Result, Task, control, headers, results
from kser.cli.connection import Drivers
from kser.cli.letters_view import table
from kser.cli.main import cli
from kser.dead_letters import DeadLetters
from kser.errors import (
    AbortedError,
    ConfigurationError,
    DeliveryError,
    NotFound,
    StatusError,
    TransportError,
    ValidationError,
)
from kser.events import Event, EventType, OperationView, read
from kser.producer import BaseProducer
from kser.sequencing.itinerary import METADATA_KEY
from kser.transport import OutRecord, Partition, Position, Record, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.dead_letters import LEAST_BYTES, LEFT_OUT, MAX_BYTES, dead_letter
from kser.worker.runner import Runner
from kser.worker.state import StateStore, owner_of, state_topic
from kser.worker.tiers import coordinates
from tests.unit.test_contracts_messages import Reversed

GROUP, TOPIC, DLQ = "g", "work", "g.dlq"
NOW = 1_790_000_000_000


# -- how one is made ---------------------------------------------------------------------------------------------------


def raised(error, uuid="u"):
    try:
        raise error
    except type(error) as exc:
        return results.from_exception(exc, uuid)


def made(value=b"v", key=b"k", own=(), error=None, **options):
    record = Record(TOPIC, 3, 41, key, value, list(own), 1234)
    error = raised(ValueError("no such card")) if error is None else error
    return dead_letter(record, DLQ, error=error, **{"group": GROUP, "worker": "w1", "now_ms": NOW} | options)


def own_size(record):
    """Bytes as Kafka clients count them: key, value, names and values of headers."""
    return sum(len(part or b"") for part in (record.key, record.value)) + sum(
        len(name.encode()) + len(value or b"") for name, value in record.headers
    )


def test_a_letter_keeps_key_bytes_and_headers_and_says_what_failed_where_and_why():
    letter = made(b"\xff\x00", b"k", [("traceparent", b"00-1"), ("empty", None)], attempt=3)
    assert letter[:3] == (DLQ, b"k", b"\xff\x00")
    assert letter.headers[:2] == [("traceparent", b"00-1"), ("empty", None)]
    told = dict(letter.headers[2:])
    trace = told.pop(headers.TRACE).decode()
    assert trace.startswith("Traceback")
    assert trace.endswith("ValueError: no such card\n")
    assert told == {
        headers.ORIGIN_TOPIC: b"work",
        headers.ORIGIN_PARTITION: b"3",
        headers.ORIGIN_OFFSET: b"41",
        headers.ORIGIN_TIMESTAMP: b"1234",
        headers.ATTEMPT: b"3",
        headers.AT: b"%d" % NOW,
        headers.WORKER: b"w1",
        headers.GROUP: b"g",
        headers.ERROR_TYPE: b"ValueError",
        headers.ERROR: b"no such card",
    }


def test_of_the_headers_of_its_delivery_a_letter_keeps_those_that_count():
    gone = [
        (name, b"1")
        for name in (
            *(headers.REMAINING, headers.DUE, headers.NOT_BEFORE, headers.WAITING, headers.REASON, headers.CLAIM),
            *(headers.ATTEMPT, headers.GROUP, headers.ERROR, headers.TRACE, headers.ORIGIN_OFFSET, LEFT_OUT),
        )
    ]
    kept = [(headers.REDRIVE, b"2"), (headers.FIRST_FAILURE, b"77")]
    letter = made(own=[*gone, *kept])
    names = [name for name, _ in letter.headers]
    assert len(names) == len(set(names))
    assert {headers.REDRIVE, headers.FIRST_FAILURE} <= set(names)
    assert not {headers.REMAINING, headers.DUE, headers.NOT_BEFORE, headers.WAITING, headers.REASON, headers.CLAIM,
                LEFT_OUT} & set(names)  # fmt: skip
    assert dict(letter.headers)[headers.ORIGIN_OFFSET] == b"41"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (Result(retcode=7, stderr="not now"), "retcode 7", "not now"),
        (raised(ConfigurationError("which one?")), "ConfigurationError", "which one?"),
        (KeyError("x"), "KeyError", "'x'"),
        (Result(retcode=1, retval={"error": "of somebody else's making"}), "retcode 1", ""),
        (Result(retcode=1, retval={"error": {"extra": [], "name": 5, "message": {"a": 1}}}), "5", "{'a': 1}"),
    ],
)
def test_the_error_is_told_whoever_made_it(error, kind, said):
    letter = made(error=error)
    assert headers.text(letter.headers, headers.ERROR_TYPE) == kind
    assert headers.text(letter.headers, headers.ERROR) == said


def test_secrets_in_the_error_are_not_shown():
    letter = made(error=Result(retcode=1, stderr="login failed: password=hunter2, user=ann"))
    assert headers.text(letter.headers, headers.ERROR) == "login failed: password=********, user=ann"


def test_long_texts_are_cut_between_characters_and_a_traceback_in_its_middle():
    error = raised(ValueError("é" * 5000))
    error.retval["error"]["stack"] = "first line\n" + "é\n" * 9000 + "last line"
    letter = made(error=error)
    said, trace = (headers.value_of(letter.headers, name) for name in (headers.ERROR, headers.TRACE))
    assert len(said) <= 1024
    assert said.decode().rstrip(".") == "é" * 510
    assert 8000 < len(trace) <= 8192
    assert trace.decode().startswith("first line\n")
    assert trace.decode().endswith("\nlast line")


def test_what_does_not_fit_goes_the_dearest_last():
    small = made(b"v" * 1000, own=[("mine", b"h" * 1000)])
    error = raised(ValueError("e" * 1000))
    error.retval["error"]["stack"] = "t" * 8000

    def names(limit, value=b"v" * 20_000):
        letter = made(value, own=[("mine", b"h" * 3000)], error=error, max_bytes=limit)
        assert own_size(letter) <= limit
        there = [name for name in ("mine", headers.ERROR, headers.TRACE) if headers.value_of(letter.headers, name)]
        return there, letter.value == value, headers.text(letter.headers, LEFT_OUT)

    assert headers.value_of(small.headers, LEFT_OUT) is None
    assert names(MAX_BYTES) == (["mine", headers.ERROR, headers.TRACE], True, "")
    assert names(30_000) == (["mine", headers.ERROR], True, "")
    assert names(24_000) == (["mine"], True, "")
    assert names(22_000) == ([headers.ERROR], True, "headers")
    assert names(20_000) == ([headers.ERROR, headers.TRACE], False, "value")
    assert names(LEAST_BYTES) == ([headers.ERROR], False, "value")


def test_a_value_that_is_left_out_is_replaced_by_where_it_is_and_what_was_in_it():
    metadata = {METADATA_KEY: {"v": 1, "run": 2, "position": 4, "ops": [{"uuid": "op", "entrypoint": "shop.Order"}]}}
    kmsg = Message("u-1", "shop.Charge", {"big": "x" * 2_000_000}, metadata=metadata)
    raw = kmsg.to_bytes()
    letter = made(raw, kmsg=kmsg)
    assert json.loads(letter.value) == {
        "kser": "value too large",
        "topic": TOPIC,
        "partition": 3,
        "offset": 41,
        "size": len(raw),
        "uuid": "u-1",
        "entrypoint": "shop.Charge",
        "operation": "op",
        "run": 2,
        "position": 4,
    }
    assert f"{len(raw)} bytes" in headers.text(letter.headers, headers.REASON)


#: Values up to the largest that Kafka takes are made of these.
blocks = st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=30), st.integers(0, 60_000))
anything = st.none() | st.binary(max_size=100) | blocks
any_name = st.text(max_size=20) | st.sampled_from([v for k, v in vars(headers).items() if k.isupper()])
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
any_error = st.builds(
    lambda retcode, stderr, error: Result(retcode=retcode, stderr=stderr, retval={"error": error}),
    st.integers(),
    st.text(max_size=3000),
    json_like
    | st.fixed_dictionaries(
        {}, optional={"extra": json_like, "name": json_like, "message": json_like, "stack": st.text(max_size=200)}
    ),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    key=anything,
    value=anything,
    own=st.lists(st.tuples(any_name, anything), max_size=4),
    error=any_error,
    metadata=st.dictionaries(st.just(METADATA_KEY), json_like),
    name=st.text(max_size=300),
    numbers=st.tuples(st.integers(), st.integers(0, 2**63), st.integers()),
    limit=st.integers(LEAST_BYTES, 1_200_000),
)
def test_a_letter_can_be_made_of_anything_and_is_never_too_large(
    key, value, own, error, metadata, name, numbers, limit
):
    record = Record(name, numbers[0], numbers[1], key, value, own, numbers[2])
    kmsg = Message(name or "u", name, metadata=metadata)
    letter = dead_letter(
        record, DLQ, error=error, kmsg=kmsg, attempt=numbers[0], group=name, worker=name, now_ms=1, max_bytes=limit
    )
    assert own_size(letter) <= limit
    assert letter.value == value or orjson.loads(letter.value)["size"] == len(value or b"")
    assert letter.key in (key, None)
    if own_size(record) < limit - 16_000:
        assert (letter.key, letter.value) == (key, value)
        mine = [header for header in own if not header[0].startswith("kser-")]
        assert [header for header in letter.headers if not header[0].startswith("kser-")] == mine


# -- a group without threads -------------------------------------------------------------------------------------------


class Shop:
    """A group on memory whose one worker runs when it is told to; it writes dead letters and honours claims."""

    def __init__(self, transport, registry, message=Message):
        self.transport = transport
        self.registry = registry
        self.letters = DeadLetters(transport, GROUP, message=message)
        self.clock = NOW
        self._runner = Runner(registry.controller, GROUP, "w1")
        self._done = {}
        self._sink = transport.sink()
        self._store = StateStore(transport, GROUP)
        self.duplicates = 0
        #: What the next failures of tasks are, in place of their own: exceptions.
        self.claims = set()

    def run(self):
        """Run all there is; what each record became."""
        kinds = []
        while todo := [r for r in self.transport.records(TOPIC) if r.offset >= self._done.get(r.partition, 0)]:
            for record in todo:
                self._done[record.partition] = record.offset + 1
                kinds.append(self._one(record))
        return kinds

    def _one(self, record):
        written = []
        if (claim := record.header(headers.CLAIM)) is not None:
            if record.of not in self.claims:
                self.claims.add(record.of)
                self._store.load([record.of])
            won = self._store.claim(record.of, claim.decode(), owner_of(record))
            if not won.won:
                self.duplicates += 1
                return "duplicate"
            written += won.records
        outcome = self._runner.run(record)
        written += outcome.records
        if outcome.kind in ("failed", "rejected"):
            events = [Event.loads(r.value) for r in outcome.records if r.topic == f"{GROUP}.events"]
            error = next(e.result for e in events if e.result is not None and e.result.retcode)
            self.clock += 1000
            kept = dead_letter(record, DLQ, error=error, group=GROUP, worker="w1", now_ms=self.clock)
            written.append(kept)
        assert self._sink.deliver(written) == []
        return outcome.kind

    def events(self, uuid):
        return [event for event in read(self.transport.records(f"{GROUP}.events")) if event.key == uuid]

    def status(self, uuid):
        view = OperationView(uuid)
        for event in self.events(uuid):
            view.apply(event)
        return view.status

    def sent(self):
        """The newest record of the task topic."""
        return max(self.transport.records(TOPIC), key=lambda record: (record.timestamp_ms, record.offset))


@pytest.fixture
def transport():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name=TOPIC, partitions=3), TopicSpec(name=DLQ, partitions=3)])
    made.admin().create([TopicSpec(name=f"{GROUP}.events", partitions=4)])
    return made


@pytest.fixture
def registry(transport):
    return OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)


@pytest.fixture
def shop(transport, registry):
    return Shop(transport, registry)


@pytest.fixture
def broken():
    """What tasks refuse to do, until it is taken out."""
    return {"b"}


@pytest.fixture
def ran():
    return []


@pytest.fixture
def tasks(registry, broken, ran):
    """Tasks A to E, and Five of them, registered under these names."""
    classes = {}
    for name in "ABCDE":

        def run(self, name=name):
            ran.append((name.lower(), dict(self.params)))
            if name.lower() in broken:
                raise ValueError(f"{name} is broken, {self.params.get('n')}")
            seen = [*self.result.retval.get("seen", []), name.lower()]
            return Result(uuid=self.uuid, retval={"seen": seen})

        classes[name] = registry.subscribe(type(name, (Task,), {"run": run, "__module__": "shop"}))

    @registry.subscribe
    class Five(Operation):
        def build_tasks(self, **params):
            return [classes[name](params={"n": 1, **params}) for name in "ABCDE"]

    classes["Five"] = Five
    return classes


@pytest.fixture
def five(tasks, shop):
    """A launched operation that failed at its second step."""
    operation = tasks["Five"]().build()
    operation.launch()
    shop.run()
    assert shop.status(operation.uuid) == "FAILED"
    return operation


def lone(tasks, shop, name="B", **fields):
    """A failed task of no operation."""
    task = tasks[name](**fields)
    task.send()
    shop.run()
    return task


def put(transport, value, own=(), key=b"k", partition=0):
    transport.sink().deliver([OutRecord(DLQ, key, value, own, partition)])


# -- looking -----------------------------------------------------------------------------------------------------------


def test_a_letter_tells_of_its_message_and_its_operation(five, shop):
    (letter,) = shop.letters.list()
    sent = next(r for r in shop.transport.records(TOPIC) if r.offset == letter.origin_offset and
                r.partition == letter.origin_partition)  # fmt: skip
    assert (letter.entrypoint, letter.uuid) == ("shop.B", json.loads(sent.value)["uuid"])
    assert (letter.operation, letter.run, letter.position) == (five.uuid, 1, 1)
    assert (letter.error_type, letter.error) == ("ValueError", "B is broken, 1")
    assert "ValueError: B is broken" in letter.trace
    assert (letter.at, letter.attempt, letter.redrive, letter.worker) == (NOW + 1000, 1, 0, "w1")
    assert (letter.origin_topic, letter.key, letter.value) == (TOPIC, sent.key, sent.value)
    assert letter.id == f"{letter.partition}:{letter.offset}"
    assert letter.claim == f"again:{five.uuid}:1:1:0"
    assert not letter.replayed
    assert shop.letters.show(letter.id) == letter


def test_letters_are_listed_newest_first_by_what_is_asked_for(tasks, shop, broken):
    broken |= {"a"}
    first, second, third = (lone(tasks, shop, name, uuid=uuid) for name, uuid in
                            (("B", "one-1"), ("A", "one-10"), ("B", "two")))  # fmt: skip

    def uuids(**filters):
        return [letter.uuid for letter in shop.letters.list(**filters)]

    def at(ms):
        return datetime.fromtimestamp((NOW + ms) / 1000, UTC)

    everything = [third.uuid, second.uuid, first.uuid]
    assert uuids() == everything
    assert uuids(limit=2) == everything[:2]
    assert shop.letters.search(limit=1).total == 3
    assert uuids(task="B") == uuids(task="shop.B") == uuids(task="*.B") == ["two", "one-1"]
    assert uuids(task="shop") == []
    assert uuids(error="a IS bro") == ["one-10"]
    assert uuids(error="valueerror: b") == ["two", "one-1"]
    assert uuids(since=at(2000)) == ["two", "one-10"]
    assert uuids(until=at(2000)) == ["one-1"]
    assert uuids(since=at(2000), until=at(3000), task="A") == ["one-10"]
    assert uuids(operation="one-1") == ["one-1"], "exactly that one is there"
    assert uuids(operation="one") == ["one-10", "one-1"]
    assert uuids(replayed=True) == []
    assert uuids(replayed=False, limit=2) == everything[:2]
    assert shop.letters.search(replayed=False, limit=2).total == 3
    with pytest.raises(ValidationError, match="limit=0"):
        shop.letters.list(limit=0)


def test_a_time_without_a_zone_is_of_this_machine(tasks, shop):
    lone(tasks, shop)
    moment = datetime.fromtimestamp((NOW + 1000) / 1000)
    assert len(shop.letters.list(since=moment)) == 1
    assert shop.letters.list(since=moment + timedelta(seconds=1)) == []


def test_what_cannot_be_read_is_a_letter_all_the_same(transport, shop):
    transport.sink().deliver([OutRecord(TOPIC, b"k", b"\xffnot json", [("mine", b"1")])])
    assert shop.run() == ["rejected"]
    (letter,) = shop.letters.list()
    assert (letter.entrypoint, letter.uuid, letter.operation, letter.value) == ("", "", None, b"\xffnot json")
    assert letter.unreadable.startswith("Not a JSON object: ")
    assert letter.claim == f"again:{TOPIC}/{letter.origin_partition}/0:1:0:0"
    assert letter.name == f"{TOPIC}[{letter.origin_partition}] at 0"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b'{"uuid": "", "params": 5}', ("entrypoint: Missing", "uuid: Shorter", "params: Not a valid")),
        (b"[]", ("Invalid input",)),
    ],
)
def test_what_is_wrong_with_a_message_is_told_by_its_fields(transport, shop, value, why):
    put(transport, value)
    (letter,) = shop.letters.list()
    assert all(part in letter.unreadable for part in why), letter.unreadable
    assert "{" not in letter.unreadable


def test_records_that_kser_did_not_write_are_letters_of_which_little_is_known(transport, shop):
    put(transport, None)
    put(transport, b"x", [(headers.AT, b"soon"), (headers.REDRIVE, b"-5"), (headers.ATTEMPT, b"9" * 5000)])
    for letter in shop.letters.list():
        assert (letter.origin_topic, letter.origin_partition, letter.redrive, letter.attempt) == ("", -1, 0, 1)
        assert letter.at > 0
    outcomes = shop.letters.replay(shop.letters.list(), force=True)
    assert {(it.status, "nothing tells which topic" in it.reason) for it in outcomes} == {("refused", True)}


def test_the_relays_note_of_a_record_is_a_letter_without_its_value(transport, shop):
    record = Record("g.retry.10s", 1, 5, b"k", b"x" * 100, [], 0)
    transport.sink().deliver([coordinates(record, GROUP, TransportError("too large"), NOW)])
    (letter,) = shop.letters.list()
    assert letter.left_out == "value"
    (outcome,) = shop.letters.replay([letter], force=True)
    assert outcome.status == "refused"
    assert "it is in g.retry.10s[1] at 5" in outcome.reason


def test_a_group_without_the_topic_is_told_so():
    letters = DeadLetters(MemoryTransport(), "nobody")
    for call in (letters.list, lambda: letters.show("0:1"), lambda: letters.purge(["0:1"])):
        with pytest.raises(NotFound, match=r"no topic nobody\.dlq"):
            call()


@pytest.mark.parametrize("name", ["", "7", "a:1", "1:", ":1", "1:2:3", "-1:2", "\u0661:1", "1:" + "9" * 30])
def test_what_is_no_id_is_refused(shop, name):
    with pytest.raises(ValidationError, match="write partition:offset"):
        shop.letters.show(name)


def test_a_letter_that_is_not_there_is_told_so(tasks, shop):
    lone(tasks, shop)
    with pytest.raises(NotFound, match="no dead letter 0:99, 2:7 in"):
        shop.letters.several(["0:99", shop.letters.list()[0].id, "2:7"])


def test_a_list_that_cannot_be_read_to_its_end_says_so_in_time(transport):
    sink = transport.sink("t")
    sink.begin()
    sink.produce(OutRecord(DLQ, b"k", b"v"))
    with pytest.raises(TransportError, match="a transaction is open"):
        DeadLetters(transport, GROUP, timeout_s=0.05).list()
    sink.abort()


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_a_replayed_step_continues_its_operation_as_a_new_run(five, tasks, shop, broken, ran):
    broken.clear()
    ran.clear()
    (letter,) = shop.letters.list()
    (outcome,) = shop.letters.replay([letter])
    assert (outcome.status, outcome.run, outcome.entrypoint, outcome.position) == ("sent", 2, "shop.B", 1)
    shop.run()
    assert [name for name, _ in ran] == ["b", "c", "d", "e"]
    assert shop.status(five.uuid) == "SUCCESS"
    again = [event for event in shop.events(five.uuid) if event.run == 2]
    assert [(e.type, e.position) for e in again] == [
        (EventType.RUN_SENT, 1),
        (EventType.OPERATION_STARTED, 1),
        *((EventType.STEP_DONE, n) for n in (1, 2, 3, 4)),
        (EventType.OPERATION_ENDED, 5),
    ]
    assert again[-1].result.retval["seen"] == ["a", "b", "c", "d", "e"], "with the results it had"


def test_what_goes_back_is_the_same_but_for_its_run_and_its_headers(five, shop, transport):
    own = [("mine", b"1"), (headers.ATTEMPT, b"4"), (headers.NOT_BEFORE, b"5"), (headers.CLAIM, b"start:x")]
    failed = next(r for r in transport.records(TOPIC) if json.loads(r.value)["entrypoint"] == "shop.B")
    value = {**json.loads(failed.value), "of a newer release": 2**70}
    changed = failed._replace(headers=own, value=json.dumps(value).encode(), timestamp_ms=5)
    error = raised(ValueError("x"))
    letter = dead_letter(changed, DLQ, error=error, group=GROUP, now_ms=NOW + 9999, attempt=4)
    transport.sink().deliver([letter])
    (outcome,) = shop.letters.replay(shop.letters.list(limit=1))
    sent = shop.sent()
    assert (sent.key, sent.partition) == (failed.key, failed.partition)
    assert list(sent.headers) == [
        ("mine", b"1"),
        (headers.GROUP, b"g"),
        (headers.REDRIVE, b"1"),
        (headers.CLAIM, f"again:{five.uuid}:1:1:0".encode()),
    ]
    value["metadata"][METADATA_KEY] |= {"run": 2, "new": True}
    assert json.loads(sent.value) == value
    assert outcome.record.value == sent.value


def test_a_lone_task_goes_back_byte_for_byte(tasks, shop, broken):
    task = lone(tasks, shop, params={"n": 2**70})
    (letter,) = shop.letters.list()
    (outcome,) = shop.letters.replay([letter])
    assert (outcome.status, outcome.run) == ("sent", None)
    assert shop.sent().value == letter.value
    broken.clear()
    assert shop.run() == ["done"]
    assert shop.status(task.uuid) == "SUCCESS"


def test_a_letter_replayed_twice_is_run_once_and_known_to_have_been(five, shop, broken, ran):
    broken.clear()
    ran.clear()
    (letter,) = shop.letters.list()
    shop.letters.replay([letter])
    shop.letters.replay([letter])
    kinds = shop.run()
    assert (kinds.count("duplicate"), [name for name, _ in ran]) == (1, ["b", "c", "d", "e"])
    (after,) = shop.letters.list()
    assert after.replayed
    assert shop.letters.list(replayed=False) == []
    (outcome,) = shop.letters.replay([after], force=True)
    assert (outcome.status, outcome.reason) == (
        "refused",
        "it was replayed already: workers drop it when it comes again",
    )


def test_a_replay_that_fails_leaves_a_letter_that_can_be_replayed_in_place_of_the_first(five, shop, broken):
    (first,) = shop.letters.list()
    shop.letters.replay([first])
    shop.run()
    second, stale = shop.letters.list()
    assert (second.run, second.redrive, second.replayed) == (2, 1, False)
    assert (stale.id, stale.replayed) == (first.id, True)
    broken.clear()
    shop.letters.replay([second])
    shop.run()
    assert shop.status(five.uuid) == "SUCCESS"
    assert shop.sent().header(headers.CLAIM) is None


def test_without_its_claims_at_hand_a_later_letter_tells_that_one_was_replayed(five, shop):
    shop.letters.replay(shop.letters.list())
    shop.run()
    shop.transport.delete_before(Partition(state_topic(GROUP, TOPIC), shop.letters.list()[0].origin_partition), 99)
    assert [letter.replayed for letter in shop.letters.list()] == [False, True]


def test_the_loop_guard_refuses_the_fourth_replay_unless_it_is_forced(tasks, shop):
    lone(tasks, shop)
    for _ in range(3):
        (outcome,) = shop.letters.replay(shop.letters.list(replayed=False))
        assert outcome.status == "sent"
        shop.run()
    (letter,) = shop.letters.list(replayed=False)
    (refused,) = shop.letters.replay([letter])
    assert (refused.status, refused.record) == ("refused", None)
    assert "it came back 3 times and failed each time" in refused.reason
    (forced,) = shop.letters.replay([letter], force=True)
    assert forced.status == "sent"
    assert DeadLetters(shop.transport, GROUP, max_redrives=4).replay([letter], dry_run=True)[0].status == "ready"


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(five, shop, transport):
    before = len(transport.records(TOPIC))
    (outcome,) = shop.letters.replay(shop.letters.list(), dry_run=True)
    assert (outcome.status, outcome.run, outcome.record.topic) == ("ready", 2, TOPIC)
    assert len(transport.records(TOPIC)) == before


def test_parameters_can_be_changed(five, tasks, shop, broken, ran):
    alone = lone(tasks, shop, params={"n": 7, "kept": True})
    broken.clear()
    ran.clear()
    outcomes = shop.letters.replay(shop.letters.list(), params={"n": 2})
    assert [outcome.status for outcome in outcomes] == ["sent", "sent"]
    shop.run()
    assert sorted(ran[:2], key=lambda it: len(it[1])) == [("b", {"n": 2}), ("b", {"n": 2, "kept": True})]
    assert ("c", {"n": 1}) in ran
    assert {shop.status(five.uuid), shop.status(alone.uuid)} == {"SUCCESS"}


def test_letters_go_back_in_the_order_in_which_they_failed(tasks, shop):
    for uuid in ("1", "2", "3"):
        lone(tasks, shop, uuid=uuid)
    outcomes = shop.letters.replay(shop.letters.list())
    assert [outcome.letter.uuid for outcome in outcomes] == ["1", "2", "3"]


def test_the_same_message_twice_goes_back_once(five, shop, transport):
    (letter,) = shop.letters.list()
    put(transport, letter.value, letter.headers, letter.key, letter.partition)
    first, second = shop.letters.replay(shop.letters.list())
    assert (first.status, second.status, second.reason) == ("sent", "refused", f"it is the same message as {letter.id}")


def test_what_cannot_be_read_goes_back_by_force_only_and_as_it_was(transport, shop):
    transport.sink().deliver([OutRecord(TOPIC, None, b"\xff", [("mine", b"1")], 2)])
    shop.run()
    (letter,) = shop.letters.list()
    (refused,) = shop.letters.replay([letter])
    assert refused.status == "refused"
    assert "it cannot be read" in refused.reason
    assert "parameters cannot" in shop.letters.replay([letter], force=True, params={"a": 1})[0].reason
    (forced,) = shop.letters.replay([letter], force=True)
    assert forced.status == "sent"
    assert (shop.sent().value, shop.sent().key, shop.sent().partition) == (b"\xff", None, 2)
    assert shop.run() == ["rejected"]
    assert [(it.redrive, it.replayed) for it in shop.letters.list()] == [(1, False), (0, True)]


def test_an_itinerary_of_a_newer_release_goes_back_by_force_only(five, shop, transport):
    (letter,) = shop.letters.list()
    data = json.loads(letter.value)
    data["metadata"][METADATA_KEY]["v"] = 99
    put(transport, json.dumps(data).encode(), letter.headers)
    newer = next(it for it in shop.letters.list() if it.unreadable)
    assert (newer.entrypoint, newer.unreadable[:23]) == ("shop.B", "Itinerary of version 99")
    assert shop.letters.replay([newer])[0].status == "refused"
    (forced,) = shop.letters.replay([newer], force=True)
    assert forced.record.value == newer.value


def test_what_is_not_whole_is_refused_and_without_its_headers_sent_by_force_only(five, shop, transport):
    origin = next(r for r in transport.records(TOPIC) if json.loads(r.value)["entrypoint"] == "shop.B")
    options = {"error": Result(retcode=1), "group": GROUP, "now_ms": NOW + 99_000}
    whole = json.loads(origin.value)
    for size in (4_000, 40_000):
        whole["params"] = {"x": "x" * size}
        record = origin._replace(value=json.dumps(whole).encode(), headers=[("mine", b"h" * 9000)])
        transport.sink().deliver(
            [dead_letter(record, DLQ, kmsg=Message.loads(origin.value), max_bytes=9000, **options)]
        )
    cut = {letter.left_out: letter for letter in shop.letters.list()}
    assert cut["value"].operation == cut["headers"].operation == five.uuid
    assert [shop.letters.replay([cut[kind]])[0].status for kind in ("headers", "value")] == ["refused", "refused"]
    assert shop.letters.replay([cut["value"]], force=True)[0].status == "refused"
    (forced,) = shop.letters.replay([cut["headers"]], force=True)
    assert forced.status == "sent"


def test_a_topic_that_is_gone_is_told(tasks, shop, transport):
    record = Record("gone", 0, 1, b"k", Message("u", "shop.B").to_bytes(), [], 0)
    transport.sink().deliver([dead_letter(record, DLQ, error=Result(retcode=1), group=GROUP, now_ms=NOW)])
    (outcome,) = shop.letters.replay(shop.letters.list())
    assert (outcome.status, outcome.reason) == ("refused", "its topic gone does not exist any more")


def test_a_partition_that_is_gone_is_replaced_by_the_one_of_the_key(tasks, shop, transport):
    for key in (b"k", None):
        record = Record(TOPIC, 7, 1, key, Message(f"u{key}", "shop.B").to_bytes(), [], 0)
        transport.sink().deliver([dead_letter(record, DLQ, error=Result(retcode=1), group=GROUP, now_ms=NOW)])
    keyed, keyless = sorted(shop.letters.replay(shop.letters.list()), key=lambda it: it.letter.key is None)
    transport.sink().deliver([OutRecord(TOPIC, b"k", b"")])
    assert keyed.record.partition == next(r.partition for r in transport.records(TOPIC) if r.value == b"")
    again = shop.letters.replay([keyless.letter], dry_run=True)
    assert keyless.record.partition == again[0].record.partition, "the same whoever sends it: its claim is there"


def test_what_the_broker_does_not_confirm_failed(five, tasks, shop, transport):
    lone(tasks, shop)
    transport.fail_next("delivery", DeliveryError("not confirmed"))
    first, second = shop.letters.replay(shop.letters.list())
    assert (first.status, first.reason, second.status) == ("failed", "not confirmed", "sent")


def test_messages_of_a_class_of_their_own_are_read_and_written_by_it(transport):
    registry = OperationRegistry(topic=TOPIC)

    class Controller(registry.controller.__class__):
        TRANSPORT = Reversed

    registry = OperationRegistry(controller_class=Controller, producer=BaseProducer(transport.sink()), topic=TOPIC)
    ran, broken = [], ["once"]

    @registry.subscribe
    class Fragile(Task):
        def run(self):
            ran.append(self.params)
            if broken:
                raise ValueError(broken.pop())

    @registry.subscribe
    class One(Operation):
        def build_tasks(self, **params):
            return [Fragile(params={"a": 1})]

    shop = Shop(transport, registry, Reversed)
    one = One().build()
    one.launch()
    shop.run()
    assert DeadLetters(transport, GROUP).list()[0].unreadable
    (letter,) = shop.letters.list()
    assert (letter.operation, letter.unreadable) == (one.uuid, "")
    shop.letters.replay([letter], params={"b": 2})
    shop.run()
    assert ran == [{"a": 1}, {"a": 1, "b": 2}]
    assert [e.run for e in shop.events(one.uuid) if e.ends] == [1, 2]


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_resuming_runs_the_failed_step_and_those_after_it_once_whoever_else_tries(five, shop, broken, ran):
    broken.clear()
    ran.clear()
    barrier, outcomes = threading.Barrier(2), []

    def resume():
        barrier.wait(10)
        outcomes.append(DeadLetters(shop.transport, GROUP).resume(five.uuid))

    threads = [threading.Thread(target=resume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [outcome.status for outcome in outcomes] == ["sent", "sent"]
    kinds = shop.run()
    assert kinds.count("duplicate") == 1
    assert [name for name, _ in ran] == ["b", "c", "d", "e"]
    assert shop.status(five.uuid) == "SUCCESS"


def test_an_operation_that_is_alive_or_ended_well_is_not_resumed(five, shop, broken):
    broken.clear()
    shop.letters.resume(five.uuid)
    with pytest.raises(NotFound, match="Nothing is known of who"):
        shop.letters.resume("who")
    shop.run()
    with pytest.raises(StatusError, match=r"Run 2 of .*Five\[.*\] ended SUCCESS: there is nothing to resume"):
        shop.letters.resume(five.uuid)


def test_an_operation_is_not_resumed_while_its_run_goes_on(tasks, shop, transport, five):
    event = Event(type=EventType.STEP_DONE, uuid="t", entrypoint="shop.B", operation=five.uuid, run=2, position=1)
    transport.sink().deliver([OutRecord(f"{GROUP}.events", event.key.encode(), event.to_bytes("w2"))])
    with pytest.raises(StatusError, match=r"Run 2 of .* has not ended, and goes on by itself"):
        shop.letters.resume(five.uuid)


def test_a_run_that_left_a_letter_and_has_not_told_its_end_is_not_resumed(five, shop, transport):
    (letter,) = shop.letters.list()
    data = json.loads(letter.value)
    data["metadata"][METADATA_KEY]["run"] = 2
    put(transport, json.dumps(data).encode(), letter.headers)
    with pytest.raises(StatusError, match=r"Run 2 of .* has not ended yet: try again in a moment"):
        shop.letters.resume(five.uuid)


def test_a_resumed_operation_that_fails_again_can_be_resumed_again(five, shop, broken, ran):
    assert shop.letters.resume(five.uuid).run == 2
    shop.run()
    broken.clear()
    ran.clear()
    outcome = shop.letters.resume(five.uuid)
    assert (outcome.run, outcome.letter.redrive) == (3, 1)
    shop.run()
    assert [name for name, _ in ran] == ["b", "c", "d", "e"]
    assert shop.status(five.uuid) == "SUCCESS"


def test_an_operation_whose_letter_is_gone_is_told_so(five, shop):
    (letter,) = shop.letters.list()
    shop.letters.purge([letter])
    with pytest.raises(NotFound, match=r"Run 1 of .* ended FAILED and left no dead letter in g\.dlq"):
        shop.letters.resume(five.uuid)


def test_without_events_it_is_told_how_to_replay(five, shop, transport):
    for partition in range(4):
        transport.delete_before(Partition(f"{GROUP}.events", partition), 99)
    (letter,) = shop.letters.list()
    with pytest.raises(StatusError, match=f"kser dlq replay {letter.id} --group g"):
        shop.letters.resume(five.uuid)


def test_events_are_found_after_partitions_were_added(five, shop, transport, broken):
    transport.add_partitions(f"{GROUP}.events", 31)
    broken.clear()
    assert shop.letters.resume(five.uuid).status == "sent"
    shop.run()
    with pytest.raises(StatusError, match=r"Run 2 .* ended SUCCESS"):
        shop.letters.resume(five.uuid)


def test_a_run_that_was_sent_is_told_so_that_it_can_be_aborted_before_a_worker_meets_it(five, shop, broken, ran):
    assert shop.letters.resume(five.uuid).run == 2
    (sent,) = [event for event in shop.events(five.uuid) if event.type == EventType.RUN_SENT]
    assert (sent.run, sent.position, sent.status, sent.entrypoint) == (2, 1, "PENDING", "shop.B")
    assert sent.note.startswith("sent again from dead letter ")
    view = OperationView(five.uuid)
    assert all(view.apply(event) for event in shop.events(five.uuid))
    assert (view.run, view.status) == (2, "PENDING")
    assert view.entrypoint.endswith("Five")
    shop.transport.admin().create([TopicSpec(name=f"{GROUP}.control", partitions=1)])
    assert control.abort(five.uuid, group=GROUP, transport=shop.transport).abort.run == 2
    # It says nothing of how far the run has come: that is for the worker that meets it.
    assert shop.letters.resume(five.uuid).run == 2
    broken.clear()
    assert shop.run().count("duplicate") == 1
    assert shop.status(five.uuid) == "SUCCESS"
    assert [name for name, _ in ran] == ["a", "b", "b", "c", "d", "e"]


def test_what_is_told_of_a_run_late_changes_nothing(five, shop, broken):
    broken.clear()
    shop.letters.resume(five.uuid)
    shop.run()
    told = shop.events(five.uuid)
    late = next(event for event in told if event.type == EventType.RUN_SENT)
    view = OperationView(five.uuid)
    for event in [*(event for event in told if event is not late), late]:
        view.apply(event)
    assert (view.run, view.status) == (2, "SUCCESS")


def test_a_lone_task_that_is_replayed_is_in_the_run_that_was_told(tasks, shop, broken):
    task = lone(tasks, shop)
    shop.letters.replay(shop.letters.list())
    assert shop.status(task.uuid) == "PENDING"
    shop.run()
    assert shop.status(task.uuid) == "FAILED"
    shop.letters.replay(shop.letters.list(replayed=False))
    broken.clear()
    shop.run()
    assert shop.status(task.uuid) == "SUCCESS"
    assert [event.run for event in shop.events(task.uuid)] == [1, 2, 2, 3, 3]


def test_a_lone_task_is_resumed_under_its_uuid(tasks, shop, broken):
    task = lone(tasks, shop)
    broken.clear()
    assert shop.letters.resume(task.uuid, params={"n": 3}).run is None
    shop.run()
    assert shop.status(task.uuid) == "SUCCESS"
    with pytest.raises(StatusError, match="ended SUCCESS"):
        shop.letters.resume(task.uuid)
    broken.add("b")
    task = lone(tasks, shop)
    with pytest.raises(ValidationError, match="has no steps to choose from"):
        shop.letters.resume(task.uuid, step="C")


def test_an_operation_that_could_not_be_built_is_replayed_and_resumed_as_a_new_run(registry, shop):
    built = []

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    @registry.subscribe
    class Late(Operation):
        def build_tasks(self, **params):
            built.append(params)
            if "at" not in params:
                raise KeyError("at")
            return [Step()]

    late = Late()
    late.send()
    shop.run()
    (letter,) = shop.letters.list()
    assert (letter.uuid, letter.operation, letter.run) == (late.uuid, None, 1)
    shop.letters.replay([letter])
    shop.run()
    assert shop.status(late.uuid) == "FAILED"
    (letter,) = shop.letters.list(replayed=False)
    assert letter.run == 2
    outcome = shop.letters.resume(late.uuid, params={"at": 5})
    assert outcome.run == 3
    shop.run()
    assert built[-1] == {"at": 5}
    assert shop.status(late.uuid) == "SUCCESS"
    assert {e.run for e in shop.events(late.uuid)} == {1, 2, 3}


@pytest.fixture
def nested(registry, tasks):
    """An operation around another: A, (B, C), D."""

    @registry.subscribe
    class Inner(Operation):
        def build_tasks(self, **params):
            return [tasks["B"](params={"n": 1}), tasks["C"]()]

    @registry.subscribe
    class Outer(Operation):
        def build_tasks(self, **params):
            return [tasks["A"](), Inner(), tasks["D"]()]

    return Outer


def test_a_step_of_a_nested_operation_is_resumed_by_the_root(nested, shop, broken, ran):
    outer = nested().build()
    outer.launch()
    shop.run()
    (letter,) = shop.letters.list()
    assert (letter.entrypoint, letter.operation, letter.position) == ("shop.B", outer.uuid, 1)
    inner = next(e.uuid for e in shop.events(outer.uuid) if e.parent == outer.uuid and e.entrypoint.endswith("Inner"))
    with pytest.raises(NotFound, match=f"Operation {inner} is a part of {outer.uuid}: resume that one"):
        shop.letters.resume(inner)
    broken.clear()
    ran.clear()
    shop.letters.resume(outer.uuid)
    shop.run()
    assert [name for name, _ in ran] == ["b", "c", "d"]
    assert shop.status(outer.uuid) == "SUCCESS"


@pytest.mark.parametrize("step", ["D", "shop.D", 3, "3"])
def test_a_later_step_leaves_out_what_lies_between(five, shop, ran, step):
    ran.clear()
    outcome = shop.letters.resume(five.uuid, step=step, params={"n": 9})
    assert (outcome.entrypoint, outcome.position, outcome.run) == ("shop.D", 3, 2)
    shop.run()
    assert ran == [("d", {"n": 9}), ("e", {"n": 1})]
    ended = next(e for e in shop.events(five.uuid) if e.ends and e.run == 2)
    assert (ended.status, ended.position, ended.result.retval["seen"]) == ("SUCCESS", 5, ["a", "d", "e"])
    started = [e for e in shop.events(five.uuid) if e.run == 2 and e.type == EventType.OPERATION_STARTED]
    assert [e.position for e in started] == [3]


def test_a_step_after_a_nested_operation_can_be_begun_at(nested, shop, ran):
    outer = nested().build()
    outer.launch()
    shop.run()
    ran.clear()
    assert shop.letters.resume(outer.uuid, step="D").position == 3
    shop.run()
    assert [name for name, _ in ran] == ["d"]
    assert shop.status(outer.uuid) == "SUCCESS"


def test_all_ways_to_resume_have_one_claim_so_that_one_of_them_runs(five, shop, broken, ran):
    broken.clear()
    ran.clear()
    ways = [shop.letters.resume(five.uuid, step=step) for step in ("D", None, "A", 1)]
    assert {(way.record.topic, way.record.partition) for way in ways} == {(TOPIC, ways[0].record.partition)}
    kinds = shop.run()
    assert kinds.count("duplicate") == 3
    assert [name for name, _ in ran] == ["d", "e"]


def test_resuming_what_was_resumed_already_is_refused_before_its_next_event(five, shop):
    shop.letters.resume(five.uuid, step="D")
    shop._one(shop.sent())
    with pytest.raises(StatusError, match=r"cannot be resumed from dead letter .*: it was replayed already"):
        shop.letters.resume(five.uuid)


def test_the_failed_step_itself_may_be_named(five, shop, broken, ran):
    broken.clear()
    ran.clear()
    assert shop.letters.resume(five.uuid, step="B", dry_run=True).status == "ready"
    assert shop.letters.resume(five.uuid, step="1").position == 1
    shop.run()
    assert [name for name, _ in ran] == ["b", "c", "d", "e"]


@pytest.mark.parametrize("step", ["A", 0])
def test_an_earlier_step_is_run_with_the_message_that_it_had(five, shop, broken, ran, step):
    broken.clear()
    ran.clear()
    outcome = shop.letters.resume(five.uuid, step=step, params={"m": 2})
    assert (outcome.entrypoint, outcome.position, outcome.run) == ("shop.A", 0, 2)
    shop.run()
    assert [name for name, _ in ran] == ["a", "b", "c", "d", "e"]
    assert ran[0][1] == {"n": 1, "m": 2}
    assert shop.status(five.uuid) == "SUCCESS"
    assert {e.run for e in shop.events(five.uuid) if e.ends} == {1, 2}


def test_an_earlier_step_that_is_not_kept_is_told(five, shop, transport):
    (letter,) = shop.letters.list()
    transport.delete_before(Partition(TOPIC, letter.origin_partition), letter.origin_offset)
    with pytest.raises(
        ValidationError, match=r"no step A to begin at\. .*: 1 shop\.B, 2 shop\.C, 3 shop\.D, 4 shop\.E\. "
    ):
        shop.letters.resume(five.uuid, step="A")


@pytest.mark.parametrize("step", ["Z", 5, 99, ""])
def test_a_step_that_there_is_not_is_told(five, shop, step):
    with pytest.raises(ValidationError, match=f"There is no step {step} to begin at") as caught:
        shop.letters.resume(five.uuid, step=step)
    assert ("before it" in caught.value.message) == isinstance(step, str)


def test_a_name_of_several_steps_is_not_guessed(registry, tasks, shop, broken):
    @registry.subscribe
    class Twice(Operation):
        def build_tasks(self, **params):
            return [tasks[name]() for name in "AABCC"]

    twice = Twice().build()
    twice.launch()
    shop.run()
    with pytest.raises(
        ValidationError, match="2 steps to come are called C: give the position of the one you mean, 3, 4"
    ):
        shop.letters.resume(twice.uuid, step="C")
    with pytest.raises(ValidationError, match=r"2 earlier steps are called A: .*, 0, 1"):
        shop.letters.resume(twice.uuid, step="A")
    assert shop.letters.resume(twice.uuid, step=4, dry_run=True).position == 4


def test_a_resume_that_is_not_confirmed_fails(five, shop, transport):
    transport.fail_next("delivery", DeliveryError("not confirmed"))
    with pytest.raises(DeliveryError, match="not confirmed"):
        shop.letters.resume(five.uuid)


# -- deleting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def eight(transport):
    """Four letters in each of two partitions; ids partition:0 to partition:3."""
    for number in range(8):
        record = Record(TOPIC, 0, number, b"k", Message(f"u{number}", f"shop.T{number % 4}").to_bytes(), [], 0)
        letter = dead_letter(record, DLQ, error=Result(retcode=1), group=GROUP, now_ms=NOW + number)
        transport.sink().deliver([letter._replace(partition=number // 4)])
    return DeadLetters(transport, GROUP)


def ids(letters):
    return sorted(letter.id for letter in letters)


def test_the_oldest_of_a_partition_are_deleted_and_no_other(eight):
    plan = eight.purge(["0:0", "0:1", "1:0"], dry_run=True)
    assert (ids(plan.deleted), plan.kept, plan.others) == (["0:0", "0:1", "1:0"], [], 0)
    assert len(eight.list()) == 8
    assert eight.purge(["0:0", "0:1", "1:0"]) == plan
    assert ids(eight.list()) == ["0:2", "0:3", "1:1", "1:2", "1:3"]


def test_a_letter_behind_one_that_is_to_stay_stays_unless_it_is_forced(eight):
    chosen = eight.list(task="T0") + eight.list(task="T2")
    plan = eight.purge(chosen)
    assert (ids(plan.deleted), ids(plan.kept), plan.others) == (["0:0", "1:0"], ["0:2", "1:2"], 0)
    plan = eight.purge(plan.kept, force=True)
    assert (ids(plan.deleted), plan.kept, plan.others) == (["0:1", "0:2", "1:1", "1:2"], [], 2)
    assert ids(eight.list()) == ["0:3", "1:3"]


def test_deleting_what_is_gone_deletes_nothing(eight):
    eight.purge(eight.list())
    assert eight.list() == []
    assert eight.purge(["0:1", "1:99"]).deleted == []


def test_records_before_an_offset_are_deleted_in_memory(transport):
    transport.sink().deliver([OutRecord(TOPIC, b"k", b"%d" % n, (), 0) for n in range(5)])
    admin = transport.admin()
    admin.delete_records([Position(TOPIC, 0, 3)])
    admin.delete_records([Position(TOPIC, 0, 1)])
    assert [record.offset for record in transport.records(TOPIC)] == [3, 4]
    for wrong in (Position(TOPIC, 0, 6), Position(TOPIC, 0, -1), Position(TOPIC, 9, 0), Position("none", 0, 0)):
        with pytest.raises(TransportError):
            admin.delete_records([wrong])


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kser(transport):
    """``kser("dlq", ...)`` is the result of this command."""
    drivers = Drivers(lambda config: transport, lambda config: BaseProducer(transport.sink()))

    def run(*args, **options):
        place = ("--group", GROUP, "--bootstrap-servers", "127.0.0.1:1")
        return CliRunner().invoke(cli, [*map(str, args), *place], obj=drivers, **options)

    return run


def test_list_shows_a_line_for_each_letter(five, tasks, shop, kser):
    lone(tasks, shop, uuid="alone")
    result = kser("dlq", "list")
    head, newest, oldest, last = result.stdout.splitlines()
    assert head.split() == ["ID", "WHEN", "TASK", "OPERATION", "TRIES", "ERROR"]
    assert newest.split()[-7:] == ["-", "1", "ValueError:", "B", "is", "broken,", "None"]
    assert five.uuid in oldest
    assert (last, result.exit_code) == ("2 dead letters", 0)
    assert kser("dlq", "list", "--limit", "1").stdout.endswith(
        "2 dead letters, the 1 newest shown: --limit shows more\n"
    )
    assert kser("dlq", "list", "--task", "Z").stdout == "No dead letter of group g matches\n"
    assert kser("dlq", "list", "--error", "broken, None").stdout.splitlines()[1].split() == newest.split()
    letters = json.loads(kser("dlq", "list", "--format", "json", "--operation", five.uuid[:8]).stdout)
    assert [(it["operation"], it["entrypoint"], it["replayed"]) for it in letters] == [(five.uuid, "shop.B", False)]
    shop.letters.replay(shop.letters.list(task="B", operation=five.uuid))
    shop.run()
    assert "[replayed] ValueError" in kser("dlq", "list", "--replayed").stdout
    assert len(kser("dlq", "list", "--not-replayed").stdout.splitlines()) == 4


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
def test_the_table_is_no_wider_than_the_terminal(tasks, shop, five, width):
    lone(tasks, shop, params={"n": "宽字符" * 40}, uuid="alone")
    lines = table(shop.letters.list(), width)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    from rich.cells import cell_len

    assert all(cell_len(line) <= width for line in plain)
    assert (five.uuid in "".join(plain)) == (width > 100)
    assert five.uuid[:8] in "".join(plain) or width < 60


def test_what_a_terminal_would_obey_is_not_shown(transport, kser):
    evil = "\x1b]0;owned\x07\x1b[2Jx\u202ey"
    value = json.dumps({"uuid": "u", "entrypoint": evil, "params": {evil: 1}}, ensure_ascii=False).encode()
    record = Record(TOPIC, 0, 1, evil.encode(), value, [(evil, evil.encode())], 0)
    error = Result(retcode=1, stderr=evil, retval={"error": {"name": evil, "message": evil, "stack": f"a\n{evil}"}})
    transport.sink().deliver([dead_letter(record, DLQ, error=error, group=GROUP, worker=evil, now_ms=NOW)])
    (letter,) = DeadLetters(transport, GROUP).list()
    for args in (("list",), ("show", letter.id), ("replay", letter.id, "--dry-run")):
        shown = kser("dlq", *args).stdout
        assert "owned" in shown
        assert not set("\x1b\x07\u202e") & set(shown)


def test_show_tells_all_of_a_letter_but_its_secrets(registry, shop, kser):
    @registry.subscribe
    class Pay(Task):
        def run(self):
            raise ValueError("card refused, token=abc123")

    record = OutRecord(
        TOPIC, b"customer-7", Pay(uuid="u-1", params={"amount": 3, "password": "hunter2"}).to_Message().to_bytes(),
        [("traceparent", b"00-1"), ("x-api-key", b"abc123")],
    )  # fmt: skip
    shop.transport.sink().deliver([record])
    shop.run()
    (letter,) = shop.letters.list()
    shown = kser("dlq", "show", letter.id).stdout
    for part in (
        f"Dead letter {letter.id} of group g",
        f"{letter.entrypoint} [u-1]",
        "attempt 1, on worker w1",
        f"work[{letter.origin_partition}] at 0, key customer-7",
        "ValueError: card refused, token=********",
        "traceparent: 00-1",
        '"amount": 3',
        "Traceback (most recent call last):",
        f"To send it back: kser dlq replay {letter.id} --group g",
    ):
        assert part in shown
    as_json = kser("dlq", "show", letter.id, "--format", "json").stdout
    assert json.loads(as_json)["value"]["params"] == {"amount": 3, "password": "********"}
    assert not {secret for secret in ("hunter2", "abc123") if secret in shown + as_json}


def test_show_of_what_cannot_be_read_shows_its_bytes(transport, shop, kser):
    transport.sink().deliver([OutRecord(TOPIC, b"k", b"\xff{'password': 'x1'} " + b"y" * 5000)])
    shop.run()
    (letter,) = shop.letters.list()
    shown = kser("dlq", "show", letter.id).stdout
    assert "\\xff{'password': ********}" in shown
    assert "... 5020 bytes in all" in shown
    assert f"kser dlq replay {letter.id} --group g --force" in shown
    assert "value_base64" in kser("dlq", "show", letter.id, "--format", "json").stdout


def test_replay_says_what_it_does(five, shop, kser, broken):
    (letter,) = shop.letters.list()
    dry = kser("dlq", "replay", "--task", "B", "--dry-run")
    run = f"run 2 of operation {five.uuid} from position 1"
    assert (dry.exit_code, dry.stdout.splitlines()) == (
        0,
        [
            f"would be sent  {letter.id}  shop.B to work[{letter.origin_partition}], {run}",
            "1 would be sent; nothing was sent (--dry-run)",
        ],
    )
    sent = kser("dlq", "replay", letter.id, "--format", "json", "--params", '{"n": 4}')
    (told,) = json.loads(sent.stdout)
    assert (told["id"], told["status"], told["run"], told["topic"]) == (letter.id, "sent", 2, TOPIC)
    broken.clear()
    shop.run()
    assert shop.status(five.uuid) == "SUCCESS"
    again = kser("dlq", "replay", letter.id)
    assert (again.exit_code, again.stdout.splitlines()[-1]) == (1, "1 refused")
    assert "it was replayed already" in again.stdout
    nothing = kser("dlq", "replay", "--all")
    assert (nothing.exit_code, nothing.stdout[:17]) == (0, "Nothing to replay")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("replay",), "Say which dead letters"),
        (("purge",), "Say which dead letters"),
        (("replay", "0:1", "--all"), "not both"),
        (("replay", "0:1", "--task", "B"), "not both"),
        (("replay", "nonsense"), "write partition:offset, as in 0:12"),
        (("show", "7"), "write partition:offset, as in 0:12"),
        (("list", "--since", "yesterday"), "write how long ago, as in 90s, 15m, 2h or 7d"),
        (("list", "--until", "99999999w"), "is no time"),
        (("list", "--limit", "0"), "limit"),
        (("replay", "--all", "--params", "[1]"), "parameters have names"),
    ],
)
def test_misuse_is_told_and_nothing_is_tried(five, kser, args, said):
    result = kser("dlq", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_ages_count_from_now(transport, kser):
    now = int(time.time() * 1000)
    for minutes in (10, 100, 1000):
        record = Record(TOPIC, 0, minutes, b"k", Message(f"u{minutes}", "shop.B").to_bytes(), [], 0)
        letter = dead_letter(record, DLQ, error=Result(retcode=1), group=GROUP, now_ms=now - minutes * 60_000)
        transport.sink().deliver([letter])

    def uuids(*args):
        return [it["uuid"] for it in json.loads(kser("dlq", "list", "--format", "json", *args).stdout)]

    assert uuids("--since", "2h") == ["u10", "u100"]
    assert uuids("--since", "1.5H") == ["u10"]
    assert uuids("--until", "30m") == ["u100", "u1000"]
    assert uuids("--since", "5w", "--until", "3600 s") == ["u100", "u1000"]


def test_times_may_be_dates_and_moments(five, shop, kser):
    (letter,) = shop.letters.list()
    day = datetime.fromtimestamp(letter.at / 1000)
    for since, there in (
        (f"{day:%Y-%m-%d}", True),
        (f"{day:%Y-%m-%dT%H:%M}", True),
        (f"{day + timedelta(minutes=1):%Y-%m-%dT%H:%M}", False),
        (f"{datetime.fromtimestamp(letter.at / 1000, UTC).isoformat()}", True),
    ):
        assert (letter.id in kser("dlq", "list", "--since", since).stdout) == there, since


def test_purge_deletes_what_it_says_when_it_is_told_yes(eight, kser):
    dry = kser("dlq", "purge", "--until", f"{datetime.fromtimestamp((NOW + 2) / 1000).isoformat()}", "--dry-run")
    assert (dry.exit_code, dry.stdout) == (0, "2 dead letters would be deleted\n")
    unasked = kser("dlq", "purge", "0:0")
    assert (unasked.exit_code, unasked.stdout) == (2, "")
    assert "Delete 1 dead letter of group g for good? There is no terminal to ask: add --yes" in unasked.stderr
    assert len(eight.list()) == 8
    done = kser("dlq", "purge", "0:0", "0:2", "--yes")
    assert done.stdout.splitlines() == [
        "1 dead letter deleted",
        "1 dead letter stays: an older one before it in its partition was not chosen; --force deletes that, too",
    ]
    forced = kser("dlq", "purge", "0:2", "--yes", "--force", "--format", "json")
    assert json.loads(forced.stdout) == {"deleted": ["0:1", "0:2"], "kept": [], "others": 1, "dry_run": False}
    assert kser("dlq", "purge", "--all", "--yes").stdout == "5 dead letters deleted\n"
    assert kser("dlq", "purge", "--replayed", "--yes").stdout == "Nothing to delete\n"


@pytest.mark.parametrize(("answer", "left", "code"), [("n\n", 8, 1), ("y\n", 7, 0)])
def test_purge_asks_on_a_terminal(eight, kser, monkeypatch, answer, left, code):
    monkeypatch.setattr("kser.cli.dlq._is_terminal", lambda: True)
    result = kser("dlq", "purge", "0:0", input=answer)
    assert (result.exit_code, len(eight.list())) == (code, left)


def test_resume_runs_an_operation_on(five, shop, kser, broken, ran):
    dry = kser("operations", "resume", five.uuid, "--from", "D", "--dry-run")
    assert (dry.exit_code, dry.stdout.splitlines()[1]) == (0, "Nothing was sent (--dry-run)")
    assert "shop.D to work" in dry.stdout
    assert kser("operations", "resume", five.uuid, "--from", "Z").exit_code == 2
    broken.clear()
    ran.clear()
    done = kser("operations", "resume", five.uuid, "--params", '{"n": 8}')
    assert done.exit_code == 0, done.stderr
    assert re.match(
        rf"sent +\d:\d+  shop.B to work\[\d\], run 2 of operation {five.uuid} from position 1$", done.stdout
    )
    shop.run()
    assert ran[0] == ("b", {"n": 8})
    refused = kser("operations", "resume", five.uuid)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("kser: error: Run 2 of ")
    assert "ended SUCCESS" in refused.stderr
    assert kser("operations", "resume", "who").exit_code == 1


def test_settings_that_cannot_be_are_refused(transport):
    for wrong in ({"timeout_s": 0}, {"max_redrives": -1}):
        with pytest.raises(ConfigurationError):
            DeadLetters(transport, GROUP, **wrong)


def test_what_was_aborted_is_not_replayed_with_all_the_others(tasks, shop, transport, kser):
    lone(tasks, shop)
    record = transport.records(TOPIC)[0]
    error = raised(AbortedError("shop.B[u] was aborted by ann"))
    transport.sink().deliver(
        [dead_letter(record._replace(value=record.value.replace(b'"uuid":"', b'"uuid":"x')), DLQ, error=error,
                     group=GROUP, worker="w1", now_ms=NOW)]
    )  # fmt: skip
    (letter,) = shop.letters.list(error="AbortedError")
    done = kser("dlq", "replay", "--all", "--dry-run")
    assert done.exit_code == 0
    assert "1 would be sent; 1 left out that were aborted" in done.output
    nothing = kser("dlq", "replay", "--error", "AbortedError", "--dry-run")
    assert nothing.exit_code == 0
    assert "Nothing to replay: 1 that match were aborted" in nothing.output
    refused = kser("dlq", "replay", letter.id)
    assert refused.exit_code == 1
    assert "somebody aborted it" in refused.output
    assert f"dlq replay {letter.id} --group {GROUP} --force" in kser("dlq", "show", letter.id).output


def test_a_letter_is_shown_and_an_operation_resumed_by_the_begin_of_its_uuid(five, tasks, shop, kser, broken):
    short = five.uuid[:8]
    (letter,) = shop.letters.list()
    assert f"Dead letter {letter.id} of group {GROUP}" in kser("dlq", "show", short).output
    assert shop.letters.show(five.uuid) == letter
    assert kser("operations", "resume", short, "--dry-run").exit_code == 0
    shop.letters.resume(five.uuid)
    shop.run()
    assert shop.letters.show(short).run == 2
    missing = kser("dlq", "show", "ffffffff")
    assert missing.exit_code == 1
    assert "There is no dead letter of ffffffff in g.dlq: give an id, or a uuid" in missing.output
    assert kser("dlq", "show", "ffff").exit_code == 2
    twins = ["abcdef01-1", "abcdef01-2"]
    for uuid in twins:
        lone(tasks, shop, uuid=uuid)
    several = kser("dlq", "show", "abcdef01")
    assert several.exit_code == 2
    assert "2 uuids begin with abcdef01: abcdef01-1, abcdef01-2" in several.output
    assert "2 uuids begin with" in kser("operations", "resume", "abcdef01").output
    assert shop.letters.show(twins[0]).uuid == twins[0]


def test_what_only_a_letter_tells_of_is_found_by_its_begin_too(shop, transport):
    put(transport, Message("abcdef01-1", "shop.B").to_bytes())
    assert shop.letters.complete("abcdef01") == "abcdef01-1"
    assert DeadLetters(MemoryTransport(), GROUP).complete("abcdef01") == "abcdef01"


def test_of_what_cannot_be_read_the_list_says_why(transport, shop, kser):
    transport.sink().deliver([OutRecord(TOPIC, b"k", b"<order/>")])
    shop.run()
    assert "(unreadable)" in kser("dlq", "list").output
    assert "ValidationError: Not a JSON object: Expecting value" in kser("dlq", "list").output
