"""What fails, among what does not, while workers and brokers are killed: each attempt counts once."""

import os
import random
import time
import uuid
from collections import Counter, deque

import pytest

from kser import headers
from kser.confluent.producer import Producer
from kser.events import EventType, events_topic, read
from tests.apps import failing
from tests.chaos.fleet import Fleet, Settings
from tests.chaos.harness import NodeKiller
from tests.chaos.plan import SLOTS, plan
from tests.processes import records, unfinished, wait_for

pytestmark = [pytest.mark.long, pytest.mark.chaos, pytest.mark.apache, pytest.mark.timeout(600)]

GOOD = 10_000
BAD = 1_000
PARTITIONS = 6
SECONDS = 90.0
SESSION_S = 3.0
PACE_S = 6.0


class Trouble:
    """Workers of tests.apps.failing, and what is done to them and to the brokers."""

    def __init__(self, kafka, folder, seed):
        self.kafka = kafka
        self.seed = seed
        self.topic = self.group = f"failing-{uuid.uuid4().hex[:8]}"
        kafka.create_topic(self.topic, PARTITIONS)
        settings = Settings(
            bootstrap=kafka.bootstrap_servers,
            topic=self.topic,
            group=self.group,
            delivery="exactly_once",
            protocol="classic",
            session_s=SESSION_S,
            named=True,
            logs=folder,
            app="tests.apps.failing:registry",
        )
        self.fleet = Fleet(settings, print)
        self.nodes = NodeKiller(kafka, print)
        self.done = Counter()

    def make(self):
        """Do what the seed says, for SECONDS."""
        steps = deque(plan(self.seed, SECONDS, pace_s=PACE_S, session_s=SESSION_S, nodes=self.kafka.nodes))
        start = time.monotonic()
        while (now := time.monotonic() - start) < SECONDS:
            while steps and now >= steps[0].at_s:
                step = steps.popleft()
                self.done[step.what] += self.do(step)
            self.turn()
        self.fleet.settle_down()
        while self.nodes.busy:
            self.turn()

    def do(self, step):
        if step.what == "broker":
            return self.nodes.kill(int(step.target), step.for_s)
        if step.what == "kill":
            return self.fleet.kill(step.target, step.for_s)
        if step.what == "terminate":
            return self.fleet.terminate(step.target, step.for_s)
        return step.what == "pause" and self.fleet.pause(step.target, step.for_s)

    def turn(self):
        self.fleet.turn()
        self.nodes.turn()
        time.sleep(0.05)

    def events(self):
        return list(read(records(self.kafka.bootstrap_servers, events_topic(self.group))))

    def dead(self):
        return records(self.kafka.bootstrap_servers, f"{self.group}.dlq")


@pytest.fixture
def trouble(apache3, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))  # the workers have it from this process
    made = Trouble(apache3, tmp_path, int(os.environ.get("CHAOS_SEED") or random.randrange(10**6)))
    print(f"seed {made.seed}: CHAOS_SEED={made.seed} does the same again")
    yield made
    made.fleet.close()
    made.nodes.restore()


def test_a_thousand_failing_among_ten_thousand_good_ones_under_kills(trouble):
    """Delays of 1 s, 10 s and 1 min. Half of the failing ones succeed at their last attempt, the others never do."""
    kinds = (failing.Soon, failing.Later, failing.MuchLater)
    attempts, recovers, expected = {}, set(), set()
    with Producer({"bootstrap.servers": trouble.kafka.bootstrap_servers, "log_level": 0}) as producer:
        failing.registry.configure(producer=producer, topic=trouble.topic)
        with producer.batch():
            for n in range(GOOD):
                task = failing.Good(params={"n": n})
                task.send()
                expected.add(task.uuid)
                if n % (GOOD // BAD) == 0:
                    cls = kinds[len(attempts) % len(kinds)]
                    last = cls.retry.attempts
                    task = cls(params={"n": n, "until": last if len(attempts) % 2 else last + 1})
                    task.send()
                    attempts[task.uuid] = last
                    if len(attempts) % 2 == 0:
                        recovers.add(task.uuid)
    assert len(attempts) == BAD
    for slot in SLOTS:
        trouble.fleet.start(slot)
    trouble.make()
    exhausted = attempts.keys() - recovers

    def ended():
        trouble.fleet.turn()
        done = {event.uuid for event in trouble.events() if event.type == EventType.STEP_DONE}
        return done >= expected | recovers and len(trouble.dead()) >= len(exhausted)

    wait_for(ended, 240, "the end of all of them")
    trouble.fleet.end()
    events = trouble.events()
    done = Counter(event.uuid for event in events if event.type == EventType.STEP_DONE)
    assert done == dict.fromkeys(expected | recovers, 1)
    failed = Counter(event.uuid for event in events if event.type == EventType.STEP_FAILED)
    assert failed == dict.fromkeys(exhausted, 1)
    retried = Counter((event.uuid, event.attempt) for event in events if event.type == EventType.STEP_RETRYING)
    assert retried == {(name, number): 1 for name, last in attempts.items() for number in range(1, last)}
    letters = trouble.dead()
    assert {headers.number(letter.headers, headers.ATTEMPT) for letter in letters} <= set(attempts.values())
    assert Counter(letter.key.decode() for letter in letters) == dict.fromkeys(exhausted, 1)
    assert not trouble.fleet.faults
    assert unfinished(trouble.kafka.bootstrap_servers, trouble.group, trouble.topic, PARTITIONS) <= PARTITIONS
    print(f"done to them: {dict(trouble.done)}")
    assert trouble.done["kill"] >= 3
