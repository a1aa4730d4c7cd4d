"""Operations over a real Apache Kafka: many workers, kill -9, and what the events say of it."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid

import pytest

from kser import Message
from kser.confluent.producer import Producer
from kser.events import EventType
from tests import processes
from tests.apache_kafka import free_ports
from tests.apps.dice import Evening, Launch, registry
from tests.processes import new_topic, ready, views, wait_for, worker

pytestmark = pytest.mark.apache


@pytest.fixture
def bootstrap(apache):
    return apache.bootstrap_servers


@pytest.fixture
def service(bootstrap):
    with Producer({"bootstrap.servers": bootstrap}) as producer:
        yield producer
    registry.producer, registry.topic = None, None


@contextlib.contextmanager
def two_workers(bootstrap, topic, group, log):
    """Two processes, by their names, each with three of the six partitions.

    Without that the first would be done with everything before the second has begun.
    """
    ports = dict(zip(("one", "two"), free_ports(2, None), strict=True))
    with contextlib.ExitStack() as both:
        workers = {
            name: both.enter_context(worker(bootstrap, topic, group, log, name, "--health", str(port)))
            for name, port in ports.items()
        }
        for name, port in ports.items():
            wait_for(lambda port=port: (said := ready(port)) and said["partitions"] == 3, 30, f"the share of {name}")
        yield workers


def test_300_operations_run_by_two_workers_all_succeed(bootstrap, service, tmp_path):
    """300 operations from one process, two worker processes, six partitions: all SUCCESS, both worked."""
    topic, group = new_topic(bootstrap, partitions=6), f"g{uuid.uuid4().hex[:8]}"
    registry.configure(producer=service, topic=topic)
    log = tmp_path / "workers.log"
    with two_workers(bootstrap, topic, group, log) as workers:
        with service.batch():
            operations = [Launch(params={"sleep": 0.005}).build() for _ in range(300)]
            for operation in operations:
                operation.launch()

        def all_ended():
            found = views(bootstrap, group)
            return len(found) == 300 and all(view.ended for view in found.values()) and found

        found = wait_for(all_ended, 60, "the end of 300 operations")
        for child in workers.values():
            child.send_signal(signal.SIGTERM)
        assert [child.wait(20) for child in workers.values()] == [0, 0], log.read_text()[-2000:]
    assert {operation.uuid for operation in operations} == set(found)
    assert collections.Counter(view.status for view in found.values()) == {"SUCCESS": 300}
    assert all(len(view.steps) == 3 for view in found.values())
    shares = collections.Counter(step.worker for view in found.values() for step in view.steps)
    assert set(shares) == {"one", "two"}


def test_an_operation_whose_worker_is_killed_between_two_rolls_is_finished_by_the_other(bootstrap, service, tmp_path):
    topic, group = new_topic(bootstrap, partitions=6), f"g{uuid.uuid4().hex[:8]}"
    registry.configure(producer=service, topic=topic)
    tell, log = tmp_path / "rolls", tmp_path / "workers.log"

    def rolls():
        return [line.split() for line in tell.read_text().splitlines()] if tell.exists() else []

    with two_workers(bootstrap, topic, group, log) as workers:
        operation = Launch(params={"sleep": 1, "tell": str(tell)}).build()
        assert operation.launch().retcode == 0
        wait_for(lambda: len(rolls()) >= 2, 30, "the second roll")
        victim = next(name for name, child in workers.items() if child.pid == int(rolls()[0][1]))
        os.kill(workers[victim].pid, signal.SIGKILL)
        view = wait_for(
            lambda: (v := views(bootstrap, group).get(operation.uuid)) and v.ended and v,
            90,
            f"the end of {operation.uuid}: {log.read_text()[-1500:]}",
        )
    (other,) = workers.keys() - {victim}
    assert view.status == "SUCCESS"
    assert [step.worker for step in view.steps] == [victim, other, other]
    assert len({uuid for uuid, _, _ in rolls()}) == 3  # the roll that was killed ran again, under the same uuid
    assert len(rolls()) == 4


def test_a_worker_killed_between_expanding_and_committing_makes_the_same_children(bootstrap, service, tmp_path):
    topic, group = new_topic(bootstrap, partitions=1), f"g{uuid.uuid4().hex[:8]}"
    registry.configure(producer=service, topic=topic)
    log = tmp_path / "workers.log"
    operation = Evening(params={}).send()
    assert operation.result.retcode == 0
    with processes.process("-m", "tests.apps.kill_at_commit", bootstrap, topic, group, log=log) as killed:
        assert killed.wait(60) == -signal.SIGKILL
    before = [json.loads(r.value) for r in processes.records(bootstrap, topic)]
    with worker(bootstrap, topic, group, log, "second"):
        wait_for(
            lambda: (v := views(bootstrap, group).get(operation.uuid)) and v.ended,
            90,
            f"the end of {operation.uuid}: {log.read_text()[-1500:]}",
        )
    after = [json.loads(r.value) for r in processes.records(bootstrap, topic)]
    made = [m["uuid"] for m in before[1:]]
    assert made, "the killed worker had emitted what follows"
    assert all([m["uuid"] for m in after].count(uuid) >= 2 for uuid in made[:1])  # emitted again ...
    view = views(bootstrap, group)[operation.uuid]
    assert view.status == "SUCCESS"
    assert len(view.steps) == 6  # ... but it is the same two games of three rolls
    rolls = {m["uuid"] for m in after if m["entrypoint"] == "dice.Roll"}
    assert len(rolls) == 6


def test_a_failed_task_ends_its_operations_and_is_named(bootstrap, service, tmp_path):
    topic, group = new_topic(bootstrap, partitions=2), f"g{uuid.uuid4().hex[:8]}"
    registry.configure(producer=service, topic=topic)
    operation = Evening(params={"fail": True}).build()
    with worker(bootstrap, topic, group, tmp_path / "log", "w"):
        assert operation.launch().retcode == 0
        view = wait_for(lambda: (v := views(bootstrap, group).get(operation.uuid)) and v.ended and v, 40, "the end")
    assert view.status == "FAILED"
    assert view.result.retval["failed_task"]["path"] == "dice.Roll"
    assert view.result.uuid == operation.uuid
    assert "the die rolled off the table" in view.result.stderr
    ended = [e for e in processes.events(bootstrap, group) if e.type == EventType.OPERATION_ENDED]
    assert [e.entrypoint for e in ended] == ["dice.Launch", "dice.Evening"]


def test_launch_watch_follows_from_a_third_process(bootstrap, tmp_path):
    topic, group = new_topic(bootstrap, partitions=3), f"g{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", "kser", "launch", processes.DICE, "Launch", "--topic", topic, "--group", group]
    command += ["--bootstrap-servers", bootstrap, "--watch", "--timeout", "40"]

    def launch(params):
        return subprocess.run(
            [*command, "--params", json.dumps(params)],
            cwd=processes.ROOT,
            env=processes.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    log = tmp_path / "log"
    with worker(bootstrap, topic, group, log, "one"), worker(bootstrap, topic, group, log, "two"):
        good, bad = launch({}), launch({"fail": True})
    assert good.returncode == 0, good.stderr + log.read_text()[-1500:]
    assert "SUCCESS" in good.stdout
    assert good.stdout.count("dice.Roll") >= 3
    assert bad.returncode == 1, bad.stderr
    assert "dice.Roll" in bad.stdout + bad.stderr
    assert "the die rolled off the table" in bad.stdout + bad.stderr


def test_an_operation_ends_where_its_class_is_known(bootstrap, service, tmp_path):
    """The consumer that runs the last roll does not know the operation: its end travels to one that does."""
    rolls, games, group = new_topic(bootstrap, 2), new_topic(bootstrap, 2), f"g{uuid.uuid4().hex[:8]}"
    tell, log = tmp_path / "tell", tmp_path / "log"
    message = Message(str(uuid.uuid4()), "split.Game", {"rolls": rolls, "tell": str(tell)})
    with (
        worker(bootstrap, rolls, group, log, "rolls", app="tests.apps.rolls:registry"),
        worker(bootstrap, games, group, log, "games", app="tests.apps.games:registry"),
    ):
        assert service.send(games, message).retcode == 0
        view = wait_for(
            lambda: (v := views(bootstrap, group).get(message.uuid)) and v.ended and v,
            60,
            f"the end: {log.read_text()}",
        )
    assert view.status == "SUCCESS"
    assert [step.worker for step in view.steps] == ["rolls", "rolls"]
    ended = [e for e in processes.events(bootstrap, group) if e.type == EventType.OPERATION_ENDED]
    assert [(e.worker, e.note) for e in ended] == [("games", "")]
    assert tell.read_text().splitlines() == ["status RUNNING", "status SUCCESS", "onsuccess You made a 2"]
