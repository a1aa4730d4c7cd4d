"""The engine of the worker on the memory transport: what runs beside what, deadlines, settling when it goes wrong."""

import asyncio
import inspect
import threading
import time
from collections import deque

import pytest

from kser import Operation, OperationRegistry, Result, Task, Worker
from kser.context import Control
from kser.errors import ConfigurationError, DeliveryError, FencedError, GroupError, OffsetLostError, TransportError
from kser.events import EventType, read
from kser.producer import BaseProducer
from kser.retry import Retry
from kser.transport import OutRecord, Partition, Position, Record, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.transport.partitioner import partition_of
from kser.worker import loop, members, processes
from kser.worker import worker as worker_module
from kser.worker.dispatch import Item
from kser.worker.executor import Executor
from kser.worker.members import raise_for
from kser.worker.offsets import PartitionState, decode, encode
from kser.worker.runner import Outcome, Runner
from kser.worker.settle import Batch, _rounds
from tests.unit.test_worker import GROUP, TOPIC, Running, committed, view, wait_for


@pytest.fixture
def transport():
    made = MemoryTransport(auto_create=False)
    made.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    return made


@pytest.fixture
def registry(transport):
    return OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)


@pytest.fixture
def start(registry, transport):
    running = []

    def go(**options):
        running.append(Running(registry, transport, **options))
        return running[-1]

    yield go
    for one in running:
        if one.thread.is_alive():
            one.worker.stop()
            one.stop()


def events(transport, kind):
    return [e for e in read(transport.records(f"{GROUP}.events")) if e.type == kind]


# -- what runs beside what -------------------------------------------------------------------------------------------


def test_messages_of_one_key_run_in_order_and_those_of_others_beside_them(registry, transport, start):
    seen, together, inside, lock = {}, [0], [0], threading.Lock()

    @registry.subscribe
    class Step(Task):
        def run(self):
            with lock:
                inside[0] += 1
                together[0] = max(together[0], inside[0])
            time.sleep(0.005)
            with lock:
                inside[0] -= 1
                seen.setdefault(self.params["key"], []).append(self.params["n"])

    for n in range(20):
        for key in ("a", "b", "c"):
            Step(params={"key": key, "n": n}).send(key=key)
    start()
    wait_for(lambda: committed(transport) == 60)
    assert seen == {key: list(range(20)) for key in ("a", "b", "c")}
    assert together[0] > 1


def test_with_ordering_partition_a_partition_runs_one_after_the_other(registry, transport, start):
    seen = []

    @registry.subscribe
    class Step(Task):
        def run(self):
            time.sleep(0.002)
            seen.append(self.params["n"])

    sink = transport.sink()
    for n in range(30):
        sink.produce(OutRecord(TOPIC, None, Step(params={"n": n}).to_Message().to_bytes(), partition=0))
    start(ordering="partition")
    wait_for(lambda: committed(transport) == 30)
    assert seen == list(range(30))


def test_with_ordering_none_messages_of_one_key_run_side_by_side(registry, transport, start):
    meet = threading.Barrier(3, timeout=5)

    @registry.subscribe
    class Step(Task):
        def run(self):
            meet.wait()

    for _ in range(3):
        Step().send(key="same")
    one = start(ordering="none")
    wait_for(lambda: committed(transport) == 3)
    assert one.worker.stats["done"] == 3


def test_a_long_task_holds_back_neither_other_keys_nor_what_came_after_it(registry, transport, start):
    """Its partition's committed offset stays at it; what came after it is stored as finished beside that offset."""
    go = threading.Event()

    @registry.subscribe
    class Long(Task):
        def run(self):
            go.wait(20)

    @registry.subscribe
    class Short(Task):
        def run(self):
            pass

    Long().send()
    for _ in range(500):
        Short().send()
    one = start()
    wait_for(lambda: committed(transport) == 500)
    assert one.worker.stats["done"] == 500
    go.set()
    wait_for(lambda: committed(transport) == 501)


def test_tasks_that_follow_many_short_ones_and_are_not_quite_as_short_run_beside_each_other(registry):
    """None of them is long enough to be stuck, and all of them are in the chunk of one thread."""
    inside, most, lock = [0], [0], threading.Lock()

    @registry.subscribe
    class Medium(Task):
        def run(self):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            with lock:
                inside[0] -= 1

    executor = Executor(Runner(registry.controller, GROUP), concurrency=8, wake=lambda: None)
    executor._slow, executor._share = 0.0, 1.0  # what was before them
    executor.look_after()
    state = PartitionState(Partition(TOPIC, 0))
    values = [Medium().to_Message().to_bytes() for _ in range(200)]
    executor.submit([Item(state, Record(TOPIC, 0, n, None, value, (), 0)) for n, value in enumerate(values)])

    def finished():
        executor.look_after()
        return len(executor.finished) == 200

    wait_for(finished)
    assert executor.stop(5)
    assert most[0] >= 6


def test_after_a_kill_nothing_that_was_settled_above_a_long_task_runs_again(registry, transport, start):
    """The next owner runs the unfinished one only."""
    go, runs = threading.Event(), []

    @registry.subscribe
    class Long(Task):
        def run(self):
            runs.append("long")
            go.wait(0.1 if len([r for r in runs if r == "long"]) > 1 else 20)

    @registry.subscribe
    class Short(Task):
        def run(self):
            runs.append("short")

    Long().send()
    for _ in range(100):
        Short().send()
    first = start(drain_s=0)
    wait_for(lambda: committed(transport) == 100)
    first.stop()
    second = start()
    wait_for(lambda: committed(transport) == 101)
    assert runs.count("short") == 100
    assert runs.count("long") == 2
    assert second.worker.stats["skipped"] > 0
    go.set()


def test_limit_bounds_how_many_of_a_class_run_and_starves_nobody(registry, transport, start):
    inside, most, lock, go = [0], [0], threading.Lock(), threading.Event()

    @registry.subscribe(limit=2)
    class Heavy(Task):
        def run(self):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            go.wait(10)
            with lock:
                inside[0] -= 1

    @registry.subscribe
    class Light(Task):
        def run(self):
            pass

    for _ in range(20):
        Heavy().send()
    for _ in range(50):
        Light().send()
    start(concurrency=4)
    wait_for(lambda: committed(transport) == 50)
    go.set()
    wait_for(lambda: committed(transport) == 70)
    assert most[0] == 2


def test_more_tasks_than_partitions_run_at_a_time(registry, transport, start):
    meet = threading.Barrier(10, timeout=5)

    @registry.subscribe
    class Step(Task):
        def run(self):
            meet.wait()

    for _ in range(10):
        Step().send()
    one = start(concurrency=10)
    wait_for(lambda: committed(transport) == 10)
    assert one.worker.stats["done"] == 10


def test_coroutines_share_one_loop_and_run_side_by_side_beyond_the_threads(registry, transport, start):
    loops, inside, most = set(), [0], [0]

    @registry.subscribe
    class Waits(Task):
        async def run(self):
            loops.add(id(asyncio.get_running_loop()))
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            await asyncio.sleep(0.3)
            inside[0] -= 1

    for _ in range(40):
        Waits().send()
    start(concurrency=2)
    wait_for(lambda: committed(transport) == 40)
    assert len(loops) == 1
    assert most[0] > 20


# -- deadlines -------------------------------------------------------------------------------------------------------


def test_a_task_over_its_timeout_is_told_and_fails(registry, transport, start):
    told = []

    @registry.subscribe(timeout=0.1)
    class Slow(Task):
        def run(self):
            while self.aborted is None:
                time.sleep(0.01)
            told.append(self.aborted)
            return Result(stdout="too late")

    task = Slow()
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert told == ["timeout"]
    ended = view(transport, task.uuid)
    assert ended.status == "FAILED"
    assert ended.result.retcode == 408
    assert "took longer than its timeout of 0.1 s" in ended.result.stderr


def test_a_coroutine_over_its_timeout_is_cancelled(registry, transport, start):
    cancelled = []

    @registry.subscribe(timeout=0.5)
    class Slow(Task):
        async def run(self):
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

    task = Slow()
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert view(transport, task.uuid).result.retcode == 408
    wait_for(lambda: cancelled == [True])  # the event loop cancels it in its own thread


def test_the_time_of_a_task_begins_with_it_also_behind_one_that_is_tried_again(registry):
    """Both are in the chunk of one thread, and what the first took is not of the second."""
    begun, go, told = threading.Event(), threading.Event(), []

    @registry.subscribe(retry=Retry(attempts=2))
    class Fails(Task):
        def run(self):
            time.sleep(0.3)
            raise ValueError("no")

    @registry.subscribe(timeout=0.2)
    class Follows(Task):
        def run(self):
            begun.set()
            assert go.wait(10)
            told.append(self.aborted)

    executor = Executor(Runner(registry.controller, GROUP), concurrency=1, wake=lambda: None)
    executor._slow, executor._share = 0.0, 1.0  # so that they are in one chunk
    state = PartitionState(Partition(TOPIC, 0))
    behind = Item(state, Record(TOPIC, 0, 2, b"k", Fails().to_Message().to_bytes(), (), 0))
    first = deque([Item(state, Record(TOPIC, 0, 0, b"k", Fails().to_Message().to_bytes(), (), 0)), behind])
    executor.submit([first, Item(state, Record(TOPIC, 0, 1, None, Follows().to_Message().to_bytes(), (), 0))])
    assert begun.wait(10)
    executor.look_after()
    assert [hand.unit for hand in executor._hands()] == [None]  # what is behind the first is not the second's
    go.set()
    wait_for(lambda: len(executor.finished) == 2)
    assert executor.stop(5)
    assert told == [None]
    assert list(executor.finished[0].rest) == [behind]


def test_a_thread_that_ignores_its_timeout_is_replaced_and_its_task_fails(registry, transport, start):
    """Other tasks go on, also one of the same key; what the thread gives later is dropped."""
    go = threading.Event()

    @registry.subscribe(timeout=0.1)
    class Deaf(Task):
        def run(self):
            go.wait(20)
            return Result(stdout="much later")

    @registry.subscribe
    class After(Task):
        def run(self):
            pass

    task, after = Deaf(), After()
    task.send(key="k")
    after.send(key="k")
    one = start(concurrency=1)
    wait_for(lambda: view(transport, task.uuid).ended)
    assert view(transport, task.uuid).result.retcode == 408
    assert "did not end when it was told" in view(transport, task.uuid).result.stderr
    wait_for(lambda: view(transport, after.uuid).ended)
    go.set()
    wait_for(lambda: committed(transport) == 2)
    one.stop()
    assert len(events(transport, EventType.STEP_FAILED)) == 1
    assert len(events(transport, EventType.STEP_DONE)) == 1


def test_a_failed_deadline_ends_the_operation_and_calls_onerror(registry, transport, start):
    hooks = []

    @registry.subscribe(timeout=0.05)
    class Slow(Task):
        def run(self):
            while self.aborted is None:
                time.sleep(0.01)

        def onerror(self, result):
            hooks.append(result.retcode)
            return result

    operation = Operation(tasks=[Slow(), Slow()])
    operation.launch()
    start()
    wait_for(lambda: view(transport, operation.uuid).ended)
    assert view(transport, operation.uuid).status == "FAILED"
    assert hooks == [408]


@pytest.mark.parametrize(("deaf", "most"), [(4, 2), (1, 0)])
def test_too_many_threads_given_up_end_the_worker_when_their_tasks_have_failed(registry, transport, deaf, most):
    go, ran = threading.Event(), []

    @registry.subscribe(timeout=0.02)
    class Deaf(Task):
        def run(self):
            go.wait(30)

    @registry.subscribe
    class Good(Task):
        def run(self):
            time.sleep(2.5)
            ran.append(self.uuid)

    Good().send()
    for _ in range(deaf):
        Deaf().send()
    worker = Worker(
        registry, topics=[TOPIC], group=GROUP, transport=transport, concurrency=deaf + 1, max_abandoned=most, drain_s=10
    )
    with pytest.raises(TransportError, match="threads were given up"):
        worker.run()
    go.set()
    assert worker.worn
    assert len([e for e in read(transport.records(f"{GROUP}.events")) if e.type == EventType.STEP_FAILED]) == deaf
    assert (len(ran), worker.stats["done"], worker.stats["failed"]) == (1, 1, deaf)
    assert committed(transport) == deaf + 1


# -- settling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [True, False])
def test_a_lost_answer_to_a_commit_neither_loses_nor_doubles(registry, transport, start, applied):
    """KAFKA.md finding 9: the settle id beside the committed offset tells whether the transaction happened."""

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    operation = Operation(tasks=[Step(), Step(), Step()])
    operation.launch()
    transport.fail_next("end_txn", TransportError("no answer"), applied=applied)
    start()
    wait_for(lambda: view(transport, operation.uuid).ended)
    wait_for(lambda: committed(transport) == 3)
    assert len(transport.records(TOPIC)) == 3
    assert len(events(transport, EventType.STEP_DONE)) == 3


def test_a_refused_record_of_a_batch_fails_its_own_task_only(registry, transport, start):
    """Its neighbours in the batch go on, and are told once."""

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    @registry.subscribe
    class Sends(Task):
        def run(self):
            assert Step().send(topic="nowhere").retcode == 202

    good = [Step() for _ in range(60)]
    for task in good[:30]:
        task.send()
    bad = Sends()
    bad.send()
    for task in good[30:]:
        task.send()
    start()
    wait_for(lambda: committed(transport) == 61)
    assert view(transport, bad.uuid).status == "FAILED"
    assert {e.uuid for e in events(transport, EventType.STEP_DONE)} >= {task.uuid for task in good}
    assert (
        len(events(transport, EventType.STEP_DONE)) - len(good) <= 1
    )  # told once more only by the one that was refused


def test_a_twin_ends_the_worker_with_a_clear_error(registry, transport, start):
    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    one = start(name="same")
    wait_for(lambda: one.worker.delivery == "exactly_once")
    stolen = [transport.sink(f"{GROUP}.same.{n}") for n in range(3)]
    for round_ in range(2):
        for sink in stolen:
            sink.close()
        stolen = [transport.sink(f"{GROUP}.same.{n}") for n in range(3)]
        for sink in stolen:
            sink.begin()
            sink.abort()
        for n in range(6):
            Step(uuid=f"{round_}-{n}").send()
            time.sleep(0.05)
    wait_for(lambda: not one.thread.is_alive())
    assert isinstance(one.error, FencedError)
    assert "name of its own" in one.error.message


def test_a_lost_offset_stops_the_worker_with_the_choice_or_obeys_it(registry, transport, start):
    ran = []

    @registry.subscribe
    class Step(Task):
        def run(self):
            ran.append(self.params["n"])

    sink = transport.sink()
    for n in range(10):
        sink.produce(OutRecord(TOPIC, None, Step(params={"n": n}).to_Message().to_bytes(), partition=0))
    first = start()
    wait_for(lambda: committed(transport) == 10)
    first.stop()
    for n in range(10, 20):
        sink.produce(OutRecord(TOPIC, None, Step(params={"n": n}).to_Message().to_bytes(), partition=0))
    end = max(r.offset for r in transport.records(TOPIC))
    transport.delete_before(Partition(TOPIC, 0), end - 4)
    refused = start()
    wait_for(lambda: not refused.thread.is_alive())
    assert isinstance(refused.error, OffsetLostError)
    assert "--on-lost-offset earliest" in refused.error.message
    start(on_lost_offset="earliest")
    wait_for(lambda: len(ran) == 15)
    assert sorted(ran[10:]) == [15, 16, 17, 18, 19]


def test_exactly_once_is_refused_on_the_embedded_broker(registry):
    class Embedded(MemoryTransport):
        def admin(self):
            admin = super().admin()
            admin.cluster_id = lambda timeout_s=10: "mockClusterabc"
            return admin

    with pytest.raises(ConfigurationError, match="at_least_once"):
        Worker(registry, topics=[TOPIC], transport=Embedded(), delivery="exactly_once").run()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delivery": "twice"}, "delivery='twice': give one of 'exactly_once', 'at_least_once'"),
        ({"ordering": "random"}, "ordering='random': give one of 'key', 'partition', 'none'"),
        ({"concurrency": 0}, "concurrency=0: give a whole number not below 1"),
        ({"on_lost_offset": "guess"}, "give one of 'stop', 'earliest', 'latest'"),
        ({"name": "a;b"}, "without a semicolon"),
        ({"settle_limit_s": 0}, "settle_limit_s=0"),
        ({"processes": 0}, "processes=0: give a whole number not below 1"),
        ({"processes": 2}, "transport with processes=2: an object cannot be given to another process; give config"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_what_to_give(registry, transport, options, said):
    with pytest.raises(ConfigurationError, match=said):
        Worker(registry, topics=[TOPIC], transport=transport, **options)


def several(registry, **options):
    return Worker(registry, topics=[TOPIC], config={"bootstrap.servers": "127.0.0.1:1"}, processes=2, **options)


def test_what_other_processes_cannot_be_told_is_refused(registry):
    callback = {"bootstrap.servers": "127.0.0.1:1", "stats_cb": print}
    with pytest.raises(ConfigurationError, match=r"config\['stats_cb'\] with processes=2: a builtin_function"):
        Worker(registry, topics=[TOPIC], config=callback, processes=2)
    with pytest.raises(ConfigurationError, match="until_idle with processes=2: give processes=1"):
        several(registry).run(until_idle=True)
    with pytest.raises(ConfigurationError, match="and it is to run in several processes: assign it to a name"):
        several(registry).run()
    with pytest.raises(ConfigurationError, match="Health port 65535 with 2 processes: process 1 would have port 65536"):
        several(registry, location="shop:registry", health_port=65535).run()


def test_several_processes_that_are_stopped_before_they_run_do_not_start(registry, caplog):
    worker = several(registry, location="shop:registry")
    worker.stop()
    worker.run()
    assert worker.stopping == 1
    assert "started" not in caplog.text


def test_a_process_is_killed_only_after_the_time_in_which_it_ends_itself(registry, monkeypatch):
    """Its own timer counts Worker.end_s from its drain on, and that covers all that may come together at its end."""
    given = []
    monkeypatch.setattr(members.Processes, "run", lambda self: given.append(self._end_s) or 0)
    worker = several(registry, location="shop:registry", drain_s=7, settle_limit_s=11)
    worker.run()
    assert given == [worker.end_s]
    assert worker.end_s > 7 + 2 * 11 + 50
    assert processes._MARGIN_S > 0


@pytest.mark.parametrize(
    ("code", "raised"), [(1, TransportError), (2, ConfigurationError), (3, FencedError), (9, TransportError)]
)
def test_what_ended_one_of_several_processes_is_raised(code, raised):
    with pytest.raises(raised, match=f"exit code {code}"):
        raise_for(code)
    assert raise_for(0) is raise_for(4) is None


def test_each_of_several_processes_is_told_all_settings_of_the_worker():
    """A new argument of Worker must not be forgotten there."""
    own = {"registry", "config", "transport", "name", "location", "health_port", "processes", "relay"}
    assert set(inspect.signature(Worker.__init__).parameters) - {"self"} == own | set(worker_module._SETTINGS)


def test_the_metadata_names_the_batch_that_was_settled(registry, transport, start):
    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    Step().send()
    start(name="w7")
    wait_for(lambda: committed(transport) == 1)
    stored = [p for p in transport.positions(GROUP) if p.offset > 0]
    assert decode(stored[0].offset, stored[0].metadata).settle_id.startswith("w7.")


class Wrapped:
    """A transport whose sinks are seen through ``wrap(sink, transactional_id)``."""

    def __init__(self, transport, wrap):
        self._transport = transport
        self._wrap = wrap

    def sink(self, transactional_id=None, **options):
        return self._wrap(self._transport.sink(transactional_id, **options), transactional_id)

    def __getattr__(self, name):
        return getattr(self._transport, name)


class Through:
    """A sink that hands everything on."""

    def __init__(self, sink):
        self._sink = sink

    def __getattr__(self, name):
        return getattr(self._sink, name)


def test_a_settle_thread_that_hangs_is_given_up_and_the_sequence_goes_on(registry, transport):
    """KAFKA.md finding 11: send_offsets() may block for ever. New producers with the same ids end what it left."""
    hung, free = [], threading.Event()

    class Hangs(Through):
        def send_offsets(self, positions, member):
            if not hung:
                hung.append(positions)
                free.wait(30)
            self._sink.send_offsets(positions, member)

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    operation = Operation(tasks=[Step(), Step(), Step()])
    operation.launch()
    one = Running(registry, Wrapped(transport, lambda sink, _: Hangs(sink)), settle_limit_s=1)
    wait_for(lambda: view(transport, operation.uuid).ended)
    free.set()  # the old thread comes back, and finds its producers fenced
    wait_for(lambda: committed(transport) == 3)
    assert one.worker.stats["settlers abandoned"] == 1
    assert len(transport.records(TOPIC)) == 3
    assert len(events(transport, EventType.STEP_DONE)) == 3
    one.stop()


def test_transactional_producers_take_turns_under_ids_that_a_restart_keeps(registry, transport):
    """KAFKA.md finding 7, and section 2 rule 7."""
    begun = []

    class Notes(Through):
        def __init__(self, sink, name):
            super().__init__(sink)
            self.name = name

        def send_offsets(self, positions, member):
            begun.append(self.name)
            self._sink.send_offsets(positions, member)

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    for _ in range(2):
        begun.clear()
        one = Running(registry, Wrapped(transport, Notes), name="slot")
        operation = Operation(tasks=[Step() for _ in range(6)])
        operation.launch()
        wait_for(lambda uuid=operation.uuid: view(transport, uuid).ended)
        one.stop()
        assert begun[:6] == [f"{GROUP}.slot.{n}" for n in (0, 1, 2, 0, 1, 2)]


def test_one_fence_renews_the_producer_and_is_no_twin(registry, transport, start):
    """KAFKA.md finding 8: a transaction that timed out answers the same."""

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    one = start(name="alone")
    wait_for(lambda: one.worker.delivery == "exactly_once" and transport.positions(GROUP) is not None)
    first = Operation(tasks=[Step()])
    first.launch()
    wait_for(lambda: view(transport, first.uuid).ended)
    thief = transport.sink(f"{GROUP}.alone.1")
    thief.begin()
    thief.abort()
    second = Operation(tasks=[Step() for _ in range(5)])
    second.launch()
    wait_for(lambda: view(transport, second.uuid).ended)
    assert one.thread.is_alive()
    wait_for(lambda: committed(transport) == 6)


def test_at_least_once_nothing_is_settled_while_a_commit_is_out_that_would_set_its_offsets_back(registry, transport):
    """That a partition is being worked on is committed first, and may hang in the client for as long as it likes."""
    sources, lands = [], threading.Event()

    class Late(Through):
        late = None

        @property
        def commit_overdue(self):
            return self.late is not None

        def commit(self, positions, timeout_s=10):
            if len(sources) == 1 and self.late is None and not lands.is_set():
                self.late = positions
                raise TransportError("no answer", retriable=True)
            self._sink.commit(positions, timeout_s)

        def poll(self, timeout_s, max_records=500):
            if self.late is not None and lands.is_set():
                late, self.late = self.late, None
                self._sink.commit(late)
            return self._sink.poll(timeout_s, max_records)

    class Transport(Wrapped):
        def source(self, group, **options):
            sources.append(Late(self._transport.source(group, **options)))
            return sources[-1]

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    for _ in range(3):
        Step().send(key="k")
    one = Running(registry, Transport(transport, lambda sink, _: sink), delivery="at_least_once")
    wait_for(lambda: one.worker.stats["done"] == 3)
    time.sleep(0.3)
    assert max(committed_of(transport), default=0) <= 0
    lands.set()
    wait_for(lambda: committed(transport) == 3)
    time.sleep(0.1)
    assert committed(transport) == 3
    one.stop()


class Beside:
    """A member that wants nothing but to be in the group."""

    def __init__(self, transport):
        self.source = transport.source(GROUP)
        self.source.subscribe(["no such topic"], self)
        self.source.poll(0)

    def on_assign(self, partitions): ...

    def on_revoke(self, partitions): ...

    def on_lost(self, partitions): ...


@pytest.fixture
def one_partition(registry):
    transport = MemoryTransport(auto_create=False)
    transport.admin().create([TopicSpec(name=TOPIC, partitions=1)])
    registry.configure(producer=BaseProducer(transport.sink()), topic=TOPIC)
    return transport


def test_nothing_is_settled_of_a_partition_that_others_have_gone_on_with(registry, one_partition):
    """KIP-848: for a moment two members may have one partition, and Kafka takes what both of them commit."""
    runs, begun, end = [], threading.Event(), threading.Event()

    @registry.subscribe
    class Step(Task):
        def run(self):
            runs.append(self.params["n"])
            begun.set()
            assert end.wait(5)

    for n in range(3):
        Step(params={"n": n}).send(key="k")
    one = Running(registry, one_partition)
    assert begun.wait(5)
    with one_partition._cluster.changed:  # as if another member had settled the first two
        others = Position(TOPIC, 0, 2, encode("other.1.7", 2, 2, ()))
        one_partition._cluster.group(GROUP).store(others, one_partition._cluster.next_sequence())
    Beside(one_partition)
    end.set()
    wait_for(lambda: committed(one_partition) == 3)
    assert one.worker.stats["taken over"] == 1
    done = [event for event in read(one_partition.records(f"{GROUP}.events")) if event.type == EventType.STEP_DONE]
    assert len(done) == 1  # the third: what was run of the others was dropped
    assert runs[-1] == 2
    one.stop()


def test_a_group_that_changes_is_no_reason_to_drop_anything(registry, one_partition):
    @registry.subscribe
    class Step(Task):
        def run(self):
            time.sleep(0.01)

    for _ in range(60):
        Step().send(key="k")
    one = Running(registry, one_partition)
    for _ in range(10):
        time.sleep(0.05)
        Beside(one_partition)
    wait_for(lambda: committed(one_partition) == 60)
    assert one.worker.stats["taken over"] == one.worker.stats["came again"] == 0
    assert one.worker.stats["done"] == 60
    one.stop()


@pytest.mark.parametrize("asks", ["committed", "batch"])
def test_a_stop_is_heard_while_partitions_come_and_it_is_not_known_where_they_were_left(
    registry, transport, monkeypatch, asks
):
    monkeypatch.setattr(loop, "_ASK_S", 0.2)
    waits = threading.Event()

    class Deaf(Through):
        def committed(self, partitions, timeout_s=10):
            if not waits.is_set():
                return self._sink.committed(partitions, timeout_s)
            time.sleep(timeout_s)
            raise TransportError("no answer", retriable=True)

    class Transport(Wrapped):
        def source(self, group, **options):
            return Deaf(self._transport.source(group, **options))

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    task = Step()
    task.send()
    one = Running(registry, Transport(transport, lambda sink, _: sink), settle_limit_s=1, drain_s=0)
    wait_for(lambda: committed(transport) == 1)
    engine = one.worker._loop
    wait_for(lambda: engine.batch is None and not engine.pending)  # the loop has heard of that commit, too
    if asks == "committed":
        waits.set()
    else:  # as if the settle thread had a batch of an earlier assignment, and no word came of it
        engine._ready = False
        engine.batch = Batch([], [Position(TOPIC, 2, 0)], None, "x", set(), since=time.monotonic())
    transport.add_partitions(TOPIC, 3)
    time.sleep(0.5)
    assert one.worker.status().partitions == 2
    one.stop(5)
    assert one.error is None
    assert committed(transport) == 1


def test_transactions_that_timed_out_are_no_sign_of_a_twin(registry):
    """The leader of a partition is away for longer than a transaction may take: each one that meets it is fenced."""
    transport = MemoryTransport(auto_create=False, transaction_timeout_s=0.2)
    transport.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    registry.configure(producer=BaseProducer(transport.sink()), topic=TOPIC)
    fenced = []

    class Slow(Through):
        def send_offsets(self, positions, member):
            self._sink.send_offsets(positions, member)
            if len(fenced) < 3:
                time.sleep(0.3)

        def commit(self, timeout_s=30):
            try:
                self._sink.commit()
            except FencedError:
                fenced.append(1)
                raise

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    operation = Operation(tasks=[Step(), Step()])
    operation.launch()
    one = Running(registry, Wrapped(transport, lambda sink, _: Slow(sink)), name="alone")
    wait_for(lambda: view(transport, operation.uuid).ended or not one.thread.is_alive())
    assert one.error is None
    assert len(fenced) == 3
    one.stop()


def test_nothing_is_committed_before_the_group_is_joined(registry, transport):
    """KAFKA.md finding 4: a classic group would take the offsets of somebody who is no member unchecked."""
    joined, sent = threading.Event(), []

    class Member:
        def __init__(self, member):
            self._member = member

        joined = False

    class Source(Through):
        def member(self):
            member = self._sink.member()
            return member if joined.is_set() else Member(member)

    class Late(Wrapped):
        def source(self, group, **options):
            return Source(self._transport.source(group, **options))

    class Notes(Through):
        def send_offsets(self, positions, member):
            sent.append(joined.is_set())
            self._sink.send_offsets(positions, member)

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    task = Step()
    task.send()
    one = Running(registry, Late(transport, lambda sink, _: Notes(sink)))
    wait_for(lambda: one.worker.stats["done"] == 1)
    time.sleep(0.3)
    assert sent == []
    joined.set()
    wait_for(lambda: committed(transport) == 1)
    assert sent == [True]
    one.stop()


def test_what_a_client_gives_twice_is_run_once(registry, transport):
    """KAFKA.md finding 12: a rewind without any callback."""
    ran = []

    class Rewinds(Through):
        def __init__(self, source):
            super().__init__(source)
            self.given = []

        def poll(self, timeout_s, max_records=500):
            records = self._sink.poll(timeout_s, max_records)
            again, self.given = self.given, list(records)
            return [*again, *records]

    class Transport(Wrapped):
        def source(self, group, **options):
            return Rewinds(self._transport.source(group, **options))

    @registry.subscribe
    class Step(Task):
        def run(self):
            ran.append(self.uuid)

    tasks = [Step() for _ in range(20)]
    for task in tasks:
        task.send()
    one = Running(registry, Transport(transport, lambda sink, _: sink))
    wait_for(lambda: committed(transport) == 20 and one.worker.stats["came again"] >= 20)
    assert sorted(ran) == sorted(task.uuid for task in tasks)
    one.stop()


def test_a_stop_settles_before_the_group_is_left(registry, transport):
    """KAFKA.md finding 13: under KIP-848 on_revoke comes after leaving, where nothing can be committed."""
    order = []

    class Leaves(Through):
        def close(self, timeout_s=10):
            order.append("left")
            self._sink.close(timeout_s)

    class Transport(Wrapped):
        def source(self, group, **options):
            return Leaves(self._transport.source(group, **options))

    class Notes(Through):
        def commit(self, timeout_s=30):
            self._sink.commit(timeout_s)
            order.append("committed")

    begun = threading.Event()

    @registry.subscribe
    class Step(Task):
        def run(self):
            begun.set()
            time.sleep(0.3)

    Step().send()
    one = Running(registry, Transport(transport, lambda sink, _: Notes(sink)))
    assert begun.wait(5)
    one.stop()
    assert order[:3] == ["committed", "committed", "left"]  # that it works on the partition, and what it did
    assert committed(transport) == 1


def test_a_group_that_takes_nobody_in_is_told(registry, transport, caplog, monkeypatch):
    """A broker that does not know the group protocol gives no error and no partition."""

    monkeypatch.setattr(loop, "_JOIN_S", 0.2)

    class Outside(Through):
        joined = False

        def poll(self, timeout_s, max_records=500):
            time.sleep(min(timeout_s, 0.05))
            return []

    class Transport(Wrapped):
        def source(self, group, **options):
            return Outside(self._transport.source(group, **options))

    one = Running(registry, Transport(transport, lambda sink, _: sink))
    wait_for(lambda: "has not taken this worker in" in caplog.text)
    assert one.worker.status().reasons[0] == "not in the group yet"
    one.stop()


def test_hand_offs_of_a_key_keep_their_order_when_a_task_sends_by_itself():
    """At least once: what a task sent is confirmed before its hand-off, and later ones of the key wait for that."""
    state, other = PartitionState(Partition(TOPIC, 0)), PartitionState(Partition(TOPIC, 1))

    def item(state, key, records, ahead=0):
        made = Item(state, Record(TOPIC, 0, 0, key, b"", (), 0))
        made.outcome = Outcome("done", [OutRecord(TOPIC, None, r.encode()) for r in records], ahead)
        return made

    batch = [
        item(state, b"k", ["a1"]),
        item(state, b"k", ["b-sent", "b1"], ahead=1),
        item(state, b"k", ["c1"]),
        item(state, b"k", ["d-sent", "d1"], ahead=1),
        item(state, b"k", ["e1"]),
        item(state, b"other", ["f1"]),
        item(other, b"k", ["g1"]),
        item(state, None, ["h-sent", "h1"], ahead=1),
        item(state, None, ["i1"]),
    ]
    rounds = [[record.value.decode() for _, record in round_] for round_ in _rounds(batch)]
    assert rounds == [["a1", "b-sent", "f1", "g1", "h-sent", "i1"], ["b1", "c1", "d-sent", "h1"], ["d1", "e1"]]
    assert [[n for n, _ in round_] for round_ in _rounds(batch[:1])] == [[0]]


def test_only_what_was_not_confirmed_is_sent_again(registry, transport):
    refusals = [1]

    class Loses(Through):
        def deliver(self, records, timeout_s=30):
            failures = self._sink.deliver(list(records), timeout_s)
            if refusals and len(records) > 1:
                refusals.clear()
                return [(len(records) - 1, DeliveryError("no answer"))]
            return failures

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    task = Operation(tasks=[Step(), Step()])
    task.launch()
    one = Running(registry, Wrapped(transport, lambda sink, _: Loses(sink)), delivery="at_least_once")
    wait_for(lambda: view(transport, task.uuid).ended)
    wait_for(lambda: committed(transport) == 2)
    one.stop()
    assert refusals == []
    assert len(transport.records(TOPIC)) == 2  # the next message was confirmed the first time
    told = [e.type for e in read(transport.records(f"{GROUP}.events"))]
    assert told.count(EventType.STEP_DONE) == 3  # the event that was not is there twice


class Fenced(Through):
    """A source whose name another worker takes over once ``fenced`` is set."""

    fenced = False

    def poll(self, timeout_s, max_records=500):
        if self.fenced:
            self.on_fenced()
            raise GroupError("Another worker took over the name w")
        return self._sink.poll(timeout_s, max_records)

    def on_fenced(self):
        pass


def fencing(transport, kind=Fenced):
    """A transport, and the sources it has made."""
    made = []

    class Transport(Wrapped):
        def source(self, group, **options):
            made.append(kind(self._transport.source(group, **options)))
            return made[-1]

    return Transport(transport, lambda sink, _: sink), made


def test_a_static_member_that_is_fenced_joins_once_more_and_then_is_a_twin(registry, transport):
    """The answer to its own join may have been lost with a broker: that looks like a twin."""
    fences, made = fencing(transport)

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    one = Running(registry, fences, name="w")
    wait_for(lambda: one.worker.status().partitions == 2)
    made[0].fenced = True
    wait_for(lambda: len(made) == 2)
    task = Step()
    task.send()
    wait_for(lambda: view(transport, task.uuid).ended)
    made[1].fenced = True
    wait_for(lambda: not one.thread.is_alive())
    assert isinstance(one.error, FencedError)
    assert "took over the name w" in one.error.message


def test_a_member_that_is_asked_to_stop_while_it_joins_once_more_ends_well(registry, transport):
    """A round that came with the stop was declined, and the client was fenced before poll() could say so."""

    class Declining(Fenced):
        def on_fenced(self):
            one.worker.stop()

        def close(self, timeout_s=10):
            self._sink.close(timeout_s)
            if self.fenced:
                raise loop._DeclinedError("Partitions that came are not taken over")

    fences, made = fencing(transport, Declining)

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    one = Running(registry, fences, name="w")
    wait_for(lambda: one.worker.status().partitions == 2)
    made[0].fenced = True
    wait_for(lambda: not one.thread.is_alive())
    assert one.error is None
    assert len(made) == 2


def test_a_quiet_partition_with_more_in_it_is_fetched_anew_once(registry, transport, monkeypatch):
    monkeypatch.setattr(loop, "_KICK_S", 0.05)
    sought = []

    class Stuck(Through):
        stuck = True

        def poll(self, timeout_s, max_records=500):
            records = self._sink.poll(min(timeout_s, 0.05), max_records)
            return [] if self.stuck else records

        def seek(self, position):
            sought.append(position)
            self.stuck = False
            self._sink.seek(position)

    class Transport(Wrapped):
        def source(self, group, **options):
            return Stuck(self._transport.source(group, **options))

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    first = Running(registry, transport)
    task = Step()
    task.send(key="k")
    wait_for(lambda: committed(transport) == 1)
    first.stop()
    for _ in range(3):
        Step().send(key="k")
    second = Running(registry, Transport(transport, lambda sink, _: sink))
    wait_for(lambda: committed(transport) == 4)
    time.sleep(0.5)  # the markers behind the last record are looked at too, and met once
    second.stop()
    assert 1 <= len(sought) <= 3


def test_noting_that_a_partition_is_worked_on_does_not_commit_what_is_not_settled(registry, transport):
    """The note failed once, so it comes with the next record: by then the first one is finished and being settled."""
    stuck, free, ran = threading.Event(), threading.Event(), []

    class Fails(Through):
        failed = False

        def commit(self, positions, timeout_s=10):
            if not self.failed:
                self.failed = True
                raise TransportError("coordinator loading", retriable=True)
            self._sink.commit(positions, timeout_s)

    class Transport(Wrapped):
        def source(self, group, **options):
            return Fails(self._transport.source(group, **options))

    class Hangs(Through):
        def produce_all(self, records):
            stuck.set()
            free.wait(20)
            self._sink.produce_all(records)

    @registry.subscribe
    class Step(Task):
        def run(self):
            ran.append(self.uuid)

    Step(uuid="1").send(key="k")
    one = Running(registry, Transport(transport, lambda sink, _: Hangs(sink)))
    assert stuck.wait(10)
    Step(uuid="2").send(key="k")
    wait_for(lambda: len(ran) == 2)
    below = [p.offset for p in transport.positions(GROUP)]
    free.set()
    one.stop()
    assert max(below, default=0) <= 0


def test_offsets_stored_late_leave_out_what_is_being_confirmed(registry, transport):
    """At least once: a commit that is tried again must not tell of the batch that is under way by then."""
    stuck, free, ran = threading.Event(), threading.Event(), []

    class Hangs(Through):
        def deliver(self, records, timeout_s=30):
            if len(ran) > 1:
                stuck.set()
                free.wait(20)
            return self._sink.deliver(records, timeout_s)

    class Fails(Through):
        failed = False

        def commit_later(self, positions, on_stored):
            if not self.failed:
                self.failed = True
                on_stored(TransportError("coordinator loading", retriable=True))
            else:
                self._sink.commit_later(positions, on_stored)

    class Transport(Wrapped):
        def source(self, group, **options):
            return Fails(self._transport.source(group, **options))

    @registry.subscribe
    class Step(Task):
        def run(self):
            ran.append(self.uuid)

    Step(uuid="1").send(key="k")
    one = Running(registry, Transport(transport, lambda sink, _: Hangs(sink)), delivery="at_least_once")
    wait_for(lambda: len(ran) == 1)
    time.sleep(0.1)
    Step(uuid="2").send(key="k")
    assert stuck.wait(10)
    time.sleep(1)
    below = [p.offset for p in transport.positions(GROUP)]
    free.set()
    one.stop()
    assert max(below, default=0) <= 1


@pytest.mark.parametrize("kind", ["twin", "fault"])
def test_a_worker_whose_settling_ended_it_does_not_commit_what_was_not_settled(registry, transport, start, kind):
    """What it had finished is run again by the next one."""

    class Breaks(Through):
        def produce_all(self, records):
            if kind == "twin":
                raise FencedError("another producer took over the same transactional id")
            raise RuntimeError("a fault of the settle thread")

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    operation = Operation(tasks=[Step(), Step()])
    operation.launch()
    one = Running(registry, Wrapped(transport, lambda sink, _: Breaks(sink)))
    wait_for(lambda: not one.thread.is_alive())
    assert one.error is not None
    assert max((p.offset for p in transport.positions(GROUP)), default=0) <= 0
    start()
    wait_for(lambda: view(transport, operation.uuid).ended)


def test_a_settle_thread_that_was_given_up_is_no_twin(registry, transport):
    """It finds its producers fenced by those that took over; a transaction that times out soon after is no proof."""
    hung, free, fenced = [], threading.Event(), []

    class Hangs(Through):
        def send_offsets(self, positions, member):
            if not hung:
                hung.append(positions)
                free.wait(30)
                try:
                    self._sink.send_offsets(positions, member)
                except FencedError:
                    fenced.append(1)
                    raise
            self._sink.send_offsets(positions, member)

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    first = Operation(tasks=[Step(), Step()])
    first.launch()
    one = Running(registry, Wrapped(transport, lambda sink, _: Hangs(sink)), settle_limit_s=1, name="alone")
    wait_for(lambda: view(transport, first.uuid).ended)
    free.set()
    wait_for(lambda: fenced)
    time.sleep(0.2)
    for n in range(3):  # what a coordinator answers that timed a transaction out
        thief = transport.sink(f"{GROUP}.alone.{n}")
        thief.begin()
        thief.abort()
        break
    second = Operation(tasks=[Step() for _ in range(5)])
    second.launch()
    wait_for(lambda: view(transport, second.uuid).ended or not one.thread.is_alive())
    assert one.error is None
    one.stop()


def test_what_waits_behind_a_retry_of_a_lost_partition_is_not_counted_for_ever(registry, transport, start):
    one = start()
    wait_for(lambda: one.worker.status().partitions == 2)
    state = PartitionState(Partition(TOPIC, 0))
    items = [Item(state, Record(TOPIC, 0, n, b"k", b"12345", (), 0)) for n in range(3)]
    items[0].outcome, items[0].rest = Outcome("retry", again_s=1.0), deque(items[1:])
    state.closed = state.gone = True  # while it was on its way back
    engine = one.worker._loop
    engine.in_flight, engine.bytes_in_flight = 3, 15
    engine._take_back(deque(items[:1]))
    assert (engine.in_flight, engine.bytes_in_flight) == (0, 0)


KEY_OF_1 = next(key for key in "abcdefgh" if partition_of(key.encode(), 2) == 1)


@pytest.mark.parametrize("window", ["before it begins", "after it has ended"])
def test_what_a_thread_has_at_hand_is_waited_for_when_its_partition_goes(
    registry, transport, start, monkeypatch, window
):
    """Between two lines of the executor's thread a busy machine may do anything, a rebalance too."""
    at_hand, go_on, runs = threading.Semaphore(0), threading.Event(), []

    def slowly(function):
        def slow(*args, **options):
            made = function(*args, **options)
            at_hand.release()
            assert go_on.wait(10)
            return made

        return slow

    if window == "before it begins":
        monkeypatch.setattr(Runner, "open", slowly(Runner.open))
    else:
        monkeypatch.setattr(Control, "end", slowly(Control.end))

    @registry.subscribe
    class Step(Task):
        def run(self):
            runs.append(self.params["n"])

    Step(params={"n": 1}).send(key=KEY_OF_1)
    one = start()
    wait_for(lambda: at_hand.acquire(blocking=False))
    other = start()
    time.sleep(0.5)  # the first one is to let go of the partition
    go_on.set()
    wait_for(lambda: other.worker._loop and Partition(TOPIC, 1) in other.worker._loop.parts)
    wait_for(lambda: max(committed_of(transport), default=0) == 1)
    one.stop()
    other.stop()
    assert runs == [1]
    assert (one.worker.stats["done"], other.worker.stats["done"]) == (1, 0)


def committed_of(transport):
    return [p.offset for p in transport.positions(GROUP)]


def test_what_is_finished_and_cannot_be_settled_counts_for_max_bytes(registry, transport):
    """A broker that is away for a while: memory is bounded, and what has gathered is no transaction that times out."""
    back, ran = threading.Event(), []

    class Away(Through):
        def produce_all(self, records):
            if not back.is_set():
                time.sleep(0.02)
                raise TransportError("the broker is away", retriable=True, extra={"abort": True})
            self._sink.produce_all(records)

    @registry.subscribe
    class Step(Task):
        def run(self):
            ran.append(self.uuid)
            return Result(retval={"much": "x" * 50_000})

    for _ in range(400):
        Step(params={"much": "x" * 50_000}).send()
    one = Running(registry, Wrapped(transport, lambda sink, _: Away(sink)), max_bytes=1_000_000, max_poll_records=10)
    wait_for(lambda: len(ran) >= 10)
    time.sleep(2)
    gathered = len(ran)
    back.set()
    wait_for(lambda: sum(committed_of(transport)) == 400, 20)
    wait_for(lambda: one.worker._loop.bytes_unsettled == 0)
    one.stop()
    assert gathered < 60


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_a_topic_without_brokers_holds_up_only_what_goes_there(registry, transport, delivery):
    """One record that cannot be produced never blocks the batch; it waits, and what has its key waits behind it."""
    transport.admin().create([TopicSpec(name="away", partitions=1)])
    back = threading.Event()

    def gone(records):
        return [] if back.is_set() else [n for n, record in enumerate(records) if record.topic == "away"]

    class Away(Through):
        def produce_all(self, records):
            for n in gone(records):
                time.sleep(0.2)  # as long as a transaction may take
                told = DeliveryError("timed out", retriable=True, extra={"topic": "away", "index": n})
                raise TransportError("aborted", extra={"abort": True, "record": told})
            self._sink.produce_all(records)

        def deliver(self, records, timeout_s=30):
            failed = gone(records)
            assert self._sink.deliver([r for n, r in enumerate(records) if n not in failed], timeout_s) == []
            return [(n, DeliveryError("timed out", retriable=True, extra={"topic": "away"})) for n in failed]

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    @registry.subscribe
    class Sends(Task):
        def run(self):
            Step().send(topic="away")

    sends, behind = Sends(), Step()
    sends.send(key="k")
    behind.send(key="k")
    others = [Step() for _ in range(20)]
    for task in others:
        task.send()
    one = Running(registry, Wrapped(transport, lambda sink, _: Away(sink)), delivery=delivery)
    wait_for(lambda: all(view(transport, task.uuid).ended for task in others), 8)
    assert not view(transport, sends.uuid).ended
    if delivery == "exactly_once":
        assert not view(transport, behind.uuid).ended
    back.set()
    wait_for(lambda: sum(committed_of(transport)) == 22, 20)
    assert view(transport, sends.uuid).ended
    assert view(transport, behind.uuid).ended
    assert len(transport.records("away")) == 1
    one.stop()


def test_a_member_that_joins_once_more_commits_though_its_last_request_is_never_answered(registry, transport):
    made = []

    class Fenced(Through):
        fenced = deaf = False

        def poll(self, timeout_s, max_records=500):
            if self.fenced:
                raise GroupError("Another worker took over the name w")
            return self._sink.poll(timeout_s, max_records)

        def commit_later(self, positions, on_stored):
            if not self.deaf:
                self._sink.commit_later(positions, on_stored)

    class Transport(Wrapped):
        def source(self, group, **options):
            made.append(Fenced(self._transport.source(group, **options)))
            return made[-1]

    @registry.subscribe
    class Step(Task):
        def run(self):
            pass

    one = Running(registry, Transport(transport, lambda sink, _: sink), name="w", delivery="at_least_once")
    wait_for(lambda: one.worker.status().partitions == 2)
    made[0].deaf = True
    Step().send(key="k")
    wait_for(lambda: one.worker.stats["done"] == 1 and one.worker._loop._storing)
    one.worker._loop._close = lambda *_: None  # a client that is dead calls on_lost, which waits for nothing
    made[0].fenced = True
    wait_for(lambda: len(made) == 2)
    Step().send(key="k")
    wait_for(lambda: committed(transport) == 2, 5)
    one.stop()
