"""What waits behind a record that waits: it is bounded, and it does not stop what has nothing to do with it."""

import threading
import time

import pytest

from kser import OperationRegistry, Retry, Task
from kser.control import Change, Pause, PauseKind, send_control
from kser.producer import BaseProducer
from kser.transport import Partition, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.transport.partitioner import partition_of
from tests.unit.test_worker import GROUP, TOPIC, Running, wait_for

#: The worker may hold so many, and half of that may wait.
MOST = 40


@pytest.fixture
def transport():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    return made


@pytest.fixture
def registry(transport):
    return OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)


@pytest.fixture
def start(registry, transport):
    running = []

    def go(**options):
        running.append(Running(registry, transport, **{"max_in_flight": MOST, "max_poll_records": 10, **options}))
        return running[-1]

    yield go
    for one in running:
        one.worker.stop()
        one.stop()


def key_of(partition, start=0):
    """A key whose messages come into this partition."""
    return next(f"key-{n}" for n in range(start, 1000) if partition_of(f"key-{n}".encode(), 2) == partition)


def tell(transport, change):
    send_control(transport.sink(), GROUP, [change])


def held(worker, of=None):
    """Records that the worker has in memory and has not run; of one partition, or of all."""
    loop = worker._loop
    states = [state for state in loop.parts.values() if of is None or state.of == of]
    return sum(len(state.running) for state in states)


def test_a_paused_class_with_a_backlog_does_not_stop_what_is_in_other_partitions(registry, transport, start):
    done = []

    @registry.subscribe
    class Slow(Task):
        def run(self):
            done.append("slow")

    @registry.subscribe
    class Other(Task):
        def run(self):
            done.append("other")

    pause = Pause(PauseKind.TASK, Slow.path, "ann", time.time_ns() // 1_000_000)
    tell(transport, Change(pause.key, pause))
    for _ in range(5 * MOST):
        Slow().send(key=key_of(0))
    worker = start(control=True).worker
    wait_for(lambda: worker._loop is not None and worker._loop.clogged == {Partition(TOPIC, 0)})
    for _ in range(3 * MOST):
        Other().send(key=key_of(1))
    wait_for(lambda: done.count("other") == 3 * MOST)
    assert "slow" not in done


def test_what_waits_for_a_paused_class_makes_room_for_other_keys_of_its_partition(registry, transport, start):
    done = []

    @registry.subscribe
    class Slow(Task):
        def run(self):
            done.append("slow")

    @registry.subscribe
    class Other(Task):
        def run(self):
            done.append("other")

    pause = Pause(PauseKind.TASK, Slow.path, "ann", time.time_ns() // 1_000_000)
    tell(transport, Change(pause.key, pause))
    for _ in range(2 * MOST):
        Slow().send(key=key_of(0))
    Other().send(key=key_of(0, start=500))
    start(control=True)
    wait_for(lambda: done == ["other"])
    # From there they come back. What was in flight when it got full waits here: how much that is, threads decide.
    assert len(transport.records(f"{GROUP}.retry.10s")) >= MOST // 2


def test_a_strict_retry_with_a_backlog_holds_up_its_partition_only_and_loses_no_order(registry, transport, start):
    open_, done, others = threading.Event(), [], []

    @registry.subscribe(retry=Retry(attempts=1000, backoff_s=0.1, factor=1), order="strict")
    class Strict(Task):
        def run(self):
            if not open_.is_set():
                raise ConnectionError("away")
            done.append(self.params["n"])

    @registry.subscribe
    class Other(Task):
        def run(self):
            others.append(1)

    for n in range(5 * MOST):
        Strict(params={"n": n}).send(key=key_of(0))
    worker = start().worker
    wait_for(lambda: worker._loop is not None and worker._loop.clogged == {Partition(TOPIC, 0)})
    for _ in range(3 * MOST):
        Other().send(key=key_of(1))
    wait_for(lambda: len(others) == 3 * MOST)
    assert held(worker, Partition(TOPIC, 0)) <= MOST
    open_.set()
    wait_for(lambda: len(done) == 5 * MOST)
    assert done == list(range(5 * MOST))


def test_large_messages_that_wait_have_a_budget_of_their_own_too(registry, transport, start):
    others = []

    @registry.subscribe(retry=Retry(attempts=1000, backoff_s=0.1, factor=1), order="strict")
    class Strict(Task):
        def run(self):
            raise ConnectionError("away")

    @registry.subscribe
    class Other(Task):
        def run(self):
            others.append(1)

    for _ in range(30):
        Strict(params={"text": "x" * 10_000}).send(key=key_of(0))
    worker = start(max_in_flight=4000, max_poll_records=2, max_bytes=100_000).worker
    wait_for(lambda: worker._loop is not None and worker._loop.clogged == {Partition(TOPIC, 0)})
    for _ in range(30):
        Other(params={"text": "x" * 10_000}).send(key=key_of(1))
    wait_for(lambda: len(others) == 30)
    assert held(worker, Partition(TOPIC, 0)) < 12
