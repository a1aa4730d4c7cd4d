"""``kser worker``: what its options become, how it starts, stops and fails; with processes, on the embedded broker."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections import Counter

import pytest
from click.testing import CliRunner

from kser import Message
from kser.cli import worker as command
from kser.cli.connection import Drivers
from kser.cli.main import cli
from kser.confluent.producer import Producer
from kser.errors import FencedError
from kser.transport.memory import MemoryTransport
from kser.worker.slots import take_slot
from tests.apache_kafka import PortTakenError, free_ports
from tests.brokers import has_ended
from tests.processes import DICE, ROOT, environment, ready, wait_for

SERVERS = ("--bootstrap-servers", "127.0.0.1:1")


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """The keywords of each Worker that a command has made; it does not run."""
    found = []

    class Recorder:
        name, group, topics, stopping, left = "w", "g", ("t",), 0, 0
        failure = None

        def __init__(self, registry, **keywords):
            found.append(keywords)
            self.stats = Counter()

        def stop(self):
            pass

        def run(self):
            if self.failure is not None:
                raise self.failure

    monkeypatch.setattr(command, "Worker", Recorder)
    monkeypatch.chdir(ROOT)
    Recorder.made = found
    return Recorder


@pytest.fixture
def configs():
    """The librdkafka properties that transports were asked for with."""
    return []


@pytest.fixture
def run(configs):
    """``run("--name", "x")`` is the result of ``kser worker`` with these options, in this process."""

    def transport(config):
        configs.append(dict(config))
        return MemoryTransport()

    def invoke(*args, env=None):
        given = ["worker", DICE, "--topics", "t", *SERVERS, *map(str, args)]
        return CliRunner().invoke(cli, given, obj=Drivers(transport), env=env)

    return invoke


#: Option, value, keyword of Worker, what it gets, what it gets by default.
OPTIONS = [
    ("--name", "shop-1", "name", "shop-1", None),
    ("--delivery", "exactly_once", "delivery", "exactly_once", None),
    ("--ordering", "none", "ordering", "none", "key"),
    ("--concurrency", "3", "concurrency", 3, 16),
    ("--coroutines", "5", "coroutines", 5, 256),
    ("--isolated", "4", "isolated", 4, 2),
    ("--drain", "1.5", "drain_s", 1.5, 30),
    ("--health", "8081", "health_port", 8081, None),
    ("--health-host", "0.0.0.0", "health_host", "0.0.0.0", "127.0.0.1"),
    ("--on-lost-offset", "earliest", "on_lost_offset", "earliest", "stop"),
    ("--max-in-flight", "9", "max_in_flight", 9, 4000),
    ("--max-bytes", "2MiB", "max_bytes", 2 * 1024**2, 64 * 1024**2),
    ("--max-poll-records", "7", "max_poll_records", 7, 500),
    ("--events", "none", "events", "none", "all"),
    ("--wait", "60.5", "wait_s", 60.5, 900),
]


def test_each_option_is_a_setting_of_the_worker(run, made):
    typed = [word for option, value, *_ in OPTIONS for word in (option, value)]
    assert run(*typed, "--no-create-topics", "--no-relay", "--group", "g").exit_code == 0
    set_ = {"KSER_" + option[2:].upper().replace("-", "_"): value for option, value, *_ in OPTIONS}
    assert run(env={**set_, "KSER_CREATE_TOPICS": "false", "KSER_RELAY": "0", "KSER_GROUP": "g"}).exit_code == 0
    assert run().exit_code == 0
    for keywords in made.made:
        del keywords["transport"]
    fixed = {"topics": ["t"], "location": DICE}
    switched, usual = {"create_topics": False, "relay": False}, {"create_topics": True, "relay": True}
    told = {keyword: value for _, _, keyword, value, _ in OPTIONS} | fixed | switched | {"group": "g"}
    default = {keyword: value for *_, keyword, _, value in OPTIONS} | fixed | usual | {"group": "kser"}
    assert made.made == [told, told, default]


def test_help_names_every_option_with_its_variable_and_the_exit_codes():
    lines = CliRunner().invoke(cli, ["worker", "--help"], terminal_width=110).output
    text = " ".join(lines.split())
    for option in ["--processes", "--group-protocol", "--create-topics", "--topics", *(row[0] for row in OPTIONS)]:
        assert re.search(rf" {option}\b.*?\[env var: {'KSER_' + option[2:].upper().replace('-', '_')}\b", text), option
    assert re.search(r"^  Exit codes: 0 asked to stop, 1 failure, 2 misuse or a wrong setting, 3 another$", lines, re.M)
    assert "makes it a static member" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--concurrency", "0"], "0: give 1 or more"),
        (["--processes", "-2"], "-2: give 1 or more"),
        (["--isolated", "two"], "'two' is no integer: give 1 or more"),
        (["--max-in-flight", "1.5"], "'1.5' is no integer: give 1 or more"),
        (["--drain", "-1"], "-1: give 0 or more"),
        (["--drain", "nan"], "nan: give 0 or more"),
        (["--drain", "inf"], "inf: give 0 or more"),
        (["--health", "0"], "0: give 1 to 65535"),
        (["--health", "65536"], "65536: give 1 to 65535"),
        (["--max-bytes", "lots"], "'lots' is no size: write 64MiB, 500kB or a number of bytes"),
        (["--max-bytes", "0"], "'0' is no size"),
        (["--delivery", "twice"], "'twice' is not one of 'exactly_once', 'at_least_once'"),
        (["--ordering", "fifo"], "'fifo' is not one of 'key', 'partition', 'none'"),
        (["--on-lost-offset", "guess"], "'guess' is not one of 'stop', 'earliest', 'latest'"),
        (["--group-protocol", "kip848"], "'kip848' is not one of 'classic', 'consumer'"),
        (["--events", "some"], "'some' is not one of 'none', 'sequence', 'all'"),
        (["--name", "a;b"], "name='a;b': give a text without a semicolon"),
        (["--health", "65530", "--processes", "9"], "process 6 would have port 65536"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_to_give(run, monkeypatch, args, said):
    monkeypatch.chdir(ROOT)
    result = run(*args)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("kser: error: ")
    assert said in line


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500kB", 500_000), ("2k", 2000), ("1KiB", 1024), ("64 MiB", 64 * 1024**2), ("3gb", 3 * 1000**3)],
)
def test_sizes_are_written_with_or_without_a_unit(run, made, text, size):
    assert run("--max-bytes", text).exit_code == 0
    assert made.made[0]["max_bytes"] == size


@pytest.mark.parametrize(
    ("args", "env", "protocol"),
    [
        ([], {}, None),
        (["--group-protocol", "consumer"], {}, "consumer"),
        ([], {"KSER_GROUP_PROTOCOL": "consumer"}, "consumer"),
        ([], {"KSER_GROUP_PROTOCOL": "consumer", "KSER_KAFKA_GROUP_PROTOCOL": "classic"}, "consumer"),
        # What was typed over what was set, the option over the property.
        (["-X", "group.protocol=classic"], {"KSER_GROUP_PROTOCOL": "consumer"}, "classic"),
        (["-X", "group.protocol=classic", "--group-protocol", "consumer"], {}, "consumer"),
    ],
)
def test_the_group_protocol_is_a_property_by_a_shorter_name(run, made, configs, args, env, protocol):
    assert run(*args, env=env).exit_code == 0
    assert configs[0].get("group.protocol") == protocol


def test_a_worker_whose_name_was_taken_ends_with_3(run, made):
    made.failure = FencedError("Another worker has the name shop-1")
    result = run()
    assert result.exit_code == command.TWIN == 3
    assert result.stderr.splitlines()[-1] == "kser: error: Another worker has the name shop-1"


@pytest.mark.parametrize(
    ("given", "name", "health", "first"),
    [
        ("worker a --topics t --processes 2", None, None, "worker a --topics t --stop-with-stdin --log-process"),
        ("worker --processes=2 a", "w", None, "worker a --stop-with-stdin --log-process --name w-0"),
        ("worker a --name w", "w", 80, "worker a --name w --stop-with-stdin --log-process --name w-0 --health 80"),
        (
            "--log-level debug worker --processes 2 -- a",
            "w",
            None,
            "--log-level debug worker --stop-with-stdin --log-process --name w-0 -- a",
        ),
    ],
)
def test_a_child_gets_the_command_of_its_parent_with_a_name_and_a_port_of_its_own(
    monkeypatch, given, name, health, first
):
    monkeypatch.setattr(sys, "argv", ["kser", *given.split()])
    monkeypatch.setenv("KSER_PROCESSES", "2")
    one, two = command._commands(2, name, health)
    assert one == [sys.executable, "-m", "kser", *first.split()]
    assert two.pop(two.index("--no-relay"))  # one of them is enough
    assert two == [word.replace("w-0", "w-1") if word != "80" else "81" for word in one]
    assert "KSER_PROCESSES" not in os.environ  # else the children would have children


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(embedded, make_topic, topic_name, tmp_path, monkeypatch):
    """A new topic of two partitions, a new group, and a directory for its slots."""
    topic, group = make_topic(embedded, partitions=2), topic_name("g")
    embedded.create_topic(f"{group}.events", 2)
    monkeypatch.setenv("LOCK_PATH", str(tmp_path))

    class Place:
        options = ("--topics", topic, "--group", group, "--bootstrap-servers", embedded.bootstrap_servers)
        log = tmp_path / "log"
        tell = tmp_path / "tell"

        def __init__(self):
            self.topic, self.group, self.servers = topic, group, embedded.bootstrap_servers

        def send(self, **params):
            text = json.dumps({**params, "tell": str(self.tell)})
            args = ["send", "dice.Roll", "--topic", topic, "--params", text, "--bootstrap-servers"]
            result = CliRunner().invoke(cli, [*args, embedded.bootstrap_servers])
            assert result.exit_code == 0, result.output
            self.until(self.tell.exists, "the roll")

        def said(self):
            return self.log.read_text()

        def until(self, condition, what):
            try:
                return wait_for(condition, 30, what)
            except AssertionError as exc:
                raise AssertionError(f"{exc}: {self.said()}") from None

        def end_of(self, process, seconds):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired as exc:
                raise AssertionError(f"{exc}: {self.said()}") from None

        def wait_for(self, pattern, times=1):
            self.until(lambda: len(re.findall(pattern, self.said())) >= times, f"{pattern} in the log")

        def pids(self):
            return [int(pid) for pid in re.findall(r"Process \d started: (\d+)", self.said())]

    return Place()


@pytest.fixture
def start_python(place):
    """``start_python("app.py")`` is a Python process, a leader of its own group; its output is in the log."""
    running = []

    def go(*arguments, **options):
        with place.log.open("ab") as out:
            child = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment(),
                stdin=options.pop("stdin", subprocess.DEVNULL),
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        running.append(child)
        return child

    yield go
    for child in running:
        child.kill()
        child.wait(10)
        if child.stdin is not None:
            child.stdin.close()
    wait_for(lambda: all(has_ended(pid) for pid in place.pids()), 15, "the end of the children")


@pytest.fixture
def start(place, start_python):
    """``start("--name", "x")`` is a ``kser worker`` process."""

    def go(*more, **options):
        return start_python("-m", "kser", "worker", DICE, *place.options, *more, **options)

    return go


def two_ports():
    """The first of two free ports in a row."""
    while True:
        port = free_ports(1, None)[0]
        with contextlib.suppress(PortTakenError):
            return free_ports(2, port)[0]


def test_processes_share_the_group_and_drain_though_a_signal_reaches_all_of_them(place, start):
    """As when systemd stops a unit: each process gets SIGTERM, and the parent passes its own on."""
    port = two_ports()
    parent = start("--processes", 2, "--name", "w", "--health", port, "--drain", 20)
    shares = [
        place.until(lambda n=n: (said := ready(port + n)) and said["partitions"] and said, f"worker {n} to be ready")
        for n in (0, 1)
    ]
    assert [(share["worker"], share["group"]) for share in shares] == [("w-0", place.group), ("w-1", place.group)]
    place.send(sleep=1.5)
    for pid in (parent.pid, *place.pids()):
        os.kill(pid, signal.SIGTERM)
    assert place.end_of(parent, 30) == 0, place.said()
    assert place.said().count("Worker.Stopped: 1 done") == 1
    for pid in place.pids():  # lines of several processes in one log can be told apart
        assert re.search(rf"^\S+ \S+ INFO     {pid} Worker\.Starting\.\.\. ", place.said(), re.M), place.said()
    assert re.search(r"^\S+ \S+ INFO     Process 0 started: ", place.said(), re.M)
    assert all(has_ended(pid) for pid in place.pids())


PROGRAM = """
import logging, os, sys
from kser import OperationRegistry, Task, Worker

logging.basicConfig(level="INFO", format="%(process)d %(message)s")
registry = OperationRegistry()

class Note(Task):
    def run(self):
        with open(self.params["tell"], "a") as file:
            file.write(f"{type(self).__name__} {os.getpid()} {os.getppid()}\\n")

@registry.subscribe
class Here(Note): pass

@registry.subscribe(isolate=True)
class Apart(Note): pass

_, topic, group, servers, port = sys.argv
config = {"bootstrap.servers": servers}
Worker(registry, topics=[topic], group=group, config=config, processes=2, name="w", health_port=int(port)).run()
print("over")
"""


def test_a_worker_in_python_has_processes_as_well(place, start_python, tmp_path):
    """The program has no `if __name__ == "__main__":`, so its processes come to run() as well."""
    port = two_ports()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    parent = start_python(program, place.topic, place.group, place.servers, port)
    for number in (0, 1):
        share = place.until(lambda n=number: (said := ready(port + n)) and said["partitions"] and said, "to be ready")
        assert share["worker"] == f"w-{number}"
    told = tmp_path / "told"
    with Producer({"bootstrap.servers": place.servers}) as producer:
        for name in ("Here", "Apart") * 3:
            message = Message(uuid=str(uuid.uuid4()), entrypoint=f"__main__.{name}", params={"tell": str(told)})
            assert producer.send(place.topic, message).retcode == 0
    place.until(lambda: told.exists() and len(told.read_text().splitlines()) == 6, "the tasks")
    ran = [line.split() for line in told.read_text().splitlines()]
    assert {int(pid) for name, pid, _ in ran if name == "Here"} <= set(place.pids())
    assert {int(parent_pid) for name, _, parent_pid in ran if name == "Apart"} <= set(place.pids())
    parent.terminate()
    assert place.end_of(parent, 30) == 0, place.said()
    assert place.said().splitlines()[-1] == "over"
    assert place.said().count("over") == 1


def test_a_killed_process_is_started_again_and_none_outlives_the_parent(place, start):
    parent = start("--processes", 2)
    place.wait_for(r"Process \d started", 2)
    place.wait_for("Worker.Starting", 2)
    os.kill(place.pids()[0], signal.SIGKILL)
    place.wait_for("Process 0 was ended by SIGKILL; it is started again in 1 s")
    place.wait_for("Worker.Starting", 3)
    parent.kill()
    parent.wait(10)
    place.until(lambda: all(has_ended(pid) for pid in place.pids()), "the end of the children")
    place.wait_for("Standard input has ended", 2)


def test_a_name_that_a_live_process_has_is_refused_and_not_tried_again(place, start):
    with take_slot(place.group, "w-1"):
        parent = start("--processes", 2, "--name", "w")
        assert place.end_of(parent, 30) == 2, place.said()
    assert f"has the name w-1 on this host (process {os.getpid()})" in place.said()
    assert len(place.pids()) == 2
    assert all(has_ended(pid) for pid in place.pids())


def test_asked_twice_processes_do_not_wait_for_their_tasks_and_end_with_4(place, start):
    parent = start("--processes", 2, "--drain", 60)
    place.send(sleep=60)
    os.killpg(parent.pid, signal.SIGINT)
    place.wait_for("Stopping: up to 60", 1)
    assert parent.poll() is None
    os.killpg(parent.pid, signal.SIGINT)
    assert place.end_of(parent, 20) == 4, place.said()
    assert "1 task(s) did not end within 60 s and were left" in place.said()


def test_a_worker_ends_well_while_its_stdin_is_open(place, start):
    """Python aborts if a thread is reading sys.stdin then."""
    child = start("--stop-with-stdin", stdin=subprocess.PIPE)
    place.wait_for("Worker.Starting")
    place.send()
    child.terminate()
    assert place.end_of(child, 20) == 0, place.said()
    assert "Worker.Stopped: 1 done" in place.said()


def test_a_task_that_runs_past_the_drain_is_left_and_the_exit_code_is_4(place, start):
    child = start("--drain", 0.3)
    place.send(sleep=60)
    child.terminate()
    assert place.end_of(child, 20) == 4, place.said()
    assert "still runs past the budget: it is left unsettled" in place.said()


def test_exactly_once_is_refused_on_the_embedded_broker(place, start):
    assert start("--delivery", "exactly_once").wait(20) == 2
    assert "kser: error: delivery exactly_once cannot be had on the embedded broker" in place.said()


def test_a_worker_that_hangs_at_its_end_with_pythons_lock_is_ended(tmp_path):
    """As inside the Kafka client once: no thread of Python runs any more."""
    program = tmp_path / "hangs.py"
    program.write_text(
        "import ctypes\nfrom kser.worker.shutdown import end_within\nend_within(0.5)\nctypes.PyDLL(None).sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(program)], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 1
    assert "hangs.py" in ended.stderr
