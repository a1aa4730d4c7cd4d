"""What failing messages cost those that do not fail: 10,000 good ones with and without 1,000 bad ones among them.

The bad ones fail at every attempt, with delays of 1 s, 10 s and 1 min, exactly once on one worker. Runs alternate; the
throughput of the good ones is their number by the time from the first to the last of their events. ``--kills N``: two
workers instead of one, which are killed (SIGKILL) in turn and started again at once, N times in each run, at the same
shares of the good ones: kills that come by the clock hit a slower run more often, which makes it slower still.
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
    """The workers of one run; with ``kills`` they are killed so often in turn, and started again."""

    def __init__(self, bootstrap, topic, group, *, kills):
        command = [sys.executable, "-m", "kser", "worker", "benchmarks/worker_app.py:registry", "--topics", topic]
        self.command = [*command, "--group", group, "--bootstrap-servers", bootstrap, "--log-level", "error"]
        self.kills = kills
        self.running = [self.start(n) for n in range(2 if kills else 1)]
        self.killed = 0

    def start(self, number):
        named = ["--name", f"bench-{number}", "-X", "session.timeout.ms=6000"] if self.kills else []
        # Each failure is an error there.
        return subprocess.Popen([*self.command, *named], cwd=ROOT, stderr=subprocess.DEVNULL)

    def turn(self, share):
        """Kill the next one when this share of the good ones is done."""
        assert all(process.poll() is None for process in self.running), "a worker has ended"
        if self.killed < self.kills and share >= (self.killed + 1) / (self.kills + 1):
            number = self.killed % len(self.running)
            self.running[number].kill()
            self.running[number].wait(10)
            self.running[number] = self.start(number)
            self.killed += 1

    def end(self):
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(60)


def measured(bootstrap, good, bad, task_s, *, kills):
    """Seconds from the first good task's end to the last one's."""
    topic, group = make_topic(bootstrap, PARTITIONS), f"g{uuid.uuid4().hex[:8]}"
    fill(bootstrap, topic, good, bad, task_s)
    workers = Workers(bootstrap, topic, group, kills=kills)
    times: list[int] = []
    try:
        while True:  # nothing is read before the group has made its topics
            time.sleep(0.5)
            workers.turn(0)
            if ConfluentTransport({"bootstrap.servers": bootstrap}).admin().describe([events_topic(group)]):
                break
        reader = ConfluentTransport({"bootstrap.servers": bootstrap}).reader([events_topic(group)], start="beginning")
        while len(times) < good:
            times += [e.at for e in read(reader.poll(0.2)) if e.type == EventType.STEP_DONE]
            workers.turn(len(times) / good)
        reader.close()
    finally:
        workers.end()
    assert workers.killed == kills
    took = (max(times) - min(times)) / 1000
    print(f"  {good / took:,.0f}/s with {bad:,} failing ones, {kills} kills", flush=True)
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="apache", help="apache, or host:port of one that runs")
    parser.add_argument("--good", type=int, default=10_000)
    parser.add_argument("--bad", type=int, default=1_000)
    parser.add_argument("--task-ms", type=float, nargs="*", default=[5.0, 0.0], help="what a good task takes")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill two workers in turn, N times a run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with broker(options.broker) as bootstrap:
        for task_ms in options.task_ms:
            took = [
                tuple(
                    measured(bootstrap, options.good, bad, task_ms / 1000, kills=options.kills)
                    for bad in (0, options.bad)
                )
                for _ in range(options.rounds)
            ]
            # Of all rounds together: what a kill costs differs much from one to the next.
            without, beside = (statistics.fmean(column) for column in zip(*took, strict=True))
            show(f"good tasks of {task_ms:g} ms alone", options.good / without, "tasks/s")
            show(f"  with {options.bad:,} failing ones among {options.good:,}", options.good / beside, "tasks/s")
            show("  ratio", without / beside, "times", "aim: 0.9")


if __name__ == "__main__":
    main()
