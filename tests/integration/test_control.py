"""Control on real brokers: what a worker knows when it begins and while it runs, and the commands as processes."""

import json
import subprocess
import sys
import threading
import time

import pytest

from kser import control
from kser.confluent.transport import ConfluentTransport
from kser.control import Abort, Change, control_topic, read_control, send_control
from kser.errors import ConfigurationError
from kser.events import Event, EventType, events_topic
from kser.testing import eventually
from kser.transport import OutRecord, Partition
from kser.worker.control import ControlWatch
from tests.brokers import unique
from tests.kafka_proxy import KafkaProxy
from tests.processes import ROOT, environment

#: Rolls and cleans at once what is written: a segment that is a tenth of a second old, and any part of it.
COMPACTING = {
    "cleanup.policy": "compact",
    "segment.ms": "100",
    "min.cleanable.dirty.ratio": "0.0",
    "max.compaction.lag.ms": "100",
}


class Stage:
    """A group with its topics on one broker."""

    def __init__(self, broker, partitions=1, **settings):
        self.group = unique("g")
        self.topic = control_topic(self.group)
        self.servers = broker.bootstrap_servers
        self.transport = ConfluentTransport({"bootstrap.servers": self.servers})
        broker.create_topic(self.topic, partitions, **({"config": settings} if settings else {}))
        broker.create_topic(events_topic(self.group), 4)
        self.sink = self.transport.sink()
        self.watches = []

    def tell(self, *changes):
        send_control(self.sink, self.group, changes)

    def events(self, *events):
        topic = events_topic(self.group)
        assert self.sink.deliver([OutRecord(topic, e.key.encode(), e.to_bytes("w1")) for e in events]) == []

    def watch(self, transport=None, **options):
        made = ControlWatch(transport or self.transport, self.group, **options)
        self.watches.append(made)
        made.start()
        return made

    def kser(self, *args, timeout=60):
        servers = ("--bootstrap-servers", self.servers, "--group", self.group)
        command = [sys.executable, "-m", "kser", *map(str, args), *servers]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )

    def close(self):
        ended = [watch.stop(15) for watch in self.watches]
        self.sink.close()
        assert all(ended)


@pytest.fixture
def stage():
    """``stage(broker, ...)`` is a new Stage, closed at the end."""
    made = []

    def make(broker, *args, **options):
        made.append(Stage(broker, *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["embedded", "apache"])
def broker(request):
    """Either broker."""
    return request.getfixturevalue(request.param)


def aborts(numbers, run=1):
    now = time.time_ns() // 1_000_000
    return [Change(f"abort:op-{n}", Abort(f"op-{n}", run, "test", now)) for n in numbers]


def event(kind, status, uuid="op-1", run=1):
    return Event(type=kind, uuid=uuid, entrypoint="shop.Order", operation=uuid, run=run, status=status)


# -- the watch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_worker_knows_all_that_was_told_before_it_is_ready_and_hears_the_rest(broker, stage, partitions):
    one = stage(broker, partitions)
    one.tell(*aborts(range(2000)))
    one.tell(*(Change(f"abort:op-{n}", None) for n in range(0, 2000, 2)))
    control.pause(group=one.group, transport=one.transport, topic="mails")
    heard = threading.Event()
    watch = one.watch(changed=heard.set)
    assert watch.wait_ready(30)
    assert set(watch.aborts) == {f"op-{n}" for n in range(1, 2000, 2)}
    assert watch.paused_topics == {"mails"}
    heard.clear()
    control.abort("later", group=one.group, transport=one.transport, sink=one.sink, run=3)
    assert heard.wait(10)
    assert watch.aborted("later", 3)
    assert not watch.aborted("later", 4)
    control.resume(group=one.group, transport=one.transport, topic="mails")
    eventually(lambda: not watch.paused_topics)


def test_an_abort_is_known_to_whoever_begins_after_it_was_confirmed(broker, stage):
    one = stage(broker)
    for n in range(5):
        one.tell(*aborts([n]))
        watch = one.watch()
        assert watch.wait_ready(30)
        assert set(watch.aborts) == {f"op-{k}" for k in range(n + 1)}


def test_a_compacted_topic_is_read_to_its_end_with_what_was_taken_away(apache, stage):
    """Offsets are missing then, and the newest of them may belong to nothing that is given."""
    one = stage(apache, **COMPACTING)
    rounds = 20
    for number in range(1, rounds + 1):
        one.tell(*aborts(range(50), number))
    one.tell(*(Change(f"abort:op-{n}", None) for n in range(40)))
    where = [Partition(one.topic, 0)]
    written = rounds * 50 + 40

    def compacted():
        one.tell(Change("pause:group", None))  # segments roll when something is written
        time.sleep(0.2)  # the age at which one rolls
        return sum(len(batch) for batch in one.transport.read(where)) < written // 2

    eventually(compacted, 90, "compaction")
    watch = one.watch()
    assert watch.wait_ready(30)
    assert {uuid: told.run for uuid, told in watch.aborts.items()} == {f"op-{n}": rounds for n in range(40, 50)}
    assert not watch.paused_group
    one.tell(*aborts([0]))
    eventually(lambda: watch.aborted("op-0"))


def test_a_worker_goes_on_with_what_it_knows_while_its_broker_is_away_and_hears_the_rest_later(apache, stage):
    one = stage(apache)
    one.tell(*aborts([1]))
    with KafkaProxy(apache.bootstrap_servers) as proxy:
        through = ConfluentTransport({"bootstrap.servers": proxy.bootstrap_servers, "reconnect.backoff.max.ms": 500})
        watch = one.watch(through)
        assert watch.wait_ready(30)
        rules = [proxy.lose_request(api, count=None, cut=True) for api in ("Fetch", "Metadata", "ListOffsets")]
        eventually(lambda: rules[0].hits, 30)
        one.tell(*aborts([2]))
        hits = rules[1].hits
        eventually(lambda: rules[1].hits > hits + 1, 30, "it tries to connect again")
        assert set(watch.aborts) == {"op-1"}
        for rule in rules:
            rule.end()
        eventually(lambda: watch.aborted("op-2"), 30)
        assert watch.aborted("op-1")
        assert watch.stop(15)


def test_a_worker_that_begins_without_a_broker_is_not_ready_before_there_is_one(apache, stage):
    one = stage(apache)
    one.tell(*aborts([1]))
    with KafkaProxy(apache.bootstrap_servers) as proxy:
        rule = proxy.lose_request("Metadata", count=None, cut=True)
        through = ConfluentTransport({"bootstrap.servers": proxy.bootstrap_servers, "reconnect.backoff.max.ms": 500})
        watch = one.watch(through)
        eventually(lambda: rule.hits, 30)
        assert not watch.wait_ready(0.5)
        rule.end()
        assert watch.wait_ready(60)
        assert watch.aborted("op-1")
        assert watch.stop(15)


def test_a_topic_that_is_made_later_is_found(apache, stage):
    one = stage(apache)
    group = unique("g")
    watch = ControlWatch(one.transport, group)
    one.watches.append(watch)
    watch.start()
    assert watch.wait_ready(30)
    with pytest.raises(ConfigurationError, match="does not exist"):
        control.pause(group=group, transport=one.transport)
    apache.create_topic(control_topic(group), 1)
    control.pause(group=group, transport=one.transport)
    eventually(lambda: watch.paused_group, 20)


def test_on_the_embedded_broker_the_first_record_makes_the_topic(embedded, stage):
    one, group = stage(embedded), unique("g")
    watch = ControlWatch(one.transport, group)
    one.watches.append(watch)
    watch.start()
    assert watch.wait_ready(30)
    control.abort("op-1", group=group, transport=one.transport)
    eventually(lambda: watch.aborted("op-1"), 20)
    assert set(read_control(one.transport, group).aborts) == {"op-1"}


# -- the commands ------------------------------------------------------------------------------------------------------


def test_commands_in_other_processes_pause_and_resume_what_a_worker_sees(broker, stage):
    one = stage(broker)
    watch = one.watch()
    assert watch.wait_ready(30)
    paused = one.kser("pause", "--why", "database is moved")
    assert (paused.returncode, paused.stderr) == (0, "")
    assert paused.stdout == f"Group {one.group} is paused. It goes on with: kser resume --group {one.group}\n"
    eventually(lambda: watch.paused_group)
    assert watch.pause_of("any").reason == f"paused by {control.whoami()}: database is moved"
    assert one.kser("pause", "--task", "shop.tasks.Charge").returncode == 0
    listed = one.kser("paused", "--format", "json")
    assert [(entry["kind"], entry["why"]) for entry in json.loads(listed.stdout)["paused"]] == [
        ("group", "database is moved"),
        ("task", ""),
    ]
    resumed = one.kser("resume")
    assert (resumed.returncode, resumed.stderr) == (0, "kser: still paused: task shop.tasks.Charge\n")
    eventually(lambda: not watch.paused_group)
    assert watch.paused_tasks == {"shop.tasks.Charge"}


def test_the_command_abort_means_the_newest_run_and_waits_for_its_end(broker, stage):
    one = stage(broker)
    one.events(event(EventType.OPERATION_STARTED, "RUNNING"), event(EventType.OPERATION_ENDED, "FAILED"))
    one.events(event(EventType.OPERATION_STARTED, "RUNNING", run=2))
    watch = one.watch()
    assert watch.wait_ready(30)

    def worker():
        eventually(lambda: watch.aborted("op-1", 2), 50)
        one.events(event(EventType.OPERATION_ENDED, "ABORTED", run=2))

    thread = threading.Thread(target=worker)
    thread.start()
    done = one.kser("abort", "op-1", "--why", "wrong prices", "--wait", "--timeout", 50)
    thread.join()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "The workers are told: shop.Order[op-1] is aborted, up to its run 2",
        "shop.Order[op-1] ABORTED",
    ]
    again = one.kser("abort", "op-1")
    assert (again.returncode, again.stdout) == (0, "shop.Order[op-1] is ABORTED already\n")


def test_a_group_that_nobody_has_heard_of_is_refused_on_a_real_broker(apache, stage):
    one = stage(apache)
    one.group = unique("typo")
    done = one.kser("abort", "op-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Topic {one.group}.control does not exist" in done.stderr
    assert one.transport.admin().describe([control_topic(one.group)]) == {}
