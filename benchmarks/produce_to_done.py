"""No-op tasks through a broker: tasks/s of a backlog, and milliseconds from produce to run on an idle worker.

Peers in one run: ours (telling nothing, what became of tasks, all), the original kser 0.8.27, a bare loop of
confluent-kafka.
"""

import argparse
import statistics
import subprocess
import sys
import time
import uuid

import orjson
from common import HERE, broker, make_topic, original_python, show
from confluent_kafka import Producer

PEERS = {
    "bare confluent-kafka loop": ("bare.py", sys.executable, [], 100_000),
    "kser, events none": ("ours.py", sys.executable, ["none"], 40_000),
    "kser, events sequence": ("ours.py", sys.executable, ["sequence"], 40_000),
    "kser, events all (default)": ("ours.py", sys.executable, ["all"], 40_000),
    "kser 0.8.27 (auto-commit, no lock file)": ("original.py", None, [], 10_000),
}


def envelope(i: int, n: int) -> bytes:
    u = str(uuid.uuid4())
    result = {"uuid": u, "retcode": 0, "stdout": "", "stderr": "", "retval": {}}
    return orjson.dumps({"uuid": u, "entrypoint": "noop", "params": {"i": i, "n": n}, "result": result, "metadata": {}})


def measure(bootstrap: str, script: str, python: str, more: list[str], count: int) -> tuple[float, float]:
    topic, group = make_topic(bootstrap), f"bench-{uuid.uuid4().hex[:8]}"
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5})
    for i in range(count):
        producer.produce(topic, envelope(i, count), partition=0)
        if i % 500 == 0:
            producer.poll(0)
    assert producer.flush(60) == 0
    idle = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    idle.list_topics(topic, timeout=10)
    worker = subprocess.Popen(
        [python, str(HERE / "peers" / script), bootstrap, topic, group, *more], stdout=subprocess.PIPE, text=True
    )
    try:
        times = {}
        while count - 1 not in times:
            line = worker.stdout.readline()
            assert line, f"{script} ended"
            i, at = line.split()
            times[int(i)] = int(at)
        rate = (count - 1) / (times[count - 1] - times[0]) * 1e9
        waits = []
        for _ in range(60):
            time.sleep(0.01)
            start = time.monotonic_ns()
            idle.produce(topic, envelope(-1, 0), partition=0)
            idle.poll(0)
            waits.append((int(worker.stdout.readline().split()[1]) - start) / 1e6)
        return rate, statistics.median(waits[10:])
    finally:
        worker.terminate()
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--broker", default="apache")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in PEERS}
    with broker(given.broker) as bootstrap:
        for _ in range(given.rounds):
            for name, (script, python, more, count) in PEERS.items():
                rows[name].append(measure(bootstrap, script, python or original_python(), more, count))
    base = statistics.median(r[0] for r in rows["bare confluent-kafka loop"])
    for name, measured in rows.items():
        rate = statistics.median(r[0] for r in measured)
        show(
            name,
            rate,
            "tasks/s",
            f"{rate / base:5.2f} of bare; idle {statistics.median(r[1] for r in measured):.1f} ms",
        )


if __name__ == "__main__":
    main()
