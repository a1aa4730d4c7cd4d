"""`kser dlq` and `kser operations resume` as people run them: processes, on the embedded broker and on Apache Kafka."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from kser import Message, OperationRegistry, Result, results
from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.dead_letters import DeadLetters
from kser.errors import TransportError
from kser.sequencing.itinerary import METADATA_KEY, Itinerary
from kser.transport import OutRecord, Position
from kser.worker.dead_letters import dead_letter
from kser.worker.topic_plan import Feature, TopicPlan
from kser.worker.topics import create_topics
from tests.apps.dice import Launch
from tests.brokers import unique
from tests.processes import ROOT, environment, process, records, views, wait_for

KSER = [sys.executable, "-m", "kser"]
WAIT_S = 60


def kser(*args, **options):
    return subprocess.run(
        [*KSER, *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        stdin=subprocess.DEVNULL,
        **options,
    )


class Place:
    """A task topic and a group that no other test has, and letters that a worker might have left there."""

    def __init__(self, broker):
        self.servers = broker.bootstrap_servers
        self.topic, self.group = unique("shop"), unique("g")
        self.options = ("--group", self.group, "--bootstrap-servers", self.servers)
        self.transport = ConfluentTransport({"bootstrap.servers": self.servers})
        self.letters = DeadLetters(self.transport, self.group)
        self._broker = broker

    def create(self):
        if self.transport.admin().can_create():
            create_topics(self.transport.admin(), TopicPlan(group=self.group, tasks={self.topic: 2}))
            return
        plan = TopicPlan(group=self.group, tasks={self.topic: 2}, features=frozenset(Feature))
        for spec in plan.specs({}):
            self._broker.create_topic(spec.name, spec.partitions)

    def bury(self, kmsg, key=b"k", minutes=0, error="card refused"):
        """A message that was in the task topic and failed."""
        self.transport.sink().deliver([OutRecord(self.topic, key, kmsg.to_bytes(), [("traceparent", b"00-1")])])
        record = next(r for r in records(self.servers, self.topic) if r.value == kmsg.to_bytes())
        now_ms = int(time.time() * 1000) - minutes * 60_000
        failure = results.from_exception(ValueError(error), kmsg.uuid)
        letter = dead_letter(
            record, f"{self.group}.dlq", error=failure, kmsg=kmsg, group=self.group, worker="w1", now_ms=now_ms
        )
        assert self.transport.sink().deliver([letter]) == []
        return record


@pytest.fixture(params=["embedded", "apache"])
def place(request):
    made = Place(request.getfixturevalue(request.param))
    made.create()
    return made


@pytest.fixture
def real(apache):
    made = Place(apache)
    made.create()
    return made


def test_letters_are_listed_shown_and_sent_back(place):
    first = place.bury(Message("u-1", "shop.Charge", {"password": "hunter2"}), minutes=180)
    place.bury(Message("u-2", "shop.Mail"), b"other", error="no route")
    listed = json.loads(kser("dlq", "list", *place.options, "--format", "json").stdout)
    assert [(it["uuid"], it["error"]) for it in listed] == [("u-2", "no route"), ("u-1", "card refused")]
    assert [it["uuid"] for it in json.loads(
        kser("dlq", "list", *place.options, "--until", "2h", "--task", "Charge", "--format", "json").stdout
    )] == ["u-1"]  # fmt: skip
    old = listed[1]["id"]
    shown = kser("dlq", "show", old, *place.options)
    assert shown.returncode == 0, shown.stderr
    assert f"{place.topic}[{first.partition}] at {first.offset}, key k" in shown.stdout
    assert "hunter2" not in shown.stdout
    dry = kser("dlq", "replay", old, *place.options, "--dry-run")
    assert dry.stdout.startswith(f"would be sent  {old}  shop.Charge[u-1] to {place.topic}[{first.partition}]\n")
    assert len(records(place.servers, place.topic)) == 2
    sent = kser("dlq", "replay", "--all", *place.options)
    assert (sent.returncode, sent.stdout.splitlines()[-1]) == (0, "2 sent"), sent.stderr
    back = [r for r in records(place.servers, place.topic) if r.header("kser-claim") == b"again:u-1:1:0:0"]
    assert [(r.partition, r.key, r.value) for r in back] == [(first.partition, b"k", first.value)]
    assert list(back[0].headers) == [
        ("traceparent", b"00-1"),
        ("kser-group", place.group.encode()),
        ("kser-redrive", b"1"),
        ("kser-claim", b"again:u-1:1:0:0"),
    ]


def test_letters_are_purged_up_to_one_that_stays(real):
    for number in range(4):
        real.bury(Message(f"u-{number}", "shop.Charge" if number != 2 else "shop.Mail"), minutes=10 - number)
    ids = [letter.id for letter in reversed(real.letters.list())]
    purged = kser("dlq", "purge", "--task", "Charge", *real.options, "--yes", "--format", "json")
    assert purged.returncode == 0, purged.stderr
    assert json.loads(purged.stdout) == {"deleted": ids[:2], "kept": ids[3:], "others": 0, "dry_run": False}
    assert [letter.uuid for letter in real.letters.list()] == ["u-3", "u-2"]
    assert kser("dlq", "purge", "--all", *real.options, "--yes").stdout == "2 dead letters deleted\n"
    assert kser("dlq", "list", *real.options).stdout == f"No dead letter of group {real.group}\n"
    with pytest.raises(TransportError, match="Deleting the records of"):
        real.transport.admin().delete_records([Position(f"{real.group}.dlq", 0, 10**9)])


def test_the_embedded_broker_says_that_it_deletes_nothing(embedded):
    place = Place(embedded)
    place.create()
    place.bury(Message("u-1", "shop.Charge"))
    purged = kser("dlq", "purge", "--all", *place.options, "--yes")
    assert (purged.returncode, purged.stdout) == (1, "")
    assert purged.stderr.startswith("kser: error: The embedded broker cannot delete records: it forgets all of them")


def test_a_group_that_never_was_is_told(place):
    result = kser("dlq", "list", "--group", "nobody-has-it", "--bootstrap-servers", place.servers)
    assert result.returncode == 1
    assert "there is no topic nobody-has-it.dlq. Is that the group's name?" in result.stderr


def test_a_letter_replayed_by_the_command_is_run_by_a_worker_and_its_operation_goes_on(real, tmp_path):
    registry = OperationRegistry(producer=Producer({"bootstrap.servers": real.servers}), topic=real.topic)
    with registry.producer:
        operation = Launch().build()
        kmsg = operation.tasks[1].to_Message()
        frame = operation.frame(real.topic, operation.tasks[2:])
        kmsg.metadata = {METADATA_KEY: Itinerary((frame,), 1).dump()}
        kmsg.result = Result(uuid=kmsg.uuid, retval={"a first step": True})
        # Not left in the topic: the worker that is started below would run it, too.
        record = real.bury(kmsg, operation.uuid.encode())
        real.transport.admin().delete_records([Position(real.topic, record.partition, record.offset + 1)])
    (letter,) = real.letters.list()
    assert kser("dlq", "replay", letter.id, *real.options).returncode == 0
    log = tmp_path / "log"
    command = ("-m", "kser", "worker", "tests.apps.dice:registry", "--topics", real.topic, "--name", "w1")
    with process(*command, *real.options, log=log):
        wait_for(lambda: views(real.servers, real.group).get(operation.uuid), WAIT_S, "an event")
        wait_for(lambda: views(real.servers, real.group)[operation.uuid].ended, WAIT_S, "the end")
    view = views(real.servers, real.group)[operation.uuid]
    assert view.status == "SUCCESS", log.read_text()
    assert [(event.run, event.position) for event in view.steps] == [(2, 1), (2, 2)]
    assert view.result.retval["a first step"] is True
    resumed = kser("operations", "resume", operation.uuid, *real.options)
    assert (resumed.returncode, resumed.stdout) == (1, "")
    assert "ended SUCCESS: there is nothing to resume" in resumed.stderr


@pytest.mark.parametrize("columns", [60, 100])
def test_on_a_terminal_the_list_is_as_wide_as_the_terminal(embedded, columns):
    place = Place(embedded)
    place.create()
    place.bury(Message("u-1", "some.package.tasks.Charge"), error="card refused " * 20)
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [*KSER, "dlq", "list", *place.options],
        cwd=ROOT,
        env={name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")},
        stdin=child,
        stdout=child,
        stderr=child,
    ) as command:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # the command has ended
                break
            shown += part
            if not part:
                break
        assert command.wait(WAIT_S) == 0
    os.close(main)
    lines = shown.decode().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert max(len(line) for line in lines) == columns
    assert "Charge" in lines[1]
