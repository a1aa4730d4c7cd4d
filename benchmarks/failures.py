"""What failing messages cost those that do not fail: 10,000 good ones with and without 1,000 bad ones among them.

The bad ones fail at every attempt, with delays of 1 s, 10 s and 1 min, exactly once on one worker. Runs alternate; the
throughput of the good ones is their number by the time from the first to the last of their events. ``--kills``: two
workers instead of one, one of which is killed (SIGKILL) every 3 s, in turn, and started again at once.
"""

import argparse
import statistics
import subprocess
import sys
import time
import uuid

from common import ROOT, broker, make_topic, show
from worker_app import BAD, Good, registry

from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.events import EventType, events_topic, read

PARTITIONS = 6
#: Seconds between two kills.
KILL_S = 3.0


def fill(bootstrap, topic, good, bad, task_s):
    with Producer({"bootstrap.servers": bootstrap}) as producer:
        registry.configure(producer=producer, topic=topic)
        sent = 0
        with producer.batch(timeout=300):
            for n in range(good):
                Good(params={"s": task_s}).send()
                if bad and n % (good // bad) == 0:
                    BAD[sent % len(BAD)](params={}).send()
                    sent += 1


class Workers:
    """The workers of one run; with ``kills`` one of them is killed now and then, and started again."""

    def __init__(self, bootstrap, topic, group, *, kills):
        command = [sys.executable, "-m", "kser", "worker", "benchmarks/worker_app.py:registry", "--topics", topic]
        self.command = [*command, "--group", group, "--bootstrap-servers", bootstrap, "--log-level", "error"]
        self.kills = kills
        self.running = [self.start(n) for n in range(2 if kills else 1)]
        self.killed, self.due = 0, None

    def start(self, number):
        named = ["--name", f"bench-{number}", "-X", "session.timeout.ms=6000"] if self.kills else []
        # Each failure is an error there.
        return subprocess.Popen([*self.command, *named], cwd=ROOT, stderr=subprocess.DEVNULL)

    def turn(self):
        assert all(process.poll() is None for process in self.running), "a worker has ended"
        now = time.monotonic()
        if self.kills and self.due is not None and now >= self.due:
            number = self.killed % len(self.running)
            self.running[number].kill()
            self.running[number].wait(10)
            self.running[number] = self.start(number)
            self.killed += 1
            self.due = now + KILL_S

    def end(self):
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(60)


def measured(bootstrap, good, bad, task_s, *, kills):
    """Good tasks per second."""
    topic, group = make_topic(bootstrap, PARTITIONS), f"g{uuid.uuid4().hex[:8]}"
    fill(bootstrap, topic, good, bad, task_s)
    workers = Workers(bootstrap, topic, group, kills=kills)
    times: list[int] = []
    try:
        while True:  # nothing is read before the group has made its topics
            time.sleep(0.5)
            workers.turn()
            if ConfluentTransport({"bootstrap.servers": bootstrap}).admin().describe([events_topic(group)]):
                break
        reader = ConfluentTransport({"bootstrap.servers": bootstrap}).reader([events_topic(group)], start="beginning")
        while len(times) < good:
            workers.turn()
            times += [e.at for e in read(reader.poll(0.2)) if e.type == EventType.STEP_DONE]
            if times and workers.due is None:
                workers.due = time.monotonic() + KILL_S
        reader.close()
    finally:
        workers.end()
    if kills:
        print(
            f"  {good / (max(times) - min(times)) * 1000:,.0f}/s with {bad:,} failing ones, {workers.killed} kills",
            flush=True,
        )
    return good / (max(times) - min(times)) * 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="apache", help="apache, or host:port of one that runs")
    parser.add_argument("--good", type=int, default=10_000)
    parser.add_argument("--bad", type=int, default=1_000)
    parser.add_argument("--task-ms", type=float, nargs="*", default=[5.0, 0.0], help="what a good task takes")
    parser.add_argument("--kills", action="store_true", help="kill one of two workers every 3 s")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with broker(options.broker) as bootstrap:
        for task_ms in options.task_ms:
            rates = [
                tuple(
                    measured(bootstrap, options.good, bad, task_ms / 1000, kills=options.kills)
                    for bad in (0, options.bad)
                )
                for _ in range(options.rounds)
            ]
            without, beside = (statistics.median(column) for column in zip(*rates, strict=True))
            show(f"good tasks of {task_ms:g} ms alone", without, "tasks/s")
            show(f"  with {options.bad:,} failing ones among {options.good:,}", beside, "tasks/s")
            show("  ratio", statistics.median(b / a for a, b in rates), "times", "aim: 0.9")


if __name__ == "__main__":
    main()
