"""The embedded broker, through plain confluent_kafka clients and as processes see it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from kser.confluent import embedded as module
from kser.confluent.embedded import DEFAULT_PARTITIONS, REQUESTS, EmbeddedBroker
from kser.errors import ConfigurationError, TransportError
from kser.testing import eventually
from tests.brokers import has_ended, is_gone

ROOT = Path(__file__).resolve().parents[2]


def producer(broker: EmbeddedBroker, **config: object) -> Producer:
    settings = {"linger.ms": 0, "retry.backoff.ms": 10, "retry.backoff.max.ms": 50, "reconnect.backoff.max.ms": 100}
    return Producer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "log_level": 0,
            **settings,
            **{name.replace("_", "."): value for name, value in config.items()},
        }
    )


def send(client: Producer, topic: str, value: bytes = b"value", timeout_s: float = 10, **fields: object) -> list:
    """What the delivery report says: [None], [error], or [] when none came within the time."""
    reports: list = []
    client.produce(topic, value, on_delivery=lambda error, _: reports.append(error), **fields)
    client.flush(timeout_s)
    return reports


@contextmanager
def consumer(broker: EmbeddedBroker, **config: object) -> Iterator[Consumer]:
    settings = {"group.id": "g", "auto.offset.reset": "earliest", "group.protocol": "consumer", "log_level": 0}
    client = Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            **settings,
            **{name.replace("_", "."): value for name, value in config.items()},
        }
    )
    try:
        yield client
    finally:
        # Inside close() a round of the group may never end, with Python's lock held: see ConfluentSource.
        client.unsubscribe()
        eventually(lambda: client.poll(0.02) is None and not client.assignment(), 10, "all partitions given up")
        client.close()


def read(client: Consumer, number: int, timeout_s: float = 10) -> list[Message]:
    found: list[Message] = []

    def enough() -> bool:
        found.extend(client.consume(number - len(found), 0.1))
        return len(found) >= number

    eventually(enough, timeout_s, f"{number} records")
    return found


def partitions(broker: EmbeddedBroker, topic: str) -> int:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    return len(admin.list_topics(topic, timeout=10).topics[topic].partitions)


@contextmanager
def script(code: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A Python process that runs this code, and a function that gives the next line it prints."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_is_produced_is_consumed_as_it_is(embedded, make_topic, topic_name):
    """Key, value, headers (a name twice, no value, bytes), timestamp and tombstones come as they were sent."""
    topic, client = make_topic(embedded, 1), producer(embedded)
    headers = [("a", b"1"), ("a", b"\x00\xff"), ("b", None)]
    assert send(client, topic, b"\x00value", key=b"key", headers=headers, timestamp=1_700_000_000_123) == [None]
    assert send(client, topic, None, key=b"key") == [None]

    with consumer(embedded, group_id=topic_name()) as reader:
        reader.subscribe([topic])
        first, second = read(reader, 2)

    assert (first.key(), first.value(), first.headers()) == (b"key", b"\x00value", headers)
    assert first.timestamp() == (TIMESTAMP_CREATE_TIME, 1_700_000_000_123)
    assert (first.offset(), second.offset(), second.value()) == (0, 1, None)


def test_topics_have_the_partitions_they_were_given(embedded, topic_name):
    first, second, unknown = topic_name(), topic_name(), topic_name()
    with EmbeddedBroker({first: 1, second: 6}) as broker:
        broker.create_topic(unknown + "-later", 9)
        assert [partitions(broker, name) for name in (first, second, unknown + "-later")] == [1, 6, 9]
        send(producer(broker), unknown)
        assert partitions(broker, unknown) == DEFAULT_PARTITIONS


def test_a_second_member_of_a_group_gets_its_share_at_once(embedded, make_topic, topic_name):
    """Not after the seconds that a classic group and a real broker's join delay take."""
    topic, group = make_topic(embedded, 4), topic_name("g")
    with consumer(embedded, group_id=group) as first, consumer(embedded, group_id=group) as second:
        first.subscribe([topic])
        eventually(lambda: first.poll(0.05) or len(first.assignment()) == 4)
        began = time.monotonic()
        second.subscribe([topic])

        def shared() -> bool:
            first.poll(0.05)
            second.poll(0.05)
            return len(first.assignment()) == len(second.assignment()) == 2

        eventually(shared, 10, "two partitions each")
        assert time.monotonic() - began < 4


def test_offsets_are_kept_with_their_metadata(embedded, make_topic, topic_name):
    topic, group = make_topic(embedded, 1), topic_name("g")
    send(producer(embedded), topic)
    with consumer(embedded, group_id=group, enable_auto_commit=False) as client:
        client.subscribe([topic])
        read(client, 1)
        client.commit(offsets=[TopicPartition(topic, 0, 1, "what is unfinished")], asynchronous=False)
        committed = client.committed([TopicPartition(topic, 0)], timeout=10)[0]
    assert (committed.offset, committed.metadata) == (1, "what is unfinished")


def test_a_request_fails_with_the_error_that_was_asked_for():
    with EmbeddedBroker({"t": 1}) as broker:
        broker.fail_next("Produce", KafkaError.TOPIC_AUTHORIZATION_FAILED)
        reports = send(producer(broker), "t") + send(producer(broker), "t")
    assert reports[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert reports[1] is None


@pytest.mark.parametrize("error", [KafkaError.NOT_ENOUGH_REPLICAS, KafkaError._TRANSPORT], ids=["refused", "cut off"])
def test_a_client_tries_again_after_an_error_that_passes(error):
    """The record arrives, once, and the errors are used up: as many requests failed as errors were asked for."""
    with EmbeddedBroker({"t": 1}) as broker:
        client = producer(broker, enable_idempotence=True)
        assert send(client, "t", b"first") == [None]
        broker.fail_next("Produce", error, error)
        assert send(client, "t", b"second") == [None]
        assert send(client, "t", b"third") == [None]
        with consumer(broker) as reader:
            reader.assign([TopicPartition("t", 0, 0)])
            assert [message.value() for message in read(reader, 3)] == [b"first", b"second", b"third"]
            reader.unassign()


def test_errors_that_no_request_got_can_be_taken_back():
    with EmbeddedBroker({"t": 1}) as broker:
        broker.fail_next("Produce", *[KafkaError.TOPIC_AUTHORIZATION_FAILED] * 5)
        broker.clear_failures("Produce")
        assert send(producer(broker), "t") == [None]


def test_every_request_named_can_be_made_to_fail():
    with EmbeddedBroker() as broker:
        for name in REQUESTS:
            broker.fail_next(name, KafkaError.UNKNOWN)
            broker.clear_failures(name)


def test_what_waits_for_a_broker_that_is_down_arrives_when_it_is_up_again():
    with EmbeddedBroker({"t": 1}) as broker:
        client = producer(broker)
        assert send(client, "t") == [None]
        broker.broker_down(1)
        reports: list = []
        client.produce("t", b"waits", on_delivery=lambda error, _: reports.append(error))
        assert client.flush(0.5) == 1
        broker.broker_up(1)
        assert client.flush(10) == 0
        assert reports == [None]


def test_a_delivery_to_a_broker_that_stays_down_is_given_up():
    with EmbeddedBroker({"t": 1}) as broker:
        client = producer(broker, message_timeout_ms=500)
        assert send(client, "t") == [None]
        broker.broker_down(1)
        assert [error.code() for error in send(client, "t")] == [KafkaError._MSG_TIMED_OUT]


def test_answers_take_the_time_they_are_given():
    with EmbeddedBroker({"t": 1}) as broker:
        client = producer(broker)
        assert send(client, "t") == [None]
        broker.rtt(1, 400)
        began = time.monotonic()
        assert send(client, "t") == [None]
        assert time.monotonic() - began >= 0.4


def test_a_cluster_of_three_has_three_brokers():
    with EmbeddedBroker({"t": 3}, brokers=3) as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        found = admin.list_topics("t", timeout=10)
        assert sorted(found.brokers) == [1, 2, 3]
        assert {len(partition.replicas) for partition in found.topics["t"].partitions.values()} == {3}
        assert found.cluster_id.startswith("mockCluster")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda broker: broker.create_topic("no blanks", 1), "'no blanks' is no topic name"),
        (lambda broker: broker.create_topic("..", 1), "'..' is no topic name"),
        (lambda broker: broker.create_topic("t", 0), "partitions of topic t is 0: pass a whole number, 1 or more"),
        (lambda broker: broker.create_topic("t", True), "partitions of topic t is True"),
        (lambda broker: broker.fail_next("Product", 1), "unknown request type 'Product': take one of Produce, Fetch"),
        (lambda broker: broker.fail_next("Produce", "no"), "'no' is not a Kafka error code"),
        (lambda broker: broker.broker_down(2), "there is no broker 2: the ids are 1 to 1"),
        (lambda broker: broker.rtt(1, -1), "milliseconds is -1"),
        (lambda _: EmbeddedBroker({"t": 0}), "partitions of topic t is 0"),
        (lambda _: EmbeddedBroker(brokers=0), "brokers is 0"),
    ],
)
def test_wrong_arguments_are_named(embedded, call, said):
    with pytest.raises(ConfigurationError, match=said.replace(".", r"\.")):
        call(embedded)


def test_a_topic_is_made_once(embedded, make_topic):
    topic = make_topic(embedded)
    with pytest.raises(TransportError, match=f"refused create_topic: topic {topic}: .*already exists"):
        embedded.create_topic(topic, 2)


def test_without_confluent_kafka_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ConfigurationError, match="confluent-kafka is not installed; run: pip install confluent-kafka"):
        EmbeddedBroker()


def test_a_library_without_the_mock_cluster_is_named(monkeypatch):
    """A build of confluent-kafka against some other librdkafka may lack these functions."""
    import _ctypes

    monkeypatch.setattr(module, "_library", lambda: _ctypes.__file__)
    with pytest.raises(ConfigurationError, match=r"_ctypes.*has no function rd_kafka_\w+; install a confluent-kafka"):
        EmbeddedBroker()


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setattr(module, "_library", lambda: "/no/such/library.so")
    with pytest.raises(ConfigurationError, match=r"no embedded broker: /no/such/library\.so cannot be loaded"):
        EmbeddedBroker()


def test_a_child_that_does_not_come_up_is_told_with_its_last_words(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no memory left')")
    monkeypatch.setattr(module, "_CHILD", broken)
    with pytest.raises(TransportError, match=r"has ended with exit code 1.*its last words: no memory left"):
        EmbeddedBroker()


def test_a_child_that_hangs_is_given_up_and_ended(monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    (hangs := tmp_path / "hangs.py").write_text(
        f"import os, signal\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\nsignal.pause()"
    )
    monkeypatch.setattr(module, "_CHILD", hangs)
    monkeypatch.setattr(module, "_END_TIMEOUT_S", 0.1)
    with pytest.raises(TransportError, match=r"did not answer start within 1 s"):
        EmbeddedBroker(start_timeout_s=1)
    assert is_gone(int(pid_file.read_text()))


def test_close_ends_the_process_and_may_be_called_twice():
    broker = EmbeddedBroker()
    assert broker.alive
    assert not has_ended(broker.pid)
    broker.close()
    broker.close()
    assert not broker.alive
    assert is_gone(broker.pid)
    with pytest.raises(TransportError, match="is closed: start a new one"):
        broker.create_topic("t", 1)


def test_a_broker_that_was_killed_is_told_by_the_next_call():
    with EmbeddedBroker() as broker:
        os.kill(broker.pid, signal.SIGKILL)
        eventually(lambda: not broker.alive)
        with pytest.raises(TransportError, match="has ended with exit code -9, its topics are lost: start a new one"):
            broker.create_topic("t", 1)
    assert is_gone(broker.pid)


def test_ctrl_c_is_left_to_the_owner():
    with EmbeddedBroker({"t": 1}) as broker:
        os.kill(broker.pid, signal.SIGINT)
        assert send(producer(broker), "t") == [None]
        # Ctrl-C in a terminal goes to the process group of the owner, and the broker is in none of those.
        assert os.getpgid(broker.pid) != os.getpgid(0)


OWNER = """
import os, signal, sys, time
from kser.confluent.embedded import EmbeddedBroker
broker = EmbeddedBroker()
{more}
os.write(1, b"%d\\n" % broker.pid)
signal.pause()
"""

#: A child that the owner forked has the other end of the broker's pipes, and outlives the owner.
FORK = """
fork = os.fork()
if fork == 0:
    time.sleep(60)
    os._exit(0)
os.write(1, b"%d\\n" % fork)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_with_its_owner(number):
    with script(OWNER.format(more="")) as (owner, line):
        pid = int(line())
        assert not has_ended(pid)
        owner.send_signal(number)
        eventually(lambda: has_ended(pid), 10, "the end of the broker")


def test_the_process_ends_with_its_owner_though_a_fork_of_the_owner_lives_on():
    with script(OWNER.format(more=FORK)) as (owner, line):
        fork, pid = int(line()), int(line())
        try:
            owner.kill()
            eventually(lambda: has_ended(pid), 10, "the end of the broker")
            assert not has_ended(fork)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_a_fork_of_the_owner_neither_steers_nor_closes_the_broker():
    code = OWNER.format(
        more="""
if os.fork() == 0:
    try:
        broker.create_topic("t", 1)
    except Exception as error:
        os.write(1, f"{error}\\n".encode())
    broker.close()
    os._exit(0)
os.wait()
broker.create_topic("t", 1)
"""
    )
    with script(code) as (_, line):
        assert "only there it can be steered" in line()
        assert not has_ended(int(line()))


def test_close_ends_the_process_though_a_fork_of_the_owner_lives_on():
    code = OWNER.format(
        more=FORK + "began = time.monotonic()\nbroker.close()\ntook = time.monotonic() - began"
    ).replace("signal.pause()", "os.kill(fork, 9)\nos.write(1, b'%.1f\\n' % took)")
    with script(code) as (_, line):
        assert line().strip().isdigit()  # the pid of the fork
        assert is_gone(int(line()))
        assert float(line()) < 2
