"""A member that claims a key for the first record it gets, and kills itself (-9) while it settles that.

It says "owns" when it has a record, and goes on when it is told to. Arguments: bootstrap servers, topic, group, the
key, and where to die: the name of a step below.
"""

import os
import select
import signal
import sys

from kser.confluent.transport import ConfluentTransport
from kser.transport import OutRecord, Position
from kser.worker.state import StateStore, owner_of

#: A dead member is missed soon, and what it left open is aborted soon.
CONFIG = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000, "transaction.timeout.ms": 2000}
STEPS = ("claimed", "produced", "offsets", "committed")


class Member:
    """A listener that loads the state as a worker does."""

    def __init__(self, transport, group, topic):
        self.store = StateStore(transport, group)
        self.source = transport.source(group)
        self.owned = []
        self.source.subscribe([topic], self)

    def on_assign(self, partitions):
        committed = self.source.committed(partitions, 60)
        self.store.load(partitions, 60)
        self.owned += partitions
        return [position for position in committed if position.offset >= 0]

    def on_revoke(self, partitions):
        self.store.drop(partitions)
        self.owned = [of for of in self.owned if of not in partitions]

    on_lost = on_revoke


def main(bootstrap: str, topic: str, group: str, key: str, death: str) -> None:
    def reached(step: str) -> None:
        if step == death:
            os.kill(os.getpid(), signal.SIGKILL)

    transport = ConfluentTransport(CONFIG | {"bootstrap.servers": bootstrap})
    member = Member(transport, group, topic)
    sink = transport.sink(f"{group}.claimer")
    sink.begin()
    sink.abort()
    records = []
    while not records:
        records = member.source.poll(0.2, 1)
    print("owns", flush=True)
    member.source.pause(member.owned)
    while not select.select([sys.stdin], [], [], 0)[0]:
        member.source.poll(0.1)
    claim = member.store.claim(records[0].of, key, owner_of(records[0]))
    assert claim.won
    reached("claimed")
    sink.begin()
    sink.produce_all([*claim.records, OutRecord(f"{topic}.out", key.encode(), owner_of(records[0]).encode())])
    assert sink.flush(20) == 0
    reached("produced")
    sink.send_offsets([Position(topic, 0, records[0].offset + 1)], member.source.member())
    reached("offsets")
    sink.commit()
    reached("committed")


if __name__ == "__main__":
    main(*sys.argv[1:])
