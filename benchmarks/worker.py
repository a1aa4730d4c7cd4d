"""The worker as a user starts it: memory over many messages, and what a second process brings.

``worker.py memory`` runs a million no-op tasks through one worker and tells its memory at each tenth: it should stay.
``worker.py growth`` runs a backlog with one process and with two, on a topic of eight partitions. On a machine of two
cores the broker has one of them, so two processes cannot double it there.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from common import ROOT, broker, make_topic, show

from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.transport import Partition
from kser.worker.offsets import decode

sys.path.insert(0, str(ROOT / "benchmarks"))
from worker_app import Noop, registry

PARTITIONS = 8


def fill(bootstrap, topic, count):
    with Producer({"bootstrap.servers": bootstrap}) as producer:
        registry.configure(producer=producer, topic=topic)
        for start in range(0, count, 50_000):
            with producer.batch(timeout=300):
                for n in range(start, min(start + 50_000, count)):
                    Noop(params={"n": n}).send()


def started(bootstrap, topic, group, *options):
    command = ["-m", "kser", "worker", "benchmarks/worker_app.py:registry", "--topics", topic, "--group", group]
    return subprocess.Popen(
        [sys.executable, *command, "--bootstrap-servers", bootstrap, "--log-level", "warning", *options], cwd=ROOT
    )


def finished(source, topic):
    """Offsets that are finished, by what the group has committed; markers of transactions count as well."""
    done = 0
    for position in source.committed([Partition(topic, n) for n in range(PARTITIONS)]):
        _, end, unfinished, *_ = decode(position.offset, position.metadata)
        done += max(end, 0) - len(unfinished)
    return done


def memory_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def stop(process):
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def memory(bootstrap, count, delivery):
    topic, group = make_topic(bootstrap, PARTITIONS), f"g{uuid.uuid4().hex[:8]}"
    fill(bootstrap, topic, count)
    source = ConfluentTransport({"bootstrap.servers": bootstrap}).source(group)
    process = started(bootstrap, topic, group, "--delivery", delivery)
    try:
        for tenth in range(1, 11):
            while finished(source, topic) < count * tenth // 10:
                time.sleep(0.1)
            show(f"{delivery}: memory after {count * tenth // 10:,} messages", memory_mb(process.pid), "MB")
    finally:
        stop(process)
        source.close()


def growth(bootstrap, count, delivery):
    rates = {}
    for processes in (1, 2):
        topic, group = make_topic(bootstrap, PARTITIONS), f"g{uuid.uuid4().hex[:8]}"
        fill(bootstrap, topic, count)
        source = ConfluentTransport({"bootstrap.servers": bootstrap}).source(group)
        process = started(
            bootstrap, topic, group, "--delivery", delivery, "--events", "none", "--processes", str(processes)
        )
        try:
            while not (first := finished(source, topic)):
                time.sleep(0.02)
            begun = time.perf_counter()
            while (last := finished(source, topic)) < count:
                time.sleep(0.02)
            rates[processes] = (min(last, count) - first) / (time.perf_counter() - begun)
        finally:
            stop(process)
            source.close()
        show(f"{delivery}: {processes} process(es)", rates[processes], "tasks/s")
    show(f"{delivery}: two processes beside one", rates[2] / rates[1], "times")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "growth"])
    parser.add_argument("--broker", default="apache", help="apache, embedded, or host:port of one that runs")
    parser.add_argument("--count", type=int, default=0, help="messages (memory 1,000,000; growth 200,000)")
    parser.add_argument("--delivery", default="exactly_once", choices=["exactly_once", "at_least_once"])
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    with broker(options.broker) as bootstrap:
        if options.what == "memory":
            memory(bootstrap, options.count or 1_000_000, options.delivery)
        else:
            growth(bootstrap, options.count or 200_000, options.delivery)


if __name__ == "__main__":
    main()
