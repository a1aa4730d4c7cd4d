"""What fails on real brokers and processes: crash loops, attempts under kill -9, dead letters."""

import time
import uuid
from collections import Counter

import pytest

from kser import headers
from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.events import EventType, read
from kser.transport import Partition
from kser.worker.offsets import decode
from tests.apps import failing
from tests.processes import new_topic, process, records, wait_for

FAST = ("-X", "session.timeout.ms=3000", "-X", "heartbeat.interval.ms=500")


class Group:
    """Workers of tests.apps.failing on a topic of their own, and what they noted."""

    def __init__(self, bootstrap, folder, partitions):
        self.bootstrap = bootstrap
        self.topic, self.name = new_topic(bootstrap, partitions), f"g{uuid.uuid4().hex[:8]}"
        self.partitions = partitions
        self.runs = folder / "runs"
        self.runs.touch()
        self.log = folder / "workers.log"

    def workers(self, *options):
        return process(
            *("-m", "kser", "worker", "tests.apps.failing:registry", "--topics", self.topic, "--group", self.name),
            *("--bootstrap-servers", self.bootstrap, "--log-level", "warning", *FAST, *options),
            log=self.log,
            RUNS=str(self.runs),
        )

    def noted(self):
        """What ran, and in which process, in the order in which it began."""
        return [line.rsplit(" ", 1) for line in self.runs.read_text().splitlines()]

    def unfinished(self):
        """How many records are not settled."""
        transport = ConfluentTransport({"bootstrap.servers": self.bootstrap})
        source = transport.source(self.name)
        try:
            partitions = [Partition(self.topic, n) for n in range(self.partitions)]
            left = 0
            for position in source.committed(partitions):
                end = source.watermarks(position.of)[1]
                if position.offset < 0:
                    left += end
                    continue
                found = decode(position.offset, position.metadata)
                left += end - max(found.end, position.offset) + len(found.unfinished)
            return left
        finally:
            source.close()

    def dead(self):
        return records(self.bootstrap, f"{self.name}.dlq")

    def events(self):
        return list(read(records(self.bootstrap, f"{self.name}.events")))


@pytest.fixture
def group(apache, tmp_path):
    return lambda partitions=3: Group(apache.bootstrap_servers, tmp_path, partitions)


@pytest.mark.apache
@pytest.mark.parametrize(
    ("culprit", "signal_"),
    [(failing.Aborts, "SIGABRT"), pytest.param(failing.Killed, "SIGKILL", marks=pytest.mark.long)],
)
def test_a_task_that_ends_its_process_ends_in_the_dead_letters_and_its_neighbours_do_not(group, culprit, signal_):
    """Among 2,000 good ones, three workers, each started again when it dies, as by systemd or Kubernetes."""
    at = group()
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        with producer.batch():
            for n in range(2000):
                if n == 1000:
                    culprit(params={}).send()
                failing.Good(params={"n": n}).send()
    with at.workers("--processes", "3"):
        (letter,) = wait_for(at.dead, 120, "the dead letter")
        assert culprit.path in letter.value.decode()
        assert signal_ in headers.text(letter.headers, headers.ERROR)
        wait_for(lambda: len({what for what, _ in at.noted() if what.startswith("good")}) == 2000, 60, "the good ones")
        wait_for(lambda: at.unfinished() <= at.partitions, 60, "all settled")  # markers count as records
    ran = Counter(what for what, _ in at.noted())
    deaths = at.log.read_text().count("was ended by")
    assert deaths == 3
    assert ran[f"{culprit.__name__.lower()} 1"] == deaths + 1  # the last one in a process of its own
    assert len(at.dead()) == 1


@pytest.mark.apache
def test_each_attempt_counts_once_while_workers_are_killed_and_the_exhausted_are_dead_letters_once(group):
    """Messages that fail, with a delay of 1 s and of 10 s, among good ones; two workers, one of them killed twice."""
    at = group()
    bad = 40
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        with producer.batch():
            for n in range(1000):
                failing.Good(params={"n": n}).send()
                if n % 25 == 0:
                    failing.Soon(params={"n": n}).send()
                    failing.Later(params={"n": n, "until": 3 if n % 50 else 1000}).send()
    with at.workers("--name", "one") as first, at.workers("--name", "two"):
        wait_for(lambda: len(retrying(at)) >= bad, 60, "the first failures")
        first.kill()
        first.wait()
        with at.workers("--name", "one") as again:
            wait_for(lambda: len(at.dead()) >= bad // 2, 60, "the first dead letters")
            again.kill()
            again.wait()
            with at.workers("--name", "one"):
                wait_for(
                    lambda: len(at.dead()) >= bad + bad // 2 and at.unfinished() <= 2 * at.partitions, 90, "the end"
                )
    attempts = Counter((event.uuid, event.attempt) for event in retrying(at))
    assert set(attempts.values()) == {1}
    assert Counter(attempt for _, attempt in attempts) == {1: 2 * bad, 2: 2 * bad}
    assert len(at.dead()) == len({letter.key for letter in at.dead()}) == bad + bad // 2
    done = Counter(event.uuid for event in at.events() if event.type == EventType.STEP_DONE)
    assert (len(done), set(done.values())) == (1000 + bad // 2, {1})


@pytest.mark.apache
def test_delayed_messages_that_fell_due_while_no_worker_ran_run_once(group):
    at = group()
    count = 200
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        with producer.batch():
            for n in range(count):
                failing.Good(params={"n": n}).send(delay=31 + n % 3)
        sent = time.time()
        with at.workers():  # it puts them into a tier, where they wait for the broker's clock
            tier = f"{at.name}.retry.10s"
            wait_for(lambda: len(records(at.bootstrap, tier)) >= count, 30, "the tier")
        assert not at.noted()
        time.sleep(max(sent + 34 - time.time(), 0))  # what they wait for is the time itself
        with at.workers("--processes", "2"):
            wait_for(lambda: len(at.noted()) >= count, 60, "all of them")
            wait_for(lambda: at.unfinished() <= at.partitions, 30, "all settled")
    assert Counter(what for what, _ in at.noted()) == {f"good {n} 1": 1 for n in range(count)}


def retrying(at):
    return [event for event in at.events() if event.type == EventType.STEP_RETRYING]
