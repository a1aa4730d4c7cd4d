"""Keyed state on Apache Kafka: members that die while they settle a claim, transactions that are open, topics."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from confluent_kafka.admin import NewPartitions

from kser.confluent.transport import ConfluentTransport
from kser.errors import ConfigurationError
from kser.testing import eventually
from kser.transport import OutRecord, Partition, Position
from kser.worker.state import StateStore, owner_of, state_topic
from tests.apps.claimer import CONFIG, STEPS, Member
from tests.brokers import make_topic, unique
from tests.processes import ROOT, environment


@pytest.fixture
def opened():
    with ExitStack() as stack:
        yield stack


def connect(apache):
    return ConfluentTransport(CONFIG | {"bootstrap.servers": apache.bootstrap_servers})


def everything(transport, topic, partition=0):
    return [record for batch in transport.read([Partition(topic, partition)], 30) for record in batch]


def write(opened, transport, *records):
    sink = transport.sink()
    opened.callback(sink.close)
    assert sink.deliver(records, 20) == []


@pytest.mark.parametrize("death", STEPS)
def test_who_takes_over_from_a_member_that_was_killed_sees_its_claim_exactly_if_it_was_committed(apache, opened, death):
    """Two records claim one key. The member that has the first one dies; the other member is there already."""
    transport, topic, group = connect(apache), make_topic(apache, 1), unique("g")
    apache.create_topic(f"{topic}.out", 1)
    write(opened, transport, *(OutRecord(topic, b"k", b"%d" % n) for n in range(2)))
    command = [sys.executable, "-m", "tests.apps.claimer", apache.bootstrap_servers, topic, group, "start:1", death]
    child = opened.enter_context(
        subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    )
    opened.callback(child.kill)
    assert child.stdout.readline() == "owns\n"
    heir = Member(transport, group, topic)
    opened.callback(heir.source.close)
    found = []
    eventually(lambda: found.extend(heir.source.poll(0.1)) or heir.source.joined, 30, "joined")
    assert not heir.owned
    child.stdin.write("go\n")
    assert child.wait(30) == -signal.SIGKILL
    wanted = 1 if death == "committed" else 2
    eventually(lambda: found.extend(heir.source.poll(0.1)) or len(found) == wanted, 60, "what is left of the topic")
    last = found[-1]
    claim = heir.store.claim(last.of, "start:1", owner_of(last))
    if death == "committed":
        assert not claim.won
        assert claim.winner.owner == f"{topic}/0/0"
    else:  # whoever claims it first now
        assert claim.won
        assert not heir.store.claim(last.of, "start:1", owner_of(found[0])).won
        sink = transport.sink(f"{group}.heir")
        opened.callback(sink.close)
        sink.begin()
        sink.produce_all([*claim.records, OutRecord(f"{topic}.out", b"start:1", owner_of(last).encode())])
        sink.send_offsets([Position(topic, 0, 2)], heir.source.member())
        sink.commit()
        heir.store.settled(claim)
    winner = f"{topic}/0/{0 if death == 'committed' else 1}"
    assert [record.value for record in everything(transport, f"{topic}.out")] == [winner.encode()]
    store = StateStore(transport, group)
    store.load([Partition(topic, 0)])
    assert store.get(Partition(topic, 0), "start:1").owner == winner


def test_a_load_waits_for_an_open_transaction_and_sees_what_was_committed_behind_it(apache, opened):
    """The last stable offset alone would hide a claim whose record was settled long since."""
    transport, topic, group = connect(apache), make_topic(apache, 1), unique("g")
    of, first = Partition(topic, 0), StateStore(transport, group)
    first.load([of])
    slow, quick = transport.sink(unique("tx")), transport.sink(unique("tx"))
    for sink, key in ((slow, "slow"), (quick, "quick")):
        opened.callback(sink.close)
        sink.begin()
        sink.produce_all(first.claim(of, key, f"{topic}/0/0").records)
        assert sink.flush(20) == 0
    quick.commit()
    heir = StateStore(transport, group)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(heir.load, [of], 30)
        slow.commit()
        loading.result(40)
    assert {key: heir.get(of, key).owner for key in ("slow", "quick")} == dict.fromkeys(
        ("slow", "quick"), f"{topic}/0/0"
    )


def test_a_state_topic_is_made_compacted_and_is_refused_when_its_task_topic_grew(apache, opened):
    transport, topic, group = connect(apache), make_topic(apache, 2), unique("g")
    store, name = StateStore(transport, group), state_topic(group, topic)
    store.load([Partition(topic, 0), Partition(topic, 1)])
    made = transport.admin().describe([name])[name]
    assert (made.partitions, made.config["cleanup.policy"]) == (2, "compact")
    for future in apache.admin.create_partitions([NewPartitions(topic, 3)]).values():
        future.result(20)
    eventually(lambda: transport.admin().describe([topic])[topic].partitions == 3, 20)
    with pytest.raises(ConfigurationError, match=f"{name}: 2 partitions, and {topic} has 3: partitions were added"):
        store.load([Partition(topic, 2)])


def test_a_state_of_many_keys_is_loaded_whole(apache, opened):
    transport, topic, group = connect(apache), make_topic(apache, 1), unique("g")
    of, store = Partition(topic, 0), StateStore(transport, group)
    store.load([of])
    records = [record for n in range(20_000) for record in store.claim(of, f"k{n}", f"{topic}/0/{n}").records]
    write(opened, transport, *records, *(OutRecord(r.topic, r.key, None, partition=0) for r in records[::4]))
    heir = StateStore(transport, group)
    heir.load([of], 30)
    assert len(heir) == 15_000
    assert heir.get(of, "k0") is None
    assert heir.get(of, "k19999").owner == f"{topic}/0/19999"
