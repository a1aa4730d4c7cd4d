"""20,000 launches of a three-task operation inside a batch, beside a bare confluent-kafka producer. Aim: five times.

The bare producer sends as many messages of the same size and waits for all confirmations. INFO logging is off.
"""

import argparse
import statistics
import time

from common import broker, make_topic, show
from confluent_kafka import Producer as BareProducer

from kser import Operation, OperationRegistry, Result, Task
from kser.confluent.producer import Producer

registry = OperationRegistry()


@registry.subscribe
class Step(Task):
    def run(self):
        return Result(uuid=self.uuid)


@registry.subscribe
class Three(Operation):
    def build_tasks(self, **params):
        return [Step(params=params), Step(params=params), Step(params=params)]


def ours(count: int) -> float:
    start = time.perf_counter()
    with registry.producer.batch():
        for i in range(count):
            Three(params={"i": i}).build().launch()
    return time.perf_counter() - start


def built_only(count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        Three(params={"i": i}).build()
    return time.perf_counter() - start


def bare(bootstrap: str, topic: str, size: int, count: int) -> float:
    producer = BareProducer({"bootstrap.servers": bootstrap, "acks": "all", "enable.idempotence": True, "linger.ms": 5})
    value, failed = b"x" * size, []
    producer.list_topics(topic, timeout=10)

    def confirmed(error, _message):
        if error:
            failed.append(error)

    start = time.perf_counter()
    for i in range(count):
        while True:
            try:
                producer.produce(topic, value, key=b"%d" % i, on_delivery=confirmed)
                break
            except BufferError:
                producer.poll(0.1)
        if i % 1000 == 0:
            producer.poll(0)
    left = producer.flush(60)
    took = time.perf_counter() - start
    assert not left, f"{left} messages left"
    assert not failed, failed[:2]
    return took


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--broker", default="apache")
    options.add_argument("--count", type=int, default=20000)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    with broker(given.broker) as bootstrap:
        topic = make_topic(bootstrap, partitions=6)
        registry.configure(producer=Producer({"bootstrap.servers": bootstrap}), topic=topic)
        first = Three(params={"i": 1}).build()
        first.launch()
        size = len(first.tasks[0].to_Message().to_bytes())
        ours(500)
        pairs = [(ours(given.count), bare(bootstrap, topic, size, given.count)) for _ in range(given.rounds)]
        build = built_only(given.count)
        registry.producer.close()
    mine, theirs = statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)
    show(f"{given.count} launches, {size} bytes each", mine * 1e6 / given.count, "us each")
    show("  of it, building the operation", build * 1e6 / given.count, "us each")
    show("bare producer, as many messages of that size", theirs * 1e6 / given.count, "us each")
    show("ratio", statistics.median(a / b for a, b in pairs), "times", "aim: 5")


if __name__ == "__main__":
    main()
