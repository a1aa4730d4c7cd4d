"""A worker that kills itself (-9) when it would commit what it has run: what follows is confirmed, the offset is not.

Arguments: bootstrap servers, topic, group.
"""

import os
import signal
import sys

from kser import Worker
from kser.confluent.transport import ConfluentTransport
from tests.apps.dice import registry


class KillingTransport(ConfluentTransport):
    def source(self, group, **options):
        source = super().source(group, **options)

        def commit(*arguments, **options):
            os.kill(os.getpid(), signal.SIGKILL)

        source.commit_later = commit  # commit() notes that the partition is worked on, before anything is run
        return source


CONFIG = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000}

if __name__ == "__main__":
    bootstrap, topic, group = sys.argv[1:4]
    transport = KillingTransport(CONFIG | {"bootstrap.servers": bootstrap})
    Worker(registry, topics=[topic], group=group, transport=transport, delivery="at_least_once").run()
