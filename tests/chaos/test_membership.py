"""KIP-848: a member that missed what the coordinator told it gets back into step by itself."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from kser.confluent.transport import ConfluentTransport
from kser.testing import eventually
from kser.transport import Partition, Source
from tests.apache_kafka import ApacheKafka
from tests.brokers import unique
from tests.chaos.stage import Stage
from tests.chaos.topics import group_state, set_session
from tests.kafka_proxy import KafkaProxy, wait_hit

pytestmark = [pytest.mark.apache, pytest.mark.chaos]

PARTITIONS = 4
SESSION_S = 3.0
#: Longer than a heartbeat interval, which is a sixth of the session timeout here, and shorter than the session.
DEAF_S = 2.0
#: docs/worker.md promises 30 s; the rest is for a busy machine.
WITHIN_S = 40

LONG = pytest.mark.long


class Member:
    """A member of the group, polled by a thread of its own."""

    def __init__(self, bootstrap: str, group: str, topic: str, name: str | None = None) -> None:
        transport = ConfluentTransport({"bootstrap.servers": bootstrap, "group.protocol": "consumer"})
        self.owned: frozenset[int] = frozenset()
        self.told: list[str] = []
        self._source: Source = transport.source(group, member_id=name)
        self._stop = threading.Event()
        self._source.subscribe([topic], self)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self.told.append("assign")

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self.told.append("revoke")

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        self.told.append("lost")

    def _work(self) -> None:
        while not self._stop.is_set():
            self._source.poll(0.1)
            self.owned = frozenset(p.partition for p in self._source.assignment())
        self._source.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def proxy(apache: ApacheKafka) -> Iterator[KafkaProxy]:
    with KafkaProxy(apache.bootstrap_servers) as one:
        yield one


@contextmanager
def deaf(proxy: KafkaProxy) -> Iterator[None]:
    """The coordinator hears the heartbeats of who is behind the proxy, and is not heard."""
    rule = proxy.lose_answer("ConsumerGroupHeartbeat", count=None)
    wait_hit(rule)
    yield
    time.sleep(DEAF_S)
    rule.end()


def group_of(apache: ApacheKafka) -> tuple[str, str]:
    group, topic = unique("g"), unique("t")
    apache.create_topic(topic, PARTITIONS)
    set_session(apache.admin, group, SESSION_S)
    return group, topic


def shared(*members: Member) -> bool:
    """Each partition has one owner, and each member its share."""
    return sorted(n for member in members for n in member.owned) == list(range(PARTITIONS)) and all(
        len(member.owned) == PARTITIONS // len(members) for member in members
    )


def wait_shared(apache: ApacheKafka, group: str, *members: Member) -> None:
    try:
        eventually(lambda: shared(*members), WITHIN_S, "every partition has an owner")
    except AssertionError as error:
        state = "\n".join(group_state(apache.admin, group))
        raise AssertionError(f"{error}; the members have {[sorted(m.owned) for m in members]}\n{state}") from None


@pytest.mark.parametrize("name", [pytest.param(None, id="no name"), pytest.param("first", id="static", marks=LONG)])
def test_a_member_that_was_not_told_to_let_go_of_partitions_lets_go_of_them(
    apache: ApacheKafka, proxy: KafkaProxy, opened: ExitStack, caplog, name
):
    caplog.set_level(logging.WARNING, "kser.confluent")
    group, topic = group_of(apache)
    first = Member(proxy.bootstrap_servers, group, topic, name)
    opened.callback(first.close)
    wait_shared(apache, group, first)
    with deaf(proxy):
        second = Member(apache.bootstrap_servers, group, topic)
        opened.callback(second.close)
        eventually(lambda: len(apache_members(apache, group)) == 2, 20, "the second one is in the group")
    wait_shared(apache, group, first, second)
    assert f"Leaving group {group} and joining it anew" in caplog.text
    assert first.told == ["assign", "revoke", "assign"]


def test_a_member_that_was_not_told_what_it_was_given_takes_it(
    apache: ApacheKafka, proxy: KafkaProxy, opened: ExitStack
):
    """The coordinator itself sees to that: the member's epoch has moved, so its next heartbeat is refused."""
    group, topic = group_of(apache)
    first = Member(proxy.bootstrap_servers, group, topic)
    opened.callback(first.close)
    second = Member(apache.bootstrap_servers, group, topic)
    opened.callback(second.close)
    wait_shared(apache, group, first, second)
    with deaf(proxy):
        second.close()
        eventually(lambda: len(apache_members(apache, group)) == 1, 20, "the second one has left")
    wait_shared(apache, group, first)


@pytest.mark.parametrize("delivery", ["exactly_once", pytest.param("at_least_once", marks=LONG)])
def test_a_worker_that_joins_anew_loses_nothing_and_exactly_once_doubles_nothing(
    apache: ApacheKafka, proxy: KafkaProxy, opened: ExitStack, tmp_path, delivery
):
    stage = Stage(apache, tmp_path, delivery=delivery, protocol="consumer", named=False, via=proxy.bootstrap_servers)
    with stage:
        stage.start()
        stage.launch()
        stage.wait_done()
        with deaf(proxy):
            other = Member(apache.bootstrap_servers, stage.group, stage.topic)
            opened.callback(other.close)
            eventually(lambda: len(apache_members(apache, stage.group)) == 2, 20, "the other one is in the group")
        for seed in range(2, 14):  # it is at work when it finds out
            stage.launch(seed=seed)
            stage.tail.read(2)
        stage.wait_log("joining it anew", WITHIN_S)
        eventually(lambda: other.owned, WITHIN_S, "the other one has its share")
        other.close()
        stage.wait_done()
        stage.check()


def apache_members(apache: ApacheKafka, group: str) -> list[str]:
    return [line for line in group_state(apache.admin, group) if line.startswith("member ")]
