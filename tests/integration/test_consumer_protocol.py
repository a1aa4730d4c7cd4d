"""KIP-848 on Apache Kafka: what a member does not take for granted."""

import time

import pytest

from kser.confluent.transport import ConfluentTransport
from kser.testing import eventually
from kser.transport import OutRecord
from tests.processes import new_topic

#: tests/apache_kafka.py: group.consumer.heartbeat.interval.ms is 1 s.
HEARTBEAT_S = 1.0


class Listener:
    def __init__(self):
        self.came = 0.0

    def on_assign(self, partitions):
        self.came = time.monotonic()

    def on_revoke(self, partitions):
        pass

    on_lost = on_revoke


@pytest.mark.apache
@pytest.mark.parametrize("meddled", [False, True])
def test_nothing_is_given_of_a_new_partition_before_the_coordinator_could_take_it_back(apache, meddled):
    """Not even when it is paused and resumed meanwhile; and then everything."""
    topic = new_topic(apache.bootstrap_servers)
    transport = ConfluentTransport({"bootstrap.servers": apache.bootstrap_servers, "group.protocol": "consumer"})
    sink = transport.sink()
    for n in range(5):
        sink.produce(OutRecord(topic, b"k", b"%d" % n))
    assert sink.flush(10) == 0
    sink.close()
    source, listener = transport.source(f"g-{topic}"), Listener()
    try:
        source.subscribe([topic], listener)
        eventually(lambda: source.poll(0.05) == [] and listener.came, 30)
        if meddled:
            source.pause(source.assignment())
            source.resume(source.assignment())
        found = eventually(lambda: source.poll(0.05), 30)
        assert time.monotonic() - listener.came > 1.2 * HEARTBEAT_S
        found += source.poll(5) if len(found) < 5 else []
        assert [record.value for record in found] == [b"%d" % n for n in range(5)]
    finally:
        source.close()
