"""The worker's loop on the memory transport: what is settled, when, and what happens when something goes wrong."""

import logging
import os
import signal
import threading
import time
import uuid
from contextlib import nullcontext
from unittest.mock import Mock

import pytest

from kser import ConfigurationError, Message, Operation, OperationRegistry, Result, Task, Worker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.errors import TransportError
from kser.events import EventType, OperationView, read
from kser.producer import BaseProducer
from kser.transport import Partition, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker.offsets import decode
from kser.worker.runner import Runner

GROUP, TOPIC = "g", "work"


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


class Running:
    """A worker in a thread of its own."""

    def __init__(self, registry, transport, **options):
        # Their threads take half a second to end; what is about them asks for them.
        options = {"topics": [TOPIC], "relay": False, "control": False, **options}
        self.worker = Worker(registry, group=GROUP, transport=transport, **options)
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.worker.run()
        except Exception as exc:
            self.error = exc

    def stop(self, seconds=10):
        self.worker.stop()
        self.thread.join(seconds)
        assert not self.thread.is_alive()


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
        options = {"delivery": request.param, **options}
        running.append(Running(registry, transport, **options))
        return running[-1]

    yield go
    for one in running:
        if one.thread.is_alive():
            one.worker.stop()
            one.stop()


def view(transport, uuid):
    found = OperationView(uuid)
    for event in read(transport.records(f"{GROUP}.events")):
        found.apply(event)
    return found


def committed(transport):
    """How many records are finished by what the group has committed."""
    done = 0
    for position in transport.source(GROUP).committed([Partition(TOPIC, n) for n in range(2)]):
        _, end, unfinished, *_ = decode(position.offset, position.metadata)
        there = [r.offset for r in transport.records(TOPIC) if r.partition == position.partition]
        done += sum(1 for offset in there if offset < end and offset not in unfinished)
    return done


def test_an_operation_runs_to_its_end_and_everything_is_committed(registry, transport, start):
    done = []

    @registry.subscribe
    class Step(Task):
        def run(self):
            done.append(self.params["n"])
            return Result(retval={"last": self.params["n"], f"step{self.params['n']}": True})

    @registry.subscribe
    class Three(Operation):
        def build_tasks(self, **params):
            return [Step(params={"n": n}) for n in range(3)]

    operation = Three().build()
    assert operation.launch().retcode == 0
    one = start()
    wait_for(lambda: view(transport, operation.uuid).ended)
    one.stop()
    ended = view(transport, operation.uuid)
    assert (ended.status, done) == ("SUCCESS", [0, 1, 2])
    assert ended.result.retval == {"last": 2, "step0": True, "step1": True, "step2": True}
    assert committed(transport) == 3
    assert one.worker.stats == {"done": 3}


def test_nothing_is_committed_before_the_work_is_done(registry, transport, start):
    """K-84."""
    begun, go = threading.Event(), threading.Event()

    @registry.subscribe
    class Slow(Task):
        def run(self):
            begun.set()
            go.wait(10)

    Slow().send()
    start()
    assert begun.wait(5)
    time.sleep(0.3)
    assert committed(transport) == 0
    go.set()
    wait_for(lambda: committed(transport) == 1)


def test_what_a_stopped_worker_did_not_end_is_run_by_the_next(registry, transport, start):
    """SIGTERM's way: the budget passes, the task stays unsettled, the next owner runs it under the same uuid."""
    seen, go = [], threading.Event()

    @registry.subscribe
    class Stuck(Task):
        def run(self):
            seen.append(self.uuid)
            if len(seen) == 1:
                go.wait(20)

    task = Stuck()
    task.send()
    first = start(drain_s=0.2)
    wait_for(lambda: seen)
    begun = time.monotonic()
    first.stop()
    assert time.monotonic() - begun < 3
    assert committed(transport) == 0
    start()
    wait_for(lambda: len(seen) == 2)
    assert seen == [task.uuid, task.uuid]
    wait_for(lambda: committed(transport) == 1)
    go.set()


def test_a_running_task_is_drained_within_the_budget(registry, transport, start):
    begun = threading.Event()

    @registry.subscribe
    class Short(Task):
        def run(self):
            begun.set()
            time.sleep(0.3)

    for _ in range(5):
        Short().send()
    one = start(drain_s=10, concurrency=1)
    assert begun.wait(5)
    one.stop()
    assert committed(transport) == one.worker.stats["done"] == 1  # what was taken but not begun is left


def test_a_stopped_second_time_waits_for_nothing(registry, transport, start):
    begun, go = threading.Event(), threading.Event()

    @registry.subscribe
    class Stuck(Task):
        def run(self):
            begun.set()
            go.wait(20)

    Stuck().send()
    one = start(drain_s=60)
    assert begun.wait(5)
    one.worker.stop()
    time.sleep(0.1)
    start_of_end = time.monotonic()
    one.stop()
    assert time.monotonic() - start_of_end < 3
    go.set()


def test_a_task_whose_partition_goes_ends_and_is_settled_first(registry, transport, start):
    ran = []

    @registry.subscribe
    class Half(Task):
        def run(self):
            time.sleep(0.02)
            ran.append(self.uuid)

    tasks = [Half() for _ in range(60)]
    for task in tasks:
        task.send()
    start(name="one", concurrency=1)
    wait_for(lambda: len(ran) > 5)
    start(name="two", concurrency=1)  # takes one of the two partitions away
    wait_for(lambda: committed(transport) == 60)
    assert sorted(ran) == sorted(task.uuid for task in tasks)  # none lost, none twice: the hand-over is clean
    workers = {e.worker for e in read(transport.records(f"{GROUP}.events"))}
    assert workers == {"one", "two"}


def test_a_failed_task_is_settled_and_told(registry, transport, start):
    @registry.subscribe
    class Bad(Task):
        def run(self):
            raise ValueError("no")

    task = Bad()
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert view(transport, task.uuid).status == "FAILED"
    wait_for(lambda: committed(transport) == 1)


def test_poison_is_told_and_does_not_stop_the_worker(registry, transport, start):
    """K-90, T-22."""
    sink = transport.sink()
    from kser.transport import OutRecord

    for value in (b"\xff\xfe", None, b"[]", b'{"uuid": "u"}', b"{"):
        sink.produce(OutRecord(TOPIC, b"k", value))

    @registry.subscribe
    class Good(Task):
        def run(self):
            return Result(stdout="ok")

    task = Good()
    task.send()
    one = start()
    wait_for(lambda: committed(transport) == 6)
    one.stop()
    rejected = [e for e in read(transport.records(f"{GROUP}.events")) if e.type == EventType.MESSAGE_REJECTED]
    assert len(rejected) == 5
    assert one.worker.stats == {"rejected": 5, "done": 1}


def test_a_message_of_another_group_is_settled_not_run(registry, transport, start):
    from kser.transport import OutRecord

    @registry.subscribe
    class Mine(Task):
        def run(self):
            raise AssertionError("must not run")

    value = Mine().to_Message().to_bytes()
    transport.sink().produce(OutRecord(TOPIC, b"k", value, [("kser-group", b"other")]))
    one = start()
    wait_for(lambda: committed(transport) == 1)
    one.stop()
    assert one.worker.stats == {"foreign": 1}
    assert transport.records(f"{GROUP}.events") == []


def test_the_next_message_is_repeated_until_the_broker_takes_it(registry, transport, start):
    """A refusal for now holds the offset back and is tried again; nothing is lost."""

    @registry.subscribe
    class Step(Task):
        def run(self):
            return None

    operation = Operation(tasks=[Step(), Step()])
    operation.launch()
    transport.fail_next("produce", TransportError("the broker is busy", retriable=True))
    start(events="sequence")  # the first to write must be the task
    wait_for(lambda: view(transport, operation.uuid).ended)
    assert view(transport, operation.uuid).status == "SUCCESS"
    wait_for(lambda: committed(transport) == 2)


def test_a_next_message_refused_for_good_ends_the_operation(registry, transport, start):
    @registry.subscribe
    class Step(Task):
        def run(self):
            return None

    operation = Operation(tasks=[Step(), Step()])
    operation.launch()
    transport.fail_next("produce", TransportError("topic authorization failed", retriable=False))
    start(events="sequence")  # the first to write must be the task
    wait_for(lambda: view(transport, operation.uuid).ended)
    ended = view(transport, operation.uuid)
    assert ended.status == "FAILED"
    assert "topic authorization failed" in ended.result.stderr
    wait_for(lambda: committed(transport) == 1)


def test_what_a_task_sends_is_refused_before_its_operation_goes_on(registry, transport, start):
    """The task fails then, and the next step must not have been sent."""
    ran = []

    @registry.subscribe
    class Child(Task):
        def run(self):
            ran.append("child")

    @registry.subscribe
    class Parent(Task):
        def run(self):
            assert Child().send().retcode == 202

    @registry.subscribe
    class After(Task):
        def run(self):
            ran.append("after")

    operation = Operation(tasks=[Parent(), After()])
    operation.launch()
    transport.fail_next("produce", TransportError("topic authorization failed", retriable=False))
    start(events="sequence")  # the first to write must be the task
    wait_for(lambda: view(transport, operation.uuid).ended)
    wait_for(lambda: committed(transport) == 1)
    assert view(transport, operation.uuid).status == "FAILED"
    assert ran == []


def test_an_event_refused_for_good_does_not_end_the_operation(registry, transport, start, caplog):
    @registry.subscribe
    class Step(Task):
        def run(self):
            return None

    task = Step()
    task.send()
    transport.fail_next("produce", TransportError("events may not be written", retriable=False))
    start(events="sequence")  # the first to write must be the task
    wait_for(lambda: committed(transport) == 1)
    assert "events may not be written" in caplog.text


def test_a_commit_that_fails_is_tried_again(registry, transport, start):
    @registry.subscribe
    class Step(Task):
        def run(self):
            return None

    transport.fail_next("commit", TransportError("coordinator loading", retriable=True))
    Step().send()
    start()
    wait_for(lambda: committed(transport) == 1)


def test_a_pause_file_pauses_and_its_removal_resumes(registry, transport, start, tmp_path, monkeypatch, caplog):
    """K-87, K-89."""
    pause, ran = tmp_path / "pause", []
    monkeypatch.setenv("LOCK_FILE", str(pause))

    @registry.subscribe
    class Note(Task):
        def run(self):
            ran.append(self.uuid)

    pause.touch()  # one found at the start is obeyed
    Note().send()
    with caplog.at_level(logging.WARNING):
        start()
        wait_for(lambda: "Consumer is paused" in caplog.text)
        time.sleep(0.3)
        assert ran == []
        pause.unlink()
        wait_for(lambda: len(ran) == 1)
        pause.touch()
        time.sleep(0.5)
        Note().send()
        time.sleep(0.3)
        assert len(ran) == 1
        pause.unlink()
        wait_for(lambda: len(ran) == 2)


def test_a_terminate_file_ends_the_worker_and_a_stale_one_is_removed(registry, transport, start, tmp_path, monkeypatch):
    """K-88."""
    terminate = tmp_path / "terminate"
    monkeypatch.setenv("TERMINATE_FILE", str(terminate))
    terminate.touch()
    one = start()
    wait_for(lambda: not terminate.exists())
    time.sleep(0.3)
    assert one.thread.is_alive()
    terminate.touch()
    one.thread.join(5)
    assert not one.thread.is_alive()


def test_the_running_file_tells_what_runs_and_is_removed(registry, transport, start, tmp_path, monkeypatch):
    running, go = tmp_path / "sub" / "running", threading.Event()
    monkeypatch.setenv("RUNNING_FILE", str(running))

    @registry.subscribe
    class Long(Task):
        def run(self):
            go.wait(10)

    task = Long()
    task.send()
    one = start()
    wait_for(lambda: running.exists() and running.read_text() == f"{Long.path}[{task.uuid}]")
    go.set()
    wait_for(lambda: running.read_text() == "")
    one.stop()
    assert not running.exists()


def test_what_a_task_sends_leaves_when_it_succeeds_and_not_when_it_fails(registry, transport, start):
    ran = []

    @registry.subscribe
    class Child(Task):
        def run(self):
            ran.append((self.params["of"], self.uuid))

    @registry.subscribe
    class Parent(Task):
        def run(self):
            sent = Child(params={"of": self.params["name"]}).send()
            assert sent.retcode == 202
            if self.params["name"] == "bad":
                raise ValueError("after sending")

    bad, good = Parent(params={"name": "bad"}), Parent(params={"name": "good"})
    bad.send()
    good.send()
    start()
    wait_for(lambda: ran)
    time.sleep(0.3)
    namespace = uuid.UUID(good.uuid)
    assert ran == [("good", str(uuid.uuid5(namespace, "0")))]


def test_an_async_task_runs(registry, transport, start):
    import asyncio

    @registry.task
    async def waits(seconds):
        await asyncio.sleep(seconds)
        return {"waited": seconds}

    task = waits(params={"seconds": 0.01})
    task.send()
    start()
    wait_for(lambda: view(transport, task.uuid).ended)
    assert view(transport, task.uuid).result.retval == {"waited": 0.01}


def test_sigterm_ends_a_worker_in_the_main_thread_with_handlers_put_back(registry, transport):
    before = signal.getsignal(signal.SIGTERM)
    worker = Worker(registry, topics=[TOPIC], group=GROUP, transport=transport)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    worker.run()
    assert time.monotonic() - begun < 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_is_heard_while_it_is_not_known_what_was_told_to_the_group(registry):
    class Deaf(MemoryTransport):
        def reader(self, topics, start="beginning"):
            raise TransportError("no broker answers", retriable=True)

    transport = Deaf()
    transport.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    one = Running(registry, transport, control=True)
    time.sleep(0.3)
    assert one.thread.is_alive()
    one.stop(5)
    assert one.error is None


@pytest.mark.parametrize("stopped", [True, False])
def test_no_answer_at_the_start_is_no_failure_of_one_that_was_asked_to_stop_meanwhile(registry, stopped):
    class Dead(MemoryTransport):
        def admin(self):
            if stopped:
                worker.stop()
            return Mock(cluster_id=Mock(side_effect=TransportError("no broker answers")))

    worker = Worker(registry, topics=[TOPIC], group=GROUP, transport=Dead())
    with nullcontext() if stopped else pytest.raises(TransportError, match="no broker answers"):
        worker.run()


def test_missing_group_topics_are_refused_when_they_may_not_be_made(registry):
    strict = MemoryTransport(auto_create=False)
    strict.admin().create([TopicSpec(name=TOPIC, partitions=1)])
    worker = Worker(registry, topics=[TOPIC], group=GROUP, transport=strict, create_topics=False)
    with pytest.raises(ConfigurationError, match="kser topics create --group g"):
        worker.run()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 2.5}, "concurrency=2.5: give a whole number not below 1"),
        ({"processes": 1.5}, "processes=1.5: give a whole number not below 1"),
        ({"health_port": 99999}, "health_port=99999: give a port from 1 to 65535"),
        ({"health_port": "x"}, "health_port='x': give a whole number"),
        ({"drain_s": float("inf")}, "drain_s=inf: give a number"),
        ({"topics": [""]}, "topics: '' is no topic name"),
        ({"topics": ["t t"]}, "topics: 't t' is no topic name"),
        ({"topics": ["a", "a"]}, "name each topic once"),
        ({"group": "a/b"}, "group='a/b': its topics begin with it"),
        ({"name": 5}, "name=5: give a text without a semicolon"),
        ({"topics": "work"}, "give a list"),
        ({"topics": []}, "give a list"),
        ({"group": ""}, "name the consumer group"),
        ({"drain_s": -1}, "drain_s=-1: give a number not below 0"),
        ({"transport": None}, "bootstrap.servers"),
    ],
)
def test_values_that_cannot_be_are_refused_at_once(registry, transport, options, said):
    with pytest.raises(ConfigurationError, match=said):
        Worker(registry, **({"transport": transport, "group": GROUP, "topics": ["work"]} | options))


def test_the_dummy_pair_runs_end_to_end(caplog):
    """K-98, K-101: producer to consumer in one process."""
    registry = OperationRegistry()

    @registry.subscribe(name="dummy.Roll")
    class Roll(Task):
        def run(self):
            return Result(uuid=self.uuid, stdout="You made a 1")

    config = {"bootstrap_servers": f"cluster-{uuid.uuid4()}", "group_id": "dice"}
    with caplog.at_level(logging.INFO):
        assert Producer(config).send("dice", Message(uuid="u1", entrypoint="dummy.Roll")).retcode == 0
        consumer = Consumer(config, ["dice"])
        consumer.REGISTRY = registry.controller
        consumer.run(until_idle=True)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    expected = [
        "Operation registry: loaded dummy.Roll",
        "Producer.Success: dummy.Roll[u1]: Message dummy.Roll[u1] sent in dice",
        "Consumer.Starting...",
        "Roll.Success: dummy.Roll[u1]: You made a 1",
        "Controller.Success: dummy.Roll[u1]: You made a 1",
    ]
    assert [line for line in lines if line in expected] == expected[1:]


def test_a_consumer_that_is_asked_to_stop_before_it_runs_ends_at_once():
    """run() in a thread and stop() right after it: whoever is first, it ends."""
    consumer = Consumer(topics=[TOPIC])
    consumer.stop()
    thread = threading.Thread(target=consumer.run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_record_that_breaks_the_worker_is_left_as_it_is_with_those_of_its_key_and_the_worker_ends_at_once(
    registry, transport, start, monkeypatch
):
    done = []

    @registry.subscribe
    class Step(Task):
        def run(self):
            done.append(self.params["n"])

    real = Runner.execute

    def execute(self, work):
        if work.kmsg.params["n"] == 1:
            raise RuntimeError("a fault of kser itself")
        return real(self, work)

    monkeypatch.setattr(Runner, "execute", execute)
    for n in range(4):
        Step(params={"n": n}).send(key="same")
    one = start(max_poll_records=2)  # so that some wait in its unit, and some behind that
    one.thread.join(5)
    assert not one.thread.is_alive()
    assert done == [0]
    assert committed(transport) == 1


def test_what_waits_behind_a_unit_of_a_partition_that_goes_is_not_waited_for(registry, transport, start):
    begun, go_on = threading.Event(), threading.Event()

    @registry.subscribe
    class Step(Task):
        def run(self):
            begun.set()
            go_on.wait(5)

    for n in range(6):
        Step(params={"n": n}).send(key="same")
    one = start(max_poll_records=2)
    wait_for(lambda: one.worker._loop is not None and one.worker._loop.in_flight == 6)
    begun.wait(5)
    one.worker.stop()
    wait_for(lambda: one.worker._loop.draining)
    go_on.set()
    one.thread.join(5)
    assert not one.thread.is_alive()
    assert one.worker._loop.in_flight == 0
    assert committed(transport) == 1
