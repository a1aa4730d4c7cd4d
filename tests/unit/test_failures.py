"""What becomes of tasks that fail, on memory: attempts, parking, tiers, waiting, dead letters, crashes; claims."""

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from kser import Message, Operation, OperationRegistry, Result, Retry, Task, headers
from kser.control import Abort, Change, Pause, PauseKind, WorkerNote, send_control
from kser.dead_letters import DeadLetters
from kser.errors import ConfigurationError, MessageTooLargeError, TransportError, ValidationError
from kser.events import EventType, read
from kser.producer import BaseProducer
from kser.transport import OutRecord, Partition, Position, TopicSpec
from kser.transport.memory import MemorySink, MemoryTransport
from kser.transport.partitioner import partition_of
from kser.worker.offsets import SLICE, SUSPECT_AFTER, Parked, PartitionState, decode, encode
from tests.unit.test_worker import GROUP, TOPIC, Running, committed, view, wait_for

QUICK = Retry(attempts=3, backoff_s=0.05, jitter=0)


@pytest.fixture
def transport():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    return made


@pytest.fixture
def registry(transport):
    return OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)


@pytest.fixture(params=["exactly_once", "at_least_once"])
def start(registry, transport, request):
    running = []

    def go(**options):
        running.append(Running(registry, transport, **{"delivery": request.param, **options}))
        return running[-1]

    yield go
    for one in running:
        if one.thread.is_alive():
            one.worker.stop()
            one.stop()


def events(transport, kind):
    return [e for e in read(transport.records(f"{GROUP}.events")) if e.type == kind]


def dead(transport):
    return transport.records(f"{GROUP}.dlq")


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_a_task_that_fails_is_tried_again_and_its_operation_goes_on_after_it(registry, transport, start):
    attempts, hooks = [], []

    @registry.subscribe
    class Flaky(Task):
        retry = QUICK

        def run(self):
            attempts.append(self.attempt)
            if self.attempt < 3:
                raise ConnectionError("away")
            return Result(retval={"found": 1})

        def onerror(self, result):
            hooks.append(result)

    @registry.subscribe
    class After(Task):
        def run(self):
            attempts.append("after")

    @registry.subscribe
    class Both(Operation):
        def build_tasks(self, **params):
            return [Flaky(), After()]

    both = Both().build()
    both.launch()
    start()
    wait_for(lambda: view(transport, both.uuid).ended)
    assert view(transport, both.uuid).status == "SUCCESS"
    assert attempts == [1, 2, 3, "after"]
    assert not hooks
    told = events(transport, EventType.STEP_RETRYING)
    assert [(e.attempt, e.status, e.operation) for e in told] == [(1, "PENDING", both.uuid), (2, "PENDING", both.uuid)]
    assert "ConnectionError" in str(told[0].result.retval)
    assert not dead(transport)


def test_after_the_last_attempt_it_fails_as_any_other_and_its_message_is_kept(registry, transport, start):
    hooks = []

    @registry.subscribe
    class Broken(Task):
        retry = QUICK

        def run(self):
            raise ValueError("always")

        def onerror(self, result):
            hooks.append(self.attempt)

    @registry.subscribe
    class One(Operation):
        def build_tasks(self, **params):
            return [Broken(params={"x": 1})]

    one = One().build()
    one.launch()
    start()
    wait_for(lambda: view(transport, one.uuid).ended)
    assert view(transport, one.uuid).status == "FAILED"
    assert hooks == [3]
    assert len(events(transport, EventType.STEP_RETRYING)) == 2
    (letter,) = dead(transport)
    (sent,) = transport.records(TOPIC)
    assert (letter.key, letter.value) == (sent.key, sent.value)
    assert headers.number(letter.headers, headers.ATTEMPT) == 3
    assert "always" in headers.text(letter.headers, headers.ERROR)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("succeeds", [3, 9])
def test_an_operation_whose_tasks_cannot_be_built_is_tried_again(registry, transport, start, nested, succeeds):
    attempts, hooks = [], []

    @registry.subscribe
    class Step(Task):
        def run(self):
            attempts.append("step")

    @registry.subscribe(retry=QUICK)
    class Built(Operation):
        def build_tasks(self):
            attempts.append(len(attempts) + 1)
            Step().send()  # leaves with what succeeds only
            if attempts[-1] < succeeds:
                raise ConnectionError("no catalogue")
            return [Step()]

        def onerror(self, result):
            hooks.append(result)

    start()
    operation = Operation(tasks=[Built()]) if nested else Built()
    operation.launch() if nested else operation.send()
    wait_for(lambda: view(transport, operation.uuid).ended)
    status = "SUCCESS" if succeeds == 3 else "FAILED"
    assert view(transport, operation.uuid).status == status
    told = events(transport, EventType.STEP_RETRYING)
    assert [(event.attempt, event.operation, event.status) for event in told] == [
        (1, operation.uuid, "PENDING"),
        (2, operation.uuid, "PENDING"),
    ]
    assert "no catalogue" in told[0].result.stderr
    wait_for(lambda: attempts == [1, 2, 3, *(["step"] * 2 if succeeds == 3 else [])])
    assert len(hooks) == len(dead(transport)) == (succeeds != 3)


@pytest.mark.parametrize("tasks", ["none", "too much"])
def test_an_operation_that_fails_without_raising_is_not_tried_again_and_its_hook_is_called(
    registry, transport, start, tasks
):
    hooks, built = [], []

    @registry.subscribe
    class Step(Task): ...

    @registry.subscribe(retry=QUICK)
    class Built(Operation):
        def build_tasks(self):
            built.append(1)
            return [] if tasks == "none" else [Step(params={"x": "x" * 1_500_000})]

        def onerror(self, result):
            hooks.append(result.retcode)

    start()
    operation = Built()
    operation.send()
    wait_for(lambda: view(transport, operation.uuid).ended)
    assert view(transport, operation.uuid).status == "FAILED"
    assert (len(built), len(hooks), len(dead(transport))) == (1, 1, 1)
    assert not events(transport, EventType.STEP_RETRYING)


def test_a_failure_that_the_policy_does_not_name_is_final_at_once(registry, transport, start):
    runs = []

    @registry.subscribe(retry=Retry(attempts=5, backoff_s=0.01, give_up_on=[KeyError]))
    class Picky(Task):
        def run(self):
            runs.append(1)
            raise KeyError("never")

    task = Picky()
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert len(runs) == 1
    assert len(dead(transport)) == 1


def test_a_task_that_returns_a_failed_result_is_tried_again_too(registry, transport, start):
    @registry.task(retry=QUICK)
    def refused():
        return Result(retcode=7, stderr="not now")

    task = refused()
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert [e.result.retcode for e in events(transport, EventType.STEP_RETRYING)] == [7, 7]
    assert view(transport, task.uuid).result.retcode == 7


def test_coroutines_and_hooks_that_fail_are_tried_again(registry, transport, start):
    seen = []

    @registry.subscribe
    class Slow(Task):
        retry = QUICK

        async def run(self):
            seen.append(self.attempt)
            if self.attempt == 1:
                raise TimeoutError

        def onsuccess(self, result):
            if self.attempt == 2:
                raise ValueError("a hook")

    task = Slow()
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert (seen, view(transport, task.uuid).status) == ([1, 2, 3], "SUCCESS")


def test_what_an_attempt_sent_does_not_leave_when_it_failed(registry, transport, start):
    @registry.task
    def told():
        pass

    @registry.subscribe
    class Sends(Task):
        retry = QUICK

        def run(self):
            told(params={}).send()
            if self.attempt == 1:
                raise ValueError("no")

    Sends().send()
    start()
    wait_for(lambda: len(transport.records(TOPIC)) == 2)
    wait_for(lambda: committed(transport) == 2)
    assert len(events(transport, EventType.STEP_DONE)) == 2


# -- parking -----------------------------------------------------------------------------------------------------------


def test_those_of_the_same_key_wait_for_its_next_attempt_and_those_of_others_do_not(registry, transport, start):
    ran = []

    @registry.subscribe
    class Step(Task):
        retry = Retry(attempts=2, backoff_s=0.5, jitter=0)

        def run(self):
            ran.append((self.params["key"], self.params["n"], self.attempt))
            if self.params["key"] == "bad" and self.params["n"] == 0 and self.attempt == 1:
                raise ValueError("once")

    for n in range(5):
        for key in ("bad", "good"):
            Step(params={"key": key, "n": n}).send(key=key)
    start()
    wait_for(lambda: committed(transport) == 10)
    assert [r[1:] for r in ran if r[0] == "bad"] == [(0, 1), (0, 2), (1, 1), (2, 1), (3, 1), (4, 1)]
    assert [r for r in ran if r[0] == "good"] == [("good", n, 1) for n in range(5)]
    assert ran.index(("good", 4, 1)) < ran.index(("bad", 0, 2))


def test_attempt_and_due_time_survive_the_worker(registry, transport, start):
    """It is killed while a record waits: the next one neither starts the policy anew nor runs it early."""
    ran, began = [], time.monotonic()

    @registry.subscribe
    class Flaky(Task):
        retry = Retry(attempts=3, backoff_s=1, factor=1, jitter=0)

        def run(self):
            ran.append((self.attempt, time.monotonic() - began))
            raise ValueError("no")

    task = Flaky()
    task.send()
    first = start()
    wait_for(lambda: events(transport, EventType.STEP_RETRYING))
    wait_for(lambda: any(decode(p.offset, p.metadata).parked for p in stored(transport)))
    first.worker.stop()
    first.stop()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert [attempt for attempt, _ in ran] == [1, 2, 3]
    assert ran[1][1] - ran[0][1] >= 0.9
    assert len(dead(transport)) == 1


def stored(transport):
    return [p for p in transport.source(GROUP).committed([Partition(TOPIC, n) for n in range(2)]) if p.offset >= 0]


def test_a_worker_that_stops_does_not_wait_for_what_is_parked(registry, transport, start):
    @registry.subscribe
    class Flaky(Task):
        retry = Retry(attempts=3, backoff_s=20, jitter=0)

        def run(self):
            raise ValueError("no")

    Flaky().send()
    one = start()
    wait_for(lambda: events(transport, EventType.STEP_RETRYING))
    began = time.monotonic()
    one.worker.stop()
    one.stop()
    assert time.monotonic() - began < 3


def test_more_than_the_budget_of_parked_keys_goes_to_a_tier_unless_the_order_is_strict(
    registry, transport, start, monkeypatch
):
    monkeypatch.setattr("kser.worker.loop.KEYS", 2)

    @registry.subscribe
    class Flaky(Task):
        retry = Retry(attempts=2, backoff_s=20, jitter=0)

        def run(self):
            raise ValueError("no")

    @registry.subscribe
    class Strict(Flaky):
        order = "strict"

    sink = transport.sink()
    for cls, count in ((Flaky, 6), (Strict, 4)):
        for n in range(count):
            raw = cls().to_Message().to_bytes()
            sink.produce(OutRecord(TOPIC, b"%s %d" % (cls.__name__.encode(), n), raw, partition=0))
    start()
    wait_for(lambda: len(events(transport, EventType.STEP_RETRYING)) == 10)
    tier = transport.records(f"{GROUP}.retry.10s")
    assert all(b"Flaky" in record.key for record in tier)
    assert 4 <= len(tier) <= 6  # strict ones count as well, but stay

    def parked():
        (position,) = [p for p in stored(transport) if p.partition == 0]
        return decode(position.offset, position.metadata).parked

    wait_for(lambda: len(parked()) == 10 - len(tier))


def test_a_long_delay_is_spent_in_a_tier_with_attempt_and_origin(registry, transport, start):
    @registry.subscribe
    class Flaky(Task):
        retry = Retry(attempts=2, backoff_s=90, jitter=0)

        def run(self):
            raise ValueError("no")

    task = Flaky()
    task.send(key="k")
    start()
    wait_for(lambda: transport.records(f"{GROUP}.retry.1m"))
    (record,) = transport.records(f"{GROUP}.retry.1m")
    (sent,) = transport.records(TOPIC)
    assert (record.key, record.value) == (b"k", sent.value)
    assert headers.number(record.headers, headers.ATTEMPT) == 2
    assert headers.text(record.headers, headers.ORIGIN_TOPIC) == TOPIC
    assert headers.number(record.headers, headers.REMAINING) == 30_000
    wait_for(lambda: committed(transport) == 1)


# -- not yet -----------------------------------------------------------------------------------------------------------


def test_a_message_that_is_not_due_waits(registry, transport, start):
    ran = []

    @registry.subscribe
    class Later(Task):
        def run(self):
            ran.append(time.time())

    due = time.time() + 0.6
    sink = transport.sink()
    sink.produce(
        OutRecord(TOPIC, b"k", Later().to_Message().to_bytes(), ((headers.NOT_BEFORE, b"%d" % int(due * 1000)),))
    )
    hour = b"%d" % int((time.time() + 3660) * 1000)
    sink.produce(OutRecord(TOPIC, b"h", Later().to_Message().to_bytes(), ((headers.NOT_BEFORE, hour),)))
    start()
    wait_for(lambda: ran)
    assert -0.01 < ran[0] - due < 0.5
    wait_for(lambda: transport.records(f"{GROUP}.retry.1h"))
    assert len(ran) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_an_operation_that_fails_after_its_last_task_leaves_a_letter_to_resume_it_from(
    registry, transport, start, nested
):
    """A hook of its end raised, say: the task went well, and its message is kept all the same."""
    ran, away = [], [True]

    @registry.subscribe
    class Step(Task):
        def run(self):
            ran.append(self.params["n"])

    @registry.subscribe
    class Order(Operation):
        def build_tasks(self):
            return [Step(params={"n": n}) for n in (1, 2)]

        def onsuccess(self, result):
            if away:
                raise ConnectionError("no database")
            return result

    start()
    operation = Operation(tasks=[Order()]) if nested else Order().build()
    assert operation.launch().retcode == 0
    wait_for(lambda: view(transport, operation.uuid).status == "FAILED")
    (letter,) = dead(transport)
    assert "no database" in headers.text(letter.headers, headers.ERROR)
    away.clear()
    DeadLetters(transport, GROUP).resume(operation.uuid)
    wait_for(lambda: view(transport, operation.uuid).status == "SUCCESS")
    assert ran == [1, 2, 2]
    assert view(transport, operation.uuid).run == 2


def test_an_operation_whose_next_message_cannot_be_sent_leaves_a_letter(registry, transport, start):
    @registry.subscribe
    class Much(Task):
        def run(self):
            return Result(retval={self.uuid: "x" * 500_000})

    start()
    operation = Operation(tasks=[Much(), Much(), Much()])
    operation.launch()
    wait_for(lambda: view(transport, operation.uuid).status == "FAILED")
    (letter,) = dead(transport)
    assert Message.loads(letter.value).uuid == operation.tasks[1].uuid
    assert "the limit is" in headers.text(letter.headers, headers.ERROR)


@pytest.mark.parametrize("fails", ["its task", "its next message"])
def test_an_operation_that_fails_where_its_class_is_not_known_leaves_one_letter_and_is_resumed_there(
    registry, transport, fails
):
    """Workers of one group with other classes and topics: the end goes to one that knows the class, for its hooks."""
    ran, hooks = [], []
    transport.admin().create([TopicSpec(name="ops", partitions=1)])
    knows = OperationRegistry(producer=BaseProducer(transport.sink()), topic="ops")

    class First(Task):
        def run(self):
            ran.append("first")
            large = fails == "its next message" and len(ran) == 1
            return Result(retval={"x": "x" * 1_200_000 if large else ""})

    class Fails(Task):
        def run(self):
            ran.append("fails")
            if not self.params.get("well"):
                raise ValueError("no luck")

    for each in (registry, knows):
        for cls in (First, Fails):
            each.subscribe(name=f"shop.{cls.__name__}", topic=TOPIC)(cls)

    @knows.subscribe
    class Order(Operation):
        def build_tasks(self):
            return [First(), Fails(params={"well": fails == "its next message"})]

        def onerror(self, result):
            hooks.append("onerror")

        def onsuccess(self, result):
            hooks.append("onsuccess")

    order = Order().build()
    assert order.launch().retcode == 0
    steps = Running(registry, transport, delivery="exactly_once")
    ends = Running(knows, transport, delivery="exactly_once", topics=["ops"])
    wait_for(lambda: view(transport, order.uuid).status == "FAILED")
    (letter,) = dead(transport)
    ended = order.tasks[1 if fails == "its task" else 0]
    assert Message.loads(letter.value).uuid == ended.uuid
    told = events(transport, EventType.MESSAGE_DEAD_LETTERED)
    assert [(event.uuid, event.operation) for event in told] == [(ended.uuid, order.uuid)]
    DeadLetters(transport, GROUP).resume(order.uuid, params={"well": True})
    wait_for(lambda: view(transport, order.uuid).status == "SUCCESS")
    steps.stop()
    ends.stop()
    assert ran == (["first", "fails", "fails"] if fails == "its task" else ["first", "first", "fails"])
    assert hooks == ["onerror", "onsuccess"]
    assert len(dead(transport)) == 1


# -- nobody can run it -------------------------------------------------------------------------------------------------


def test_a_message_that_no_worker_here_can_run_waits_for_a_deploy_with_the_reason(registry, transport, start):
    sink = transport.sink()
    message = b'{"uuid": "u1", "entrypoint": "shop.New", "params": {}}'
    sink.produce(OutRecord(TOPIC, b"k", message))
    start()
    wait_for(lambda: transport.records(f"{GROUP}.retry.10s"))
    (record,) = transport.records(f"{GROUP}.retry.10s")
    assert record.value == message
    assert abs(headers.number(record.headers, headers.WAITING) - time.time() * 1000) < 10_000
    assert "shop.New" in headers.text(record.headers, headers.REASON)
    wait_for(lambda: events(transport, EventType.MESSAGE_WAITING))
    (told,) = events(transport, EventType.MESSAGE_WAITING)
    assert (told.uuid, told.status) == ("u1", "PENDING")
    assert "shop.New" in told.note
    assert not dead(transport)


def test_what_waits_for_a_deploy_says_which_worker_could_run_it(registry, transport, start):
    @registry.task
    def old():
        pass

    renamed = WorkerNote.of("w9", ["shop.NewName"], 1, int(time.time() * 1000))
    tell(transport, Change(renamed.key, renamed))
    sink = transport.sink()
    start(control=True, name="w1")
    for name in ("shop.NewName", "shop.NewNam"):
        sink.deliver([OutRecord(TOPIC, b"k", Message("u", name).to_bytes())])
    wait_for(lambda: len(events(transport, EventType.MESSAGE_WAITING)) == 2)
    first, second = (event.note for event in events(transport, EventType.MESSAGE_WAITING))
    assert first.endswith("on worker w1 of group g; w9 can run it")
    assert second.endswith("on worker w1 of group g; no worker of the group can run it; they know shop.NewName")
    (waits, _) = transport.records(f"{GROUP}.retry.10s")
    assert "w9 can run it" in headers.text(waits.headers, headers.REASON)


def test_when_it_has_waited_for_so_long_it_fails(registry, transport, start):
    since = b"%d" % int((time.time() - 901) * 1000)
    message = b'{"uuid": "u1", "entrypoint": "shop.New", "params": {}}'
    transport.sink().produce(OutRecord(TOPIC, b"k", message, ((headers.WAITING, since),)))
    start()
    wait_for(lambda: dead(transport))
    assert view(transport, "u1").status == "FAILED"
    assert dead(transport)[0].value == message


def test_an_itinerary_of_a_newer_release_waits_too(registry, transport, start):
    message = b'{"uuid": "u1", "entrypoint": "shop.New", "params": {}, "metadata": {"kser": {"v": 99, "ops": []}}}'
    transport.sink().produce(OutRecord(TOPIC, b"k", message))
    start()
    wait_for(lambda: transport.records(f"{GROUP}.retry.10s"))
    assert "version 99" in headers.text(transport.records(f"{GROUP}.retry.10s")[0].headers, headers.REASON)


def test_what_is_no_message_is_kept_as_it_came(registry, transport, start):
    transport.sink().produce(OutRecord(TOPIC, b"k", b"\xff no message", (("h", b"v"),)))
    start()
    wait_for(lambda: dead(transport))
    assert dead(transport)[0].value == b"\xff no message"
    assert ("h", b"v") in dead(transport)[0].headers


@pytest.mark.parametrize("too_long", [20_000, 100])
def test_a_dead_letter_that_the_broker_refuses_is_made_shorter_and_if_need_be_the_worker_ends(
    registry, transport, start, monkeypatch, too_long
):
    """Nothing is lost either way: what has no dead letter stays unsettled."""
    refuse(monkeypatch, f"{GROUP}.dlq", too_long)

    @registry.task
    def broken(text: str):
        raise ValueError("no")

    broken(params={"text": "x" * 30_000}).send()
    one = start()
    if too_long == 100:
        wait_for(lambda: not one.thread.is_alive())
        assert "dead letter" in one.error.message
        assert committed(transport) == 0
        return
    wait_for(lambda: committed(transport) == 1)
    (letter,) = dead(transport)
    assert b"value too large" in letter.value
    assert headers.text(letter.headers, headers.ERROR) == "no"


def refuse(monkeypatch, topic, too_long):
    """The broker takes no record of more bytes in this topic."""

    def check(records):
        for index, record in enumerate(records):
            if record.topic == topic and len(record.value) > too_long:
                raise MessageTooLargeError("A record", len(record.value), too_long, topic=topic, index=index)

    produce_all, deliver = MemorySink.produce_all, MemorySink.deliver

    def produce(self, records):
        check(records)
        produce_all(self, records)

    def confirmed(self, records, timeout_s=30):
        try:
            check(records)
        except MessageTooLargeError as exc:
            at = exc.extra["index"]
            return [
                *deliver(self, records[:at], timeout_s),
                (at, exc),
                *((at + 1 + n, failure) for n, failure in deliver(self, records[at + 1 :], timeout_s)),
            ]
        return deliver(self, records, timeout_s)

    monkeypatch.setattr(MemorySink, "produce_all", produce)
    monkeypatch.setattr(MemorySink, "deliver", confirmed)


# -- crashes -----------------------------------------------------------------------------------------------------------


def test_a_partition_is_open_while_it_is_worked_on_and_closed_when_it_is_let_go_of(registry, transport, start):
    go, inside = threading.Event(), threading.Event()

    @registry.subscribe
    class Waits(Task):
        def run(self):
            inside.set()
            go.wait(10)

    Waits().send()
    one = start()
    wait_for(inside.is_set)
    assert [decode(p.offset, p.metadata).open for p in stored(transport)] == [True]
    go.set()
    wait_for(lambda: committed(transport) == 1)
    assert [decode(p.offset, p.metadata).open for p in stored(transport)] == [True]
    one.worker.stop()
    one.stop()
    assert [decode(p.offset, p.metadata).open for p in stored(transport)] == [False]


def test_who_finds_a_crash_and_runs_nothing_lets_go_of_the_partition_all_the_same(registry, transport, start):
    leave(transport, encode("x", 0, 0, [], open_=True))
    found = []
    for _ in range(3):
        one = start()
        wait_for(lambda one=one: one.worker.status().partitions == 2)
        one.worker.stop()
        one.stop()
        found.append(one.worker.stats["crashes found"])
    assert found == [1, 0, 0]


def test_each_crash_counts_for_what_may_have_been_running_and_not_for_what_came_later():
    of = Partition("t", 0)
    position, counts = Position("t", 0, 100, encode("i", 100, 100, (), open_=True)), []
    for end in (110, 120, 130):
        state = PartitionState(of, position)
        assert state.was_open
        state.crashed(end)
        counts.append([state.crashes_of(offset) for offset in (100, 109, 110, 119, 120, 129, 130)])
        state.marked = True
        position = state.commit_point("i")
    assert counts == [[1, 1, 0, 0, 0, 0, 0], [2, 2, 1, 1, 0, 0, 0], [3, 3, 2, 2, 1, 1, 0]]
    assert counts[-1][0] == SUSPECT_AFTER


def test_the_third_crash_makes_suspects_only_of_what_may_have_been_started():
    of, ranges = Partition("t", 0), [(500, 2), (900, 1)]
    state = PartitionState(of, Position("t", 0, 100, encode("i", 100, 100, (), None, ranges, open_=True, reach=164)))
    state.crashed(2000)
    assert state.crashes == [(164, 3), (900, 2), (2000, 1)]
    state.marked = True
    position = state.commit_point("i")
    assert decode(100, position.metadata).reach == 100 + SLICE
    state.confirm(state.asked)
    assert not state.beyond(100 + SLICE - 1)  # neither what is a suspect already
    assert state.beyond(100 + SLICE)
    assert not state.beyond(900)  # nor what the next crash makes none
    for offset in range(100, 100 + SLICE):
        state.take(offset)
    assert decode(100, state.commit_point("i").metadata).reach == 100 + SLICE  # more only when these are done
    for offset in range(100, 100 + SLICE):
        state.finished(offset)
    assert decode(100 + SLICE, state.commit_point("i").metadata).reach == 100 + 2 * SLICE
    assert state.beyond(100 + SLICE)  # not before that is committed
    state.confirm(state.asked)
    assert not state.beyond(100 + SLICE)


def test_what_the_next_crash_would_make_suspects_is_taken_a_slice_at_a_time(registry, transport, start):
    """Three workers that are killed do not make suspects of all that waits; and nothing is held up for good."""
    count, early = 6 * SLICE, []

    @registry.task
    def step(n: int):
        (position,) = stored(transport)
        reach = decode(position.offset, position.metadata).reach
        if SLICE <= n < count - 10 and not n < reach:
            early.append((n, reach))
        time.sleep(0.001)

    for n in range(count):
        raw = step(params={"n": n}).to_Message().to_bytes()
        transport.sink().produce(OutRecord(TOPIC, b"%d" % n, raw, partition=0))
    done = range(3 * SLICE, 5 * SLICE)  # by an owner before: a slice in which nothing is left to run
    unfinished = [n for n in range(count) if n not in done]
    leave(transport, encode("i", 0, count, unfinished, None, [(count - 10, 2)], open_=True, reach=SLICE))
    one = start()
    wait_for(lambda: committed(transport) == count)
    assert one.worker.stats["suspects"] == SLICE
    assert one.worker.stats["done"] == len(unfinished)
    assert early == []
    one.worker.stop()
    one.stop()
    (position,) = stored(transport)
    assert decode(position.offset, position.metadata)[4:] == ([], False, None)


def test_what_the_next_crash_would_make_suspects_goes_on_behind_a_long_transaction_that_was_aborted(
    registry, transport, start
):
    ran = []

    @registry.task
    def step(n: int):
        ran.append(n)

    def send(n):
        raw = step(params={"n": n}).to_Message().to_bytes()
        return OutRecord(TOPIC, b"%d" % n, raw, partition=0)

    transport.sink().produce(send(0))
    sink = transport.sink("of.another.worker")
    sink.begin()
    for n in range(3 * SLICE):
        sink.produce(send(n))
    sink.abort(5)
    for n in (1, 2):
        transport.sink().produce(send(n))
    leave(transport, encode("i", 0, 0, (), None, [(1000, 1)], open_=True))
    start()
    wait_for(lambda: ran == [0, 1, 2])


@pytest.mark.parametrize("behind", ["a long task", "a parked one", "a paused class", "a limit"])
def test_what_the_next_crash_would_make_suspects_does_not_wait_for_what_others_wait_for(
    registry, transport, start, behind
):
    go, ran = threading.Event(), []

    @registry.subscribe(name="slow", order="strict", limit=1 if behind == "a limit" else None)
    class Slow(Task):
        retry = Retry(attempts=2, backoff_s=25, jitter=0)

        def run(self):
            if behind == "a parked one":
                raise ValueError("later")
            go.wait(20)

    @registry.subscribe(name="quick")
    class Quick(Task):
        def run(self):
            ran.append(self.params["n"])

    if behind == "a paused class":
        tell(transport, paused(PauseKind.TASK, "slow"))
    for n in range(SLICE // 2):
        key = b"%d" % n if behind == "a limit" else b"slow"
        transport.sink().produce(OutRecord(TOPIC, key, Slow().to_Message().to_bytes(), partition=0))
    for n in range(4 * SLICE):
        raw = Quick(params={"n": n}).to_Message().to_bytes()
        transport.sink().produce(OutRecord(TOPIC, b"q%d" % n, raw, partition=0))
    leave(transport, encode("i", 0, 0, (), None, [(1000, 1)], open_=True))
    start()
    wait_for(lambda: len(ran) == 4 * SLICE)
    go.set()


def test_what_was_running_at_three_crashes_runs_apart_and_what_is_finished_is_forgotten(registry, transport, start):
    ran = []

    @registry.task
    def step(n: int):
        ran.append((n, threading.current_thread().name))

    for n in range(3):
        raw = step(params={"n": n}).to_Message().to_bytes()
        transport.sink().produce(OutRecord(TOPIC, b"%d" % n, raw, partition=0))
    leave(transport, encode("i", 0, 0, (), None, [(2, 2), (3, 1)], open_=True))
    one = start()
    wait_for(lambda: committed(transport) == 3)
    assert sorted(n for n, _ in ran) == [0, 1, 2]
    assert one.worker.stats["suspects"] == 2
    assert one.worker.stats["crashes found"] == 1
    one.worker.stop()
    one.stop()
    (position,) = stored(transport)
    assert decode(position.offset, position.metadata).crashes == []


def leave(transport, metadata):
    """An owner of the first partition that has committed this at its beginning, and is gone."""
    source = transport.source(GROUP)
    join(source)
    source.commit([Position(TOPIC, 0, 0, metadata)])
    source.close()


def join(source):
    class Nothing:
        def on_assign(self, partitions):
            return None

        def on_revoke(self, partitions):
            pass

        on_lost = on_revoke

    source.subscribe([TOPIC], Nothing())
    wait_for(lambda: source.poll(0.01) is not None and source.assignment())


def test_parked_records_and_crashes_are_read_as_they_were_written():
    parked = {7: Parked(3, 1_900_000_000_100), 4096: Parked(12, 5_000)}
    found = decode(5, encode("i", 5, 5000, [5, 7, 4096], parked, [(9, 2), (6000, 1)], open_=True, reach=69))
    assert found == ("i", 5000, [5, 7, 4096], parked, [(9, 2), (6000, 1)], True, 69)


# -- told by people ----------------------------------------------------------------------------------------------------


def tell(transport, *changes):
    sink = transport.sink()
    send_control(sink, GROUP, changes)
    sink.close()


def aborted(uuid, run=1):
    told = Abort(uuid=uuid, run=run, by="ann", at_ms=int(time.time() * 1000), why="wrong prices")
    return Change(told.key, told)


def paused(kind, name=""):
    told = Pause(kind, name, by="ann", at_ms=int(time.time() * 1000))
    return Change(told.key, told)


def test_an_operation_that_was_aborted_is_not_run_any_further(registry, transport, start):
    go, inside, ran = threading.Event(), threading.Event(), []

    @registry.task
    def first():
        ran.append(1)
        inside.set()
        go.wait(10)

    @registry.task
    def second():
        ran.append(2)

    statuses = []

    @registry.subscribe
    class Both(Operation):
        def build_tasks(self, **params):
            return [first(), second()]

        def set_status(self, status, result=None):
            statuses.append(status)
            super().set_status(status, result)

        def onerror(self, result):
            statuses.append("onerror")

    one = Both().build()
    one.launch()
    statuses.clear()
    start(control=True)
    wait_for(inside.is_set)
    tell(transport, aborted(one.uuid))
    time.sleep(0.2)  # until the worker knows; nothing shows it
    go.set()
    wait_for(lambda: view(transport, one.uuid).ended)
    assert view(transport, one.uuid).status == "ABORTED"
    assert "aborted by ann: wrong prices" in view(transport, one.uuid).result.stderr
    assert (ran, statuses) == ([1], ["ABORTED"])
    (letter,) = DeadLetters(transport, GROUP).list()
    assert (letter.operation, letter.run, letter.position, letter.error_type) == (one.uuid, 1, 0, "AbortedError")
    assert "aborted by ann: wrong prices" in letter.error


def test_an_operation_that_was_aborted_is_resumed_at_that_step_on_purpose_only(registry, transport, start):
    ran = []

    @registry.task
    def step():
        ran.append(1)

    @registry.subscribe
    class Both(Operation):
        def build_tasks(self, **params):
            return [step(), step()]

    one = Both().build()
    lone = step()
    for made in (one, lone):
        tell(transport, aborted(made.uuid))
    one.launch()
    lone.send()
    start(control=True)
    wait_for(lambda: view(transport, one.uuid).ended and view(transport, lone.uuid).ended)
    letters = DeadLetters(transport, GROUP)
    assert {letter.aborted for letter in letters.list()} == {True}
    assert {outcome.status for outcome in letters.replay(letters.list())} == {"refused"}
    assert ran == []
    letters.resume(one.uuid)
    letters.resume(lone.uuid)
    wait_for(lambda: {view(transport, made.uuid).status for made in (one, lone)} == {"SUCCESS"})
    assert len(ran) == 3


def test_a_running_task_sees_that_it_was_aborted_and_what_it_sent_does_not_leave(registry, transport, start):
    seen, cancelled = [], threading.Event()

    @registry.subscribe
    class Long(Task):
        def run(self):
            Long().send()
            end = time.monotonic() + 10
            while not self.aborted and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(self.aborted)

        def on_cancel(self):
            cancelled.set()

    task = Long()
    task.send()
    one = start(control=True)
    wait_for(lambda: one.worker.status().running)
    tell(transport, aborted(task.uuid))
    wait_for(lambda: view(transport, task.uuid).ended)
    assert (seen, view(transport, task.uuid).status) == (["aborted"], "ABORTED")
    assert cancelled.wait(5)
    assert len(transport.records(TOPIC)) == 1


def test_what_waits_for_its_next_attempt_is_aborted_at_once_and_a_later_run_is_not(registry, transport, start):
    ran = []

    @registry.task(retry=Retry(attempts=3, backoff_s=25, jitter=0))
    def flaky():
        ran.append(1)
        raise ValueError("no")

    @registry.subscribe
    class One(Operation):
        def build_tasks(self, **params):
            return [flaky()]

    one = One().build()
    one.launch()
    start(control=True)
    wait_for(lambda: events(transport, EventType.STEP_RETRYING))
    tell(transport, aborted(one.uuid))
    wait_for(lambda: view(transport, one.uuid).status == "ABORTED")
    assert len(ran) == 1
    (sent,) = transport.records(TOPIC)
    again = Message.loads(sent.value)
    again.metadata["kser"]["run"] = 2
    transport.sink().produce(OutRecord(TOPIC, sent.key, again.to_bytes()))
    wait_for(lambda: len(ran) == 2)


def test_what_waits_in_a_tier_is_aborted_at_once_and_what_is_not_due_yet_too(registry, transport, start):
    ran = []

    @registry.task
    def later():
        ran.append(1)

    waits = later()
    waits.send(delay=4000)
    start(control=True, relay=True)
    wait_for(lambda: transport.records(f"{GROUP}.retry.1h"))
    tell(transport, aborted(waits.uuid))
    wait_for(lambda: view(transport, waits.uuid).ended)
    new = later()
    tell(transport, aborted(new.uuid))
    time.sleep(0.2)  # until the worker knows; nothing shows it
    new.send(delay=4000)
    wait_for(lambda: view(transport, new.uuid).ended)
    assert {view(transport, task.uuid).status for task in (waits, new)} == {"ABORTED"}
    assert ran == []
    assert len(transport.records(f"{GROUP}.retry.1h")) == 1
    assert len(dead(transport)) == 2


def test_a_coroutine_is_cancelled_by_an_abort(registry, transport, start):
    inside = threading.Event()

    @registry.task
    async def sleeps():
        inside.set()
        await asyncio.sleep(20)

    task = sleeps()
    task.send()
    start(control=True)
    wait_for(inside.is_set)
    tell(transport, aborted(task.uuid))
    wait_for(lambda: view(transport, task.uuid).status == "ABORTED", 5)


def test_a_paused_class_waits_and_others_of_other_keys_do_not(registry, transport, start):
    ran = []

    @registry.task
    def slow():
        ran.append("slow")

    @registry.task
    def quick():
        ran.append("quick")

    tell(transport, paused(PauseKind.TASK, slow.path))
    for _ in range(3):
        slow().send()
        quick().send()
    start(control=True)
    wait_for(lambda: ran == ["quick"] * 3)
    tell(transport, Change(f"pause:task:{slow.path}", None))
    wait_for(lambda: len(ran) == 6)
    wait_for(lambda: committed(transport) == 6)


@pytest.mark.parametrize("name", ["shop.Charge", "shop.Pay"])
def test_a_paused_class_waits_by_whatever_name_it_is_called(registry, transport, start, name):
    ran = []

    @registry.subscribe(name="shop.Charge", aliases=["shop.Pay"])
    class Charge(Task):
        def run(self):
            ran.append(self.params["n"])

    @registry.task
    def other():
        ran.append("other")

    tell(transport, paused(PauseKind.TASK, name))
    sink = transport.sink()
    for n, called in enumerate(["shop.Charge", "shop.Pay"]):
        value = Message(str(n), called, {"n": n}).dumps().encode()
        sink.deliver([OutRecord(TOPIC, b"k%d" % n, value)])
    other().send()
    start(control=True)
    wait_for(lambda: ran == ["other"])
    time.sleep(0.2)
    assert ran == ["other"]
    tell(transport, Change(f"pause:task:{name}", None))
    wait_for(lambda: sorted(map(str, ran)) == ["0", "1", "other"])


@pytest.mark.parametrize("kind", [PauseKind.TOPIC, PauseKind.WORKER, PauseKind.GROUP])
def test_a_paused_topic_worker_or_group_takes_nothing_until_it_is_resumed(registry, transport, start, kind):
    ran = []

    @registry.task
    def step():
        ran.append(1)

    pause = paused(kind, {PauseKind.TOPIC: TOPIC, PauseKind.WORKER: "w1"}.get(kind, ""))
    tell(transport, pause)
    step().send()
    one = start(control=True, name="w1")
    wait_for(lambda: one.worker.status().partitions == 2)
    time.sleep(0.5)  # it would have run by now
    assert not ran
    tell(transport, Change(pause.key, None))
    wait_for(lambda: ran)


# -- first come --------------------------------------------------------------------------------------------------------


def test_of_operations_with_one_idempotency_key_one_is_started(registry, transport, start):
    ran = []

    @registry.task
    def pay(order: int):
        ran.append(order)

    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **params):
            return [pay(params=params), pay(params=params)]

    made = [Order(params={"order": 7}, idempotency_key="order 7").build() for _ in range(5)]
    assert len({one.uuid for one in made}) == 1
    for one in made[:3]:
        assert one.launch().retcode == 0
    first = start()
    wait_for(lambda: view(transport, made[0].uuid).ended)
    wait_for(lambda: first.worker.stats["duplicates"] == 2)
    first.worker.stop()
    first.stop()
    made[3].launch()
    made[4].send()
    second = start()
    wait_for(lambda: second.worker.stats["duplicates"] == 2)
    assert ran == [7, 7]
    Order(params={"order": 8}, idempotency_key="order 8").build().launch()
    wait_for(lambda: ran == [7, 7, 8, 8])
    assert len(transport.records(f"{GROUP}.state.{TOPIC}")) == 2


def test_an_operation_that_came_first_and_failed_its_first_attempt_still_came_first(registry, transport, start):
    ran = []

    @registry.task(retry=QUICK)
    def flaky():
        ran.append(1)
        if len(ran) == 1:
            raise ValueError("once")

    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **params):
            return [flaky()]

    for _ in range(2):
        Order(idempotency_key="o").build().launch()
    one = start()
    wait_for(lambda: view(transport, Order(idempotency_key="o").uuid).status == "SUCCESS")
    wait_for(lambda: one.worker.stats["duplicates"] == 1)
    assert len(ran) == 2
    assert len(transport.records(f"{GROUP}.state.{TOPIC}")) == 1


class Away:
    """A transport whose state topics cannot be read while they are away, which takes its time."""

    def __init__(self, real):
        self.real, self.back, self.asked = real, threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self.real, name)

    def read(self, partitions, timeout_s=60):
        if not self.back.is_set():
            self.asked += 1
            self.back.wait(0.2)
            raise TransportError("no broker answers", retriable=True)
        return self.real.read(partitions, timeout_s)


def test_a_state_that_cannot_be_read_holds_back_its_partition_and_neither_ends_nor_stops_the_worker(
    registry, transport, request
):
    ran = []

    @registry.task
    def pay(order: str):
        ran.append(order)

    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **params):
            return [pay(params=params)]

    home, other = ("key-0", "key-1")
    assert partition_of(home.encode(), 2) != partition_of(other.encode(), 2)
    first = Order(params={"order": "first"}, idempotency_key="o").build()
    first.key = home
    first.launch()
    pay(params={"order": "behind"}).send(key=home)
    away = Away(transport)
    one = Running(registry, away)
    request.addfinalizer(one.stop)
    wait_for(lambda: away.asked)
    asked = time.monotonic()
    for n in range(20):
        pay(params={"order": f"other {n}"}).send(key=other)
    wait_for(lambda: len(ran) == 20)
    assert time.monotonic() - asked < 0.2 + 2
    assert not one.worker.status().reasons
    wait_for(lambda: away.asked > 1)
    away.back.set()
    wait_for(lambda: ran[20:] == ["first", "behind"])
    assert one.thread.is_alive()


def test_a_state_topic_that_cannot_be_right_ends_the_worker_with_the_reason(registry, transport):
    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **params):
            return []

    transport.admin().create([TopicSpec(name=f"{GROUP}.state.{TOPIC}", partitions=3)])
    Order(idempotency_key="o").build().send()
    one = Running(registry, transport)
    one.thread.join(10)
    assert isinstance(one.error, ConfigurationError)
    assert "3" in one.error.message


def test_a_delayed_task_runs_when_it_is_due(registry, transport, start):
    """Sent by a service, and by a task: the one a service sends is in its topic at once."""
    ran = {}

    @registry.task
    def later(n: int):
        ran[n] = time.time()

    @registry.task
    def now():
        later(params={"n": 2}).send(delay=0.3)

    began = time.time()
    later(params={"n": 1}).send(at=datetime.now(UTC) + timedelta(seconds=0.4))
    now().send()
    later(params={"n": 3}).send(delay=3700)
    start()
    wait_for(lambda: len(ran) == 2)
    assert ran[1] - began >= 0.39
    assert ran[2] - began >= 0.29
    wait_for(lambda: transport.records(f"{GROUP}.retry.1h"))


@pytest.mark.parametrize(
    "when",
    [
        {"delay": -1},
        {"delay": "5"},
        {"delay": float("nan")},
        {"delay": 1e12},
        {"at": datetime(2026, 1, 1)},
        {"at": "tomorrow"},
        {"delay": 1, "at": datetime.now(UTC)},
    ],
)
def test_a_time_that_cannot_be_is_refused(registry, when):
    @registry.task
    def later():
        pass

    with pytest.raises(ValidationError, match=r"give|years"):
        later().send(**when)


# -- what a review found -----------------------------------------------------------------------------------------------


def test_a_delayed_operation_that_came_first_still_came_first_for_the_next_worker(registry, transport, start):
    ran = []

    @registry.task
    def pay():
        ran.append(1)

    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **params):
            return [pay()]

    Order(idempotency_key="o").build().send(delay=40)
    first = start()
    wait_for(lambda: transport.records(f"{GROUP}.retry.10s") and committed(transport) == 1)
    first.worker.stop()
    first.stop()
    assert len(transport.records(f"{GROUP}.state.{TOPIC}")) == 1
    Order(idempotency_key="o").build().send()
    second = start()
    wait_for(lambda: second.worker.stats["duplicates"] == 1)
    assert not ran


def test_a_strict_order_holds_when_another_worker_takes_over_a_long_wait(registry, transport, start):
    ran = []

    @registry.subscribe
    class Strict(Task):
        retry = Retry(attempts=2, backoff_s=40, jitter=0)
        order = "strict"

        def run(self):
            ran.append(self.params["n"])
            raise ValueError("no")

    for n in (1, 2):
        Strict(params={"n": n}).send(key="k")
    first = start()
    wait_for(lambda: any(decode(p.offset, p.metadata).parked for p in stored(transport)))
    first.worker.stop()
    first.stop()
    second = start()
    wait_for(lambda: second.worker.stats["delayed"] == 1)
    time.sleep(0.3)  # the one behind it would have run by now
    assert ran == [1]
    assert not transport.records(f"{GROUP}.retry.10s")


def test_how_long_it_waited_for_a_deploy_is_forgotten_once_it_was_run(registry, transport, start):
    @registry.subscribe
    class Flaky(Task):
        retry = Retry(attempts=2, backoff_s=60, jitter=0)

        def run(self):
            raise ValueError("no")

    waited = (
        (headers.GROUP, GROUP.encode()),
        (headers.WAITING, b"%d" % (time.time() * 1000 - 850_000)),
        (headers.REASON, b"unknown"),
    )
    transport.sink().produce(OutRecord(TOPIC, b"k", Flaky().to_Message().to_bytes(), waited))
    start()
    wait_for(lambda: transport.records(f"{GROUP}.retry.1m"))
    (record,) = transport.records(f"{GROUP}.retry.1m")
    assert record.header(headers.WAITING) is None
    assert record.header(headers.REASON) is None
    assert record.header(headers.ATTEMPT) == b"2"


@pytest.mark.parametrize("known", [True, False])
def test_what_may_not_wait_in_a_tier_is_a_dead_letter_and_not_lost(registry, transport, start, monkeypatch, known):
    refuse(monkeypatch, f"{GROUP}.retry.10s", 10)

    @registry.task
    def later():
        """Never run."""

    if known:
        later().send(delay=40)
    else:
        transport.sink().produce(OutRecord(TOPIC, b"k", Message("u", "of.nobody").to_bytes()))
    start()
    wait_for(lambda: committed(transport) == 1)
    assert len(dead(transport)) == 1
    assert len(events(transport, EventType.STEP_FAILED)) == 1


def test_a_hook_that_sends_what_is_refused_too_costs_no_dead_letter_and_no_event(
    registry, transport, start, monkeypatch
):
    refuse(monkeypatch, "gone", 10)

    @registry.task(topic="gone")
    def alarm():
        """Never sent."""

    @registry.task
    def broken():
        raise ValueError("no")

    @registry.subscribe
    class Op(Operation):
        def build_tasks(self, **params):
            return [broken()]

        def onerror(self, result):
            alarm().send()

    op = Op().build()
    op.launch()
    start()
    wait_for(lambda: committed(transport) == 1)
    assert dead(transport)
    assert view(transport, op.uuid).status == "FAILED"


def test_what_nobody_here_knows_is_no_suspect_that_a_child_process_could_run(registry, transport, start):
    """An unknown message behind what crashed three workers: it waits, and the worker goes on."""
    raw = Message("u", "of.nobody").to_bytes()
    transport.sink().produce(OutRecord(TOPIC, b"k", raw, partition=0))
    leave(transport, encode("i", 0, 0, (), None, [(1, SUSPECT_AFTER)]))
    one = start(isolated=1, location="tests.apps.failing:registry")
    wait_for(lambda: one.worker.stats["waiting"] == 1)
    assert one.worker.stats["suspects"] == 1
    assert one.thread.is_alive()


def test_a_suspect_stays_one_on_its_way_through_a_tier(registry, transport, start):
    """Else each of its attempts would cost three deaths."""

    @registry.subscribe
    class Flaky(Task):
        retry = Retry(attempts=3, backoff_s=60, jitter=0)

        def run(self):
            raise ValueError("no")

    raw = Flaky().to_Message().to_bytes()
    transport.sink().produce(OutRecord(TOPIC, b"k", raw, partition=0))
    leave(transport, encode("i", 0, 0, (), None, [(1, SUSPECT_AFTER)]))
    one = start()
    wait_for(lambda: transport.records(f"{GROUP}.retry.1m"))
    (record,) = transport.records(f"{GROUP}.retry.1m")
    assert record.header(headers.SUSPECT) == b"1"
    back = [header for header in record.headers if header[0] in (headers.GROUP, headers.SUSPECT, headers.ATTEMPT)]
    transport.sink().produce(OutRecord(TOPIC, b"k", raw, back, partition=0))
    wait_for(lambda: one.worker.stats["suspects"] == 2)
