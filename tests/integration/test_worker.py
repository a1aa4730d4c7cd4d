"""A worker process and what befalls one: long tasks, dead brokers, files, signals."""

import os
import signal
import time
import uuid

import pytest

from kser import Message
from kser.confluent.producer import Producer
from tests.apache_kafka import ApacheKafka
from tests.processes import DICE, new_topic, process, views, wait_for, worker


def send(bootstrap: str, topic: str, **params) -> str:
    """One roll of the dice; its uuid."""
    message = Message(uuid=str(uuid.uuid4()), entrypoint="dice.Roll", params=params)
    with Producer({"bootstrap.servers": bootstrap}) as producer:
        result = producer.send(topic, message, timeout=30)
    assert result.retcode == 0, result.stderr
    return message.uuid


def done(bootstrap: str, group: str, *uuids: str):
    found = views(bootstrap, group)
    return all(uuid in found and found[uuid].status == "SUCCESS" for uuid in uuids)


@pytest.mark.apache
def test_a_task_longer_than_the_poll_interval_keeps_its_partition_and_runs_once(apache, tmp_path):
    """K-86, T-01: the client is polled while the task runs."""
    bootstrap, group = apache.bootstrap_servers, f"g{uuid.uuid4().hex[:8]}"
    topic, tell = new_topic(bootstrap), tmp_path / "tell"
    limits = ("-X", "max.poll.interval.ms=6000", "-X", "session.timeout.ms=6000", "-X", "heartbeat.interval.ms=500")
    command = ("-m", "kser", "worker", DICE, "--topics", topic, "--group", group, "--bootstrap-servers", bootstrap)
    long = send(bootstrap, topic, sleep=14, tell=str(tell))
    after = send(bootstrap, topic, tell=str(tell))
    with process(*command, *limits, log=tmp_path / "log"):
        wait_for(lambda: done(bootstrap, group, long, after), 60, "both tasks")
        time.sleep(1)
    ran = [line.split()[0] for line in tell.read_text().splitlines()]
    assert sorted(ran) == sorted([long, after]), (tmp_path / "log").read_text()


@pytest.mark.apache
def test_a_worker_and_a_producer_outlive_their_broker(tmp_path):
    """K-91: no broker for a while is waited out; nothing is lost, nobody has to be started again."""
    group, log, tell = f"g{uuid.uuid4().hex[:8]}", tmp_path / "log", tmp_path / "tell"
    with ApacheKafka() as kafka:
        bootstrap = kafka.bootstrap_servers
        topic = new_topic(bootstrap)
        with worker(bootstrap, topic, group, log, "w") as running:
            first = send(bootstrap, topic)
            wait_for(lambda: done(bootstrap, group, first), 40, "the first task")
            cut = send(bootstrap, topic, sleep=3, tell=str(tell))
            wait_for(tell.exists, 20, "the second task's start")
            kafka.kill(1)  # -9, while the task runs: its event and its offset find no broker
            time.sleep(5)
            kafka.start_node(1)
            last = send(bootstrap, topic)
            wait_for(lambda: done(bootstrap, group, first, cut, last), 90, f"all three: {log.read_text()[-2000:]}")
            assert running.poll() is None
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == 0


def test_an_idle_worker_ends_within_a_second_of_sigterm(embedded, tmp_path):
    """K-87."""
    topic = f"t{uuid.uuid4().hex[:8]}"
    embedded.create_topic(topic, 2)
    bootstrap, group = embedded.bootstrap_servers, f"g{uuid.uuid4().hex[:8]}"
    with worker(bootstrap, topic, group, tmp_path / "log", "w") as running:
        first = send(bootstrap, topic)
        wait_for(lambda: done(bootstrap, group, first), 30, "the task")
        time.sleep(0.5)
        begun = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
        assert time.monotonic() - begun < 2.5  # of it, leaving the group and the interpreter's own end


def test_sigterm_lets_the_running_task_end(embedded, tmp_path):
    topic, tell = f"t{uuid.uuid4().hex[:8]}", tmp_path / "tell"
    embedded.create_topic(topic, 1)
    bootstrap, group = embedded.bootstrap_servers, f"g{uuid.uuid4().hex[:8]}"
    with worker(bootstrap, topic, group, tmp_path / "log", "w") as running:
        running_task = send(bootstrap, topic, sleep=2, tell=str(tell))
        wait_for(tell.exists, 30, "the task's start")
        running.send_signal(signal.SIGTERM)
        assert running.wait(15) == 0
    assert done(bootstrap, group, running_task)
    with worker(bootstrap, topic, group, tmp_path / "log", "again"):
        other = send(bootstrap, topic)
        wait_for(lambda: done(bootstrap, group, other), 30, "another task")
    assert len(tell.read_text().splitlines()) == 1  # settled: the next worker did not run it again


def test_a_pause_file_stops_a_running_worker_from_taking_more(embedded, tmp_path):
    """K-87: as an operator uses it, from outside."""
    topic, pause = f"t{uuid.uuid4().hex[:8]}", tmp_path / "pause.lock"
    embedded.create_topic(topic, 1)
    bootstrap, group, log = embedded.bootstrap_servers, f"g{uuid.uuid4().hex[:8]}", tmp_path / "log"
    command = ("-m", "kser", "worker", DICE, "--topics", topic, "--group", group, "--bootstrap-servers", bootstrap)
    with process(*command, log=log, LOCK_FILE=str(pause)):
        first = send(bootstrap, topic)
        wait_for(lambda: done(bootstrap, group, first), 30, "the first task")
        pause.touch()
        wait_for(lambda: "Consumer is paused" in log.read_text(), 10, "the pause")
        second = send(bootstrap, topic)
        time.sleep(1)
        assert not done(bootstrap, group, second)
        pause.unlink()
        wait_for(lambda: done(bootstrap, group, second), 30, "the second task")


def test_a_worker_without_a_broker_says_so_in_one_line(tmp_path):
    log = tmp_path / "log"
    command = ("-m", "kser", "worker", DICE, "--topics", "t", "--bootstrap-servers", "127.0.0.1:1")
    with process(*command, log=log) as running:
        assert running.wait(40) == 1
    said = log.read_text()
    assert "kser: error: " in said
    assert "Traceback" not in said


def test_the_same_operation_on_the_embedded_broker(embedded, tmp_path):
    """Nested operations over two workers on librdkafka's mock cluster; one is killed (-9) on the way."""
    from tests.apps.dice import Evening, registry

    topic = f"t{uuid.uuid4().hex[:8]}"
    embedded.create_topic(topic, 4)
    bootstrap, group, log = embedded.bootstrap_servers, f"g{uuid.uuid4().hex[:8]}", tmp_path / "log"
    with (
        Producer({"bootstrap.servers": bootstrap}) as producer,
        worker(bootstrap, topic, group, log, "one") as one,
        worker(bootstrap, topic, group, log, "two"),
    ):
        registry.configure(producer=producer, topic=topic)
        operations = [Evening(params={"sleep": 0.02}) for _ in range(12)]
        for operation in operations:
            assert operation.send().result.retcode == 0
        wait_for(lambda: len(views(bootstrap, group)) >= 6, 30, "some operations")
        os.kill(one.pid, signal.SIGKILL)
        wait_for(lambda: done(bootstrap, group, *(o.uuid for o in operations)), 60, f"all: {log.read_text()[-1500:]}")
    registry.producer, registry.topic = None, None
    assert all(len(view.steps) == 6 for view in views(bootstrap, group).values())
