"""A bare confluent-kafka loop for produce_to_done.py, one commit a batch: arguments bootstrap, topic, group."""

import sys
import time

import orjson
from confluent_kafka import Consumer

bootstrap, topic, group = sys.argv[1:4]
consumer = Consumer(
    {
        "bootstrap.servers": bootstrap,
        "group.id": group,
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "fetch.wait.max.ms": 100,
    }
)
consumer.subscribe([topic])
while True:
    first = consumer.poll(0.2)
    if first is None:
        continue
    for message in [first, *consumer.consume(499, 0)]:
        if message.error():
            continue
        params = orjson.loads(message.value())["params"]
        if params["i"] in (0, params["n"] - 1) or params["i"] < 0:
            print(params["i"], time.monotonic_ns(), flush=True)
    consumer.commit(asynchronous=False)
