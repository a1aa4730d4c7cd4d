"""A task that takes many times max.poll.interval.ms, beside 10,000 short ones in the same partition."""

import uuid
from collections import Counter
from pathlib import Path

import pytest

from kser.confluent.producer import Producer
from kser.worker.offsets import decode
from tests.apps.long_task import Long, Short, registry
from tests.processes import new_topic, process, wait_for

COUNT = 10_000
#: max.poll.interval.ms is 3 s: the long task takes five times that.
SECONDS, LIMITS = (
    15,
    ("-X", "session.timeout.ms=2000", "-X", "heartbeat.interval.ms=500", "-X", "max.poll.interval.ms=3000"),
)


@pytest.fixture
def run(apache, tmp_path):
    """Starts a worker on a topic with the long task first; gives what was noted."""
    bootstrap = apache.bootstrap_servers
    topic, group = new_topic(bootstrap, partitions=1), f"g{uuid.uuid4().hex[:8]}"
    runs, kill = tmp_path / "runs", tmp_path / "kill"
    runs.touch()
    with Producer({"bootstrap.servers": bootstrap}) as producer:
        registry.configure(producer=producer, topic=topic)
        with producer.batch():
            Long(params={"seconds": SECONDS}).send()
            for n in range(COUNT):
                Short(params={"n": n}).send()

    class Run:
        noted = staticmethod(lambda: runs.read_text().splitlines())
        kill_file = kill
        log = tmp_path / "worker.log"

        @staticmethod
        def worker():
            return process(
                *("-m", "kser", "worker", "tests.apps.long_task:registry", "--topics", topic, "--group", group),
                *("--bootstrap-servers", bootstrap, "--log-level", "warning", "--drain", "20", *LIMITS),
                log=tmp_path / "worker.log",
                RUNS=str(runs),
                KILL=str(kill),
            )

        @staticmethod
        def committed():
            from kser.confluent.transport import ConfluentTransport
            from kser.transport import Partition

            source = ConfluentTransport({"bootstrap.servers": bootstrap}).source(group)
            try:
                return source.committed([Partition(topic, 0)])[0]
            finally:
                source.close()

    return Run


def shorts(noted):
    return Counter(line.split()[1] for line in noted if line.startswith("short"))


def test_a_long_task_runs_once_and_delays_nobody(run):
    with run.worker() as worker:
        wait_for(lambda: any(line.startswith("begin") for line in run.noted()), 60, "the long task's begin")
        wait_for(lambda: len(shorts(run.noted())) == COUNT, 60, "the short ones")
        assert not any(line.startswith("end") for line in run.noted()), "the short ones waited for the long one"
        wait_for(lambda: any(line.startswith("end") for line in run.noted()), 60, "the long task's end")

        def all_stored():
            position = run.committed()
            _, end, unfinished, *_ = decode(position.offset, position.metadata)
            return not unfinished and position.offset >= end >= COUNT + 1

        wait_for(all_stored, 30, "the last commit")
        worker.terminate()
        assert worker.wait(30) == 0, run.log.read_text()[-2000:]
    noted = run.noted()
    assert [line.split()[0] for line in noted if " long " in line] == ["begin", "end"]
    assert set(shorts(noted).values()) == {1}


def test_after_a_kill_at_its_end_only_the_long_task_runs_again(run):
    run.kill_file.touch()
    with run.worker() as first:
        first.wait(90)
        assert first.returncode == -9, run.log.read_text()[-2000:]
    before = run.noted()
    assert len(shorts(before)) == COUNT
    with run.worker() as second:
        wait_for(lambda: any(line.startswith("end long") for line in run.noted()), 90, "the long task's end")
        second.terminate()
        assert second.wait(30) == 0, run.log.read_text()[-2000:]
    noted = run.noted()
    assert [line.split()[0] for line in noted if "long" in line] == ["begin", "killed", "begin", "end"]
    assert set(shorts(noted).values()) == {1}
    assert Path(run.kill_file).exists() is False
