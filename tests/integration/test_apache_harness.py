"""The harness that fetches and runs Apache Kafka: what it serves, and that nothing of it is left behind."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from kser.testing import eventually
from tests import kafka_jars
from tests.apache_kafka import (
    FOLDER_PREFIX,
    ApacheKafka,
    KafkaStartError,
    KafkaUnavailableError,
    Keeper,
    PortTakenError,
    free_ports,
)
from tests.brokers import has_ended, is_gone, pids_of

ROOT = Path(__file__).resolve().parents[2]


def write(kafka: ApacheKafka, topic: str, *values: bytes, **config: object) -> None:
    client = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0, "acks": "all", **config})
    errors: list[KafkaError | None] = []
    for value in values:
        client.produce(topic, value, on_delivery=lambda error, _: errors.append(error))
    assert client.flush(30) == 0
    assert errors == [None] * len(values)


@contextmanager
def consumer(kafka: ApacheKafka, group: str) -> Iterator[Consumer]:
    config = {"auto.offset.reset": "earliest", "enable.auto.commit": False, "log_level": 0}
    client = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": group, **config})
    try:
        yield client
    finally:
        client.close()


def read(client: Consumer, number: int) -> list[Message]:
    found: list[Message] = []

    def enough() -> bool:
        found.extend(client.consume(number - len(found), 0.1))
        return len(found) >= number

    eventually(enough, 30, f"{number} records")
    return found


@contextmanager
def process(*command: str, **more: object) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A Python process, and a function that gives the next line it prints."""
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, **more)
    assert child.stdout is not None
    try:
        yield child, child.stdout.readline
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


# ---- What it serves


def test_what_is_produced_is_consumed(apache, make_topic, topic_name):
    topic = make_topic(apache, 3)
    write(apache, topic, b"a", b"b", b"c")
    with consumer(apache, topic_name("g")) as client:
        client.subscribe([topic])
        assert sorted(message.value() for message in read(client, 3)) == [b"a", b"b", b"c"]


def test_topics_have_the_partitions_and_settings_they_were_given(apache, topic_name):
    name = topic_name()
    apache.create_topic(name, 6, config={"cleanup.policy": "compact"})
    assert len(apache.admin.list_topics(name, timeout=10).topics[name].partitions) == 6


def test_the_use_of_a_name_makes_no_topic(apache, topic_name):
    """A typing error in a topic's name is to be an error in tests, as it is on most clusters."""
    patience = {"topic.metadata.propagation.max.ms": 500, "log_level": 0}
    client = Producer({"bootstrap.servers": apache.bootstrap_servers, **patience})
    errors: list[KafkaError] = []
    client.produce(topic_name("nobody-made-it"), b"", on_delivery=lambda error, _: errors.append(error))
    assert client.flush(30) == 0
    assert [error.code() for error in errors] == [KafkaError.UNKNOWN_TOPIC_OR_PART]


def test_a_transaction_brings_its_records_and_its_offsets_together(apache, make_topic, topic_name):
    """Committed, both are there; aborted, neither is. No embedded broker does it: this is what the harness is for."""
    topic, output, group = make_topic(apache, 1), make_topic(apache, 1), topic_name("g")
    write(apache, topic, b"1", b"2")
    transactional = {"transactional.id": topic_name("tx"), "retry.backoff.ms": 10, "log_level": 0}
    client = Producer({"bootstrap.servers": apache.bootstrap_servers, **transactional})
    client.init_transactions(30)
    with consumer(apache, group) as source:
        source.subscribe([topic])
        read(source, 2)
        for offset, value, end in ((1, b"aborted", client.abort_transaction), (2, b"kept", client.commit_transaction)):
            client.begin_transaction()
            client.produce(output, value)
            metadata = source.consumer_group_metadata()
            client.send_offsets_to_transaction([TopicPartition(topic, 0, offset)], metadata, 30)
            end()
        assert source.committed([TopicPartition(topic, 0)], timeout=30)[0].offset == 2
    write(apache, output, b"last")
    with consumer(apache, topic_name("g")) as reader:
        reader.assign([TopicPartition(output, 0, 0)])
        assert [message.value() for message in read(reader, 2)] == [b"kept", b"last"]


def test_three_nodes_go_on_when_one_is_killed_and_are_whole_when_it_is_back(apache3, make_topic, topic_name):
    topic = make_topic(apache3, 1)
    write(apache3, topic, b"before")
    leader = apache3.admin.list_topics(topic, timeout=10).topics[topic].partitions[0].leader
    dead = apache3.pids[leader]
    apache3.kill(leader)
    assert is_gone(dead)
    assert leader not in apache3.pids
    write(apache3, topic, b"meanwhile")

    apache3.start_node(leader)

    partition = apache3.admin.list_topics(topic, timeout=10).topics[topic].partitions[0]
    assert sorted(partition.isrs) == [1, 2, 3]
    with consumer(apache3, topic_name("g")) as client:
        client.subscribe([topic])
        assert [message.value() for message in read(client, 2)] == [b"before", b"meanwhile"]


def test_the_next_test_finds_all_nodes_of_the_shared_cluster_alive(apache3):
    """What the fixture does after each test, were a test to end with a node dead."""
    apache3.kill(1)
    apache3.restore()
    assert sorted(apache3.pids) == [1, 2, 3]


def test_a_node_is_neither_started_nor_killed_twice(apache3):
    with pytest.raises(ValueError, match="node 1 runs already"):
        apache3.start_node(1)
    with pytest.raises(ValueError, match="node 4 does not run"):
        apache3.kill(4)


# ---- Nothing is left behind


def test_stop_leaves_no_java_and_no_data(apache):
    """A second Kafka beside that of the run: repeated and parallel runs do not collide."""
    with ApacheKafka() as kafka:
        assert kafka.bootstrap_servers != apache.bootstrap_servers
        pids, folder = list(kafka.pids.values()), kafka.folder
        # The pid is that of the java process itself, not of a shell around it.
        assert pids_of(f"{folder}/node1.properties") == pids
        assert folder.exists()
    assert all(is_gone(pid) for pid in pids)
    assert not folder.exists()
    kafka.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_command_leaves_no_java_and_no_data_however_it_ends(apache, number):
    """``make kafka``: Ctrl-C and SIGTERM end it with exit code 0; kill -9 leaves nothing either."""
    with process("-m", "tests.apache_kafka") as (child, line):
        found = re.fullmatch(r"Apache Kafka 4\.3\.1 is up: (127\.0\.0\.1:\d+)\n", line())
        assert found
        assert "4 partitions" in line()
        assert f"--bootstrap-servers {found[1]}" in line()
        folder = Path(line().removeprefix("Logs and data: ").partition(". ")[0])
        assert folder.exists()
        pids = pids_of(str(folder))
        assert pids

        child.send_signal(number)

        assert child.wait(30) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        eventually(lambda: all(has_ended(pid) for pid in pids), 20, "the end of Kafka")
        eventually(lambda: not folder.exists(), 20, "the end of its data")


def test_the_command_leaves_nothing_when_it_is_ended_during_the_start(apache, tmp_path):
    with process("-m", "tests.apache_kafka", env={**os.environ, "TMPDIR": str(tmp_path)}) as (child, _):
        eventually(lambda: pids_of(f"{tmp_path}/{FOLDER_PREFIX}"), 30, "the start of Kafka")
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    assert pids_of(f"{tmp_path}/{FOLDER_PREFIX}") == []
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_says_why_and_leaves_nothing(apache, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(KafkaStartError, match=r"(?s)could not be formatted, exit code 1.*num\.io\.threads"):
        ApacheKafka(settings={"num.io.threads": -1})
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_ends_during_its_start_is_told_with_the_tail_of_its_log(apache):
    """Its port for the controller is not one of this machine, which only the start finds out."""
    with pytest.raises(KafkaStartError, match=r"(?s)node 1 of Apache Kafka ended with exit code 1:.*192\.0\.2\.1"):
        ApacheKafka(settings={"listeners": "PLAINTEXT://192.0.2.1:9092,CONTROLLER://192.0.2.1:9093"})


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} is in use: end what listens there"):
            free_ports(1, port)


def test_free_ports_are_different_and_not_those_of_outgoing_connections():
    ports = free_ports(6, None)
    assert len(set(ports)) == 6
    assert not set(free_ports(6, None, taken=ports)) & set(ports)
    if Path("/proc/sys/net/ipv4/ip_local_port_range").exists():
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        assert first <= 21000 or max(ports) < first


# ---- The keeper, with sleeping processes in the place of Kafka


KEEPER = """
import os, signal
from tests.apache_kafka import Keeper
keeper = Keeper()
sleeper = keeper.call("spawn", "sleeper", ["sleep", "600"], str(keeper.folder / "log"))
os.write(1, f"{keeper._process.pid} {sleeper} {keeper.folder}\\n".encode())
signal.pause()
"""


@pytest.mark.parametrize("forked", [False, True])
def test_the_keeper_ends_all_when_its_owner_is_killed(forked):
    """Also when a process that the owner forked keeps the keeper's pipes open."""
    code = KEEPER
    if forked:
        code = code.replace("os.write", "import time; os.fork() == 0 and (time.sleep(30), os._exit(0)); os.write")
    with process("-c", code, start_new_session=True) as (owner, line):
        keeper, sleeper, folder = line().split()
        assert not has_ended(int(sleeper))
        owner.kill()
        eventually(lambda: has_ended(int(sleeper)) and has_ended(int(keeper)), 10, "the end of both")
        assert not Path(folder).exists()
        if forked:
            os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has PR_SET_PDEATHSIG")
def test_what_is_kept_ends_when_the_keeper_itself_is_killed(monkeypatch, tmp_path):
    """And not before: the thread that asked for it has ended long since."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # its folder stays
    keepers: list[tuple[Keeper, int]] = []

    def start() -> None:
        keeper = Keeper()
        keepers.append((keeper, keeper.call("spawn", "sleeper", ["sleep", "600"], str(keeper.folder / "log"))))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    [(keeper, sleeper)] = keepers
    assert keeper.call("poll", "sleeper") is None
    os.kill(keeper._process.pid, signal.SIGKILL)
    eventually(lambda: has_ended(sleeper), 10, "the end of what it kept")
    keeper.close()


def test_a_folder_that_a_killed_keeper_left_is_removed_by_the_next_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    killed, alive = Keeper(), Keeper()
    os.kill(killed._process.pid, signal.SIGKILL)
    killed._process.wait()
    assert killed.folder.exists()
    for keeper in (killed, alive):
        os.utime(keeper.folder / "lock", (time.time() - 3600, time.time() - 3600))
    following = Keeper()
    assert not killed.folder.exists()
    assert alive.folder.exists()
    for keeper in (killed, alive, following):
        keeper.close()
    assert list(tmp_path.iterdir()) == []


def test_what_the_keeper_cannot_start_is_told():
    keeper = Keeper()
    log = str(keeper.folder / "log")
    with pytest.raises(KafkaStartError, match="no-such-command"):
        keeper.call("spawn", "x", ["no-such-command"], log)
    keeper.call("spawn", "sleeper", ["sleep", "600"], log)
    with pytest.raises(KafkaStartError, match="sleeper runs already"):
        keeper.call("spawn", "sleeper", ["sleep", "600"], log)
    keeper.close()


def test_the_keeper_is_closed_at_once_though_a_fork_of_its_owner_lives_on():
    code = """
import os, time
from tests.apache_kafka import Keeper
keeper = Keeper()
fork = os.fork()
if fork == 0:
    time.sleep(30)
    os._exit(0)
keeper.close()
os.kill(fork, 9)
print(keeper.folder.exists(), keeper._process.returncode)
"""
    with process("-c", code) as (_, line):
        assert line() == "False 0\n"


# ---- Fetching, with a java and a mvn of our own making


JAVA = "echo 'openjdk version \"{version}\" 2026-01-01' >&2"
#: Does what the real one does with -DoutputDirectory=, slowly enough for a second process to come in between.
MAVEN = """\
echo run >> "{folder}/runs"
for argument; do case $argument in -DoutputDirectory=*) out=${{argument#*=}};; esac; done
mkdir -p "$out"
sleep 0.5
touch "$out/kafka_2.13-{version}.jar"
"""


@pytest.fixture
def tools(monkeypatch, tmp_path) -> Callable[..., Path]:
    """Makes the java and mvn that are found; gives the folder with them, the cache and the note of mvn's runs."""
    monkeypatch.setenv("KSER_TEST_KAFKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAVA_HOME", raising=False)

    def make(java: str | None = "17.0.1", mvn: str | None = MAVEN) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        scripts = {
            "java": java and JAVA.format(version=java),
            "mvn": mvn and mvn.format(folder=tmp_path, version=kafka_jars.KAFKA_VERSION),
        }
        for name, text in scripts.items():
            if text:
                (folder / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n")
                (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("java", "mvn", "reason"),
    [
        (None, MAVEN, "no java on PATH"),
        ("11.0.2", MAVEN, r"java is version 11, Apache Kafka 4\.3\.1 needs 17"),
        ("1.8.0_392", MAVEN, "java is version 8"),
        ("17.0.15", None, "no mvn on PATH, and no jars in .*kafka-4.3.1"),
    ],
)
def test_why_kafka_cannot_run_here_is_told(tools, java, mvn, reason):
    tools(java, mvn)
    assert re.match(reason, kafka_jars.unavailable() or "")
    with pytest.raises(KafkaUnavailableError, match=reason):
        ApacheKafka()


@pytest.mark.parametrize("java", ["17", "21.0.1", "25-ea"])
def test_later_versions_of_java_will_do(tools, java):
    tools(java)
    assert kafka_jars.unavailable() is None


def test_two_processes_that_fetch_at_once_fetch_once(tools):
    folder = tools()
    code = "from tests import kafka_jars; print(kafka_jars.fetch())"
    with process("-c", code) as (first, line1), process("-c", code) as (second, line2):
        assert line1() == line2() == f"{folder}/cache/kafka-4.3.1\n"
        assert (first.wait(10), second.wait(10)) == (0, 0)
    assert (folder / "runs").read_text() == "run\n"
    assert sorted(path.name for path in (folder / "cache").iterdir()) == ["kafka-4.3.1", "kafka-4.3.1.lock"]


def test_what_is_in_the_cache_needs_no_maven(tools):
    tools()
    kafka_jars.fetch()
    tools().joinpath("bin", "mvn").unlink()
    assert kafka_jars.unavailable() is None
    assert kafka_jars.fetch().name == "kafka-4.3.1"


def test_the_end_of_a_killed_fetch_is_waited_for_and_it_is_done_again(tools):
    """Its Maven goes on for a while; half a folder is never taken for a whole one."""
    folder = tools(mvn=MAVEN.replace("sleep 0.5", 'sleep 1.5; echo end >> "{folder}/runs"'))
    with process("-c", "from tests import kafka_jars; kafka_jars.fetch()") as (child, _):
        eventually((folder / "runs").exists)
        child.kill()
    assert not kafka_jars.cached()
    tools()
    kafka_jars.fetch()
    assert kafka_jars.cached()
    assert (folder / "runs").read_text().split() == ["run", "end", "run"]


def test_the_first_error_of_maven_is_the_reason(tools):
    failing = "echo '[INFO] at work'; echo '[ERROR] no way to the repository'; echo '[ERROR] help'; exit 1"
    folder = tools(mvn=failing)
    with pytest.raises(KafkaUnavailableError, match=r"^mvn could not get Apache Kafka: no way to the repository$"):
        kafka_jars.fetch()
    assert [path.name for path in (folder / "cache").iterdir()] == ["kafka-4.3.1.lock"]


def test_a_maven_that_hangs_is_ended(tools, monkeypatch):
    monkeypatch.setattr(kafka_jars, "FETCH_TIMEOUT_S", 1)
    folder = tools(mvn='echo $$ > "{folder}/pid"; sleep 60 & wait')
    with pytest.raises(KafkaUnavailableError, match="mvn did not get Apache Kafka within 1 s"):
        kafka_jars.fetch()
    assert is_gone(int((folder / "pid").read_text()))


def test_errors_of_clients_are_exceptions_of_confluent_kafka(apache):
    """The harness gives clients' own errors on, e.g. for a topic that exists."""
    name = "kser-harness-twice"
    apache.create_topic(name)
    with pytest.raises(KafkaException, match="already exists"):
        apache.create_topic(name)
