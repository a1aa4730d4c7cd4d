"""kser as a peer of the shared benchmark: the contract is in the README of that benchmark, the numbers in ours.

``peer.py preload A|B|L N`` fills the topic, ``peer.py lat N`` starts chains one at a time, ``peer.py worker`` runs the
worker. Environment: BENCH_BOOT, BENCH_TOPIC, BENCH_N, BENCH_W, KSER_DELIVERY, and BENCH_EVENTS=all for default events
(without it none, as the other peers have none). ``probe`` is on PYTHONPATH: it counts what was run.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import probe

from kser import Operation, OperationRegistry, Task, Worker
from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.transport import TopicSpec

BOOTSTRAP, TOPIC = os.environ["BENCH_BOOT"], os.environ["BENCH_TOPIC"]
#: The same for all peers: how long a broker may wait for more to answer a fetch, and when a silent member is out.
FETCH_MS = int(os.environ.get("BENCH_FETCH_MS", "5"))
CONSUMER = {"session.timeout.ms": 6000, "fetch.wait.max.ms": FETCH_MS}

registry = OperationRegistry(topic=TOPIC)


@registry.subscribe(name="noop")
class Noop(Task):
    def run(self):
        probe.hit()


@registry.subscribe(name="s1")
class First(Task):
    def run(self):
        probe.touch()


@registry.subscribe(name="s2")
class Second(First):
    pass


@registry.subscribe(name="s3")
class Third(Task):
    def run(self):
        probe.hit(self.params["i"], self.params["t0"])


@registry.subscribe(name="chain")
class Chain(Operation):
    def build_tasks(self, **params):
        return [First(params=params), Second(params=params), Third(params=params)]


def preload(workload, count):
    transport = ConfluentTransport({"bootstrap.servers": BOOTSTRAP})
    admin = transport.admin()
    if admin.can_create():
        admin.create([TopicSpec(name=TOPIC, partitions=int(os.environ.get("BENCH_PARTITIONS", "1")))])
    else:
        admin.touch([TOPIC])
    with Producer({"bootstrap.servers": BOOTSTRAP}) as producer:
        registry.configure(producer=producer)
        with producer.batch():
            for i in range(count):
                params = {"i": i, "t0": 0}
                if workload == "A":
                    Noop(params=params).send()
                else:
                    Chain(params=params).build().launch()


def latency(count):
    with Producer({"bootstrap.servers": BOOTSTRAP}) as producer:
        registry.configure(producer=producer)
        probe.run_latency(lambda i, t0: Chain(params={"i": i, "t0": t0}).build().launch(), count)


def worker():
    Worker(
        registry,
        topics=[TOPIC],
        group=f"g-{TOPIC}",
        config={"bootstrap.servers": BOOTSTRAP, **CONSUMER},
        delivery=os.environ.get("KSER_DELIVERY"),
        events=os.environ.get("BENCH_EVENTS", "none"),
        concurrency=int(os.environ.get("BENCH_CONCURRENCY", "16")),
    ).run()


if __name__ == "__main__":
    if sys.argv[1] == "preload":
        preload(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "lat":
        latency(int(sys.argv[2]))
    else:
        worker()
