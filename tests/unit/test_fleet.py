"""kser workers and kser lag: who is there and what is left to do, on the memory transport."""

import json
import re
import threading
import time

import pytest
from click.testing import CliRunner

from kser import NotFound, OperationRegistry, Task
from kser.cli.connection import Drivers
from kser.cli.main import cli
from kser.cli.workers import _numbers, fleet
from kser.producer import BaseProducer
from kser.telemetry import Running as RunningTask
from kser.telemetry import TaskStarted, WorkerState, telemetry_topic
from kser.testing import eventually
from kser.transport import OutRecord, Position, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.worker import lag as lags
from kser.worker.lag import PartitionLag, lag_of
from kser.worker.offsets import Parked, encode
from tests.unit.test_telemetry import TASK
from tests.unit.test_worker import GROUP, TOPIC, Running


@pytest.fixture
def transport():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name=TOPIC, partitions=2)])
    return made


@pytest.fixture
def run(transport):
    def invoke(*args):
        drivers = Drivers(lambda config: transport)
        servers = ("--group", GROUP, "--bootstrap-servers", "127.0.0.1:1")
        return CliRunner().invoke(cli, [*args, *servers], obj=drivers)

    return invoke


def tell(transport, *records):
    sink = transport.sink()
    for record in records:
        sink.produce(OutRecord(telemetry_topic(GROUP), record.key.encode(), record.to_bytes()))
    assert sink.flush(5) == 0


def state(worker="w", ago_s=0.0, **fields):
    at = int((time.time() - ago_s) * 1000)
    fields = {"state": "running", "interval_s": 5.0, "version": "1.2", "host": "h", "pid": 7, **fields}
    return WorkerState(worker=worker, group=GROUP, at=at, **fields)


# -- workers ---------------------------------------------------------------------------------------------------------


def test_the_last_word_of_each_worker_counts(transport):
    tell(transport, state("b"), state("a", 9, pid=1), TaskStarted(task=TASK), state("a", 3, pid=2), state("old", 100))
    found = fleet(transport, GROUP, 60)
    assert [(each.worker, each.pid) for each in found] == [("a", 2), ("b", 7)]
    assert fleet(transport, "another", 60) == []


def test_workers_are_shown_with_what_they_run(transport, run):
    tasks = [
        RunningTask(uuid="u1", entrypoint="shop.Charge", seconds=61.5, heartbeat_s_ago=2.0),
        RunningTask(uuid="u2", entrypoint="shop.\x1b[31mRed", seconds=5.0),
    ]
    busy = state("w-1", partitions={"work": [0, 1, 2, 7]}, running=tasks, running_count=5, stats={"done": 9})
    tell(transport, busy, state("w-2", reasons=["paused"]), state("w-3", 30), state("w-4", state="stopped"))
    result = run("workers")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "WORKER",
        "STATE",
        "SEEN",
        "KSER",
        "HOST",
        "PID",
        "PARTITIONS",
        "RUNNING",
        "DONE",
        "FAILED",
    ]
    assert re.fullmatch(r"w-1 +running +0 s ago +1\.2 +h +7 +work 0-2,7 +5 +9 +0", lines[1])
    assert lines[2:5] == [
        "  shop.Charge[u1] 62 s, heartbeat 2 s ago",
        "  shop.\ufffd[31mRed[u2] 5 s",
        "  ... 3 more",
    ]
    assert [line.split()[1] for line in lines[5:]] == ["paused", "gone", "stopped"]
    found = json.loads(run("workers", "--format", "json").stdout)
    assert [each["state"] for each in found] == ["running", "running", "gone", "stopped"]
    assert (found[0]["worker"], found[0]["partitions"], found[0]["running"][0]["uuid"]) == (
        "w-1", {"work": [0, 1, 2, 7]}, "u1",
    )  # fmt: skip
    assert 30 <= found[2]["seen_s_ago"] < 60


def test_nobody_there_is_no_failure(transport, run):
    for _ in range(2):
        assert run("workers").stdout == "No worker of group g has told of itself within 60 s\n"
        assert json.loads(run("workers", "--format", "json").stdout) == []
        tell(transport, state("w", 100))


@pytest.mark.parametrize(("numbers", "shown"), [([], ""), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 2, 3, 9], "0,2-3,9")])
def test_numbers_of_partitions(numbers, shown):
    assert _numbers(numbers) == shown


# -- lag -------------------------------------------------------------------------------------------------------------


def put(transport, *partitions):
    sink = transport.sink()
    for partition in partitions:
        sink.produce(OutRecord(TOPIC, b"k", b"v", (), partition))
    assert sink.flush(5) == 0


def commit(transport, partition, offset, end, unfinished=(), parked=None):
    class Listener:
        def on_assign(self, partitions):
            return None

        on_revoke = on_lost = on_assign

    source = transport.source(GROUP)
    source.subscribe([TOPIC], Listener())
    eventually(lambda: source.poll(0) is not None and len(source.assignment()) == 2)
    source.commit([Position(TOPIC, partition, offset, encode("s", offset, end, unfinished, parked))])
    source.close()


def of(found, partition):
    return found[partition].unfinished, found[partition].parked, found[partition].exact


def test_what_was_never_committed_is_all_to_be_done(transport):
    put(transport, 0, 0, 0, 1)
    found = lag_of(transport, GROUP, [TOPIC])
    assert found[0] == PartitionLag(topic=TOPIC, partition=0, committed=-1, end=3, unfinished=3, parked=0, exact=True)
    assert of(found, 1) == (1, 0, True)


def test_what_was_finished_out_of_order_is_not_counted(transport):
    put(transport, *[0] * 10)
    commit(transport, 0, offset=2, end=8, unfinished=[2, 5], parked={5: Parked(2, 0)})
    found = lag_of(transport, GROUP, [TOPIC])
    assert (found[0].committed, found[0].end) == (2, 10)
    assert of(found, 0) == (4, 1, True)  # 2 and 5, which is parked; 8 and 9, which nobody has taken


def test_markers_of_transactions_are_not_counted(transport):
    sink = transport.sink("t")
    for _ in range(3):
        sink.begin()
        sink.produce(OutRecord(TOPIC, b"k", b"v", (), 0))
        sink.commit()
    found = lag_of(transport, GROUP, [TOPIC])
    assert (found[0].end, *of(found, 0)) == (6, 3, 0, True)
    commit(transport, 0, offset=5, end=5)
    assert of(lag_of(transport, GROUP, [TOPIC]), 0) == (0, 0, True)


def test_very_many_are_not_counted_one_by_one_and_it_says_so(transport, run, monkeypatch):
    monkeypatch.setattr(lags, "EXACT", 2)
    put(transport, *[0] * 5, 1)
    assert of(lag_of(transport, GROUP, [TOPIC]), 0) == (5, 0, False)
    assert of(lag_of(transport, GROUP, [TOPIC]), 1) == (1, 0, True)
    result = run("lag", "--topics", TOPIC)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"work +0 +- +5 +<= 5 +0", lines[1])
    assert re.fullmatch(r"work +1 +- +1 +1 +0", lines[2])
    assert lines[3] == "At most 6 unfinished"


def test_an_open_transaction_makes_it_a_bound(transport, monkeypatch):
    monkeypatch.setattr(lags, "_COUNT_S", 0.1)
    put(transport, 0)
    sink = transport.sink("t")
    sink.begin()
    sink.produce(OutRecord(TOPIC, b"k", b"v", (), 0))
    assert of(lag_of(transport, GROUP, [TOPIC]), 0) == (1, 0, False)
    sink.abort()
    assert of(lag_of(transport, GROUP, [TOPIC]), 0) == (1, 0, True)


def test_a_topic_that_does_not_exist_is_told(transport, run):
    with pytest.raises(NotFound, match="There is no topic nowhere"):
        lag_of(transport, GROUP, [TOPIC, "nowhere"])
    result = run("lag", "--topics", "nowhere")
    assert result.exit_code == 1
    assert "There is no topic nowhere" in result.stderr


def test_the_lag_of_a_group_at_work_goes_to_nothing(transport, run):
    go = threading.Event()
    registry = OperationRegistry(producer=BaseProducer(transport.sink()), topic=TOPIC)

    @registry.subscribe
    class Long(Task):
        def run(self):
            go.wait(10)

    for _ in range(20):
        Long().send()
    one = Running(registry, transport, concurrency=2)
    eventually(lambda: one.worker.status().running)
    assert sum(each.unfinished for each in lag_of(transport, GROUP, [TOPIC])) == 20
    go.set()
    eventually(lambda: sum(each.unfinished for each in lag_of(transport, GROUP, [TOPIC])) == 0)
    found = json.loads(run("lag", "--topics", TOPIC, "--format", "json").stdout)
    assert [(each["topic"], each["partition"], each["unfinished"]) for each in found] == [(TOPIC, 0, 0), (TOPIC, 1, 0)]
    [mine] = eventually(lambda: json.loads(run("workers", "--format", "json").stdout))
    assert mine["worker"] == one.worker.name
    one.stop()
