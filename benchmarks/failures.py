"""What failing messages cost those that do not fail: 10,000 good ones with and without 1,000 bad ones among them.

The bad ones fail at every attempt, with delays of 1 s, 10 s and 1 min, exactly once on one worker. Runs alternate; the
throughput of the good ones is their number by the time from the first to the last of their events. ``--kills N``: two
workers instead of one, which are killed (SIGKILL) in turn and started again at once, N times in each run, at the same
shares of the good ones: kills that come by the clock hit a slower run more often, which makes it slower still.
``--faults SECONDS``: what the fault suite does (tests/chaos) to three workers and three nodes for so long, the same to
both runs of a round; the throughput is how many good ones are done by then.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from pathlib import Path

from common import ROOT, broker, make_topic, show
from worker_app import BAD, Good, registry

from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.events import EventType, events_topic, read
from tests.apache_kafka import ApacheKafka
from tests.chaos.fleet import Fleet, Settings
from tests.chaos.harness import NodeKiller
from tests.chaos.plan import SLOTS, plan

PARTITIONS = 6
SESSION_S = 3.0
#: Mean seconds between two faults, as in the fault suite's long form.
PACE_S = 8.0


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


def under_faults(kafka, good, bad, task_s, *, seconds, seed):
    """How many good tasks are done after so many seconds of faults: what they are follows from the seed."""
    topic, group = make_topic(kafka.bootstrap_servers, PARTITIONS), f"g{uuid.uuid4().hex[:8]}"
    fill(kafka.bootstrap_servers, topic, good, bad, task_s)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            bootstrap=kafka.bootstrap_servers,
            topic=topic,
            group=group,
            delivery="exactly_once",
            protocol="classic",
            session_s=SESSION_S,
            named=True,
            logs=Path(folder),
            app="benchmarks/worker_app.py:registry",
            log_level="error",
        )
        fleet, nodes, made = Fleet(settings, print), NodeKiller(kafka, lambda line: None), 0
        try:
            for slot in SLOTS:
                fleet.start(slot)
            transport = ConfluentTransport({"bootstrap.servers": kafka.bootstrap_servers})
            while not transport.admin().describe([events_topic(group)]):
                time.sleep(0.2)
            reader = transport.reader([events_topic(group)], start="beginning")
            while not read(reader.poll(0.1)):
                pass
            steps = deque(plan(seed, seconds, pace_s=PACE_S, session_s=SESSION_S, nodes=kafka.nodes))
            start, times = time.monotonic(), []
            began_ms = int(time.time() * 1000)
            while (now := time.monotonic() - start) < seconds:
                while steps and now >= steps[0].at_s:
                    step = steps.popleft()
                    if step.what == "broker":
                        made += nodes.kill(int(step.target), step.for_s)
                    elif step.what != "add":
                        orders = {"kill": fleet.kill, "terminate": fleet.terminate, "pause": fleet.pause}
                        made += orders[step.what](step.target, step.for_s)
                fleet.turn()
                nodes.turn()
                times += [e.at for e in read(reader.poll(0.05)) if e.type == EventType.STEP_DONE]
            fleet.settle_down()
            while nodes.busy:
                nodes.turn()
                time.sleep(0.05)
            until = time.monotonic() + 5  # what was settled and not read yet
            while time.monotonic() < until:
                times += [e.at for e in read(reader.poll(0.1)) if e.type == EventType.STEP_DONE]
            reader.close()
        finally:
            fleet.close()
            nodes.restore()
    done = sum(began_ms <= at < began_ms + seconds * 1000 for at in times)
    assert done < 0.95 * good, "too few good ones for so many seconds"
    print(f"  seed {seed}: {done / seconds:,.0f}/s with {bad:,} failing ones, {made} faults", flush=True)
    return seconds / done


def faults(options):
    """The rounds under the fault suite's kills."""
    with ApacheKafka(nodes=3) as kafka:
        for task_ms in options.task_ms:
            took = [
                tuple(
                    under_faults(kafka, options.good, bad, task_ms / 1000, seconds=options.faults, seed=seed)
                    for bad in (0, options.bad)
                )
                for seed in range(1, options.rounds + 1)
            ]
            tell(task_ms, took, 1, options)


def tell(task_ms, took, good, options):
    """``took``: seconds for so many good ones, alone and beside failing ones, of each round."""
    # Of all rounds together: what a kill costs differs much from one to the next.
    without, beside = (statistics.fmean(column) for column in zip(*took, strict=True))
    show(f"good tasks of {task_ms:g} ms alone", good / without, "tasks/s")
    show(f"  with {options.bad:,} failing ones among {options.good:,}", good / beside, "tasks/s")
    print(f"  ratio {without / beside:.2f} (aim: 0.9), by round {', '.join(f'{a / b:.2f}' for a, b in took)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="apache", help="apache, or host:port of one that runs")
    parser.add_argument("--good", type=int, default=10_000)
    parser.add_argument("--bad", type=int, default=1_000)
    parser.add_argument("--task-ms", type=float, nargs="*", default=[5.0, 0.0], help="what a good task takes")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill two workers in turn, N times a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", type=float, metavar="SECONDS", help="what the fault suite does, for so long a run")
    options = parser.parse_args()
    if options.faults:
        faults(options)
        return
    with broker(options.broker) as bootstrap:
        for task_ms in options.task_ms:
            took = [
                tuple(
                    measured(bootstrap, options.good, bad, task_ms / 1000, kills=options.kills)
                    for bad in (0, options.bad)
                )
                for _ in range(options.rounds)
            ]
            tell(task_ms, took, options.good, options)


if __name__ == "__main__":
    main()
